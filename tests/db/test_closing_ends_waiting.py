"""Whoever waits for commits of a database learns that it was closed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from entidb import Database, F
from entidb.errors import DatabaseClosedError


async def _waits(database: Database) -> None:
    async with database.aio as db:
        notes = db.collection("notes")
        await notes.add({"n": 1})
        seen: list[object] = []

        async def rows() -> None:
            async for found in notes.where(F.n > 0).alive():
                seen.append(found)

        async def events() -> None:
            async for event in db.changes(after=0):
                seen.append(event)

        tasks = [asyncio.create_task(rows()), asyncio.create_task(events())]
        async with asyncio.timeout(20):
            while len(seen) < 2:
                await asyncio.sleep(0)
    async with asyncio.timeout(20):
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in ended] == [DatabaseClosedError] * 2


def test_what_a_task_waits_for_ends_when_the_database_is_closed(tmp_path: Path) -> None:
    asyncio.run(_waits(Database.in_memory()))
    asyncio.run(_waits(Database.open(tmp_path / "db")))


def test_a_live_query_hears_at_once_that_the_database_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("entidb.db.live._LOOK_S", 3600.0)  # nobody looks by the clock
    db = Database.in_memory()
    notes = db.collection("notes")
    first, ended = threading.Event(), threading.Event()

    def follow() -> None:
        try:
            for _ in notes.where().live():
                first.set()
        except DatabaseClosedError:
            ended.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    assert first.wait(20)
    db.close()
    assert ended.wait(20)
    thread.join(20)


def test_what_has_ended_is_not_told_of_the_end() -> None:
    with Database.in_memory() as db:
        live = db.collection("notes").where().live()
        assert len(db._observers.when_closed) == 1
        live.close()
        live.close()
        assert db._observers.when_closed == []

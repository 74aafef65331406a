"""Queries that go on: what they find now, and again whenever that has changed."""

from __future__ import annotations

import asyncio
import gc
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from entidb import AsyncDatabase, Database, F
from entidb.db.live import Live
from entidb.errors import DatabaseClosedError, QueryError, ValueTypeError
from tests.support import FakeClock, World, uid

WAIT_S = 60.0


@dataclass
class Item:
    name: str
    price: int = 0


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(clock=FakeClock()) as opened:
        yield opened


def names(found: list[tuple[uuid.UUID, Item]]) -> list[str]:
    return [item.name for _, item in found]


def test_what_is_found_comes_at_once_and_again_when_it_has_changed(db: Database) -> None:
    stock = db.collection("stock", Item)
    stock[uid(1)] = Item("tea", 3)
    with stock.where(F.price > 2).order_by("-price").live() as live:
        assert names(next(live)) == ["tea"]
        stock[uid(2)] = Item("cup", 9)
        assert names(next(live)) == ["cup", "tea"]
        stock.patch(uid(2), price=1)
        assert names(next(live)) == ["tea"]
        del stock[uid(1)]
        assert names(next(live)) == []
    assert list(live) == []
    assert db._observers.listeners == []


def test_what_does_not_change_the_answer_is_not_given(db: Database) -> None:
    stock = db.collection("stock", Item)
    stock[uid(1)] = Item("tea", 3)
    live = stock.where(F.price > 2).limit(1).live()
    assert names(next(live)) == ["tea"]
    seen: list[list[str]] = []
    thread = threading.Thread(target=lambda: seen.append(names(next(live))))
    thread.start()
    db["other"].add(1)
    stock[uid(2)] = Item("cheap", 1)
    stock[uid(3)] = Item("behind the limit", 9)
    stock[uid(1)] = Item("tea", 3)
    thread.join(0.1)
    assert thread.is_alive() and seen == []
    stock[uid(1)] = Item("Assam", 3)
    thread.join(WAIT_S)
    assert seen == [["Assam"]]
    live.close()


def test_commits_that_come_at_once_are_one_change_and_each_answer_one_snapshot(
    db: Database,
) -> None:
    pairs = db["pairs"]
    live = pairs.where().live()
    assert next(live) == []
    for number in range(50):
        with db.transaction() as tx:
            tx["pairs"][uid(1)] = tx["pairs"][uid(2)] = number
    assert [value for _, value in next(live)] == [49, 49]
    seen: list[list[Any]] = []

    def follow() -> None:
        for found in live:
            seen.append([value for _, value in found])

    thread = threading.Thread(target=follow)
    thread.start()
    for number in range(50, 300):
        with db.transaction() as tx:
            tx["pairs"][uid(1)] = tx["pairs"][uid(2)] = number
    while not seen or seen[-1] != [299, 299]:
        assert thread.is_alive()
    live.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert all(first == second for first, second in seen)
    assert [first for first, _ in seen] == sorted({first for first, _ in seen})


def test_what_synchronisation_brings_is_a_change(db: Database) -> None:
    world = World()
    one, other = world.device(), world.device()
    live = other.db["notes"].where().live()
    assert next(live) == []
    one.put(("notes", 1, "from one"))
    one.settle()
    other.settle()
    assert [value for _, value in next(live)] == ["from one"]
    live.close()


def test_one_that_nobody_has_any_more_is_not_told(db: Database) -> None:
    live = db["notes"].where().live()
    next(live)
    assert len(db._observers.listeners) == 1
    del live
    gc.collect()
    assert db._observers.listeners == []


def test_closing_the_database_ends_it(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entidb.db.live._LOOK_S", 0.01)
    live = db["notes"].where().live()
    next(live)
    db.close()
    with pytest.raises(DatabaseClosedError):
        next(live)
    live.close()


def test_what_does_not_fit_raises_and_it_goes_on(db: Database) -> None:
    stock = db.collection("stock", Item)
    live: Live[Item] = stock.where().live()
    next(live)
    db["stock"][uid(1)] = "no item"
    with pytest.raises(ValueTypeError):
        next(live)
    stock[uid(1)] = Item("tea")
    assert names(next(live)) == ["tea"]
    skipping = db.collection("stock", Item, on_invalid="skip").where().limit(1).live()
    db["stock"][uid(0)] = "no item"
    assert names(next(skipping)) == ["tea"]
    live.close()
    skipping.close()


def test_where_nothing_changes_there_is_nothing_live(db: Database) -> None:
    with db.transaction() as tx, db.snapshot() as snapshot:
        for collection in (tx["notes"], snapshot["notes"]):
            with pytest.raises(QueryError, match="nothing changes"):
                collection.where().live()


# ---------------------------------------------------------------- asyncio


def test_it_is_awaited_as_well(tmp_path: Path) -> None:
    async def main() -> list[list[str]]:
        plain = await Database.open_async(tmp_path / "db")
        seen: list[list[str]] = []
        async with asyncio.timeout(WAIT_S), plain.aio as db:
            stock = db.collection("stock", Item)

            async def follow(db: AsyncDatabase) -> None:
                async for found in stock.where(F.price > 2).alive():
                    seen.append(names(found))

            task = asyncio.create_task(follow(db))
            while len(seen) < 1:
                await asyncio.sleep(0.001)
            await stock.put(uid(1), Item("tea", 3))
            while len(seen) < 2:
                await asyncio.sleep(0.001)
            await stock.put(uid(2), Item("cheap", 1))
            await stock.patch(uid(1), name="Assam")
            while len(seen) < 3:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert plain._observers.listeners == []
        return seen

    assert asyncio.run(main()) == [[], ["tea"], ["Assam"]]

"""A process that gets no thread for a moment, as with a limit of processes: what needed one says so
or does without, and the next who asks has it.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from entidb.db import Database, Index
from entidb.errors import ServerBusyError, SyncStateError, TransportError
from entidb.server import SyncServer
from entidb.server.admin.tasks import Tasks
from entidb.server.checks import FileChecks
from entidb.server.group_commit import GroupCommitter
from entidb.server.hooks import Grant
from entidb.storage import opening
from entidb.storage.postgres.pulse import Heartbeat
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncEngine
from entidb.sync.background import Background
from entidb.sync.http.watchdog import Watchdog
from entidb.sync.live import Channel
from entidb.types import SystemClock
from tests.server.support import ManualClock, handshake, push
from tests.server.test_images import asked, fill, make
from tests.waiting import until

WAIT_S = 60.0
Out = Callable[[str], None]


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[Out]:
    """``out(name)``: no thread of that name begins, until ``out("")``."""
    start, none_of = threading.Thread.start, [""]

    def begin(thread: threading.Thread) -> None:
        if none_of[0] and thread.name.startswith(none_of[0]):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", begin)

    def set_out(name: str) -> None:
        none_of[0] = name

    yield set_out
    none_of[0] = ""


def test_a_push_is_told_to_come_again_and_the_next_is_decided(out: Out) -> None:
    with SyncServer.in_memory() as server:
        server.database("shop")
        history = server.handle("/v1/handshake", None, handshake()).history  # type: ignore[union-attr]
        with server.stores.using("shop", create=False) as store:
            committer = GroupCommitter(
                store.service, queue_max=10, on_failure=print, on_group=lambda: None
            )
            grant = Grant("ada", read=True, write=True)
            answers: list[Any] = []
            out("entidb-writer")
            with pytest.raises(ServerBusyError):
                committer.submit(push(history, 1), grant, answers.append)
            out("")
            committer.submit(push(history, 2), grant, answers.append)
            until(lambda: answers)
            committer.stop()
            # The one that was told to come again was not decided as well.
            assert len(answers) == 1
            assert store.database.read_head().sequence == 1


def test_a_task_is_refused_and_the_next_one_runs(out: Out) -> None:
    tasks = Tasks(SystemClock())
    out("entidb-tasks")
    with pytest.raises(ServerBusyError):
        tasks.add("verify", "ada", "shop", lambda progress: {})
    assert tasks.all() == []
    out("")
    done = tasks.wait(tasks.add("verify", "ada", "shop", lambda progress: {}).id, WAIT_S)
    assert done is not None and done.state == "done"
    tasks.close()


def test_images_are_made_by_the_next_who_asks(out: Out) -> None:
    with make(ManualClock()) as server:
        fill(server.database("shop"), range(200))
        server.images.background = True
        out("entidb-segments")
        assert asked(server).segments == []
        out("")
        server.housekeep()
        until(lambda: asked(server).segments)


def test_a_server_that_got_no_thread_for_images_closes(out: Out) -> None:
    server = make(ManualClock())
    fill(server.database("shop"), range(200))
    server.images.background = True
    out("entidb-segments")
    server.housekeep()
    server.close()


def test_a_large_file_is_looked_at_by_the_next_who_asks(
    out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "doubtful_bytes", lambda where: 1 << 40)
    monkeypatch.setattr(opening, "look", lambda where: None)
    checks = FileChecks()
    out("entidb-checker")
    with pytest.raises(ServerBusyError):
        checks.require("/shop")
    out("")
    with pytest.raises(ServerBusyError) as told:
        checks.require("/shop")
    assert told.value.done.wait(WAIT_S)  # type: ignore[attr-defined]
    checks.require("/shop")


def test_a_write_of_a_task_fails_and_the_next_is_committed(out: Out) -> None:
    async def write() -> None:
        with Database.in_memory() as database:
            notes = database.aio.collection("notes")
            out("entidb-committer")
            with pytest.raises(RuntimeError, match="thread"):
                await notes.add("lost")
            out("")
            await asyncio.wait_for(notes.add("kept"), WAIT_S)
            assert list(database.collection("notes").values()) == ["kept"]

    asyncio.run(write())


def test_an_index_is_built_by_the_next_who_waits(out: Out) -> None:
    with Database.in_memory() as database:
        plain = database.collection("stock")
        for number in range(3):
            plain[uuid.UUID(int=number)] = {"kind": number}
        out("entidb-index")
        stock = database.collection("stock", indexes=[Index("kind")])
        out("")
        assert database.wait_for_indexes(timeout_s=WAIT_S)
        assert stock.where(kind=1).scan(False).count() == 1


def test_others_are_heard_of_by_the_next_who_observes(out: Out, tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as database:
        out("entidb-hearing")
        with pytest.raises(RuntimeError, match="thread"):
            database.observe(lambda event: None)
        out("")
        database.observe(lambda event: None)
        assert "entidb-hearing" in {each.name for each in threading.enumerate()}


def test_a_deadline_that_nobody_would_look_at_is_none(out: Out) -> None:
    struck: list[int] = []
    watchdog = Watchdog(SystemClock(), lambda: struck.append(1))
    out("entidb-http-watchdog")
    with pytest.raises(TransportError, match="thread"):
        watchdog.watch(0.05)
    out("")
    ticket = watchdog.watch(0.05)
    until(lambda: watchdog.struck(ticket))
    watchdog.close()


def test_a_server_is_asked_whether_it_answers_by_the_next_who_has_a_connection(out: Out) -> None:
    asked_for: list[int] = []

    def connect() -> Any:
        asked_for.append(1)
        raise psycopg.OperationalError("nobody there")

    heartbeat = Heartbeat(connect, lambda: True, lambda place: None)
    out("entidb-pulse")
    heartbeat.begin()
    out("")
    heartbeat.begin()
    until(lambda: asked_for)
    heartbeat.close()


def engine_of(server: SyncServer, database: Database, **settings: Any) -> SyncEngine:
    config = SyncConfig(db_id="shop", **settings)
    client = LoopbackClient(server)
    return SyncEngine(
        config, HttpTransport("http://server", client=client, config=config), database
    )


def test_an_engine_that_gets_no_thread_can_be_started_again(out: Out) -> None:
    with SyncServer.in_memory() as server, Database.in_memory() as database:
        engine = engine_of(server, database)
        out("entidb-sync")
        with pytest.raises(SyncStateError, match="thread"):
            engine.start()
        out("")
        engine.start()
        engine.stop()
        engine.close()


def test_an_engine_that_gets_no_thread_for_news_goes_on_and_asks_again(
    out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def open(self, **options: Any) -> Any:
            raise TransportError("nobody there")

        def poll(self, known: int | None, *, refresh: bool) -> int:
            raise TransportError("nobody there")

        def interrupt(self) -> None: ...

        def close(self) -> None: ...

    channel = Channel(Silent(), SystemClock(), lambda: 0.5, news=lambda head, first: None)
    out("entidb-live")
    with pytest.raises(RuntimeError):
        channel.start()
    channel.stop()
    with SyncServer.in_memory() as server, Database.in_memory() as database:
        engine = engine_of(server, database, interval_s=1.0)
        monkeypatch.setattr(engine, "news_source", Silent)
        background: Background = engine._background
        engine.start()
        until(lambda: engine.stats.cycles + engine.stats.failures >= 2)
        assert background.channel is None and background.is_running
        out("")
        until(lambda: background.channel is not None)
        engine.close()

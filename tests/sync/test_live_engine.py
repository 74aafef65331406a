"""A background engine whose server says when it has something new."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from entidb import AsyncSyncEngine, Database, SyncConfig, SyncEngine
from entidb.errors import ConfigError, StorageError, SyncStateError, TransportError
from entidb.server import SyncServer, serving
from entidb.sync import SyncCycleResult
from entidb.sync.apply.applier import DatabaseApplier
from tests.server.test_app import eventually

pytestmark = pytest.mark.process

WAIT_S = 60.0
#: Far above what a busy machine takes, and below all that an end could wait for by itself: 30 s.
PROMPT_S = 10.0


@contextlib.contextmanager
def served(**settings: Any) -> Iterator[tuple[SyncServer, str]]:
    with SyncServer.in_memory(access_log=False, **settings) as server, serving(server) as url:
        yield server, url


@contextlib.contextmanager
def device(url: str, **config: Any) -> Iterator[SyncEngine]:
    engine = SyncEngine(SyncConfig(db_id="shop", **config), url, Database.in_memory())
    with engine:
        engine.start()
        yield engine


def is_live(engine: SyncEngine) -> bool:
    return engine.status().live == "live"


def test_what_one_device_writes_arrives_at_the_other_by_itself() -> None:
    with served() as (_, url), device(url) as one, device(url) as other:
        eventually(lambda: is_live(one) and is_live(other))
        for number in range(5):
            one.database.collection("notes").add({"n": number})
            began = time.monotonic()
            notes = other.database.collection("notes")
            eventually(lambda notes=notes, number=number: len(notes) == number + 1)
            assert time.monotonic() - began < 15, "it waited for the interval of 30 seconds"


def test_what_a_program_on_the_server_writes_arrives_by_itself() -> None:
    with served() as (server, url), device(url) as one:
        eventually(lambda: is_live(one))
        server.database("shop").collection("notes").add({"n": 1})
        eventually(lambda: len(one.database.collection("notes")) == 1)


def test_it_can_be_left_out() -> None:
    with served() as (_, url), device(url, live=False) as one:
        eventually(lambda: one.status().last_success_ms is not None)
        time.sleep(0.2)
        assert one.status().live == "offline"


def test_a_server_without_the_channel_is_asked_on_the_interval() -> None:
    with served(live_max=0) as (server, url), device(url, interval_s=0.2) as one:
        eventually(lambda: one.status().last_success_ms is not None)
        assert one.status().live == "offline"
        server.database("shop").collection("notes").add({"n": 1})
        eventually(lambda: len(one.database.collection("notes")) == 1)


def test_its_own_pushes_start_no_further_cycles() -> None:
    with served() as (_, url), device(url) as one:
        eventually(lambda: is_live(one))
        results: list[Any] = []
        one.on_result(results.append)
        time.sleep(0.3)
        results.clear()
        for _ in range(10):
            one.database.collection("notes").add({"n": 1})
            eventually(lambda: one.status().pending == 0)
        time.sleep(0.3)
        assert len(results) <= 14, "each push was followed by a pull that brought nothing"


def test_stop_ends_the_stream_too_and_start_begins_another() -> None:
    with served() as (server, url), device(url) as one:
        eventually(lambda: is_live(one))
        began = time.monotonic()
        one.stop()
        assert time.monotonic() - began < PROMPT_S
        assert one.status().live == "offline"
        one.start()
        eventually(lambda: is_live(one))
        server.database("shop").collection("notes").add({"n": 1})
        eventually(lambda: len(one.database.collection("notes")) == 1)


def test_an_asyncio_engine_hears_too() -> None:
    async def run(server: SyncServer, url: str) -> int:
        database = Database.in_memory()
        engine = AsyncSyncEngine(SyncConfig(db_id="shop"), url, database)
        task = asyncio.create_task(engine.run())
        try:
            while (await engine.status()).live != "live":
                await asyncio.sleep(0.05)
            server.database("shop").collection("notes").add({"n": 1})
            while not len(database.collection("notes")):
                await asyncio.sleep(0.05)
            return len(database.collection("notes"))
        finally:
            engine.stop()
            await task
            await engine.close()

    with served() as (server, url):
        assert asyncio.run(asyncio.wait_for(run(server, url), WAIT_S)) == 1


# ---------------------------------------------------------------- the thread that hears of a page


def who_takes_the_next_page(server: SyncServer, one: SyncEngine) -> str:
    """The name of the thread on which an observer is told of what a program on the server wrote."""
    told: dict[uuid.UUID | None, str] = {}
    stop = one.database.observe(
        lambda commit: told.update(
            (event.entity_id, threading.current_thread().name) for event in commit.events
        )
    )
    try:
        written = server.database("shop").collection("notes").add({"n": 1})
        # The observer is called after the row is there: the row alone says nothing of who was told.
        eventually(lambda: written in told)
        return told[written]
    finally:
        stop()


def rest(server: SyncServer, one: SyncEngine) -> None:
    """Return when the device rests: a page that comes while a cycle ends is that cycle's."""
    eventually(lambda: who_takes_the_next_page(server, one) == "entidb-live")
    eventually(lambda: one.cycle_thread is None)


@contextlib.contextmanager
def hearing() -> Iterator[tuple[SyncServer, SyncEngine]]:
    """A device that has read the first word of its stream, and rests."""
    with served() as (server, url), device(url) as one:
        eventually(lambda: is_live(one))
        rest(server, one)
        yield server, one


def test_a_page_is_taken_by_the_thread_that_hears_of_it() -> None:
    with hearing() as (server, one):
        results: list[SyncCycleResult] = []
        one.on_result(results.append)
        assert who_takes_the_next_page(server, one) == "entidb-live"
        eventually(lambda: results)
        assert results[0].requests == 0
        one.database.collection("notes").add({"n": 2})
        eventually(lambda: one.status().pending == 0)
        rest(server, one)
        assert who_takes_the_next_page(server, one) == "entidb-live"


@pytest.mark.parametrize("how", ["stop", "close"])
@pytest.mark.parametrize("inside", ["observer", "result"])
def test_who_is_called_by_the_thread_that_hears_of_a_page_may_end_the_engine(
    how: str, inside: str
) -> None:
    with hearing() as (server, one):
        took: list[float] = []

        def end(event: object) -> None:
            began = time.monotonic()
            getattr(one, how)()
            took.append(time.monotonic() - began)

        thread, _ = one._run_of[None]
        if inside == "observer":
            one.database.observe(end)
        else:
            one.on_result(end)
        server.database("shop").collection("notes").add({"n": 1})
        eventually(lambda: took)
        assert took[0] < PROMPT_S, "it has waited for itself"
        thread.join(WAIT_S)
        assert not thread.is_alive()
        eventually(lambda: not any(each.name == "entidb-live" for each in threading.enumerate()))


def test_stop_waits_for_a_page_that_is_being_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with hearing() as (server, one):
        inside, go_on = threading.Event(), threading.Event()
        ended: list[str] = []
        real = DatabaseApplier.apply

        def slow(self: DatabaseApplier, request: Any, response: Any) -> Any:
            assert threading.current_thread().name == "entidb-live"
            inside.set()
            assert go_on.wait(WAIT_S)
            try:
                return real(self, request, response)
            finally:
                ended.append("cycle")

        def stop() -> None:
            one.stop()
            ended.append("stop")

        monkeypatch.setattr(DatabaseApplier, "apply", slow)
        server.database("shop").collection("notes").add({"n": 1})
        assert inside.wait(WAIT_S)
        stopping = threading.Thread(target=stop)
        stopping.start()
        stopping.join(0.5)
        assert ended == []
        go_on.set()
        stopping.join(WAIT_S)
        assert ended == ["cycle", "stop"]


def test_waiting_for_a_sync_on_the_thread_that_hears_of_a_page_is_refused() -> None:
    with hearing() as (server, one):
        refused: list[BaseException] = []

        def wait(result: SyncCycleResult) -> None:
            try:
                one.database.collection("notes").add({"n": 2})
                one.synced(timeout_s=WAIT_S)
            except SyncStateError as error:
                refused.append(error)

        stop = one.on_result(wait)
        server.database("shop").collection("notes").add({"n": 1})
        eventually(lambda: refused)
        stop()
        eventually(lambda: one.status().pending == 0)


def test_a_page_that_cannot_be_taken_is_tried_again_by_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hearing() as (server, one):
        threads: list[str] = []
        real = DatabaseApplier.apply

        def apply(self: DatabaseApplier, request: Any, response: Any) -> Any:
            threads.append(threading.current_thread().name)
            if len(threads) == 1:
                raise TransportError("not this time")
            return real(self, request, response)

        before = len(one.database.collection("notes"))
        monkeypatch.setattr(DatabaseApplier, "apply", apply)
        server.database("shop").collection("notes").add({"n": 1})
        eventually(lambda: len(one.database.collection("notes")) == before + 1)
        assert threads == ["entidb-live", "entidb-sync"]


def test_observers_of_a_page_find_the_context_of_the_task_that_runs_the_engine() -> None:
    who = contextvars.ContextVar("who", default="nobody")
    found: list[tuple[str, str]] = []

    async def run(server: SyncServer, url: str) -> None:
        who.set("somebody")
        engine = AsyncSyncEngine(SyncConfig(db_id="shop"), url, Database.in_memory())
        async with engine:
            engine.start()
            while (await engine.status()).live != "live":
                await asyncio.sleep(0.01)
            engine.database.observe(
                lambda event: found.append((threading.current_thread().name, who.get()))
            )
            # One that comes while a cycle runs is that cycle's.
            while not found or found[-1][0] != "entidb-live":
                count = len(found)
                server.database("shop").collection("notes").add({"n": 1})
                while len(found) == count:
                    await asyncio.sleep(0.01)

    with served() as (server, url):
        asyncio.run(asyncio.wait_for(run(server, url), WAIT_S))
    assert {name for _, name in found} == {"somebody"}


@pytest.mark.parametrize("part", ["asks_pages", "page_came", "open"])
@pytest.mark.parametrize(
    "error",
    [
        StorageError("the disk fails for once"),
        OSError(24, "too many open files"),
        RuntimeError("can't start new thread"),
        ConfigError("a proxy variable is wrong"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_passes_does_not_end_the_listening_for_news(
    part: str, error: Exception
) -> None:
    with served() as (server, url), an_engine(url) as one:
        fail_once(one, part, error)
        one.start()
        eventually(lambda: is_live(one))
        server.database("shop").collection("notes").add({"n": 1})
        eventually(lambda: len(one.database.collection("notes")) == 1)


def an_engine(url: str) -> SyncEngine:
    """One that comes by itself after an hour."""
    return SyncEngine(SyncConfig(db_id="shop", interval_s=3600.0), url, Database.in_memory())


def fail_once(engine: SyncEngine, part: str, error: Exception) -> None:
    """Have that part of the listening raise ``error`` when it is called for the first time."""
    failed: list[Exception] = []

    def once(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if not failed:
                failed.append(error)
                raise error
            return real(*arguments, **named)

        return call

    if part != "open":
        setattr(engine, part, once(getattr(engine, part)))
        return
    make = engine.news_source

    def source() -> Any:
        made: Any = make()
        if made is not None:
            made.open = once(made.open)
        return made

    engine.news_source = source  # type: ignore[method-assign]


def test_waking_tries_to_hear_of_news_at_once() -> None:
    with served() as (_, url), an_engine(url) as one:
        fail_once(one, "open", TransportError("not now"))
        one._background._draw = lambda: 1000.0  # the first wait takes so many seconds
        one.start()
        eventually(lambda: one._background.channel is not None)
        time.sleep(0.1)
        assert not is_live(one)
        one.wake()
        eventually(lambda: is_live(one))

"""A background engine syncs by itself when there is something to do, and not when there is not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from entidb import AsyncSyncEngine, Database, SyncConfig
from entidb.db.observers import CommitEvent
from entidb.errors import (
    AuthenticationError,
    CommitUnknownError,
    DatabaseLockedError,
    EntiDBError,
    PermissionDeniedError,
    ProtocolError,
    StorageError,
    StorageFullError,
    SyncCancelledError,
    SyncStateError,
    TlsError,
    TransportError,
)
from entidb.protocol import PushRequest, SyncRequest, SyncResponse
from entidb.server import Refusal, SyncServer
from entidb.sync import (
    Conflict,
    HttpTransport,
    LoopbackClient,
    RetryConfig,
    SyncCycleResult,
    SyncEngine,
    Withdrawn,
)
from entidb.sync.background import BURST_S, STANDBY_S, Background
from entidb.sync.transport import MockTransport
from tests.support import World, uid

WAIT_S = 60.0
CONFIG = SyncConfig(db_id="shop", retry=RetryConfig.none(), interval_s=3600.0)


class Watched(LoopbackClient):
    """Counts what a server is asked for, and can be cut off from it."""

    def __init__(self, server: SyncServer) -> None:
        super().__init__(server)
        self.paths: list[str] = []
        self.away = False

    def request(self, method: str, url: str, headers: Any, body: bytes, timeout_s: float) -> Any:
        self.paths.append(url.rpartition("/")[2])
        if self.away:
            raise TransportError("the server is away")
        return super().request(method, url, headers, body, timeout_s)


@contextmanager
def engines(**settings: Any) -> Iterator[tuple[SyncEngine, Watched]]:
    with SyncServer.in_memory() as server, Database.in_memory() as database:
        client = Watched(server)
        transport = HttpTransport("http://localhost", client=client)
        config = SyncConfig(**{"db_id": "shop", "interval_s": 3600.0, **settings})
        with SyncEngine(config, transport, database) as engine:
            yield engine, client


class Until:
    """Waits for something that a listener is called with."""

    def __init__(self, listen: Callable[[Callable[..., None]], object]) -> None:
        self._changed = threading.Condition()
        self.seen: list[Any] = []
        listen(self._note)

    def _note(self, *what: Any) -> None:
        with self._changed:
            self.seen.append(what[0])
            self._changed.notify_all()

    def wait(self, holds: Callable[[list[Any]], bool]) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self.seen), WAIT_S)
            return list(self.seen)


def pushed(results: list[SyncCycleResult]) -> int:
    return sum(result.pushed for result in results)


# ---------------------------------------------------------------- when


def test_a_local_commit_is_pushed_at_once():
    with engines() as (engine, _):
        results = Until(engine.on_result)
        engine.start()
        results.wait(bool)
        notes = engine.database.collection("notes")
        for count in (1, 2, 3):
            notes.add({"n": count})
            results.wait(lambda seen, due=count: pushed(seen) == due)  # type: ignore[misc]


def test_what_a_cycle_commits_by_itself_starts_no_other():
    with engines() as (engine, _):
        results = Until(engine.on_result)
        engine.start()
        results.wait(bool)
        engine.database.collection("notes").add({"n": 1})
        results.wait(lambda seen: pushed(seen) == 1)
        engine.stop()
        # One for the start, one for the commit; a third would have been begun by the second.
        assert len(results.seen) == 2


def test_what_an_observer_commits_during_a_cycle_is_pushed_too():
    with engines() as (engine, _):
        results = Until(engine.on_result)
        log = engine.database.collection("log")

        def note(event: CommitEvent) -> None:
            if event.origin == "sync":
                log.add({"saw": event.sequence})

        engine.database.observe(note)
        engine.start()
        results.wait(bool)
        other = Database.in_memory()
        transport = HttpTransport("http://localhost", client=engine.transport._client)  # type: ignore[attr-defined]
        with SyncEngine(CONFIG, transport, other) as second:
            other.collection("notes").add({"n": 1})
            second.sync()
            engine.wake()
            results.wait(lambda seen: pushed(seen) == 1)
            assert second.sync().pulled == 1
        other.close()


def test_after_stop_commits_start_nothing_and_a_new_start_pushes_them():
    with engines() as (engine, _):
        results = Until(engine.on_result)
        engine.start()
        results.wait(bool)
        engine.stop()
        assert engine.database.on_commit is None
        engine.database.collection("notes").add({"n": 1})
        engine.start()
        results.wait(lambda seen: pushed(seen) == 1)


def test_while_the_server_is_away_a_commit_starts_no_cycle_and_wake_does():
    retry = RetryConfig(attempts_max=1, delay_initial_s=600.0, delay_max_s=600.0, jitter=False)
    with engines(retry=retry) as (engine, client):
        results, failed = Until(engine.on_result), threading.Semaphore(0)
        engine.on_state(lambda old, new: failed.release() if new.value == "error" else None)
        client.away = True
        engine.start()
        assert failed.acquire(timeout=WAIT_S)
        asked = len(client.paths)
        engine.database.collection("notes").add({"n": 1})
        assert not failed.acquire(timeout=20 * BURST_S)
        assert len(client.paths) == asked
        client.away = False
        engine.wake()
        results.wait(lambda seen: pushed(seen) == 1)


class Turns:
    """An engine of which each cycle does as it is told, and a clock that goes by the waits."""

    def __init__(self, *outcomes: Callable[[], None], interval_s: float = 30.0) -> None:
        self.config = SyncConfig(
            db_id="shop",
            interval_s=interval_s,
            retry=RetryConfig(attempts_max=2, delay_initial_s=1.0, jitter=False),
        )
        self.database: Any = SimpleNamespace(
            on_commit=None,
            commit_mark=0,
            read_head=lambda: SimpleNamespace(ready=0),
            right=lambda name: SimpleNamespace(take=lambda seconds: True, give_back=lambda: None),
            start_hearing=lambda: None,
        )
        self.closed = False
        self.reached = 0
        self.has_page = False
        self.cycle_thread: int | None = None
        self.began: list[float] = []
        self.now = 0.0
        self.stopped = threading.Event()
        #: What others do, and when.
        self.plan: list[tuple[float, Callable[[], None]]] = []
        self._outcomes = list(outcomes)
        self.background = Background(self, self, lambda: 1.0)  # type: ignore[arg-type]

    def run_cycle(
        self, cancelled: object, stopped: object = None, *, patient: bool = True
    ) -> SyncCycleResult:
        self.began.append(round(self.now, 3))
        outcome = self._outcomes.pop(0) if self._outcomes else self.stop
        outcome()
        return SyncCycleResult()

    def stop(self) -> None:
        self.stopped.set()

    def pause_s(self) -> float:
        return self.config.interval_s

    def news_source(self) -> None:
        return None

    def note_error(self, error: EntiDBError) -> None:
        return None

    note_bug = note_error

    def monotonic(self) -> float:
        return self.now

    def now_ms(self) -> int:
        return int(self.now * 1000)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        until = self.now + seconds
        while not event.is_set() and self.plan and self.plan[0][0] <= until:
            self.now, action = self.plan.pop(0)
            action()
        if not event.is_set():
            self.now = until
        return event.is_set()

    def commit(self) -> None:
        self.database.commit_mark += 2
        self.background.committed(self.database.commit_mark)

    def run(self) -> list[float]:
        self.background.run(self.stopped)
        return self.began


def nothing() -> None:
    return None


def fails(error: Exception) -> Callable[[], None]:
    def outcome() -> None:
        raise error

    return outcome


def test_without_anything_to_do_the_interval_is_the_pace():
    assert Turns(nothing, nothing).run() == [0.0, 30.0, 60.0]


def test_the_first_commit_of_a_burst_leaves_at_once_and_the_others_go_together():
    turns = Turns(nothing, nothing)
    turns.plan = [(10.0 + n / 1000, turns.commit) for n in range(20)]
    first, second, third = turns.run()
    assert (first, second) == (0.0, 10.0)
    assert 10.019 + BURST_S <= third <= 10.019 + 2 * BURST_S


def test_a_commit_soon_after_a_cycle_waits_for_others_and_a_later_one_does_not():
    turns = Turns(nothing, nothing, nothing)
    turns.plan = [(10.0, turns.commit), (10.004, turns.commit), (10.02, turns.commit)]
    assert turns.run() == [0.0, 10.0, 10.009, 10.02]


def test_commits_without_a_pause_do_not_hold_a_cycle_up_for_long():
    turns = Turns(nothing, nothing, nothing)
    turns.plan = [(10.0 + n / 1000, turns.commit) for n in range(5000)]
    began = turns.run()
    assert began[1] == 10.0
    assert began[1] + 0.04 < began[2] < began[1] + 0.1
    assert began[2] < began[3] < began[2] + 0.1


def test_a_commit_while_a_cycle_runs_starts_the_next():
    turns = Turns()
    turns._outcomes = [turns.commit, nothing]
    assert turns.run() == [0.0, BURST_S, 30.0 + BURST_S]


def test_a_commit_of_the_thread_that_syncs_starts_nothing():
    turns = Turns(nothing)
    turns.cycle_thread = threading.get_ident()
    turns.plan = [(10.0, turns.commit)]
    assert turns.run() == [0.0, 30.0]


def test_after_failures_commits_wait_longer_and_longer_until_one_works():
    away = TransportError("away")
    turns = Turns(fails(away), fails(away), nothing, nothing)
    turns.plan = [(1.0, turns.commit), (5.0, turns.commit), (12.5, turns.commit)]
    # Two attempts a cycle: the waits go on where those of its attempts ended, at 4 and 8 seconds.
    assert turns.run() == [0.0, 4.0, 12.0, 12.5, 42.5]


def test_what_a_sync_that_failed_was_for_is_due_again_when_the_backoff_allows():
    away = TransportError("away")
    turns = Turns(nothing, fails(away), fails(away), nothing, interval_s=600.0)
    turns.plan = [(1.0, turns.commit)]
    assert turns.run() == [0.0, 1.0, 5.0, 13.0, 613.0]
    turns = Turns(nothing, fails(away), nothing, interval_s=600.0)
    turns.plan = [(1.0, lambda: turns.background.heard(7, False))]
    assert turns.run() == [0.0, 1.0, 5.0, 605.0]


def test_a_number_that_comes_late_takes_no_newer_one_back():
    turns = Turns(nothing)
    turns.reached = 8

    def twice() -> None:
        turns.background.heard(9, False)
        turns.background.heard(8, False)

    turns.plan = [(1.0, twice)]
    assert turns.run() == [0.0, 1.0]


def test_a_number_that_is_not_beyond_what_is_here_starts_nothing():
    turns = Turns(nothing)
    turns.reached = 9
    turns.plan = [(1.0, lambda: turns.background.heard(9, False))]
    assert turns.run() == [0.0, 30.0]


def test_after_a_failure_that_stays_only_the_interval_or_a_call_starts_the_next():
    refused = PermissionDeniedError("no")
    turns = Turns(fails(refused), fails(refused), nothing)
    turns.plan = [(1.0, turns.commit), (40.0, turns.commit), (45.0, turns.background.wake)]
    assert turns.run() == [0.0, 30.0, 45.0, 75.0]


def test_a_sync_by_hand_in_its_way_holds_commits_up_no_longer_than_a_backoff():
    turns = Turns(fails(SyncStateError("a cycle runs already")), nothing)
    turns.plan = [(1.0, turns.commit)]
    assert turns.run() == [0.0, 1.0, 31.0]
    # A long one is no failure that makes the waits longer and longer.
    turns = Turns(*[fails(SyncStateError("a cycle runs already"))] * 20, nothing)
    assert turns.run() == [*map(float, range(21)), 50.0]


def test_an_engine_that_was_started_runs_in_the_background_before_its_thread_has_begun():
    began = threading.Event()

    def away(request: SyncRequest) -> SyncResponse:
        raise TransportError("away")

    with Database.in_memory() as db, SyncEngine(CONFIG, MockTransport(away), db) as engine:
        run = engine._background.run

        def late(stopped: threading.Event) -> None:
            began.wait(WAIT_S)
            run(stopped)

        engine._background.run = late  # type: ignore[method-assign]
        engine.start()
        try:
            assert engine._background.thread is None
            assert engine._background.is_running
        finally:
            began.set()


def test_a_bug_and_a_cancelled_cycle_do_not_end_the_run():
    turns = Turns(fails(SyncCancelledError("cancelled")), fails(ValueError("a bug")))
    turns.plan = [(1.0, turns.commit), (5.0, turns.commit)]
    assert turns.run() == [0.0, 1.0, 5.0]


AWAY = TransportError("away")


@pytest.mark.parametrize(
    "error",
    [
        AWAY,
        ValueError("a listener asks a server that is away"),
        StorageFullError("the disk is full"),
        StorageError("the disk fails for once"),
        DatabaseLockedError("another process syncs"),
        CommitUnknownError("perhaps"),
        TlsError("the login page of a network"),
        AuthenticationError("the token file is being written"),
        ProtocolError("moved", code="redirected"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_sync_that_fails_by_what_may_pass_follows_as_the_backoff_says(error: Exception):
    # Whatever it was for: the start, the interval, or somebody who calls.
    turns = Turns(fails(error), nothing, interval_s=3600.0)
    assert turns.run() == [0.0, 4.0, 3604.0]
    turns = Turns(nothing, fails(error), fails(error), nothing, interval_s=3600.0)
    turns.plan = [(10.0, turns.background.wake)]
    assert turns.run() == [0.0, 10.0, 14.0, 22.0, 3622.0]


def test_a_sync_that_fails_by_what_may_pass_comes_no_later_than_the_interval():
    turns = Turns(*[fails(AWAY)] * 3, nothing, interval_s=5.0)
    assert turns.run() == [0.0, 4.0, 9.0, 14.0, 19.0]


def test_a_disk_that_fails_where_the_loop_rests_does_not_end_the_run():
    turns = Turns(nothing, nothing)
    reads: list[float] = []

    class Failing(Turns):
        @property
        def reached(self) -> int:
            reads.append(self.now)
            if len(reads) == 1:
                raise StorageError("the disk fails for once")
            return 7

        @reached.setter
        def reached(self, value: int) -> None:
            return None

    turns = Failing(nothing, nothing)
    turns.plan = [(1.0, lambda: turns.background.heard(7, False))]
    assert turns.run() == [0.0, 1.0, 31.0]
    assert reads


@pytest.mark.parametrize(
    "error", [StorageError("the disk fails for once"), RuntimeError("can't start new thread")]
)
def test_what_fails_before_the_loop_rests_does_not_end_the_run(error: Exception):
    turns = Turns(nothing, nothing)
    tried: list[float] = []

    def fails_once() -> None:
        tried.append(turns.now)
        if len(tried) == 1:
            raise error

    turns.database.start_hearing = fails_once
    assert turns.run() == [0.0, 30.0, 60.0]
    assert tried == [0.0, 30.0]


def test_a_disk_that_fails_while_another_process_syncs_does_not_end_the_run():
    turns = Turns(nothing)
    tried: list[float] = []

    def take(seconds: float) -> bool:
        tried.append(turns.now)
        if len(tried) == 1:
            raise StorageError("the disk fails for once")
        return True

    turns.database.right = lambda name: SimpleNamespace(take=take, give_back=lambda: None)
    assert turns.run() == [STANDBY_S, 30.0 + STANDBY_S]


# ---------------------------------------------------------------- who hears of it


def test_a_result_is_told_when_the_cycle_is_over():
    with engines() as (engine, _):
        results: list[SyncCycleResult] = []

        def once_more(result: SyncCycleResult) -> None:
            results.append(result)
            if len(results) == 1:
                engine.database.collection("notes").add({"n": 1})
                engine.sync()  # the lock of the first is free

        engine.on_result(once_more)
        first = engine.sync()
        assert results[0] == first
        assert [result.pushed for result in results] == [0, 1]


def test_conflicts_and_refusals_are_told_one_by_one():
    world = World(
        validate=lambda context, tx: (
            Refusal("too_dear", "not this") if tx.operations[0].value == "dear" else None
        )
    )
    a, b = world.device(default_policy="manual"), world.device()
    conflicts: list[Conflict] = []
    rejected: list[Withdrawn] = []
    a.engine.on_conflict(conflicts.append)
    a.engine.on_rejected(rejected.append)
    for device in (a, b):
        device.put(("notes", 1, f"of {device.seed}"))
    a.put(("notes", 2, "dear"))
    b.sync()
    a.sync()
    assert [(c.collection, c.entity_id) for c in conflicts] == [("notes", uid(1))]
    assert [(w.code, w.message) for w in rejected] == [("too_dear", "not this")]
    a.sync()
    assert (len(conflicts), len(rejected)) == (1, 1)


def test_what_a_failed_sync_has_left_to_a_person_is_told_too():
    world = World()
    a, b = world.device(default_policy="manual"), world.device()
    conflicts: list[Conflict] = []
    results: list[SyncCycleResult] = []
    a.engine.on_conflict(conflicts.append)
    a.engine.on_result(results.append)
    for device in (a, b):
        device.put(("notes", 1, f"of {device.seed}"))
    a.put(("notes", 2, "free"))
    b.sync()

    def lost(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            raise TransportError("lost")

    a.wire.before = lost
    with pytest.raises(TransportError):
        a.sync()
    assert len(conflicts) == 1 and not results


def test_what_a_listener_raises_is_reported_and_the_others_are_called(
    monkeypatch: pytest.MonkeyPatch,
):
    reported: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: reported.append(what.exc_value))
    with engines() as (engine, _):
        results: list[SyncCycleResult] = []
        bug = ValueError("a bug of the program")
        engine.on_result(lambda result: (_ for _ in ()).throw(bug))
        stop = engine.on_result(results.append)
        engine.sync()
        assert reported == [bug] and len(results) == 1
        stop()
        engine.sync()
        assert len(results) == 1


def test_a_listener_may_stop_and_close_the_engine():
    with engines() as (engine, _):
        closed = threading.Event()

        def close(result: SyncCycleResult) -> None:
            engine.close()
            closed.set()

        engine.on_result(close)
        engine.start()
        assert closed.wait(WAIT_S)
        SyncEngine(CONFIG, engine.transport, engine.database).close()


# ---------------------------------------------------------------- asyncio


def test_in_asyncio_too_a_commit_is_pushed_at_once():
    async def main() -> None:
        with SyncServer.in_memory() as server, Database.in_memory() as database:
            transport = HttpTransport("http://localhost", client=LoopbackClient(server))
            async with AsyncSyncEngine(CONFIG, transport, database) as engine:
                running = asyncio.create_task(engine.run())
                while engine.stats.cycles < 1:
                    await asyncio.sleep(0.001)
                database.collection("notes").add({"n": 1})
                while engine.stats.pushed < 1:
                    await asyncio.sleep(0.001)
                engine.stop()
                await asyncio.wait_for(running, WAIT_S)

    asyncio.run(main())


def test_an_answer_that_never_comes_does_not_keep_a_run_from_ending():
    asked, over = threading.Event(), threading.Event()

    def silent(request: SyncRequest) -> SyncResponse:
        asked.set()
        over.wait(WAIT_S)
        raise TransportError("at last")

    async def main() -> None:
        from entidb.sync import MockTransport

        with Database.in_memory() as database:
            engine = AsyncSyncEngine(CONFIG, MockTransport(silent), database)
            running = asyncio.create_task(engine.run())
            assert await asyncio.to_thread(asked.wait, WAIT_S)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(running, WAIT_S)
            over.set()
            await engine.close()

    asyncio.run(main())

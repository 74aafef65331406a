"""How many durable commits a change takes from one device to another, and that none is missing
where it is needed (R5)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import Database, RetryConfig, SyncConfig, SyncEngine
from entidb.db.replica import Stage
from entidb.errors import CommitUnknownError, TransportError
from entidb.server import SyncServer
from entidb.storage import MemoryStorage
from entidb.sync import HttpTransport
from tests.sync.test_rounds import Line

WAIT_S = 60.0


class Counting(MemoryStorage):
    """Counts its commits: each is two flushes on a disk. ``fail`` is called after one."""

    def __init__(self) -> None:
        super().__init__()
        self.commits = 0
        self.fail: Callable[[], None] = lambda: None

    def commit(self, *args: Any, **options: Any) -> int:
        mark = super().commit(*args, **options)
        self.commits += 1
        self.fail()
        return mark


class Device:
    """One that is up to date, and whose engine sends what is committed at once."""

    def __init__(self, server: SyncServer) -> None:
        self.server = server
        self.storage = Counting()
        self.settings = SyncConfig(db_id="shop", retry=RetryConfig.none(), compression="none")
        self.open()
        self.engine.sync()
        self.database.marks_commits = True
        self.storage.commits = 0
        self.line.taken()

    def open(self) -> None:
        self.line = Line(self.server)
        self.database = Database(self.storage)
        transport = HttpTransport("http://localhost", client=self.line, config=self.settings)
        self.engine = SyncEngine(self.settings, transport, self.database)
        self.notes = self.database.collection("notes")

    def restart(self) -> None:
        """Another process opens what is durable; its engine does not run in the background."""
        self.engine.close()
        self.open()
        self.line.taken()

    def taken(self) -> int:
        count, self.storage.commits = self.storage.commits, 0
        return count


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with SyncServer.in_memory(access_log=False) as made:
        yield made


@pytest.fixture
def one(server: SyncServer) -> Device:
    return Device(server)


def on_the_server(server: SyncServer) -> list[Any]:
    return sorted(str(value) for value in server.database("shop").collection("notes").values())


def test_a_change_takes_three_commits_to_another_device_and_one_that_settles_it(
    server: SyncServer, one: Device
) -> None:
    other = Device(server)
    for number in range(3):
        one.notes.add({"n": number})
        assert one.taken() == 1
        one.engine.sync()
        assert (one.line.taken(), one.taken()) == (["/v1/sync"], 1)
        other.engine.sync()
        assert other.taken() == 1
    assert len(list(other.notes.values())) == 3


def test_without_an_engine_that_sends_at_once_a_commit_of_its_own_marks_the_batch(
    one: Device,
) -> None:
    one.database.marks_commits = False
    one.notes.add({"n": 1})
    assert one.engine.applier.inflight() == []
    one.engine.sync()
    assert one.taken() == 3


def test_two_commits_before_a_sync_are_marked_together(server: SyncServer, one: Device) -> None:
    one.notes.add({"n": 1})
    one.notes.add({"n": 2})
    one.engine.sync()
    assert (one.line.taken(), one.taken()) == (["/v1/sync"], 4)
    assert len(on_the_server(server)) == 2


def test_a_mark_is_dropped_by_the_commit_that_applies_a_page(
    server: SyncServer, one: Device
) -> None:
    other = Device(server)
    other.notes.add({"n": "other"})
    other.engine.sync()
    one.engine._attempts.connection.features.remove("sync")
    one.notes.add({"n": "one"})
    one.taken()
    result = one.engine.sync()
    assert (result.pulled, result.pushed, one.taken()) == (1, 1, 3)
    assert len(on_the_server(server)) == 2


def test_a_marked_transaction_whose_process_ended_counts_as_sent(
    server: SyncServer, one: Device
) -> None:
    one.notes.add({"n": 1})
    one.restart()
    assert len(one.engine.applier.inflight()) == 1
    assert one.engine.sync().pushed == 1
    assert one.line.taken() == ["/v1/handshake", "/v1/push", "/v1/pull"]
    assert on_the_server(server) == ["{'n': 1}"]


def test_a_marked_transaction_whose_answer_got_lost_is_sent_again_first(
    server: SyncServer, one: Device
) -> None:
    def cut(path: str, answer: Callable[[], object]) -> Any:
        answer()
        raise TransportError("the answer got lost")

    one.notes.add({"n": 1})
    one.line.hook = cut
    with pytest.raises(TransportError):
        one.engine.sync()
    one.line.hook = lambda path, answer: answer()
    one.line.taken()
    one.engine.sync()
    assert "/v1/push" in one.line.taken()[:2]
    assert on_the_server(server) == ["{'n': 1}"]
    assert (one.engine.status().pending, one.engine.applier.inflight()) == (0, [])


def test_a_commit_that_may_have_failed_leaves_a_mark_that_counts_as_sent(one: Device) -> None:
    def fail() -> None:
        raise CommitUnknownError("the disk is gone")

    one.storage.fail = fail
    with pytest.raises(CommitUnknownError):
        one.notes.add({"n": 1})
    one.storage.fail = lambda: None
    look = one.engine.applier.look()
    assert (look.inflight is not None, one.database.unsent) == (True, None)
    assert one.engine.sync().pushed == 1


def test_a_reset_does_not_doubt_what_was_marked_and_never_sent(one: Device) -> None:
    one.notes.add({"n": 1})
    one.engine.reset("server")
    assert one.engine.applier.state().unsettled == []
    assert one.engine.applier.inflight() == []


def test_local_commits_leave_a_mark_as_it_is(one: Device) -> None:
    one.notes.add({"n": 1})
    marked = one.database.unsent
    one.notes.add({"n": 2})
    with one.database.view() as view:
        assert marked is not None and view.inflight == marked == one.database.unsent


def test_a_background_engine_marks_while_its_syncs_work(server: SyncServer, one: Device) -> None:
    one.database.marks_commits = False
    turned = threading.Event()
    one.engine.on_result(lambda result: turned.set())
    one.engine.start()
    assert turned.wait(WAIT_S)
    for number in range(200):
        one.notes.add({"n": number})
        assert one.engine.synced(WAIT_S)
        if one.database.marks_commits:
            break
    assert one.database.marks_commits
    one.engine.stop()
    assert not one.database.marks_commits


@pytest.mark.parametrize(
    "lacking",
    [
        {"full": True},
        {"uncovered": ["notes"]},
        {"foreign": True},
        {"foreign_names": ["tasks"]},
    ],
    ids=str,
)
def test_a_device_that_lacks_more_than_what_is_new_marks_nothing(
    one: Device, lacking: dict[str, Any]
) -> None:
    """What is marked would be sent before what is being pulled anew is complete."""
    with one.database.write() as writer:
        writer.set_sync_state(replace(writer.sync_state, **lacking))
    one.notes.add("a")
    with one.database.view() as view:
        assert view.inflight is None


def test_beside_a_staged_pull_nothing_is_marked(one: Device) -> None:
    with one.database.write() as writer:
        history = writer.sync_state.history
        assert history is not None
        writer.set_stage(Stage(history, 0, 0, 3, None))
    one.notes.add("a")
    with one.database.view() as view:
        assert view.inflight is None

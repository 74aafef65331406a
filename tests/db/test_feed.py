"""The change feed and the observers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from entidb.db import CommitEvent, Database, Role, purge_tombstones
from entidb.errors import TransactionError
from tests.support import FakeClock, World, uid


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(clock=FakeClock()) as opened:
        yield opened


def brief(events: Any) -> list[tuple[int, str, int | None]]:
    return [(e.sequence, e.kind, e.entity_id and e.entity_id.int) for e in events]


# ---------------------------------------------------------------- the feed


def test_the_feed_holds_the_latest_change_of_each_entity_in_commit_order(db: Database) -> None:
    notes = db.collection("notes")
    notes[uid(1)] = "a"
    notes[uid(2)] = "b"
    notes[uid(1)] = "c"
    del notes[uid(2)]
    assert brief(db.changes()) == [(3, "put", 1), (4, "delete", 2)]
    assert [event.value for event in db.changes()] == ["c", None]
    assert {event.origin for event in db.changes()} == {"local"}


def test_the_feed_is_resumed_after_a_cursor(db: Database) -> None:
    notes = db.collection("notes")
    for n in range(5):
        notes[uid(n)] = n
    feed = db.changes(3)
    assert brief(feed) == [(4, "put", 3), (5, "put", 4)]
    assert feed.cursor == 5
    assert list(feed) == []
    notes[uid(9)] = 9
    assert brief(feed) == [(6, "put", 9)]
    assert list(db.changes(100)) == []


def test_the_cursor_moves_with_the_last_event_of_a_commit(db: Database) -> None:
    for n in range(3):
        db.collection("notes").put_many({uid(n * 10 + m): m for m in range(4)})
    feed = db.changes()
    cursors = []
    for _ in feed:
        cursors.append(feed.cursor)
    assert cursors == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_a_program_that_dies_between_events_sees_every_change_whole_afterwards(
    db: Database,
) -> None:
    for n in range(6):
        db.collection("notes").put_many({uid(n * 10 + m): [n, m] for m in range(3)})
    for died_at in range(1, 18):
        feed = db.changes()
        first = []
        for event in feed:
            first.append(event.entity_id)
            if len(first) == died_at:
                break
        rest = list(db.changes(feed.cursor))
        assert len({*first, *(event.entity_id for event in rest)}) == 18
        # The commit that was cut comes again from its first entity.
        assert len(rest) % 3 == 0


def test_a_feed_of_some_collections_moves_over_the_others(db: Database) -> None:
    for n in range(4):
        with db.transaction() as tx:
            tx.collection("a")[uid(n)] = n
            tx.collection("b")[uid(n)] = n
    db.collection("b")[uid(50)] = "tail"
    feed = db.changes(collections=["a"])
    assert {event.collection for event in feed} == {"a"}
    assert feed.cursor == db.sequence == 5
    assert list(feed) == []


def test_a_long_feed_comes_in_pages_without_gaps(db: Database) -> None:
    notes = db.collection("notes")
    for n in range(0, 2400, 3):
        notes.put_many({uid(m): m for m in range(n, n + 3)})
    notes.put_many({uid(m): "large" for m in range(5000, 7500)})
    assert [e.entity_id.int for e in db.changes() if e.entity_id] == [
        *range(2400),
        *range(5000, 7500),
    ]


def test_deletes_that_were_purged_make_a_reader_start_over() -> None:
    with Database.in_memory(role=Role.SERVER) as db:
        notes = db.collection("notes")
        notes[uid(1)] = "a"
        notes[uid(2)] = "b"
        del notes[uid(1)]
        purge_tombstones(db, 3)
        notes[uid(3)] = "c"
        assert brief(db.changes(2)) == [(3, "reset", None), (4, "put", 3)]
        assert brief(db.changes(3)) == [(4, "put", 3)]
        assert brief(db.changes()) == [(2, "put", 2), (4, "put", 3)]


# ---------------------------------------------------------------- observers


def test_observers_are_called_once_per_commit_in_order_and_after_it(db: Database) -> None:
    seen: list[CommitEvent] = []

    def observer(commit: CommitEvent) -> None:
        assert db.sequence >= commit.sequence
        seen.append(commit)

    db.observe(observer)
    db.collection("notes").put_many({uid(1): "a", uid(2): "b"})
    del db.collection("notes")[uid(1)]
    with db.transaction() as tx:
        tx.collection("notes")
    assert [(c.sequence, c.origin, brief(c.events)) for c in seen] == [
        (1, "local", [(1, "put", 1), (1, "put", 2)]),
        (2, "local", [(2, "delete", 1)]),
    ]


def test_an_observer_that_writes_is_told_of_it_later_and_in_order(db: Database) -> None:
    order: list[tuple[str, int]] = []

    def writer(commit: CommitEvent) -> None:
        order.append(("writer", commit.sequence))
        if commit.sequence < 4:
            db.collection("log")[uid(commit.sequence)] = commit.sequence

    db.observe(writer)
    db.observe(lambda commit: order.append(("second", commit.sequence)))
    db.collection("notes")[uid(1)] = "a"
    assert order == [(who, n) for n in range(1, 5) for who in ("writer", "second")]
    assert db.sequence == 4


def test_an_observer_that_raises_stops_neither_commit_nor_the_others(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    seen: list[int] = []

    def broken(commit: CommitEvent) -> None:
        raise ValueError("my own bug")

    db.observe(broken)
    db.observe(lambda commit: seen.append(commit.sequence))
    db.collection("notes")[uid(1)] = "a"
    db.collection("notes")[uid(1)] = "b"
    assert seen == [1, 2]
    assert [str(report.exc_value) for report in reported] == ["my own bug"] * 2


def test_an_observer_that_raises_is_reported_by_the_hook_of_the_interpreter(
    db: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    def broken(commit: CommitEvent) -> None:
        raise ValueError("my own bug")

    db.observe(broken)
    db.collection("notes")[uid(1)] = "a"
    assert db.collection("notes")[uid(1)] == "a"
    said = capsys.readouterr().err
    assert "ValueError: my own bug" in said
    assert "broken" in said and "observer" in said


def test_an_observer_that_is_interrupted_does_not_silence_the_others(db: Database) -> None:
    seen: list[int] = []

    def interrupted(commit: CommitEvent) -> None:
        raise KeyboardInterrupt

    stop = db.observe(interrupted)
    db.observe(lambda commit: seen.append(commit.sequence))
    with pytest.raises(KeyboardInterrupt):
        db.collection("notes")[uid(1)] = "a"
    assert seen == [1]
    stop()
    stop()
    db.collection("notes")[uid(1)] = "b"
    assert seen == [1, 2]


def alone(db: Database) -> None:
    db.collection("notes")[uid(1)] = "a"


def in_a_transaction(db: Database) -> None:
    with db.transaction() as tx:
        tx.collection("notes")[uid(1)] = "a"


def in_a_write_block(db: Database) -> None:
    with db.write() as writer:
        db.commit_writes(writer, {"notes": {uid(1).bytes: b"aa"}})


WAYS = pytest.mark.parametrize("write", [alone, in_a_transaction, in_a_write_block])


@WAYS
def test_what_an_observer_writes_before_it_ends_the_program_is_told_of(
    db: Database, write: Callable[[Database], None]
) -> None:
    seen: list[int] = []

    def ending(commit: CommitEvent) -> None:
        seen.append(commit.sequence)
        if commit.sequence == 1:
            db.collection("log")[uid(9)] = "the last"
            raise SystemExit

    db.observe(ending)
    with pytest.raises(SystemExit):
        write(db)
    assert seen == [1, 2]


@WAYS
def test_a_refused_write_tells_nobody_of_the_commits_of_others(
    db: Database, write: Callable[[Database], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An observer that it called would run inside this thread's transaction."""
    told: list[str] = []
    with db.transaction():
        monkeypatch.setattr(db._observers, "deliver", lambda: told.append("now"))
        with pytest.raises(TransactionError, match="already open"):
            write(db)
        assert told == []
    assert told == ["now"]


def test_an_observer_can_end_itself_and_ending_twice_is_fine(db: Database) -> None:
    seen: list[int] = []

    def once(commit: CommitEvent) -> None:
        seen.append(commit.sequence)
        stop()

    stop = db.observe(once)
    for n in range(3):
        db.collection("notes")[uid(n)] = n
    stop()
    assert seen == [1]


def test_observers_of_several_threads_writes_see_every_commit_in_order() -> None:
    with Database.in_memory() as db:
        seen: list[int] = []
        db.observe(lambda commit: seen.append(commit.sequence))

        def write(thread: int) -> None:
            for n in range(100):
                db.collection("notes")[uid(thread * 1000 + n)] = n

        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert seen == list(range(1, 401))


def test_what_came_from_the_server_says_so() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "theirs"))
    commits: list[CommitEvent] = []
    a.db.observe(commits.append)
    a.sync()
    a.put(("notes", 2, "mine"))
    a.sync()
    assert [commit.origin for commit in commits] == ["sync", "local"]
    assert [event.origin for event in a.db.changes()] == ["remote", "local"]


def test_settling_own_work_is_no_event_and_a_withdrawal_is_one() -> None:
    world = World()
    a = world.device()
    a.sync()
    a.put(("notes", 1, "mine"))
    commits: list[CommitEvent] = []
    a.db.observe(commits.append)
    a.sync()
    assert commits == []
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine again"), ("notes", 2, "with it"))
    commits.clear()
    a.sync()
    [commit] = commits
    assert (commit.origin, [(e.kind, e.value) for e in commit.events]) == (
        "sync",
        [("put", "theirs"), ("delete", None)],
    )

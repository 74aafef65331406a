"""Pages as an applier sees them: what it refuses, skips, orders and counts (R19 to R22)."""

from __future__ import annotations

from typing import Any

import pytest

from entidb import cbor
from entidb.db import purge_tombstones
from entidb.db.replica import HAVE_RANGES_MAX
from entidb.errors import ProtocolError, SyncCodecError
from entidb.protocol import (
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushResponse,
    PushResult,
    Verdict,
)
from entidb.sync import Conflict, ConflictResolution
from entidb.sync.apply.seam import BatchLimits
from entidb.types import timestamp_from_ms
from tests.support import START_MS, Device, World, assert_in_step, uid

SERVER = b"s" * 16
NOW = timestamp_from_ms(START_MS)


def start(**config: Any) -> tuple[World, Device]:
    """A device that has synchronised with an empty server."""
    world = World()
    a = world.device(**config)
    a.sync()
    return world, a


def asked(device: Device) -> PullRequest:
    state = device.state
    assert state.history is not None
    return PullRequest(
        db_id="shop",
        device_id=device.db.device_id,
        history=state.history,
        cursor=state.cursor,
        limit=1000,
        bytes_max=1 << 20,
        full=state.full,
        collections=device.engine.applier.scope(),
    )


def write(number: int, value: Any = "x", collection: int = 0) -> PullOperation:
    payload = None if value is None else cbor.encode(value)
    return PullOperation(collection, uid(number).bytes, payload)


def commit(version: int, *operations: PullOperation, timestamp: int = NOW) -> PullCommit:
    return PullCommit(version, SERVER, timestamp, list(operations))


def page(*commits: PullCommit, **changes: Any) -> PullResponse:
    last = commits[-1].version if commits else 0
    given: dict[str, Any] = {
        "collections": ["notes"],
        "commits": list(commits),
        "cursor": last,
        "has_more": False,
        "head": last,
        "floor": 0,
        "time": START_MS,
    }
    return PullResponse(**(given | changes))


def apply(device: Device, response: PullResponse) -> Any:
    return device.engine.applier.apply(asked(device), response)


# ---------------------------------------------------------------- what cannot be right


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (page(commit(5, write(1, collection=1))), ProtocolError),
        (page(commit(5, write(1, collection=7))), ProtocolError),
        (page(commit(5, PullOperation(0, uid(1).bytes, b"\xf6"))), SyncCodecError),
        (page(commit(5, PullOperation(0, uid(1).bytes, b"\x18\x01"))), SyncCodecError),
        (page(commit(5, write(1)), head=4), ProtocolError),
        (page(commit(5, write(1)), cursor=4), ProtocolError),
        (page(has_more=True, head=9), ProtocolError),
        (page(commit(5, write(1)), commit(5, write(2))), ProtocolError),
        (page(commit(5, write(1)), commit(6, write(1))), ProtocolError),
        (page(commit(5, write(1)), collections=[""]), ProtocolError),
    ],
)
def test_a_page_that_cannot_be_right_changes_nothing(
    response: PullResponse, error: type[Exception]
) -> None:
    _, a = start()
    commits = a.storage.commits
    with pytest.raises(error):
        apply(a, response)
    assert (a.storage.commits, a.state.cursor) == (commits, 0)


def test_r22_a_page_moves_the_cursor_to_where_it_ends() -> None:
    _, a = start()
    report = apply(a, page(commit(5, write(1)), commit(6, write(2)), cursor=8, head=9))
    assert (report.pulled, a.state.cursor, a.values()) == (2, 8, {1: "x", 2: "x"})


# ---------------------------------------------------------------- clocks (R27)


def stamp_of_next_write(device: Device) -> int:
    device.put(("notes", 99, "mine"))
    [pending] = device.engine.applier.pending()
    return pending.timestamp


def test_r27_the_clock_goes_behind_the_newest_commit_of_a_page() -> None:
    _, a = start()
    apply(a, page(commit(5, write(1), timestamp=NOW + 900), commit(6, write(2), timestamp=NOW + 7)))
    assert stamp_of_next_write(a) == NOW + 901


def test_r27_the_clock_does_not_go_beyond_what_the_server_says_the_time_is() -> None:
    _, a = start()
    later = timestamp_from_ms(START_MS + 10_000)
    apply(a, page(commit(5, write(1), timestamp=later), time=START_MS + 5000))
    assert stamp_of_next_write(a) == (timestamp_from_ms(START_MS + 5000) | 0xFFFF) + 1


# ---------------------------------------------------------------- scope (R31)


def test_r31_what_a_server_sends_beyond_the_scope_is_left_out() -> None:
    _, a = start(collections=("notes",))
    operations = [write(1, collection=0), write(1, collection=1)]
    apply(a, page(commit(5, *operations), collections=["other", "notes"]))
    assert (a.values(), a.state.cursor) == ({1: "x"}, 5)
    assert a.db.collections() == ["notes"]


@pytest.mark.parametrize("page_size", [2, 5000], ids=["several pages", "one page"])
def test_r31_a_collection_that_is_local_here_is_left_out_of_pages(page_size: int) -> None:
    world = World()
    a = world.device(pull_operations_max=page_size)
    a.db.declare_local("drafts")
    for n in range(1, 6):
        world.put(("drafts", n, "theirs"), ("notes", n, "theirs"))
    a.put(("drafts", 2, "mine"))
    result = a.sync()
    assert (a.values("drafts"), result.pulled) == ({2: "mine"}, 5)
    assert a.values() == dict.fromkeys(range(1, 6), "theirs")
    for n in range(3, 8):
        world.put(("drafts", n, "again"), ("notes", n, "again"))
    assert a.sync().pulled == 5
    assert a.values("drafts") == {2: "mine"}
    assert a.values() == world.values()
    assert a.db.verify() == []


# ---------------------------------------------------------------- order and counts


@pytest.mark.parametrize("page_size", [2, 5000], ids=["several pages", "one page"])
def test_r25_conflicts_of_a_page_are_decided_in_the_order_of_the_pending_work(
    page_size: int,
) -> None:
    order: list[int] = []

    def policy(conflict: Conflict) -> ConflictResolution:
        order.append(conflict.entity_id.int)
        return ConflictResolution.keep_local()

    world = World()
    world.put(*[("notes", n, 0) for n in (1, 2, 3)])
    a = world.device(default_policy=policy, pull_operations_max=page_size)
    a.sync()
    a.put(("notes", 2, "older"), ("notes", 3, "older"))
    a.put(("notes", 1, "newer"))
    for n in (1, 3, 2):
        world.put(("notes", n, "theirs"))
    a.sync()
    assert order == [2, 3, 1]
    assert_in_step(world, a)


def test_a_pull_in_several_pages_counts_as_one_in_one_page() -> None:
    pulled = []
    for page_size in (2, 5000):
        world = World()
        a = world.device(pull_operations_max=page_size)
        for n in range(1, 8):
            world.put(("notes", n, "first"))
        world.put(("notes", 3, None))
        first = a.sync().pulled
        for n in range(4, 10):
            world.put(("notes", n, "second"))
        pulled.append((first, a.sync().pulled, a.sync().pulled))
        assert_in_step(world, a)
    assert pulled == [(7, 6, 0), (7, 6, 0)]


# ---------------------------------------------------------------- what need not come back (R21)


def test_r21_the_newest_of_too_many_own_versions_are_kept() -> None:
    _, a = start()
    applier = a.engine.applier
    count = HAVE_RANGES_MAX + 3
    for n in range(count):
        a.put(("notes", n + 1, "mine"))
    batch = applier.prepare(BatchLimits())
    assert batch is not None
    versions = [10 + 2 * n for n in range(count)]
    results = [PushResult(Verdict.ACCEPTED, version) for version in versions]
    applier.settle(
        batch,
        PushResponse(results=results, collections=["notes"], head=versions[-1], time=START_MS),
        None,
    )
    assert a.state.have == [[version, version] for version in versions[3:]]


# ---------------------------------------------------------------- publishing (R20, R28, R29)


def noting() -> tuple[list[Conflict], Any]:
    """A policy that keeps the device's side, and the conflicts it is asked about."""
    conflicts: list[Conflict] = []

    def policy(conflict: Conflict) -> ConflictResolution:
        conflicts.append(conflict)
        return ConflictResolution.keep_local()

    return conflicts, policy


def test_r28_replaced_collections_are_told_in_order_of_their_names() -> None:
    world = World()
    for name in ("notes", "tasks", "cards", "lists"):
        world.put((name, 1, "x"))
    a = world.device(pull_operations_max=1)
    a.sync()
    told = [(event.kind, event.collection) for event in a.db.changes()]
    assert told == [("reset", name) for name in ("cards", "lists", "notes", "tasks")]


def test_r28_what_a_reset_does_not_find_is_deleted_by_nobody_at_the_cursor() -> None:
    conflicts, policy = noting()
    world = World()
    a = world.device(default_policy=policy)
    world.put(("notes", 1, "old"))
    a.sync()
    world.put(("notes", 1, None))
    purge_tombstones(world.server, world.server.sequence)
    a.put(("notes", 1, "mine"), ("notes", 9, "made"))
    a.sync()
    [conflict] = conflicts
    assert (conflict.base, conflict.local, conflict.remote) == ("old", "mine", None)
    assert (conflict.remote_device, conflict.remote_timestamp) == (bytes(16), 0)
    # What is not there is known to be not there up to the cursor.
    [push] = a.wire.pushes()
    bases = [op.base_version for op in push.transactions[0].operations]
    assert bases == [conflict.remote_version] * 2 == [push.cursor] * 2
    assert_in_step(world, a)


def restored(policy: Any) -> tuple[World, Device]:
    """A device saw note 1 change and note 2 come; then the server was put back to before."""
    world = World()
    world.put(("notes", 1, "old"))
    a = world.device(default_policy=policy)
    a.sync()
    backup = world.backup_server()
    world.put(("notes", 1, "lost"))
    world.put(("notes", 2, "lost"))
    a.sync()
    world.open_server(backup)
    return world, a


@pytest.mark.parametrize("writes", [1, 3], ids=["same version", "newer version"])
def test_r29_what_others_wrote_in_the_other_history_is_a_conflict_for_the_device(
    writes: int,
) -> None:
    conflicts, policy = noting()
    world, a = restored(policy)
    for n in range(writes):
        world.put(("notes", 1, f"new {n}"))
    a.put(("notes", 2, "mine"))
    a.put(("notes", 1, "mine"))
    a.engine.reset("device")
    a.settle()
    assert [(c.base, c.local, c.remote) for c in conflicts] == [
        ("lost", "mine", f"new {writes - 1}")
    ]
    assert world.values() == {1: "mine", 2: "mine"}
    assert_in_step(world, a)


def test_r29_a_change_to_what_the_server_lost_altogether_is_pushed_by_the_device() -> None:
    conflicts, policy = noting()
    world, a = restored(policy)
    a.put(("notes", 2, "mine"))
    a.engine.reset("device")
    a.settle()
    assert (conflicts, world.values()) == ([], {1: "lost", 2: "mine"})
    assert_in_step(world, a)


def test_r31_a_widening_takes_the_whole_of_a_commit_that_it_has_in_part() -> None:
    world = World()
    world.put(("tasks", 1, 0), ("notes", 1, 0))
    a = world.device(collections=("notes",))
    a.sync()
    world.put(("tasks", 1, 1), ("notes", 1, 1))
    a.db.set_scope(("notes", "tasks"))
    a.restart(collections=("notes", "tasks"))
    a.sync()
    assert (a.values(), a.values("tasks")) == ({1: 1}, {1: 1})
    assert_in_step(world, a)


def test_changes_in_several_pages_leave_the_records_that_one_page_leaves() -> None:
    records = []
    for page_size in (2, 5000):
        world = World()
        world.put(("notes", 1, "x"))
        a = world.device()
        a.sync()
        a.restart(pull_operations_max=page_size)
        for n in range(2, 9):
            world.put(("notes", n, "x"))
        a.sync()
        a.sync()
        assert_in_step(world, a)
        records.append(a.db.storage.info().records)
    assert records[0] == records[1]


def test_r29_work_on_what_never_was_on_a_server_goes_through_a_reset_as_it_is() -> None:
    conflicts, policy = noting()
    world, a = restored(policy)
    a.put(("notes", 9, "made"))
    a.put(("notes", 9, None))
    a.engine.reset("server")
    result = a.sync()
    assert (conflicts, result.done, result.pushed) == ([], [], 2)
    assert_in_step(world, a)

"""Staged pages, in columns and in commits: what is refused, left out, counted (R20, R22, R31)."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import cbor
from entidb.errors import ProtocolError, SyncCodecError, SyncStateError
from entidb.protocol import (
    TOMBSTONE_SIZE,
    PullColumns,
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    SyncRequest,
)
from entidb.types import timestamp_from_ms
from tests.support import START_MS, Device, World, assert_in_step, assert_sound, uid

SERVER = b"s" * 16
NOW = timestamp_from_ms(START_MS)

forms = pytest.mark.parametrize("columns", [False, True], ids=["commits", "columns"])


def write(number: int, value: Any = "x", collection: int = 0) -> PullOperation:
    payload = None if value is None else cbor.encode(value)
    return PullOperation(collection, uid(number).bytes, payload)


def commit(version: int, *operations: PullOperation, timestamp: int = NOW) -> PullCommit:
    return PullCommit(version, SERVER, timestamp, list(operations))


def page(*commits: PullCommit, columns: bool = False, **changes: Any) -> PullResponse:
    """The page of ``commits`` that ends a pull, unless ``changes`` say otherwise."""
    last = commits[-1].version if commits else 0
    made = PullResponse(
        collections=["notes"],
        commits=list(commits),
        cursor=last,
        has_more=False,
        head=last,
        floor=0,
        time=START_MS,
    )
    made = replace(made, **changes)
    return replace(made, commits=[], columns=in_columns(made.commits)) if columns else made


def in_columns(commits: list[PullCommit]) -> PullColumns:
    rows = [(commit, op) for commit in commits for op in commit.operations]
    count = len(rows)
    sizes = [TOMBSTONE_SIZE if op.payload is None else len(op.payload) for _, op in rows]
    return PullColumns(
        ids=b"".join(op.entity_id for _, op in rows),
        heads=b"".join(struct.pack(">Q16sQ", c.version, c.device_id, c.timestamp) for c, _ in rows),
        sizes=struct.pack(f">{count}I", *sizes),
        values=b"".join(op.payload or b"" for _, op in rows),
        indexes=struct.pack(f">{count}H", *[op.collection for _, op in rows]),
    )


def fresh(**config: Any) -> tuple[World, Device]:
    """A device that knows its server, and has pulled nothing."""
    world = World()
    a = world.device(**config)
    a.engine.applier.bind("shop", world.service.database.history or b"")
    return world, a


def asked(device: Device, cursor: int = 0, *, full: bool = True) -> PullRequest:
    state = device.state
    assert state.history is not None
    return PullRequest(
        db_id="shop",
        device_id=device.db.device_id,
        history=state.history,
        cursor=cursor,
        limit=1000,
        bytes_max=1 << 20,
        full=full,
        collections=device.engine.applier.scope(),
    )


def stage(device: Device, response: PullResponse, cursor: int = 0) -> Any:
    return device.engine.applier.stage_page(asked(device, cursor), response, None)


def staged(device: Device, *pages: PullResponse) -> None:
    """Stage these pages, and make them the device's state."""
    cursor = 0
    for response in pages:
        stage(device, response, cursor)
        cursor = response.cursor
    device.engine.applier.publish()
    assert_sound(device.db)


# ---------------------------------------------------------------- what cannot be right


@pytest.mark.parametrize(
    ("commits", "changes", "error"),
    [
        ([commit(5, write(1, collection=1))], {}, ProtocolError),
        ([commit(5, write(1), write(2, collection=7))], {}, ProtocolError),
        (
            [commit(5, write(1)), commit(6, PullOperation(0, SERVER, b"\xf6"))],
            {},
            SyncCodecError,
        ),
        ([commit(5, PullOperation(0, uid(1).bytes, b"\x18\x01"))], {}, SyncCodecError),
        ([commit(5, write(1))], {"head": 4}, ProtocolError),
        ([commit(5, write(1))], {"cursor": 4}, ProtocolError),
        ([commit(5, write(1)), commit(6, write(2))], {"cursor": 5}, ProtocolError),
        ([], {"has_more": True, "head": 9}, ProtocolError),
        ([commit(5, write(1)), commit(6, write(1))], {}, ProtocolError),
        ([commit(5, write(1)), commit(6, write(1, None))], {}, ProtocolError),
        ([commit(5, write(1, None)), commit(6, write(1))], {}, ProtocolError),
        ([commit(5, write(1, None)), commit(6, write(1, None))], {}, ProtocolError),
        ([commit(5, write(1))], {"collections": [""]}, ProtocolError),
    ],
)
@forms
def test_a_page_that_cannot_be_right_is_not_kept(
    commits: list[PullCommit], changes: dict[str, Any], error: type[Exception], columns: bool
) -> None:
    _, a = fresh()
    before = a.storage.commits
    with pytest.raises(error):
        stage(a, page(*commits, columns=columns, **changes))
    assert (a.storage.commits, a.engine.applier.stage()) == (before, None)


@pytest.mark.parametrize(("version", "fine"), [(4, False), (5, False), (6, True)])
@forms
def test_r22_a_page_begins_behind_the_cursor_it_was_asked_with(
    version: int, fine: bool, columns: bool
) -> None:
    _, a = fresh()
    stage(a, page(commit(5, write(1)), columns=columns, has_more=True, head=9))
    following = page(commit(version, write(2)), columns=columns, cursor=9, head=9)
    if fine:
        assert stage(a, following, 5).full_cursor == 9
        return
    with pytest.raises(ProtocolError, match=f"version {version} after 5"):
        stage(a, following, 5)
    assert a.engine.applier.stage().full_cursor == 5  # type: ignore[union-attr]


@forms
def test_what_is_wrong_with_a_value_is_told_with_its_place(columns: bool) -> None:
    _, a = fresh()
    bad = PullOperation(0, uid(2).bytes, b"\x18\x01")
    with pytest.raises(SyncCodecError, match=f"entity {uid(2).hex} of version 6"):
        stage(a, page(commit(5, write(1)), commit(6, write(3, None), bad), columns=columns))


@forms
def test_r31_changes_are_not_taken_for_everything_when_their_stage_is_gone(columns: bool) -> None:
    world = World()
    world.put(("notes", 1, "old"))
    a = world.device()
    a.sync()
    changes = page(commit(5, write(2)), columns=columns)
    with pytest.raises(SyncStateError, match="scope"):
        a.engine.applier.stage_page(asked(a, a.state.cursor, full=False), changes, ["tasks"])
    assert a.engine.applier.stage() is None


# ---------------------------------------------------------------- what is kept


@forms
def test_r20_a_stage_counts_what_is_live_and_what_came(columns: bool) -> None:
    _, a = fresh()
    first = page(
        commit(1, write(1), write(2, None), write(1, "t", 1)),
        commit(2, write(3)),
        columns=columns,
        collections=["notes", "tasks", "empty"],
        has_more=True,
        head=9,
    )
    last = page(
        commit(4, write(4), write(5, None), write(6)),
        columns=columns,
        collections=["notes"],
        cursor=9,
        head=9,
        time=START_MS + 5,
    )
    kept = stage(a, first)
    assert (kept.full_cursor, kept.full_done, kept.operations) == (2, False, 4)
    kept = stage(a, last, 2)
    assert (kept.full_cursor, kept.full_done, kept.operations) == (9, True, 7)
    assert kept.time_ms == START_MS + 5
    report = a.engine.applier.publish()
    assert report.pulled == 7
    assert (a.values(), a.values("tasks"), a.values("empty")) == (
        {1: "x", 3: "x", 4: "x", 6: "x"},
        {1: "t"},
        {},
    )
    assert [len(a.db.collection(name)) for name in ("notes", "tasks", "empty")] == [4, 1, 0]
    assert a.state.cursor == 9
    assert_sound(a.db)


@forms
def test_what_changed_between_two_pages_takes_the_place_of_what_came_before(columns: bool) -> None:
    _, a = fresh()
    first = page(
        commit(1, write(1, "old"), write(2, "old"), write(3)),
        columns=columns,
        has_more=True,
        head=4,
    )
    last = page(
        commit(4, write(4)), commit(5, write(1, "new")), commit(6, write(2, None)), columns=columns
    )
    staged(a, first, last)
    assert a.values() == {1: "new", 3: "x", 4: "x"}
    assert len(a.notes) == 3


@forms
def test_r27_the_clock_goes_behind_the_newest_of_a_staged_page(columns: bool) -> None:
    _, a = fresh()
    newest = NOW + (1 << 16) * 1000
    commits = [commit(1, write(1), timestamp=newest), commit(2, write(2), timestamp=NOW)]
    stage(a, page(*commits, columns=columns, time=START_MS + 5000))
    a.put(("notes", 9, "later"))
    [pending] = a.engine.applier.pending()
    assert pending.timestamp > newest


@forms
def test_r31_a_staged_page_leaves_out_what_is_beyond_the_scope(columns: bool) -> None:
    _, a = fresh(collections=("tasks",))
    a.db.set_scope(("tasks",))
    while a.engine.applier.adopt():
        pass
    both = page(
        commit(1, write(1), write(1, "t", 1), write(2, "t", 1)),
        columns=columns,
        collections=["notes", "tasks"],
    )
    kept = stage(a, both)
    assert kept.operations == 2
    a.engine.applier.publish()
    assert (a.values("tasks"), "notes" in a.db.collections()) == ({1: "t", 2: "t"}, False)
    assert_sound(a.db)


@forms
def test_r31_changes_after_the_full_part_take_their_place_and_count_once(columns: bool) -> None:
    world = World()
    world.put(("notes", 1, "old"))
    a = world.device(collections=("notes",))
    a.sync()
    a.db.set_scope(("notes", "tasks"))
    applier, cursor = a.engine.applier, a.state.cursor
    while applier.adopt():
        pass
    everything = replace(asked(a), collections=["tasks"])
    beside = page(
        commit(3, write(7)), columns=columns, collections=["notes"], has_more=True, head=9
    )
    assert applier.stage_page(everything, beside, ["tasks"]).operations == 0
    tasks: dict[str, Any] = {"columns": columns, "collections": ["tasks"], "cursor": 9, "head": 9}
    changes = page(commit(5, write(1, "t")), **tasks)
    kept = applier.stage_page(replace(everything, cursor=3), changes, ["tasks"])
    assert (kept.full_cursor, kept.full_done, kept.delta_cursor) == (9, True, cursor)
    kept = applier.stage_page(asked(a, cursor, full=False), changes, ["tasks"])
    assert (kept.full_cursor, kept.delta_cursor) == (9, 9)
    applier.publish()
    assert (a.values(), a.values("tasks"), a.state.cursor) == ({1: "old"}, {1: "t"}, 9)
    assert len(a.db.collection("tasks")) == 1
    assert_sound(a.db)


@pytest.mark.parametrize("page_size", [2, 1000])
def test_r31_a_server_that_sends_more_than_was_missing_leaves_no_trace_of_it(
    page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    for n in range(6):
        world.put(("notes", n, "old"), ("tasks", n, "old"))
    a = world.device(collections=("notes",), pull_operations_max=page_size)
    a.sync()
    a.db.set_scope(("notes", "tasks"))
    a.restart(collections=("notes", "tasks"))
    world.put(("notes", 6, "new"), ("tasks", 6, "new"))
    answer = world.answer

    def generous(request: SyncRequest, *rest: Any) -> Any:
        if isinstance(request, PullRequest):
            request = replace(request, collections=None)
        return answer(request, *rest)

    monkeypatch.setattr(world, "answer", generous)
    a.sync()
    assert_in_step(world, a)

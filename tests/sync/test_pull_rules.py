"""Pulling, staging and applying: R19 to R22."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from entidb import cbor
from entidb.errors import ProtocolError, SyncStateError
from entidb.protocol import (
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    SyncRequest,
    expanded,
)
from entidb.sync.apply.report import RebaseReport
from tests.support import Crash, Device, World, assert_in_step, assert_sound, uid


def filled(world: World, commits: int = 12, each: int = 1) -> None:
    for n in range(commits):
        world.put(*[("notes", n * each + m, "old") for m in range(each)])


def fetch(device: Device, **changes: Any) -> tuple[PullRequest, PullResponse]:
    """What the device would ask next, and the answer, not applied."""
    state = device.state
    assert state.history is not None
    request = PullRequest(
        db_id="shop",
        device_id=device.db.device_id,
        history=state.history,
        cursor=state.cursor,
        limit=1000,
        bytes_max=1 << 20,
    )
    request = replace(request, **changes)
    return request, device.world.service.pull(request, device.wire.grant)


def apply(device: Device, request: PullRequest, response: PullResponse) -> RebaseReport:
    return device.engine.applier.apply(request, response)


# ---------------------------------------------------------------- R19


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
def test_r19_pages_cut_between_commits_and_are_bounded_by_operations(limit: int) -> None:
    world = World()
    for size in (1, 3, 2, 7, 1, 1, 4):
        start = world.server.sequence * 100
        world.put(*[("notes", start + n, "x") for n in range(size)])
    a = world.device(pull_operations_max=limit)
    a.sync()
    seen: list[int] = []
    for response in a.wire.responses:
        if isinstance(response, PullResponse):
            commits = expanded(response).commits
            sizes = [len(commit.operations) for commit in commits]
            assert sum(sizes) <= limit or len(sizes) == 1
            seen += [commit.version for commit in commits]
    assert seen == list(range(1, 8))
    assert_in_step(world, a)


def test_r19_pages_are_bounded_by_bytes_and_a_larger_commit_comes_whole() -> None:
    world = World()
    for n, size in enumerate([100, 100, 100, 5000, 100, 100]):
        world.put(("notes", n, "x" * size), ("notes", 100 + n, "x"))
    a = world.device(pull_bytes_max=400)
    a.sync()
    pages = [r for r in a.wire.responses if isinstance(r, PullResponse)]
    assert len(pages) >= 3
    assert all(len(commit.operations) == 2 for page in pages for commit in page.commits)
    assert_in_step(world, a)


def test_r19_the_last_page_says_the_head_it_reached() -> None:
    world = World()
    filled(world)
    a = world.device(pull_operations_max=5)
    a.sync()
    last = a.wire.responses[-1]
    assert isinstance(last, PullResponse)
    assert (last.has_more, last.cursor, last.head) == (False, 12, 12)
    assert a.state.cursor == 12


def test_r19_a_first_sync_is_the_state_and_not_the_history() -> None:
    world = World()
    for n in range(50):
        world.put(("notes", 1, n))
    a = world.device()
    assert a.sync().pulled == 1


# ---------------------------------------------------------------- R20


def test_r20_one_page_is_one_storage_commit() -> None:
    world = World()
    a = world.device(default_policy="client_wins")
    filled(world)
    a.sync()
    world.put(("notes", 1, "new"), ("notes", 2, None))
    world.put(("notes", 3, "new"))
    commits = a.storage.commits
    a.sync()
    assert a.storage.commits == commits + 1
    assert_in_step(world, a)


@pytest.mark.parametrize("first", [True, False])
def test_r20_several_pages_become_visible_at_once(first: bool) -> None:
    world = World()
    a = world.device(pull_operations_max=3)
    if not first:
        filled(world, 3)
        a.sync()
    before = a.values()
    filled(world, 12, each=2)
    world.put(("notes", 0, None))
    seen: list[dict[int, Any]] = []
    a.wire.before = lambda request: seen.append(a.values())
    a.sync()
    assert len(seen) >= 5
    assert all(view == before for view in seen)
    assert a.values() == world.values()
    assert_in_step(world, a)


@pytest.mark.parametrize("first", [True, False])
def test_r20_a_staged_pull_killed_at_every_page_is_resumed(first: bool) -> None:
    for page in range(1, 50):
        world = World()
        a = world.device(pull_operations_max=3)
        if not first:
            filled(world, 3)
            a.sync()
            world.put(("notes", 2, None))
        filled(world, 20)
        a.wire.requests.clear()

        def die(request: SyncRequest, a: Device = a, page: int = page) -> None:
            if len(a.wire.pulls()) == page:
                raise Crash

        a.wire.before = die
        try:
            a.sync()
        except Crash:
            pass
        else:
            break
        asked = [pull.cursor for pull in a.wire.pulls()]
        a.restart()
        world.put(("notes", 500, "meanwhile"), ("notes", 7, "meanwhile"))
        a.sync()
        # Only the page that was cut is asked for again.
        assert a.wire.pulls()[0].cursor == asked[-1]
        assert_in_step(world, a)
    assert page > 6


def test_r20_changes_between_the_pages_of_a_first_sync_are_not_lost() -> None:
    world = World()
    filled(world, 20)
    a = world.device(pull_operations_max=4)

    def meanwhile(request: SyncRequest) -> None:
        number = len(a.wire.pulls())
        if 1 < number < 6:
            world.put(("notes", number, "changed"), ("notes", number + 10, None))
            world.put(("notes", 100 + number, "new"))
            world.put(("notes", 100 + number, None))

    a.wire.before = meanwhile
    a.sync()
    a.wire.before = lambda request: None
    a.sync()
    assert_in_step(world, a)


def test_r20_local_work_during_a_first_sync_is_on_top_of_it() -> None:
    world = World()
    filled(world, 20)
    a = world.device(pull_operations_max=4, default_policy="client_wins")

    def write(request: SyncRequest) -> None:
        if len(a.wire.pulls()) == 3 and not a.pending:
            a.put(("notes", 1, "mine"), ("notes", 50, "mine"))

    a.wire.before = write
    a.sync()
    a.settle()
    assert world.values()[1] == "mine" and world.values()[50] == "mine"
    assert_in_step(world, a)


def test_r20_a_first_sync_is_one_reset_event_and_a_single_page_is_not() -> None:
    world = World()
    filled(world, 12)
    a, b = world.device(pull_operations_max=4), world.device()
    events: dict[str, list[str]] = {"a": [], "b": []}
    a.db.observe(lambda commit: events["a"].extend(e.kind for e in commit.events))
    b.db.observe(lambda commit: events["b"].extend(e.kind for e in commit.events))
    a.sync()
    b.sync()
    assert events == {"a": ["reset"], "b": ["put"] * 12}


def test_r20_what_many_pages_bring_to_dirty_entities_is_rebased() -> None:
    world = World()
    filled(world, 20)
    a = world.device(pull_operations_max=4, default_policy="client_wins")
    a.sync()
    for n in range(20):
        world.put(("notes", n, "theirs"))
    a.put(("notes", 3, "mine"), ("notes", 12, None))
    a.put(("notes", 3, "mine again"), ("notes", 18, "mine"))
    result = a.sync()
    assert len(result.conflicts) == 3
    assert world.values()[3] == "mine again" and 12 not in world.values()
    assert_in_step(world, a)


# ---------------------------------------------------------------- R21


def test_r21_what_a_device_pushed_itself_does_not_come_back() -> None:
    world = World()
    a = world.device()
    a.sync()
    for n in range(5):
        a.put(("notes", n, "mine"))
    a.sync()
    world.put(("notes", 10, "theirs"))
    a.put(("notes", 11, "mine"))
    a.sync()
    result = a.sync()
    assert result.pulled == 0
    pulled = [
        commit.version
        for response in a.wire.responses
        if isinstance(response, PullResponse)
        for commit in response.commits
    ]
    assert pulled == [6]
    assert a.state.have == [[7, 7]]
    assert_in_step(world, a)


def test_r21_leaving_have_empty_gives_the_same_result() -> None:
    dumps = []
    for empty in (True, False):
        world = World()
        a = world.device(default_policy="client_wins")
        a.sync()
        for n in range(4):
            a.put(("notes", n, "mine"), ("notes", 9, n))
            a.sync()
            world.put(("notes", n, "theirs"), ("notes", 20 + n, "theirs"))
        a.put(("notes", 30, "mine"))
        a.sync()
        world.put(("notes", 3, "theirs again"))
        a.put(("notes", 2, "again"))
        request, response = fetch(a, have=[] if empty else a.state.have)
        own = [c for c in response.commits if c.device_id == a.db.device_id]
        assert bool(own) == empty
        apply(a, request, response)
        a.settle()
        assert_in_step(world, a)
        dumps.append(world.values())
    assert dumps[0] == dumps[1]


def test_r21_own_versions_with_foreign_ones_between_are_ranges() -> None:
    world = World()
    a = world.device()
    a.sync()
    for n in range(3):
        a.put(("notes", n, "mine"))
        a.put(("notes", n + 10, "mine"))
        a.wire.before = lambda request, n=n: (  # type: ignore[misc]
            None if isinstance(request, PullRequest) else world.put(("other", n, "x"))
        )
        a.sync()
    assert a.state.have == [[8, 9]] and a.state.cursor == 6
    a.wire.before = lambda request: None
    a.sync()
    assert_in_step(world, a)


# ---------------------------------------------------------------- R22


def test_r22_applying_a_page_twice_changes_nothing() -> None:
    world = World()
    a = world.device()
    a.sync()
    filled(world, 3)
    request, response = fetch(a)
    apply(a, request, response)
    commits, sequence = a.storage.commits, a.db.sequence
    with pytest.raises(SyncStateError):
        apply(a, request, response)
    assert (a.storage.commits, a.db.sequence) == (commits, sequence)
    # Even where the cursor is right, what is known already is skipped.
    again = replace(request, cursor=a.state.cursor)
    report = apply(a, again, replace(response, commits=[]))
    assert report.pulled == 0
    assert_in_step(world, a)


def test_r22_an_answer_from_before_a_reset_is_refused() -> None:
    world = World()
    a = world.device()
    filled(world, 3)
    a.sync()
    filled(world, 5)
    request, response = fetch(a)
    a.engine.reset("server")
    with pytest.raises(SyncStateError):
        apply(a, request, response)
    a.sync()
    assert_in_step(world, a)


def test_r22_an_answer_to_an_older_cursor_is_refused() -> None:
    world = World()
    a = world.device()
    a.sync()
    filled(world, 3)
    request, response = fetch(a)
    filled(world, 5)
    a.sync()
    with pytest.raises(SyncStateError):
        apply(a, request, response)
    assert_in_step(world, a)


def test_r22_a_staged_page_is_not_staged_twice() -> None:
    world = World()
    a = world.device()
    a.sync()
    filled(world, 10)
    request, response = fetch(a, limit=3)
    assert response.has_more
    a.engine.applier.stage_page(request, response, [])
    with pytest.raises(SyncStateError):
        a.engine.applier.stage_page(request, response, [])
    a.sync()
    assert_in_step(world, a)


def test_r22_only_a_pull_moves_the_cursor() -> None:
    world = World()
    a = world.device()
    filled(world, 3)
    a.sync()
    a.put(("notes", 50, "mine"))
    a.sync()
    assert (a.state.cursor, world.server.sequence) == (3, 4)
    world.put(("notes", 51, "theirs"))
    a.sync()
    assert (a.state.cursor, a.state.have) == (5, [])


def test_r10_a_pull_that_brings_only_own_commits_stores_the_cursor_with_the_next_push() -> None:
    world = World()
    a = world.device()
    a.sync()
    a.put(("notes", 1, "mine"))
    a.sync()
    commits = a.storage.commits
    a.sync()
    assert (a.storage.commits, a.state.cursor) == (commits, 0)
    a.put(("notes", 2, "mine"))
    a.sync()
    assert (a.state.cursor, a.state.have) == (1, [[2, 2]])
    assert_in_step(world, a)


# ---------------------------------------------------------------- a hostile server


def refused(device: Device, request: PullRequest, response: PullResponse) -> None:
    commits = device.storage.commits
    with pytest.raises(ProtocolError):
        apply(device, request, response)
    with pytest.raises(ProtocolError):
        device.engine.applier.stage_page(request, response, [])
    assert device.storage.commits == commits
    assert_sound(device.db)


def commit_of(version: int, number: int, payload: bytes | None = b"\x01") -> PullCommit:
    return PullCommit(version, bytes(16), 0, [PullOperation(0, uid(number).bytes, payload)])


@pytest.mark.parametrize(
    "changes",
    [
        {"commits": [commit_of(2, 1), commit_of(1, 2)]},
        {"commits": [commit_of(0, 1)]},
        {"commits": [commit_of(99, 1)]},
        {"commits": [commit_of(1, 1, b"\x18\x01")]},
        {"commits": [commit_of(1, 1, b"\x01\x01")]},
        {"commits": [commit_of(1, 1), commit_of(2, 1)]},
        {"commits": [PullCommit(1, bytes(16), 0, commit_of(1, 1).operations * 2)]},
        {"head": 1, "cursor": 2},
        {"has_more": True, "cursor": 0},
        {"collections": ["no\nname"]},
    ],
)
def test_a_page_that_cannot_be_is_refused_whole(changes: dict[str, Any]) -> None:
    world = World()
    a = world.device()
    a.sync()
    filled(world, 3)
    request, response = fetch(a)
    refused(a, request, replace(response, **changes))


def test_timestamps_from_beyond_time_do_not_break_the_clock() -> None:
    world = World()
    a = world.device()
    a.sync()
    filled(world, 1)
    request, response = fetch(a)
    late = PullCommit(1, bytes(16), 2**64 - 1, [PullOperation(0, uid(1).bytes, cbor.encode("x"))])
    apply(a, request, replace(response, commits=[late]))
    for n in range(3):
        a.put(("notes", 1, n))
    assert a.values() == {1: 2}

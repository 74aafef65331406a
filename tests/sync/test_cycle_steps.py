"""What a cycle asks, hints at and tells, step by step: R5, R7, R9, R10, R20."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import cbor
from entidb.errors import ProtocolError, ServerError, SyncCancelledError, TransportError
from entidb.protocol import (
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushRequest,
    SyncRequest,
)
from entidb.server import service
from entidb.sync import SyncProgress, SyncState, pulling
from entidb.types import OPERATION_OVERHEAD_BYTES
from tests.support import Device, World, assert_in_step, lose, uid

PULLING, PUSHING = SyncState.PULLING, SyncState.PUSHING


def watched(monkeypatch: pytest.MonkeyPatch, device: Device) -> list[tuple[str, SyncRequest]]:
    """The steps of the device's cycles from now on: what is asked, and what is hinted at."""
    steps: list[tuple[str, SyncRequest]] = []
    send = device.wire.send

    def asking(request: SyncRequest) -> Any:
        steps.append(("ask", request))
        return send(request)

    monkeypatch.setattr(device.wire, "send", asking)
    monkeypatch.setattr(device.wire, "send_ahead", lambda request: steps.append(("ahead", request)))
    return steps


def pushes(steps: list[tuple[str, SyncRequest]]) -> list[tuple[str, list[int]]]:
    """Of each step that pushes, the last bytes of the ids that are written."""
    return [
        (how, [op.entity_id[-1] for t in request.transactions for op in t.operations])
        for how, request in steps
        if isinstance(request, PushRequest)
    ]


def pulls(steps: list[tuple[str, SyncRequest]]) -> list[tuple[str, int, int]]:
    """Of each step that pulls, where it begins and how much it asks for."""
    return [
        (how, request.cursor, request.limit)
        for how, request in steps
        if isinstance(request, PullRequest)
    ]


def told(device: Device) -> list[SyncProgress]:
    """What the device's cycles tell of their progress from now on."""
    heard: list[SyncProgress] = []
    device.engine.on_progress(heard.append)
    return heard


def nth(kind: type, count: int, work: Callable[[], object]) -> Callable[[SyncRequest], None]:
    """A hook of ``Wire`` that does ``work`` at the message number ``count`` of a kind."""
    left = [count]

    def hook(request: SyncRequest) -> None:
        if isinstance(request, kind):
            left[0] -= 1
            if not left[0]:
                work()

    return hook


def synced(**config: Any) -> tuple[World, Device]:
    """A device that has synchronised with a server of one note."""
    world = World()
    world.put(("notes", 100, "old"))
    a = world.device(**config)
    a.sync()
    a.wire.requests.clear()
    return world, a


# ---------------------------------------------------------------- pushing


def test_each_batch_is_hinted_at_while_the_one_before_it_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, a = synced(push_operations_max=1)
    for n in (1, 2, 3, 4):
        a.put(("notes", n, "mine"))
    steps = watched(monkeypatch, a)
    a.sync()
    assert pushes(steps) == [
        ("ahead", [1]),
        ("ahead", [2]),
        ("ask", [1]),
        ("ahead", [3]),
        ("ask", [2]),
        ("ahead", [4]),
        ("ask", [3]),
        ("ask", [4]),
    ]
    assert_in_step(world, a)


def test_the_only_batch_is_sent_without_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    _, a = synced()
    a.put(("notes", 1, "mine"))
    a.put(("notes", 2, "mine"))
    steps = watched(monkeypatch, a)
    a.sync()
    assert pushes(steps) == [("ask", [1, 2])]
    assert [how for how, _ in steps] == ["ask", "ask"]


def test_r6_what_is_under_way_when_a_pull_is_asked_for_is_all_that_is_pushed_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, a = synced(push_operations_max=1)
    for n in range(1, 9):
        a.put(("notes", n, "mine"))
    a.wire.before = nth(PushRequest, 1, lambda: world.put(("notes", 1, "theirs")))
    steps = watched(monkeypatch, a)
    a.sync()
    asked = [request for how, request in steps if how == "ask"]
    before = [type(request) for request in asked[1:]].index(PullRequest)
    # The second had been sent ahead when the first was refused.
    assert pushes([("ask", each) for each in asked[: before + 1]]) == [("ask", [1]), ("ask", [2])]
    assert a.pending == 0
    assert_in_step(world, a)


def test_progress_counts_what_was_pushed_from_nothing_in_every_round() -> None:
    world, a = synced(push_operations_max=1, default_policy="client_wins")
    for n in (1, 100, 2):
        a.put(("notes", n, "mine"))
    a.wire.before = nth(PushRequest, 1, lambda: world.put(("notes", 100, "theirs")))
    heard = told(a)
    a.sync()
    size = OPERATION_OVERHEAD_BYTES + len(cbor.encode("mine"))
    assert [step for step in heard if step.state is PUSHING] == [
        SyncProgress(PUSHING, 1, size, 3),
        SyncProgress(PUSHING, 2, 2 * size, 3),
        SyncProgress(PUSHING, 3, 3 * size, 3),
        SyncProgress(PUSHING, 1, size, 1),
    ]
    assert_in_step(world, a)


def test_progress_counts_batches_that_are_sent_again() -> None:
    _, a = synced(push_operations_max=1)
    for n in (1, 2):
        a.put(("notes", n, "mine"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    heard = told(a)
    a.sync()
    size = OPERATION_OVERHEAD_BYTES + len(cbor.encode("mine"))
    assert [step for step in heard if step.state is PUSHING] == [
        SyncProgress(PUSHING, 1, size, 2),
        SyncProgress(PUSHING, 2, 2 * size, 2),
    ]


# ---------------------------------------------------------------- pulling everything


def test_r20_the_first_page_of_everything_is_small_and_each_is_hinted_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulling, "FIRST_PAGE_OPERATIONS", 3)
    world = World()
    for n in range(12):
        world.put(("notes", n, "old"))
    a = world.device(pull_operations_max=5)
    steps, heard = watched(monkeypatch, a), told(a)
    a.sync()
    assert pulls(steps) == [
        ("ahead", 0, 3),
        ("ask", 0, 3),
        ("ahead", 3, 5),
        ("ask", 3, 5),
        ("ahead", 8, 5),
        ("ask", 8, 5),
    ]
    size = len(cbor.encode("old"))
    assert heard == [
        SyncProgress(PULLING, 3, 3 * size, 12),
        SyncProgress(PULLING, 8, 8 * size, 12),
        SyncProgress(PULLING, 12, 12 * size, 12),
    ]
    assert_in_step(world, a)


def test_r20_a_pull_of_everything_that_goes_on_tells_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulling, "FIRST_PAGE_OPERATIONS", 3)
    world = World()
    for n in range(12):
        world.put(("notes", n, "old"))
    a = world.device(pull_operations_max=5)

    def cut(request: SyncRequest) -> None:
        if isinstance(request, PullRequest) and request.cursor == 3:
            raise TransportError("cut off")

    a.wire.before = cut
    with pytest.raises(TransportError):
        a.sync()
    a.wire.before = lambda request: None
    heard = told(a)
    a.sync()
    size = len(cbor.encode("old"))
    assert heard == [
        SyncProgress(PULLING, 5, 5 * size, 9),
        SyncProgress(PULLING, 9, 9 * size, 9),
    ]
    assert_in_step(world, a)


def test_r20_pages_of_everything_grow_no_faster_than_the_server_makes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulling, "FIRST_PAGE_OPERATIONS", 4)
    world = World()
    for n in range(60):
        world.put(("notes", n, "old"))
    a = world.device(pull_operations_max=20)
    steps = watched(monkeypatch, a)
    a.sync()
    limits = [limit for how, _, limit in pulls(steps) if how == "ask"]
    assert limits == [4, 8, 15, 20, 20]
    assert_in_step(world, a)


def test_r20_the_first_page_is_hinted_at_before_a_new_device_stores_whose_replica_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.put(("notes", 1, "theirs"))
    a = world.device()
    a.put(("notes", 2, "mine"))
    steps, bound = watched(monkeypatch, a), list[bool]()
    hint = a.wire.send_ahead

    def hinting(request: SyncRequest) -> None:
        bound.append(a.engine.applier.state().history is not None)
        hint(request)

    monkeypatch.setattr(a.wire, "send_ahead", hinting)
    a.sync()
    (hinted,) = [request for how, request in steps if how == "ahead"]
    assert bound == [False]
    assert hinted == next(request for _, request in steps[2:] if isinstance(request, PullRequest))
    assert_in_step(world, a)


def test_r20_nothing_is_hinted_at_by_a_device_that_knows_its_server_or_may_get_an_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.put(("notes", 1, "theirs"))
    a = world.device()
    a.sync()
    a.restart()
    steps = watched(monkeypatch, a)
    a.sync()
    monkeypatch.setattr(pulling, "may_have_image", lambda exchange: True)
    b = world.device()
    steps += watched(monkeypatch, b)
    b.sync()
    assert steps and all(how == "ask" for how, _ in steps)


def test_r20_what_a_first_sync_replaces_was_empty_and_is_not_swept() -> None:
    world = World()
    world.put(("notes", 1, "theirs"))
    a = world.device()
    a.engine._attempts.tidy_steps = 0
    a.put(("lists", 2, "mine"))
    a.sync()
    with a.db.view() as view:
        names = {view.catalogue.by_number[number].name for _, number in view.catalogue.garbage}
    assert names <= {"lists"}, "notes had no table with anything in it"
    a.engine.reset("server")
    a.sync()
    with a.db.view() as view:
        left = [number for _, number in view.catalogue.garbage]
        assert view.catalogue.by_name["notes"].number in left, "here there was something"
    assert_in_step(world, a)


def test_r20_a_first_sync_that_goes_on_asks_for_whole_pages_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulling, "FIRST_PAGE_OPERATIONS", 3)
    world = World()
    for n in range(12):
        world.put(("notes", n, "old"))
    a = world.device(pull_operations_max=5)
    a.wire.after = nth(PullRequest, 2, a.engine.cancel)
    with pytest.raises(SyncCancelledError):
        a.sync()
    steps = watched(monkeypatch, a)
    a.sync()
    assert pulls(steps)[0] == ("ask", 3, 5)
    assert_in_step(world, a)


@pytest.mark.parametrize("speaks", [True, False])
def test_everything_is_asked_for_in_columns_where_the_server_speaks_of_them(speaks: bool) -> None:
    world = World()
    world.put(("notes", 1, "old"))
    if not speaks:
        world.service.features.remove("columns")
    a = world.device()
    a.sync()
    assert [pull.columns for pull in a.wire.pulls()] == [speaks]
    assert_in_step(world, a)


# ---------------------------------------------------------------- pulling changes


def test_r20_each_page_of_changes_is_hinted_at_and_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, a = synced(pull_operations_max=2)
    for n in range(5):
        world.put(("notes", n, "new"))
    steps, heard = watched(monkeypatch, a), told(a)
    a.sync()
    assert pulls(steps) == [
        ("ask", 1, 2),
        ("ahead", 3, 2),
        ("ask", 3, 2),
        ("ahead", 5, 2),
        ("ask", 5, 2),
    ]
    size = len(cbor.encode("new"))
    assert heard == [
        SyncProgress(PULLING, 2, 2 * size, None),
        SyncProgress(PULLING, 4, 4 * size, None),
        SyncProgress(PULLING, 5, 5 * size, 5),
    ]
    assert_in_step(world, a)


@pytest.mark.parametrize("first", [True, False], ids=["everything", "changes"])
def test_a_single_page_is_told_of_and_counted(first: bool) -> None:
    world = World()
    a = world.device()
    if not first:
        a.sync()
    world.put(("notes", 1, "new"), ("notes", 2, "newer"))
    heard = told(a)
    result = a.sync()
    size = len(cbor.encode("new")) + len(cbor.encode("newer"))
    assert heard == [SyncProgress(PULLING, 2, size, 2)]
    assert (result.bytes_pulled, result.pulled) == (size, 2)


def test_r22_changes_on_a_page_that_does_not_move_the_cursor_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, a = synced()
    answer = world.answer

    def lying(request: SyncRequest, *rest: Any) -> Any:
        response = answer(request, *rest)
        if not isinstance(response, PullResponse):
            return response
        write = PullOperation(0, uid(1).bytes, cbor.encode("x"))
        commit = PullCommit(response.cursor, bytes(16), 0, [write])
        return replace(response, collections=["notes"], commits=[commit])

    monkeypatch.setattr(world, "answer", lying)
    with pytest.raises(ProtocolError):
        a.sync()
    assert 1 not in a.values()


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("first", [True, False], ids=["everything", "changes"])
def test_r7_a_pull_ends_after_so_many_pages_and_goes_on_in_the_next_cycle(
    monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    monkeypatch.setattr(pulling, "PAGES_MAX", 2)
    world = World()
    a = world.device(pull_operations_max=2)
    if not first:
        world.put(("notes", 100, "old"))
        a.sync()
        a.wire.requests.clear()
    for n in range(7):
        world.put(("notes", n, "new"))
    with pytest.raises(ServerError):
        a.sync()
    assert len(a.wire.pulls()) == 2
    a.sync()
    assert len(a.wire.pulls()) == 4
    assert_in_step(world, a)


@pytest.mark.parametrize(
    ("first", "pages", "which"),
    [(True, 3, 1), (True, 3, 3), (False, 3, 1), (False, 3, 3), (False, 1, 1), (True, 1, 1)],
)
def test_r9_an_answer_that_comes_after_cancelling_is_not_stored(
    first: bool, pages: int, which: int
) -> None:
    world = World()
    a = world.device(pull_operations_max=2)
    if not first:
        world.put(("notes", 100, "old"))
        a.sync()
    for n in range(2 * pages):
        world.put(("notes", n, "new"))
    commits: list[int] = []

    def cancel() -> None:
        a.engine.cancel()
        commits.append(a.storage.commits)

    a.wire.after = nth(PullRequest, which, cancel)
    with pytest.raises(SyncCancelledError):
        a.sync()
    assert commits == [a.storage.commits]
    a.sync()
    assert_in_step(world, a)


def test_a_first_sync_in_pages_tells_how_much_there_is_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulling, "FIRST_PAGE_OPERATIONS", 3)
    world = World()
    for number in range(20):
        world.put(("notes", number, number), ("tags", number, number))
    world.put(("notes", 0, None))
    device = world.device()
    heard = told(device)
    device.sync()
    assert len(heard) > 3
    assert [each.operations for each in heard] == sorted(each.operations for each in heard)
    assert {each.operations_total for each in heard[:-1]} == {39}
    assert heard[-1].operations_total == heard[-1].operations >= 39
    heard.clear()
    world.put(("notes", 1, 2))
    device.sync()
    assert [each.operations_total for each in heard] == [1]


def test_a_first_sync_that_goes_on_tells_what_is_left_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulling, "FIRST_PAGE_OPERATIONS", 3)
    world = World()
    for number in range(20):
        world.put(("notes", number, number))
    device = world.device()
    heard = told(device)

    def cut() -> None:
        raise TransportError("cut")

    device.wire.before = nth(PullRequest, 3, cut)
    with pytest.raises(TransportError):
        device.sync()
    before = heard[-1].operations
    heard.clear()
    device.wire.before = lambda request: None
    device.restart()
    heard = told(device)
    device.sync()
    assert before and heard[0].operations_total == 20 - before
    assert heard[-1].operations_total == heard[-1].operations == 20 - before


def test_a_server_that_does_not_say_how_much_there_is_leaves_it_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those before 0.8."""
    monkeypatch.setattr(pulling, "FIRST_PAGE_OPERATIONS", 3)
    monkeypatch.setattr(service, "live_entities", lambda view, wanted: None)
    world = World()
    for number in range(9):
        world.put(("notes", number, number))
    device = world.device()
    heard = told(device)
    device.sync()
    assert {each.operations_total for each in heard[:-1]} == {None}
    assert heard[-1].operations_total == 9

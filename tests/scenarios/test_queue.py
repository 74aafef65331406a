"""What waits to be pushed: in order, beside others, around a poisoned one, and after a cancel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.errors import SyncCancelledError, TransportError
from entidb.protocol import LIMITS, PullRequest, SyncRequest
from entidb.server.hooks import Grant, Refusal
from entidb.storage.base import Batch
from entidb.sync import RetryConfig, SyncState
from tests.hostile.support import accepted
from tests.support import Crash, Device, World, assert_in_step, assert_sound, lose

# ---------------------------------------------------------------- cursor and rows


class Witness:
    """Looks at what a crash would leave after every storage commit of a device: the rows must be
    the server's state at the cursor that is stored with them."""

    def __init__(self, world: World, device: Device) -> None:
        self.world, self.device = world, device
        self.states: dict[int, dict[int, Any]] = {0: {}}
        self.cursors: list[int] = []
        self._commit = device.storage.commit
        device.storage.commit = self.commit  # type: ignore[method-assign]

    def note(self) -> None:
        self.states[self.world.server.sequence] = self.world.values()

    def commit(self, batch: Batch, after: int | None = None) -> int:
        mark = self._commit(batch, after)
        left = self.device.copy()
        self.cursors.append(left.state.cursor)
        assert left.values() == self.states[left.state.cursor]
        return mark


@pytest.mark.parametrize("page", [1, 3, 5000])
def test_no_commit_ever_holds_a_cursor_without_its_rows_or_rows_without_their_cursor(page: int):
    world = World()
    a = world.device(pull_operations_max=page)
    witness = Witness(world, a)
    for turn in range(4):
        for n in range(7):
            world.put(("notes", n, f"turn {turn}"), ("notes", 10 + n + turn, turn))
            world.put(("notes", n, None if (n + turn) % 3 else "again"))
        witness.note()
        a.sync()
    assert witness.cursors[-1] == world.server.sequence
    assert witness.cursors == sorted(witness.cursors)
    assert len(witness.cursors) >= 4
    assert_in_step(world, a)


# ---------------------------------------------------------------- two devices


def test_two_devices_that_write_different_entities_never_conflict():
    world = World()
    a, b = world.device(), world.device()
    for turn in range(10):
        for device, first in ((a, 0), (b, 100)):
            device.put(*[("notes", first + n, [turn, n]) for n in range(turn + 1)])
            if turn > 3:
                device.put(("notes", first + turn - 3, None), ("other", first + turn, turn))
            result = device.sync()
            assert (result.conflicts, result.unresolved, result.withdrawn) == ([], [], [])
            assert (result.rounds, device.pending) == (1, 0)
    for device in (a, b):
        assert device.sync().conflicts == []
        assert device.engine.discarded() == []
    assert_in_step(world, a, b)


def test_two_devices_that_push_between_each_others_pull_and_push_do_not_conflict_either():
    world = World()
    a, b = world.device(), world.device()
    a.put(("notes", 1, "a"))
    b.put(("notes", 2, "b"))

    def between(request: SyncRequest) -> None:
        if request is a.wire.requests[-1] and not isinstance(request, PullRequest):
            a.wire.before = lambda request: None
            b.sync()

    a.sync()
    a.put(("notes", 1, "a again"))
    a.wire.before = between
    assert a.sync().conflicts == []
    for device in (a, b):
        assert device.sync().conflicts == []
    assert world.values() == {1: "a again", 2: "b"}
    assert_in_step(world, a, b)


# ---------------------------------------------------------------- poison


def refusing(context: Any, transaction: Any) -> Refusal | None:
    if any(operation.value == "poison" for operation in transaction.operations):
        return Refusal("not_allowed", "never")
    return None


def raising(context: Any, transaction: Any) -> None:
    assert all(operation.value != "poison" for operation in transaction.operations)


POISON: dict[str, tuple[str, dict[str, Any], Any, Grant | None]] = {
    "refused by the hook": ("not_allowed", {"validate": refusing}, "poison", None),
    "breaks the hook": ("validate_failed", {"validate": raising}, "poison", None),
    "too large": (
        "too_large",
        {"limits": replace(LIMITS, transaction_bytes_max=1000)},
        "x" * 2000,
        None,
    ),
    "not granted": (
        "forbidden",
        {},
        "poison",
        Grant("tester", True, True, frozenset({"notes", "free"})),
    ),
}


@pytest.mark.parametrize("batch", [1, 5000])
@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_transaction_in_the_middle_of_the_queue_stops_no_other(kind: str, batch: int):
    code, settings, value, grant = POISON[kind]
    world = World(**settings)
    a, b = world.device(push_operations_max=batch), world.device()
    if grant is not None:
        a.wire.grant = grant
    a.put(("notes", 1, "before"))
    a.put(("notes", 2, "before, and poisoned later"))
    poisoned = a.put(("notes", 2, value), ("secret", 3, value))
    built_on = a.put(("notes", 2, "on top of it"), ("notes", 4, "with it"))
    a.put(("notes", 5, "after"))
    a.put(("free", 6, "after"))
    a.settle()
    assert world.values() == {1: "before", 2: "before, and poisoned later", 5: "after"}
    assert world.values("free") == {6: "after"}
    gone = {g.id: g.code for g in a.engine.discarded()}
    assert gone == {poisoned: code, built_on: "depends"}
    # It is not tried again, and nothing waits behind it.
    assert a.sync().requests == 1
    a.put(("notes", 4, "and on"))
    a.sync()
    b.sync()
    assert_in_step(world, a, b)


# ---------------------------------------------------------------- cancel


def cancel_in(device: Device, state: SyncState) -> Callable[[], None]:
    return device.engine.on_state(lambda old, new: device.engine.cancel() if new is state else None)


# Nothing of a cycle runs while another process has the engine.
@pytest.mark.parametrize("state", [s for s in SyncState if s is not SyncState.STANDBY])
def test_after_a_cancel_in_any_state_the_next_sync_does_everything(state: SyncState):
    world = World()
    world.put(*[("notes", n, "theirs") for n in range(10, 30)])
    a, b = world.device(pull_operations_max=5, push_operations_max=2), world.device()
    ids = {a.put(("notes", n, "mine"), ("other", n, "mine")).bytes for n in range(3)}
    if state is SyncState.IDLE:
        a.engine.cancel()
    elif state is SyncState.ERROR:
        a.wire.before = lose(PullRequest)
        with pytest.raises(TransportError):
            a.sync()
        a.engine.cancel()
    elif state is SyncState.SYNCED:
        stop = cancel_in(a, state)
        a.sync()  # too late to undo anything
        stop()
        ids |= {a.put(("notes", 7, "mine")).bytes}
    else:
        if state is SyncState.RETRY_WAIT:
            a.restart(retry=RetryConfig(attempts_max=3))
            a.wire.before = lose(PullRequest)
        stop = cancel_in(a, state)
        with pytest.raises(SyncCancelledError):
            a.sync()
        stop()
        assert a.engine.state is SyncState.IDLE
    a.sync()
    assert a.engine.state is SyncState.SYNCED
    assert a.pending == 0
    assert accepted(world.server) == ids
    b.sync()
    assert_in_step(world, a, b)


# ---------------------------------------------------------------- a filter


@pytest.mark.parametrize("page", [1, 2, 5000])
def test_a_filter_that_leaves_out_the_tail_still_comes_to_rest(page: int):
    world = World()
    a = world.device(collections=("notes",), pull_operations_max=page)
    for turn in range(3):
        world.put(("notes", turn, "in"), ("other", turn, "out"))
        world.put(*[("other", 10 * turn + n, "out") for n in range(5)])
        a.sync()
        assert a.state.cursor == world.server.sequence
        assert a.values() == world.values()
        commits = a.storage.commits
        for _ in range(3):
            result = a.sync()
            assert (result.requests, result.pulled, a.storage.commits) == (1, 0, commits)
    assert a.db.collections() == ["notes"]
    assert_sound(a.db, world.server)


# ---------------------------------------------------------------- a first sync that is killed


def test_a_first_sync_that_is_killed_again_and_again_keeps_a_page_of_each_life():
    world = World()
    for n in range(20):
        world.put(("notes", n, "theirs"))
    a = world.device(pull_operations_max=3)
    lives = 0
    while True:
        lives += 1
        assert a.values() == {}

        def die(request: SyncRequest, a: Device = a) -> None:
            if len(a.wire.pulls()) == 2:
                raise Crash

        a.wire.after = die
        try:
            a.sync()
        except Crash:
            a.restart()
            world.put(("notes", lives, "changed meanwhile"))
        else:
            break
        assert lives < 20
    assert lives > 5
    a.wire.after = lambda request: None
    a.sync()
    assert_in_step(world, a)

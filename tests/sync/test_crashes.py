"""Dying at every step of a cycle, on either side, and losing every message: the end is the same.

Each scenario is built again for every step, dies there once, is started again from what is on
disk, and must come to the same end as the run in which nothing happened (R5, R9, R12, R16, R17).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from entidb.db import dump, purge_tombstones
from entidb.errors import StorageError, TransportError
from entidb.protocol import SyncRequest, SyncResponse
from entidb.server.hooks import Grant
from entidb.sync import Conflict, ConflictResolution
from tests.support import Crash, Device, World, assert_in_step, assert_sound

STEPS_MAX = 200


def policy(conflict: Conflict) -> ConflictResolution:
    """All four answers, by the value the device wrote."""
    local = conflict.local
    if local is None or local.get("take") == "theirs":
        return ConflictResolution.accept_remote()
    if local.get("take") == "skip":
        return ConflictResolution.skip()
    if local.get("take") == "merge":
        return ConflictResolution.merge(conflict.remote | local if conflict.remote else local)
    return ConflictResolution.keep_local()


def work(a: Device) -> None:
    """Local transactions that meet every outcome."""
    a.put(("notes", 1, {"take": "mine"}), ("other", 1, {"a": 1}))
    a.put(("notes", 1, {"take": "mine", "n": 2}))
    a.put(("notes", 2, {"take": "theirs"}), ("other", 2, {"a": 1}))
    a.put(("other", 2, {"a": 2}), ("other", 3, {"a": 2}))
    a.put(("notes", 3, {"take": "merge", "x": 1}))
    a.put(("notes", 3, {"take": "merge", "x": 1, "y": 2}))
    a.put(("notes", 4, {"take": "skip"}), ("other", 4, {"a": 1}))
    a.put(("other", 4, {"a": 2}))
    if 5 in a.values():
        a.put(("notes", 5, None))
    a.put(("notes", 6, {"same": True}))
    a.put(("bad", 7, {"a": 1}))
    a.put(("bad", 7, {"a": 2}), ("other", 8, {"a": 3}))
    a.put(("other", 9, {"a": 4}))


def rivals(world: World) -> None:
    for n in range(1, 5):
        world.put(("notes", n, {"theirs": n}))
    world.put(("notes", 6, {"same": True}), ("notes", 20, {"new": 1}))


def base(**config: Any) -> tuple[World, Device]:
    from entidb.server.hooks import Refusal

    world = World(
        validate=lambda context, transaction: (
            Refusal("not_allowed", "no")
            if any(op.collection == "bad" for op in transaction.operations)
            else None
        )
    )
    for n in range(1, 13):
        world.put(("notes", n, {"n": 0}))
    settings: dict[str, Any] = {"default_policy": policy, "push_operations_max": 3} | config
    return world, world.device(**settings)


def one_page() -> tuple[World, Device]:
    world, a = base()
    a.sync()
    work(a)
    rivals(world)
    return world, a


def many_pages() -> tuple[World, Device]:
    world, a = base(pull_operations_max=2)
    a.sync()
    work(a)
    rivals(world)
    world.put(("notes", 10, None), ("notes", 11, {"n": 1}))
    return world, a


def first_sync() -> tuple[World, Device]:
    world, a = base(pull_operations_max=3)
    work(a)
    rivals(world)
    return world, a


def below_the_floor() -> tuple[World, Device]:
    world, a = many_pages()
    world.put(("notes", 9, None))
    purge_tombstones(world.server, world.server.sequence)
    world.put(("notes", 12, {"after": "the floor"}))
    return world, a


def kept_device() -> tuple[World, Device]:
    world, a = base(pull_operations_max=4)
    a.sync()
    backup = world.backup_server()
    a.put(("notes", 7, {"lost": 1}), ("notes", 8, {"lost": 1}))
    a.put(("notes", 9, None))
    a.put(("third", 1, {"lost": 1}))
    a.settle()
    a.sync()
    work(a)
    world.open_server(backup)
    rivals(world)
    a.engine.reset("device")
    return world, a


def wider() -> tuple[World, Device]:
    world, a = base(pull_operations_max=3)
    a.sync()
    a.db.set_scope(["notes", "other", "bad"])
    a.put(("tasks", 1, {"take": "mine"}), ("tasks", 2, {"a": 1}))
    a.put(("tasks", 3, {"take": "theirs"}))
    world.put(("tasks", 1, {"theirs": 1}), ("tasks", 3, {"theirs": 1}))
    world.put(("tasks", 4, {"theirs": 1}))
    work(a)
    rivals(world)
    a.db.set_scope(None)
    return world, a


SCENARIOS = [one_page, many_pages, first_sync, below_the_floor, kept_device, wider]
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
Scenario = Callable[[], tuple[World, Device]]


def end_of(world: World, a: Device) -> dict[str, Any]:
    """Go on until nothing moves, check everything, and say what there is."""
    a.settle()
    a.sync()
    assert a.sync().requests == 1
    b = world.device()
    b.sync()
    assert_in_step(world, b)
    held = {entity for conflict in a.engine.conflicts() for entity in [conflict.entity_id.int]}
    assert held == {4}
    assert_sound(a.db)
    return {
        "server": [(name, i, payload) for name, i, _, payload in dump(world.server)],
        "device": [(name, i, payload) for name, i, _, payload in dump(a.db)],
        "discarded": sorted(
            (gone.code, [[n, i, p] for n, i, p in gone.operations]) for gone in a.engine.discarded()
        ),
        "conflicts": [(c.entity_id, c.base, c.local, c.remote) for c in a.engine.conflicts()],
        "held": a.engine.status().held,
        "sequences": world.server.sequence,
    }


@each_scenario
def test_the_scenarios_meet_every_outcome(scenario: Scenario) -> None:
    world, a = scenario()
    end = end_of(world, a)
    assert end["held"] == 2
    assert {code for code, _ in end["discarded"]} == {"conflict", "depends", "not_allowed"}


@each_scenario
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_r9_dying_around_any_commit_of_the_device_changes_nothing(
    scenario: Scenario, after: bool
) -> None:
    expected = end_of(*scenario())
    for step in range(1, STEPS_MAX):
        world, a = scenario()
        a.storage.fail(step, after=after)
        try:
            a.settle()
        except Crash:
            a.restart()
        else:
            break
        assert_sound(a.db)
        assert end_of(world, a) == expected, f"commit {step}"
    assert step > 4


@each_scenario
def test_r9_dying_around_any_two_commits_of_the_device_changes_nothing(scenario: Scenario) -> None:
    expected = end_of(*scenario())
    for step in range(1, STEPS_MAX):
        world, a = scenario()
        crashes = 0
        for again in (step, 2):
            a.storage.fail(again, after=bool(step % 2))
            try:
                a.settle()
            except Crash:
                crashes += 1
                a.restart()
        if not crashes:
            break
        assert end_of(world, a) == expected, f"commit {step}"


@each_scenario
@pytest.mark.parametrize("delivered", [False, True], ids=["request lost", "answer lost"])
def test_r5_losing_any_message_changes_nothing(scenario: Scenario, delivered: bool) -> None:
    expected = end_of(*scenario())
    for step in range(1, STEPS_MAX):
        world, a = scenario()
        a.wire.requests.clear()

        def lose(request: SyncRequest, a: Device = a, step: int = step) -> None:
            if len(a.wire.requests) == step:
                raise TransportError("lost")

        if delivered:
            a.wire.after = lose
        else:
            a.wire.before = lose
        try:
            a.settle()
        except TransportError:
            a.wire.before = a.wire.after = lambda request: None
        if len(a.wire.requests) < step:
            break
        assert end_of(world, a) == expected, f"message {step}"
    assert step > 3


@each_scenario
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_r16_the_server_dying_around_any_commit_changes_nothing(
    scenario: Scenario, after: bool
) -> None:
    expected = end_of(*scenario())
    for step in range(1, STEPS_MAX):
        world, a = scenario()
        world.server_storage.fail(step, after=after)
        decide = world.answer
        died: list[int] = []

        def answer(
            request: SyncRequest,
            grant: Grant,
            world: World = world,
            decide: Any = decide,
            died: list[int] = died,
        ) -> SyncResponse:
            try:
                response: SyncResponse = decide(request, grant)
            except Crash:
                died.append(1)
                world.restart_server()
                raise TransportError("the server died") from None
            return response

        world.answer = answer  # type: ignore[method-assign]
        try:
            a.settle()
        except TransportError:
            assert_sound(world.server)
        if not died:
            break
        assert end_of(world, a) == expected, f"commit {step}"
    assert step > 2


def test_r17_after_a_storage_error_nothing_is_answered_from_memory() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    for _ in range(3):
        a.sync()
    pull = a.wire.pulls()[-1]
    assert world.service.idle_pull(pull, a.wire.grant) is not None
    a.put(("notes", 2, "x"))
    world.server_storage.fail_next(error=StorageError("disk"))
    with pytest.raises(StorageError):
        a.sync()
    assert world.service.idle_pull(pull, a.wire.grant) is None
    assert world.service.pull(pull, a.wire.grant).head == 1
    a.settle()
    assert_in_step(world, a)


def test_r17_a_device_reads_again_after_a_failed_commit() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.storage.fail_next(error=StorageError("disk"))
    with pytest.raises(StorageError):
        a.put(("notes", 1, "y"))
    a.storage.fail_next(error=StorageError("disk"))
    with pytest.raises(StorageError):
        a.sync()
    a.settle()
    assert world.values() == {1: "x"}
    assert_in_step(world, a)

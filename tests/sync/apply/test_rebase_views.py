"""What readers, observers and counters see of a rebase, and a rebase on another history."""

from __future__ import annotations

from typing import Any

import pytest

from entidb.protocol import PushRequest
from entidb.storage import MemoryStorage
from entidb.sync import Conflict, ConflictResolution
from tests.support import Device, World, assert_in_step, lose

KEEP = ConflictResolution.keep_local()
THEIRS = ConflictResolution.accept_remote()


def start(policy: Any = "server_wins", **config: Any) -> tuple[World, Device]:
    """A device that has notes 1, 2, 3 as the server has them."""
    world = World()
    for n in (1, 2, 3):
        world.put(("notes", n, 0))
    a = world.device(default_policy=policy, **config)
    a.sync()
    return world, a


def told(device: Device, after: int) -> list[tuple[str, int, Any, str]]:
    """The change feed behind ``after``: kind, id, value, origin."""
    codec = device.notes._codec
    return [
        (
            event.kind,
            0 if event.entity_id is None else event.entity_id.int,
            None if event.payload is None else codec.decode(event.payload),
            event.origin,
        )
        for event in device.db.changes(after)
    ]


# ---------------------------------------------------------------- the change feed


def test_what_a_pull_changes_is_told_as_remote_and_later_than_all_before() -> None:
    world, a = start()
    before = a.db.sequence
    world.put(("notes", 1, 1))
    world.put(("notes", 2, None))
    world.put(("notes", 4, 4))
    a.sync()
    assert a.db.sequence == before + 1
    assert told(a, before) == [
        ("put", 1, 1, "remote"),
        ("delete", 2, None, "remote"),
        ("put", 4, 4, "remote"),
    ]


def test_bytes_that_are_the_same_in_a_newer_version_are_no_change_to_readers() -> None:
    world, a = start()
    before = a.db.sequence
    version = world.put(("notes", 1, 0))
    result = a.sync()
    assert (result.pulled, told(a, before), a.db.sequence) == (1, [], before)
    # But the version is known: a change made on it is no conflict.
    a.put(("notes", 1, "mine"))
    assert a.sync().conflicts == []
    [push] = a.wire.pushes()
    assert push.transactions[0].operations[0].base_version == version


def test_the_deletion_of_what_was_never_here_leaves_no_trace() -> None:
    world, a = start()
    before, records = a.db.sequence, a.db.storage.info().records
    world.put(("notes", 9, 9))
    world.put(("notes", 9, None))
    assert a.sync().pulled == 1
    assert (told(a, before), a.db.sequence) == ([], before)
    assert a.db.storage.info().records == records
    assert_in_step(world, a)


def test_a_withdrawal_is_told_as_a_remote_change() -> None:
    world, a = start()
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    world.put(("notes", 1, "theirs"))
    before = a.db.sequence
    a.sync()
    assert told(a, before) == [("put", 1, "theirs", "remote"), ("put", 2, 0, "remote")]
    assert_in_step(world, a)


def test_what_is_accepted_is_not_told_again_and_stays_local() -> None:
    world, a = start(push_operations_max=1)
    before = a.db.sequence
    a.put(("notes", 1, "mine"))
    a.put(("notes", 1, "mine, later"))
    a.put(("notes", 1, "mine, last"))
    written = a.db.sequence
    a.sync()
    assert a.db.sequence == written
    assert told(a, before) == [("put", 1, "mine, last", "local")]
    assert_in_step(world, a)


def test_a_withdrawal_down_to_what_this_device_pushed_is_told_as_local() -> None:
    def validate(context: Any, transaction: Any) -> Any:
        from entidb.server.hooks import Refusal

        refused = any(op.value == "bad" for op in transaction.operations)
        return Refusal("bad", "no") if refused else None

    world = World(validate=validate)
    a = world.device()
    a.put(("notes", 1, "good"))
    a.put(("notes", 1, "bad"))
    before = a.db.sequence
    a.sync()
    assert told(a, before) == [("put", 1, "good", "local")]
    assert_in_step(world, a)


def test_what_the_server_had_already_is_not_told_again() -> None:
    world, a = start()
    a.put(("notes", 1, "same"))
    world.put(("notes", 1, "same"))
    before = a.db.sequence
    a.sync()
    assert (told(a, before), a.db.sequence) == ([], before)
    assert_in_step(world, a)


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("answer", [KEEP, THEIRS], ids=["keep_local", "accept_remote"])
def test_a_pulled_change_counts_once_whether_or_not_it_is_a_conflict(
    answer: ConflictResolution,
) -> None:
    world, a = start(lambda conflict: answer)
    world.put(("notes", 1, "theirs"), ("notes", 2, "theirs"), ("notes", 3, "theirs"))
    a.put(("notes", 1, "mine"))
    result = a.sync()
    assert (result.pulled, len(result.conflicts)) == (3, 1)


# ---------------------------------------------------------------- another history (R29)


def restored(policy: Any, **config: Any) -> tuple[World, Device]:
    """The device saw notes 1 and 2 change on the server, which then was put back to before."""
    world, a = start(policy, **config)
    backup = world.backup_server()
    world.put(("notes", 1, "lost"))
    world.put(("notes", 2, "lost"))
    a.sync()
    world.open_server(backup)
    return world, a


def noting(answer: ConflictResolution) -> tuple[list[Conflict], Any]:
    conflicts: list[Conflict] = []

    def policy(conflict: Conflict) -> ConflictResolution:
        conflicts.append(conflict)
        return answer

    return conflicts, policy


def test_r29_what_is_older_in_the_other_history_is_a_conflict_with_what_is_pending() -> None:
    conflicts, policy = noting(THEIRS)
    world, a = restored(policy)
    a.put(("notes", 1, "mine"))
    a.engine.reset("server")
    a.sync()
    assert [(c.base, c.local, c.remote) for c in conflicts] == [("lost", "mine", 0)]
    assert a.values() == {1: 0, 2: 0, 3: 0}
    assert_in_step(world, a)


def test_r29_a_withdrawn_transaction_gives_all_its_entities_to_the_other_history() -> None:
    conflicts, policy = noting(THEIRS)
    world, a = restored(policy)
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    a.engine.reset("server")
    a.sync()
    assert (len(conflicts), len(a.engine.discarded())) == (1, 1)
    assert a.values() == {1: 0, 2: 0, 3: 0}
    assert_in_step(world, a)


def test_r29_what_is_the_same_in_the_other_history_is_no_conflict() -> None:
    conflicts, policy = noting(THEIRS)
    world, a = restored(policy)
    a.put(("notes", 3, "mine"))
    a.engine.reset("server")
    a.settle()
    assert (conflicts, world.values()[3]) == ([], "mine")
    assert_in_step(world, a)


def test_r29_keeping_the_device_asks_nobody_about_what_the_server_lost() -> None:
    conflicts, policy = noting(THEIRS)
    world, a = restored(policy)
    a.put(("notes", 1, "mine"))
    a.engine.reset("device")
    a.settle()
    assert (conflicts, a.engine.discarded()) == ([], [])
    assert world.values() == {1: "mine", 2: "lost", 3: 0}
    assert_in_step(world, a)


# ---------------------------------------------------------------- copies of a device (R30)


def test_r18_what_was_accepted_below_the_cursor_leaves_the_base_as_it_is() -> None:
    world, a = start("client_wins")
    copy = a.copy()
    for device in (a, copy):
        device.seed = 77
        device.restart()
    made = a.put(("notes", 1, "mine"))
    assert isinstance(a.storage.inner, MemoryStorage)
    copy = a.copy()
    copy.sync()
    world.put(("notes", 1, "theirs"))
    # The policy keeps what is pending; the server says it was accepted long ago.
    result = a.sync()
    assert (len(result.conflicts), result.pushed) == (1, 1)
    assert made.bytes not in result.done
    assert a.values()[1] == world.values()[1] == "theirs"
    assert_in_step(world, a)


def test_r18_an_answer_that_was_lost_settles_a_chain_below_newer_work() -> None:
    world, a = start()
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"))
    a.wire.after = lose(PushRequest)
    with pytest.raises(Exception, match="lost"):
        a.sync()
    a.put(("notes", 1, "third"))
    assert a.sync().conflicts == []
    assert world.values()[1] == "third"
    assert_in_step(world, a)

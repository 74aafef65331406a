"""What one cycle does and in which order: R1 to R10."""

from __future__ import annotations

import pytest

from entidb import protocol
from entidb.db.outbox import scan_ready
from entidb.errors import (
    ConfigError,
    DatabaseLockedError,
    ServerBusyError,
    SyncCancelledError,
    SyncError,
    TransportError,
)
from entidb.protocol import HandshakeRequest, PullRequest, PushRequest, SyncRequest
from entidb.sync import ConflictResolution, RetryConfig, SyncConfig, SyncEngine, SyncState
from tests.support import Crash, Device, Wire, World, assert_in_step, assert_sound, lose, uid


def kinds(device: Device) -> list[str]:
    return [type(request).__name__.removesuffix("Request") for request in device.wire.requests]


# ---------------------------------------------------------------- R1, R2, R3


def test_r1_a_local_transaction_is_one_storage_commit_without_a_request() -> None:
    a = World().device()
    before = a.storage.commits
    a.put(("notes", 1, "x"), ("notes", 2, "y"), ("other", 3, "z"))
    assert a.storage.commits == before + 1
    assert a.wire.requests == []
    assert a.pending == 1


def test_r1_what_commit_returned_is_there_after_a_restart() -> None:
    a = World().device()
    a.put(("notes", 1, "x"))
    a.restart()
    assert a.values() == {1: "x"}
    assert a.pending == 1


def test_r1_a_commit_that_fails_leaves_nothing() -> None:
    a = World().device()
    a.put(("notes", 1, "x"))
    a.storage.fail_next()
    with pytest.raises(Crash):
        a.put(("notes", 1, "y"), ("notes", 2, "y"))
    assert a.values() == {1: "x"}
    assert a.pending == 1
    assert_sound(a.db)


def test_r2_the_view_is_the_server_state_and_the_own_transactions_in_order() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "server"), ("notes", 2, "server"))
    a.sync()
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"), ("notes", 3, "new"))
    a.put(("notes", 2, None))
    assert a.values() == {1: "second", 3: "new"}


def test_r3_a_transaction_keeps_its_id_and_arrives_whole() -> None:
    world = World()
    a, b = world.device(), world.device()
    made = a.put(("notes", 1, "x"), ("other", 2, "y"))
    a.sync()
    [push] = a.wire.pushes()
    assert [t.transaction_id for t in push.transactions] == [made.bytes]
    b.sync()
    changes = [event for event in b.db.changes() if event.kind == "put"]
    assert {event.sequence for event in changes} == {changes[0].sequence}
    assert_in_step(world, a, b)


# ---------------------------------------------------------------- R4


def test_r4_what_a_policy_withdraws_is_listed_with_reason_values_and_winner() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "old"))
    a.sync()
    world.put(("notes", 1, "theirs"))
    made = a.put(("notes", 1, "mine"), ("other", 2, "with it"))
    result = a.sync()
    [gone] = a.engine.discarded()
    assert [w.transaction_id for w in result.withdrawn] == [made.bytes]
    assert gone.id == made
    assert gone.code == "conflict"
    assert gone.values() == [("notes", uid(1), "mine"), ("other", uid(2), "with it")]
    [[name, entity_id, version, _, _, payload]] = gone.lost_to
    assert (name, entity_id, version) == ("notes", uid(1).bytes, 2)
    assert payload == a.db.collection("notes")._codec.encode("theirs")
    assert a.values("other") == {}


def test_r4_a_withdrawn_transaction_can_be_committed_again() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    assert a.engine.recommit(a.engine.discarded()[0]) > 0
    assert a.engine.discarded() == []
    a.sync()
    assert world.values() == {1: "mine"}
    assert_in_step(world, a)


def test_r4_recommitting_twice_is_refused() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    [gone] = a.engine.discarded()
    a.engine.recommit(gone)
    with pytest.raises(SyncError) as caught:
        a.engine.recommit(gone)
    assert caught.value.code == "discarded_gone"
    assert a.pending == 1


def test_r4_pruning_forgets_one_withdrawn_transaction() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "theirs"), ("notes", 2, "theirs"))
    a.put(("notes", 1, "mine"))
    a.put(("notes", 2, "mine"))
    a.sync()
    first, second = a.engine.discarded()
    assert a.engine.prune(first)
    assert not a.engine.prune(first)
    assert a.engine.discarded() == [second]
    assert a.engine.status().discarded == 1
    assert_sound(a.db)


# ---------------------------------------------------------------- R5


def test_r5_what_is_in_flight_is_durable_before_the_first_byte() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))

    def at_server(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            a.restart()
            raise Crash

    a.wire.before = at_server
    with pytest.raises(Crash):
        a.sync()
    (inflight,) = a.engine.applier.inflight()
    assert len(inflight.keys) == 1


@pytest.mark.parametrize("delivered", [True, False])
def test_r5_the_very_same_batch_is_sent_first_after_a_crash(delivered: bool) -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "old"))
    a.sync()
    a.put(("notes", 1, "mine"), ("other", 9, [1, 2]))
    a.put(("notes", 1, "again"))
    hook = lose(PushRequest)
    if delivered:
        a.wire.after = hook
    else:
        a.wire.before = hook
    with pytest.raises(TransportError):
        a.sync()
    lost = protocol.encode(a.wire.requests[-1])
    a.put(("notes", 1, "later"), ("other", 9, "later"), ("notes", 5, "new"))
    world.put(("notes", 7, "from elsewhere"))
    a.restart()
    a.sync()
    assert kinds(a)[:2] == ["Handshake", "Push"]
    assert protocol.encode(a.wire.requests[1]) == lost
    a.settle()
    assert world.values() == {1: "later", 5: "new", 7: "from elsewhere"}
    assert_in_step(world, a)


def test_r5_a_pull_is_refused_while_a_batch_is_in_flight() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    pull = a.wire.pulls()[-1]
    answer = world.service.pull(pull, a.wire.grant)
    with pytest.raises(SyncError, match="in flight"):
        a.engine.applier.apply(pull, answer)


# ---------------------------------------------------------------- R6, R7


def test_r6_a_pull_comes_before_a_new_batch() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.sync()
    assert kinds(a) == ["Handshake", "Pull", "Push"]


def test_r6_after_settling_an_old_batch_a_pull_comes_before_the_next() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    a.put(("notes", 2, "y"))
    a.wire.requests.clear()
    a.sync()
    assert kinds(a) == ["Handshake", "Push", "Pull", "Push"]
    assert_in_step(world, a)


def keep_writing(world: World, number: int = 1) -> object:
    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            world.put(("notes", number, f"server {world.server.sequence}"))

    return hook


def test_r7_conflicts_that_keep_coming_end_the_cycle_as_incomplete() -> None:
    world = World()
    a = world.device(default_policy="client_wins", rounds_max=3)
    a.put(("notes", 1, "mine"))
    a.wire.before = keep_writing(world)  # type: ignore[assignment]
    result = a.sync()
    assert result.incomplete
    assert result.rounds == 3
    assert len(a.wire.pushes()) == 3
    assert a.pending == 1
    a.wire.before = lambda request: None
    assert not a.sync().incomplete
    assert world.values() == {1: "mine"}
    assert_in_step(world, a)


def test_r7_a_conflict_is_pulled_rebased_and_pushed_in_the_same_cycle() -> None:
    world = World()
    a = world.device(default_policy="client_wins")
    world.put(("notes", 1, "old"))
    a.sync()
    a.put(("notes", 1, "mine"))
    once = [True]

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest) and once.pop():
            once.append(False)
            world.put(("notes", 1, "between"))

    a.wire.before = hook
    result = a.sync()
    assert (result.rounds, result.pushed, len(result.conflicts)) == (2, 1, 1)
    assert world.values() == {1: "mine"}
    assert_in_step(world, a)


# ---------------------------------------------------------------- R8


def test_r8_a_commit_during_a_push_is_not_marked_by_its_answer() -> None:
    world = World()
    a, b = world.device(), world.device()
    a.put(("notes", 1, "one"), ("notes", 2, "one"))

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            a.wire.after = lambda request: None
            a.put(("notes", 1, "during"), ("notes", 3, "during"))

    a.wire.after = hook
    a.sync()
    assert a.values() == {1: "during", 2: "one", 3: "during"}
    assert world.values() == {1: "one", 2: "one"}
    assert a.pending == 1
    a.sync()
    b.sync()
    assert_in_step(world, a, b)


def test_r8_a_commit_during_a_pull_is_rebased_not_overwritten() -> None:
    world = World()
    a = world.device(default_policy="client_wins")
    world.put(("notes", 1, "old"))
    a.sync()
    world.put(("notes", 1, "theirs"))

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PullRequest):
            a.wire.after = lambda request: None
            a.put(("notes", 1, "mine"))

    a.wire.after = hook
    result = a.sync()
    assert len(result.conflicts) == 1
    assert a.values() == {1: "mine"}
    a.settle()
    assert_in_step(world, a)


def test_r8_a_cycle_ends_although_somebody_writes_all_the_time() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, 0))
    a.wire.before = lambda request: a.put(("notes", 1, len(a.wire.requests)))
    a.sync()
    assert len(a.wire.requests) <= 4
    a.wire.before = lambda request: None
    a.settle()
    assert_in_step(world, a)


def test_r8_a_delete_of_an_entity_whose_creation_is_in_flight_arrives() -> None:
    world = World()
    a, b = world.device(), world.device()
    a.put(("notes", 1, "short life"))

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            a.wire.after = lambda request: None
            a.put(("notes", 1, None))

    a.wire.after = hook
    a.sync()
    assert (a.values(), world.values()) == ({}, {1: "short life"})
    b.sync()
    a.sync()
    b.sync()
    assert b.values() == {}
    assert_in_step(world, a, b)


# ---------------------------------------------------------------- R9


@pytest.mark.parametrize("state", [SyncState.CONNECTING, SyncState.PULLING, SyncState.PUSHING])
def test_r9_cancelling_in_every_state_leaves_a_state_to_go_on_from(state: SyncState) -> None:
    world = World()
    world.put(*[("notes", n, "server") for n in range(10, 30)])
    a = world.device(pull_operations_max=5)
    a.put(("notes", 1, "mine"))
    stop = a.engine.on_state(lambda old, new: a.engine.cancel() if new is state else None)
    with pytest.raises(SyncCancelledError):
        a.sync()
    assert a.engine.state is SyncState.IDLE
    stop()
    a.sync()
    assert a.engine.status().state is SyncState.SYNCED
    assert a.pending == 0
    assert_in_step(world, a)


def test_r9_cancelling_at_any_request_leaves_a_state_to_go_on_from() -> None:
    requests = 1
    for at in range(1, 100):
        world = World()
        for n in range(10, 30):
            world.put(("notes", n, "server"))
        a = world.device(pull_operations_max=5, push_operations_max=2, default_policy="client_wins")
        for n in range(8, 14):
            a.put(("notes", n, "mine"))
        a.wire.after = lambda request, a=a, at=at: (  # type: ignore[misc]
            a.engine.cancel() if len(a.wire.requests) == at else None
        )
        try:
            a.sync()
        except SyncCancelledError:
            requests = at
            assert a.engine.state is SyncState.IDLE
        else:
            break
        assert_sound(a.db)
        a.settle()
        assert_in_step(world, a)
        assert world.values()[12] == "mine"
    assert requests > 6


def test_r9_cancelling_while_waiting_to_try_again_ends_at_once() -> None:
    a = World().device(retry=RetryConfig(attempts_max=5))
    a.wire.before = lose(HandshakeRequest, times=9)
    a.engine.on_state(lambda old, new: a.engine.cancel() if new is SyncState.RETRY_WAIT else None)
    with pytest.raises(SyncCancelledError):
        a.sync()
    assert a.engine.state is SyncState.IDLE
    assert len(a.wire.requests) == 1


def test_r9_a_listener_that_raises_ends_one_cycle_and_no_more() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))

    def listener(old: SyncState, new: SyncState) -> None:
        if new is SyncState.PUSHING:
            a.wire._connected = False
            raise ValueError("my own bug")

    stop = a.engine.on_state(listener)
    with pytest.raises(ValueError, match="my own bug"):
        a.sync()
    stop()
    a.sync()
    assert_in_step(world, a)


def test_r9_an_error_is_a_state_with_a_way_out() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.wire.before = lose(PullRequest)
    with pytest.raises(TransportError):
        a.sync()
    assert a.engine.state is SyncState.ERROR
    assert a.engine.status().last_error_code == "transport_error"
    a.sync()
    assert a.engine.status().last_error is None
    assert_in_step(world, a)


# ---------------------------------------------------------------- R10


def test_r10_an_idle_cycle_is_one_request_and_no_commit_anywhere() -> None:
    world = World()
    a, b = world.device(), world.device()
    a.put(("notes", 1, "x"))
    a.sync()
    b.sync()
    a.sync()
    commits = (a.storage.commits, b.storage.commits, world.server_storage.commits)
    for _ in range(3):
        for device in (a, b):
            result = device.sync()
            assert (result.requests, result.changed) == (1, False)
            assert isinstance(device.wire.requests[-1], PullRequest)
    assert (a.storage.commits, b.storage.commits, world.server_storage.commits) == commits


def test_r10_an_idle_cycle_of_an_empty_database_is_one_request_and_no_commit() -> None:
    world = World()
    a = world.device()
    a.sync()
    commits = a.storage.commits
    assert a.sync().requests == 1
    assert a.storage.commits == commits


def test_r10_the_handshake_comes_again_after_a_connection_was_lost() -> None:
    world = World()
    a = world.device()
    a.sync()
    a.wire.before = lose(PullRequest)
    with pytest.raises(TransportError):
        a.sync()
    a.wire.requests.clear()
    a.sync()
    assert kinds(a) == ["Handshake", "Pull"]


# ---------------------------------------------------------------- retries, results, the engine


def test_a_passing_error_is_tried_again_within_one_sync() -> None:
    world = World()
    a = world.device(retry=RetryConfig(attempts_max=3))
    a.put(("notes", 1, "x"))
    a.wire.before = lose(PushRequest, times=2)
    result = a.sync()
    assert result.attempts == 3
    assert len(a.clock.waits) == 2
    assert a.engine.stats.retries == 2
    assert_in_step(world, a)


def test_a_busy_server_is_not_asked_before_the_time_it_named() -> None:
    world = World()
    a = world.device(retry=RetryConfig(attempts_max=2))
    once = [ServerBusyError("later", retry_after=30.0)]

    def hook(request: SyncRequest) -> None:
        if once:
            raise once.pop()

    a.wire.before = hook
    a.sync()
    assert a.clock.waits[0] >= 30.0


def test_the_result_counts_what_was_pushed_and_pulled() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "x"), ("notes", 2, "x"))
    a.put(("notes", 3, "y"), ("notes", 4, "y"), ("notes", 5, "y"))
    a.put(("notes", 6, "y"))
    result = a.sync()
    assert (result.pulled, result.pushed, result.pushed_operations) == (2, 2, 4)
    assert result.bytes_pushed > 0 and result.bytes_pulled > 0


def test_operations_of_a_refused_transaction_are_not_counted_as_pushed() -> None:
    world = World()
    a = world.device(rounds_max=1)
    a.sync()
    a.put(("notes", 1, "y"))
    a.put(("notes", 2, "y"), ("notes", 3, "y"))
    a.wire.before = keep_writing(world, 2)  # type: ignore[assignment]
    result = a.sync()
    assert (result.pushed, result.pushed_operations) == (1, 1)


def test_a_second_engine_on_one_database_is_refused() -> None:
    world = World()
    a = world.device()
    with pytest.raises(DatabaseLockedError):
        SyncEngine(SyncConfig(db_id="shop"), Wire(world), a.db)
    a.engine.close()
    SyncEngine(SyncConfig(db_id="shop"), Wire(world), a.db).close()


def test_a_device_is_bound_to_one_database_of_the_server() -> None:
    world = World()
    a = world.device()
    a.sync()
    a.restart(db_id="another")
    with pytest.raises(ConfigError, match="another directory"):
        a.sync()


def test_an_answer_with_too_few_verdicts_settles_nothing() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.put(("notes", 2, "x"))
    answer = world.answer

    def cut(request: SyncRequest, grant: object) -> object:
        response = answer(request, a.wire.grant)
        if isinstance(request, PushRequest):
            del response.results[1:]  # type: ignore[union-attr]
        return response

    world.answer = cut  # type: ignore[method-assign, assignment]
    with pytest.raises(SyncError) as caught:
        a.sync()
    assert caught.value.code == "invalid_message"
    assert a.pending == 2
    world.answer = answer  # type: ignore[method-assign]
    a.sync()
    assert a.pending == 0
    assert_in_step(world, a)


def test_batches_are_bounded_by_operations_and_keep_the_order() -> None:
    world = World()
    a = world.device(push_operations_max=3)
    for n in range(10):
        a.put(("notes", n, n), ("notes", 100, n))
    a.sync()
    pushes = a.wire.pushes()
    assert [len(push.transactions) for push in pushes] == [1] * 10
    assert world.values()[100] == 9
    assert_in_step(world, a)


def test_a_transaction_larger_than_a_batch_is_sent_alone_and_whole() -> None:
    world = World()
    a = world.device(push_operations_max=3)
    a.put(("notes", 1, "small"))
    a.put(*[("notes", n, "large") for n in range(10, 20)])
    a.put(("notes", 2, "small"))
    a.sync()
    assert [sum(len(t.operations) for t in p.transactions) for p in a.wire.pushes()] == [1, 10, 1]
    assert_in_step(world, a)


def test_the_outbox_is_in_commit_order() -> None:
    a = World().device()
    for n in range(5):
        a.put(("notes", 9 - n, n))
    with a.db.storage.snapshot() as snapshot:
        sequences = [transaction.sequence for transaction in scan_ready(snapshot)]
    assert sequences == sorted(sequences) and len(sequences) == 5


def test_a_resolution_needs_a_choice() -> None:
    a = World().device()
    with pytest.raises(ConfigError):
        a.engine.resolve(None, "both")  # type: ignore[arg-type]
    assert ConflictResolution.keep_local() is ConflictResolution.keep_local()


def test_the_background_engine_syncs_when_woken_and_stops() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.engine.start()
    a.engine.stop()
    a.engine.stop()
    a.settle()
    assert_in_step(world, a)

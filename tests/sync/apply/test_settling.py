"""Preparing batches, settling verdicts, and what an applier refuses: R5, R14, R18, R20 to R22."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import cbor
from entidb.db.records import ENTITY, READY, end_of
from entidb.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    ProtocolError,
    SyncStateError,
    TransportError,
)
from entidb.protocol import (
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    PushResult,
    SyncRequest,
    Verdict,
)
from entidb.server.hooks import Grant, Refusal
from entidb.storage import MemoryStorage
from entidb.sync import Conflict, ConflictResolution
from entidb.sync.apply.applier import MemorySyncApplier
from entidb.sync.apply.seam import BatchLimits
from entidb.sync.apply.settle import check_verdicts
from entidb.types import OPERATION_OVERHEAD_BYTES
from tests.support import (
    GRANT,
    START_MS,
    Device,
    World,
    assert_in_step,
    assert_sound,
    lose,
    uid,
)

KEEP = ConflictResolution.keep_local()


def start(policy: Any = "server_wins", **config: Any) -> tuple[World, Device]:
    """A device that has notes 1, 2, 3 as the server has them."""
    world = World()
    for n in (1, 2, 3):
        world.put(("notes", n, 0))
    a = world.device(default_policy=policy, **config)
    a.sync()
    a.wire.requests.clear()
    return world, a


def once(kind: type, work: Callable[[], object]) -> Callable[[SyncRequest], None]:
    """A hook of ``Wire`` that does ``work`` at the first message of a kind."""
    left = [work]

    def hook(request: SyncRequest) -> None:
        if isinstance(request, kind) and left:
            left.pop()()

    return hook


def order(device: Device) -> list[str]:
    return [type(request).__name__ for request in device.wire.requests]


def written(push: PushRequest) -> list[int]:
    """The last bytes of the ids that a push writes."""
    return [op.entity_id[-1] for t in push.transactions for op in t.operations]


def refusing(*values: Any) -> Callable[[Any, Any], Refusal | None]:
    """A ``validate`` hook that refuses transactions that write one of ``values``."""

    def validate(context: Any, transaction: Any) -> Refusal | None:
        bad = any(operation.value in values for operation in transaction.operations)
        return Refusal("bad", "no") if bad else None

    return validate


# ---------------------------------------------------------------- binding


def test_r10_a_handshake_that_says_what_is_known_makes_no_commit() -> None:
    _, a = start()
    a.restart()
    a.sync()
    assert a.storage.commits == 0


def test_r31_a_device_names_its_collections_in_order() -> None:
    world = World()
    a = world.device(collections=("tasks", "notes", "lists", "people"))
    a.sync()
    assert {tuple(pull.collections or ()) for pull in a.wire.pulls()} == {
        ("lists", "notes", "people", "tasks")
    }


def test_policies_are_those_of_the_collection_or_the_default() -> None:
    applier = MemorySyncApplier(policies={"notes": "client_wins"})
    conflict: Any = None
    assert applier.policy_for("notes")(conflict) == KEEP
    assert applier.policy_for("tasks")(conflict) == ConflictResolution.accept_remote()


# ---------------------------------------------------------------- preparing


def test_a_batch_is_bounded_by_bytes_and_filled_up_to_them() -> None:
    _, a = start()
    applier = a.engine.applier
    for n in (1, 2, 3):
        a.put(("notes", n, "x" * 100))
    sizes = [len(transaction.encode()) for transaction in applier.pending()]
    for bytes_max, expected in ((sum(sizes[:2]), 2), (sum(sizes[:2]) - 1, 1), (1, 1)):
        applier.unsend()
        batch = applier.prepare(BatchLimits(bytes_max=bytes_max))
        assert batch is not None and len(batch.keys) == expected


def test_the_bytes_of_a_push_are_its_payloads_and_an_overhead_each() -> None:
    _, a = start()
    a.put(("notes", 1, "abc"), ("notes", 2, None))
    result = a.sync()
    assert result.bytes_pushed == 2 * OPERATION_OVERHEAD_BYTES + len(cbor.encode("abc"))


def test_the_next_batch_leaves_out_what_an_answer_has_just_withdrawn() -> None:
    world = World(validate=refusing("bad"))
    a = world.device(push_operations_max=1)
    a.put(("notes", 1, "bad"))
    a.put(("notes", 1, "on top"))
    a.put(("notes", 2, "other"))
    result = a.sync()
    assert (result.pushed, a.pending, len(a.wire.pushes())) == (1, 0, 2)
    assert world.values() == {2: "other"}
    assert_in_step(world, a)


def test_the_next_batch_has_what_became_ready_meanwhile_and_is_older() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    a.put(("notes", 2, "first"))
    [conflict] = a.engine.conflicts()
    a.wire.before = once(PushRequest, lambda: a.engine.applier.resolve(conflict, KEEP))
    assert a.sync().pushed == 2
    assert_in_step(world, a)


def test_r8_what_was_committed_after_the_limit_is_no_batch_and_no_commit() -> None:
    _, a = start()
    applier = a.engine.applier
    limit = BatchLimits(sequence_max=a.db.sequence)
    a.put(("notes", 1, "mine"))
    commits = a.storage.commits
    assert applier.prepare(limit) is None
    assert (applier.inflight(), a.storage.commits) == ([], commits)


def test_r5_only_the_batch_in_flight_can_have_one_after_it_and_only_one() -> None:
    _, a = start()
    applier, one = a.engine.applier, BatchLimits(operations_max=1)
    for n in (1, 2, 3):
        a.put(("notes", n, "mine"))
    first = applier.prepare(one)
    assert first is not None
    second = applier.prepare_after(first, one)
    assert second is not None
    with pytest.raises(SyncStateError):
        applier.prepare_after(first, one)
    applier.settle(first, answer(PushResult(ACCEPTED, 9)), None, second)
    with pytest.raises(SyncStateError):
        applier.prepare_after(first, one)
    assert [batch.ranges for batch in applier.inflight()] == [second.ranges]


def test_r5_no_batch_goes_along_that_builds_on_the_other_one_in_flight() -> None:
    _, a = start()
    applier, one = a.engine.applier, BatchLimits(operations_max=1)
    for n in (1, 2, 2, 3):
        a.put(("notes", n, "mine"))
    first = applier.prepare(one)
    assert first is not None
    second = applier.prepare_after(first, one)
    assert second is not None
    settled = applier.settle(first, answer(PushResult(ACCEPTED, 9)), one, second)
    assert (settled.pull, settled.next_batch) == (False, None)
    assert [batch.ranges for batch in applier.inflight()] == [second.ranges]


def test_r5_what_became_ready_and_is_older_keeps_none_from_going_along() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    applier, one = a.engine.applier, BatchLimits(operations_max=1)
    for n in (2, 3):
        a.put(("notes", n, "mine"))
    first = applier.prepare(one)
    assert first is not None
    applier.resolve(applier.conflicts()[0], KEEP)
    older = applier.prepare_after(first, one)
    assert older is not None and older.sequences < first.sequences
    version = world.server.sequence + 1
    settled = applier.settle(first, answer(PushResult(ACCEPTED, version)), one, older)
    assert settled.next_batch is not None
    assert settled.next_batch.sequences > first.sequences
    assert [batch.ranges for batch in applier.inflight()] == [
        older.ranges,
        settled.next_batch.ranges,
    ]


def test_r7_after_a_conflict_what_is_in_flight_is_settled_and_a_pull_comes_before_more() -> None:
    world, a = start("client_wins", push_operations_max=1)
    for n in (1, 2, 3):
        a.put(("notes", n, "mine"))
    a.wire.before = once(PushRequest, lambda: world.put(("notes", 1, "theirs")))
    assert a.sync().pushed == 3
    assert order(a) == ["PullRequest", *["PushRequest"] * 2, "PullRequest", *["PushRequest"] * 2]
    assert [written(push) for push in a.wire.pushes()] == [[1], [2], [1], [3]]
    assert_in_step(world, a)


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "clean"])
def test_a_pending_entity_without_a_row_that_says_so_is_reported_and_nothing_is_sent(
    gone: bool,
) -> None:
    _, a = start()
    made = [a.put(("notes", n, "mine")) for n in (8, 9)]
    with a.storage.snapshot() as snapshot:
        rows = snapshot.scan(ENTITY, end_of(ENTITY))
    [clean] = [row for key, row in rows if key[-1] == 1]
    [key] = [key for key, _ in rows if key[-1] == 9]
    a.storage.inner.commit({key: None if gone else clean})
    with pytest.raises(CorruptionError, match=f"entity {uid(9).hex} .*verify"):
        a.sync()
    assert a.wire.pushes() == []
    assert [t.transaction_id for t in a.engine.applier.pending()] == [id.bytes for id in made]


@pytest.mark.parametrize("writes", [(1,), (4, 1)], ids=["alone", "among others"])
def test_the_batch_after_one_ends_before_what_builds_on_it(writes: tuple[int, ...]) -> None:
    _, a = start()
    applier = a.engine.applier
    a.put(("notes", 1, "mine"))
    first = applier.prepare(BatchLimits())
    assert first is not None
    a.put(("notes", 2, "mine"))
    a.put(*[("notes", n, "on top") for n in writes])
    for n in (4, 5):
        a.put(("notes", n, "mine"))
    after = applier.prepare_after(first, BatchLimits())
    assert after is not None
    assert [op.entity_id[-1] for t in after.transactions for op in t.operations] == [2]


def test_the_outbox_is_read_about_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, a = start()
    for n in range(100):
        a.put(("notes", n, "x" * 900))
    [size] = {len(transaction.encode()) for transaction in a.engine.applier.pending()}
    limits: list[int] = []
    kind = type(MemoryStorage().snapshot())
    scan: Any = kind.scan

    def watching(self: Any, first: bytes, *rest: Any, **options: Any) -> Any:
        if first.startswith(READY):
            limits.append(options["limit"])
        return scan(self, first, *rest, **options)

    monkeypatch.setattr(kind, "scan", watching)
    for count, expected in ((45, [32, 45]), (1, [32]), (10**6, [32, 2000])):
        limits.clear()
        a.engine.applier.unsend()
        batch = a.engine.applier.prepare(BatchLimits(bytes_max=count * (size + 1)))
        assert batch is not None and len(batch.keys) == min(count, 100)
        assert limits == expected
    limits.clear()
    [batch] = a.engine.applier.inflight()
    assert (len(batch.keys), limits) == (100, [32, 2000])


# ---------------------------------------------------------------- verdicts


def answer(*results: PushResult, head: int = 10) -> PushResponse:
    """An answer to a push."""
    return PushResponse(results=list(results), collections=["notes"], head=head, time=START_MS)


ACCEPTED, SUPERSEDED = Verdict.ACCEPTED, Verdict.SUPERSEDED


@pytest.mark.parametrize(
    ("results", "possible"),
    [
        ([PushResult(ACCEPTED, 9), PushResult(ACCEPTED, 10)], True),
        ([PushResult(ACCEPTED, 10), PushResult(ACCEPTED, 11)], False),
        ([PushResult(ACCEPTED, 0), PushResult(ACCEPTED, 10)], False),
        ([PushResult(ACCEPTED, 10), PushResult(ACCEPTED, 10)], False),
        ([PushResult(ACCEPTED, 10), PushResult(SUPERSEDED, 10)], False),
        ([PushResult(SUPERSEDED, 11), PushResult(ACCEPTED, 10)], False),
        ([PushResult(Verdict.CONFLICT), PushResult(ACCEPTED, 11)], False),
        ([PushResult(Verdict.CONFLICT), PushResult(Verdict.REJECTED, code="no")], True),
    ],
)
def test_r12_a_version_that_cannot_be_settles_nothing(
    results: list[PushResult], possible: bool
) -> None:
    _, a = start()
    applier = a.engine.applier
    a.put(("notes", 1, "mine"))
    a.put(("notes", 2, "mine"))
    batch = applier.prepare(BatchLimits())
    assert batch is not None
    commits = a.storage.commits
    if possible:
        applier.settle(batch, answer(*results), None)
        assert a.storage.commits == commits + 1
        return
    with pytest.raises(ProtocolError):
        applier.settle(batch, answer(*results), None)
    assert (a.storage.commits, a.pending) == (commits, 2)


@pytest.mark.parametrize(("versions", "worst"), [((0, 7), 0), ((1, 12), 12), ((11, 12), 12)])
def test_r12_the_version_that_cannot_be_is_named(versions: tuple[int, int], worst: int) -> None:
    results = [PushResult(ACCEPTED, version) for version in versions]
    with pytest.raises(ProtocolError, match=f"version {worst}, "):
        check_verdicts(answer(*results))


def test_r18_settling_says_how_many_of_each_verdict_there_were() -> None:
    _, a = start()
    for n in range(1, 6):
        a.put(("notes", n, "mine"), ("notes", n + 10, "mine"))
    batch = a.engine.applier.prepare(BatchLimits())
    assert batch is not None
    rejected = PushResult(Verdict.REJECTED, code="no")
    conflict, accepted = PushResult(Verdict.CONFLICT), PushResult(ACCEPTED, 9)
    given = (conflict, rejected, accepted, conflict, rejected)
    settled = a.engine.applier.settle(batch, answer(*given), None)
    assert (settled.accepted, settled.accepted_operations, settled.superseded) == (1, 2, 0)
    assert (settled.conflicts, settled.rejected, settled.pull) == (2, 2, True)


def test_r30_what_was_accepted_takes_along_what_it_has_replaced() -> None:
    _, a = start()
    applier = a.engine.applier
    a.put(("notes", 2, "first"))
    a.put(("notes", 1, "mine"), ("notes", 2, "second"))
    batch = applier.prepare(BatchLimits())
    assert batch is not None
    applier.settle(batch, answer(PushResult(Verdict.CONFLICT), PushResult(ACCEPTED, 9)), None)
    assert list(applier.pending()) == []
    assert_sound(a.db)


def test_r5_only_the_batch_in_flight_can_be_settled() -> None:
    _, a = start()
    applier = a.engine.applier
    a.put(("notes", 1, "mine"))
    first = applier.prepare(BatchLimits())
    assert first is not None
    applier.settle(first, answer(PushResult(ACCEPTED, 9)), None)
    a.put(("notes", 2, "mine"))
    applier.prepare(BatchLimits())
    with pytest.raises(SyncStateError):
        applier.settle(first, answer(PushResult(ACCEPTED, 10)), None)
    assert a.pending == 1


def test_r18_verdicts_behind_what_was_withdrawn_are_settled_too() -> None:
    world = World(validate=refusing("bad"))
    a = world.device()
    a.put(("notes", 1, "bad"))
    a.put(("notes", 1, "on top"))
    a.put(("notes", 2, "other"))
    result = a.sync()
    assert (result.pushed, a.pending, len(a.wire.pushes())) == (1, 0, 1)
    assert_in_step(world, a)


def test_r4_a_servers_words_for_a_refusal_are_kept_within_bounds() -> None:
    _, a = start()
    applier = a.engine.applier
    a.put(("notes", 1, "mine"))
    batch = applier.prepare(BatchLimits())
    assert batch is not None
    words = PushResult(Verdict.REJECTED, code="c" * 500, message="m" * 5000)
    applier.settle(batch, answer(words), None)
    [gone] = a.engine.discarded()
    assert (gone.code, gone.message) == ("c" * 100, "m" * 1000)


def test_r4_a_refusal_without_words_has_some_all_the_same() -> None:
    _, a = start()
    applier = a.engine.applier
    a.put(("notes", 1, "mine"))
    batch = applier.prepare(BatchLimits())
    assert batch is not None
    applier.settle(batch, answer(PushResult(Verdict.REJECTED)), None)
    [gone] = a.engine.discarded()
    assert (gone.code, gone.message) == ("rejected", "refused by the server")


@pytest.mark.parametrize("chain", [False, True], ids=["alone", "in a chain"])
def test_r18_what_was_accepted_keeps_the_time_it_was_written_at(chain: bool) -> None:
    world, a = start()
    world.clock.ms += 10_000
    a.clock.ms += 5000
    if chain:
        a.put(("notes", 1, "before"))
    a.put(("notes", 1, "mine"))
    [*_, written] = [transaction.timestamp for transaction in a.engine.applier.pending()]
    a.sync()
    b = world.device()
    b.sync()
    for device in (a, b):
        stamps = {event.entity_id: event.timestamp for event in device.db.changes()}
        assert stamps[uid(1)] == written


@pytest.mark.parametrize("chain", [False, True], ids=["alone", "in a chain"])
def test_r27_what_the_server_clamped_has_its_time(chain: bool) -> None:
    _, a = start()
    if chain:
        a.put(("notes", 1, "before"))
    a.put(("notes", 1, "mine"))
    batch = a.engine.applier.prepare(BatchLimits())
    assert batch is not None
    results = [PushResult(ACCEPTED, 8, 50), PushResult(ACCEPTED, 9, 60)][not chain :]
    a.engine.applier.settle(batch, answer(*results), None)
    [stamp] = [event.timestamp for event in a.db.changes() if event.entity_id == uid(1)]
    assert stamp == 60


def test_r21_what_was_accepted_need_not_come_back() -> None:
    _, a = start()
    a.put(("notes", 1, "first"), ("notes", 2, "first"))
    a.put(("notes", 1, "second"))
    a.put(("notes", 3, "third"))
    a.sync()
    a.restart()
    a.sync()
    pages = [found for found in a.wire.responses if isinstance(found, PullResponse)]
    assert [page.commits for page in pages] == [[]]


# ---------------------------------------------------------------- copies (R30)

NOTES_ONLY = Grant("tester", True, True, frozenset({"notes"}))


def test_r30_what_was_withdrawn_here_but_accepted_from_a_copy_is_pulled() -> None:
    world = World()
    world.put(("notes", 1, 0), ("other", 1, 0))
    a = world.device()
    a.sync()
    a.put(("other", 1, "same"))
    a.put(("other", 1, "second"), ("notes", 1, "second"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    copy = a.copy()
    world.put(("other", 1, "same"))
    copy.settle()
    assert world.values() == {1: "second"}
    # Meanwhile the token has lost a collection; after the answer it has it again.
    a.wire.grant = NOTES_ONLY
    a.wire.after = once(PushRequest, lambda: setattr(a.wire, "grant", GRANT))
    result = a.sync()
    assert [gone.code for gone in result.withdrawn] == ["forbidden", "depends"]
    assert (a.values(), a.pending) == ({1: "second"}, 0)
    assert_in_step(world, a)


def test_r30_what_a_copy_had_accepted_meanwhile_is_pulled_although_it_was_withdrawn_here() -> None:
    world = World()
    world.put(("notes", 1, 0), ("other", 1, 0))
    a = world.device()
    a.sync()
    a.put(("other", 1, "same"))
    a.put(("other", 1, "second"), ("notes", 1, "second"))
    copy = a.copy()

    def meanwhile() -> None:
        world.put(("other", 1, "same"))
        copy.settle()
        a.wire.grant = NOTES_ONLY

    a.wire.before = once(PushRequest, meanwhile)
    a.wire.after = once(PushRequest, lambda: setattr(a.wire, "grant", GRANT))
    result = a.sync()
    assert [gone.code for gone in result.withdrawn] == ["forbidden", "depends"]
    assert_in_step(world, a)


def test_r30_what_was_merged_here_but_accepted_from_a_copy_as_it_was_is_pulled() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        return ConflictResolution.merge(f"{conflict.local} merged")

    world, a = start(policy)
    a.put(("notes", 1, "first"), ("notes", 3, "first"))
    a.put(("notes", 1, "second"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    copy = a.copy()
    world.put(("notes", 3, "theirs"))
    copy.settle()
    assert world.values() == {1: "second", 2: 0, 3: "first merged"}
    result = a.sync()
    assert (result.superseded, a.pending) == (1, 0)
    assert a.values() == world.values() == {1: "second", 2: 0, 3: "first merged"}
    assert_in_step(world, a)


# ---------------------------------------------------------------- pulling and staging


def test_r22_an_answer_from_before_a_reset_is_not_applied() -> None:
    world = World()
    world.put(("notes", 1, "x"))
    a = world.device()
    a.wire.after = once(PullRequest, lambda: a.engine.applier.reset("server"))
    with pytest.raises(SyncStateError):
        a.sync()
    assert a.values() == {}
    a.restart()
    a.settle()
    assert_in_step(world, a)


def test_r27_what_is_written_after_several_pages_is_later_than_what_they_brought() -> None:
    world, a = start(pull_operations_max=2)
    world.clock.ms += 100_000
    for n in range(4, 12):
        world.put(("notes", n, "new"))
    newest = max(event.timestamp for event in world.server.changes())
    a.sync()
    a.put(("notes", 1, "mine, later"))
    [pending] = a.engine.applier.pending()
    assert pending.timestamp > newest


def test_r25_what_is_held_is_let_go_by_several_pages_as_by_one() -> None:
    world, a = start("manual", pull_operations_max=2)
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    a.sync()
    assert a.engine.status().held == 1
    world.put(("notes", 1, "mine"))
    for n in range(4, 10):
        world.put(("notes", n, "new"))
    a.sync()
    status = a.engine.status()
    assert (status.held, status.conflicts) == (0, 0)
    a.settle()
    assert world.values()[2] == "mine"
    assert_in_step(world, a)


def test_there_is_nothing_to_publish_without_a_stage() -> None:
    _, a = start()
    with pytest.raises(SyncStateError):
        a.engine.applier.publish()


# ---------------------------------------------------------------- reset, resolve, prune


def test_r29_a_reset_forgets_what_was_staged_in_flight_and_known() -> None:
    world, a = start(pull_operations_max=2)
    a.put(("notes", 1, "mine"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    applier = a.engine.applier
    assert len(applier.inflight()) == 1
    applier.reset("server")
    state = applier.state()
    assert (applier.inflight(), state.cursor, state.have, state.full) == ([], 0, [], True)
    for n in range(4, 12):
        world.put(("notes", n, "new"))
    a.wire.before = _lose_after(2)
    with pytest.raises(TransportError):
        a.sync()
    assert applier.stage() is not None
    applier.reset("server")
    assert applier.stage() is None
    a.wire.before = lambda request: None
    a.settle()
    assert world.values()[1] == "mine" or a.engine.discarded()
    assert_in_step(world, a)


def _lose_after(count: int) -> Callable[[SyncRequest], None]:
    """A hook of ``Wire`` that lets ``count`` pulls through and loses the others."""
    left = [count]

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PullRequest):
            if not left[0]:
                raise TransportError("lost on the way")
            left[0] -= 1

    return hook


def test_r29_a_reset_needs_to_know_whose_side_to_keep() -> None:
    _, a = start()
    before = a.state
    with pytest.raises(ConfigError):
        a.engine.applier.reset("both")
    assert a.state == before


def test_r25_a_conflict_of_a_collection_that_is_not_here_is_gone() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    [conflict] = a.engine.conflicts()
    with pytest.raises(ConflictError) as caught:
        a.engine.resolve(replace(conflict, collection="nowhere"), "mine")
    assert caught.value.code == "conflict_gone"
    assert_sound(a.db)


def test_what_a_person_does_with_conflicts_is_told_as_local() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    told: list[str] = []
    a.db.observe(lambda commit: told.append(commit.origin))
    a.engine.resolve(a.engine.conflicts()[0], "theirs")
    [gone] = a.engine.discarded()
    a.engine.applier.recommit(gone)
    assert told == ["local", "local"]
    assert a.engine.applier.prune(gone) is False

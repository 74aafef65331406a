"""What every ``SyncApplier`` must do: the promises of its methods as tests.

Use it by inheriting: ``class TestMine(SyncApplierContract)`` with ``make_applier``; pytest collects
the tests. The server is a hand-made one that answers whatever a test needs, so that only the
applier is under test.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from entidb import cbor
from entidb.db.replica import Inflight
from entidb.errors import ConfigError, ProtocolError, SyncStateError
from entidb.protocol import (
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushResponse,
    PushResult,
    Verdict,
)
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.seam import BatchLimits, PushBatch
from entidb.testing.contracts import raises

DB_ID = "contract"
HISTORY = b"h" * 16
OTHER_HISTORY = b"H" * 16
DEVICE = b"d" * 16
COLLECTION = "notes"
LIMITS = BatchLimits()


def entity(number: int) -> uuid.UUID:
    return uuid.UUID(int=number)


def change(version: int, **values: object) -> PullCommit:
    """One server commit: ``n1="x"`` writes entity 1, ``n1=None`` deletes it."""
    operations = [
        PullOperation(0, entity(int(name[1:])).bytes, None if value is None else cbor.encode(value))
        for name, value in values.items()
    ]
    return PullCommit(version, DEVICE, version << 16, operations)


def page(*commits: PullCommit, cursor: int, head: int | None = None) -> PullResponse:
    return PullResponse(
        collections=[COLLECTION],
        commits=list(commits),
        cursor=cursor,
        has_more=head is not None and head > cursor,
        head=cursor if head is None else head,
        floor=0,
        time=1_800_000_000_000,
    )


def answer(batch: PushBatch, *results: PushResult) -> PushResponse:
    return PushResponse(
        results=list(results), collections=batch.collections, head=99, time=1_800_000_000_000
    )


def accepted(version: int) -> PushResult:
    return PushResult(Verdict.ACCEPTED, version)


class SyncApplierContract:
    """The promises of ``entidb.sync.SyncApplier``."""

    def make_applier(self) -> DatabaseApplier:
        """A new one on an empty database that takes the server's side; ``fresh`` closes it."""
        raise NotImplementedError("a contract needs make_applier")

    @contextlib.contextmanager
    def fresh(self, *, synced: bool = True) -> Iterator[DatabaseApplier]:
        """A bound applier, ``synced`` at cursor 0 of an empty server."""
        applier = self.make_applier()
        try:
            applier.bind(DB_ID, HISTORY)
            if synced:
                applier.apply(self.ask(applier, full=True), page(cursor=0))
            yield applier
            assert applier.database.verify() == []
        finally:
            applier.database.close()

    def ask(
        self, applier: DatabaseApplier, cursor: int | None = None, *, full: bool = False
    ) -> PullRequest:
        state = applier.state()
        assert state.history is not None
        return PullRequest(
            db_id=DB_ID,
            device_id=applier.device_id,
            history=state.history,
            cursor=state.cursor if cursor is None else cursor,
            limit=100,
            bytes_max=1 << 20,
            full=full,
        )

    def put(self, applier: DatabaseApplier, **values: object) -> None:
        with applier.database.transaction() as tx:
            for name, value in values.items():
                if value is None:
                    del tx.collection(COLLECTION)[entity(int(name[1:]))]
                else:
                    tx.collection(COLLECTION)[entity(int(name[1:]))] = value

    def values(self, applier: DatabaseApplier) -> dict[int, object]:
        return {key.int: value for key, value in applier.database.collection(COLLECTION).items()}

    def batch(self, applier: DatabaseApplier, limits: BatchLimits = LIMITS) -> PushBatch:
        batch = applier.prepare(limits)
        assert batch is not None, "something is ready to be pushed"
        return batch

    # ---- binding

    def test_it_remembers_whose_replica_it_is(self) -> None:
        with self.fresh() as applier:
            applier.bind(DB_ID, HISTORY)
            assert (applier.state().db_id, applier.state().history) == (DB_ID, HISTORY)
            with raises(ConfigError):
                applier.bind("another", HISTORY)

    # ---- looking

    def test_a_look_is_of_one_moment_and_taken_again_only_after_a_commit(self) -> None:
        with self.fresh() as applier:
            before = applier.look()
            assert (applier.look(), before.ready, before.inflight) == (before, 0, None)
            self.put(applier, n1="x")
            after = applier.look()
            assert (after.ready, after.sequence) == (1, before.sequence + 1)
            batch = self.batch(applier)
            assert applier.look().inflight == Inflight(batch.ranges)
            assert (before.ready, after.inflight) == (0, None)

    # ---- pushing

    def test_nothing_ready_is_no_batch(self) -> None:
        with self.fresh() as applier:
            assert applier.prepare(LIMITS) is None
            assert applier.inflight() == []

    def test_a_batch_is_in_flight_and_the_same_until_it_is_settled(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x", n2="x")
            batch = self.batch(applier)
            self.put(applier, n1="later")
            (again,) = applier.inflight()
            assert again.transactions == batch.transactions
            assert again.collections == batch.collections

    def test_batches_are_bounded_and_in_commit_order(self) -> None:
        with self.fresh() as applier:
            for number in range(1, 6):
                self.put(applier, **{f"n{number}": number})
            limits = BatchLimits(operations_max=2)
            batch, sizes = applier.prepare(limits), []
            while batch is not None:
                sizes.append(len(batch.keys))
                results = [accepted(len(sizes) * 10 + at) for at in range(len(batch.keys))]
                batch = applier.settle(batch, answer(batch, *results), limits).next_batch
            assert sizes == [2, 2, 1]
            assert applier.ready() == 0

    def test_accepted_leaves_the_outbox_and_becomes_the_base(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            batch = self.batch(applier)
            settled = applier.settle(batch, answer(batch, accepted(1)), None)
            assert (settled.accepted, settled.pull, applier.ready()) == (1, False, 0)
            assert applier.state().have == [[1, 1]]
            self.put(applier, n1="y")
            assert self.batch(applier).transactions[0].operations[0].base_version == 1

    def test_accepted_below_the_cursor_leaves_the_base_alone(self) -> None:
        with self.fresh() as applier:
            applier.apply(self.ask(applier), page(change(7, n1="theirs"), cursor=7))
            self.put(applier, n1="mine")
            batch = self.batch(applier)
            applier.settle(batch, answer(batch, accepted(5)), None)
            assert self.values(applier) == {1: "theirs"}
            assert applier.state().have == []

    def test_what_was_committed_meanwhile_is_not_marked_by_the_answer(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            batch = self.batch(applier)
            self.put(applier, n1="later")
            applier.settle(batch, answer(batch, accepted(1)), None)
            assert (self.values(applier), applier.ready()) == ({1: "later"}, 1)
            [operation] = self.batch(applier).transactions[0].operations
            assert operation.base_version == 1

    def test_superseded_leaves_the_outbox_and_asks_for_a_pull(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            batch = self.batch(applier)
            settled = applier.settle(
                batch, answer(batch, PushResult(Verdict.SUPERSEDED, 4)), LIMITS
            )
            assert (settled.superseded, settled.pull, applier.ready()) == (1, True, 0)
            assert (self.values(applier), applier.state().have) == ({}, [])

    def test_superseded_stays_while_an_older_write_to_the_entity_is_undecided(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            self.put(applier, n1="y")
            batch = self.batch(applier)
            verdicts = PushResult(Verdict.CONFLICT), PushResult(Verdict.SUPERSEDED, 4)
            settled = applier.settle(batch, answer(batch, *verdicts), LIMITS)
            assert (settled.superseded, settled.conflicts, settled.pull) == (0, 2, True)
            assert (self.values(applier), applier.ready()) == ({1: "y"}, 2)

    def test_a_conflict_stays_and_asks_for_a_pull(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            batch = self.batch(applier)
            settled = applier.settle(batch, answer(batch, PushResult(Verdict.CONFLICT)), LIMITS)
            assert (settled.pull, settled.next_batch, applier.ready()) == (True, None, 1)
            assert (self.values(applier), applier.inflight()) == ({1: "x"}, [])

    def test_rejected_is_withdrawn_with_those_built_on_it(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            self.put(applier, n1="y", n2="y")
            self.put(applier, n3="z")
            batch = self.batch(applier)
            results = (
                PushResult(Verdict.REJECTED, code="no", message="never"),
                PushResult(Verdict.CONFLICT),
                accepted(1),
            )
            applier.settle(batch, answer(batch, *results), None)
            assert self.values(applier) == {3: "z"}
            assert [gone.code for gone in applier.discarded()] == ["no", "depends"]

    def test_what_counts_as_not_sent_stays_pending_and_can_be_cut_otherwise(self) -> None:
        with self.fresh() as applier:
            for number in range(1, 4):
                self.put(applier, **{f"n{number}": number})
            first = self.batch(applier, BatchLimits(operations_max=1))
            assert applier.prepare_after(first, LIMITS) is not None
            applier.unsend()
            assert (applier.inflight(), applier.ready()) == ([], 3)
            again = self.batch(applier, BatchLimits(transactions_max=2))
            assert [len(again.transactions), again.transactions[0]] == [2, first.transactions[0]]

    def test_what_is_refused_for_good_is_withdrawn_with_those_built_on_it(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            self.put(applier, n1="y", n2="y")
            self.put(applier, n3="z")
            batch = self.batch(applier, BatchLimits(transactions_max=1))
            report = applier.refuse(batch, "no", "never")
            assert [gone.code for gone in report.withdrawn] == ["no", "depends"]
            assert [gone.code for gone in applier.discarded()] == ["no", "depends"]
            assert self.values(applier) == {3: "z"}
            assert (applier.inflight(), applier.ready()) == ([], 1)
            with raises(SyncStateError):
                applier.refuse(batch, "no", "never")

    def test_what_is_left_out_keeps_those_built_on_it_back(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            self.put(applier, n1="y", n2="y")
            self.put(applier, n2="z")
            self.put(applier, n3="apart")
            first = self.batch(applier, BatchLimits(transactions_max=1))
            [sequence] = first.sequences
            assert applier.still_pending([sequence, sequence + 1000]) == [sequence]
            applier.unsend()
            batch = self.batch(applier, BatchLimits(without=frozenset((sequence,))))
            ids = [[op.entity_id for op in tx.operations] for tx in batch.transactions]
            assert ids == [[entity(3).bytes]]
            assert [b.transactions for b in applier.inflight()] == [batch.transactions]

    def test_a_batch_is_settled_once(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            batch = self.batch(applier)
            applier.settle(batch, answer(batch, accepted(1)), None)
            with raises(SyncStateError):
                applier.settle(batch, answer(batch, accepted(1)), None)

    def test_the_batch_after_one_in_flight_touches_nothing_of_it(self) -> None:
        with self.fresh() as applier:
            one = BatchLimits(operations_max=2)
            self.put(applier, n1="a")
            self.put(applier, n2="b")
            self.put(applier, n3="c")
            self.put(applier, n4="d", n1="d")
            first = self.batch(applier, one)
            after = applier.prepare_after(first, LIMITS)
            assert after is not None
            ids = [[op.entity_id for op in tx.operations] for tx in after.transactions]
            assert ids == [[entity(3).bytes]]
            again = applier.inflight()
            assert [b.transactions for b in again] == [first.transactions, after.transactions]

    def test_no_batch_goes_along_that_builds_on_the_one_in_flight(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="a")
            self.put(applier, n1="b")
            first = self.batch(applier, BatchLimits(operations_max=1))
            assert applier.prepare_after(first, LIMITS) is None
            assert len(applier.inflight()) == 1

    def test_what_follows_stays_in_flight_when_the_first_is_settled(self) -> None:
        with self.fresh() as applier:
            one = BatchLimits(operations_max=1)
            for number in range(1, 4):
                self.put(applier, **{f"n{number}": number})
            first = self.batch(applier, one)
            second = applier.prepare_after(first, one)
            assert second is not None
            settled = applier.settle(first, answer(first, accepted(1)), one, second)
            third = settled.next_batch
            assert third is not None and third.ranges != second.ranges
            again = applier.inflight()
            assert [b.transactions for b in again] == [second.transactions, third.transactions]
            settled = applier.settle(second, answer(second, accepted(2)), one, third)
            assert settled.next_batch is None
            applier.settle(third, answer(third, accepted(3)), one)
            assert (applier.inflight(), applier.ready()) == ([], 0)
            assert self.values(applier) == {1: 1, 2: 2, 3: 3}

    def test_a_conflict_in_the_first_leaves_the_second_in_flight(self) -> None:
        with self.fresh() as applier:
            one = BatchLimits(operations_max=1)
            for number in range(1, 4):
                self.put(applier, **{f"n{number}": number})
            first = self.batch(applier, one)
            second = applier.prepare_after(first, one)
            assert second is not None
            conflict = answer(first, PushResult(Verdict.CONFLICT))
            settled = applier.settle(first, conflict, one, second)
            assert (settled.pull, settled.next_batch) == (True, None)
            assert [batch.ranges for batch in applier.inflight()] == [second.ranges]
            applier.settle(second, answer(second, accepted(1)), None)
            assert (applier.inflight(), applier.ready()) == ([], 2)

    def test_settling_names_both_batches_in_flight(self) -> None:
        with self.fresh() as applier:
            one = BatchLimits(operations_max=1)
            self.put(applier, n1="a")
            self.put(applier, n2="b")
            first = self.batch(applier, one)
            assert applier.prepare_after(first, one) is not None
            with raises(SyncStateError):
                applier.settle(first, answer(first, accepted(1)), one)
            assert len(applier.inflight()) == 2

    def test_a_local_write_meanwhile_is_not_settled_with_the_batch(self) -> None:
        with self.fresh() as applier:
            one = BatchLimits(operations_max=1)
            self.put(applier, n1="a")
            self.put(applier, n2="b")
            first = self.batch(applier, one)
            second = applier.prepare_after(first, one)
            assert second is not None
            self.put(applier, n2="newer")
            applier.settle(first, answer(first, accepted(1)), None, second)
            applier.settle(second, answer(second, accepted(2)), None)
            assert (self.values(applier), applier.ready()) == ({1: "a", 2: "newer"}, 1)
            (pending,) = applier.pending()
            assert pending.operations[0].payload == cbor.encode("newer")

    def test_a_batch_that_is_not_in_flight_has_none_after_it(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            batch = self.batch(applier)
            applier.settle(batch, answer(batch, accepted(1)), None)
            with raises(SyncStateError):
                applier.prepare_after(batch, LIMITS)

    def test_too_few_verdicts_settle_nothing(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="x")
            batch = self.batch(applier)
            with raises(ProtocolError):
                applier.settle(batch, answer(batch), None)
            assert len(applier.inflight()) == 1

    # ---- pulling

    def test_a_page_is_applied_with_its_cursor(self) -> None:
        with self.fresh() as applier:
            report = applier.apply(
                self.ask(applier), page(change(2, n1="a", n2="b"), change(4, n3="c"), cursor=9)
            )
            assert (report.pulled, applier.state().cursor) == (3, 9)
            assert self.values(applier) == {1: "a", 2: "b", 3: "c"}
            applier.apply(self.ask(applier), page(change(10, n1=None), cursor=10))
            assert self.values(applier) == {2: "b", 3: "c"}

    def test_a_stale_answer_is_refused(self) -> None:
        with self.fresh() as applier:
            request = self.ask(applier)
            applier.apply(request, page(change(1, n1="a"), cursor=1))
            before = applier.sequence()
            with raises(SyncStateError):
                applier.apply(request, page(change(1, n1="b"), cursor=1))
            assert (applier.sequence(), self.values(applier)) == (before, {1: "a"})

    def test_an_answer_of_another_history_is_refused(self) -> None:
        with self.fresh() as applier:
            request = self.ask(applier)
            applier.reset("server")
            applier.bind(DB_ID, OTHER_HISTORY)
            with raises(SyncStateError):
                applier.apply(request, page(change(1, n1="a"), cursor=1))
            assert self.values(applier) == {}

    def test_what_is_known_already_is_skipped(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="mine")
            batch = self.batch(applier)
            applier.settle(batch, answer(batch, accepted(1)), None)
            report = applier.apply(self.ask(applier), page(change(1, n1="mine"), cursor=1))
            assert report.pulled == 0
            assert applier.state().have == []

    def test_a_pending_entity_that_changed_is_a_conflict(self) -> None:
        with self.fresh() as applier:
            self.put(applier, n1="mine")
            report = applier.apply(self.ask(applier), page(change(1, n1="theirs"), cursor=1))
            assert len(report.resolved) == len(report.withdrawn) == 1
            assert (self.values(applier), applier.ready()) == ({1: "theirs"}, 0)

    # ---- staging

    def test_staged_pages_are_out_of_sight_until_published(self) -> None:
        with self.fresh() as applier:
            applier.stage_page(self.ask(applier), page(change(1, n1="a"), cursor=1, head=2), [])
            assert (self.values(applier), applier.state().cursor) == ({}, 0)
            stage = applier.stage_page(
                self.ask(applier, 1), page(change(2, n2="b"), cursor=2, head=2), []
            )
            assert stage.delta_cursor == 2
            assert self.values(applier) == {}
            applier.publish()
            assert (self.values(applier), applier.state().cursor) == ({1: "a", 2: "b"}, 2)
            assert applier.stage() is None

    def test_a_page_is_staged_once(self) -> None:
        with self.fresh() as applier:
            request = self.ask(applier)
            applier.stage_page(request, page(change(1, n1="a"), cursor=1, head=2), [])
            with raises(SyncStateError):
                applier.stage_page(request, page(change(1, n1="a"), cursor=1, head=2), [])

    def test_a_full_stage_replaces_what_was_there_and_keeps_pending_work(self) -> None:
        with self.fresh() as applier:
            applier.apply(self.ask(applier), page(change(1, n1="old", n2="old"), cursor=1))
            self.put(applier, n3="mine")
            applier.restart_stage(full=True)
            request = self.ask(applier, 0, full=True)
            applier.stage_page(request, page(change(5, n2="new"), cursor=5, head=6), None)
            request = self.ask(applier, 5, full=True)
            applier.stage_page(request, page(change(6, n4="new"), cursor=6, head=6), None)
            applier.publish()
            assert self.values(applier) == {2: "new", 3: "mine", 4: "new"}
            assert (applier.state().cursor, applier.ready()) == (6, 1)
            while applier.tidy():
                continue

    def test_a_stage_can_be_given_up(self) -> None:
        with self.fresh() as applier:
            applier.stage_page(self.ask(applier), page(change(1, n1="a"), cursor=1, head=2), [])
            applier.restart_stage(full=False)
            assert applier.stage() is None
            with raises(SyncStateError):
                applier.publish()
            while applier.tidy():
                continue
            applier.apply(self.ask(applier), page(change(1, n1="a"), cursor=1))
            assert self.values(applier) == {1: "a"}

    # ---- the rest

    def test_with_nothing_to_do_nothing_is_done(self) -> None:
        with self.fresh() as applier:
            sequence = applier.sequence()
            assert not applier.adopt()
            assert not applier.tidy()
            assert applier.scope() is None
            assert applier.sequence() == sequence


__all__ = ["SyncApplierContract"]

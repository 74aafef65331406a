"""Planted bugs: pushing, and settling what was answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from unittest import mock

from msgspec.structs import replace

from entidb.db import entities
from entidb.db.records import (
    BaseRow,
    unpack_pending,
)
from entidb.db.replica import Inflight
from entidb.db.writer import Writer
from entidb.protocol import PushResult, Verdict
from entidb.server.service import DatabaseService
from entidb.sync.apply import applier, settle
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.batch import choose
from entidb.sync.apply.rebase import Rebase
from tests.planted.garden import CALM, WILD, Garden, bug


@bug("any-answer-clears-the-outbox", "NO-SILENT-LOSS", knobs=WILD)
def _any_answer_clears(garden: Garden) -> None:
    """A conflict takes the transaction out of the outbox."""

    def make(original: Any) -> Any:
        def run(self: Any, batch: Any, fresh: bool) -> Any:
            if not self._state.cursor:
                return original(self, batch, fresh)
            self._response = replace(
                self._response,
                results=[
                    PushResult(Verdict.ACCEPTED, 1) if r.verdict == Verdict.CONFLICT else r
                    for r in self._response.results
                ],
            )
            return original(self, batch, fresh)

        return run

    garden.replace(settle.Settling, "run", make)


@bug(
    "accepted-below-cursor-moves-base",
    "PREFIX",
    "NO-RESURRECTION",
    knobs=WILD | {"copy_device": 20},
)
def _accepted_moves_base(garden: Garden) -> None:
    """An old transaction that is accepted again becomes the base, though newer is known."""

    def make(original: Any) -> Any:
        def settle(
            self: Rebase, transaction: Any, version: int, stamp: int, cursor: int, instead: Any
        ) -> None:
            self.remove(transaction)
            for op in transaction.operations:
                ref = (op.collection, op.entity_id)
                row = self._writer.entity(ref)
                assert row is not None
                written = BaseRow(version, self._writer.device_id, stamp, op.payload)
                self._writer.set_base(ref, row, written)
                if row.pending == transaction.sequence:
                    self.show_base(ref)

        return settle

    garden.replace(Rebase, "settle_accepted", make)


@bug(
    "newer-write-settled-too",
    "READ-YOUR-WRITES",
    "PREFIX",
    "NO-SILENT-LOSS",
    "CONVERGE",
    "UNEXPECTED",
)
def _newer_write_settled(garden: Garden) -> None:
    """An answer to an older batch cleans entities that were written since."""

    def make(original: Any) -> Any:
        def newest(self: Any, batch: Any, index: int, *rest: Any) -> bool:
            sequence = batch.sequences[index]
            with mock.patch.object(entities, "unpack_pending", _pretend_newest(sequence)):
                settled: bool = original(self, batch, index, *rest)
            return settled

        return newest

    garden.replace(settle.Settling, "_settle_newest", make)


def _pretend_newest(sequence: int) -> Callable[[bytes], tuple[Any, ...]]:
    real = unpack_pending
    return lambda raw: (*real(raw)[:5], sequence)


@bug("stale-rows-settled", "READ-YOUR-WRITES", "NO-SILENT-LOSS", "CONVERGE", "UNEXPECTED")
def _stale_rows(garden: Garden) -> None:
    """Settling trusts the rows it read when the batch was made, whatever was written since."""

    def make(original: Any) -> Any:
        return lambda self, batch, fresh: original(self, batch, True)

    garden.replace(settle.Settling, "run", make)


@bug("look-of-yesterday", "LIVENESS", "SURFACED-ONCE", "UNEXPECTED")
def _look_of_yesterday(garden: Garden) -> None:
    """What a cycle knows of the device is believed until a cycle changes it, whatever a program
    has committed since."""
    times = [0]

    def make(original: Any) -> Any:
        def look(self: Any) -> Any:
            believed, now = self._look, original(self)
            times[0] += 1
            # What waits for a change would not end if none was ever seen.
            if believed is None or believed.state != now.state or times[0] > 100:
                times[0] = 0
                return now
            self._look = believed
            return believed

        return look

    garden.replace(DatabaseApplier, "look", make)


_SMALL_BATCHES: Final = CALM | {"push_operations_max": 1, "pause_ms": 3000, "ahead": 500}


# Where the first is rejected, what is built on it is withdrawn with it, and is sent all the same:
# that is SETTLE-FIRST.
@bug(
    "following-builds-on-the-first",
    "NO-FALSE-CONFLICT",
    "NO-LOST-UPDATE",
    "SETTLE-FIRST",
    "LIVENESS",
    "CONVERGE",
    knobs=_SMALL_BATCHES,
)
def _following_not_apart(garden: Garden) -> None:
    """The batch after the one in flight may touch what that one touches."""

    def make(original: Any) -> Any:
        def choose(
            writer: Any, limits: Any, inflight: Any, apart: Any = None, state: Any = None
        ) -> Any:
            return original(writer, limits, inflight, state=state)

        return choose

    garden.replace(applier, "choose", make)


@bug("following-forgotten", "LIVENESS", "NO-FALSE-CONFLICT", "UNEXPECTED", knobs=_SMALL_BATCHES)
def _following_forgotten(garden: Garden) -> None:
    """After a crash only the first of two batches in flight is sent again."""
    garden.replace(DatabaseApplier, "inflight", lambda original: lambda self: original(self)[:1])


@bug("in-flight-forgotten", "LIVENESS", "NO-FALSE-CONFLICT", knobs=WILD)
def _in_flight_forgotten(garden: Garden) -> None:
    """A batch without an answer is not sent again first."""
    garden.replace(DatabaseApplier, "inflight", lambda original: lambda self: [])


_MARKED: Final = WILD | {"marks": 1, "singles": 900, "think_ms": 1500}


@bug("sent-without-a-mark", "SETTLE-FIRST", knobs=_MARKED)
def _sent_without_a_mark(garden: Garden) -> None:
    """Where one transaction is all there is to push, nothing is stored before it is sent, whether
    its own commit has marked it or not."""

    def make(original: Any) -> Any:
        def prepare(self: DatabaseApplier, limits: Any) -> Any:
            with self.database.write("send") as writer:
                if writer.head.ready == 1 and writer.inflight is None:
                    return choose(writer, limits, [])
            return original(self, limits)

        return prepare

    garden.replace(DatabaseApplier, "prepare", make)


@bug("more-sent-than-is-marked", "SETTLE-FIRST", knobs=_MARKED | {"think_ms": 300})
def _more_than_marked(garden: Garden) -> None:
    """What a commit has marked as in flight takes along what was committed after it."""

    def make(original: Any) -> Any:
        def marked(self: DatabaseApplier, writer: Any, limits: Any) -> Any:
            batch = choose(writer, limits, [])
            if batch is not None:
                self.database.unsent = writer.unsent = None
                self._look = None
            return batch

        return marked

    garden.replace(DatabaseApplier, "_marked", make)


@bug(
    "marked-beside-a-batch",
    "PREFIX",
    "LIVENESS",
    "NO-FALSE-CONFLICT",
    "UNEXPECTED",
    "CLOCK",
    knobs=_MARKED | {"devices": 5, "think_ms": 400},
)
def _marked_beside(garden: Garden) -> None:
    """A commit marks its transaction as in flight in the place of the batch that was sent."""

    def make(original: Any) -> Any:
        def mark(self: Writer, sequence: int) -> None:
            self.set_inflight(Inflight([[sequence, sequence]]))

        return mark

    garden.replace(Writer, "mark", make)


@bug("round-decided-behind-the-head", "PULL-FIRST", knobs=CALM | {"rounds": 1, "devices": 4})
def _round_behind_the_head(garden: Garden) -> None:
    """A push beside a pull is decided for a device that has not seen what that pull brings."""
    garden.replace(DatabaseService, "_is_behind", lambda original: lambda *rest: False)


@bug("always-told-to-pull", "PULL-FIRST", knobs=CALM | {"rounds": 1})
def _always_behind(garden: Garden) -> None:
    """A device that has seen everything is answered as if it had not."""
    garden.replace(DatabaseService, "_is_behind", lambda original: lambda *rest: True)

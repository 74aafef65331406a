"""Whose work waits on a device: which pending transactions were committed under which subject, the
person or account that a token is for, and whose what was withdrawn is (R36).

What is pushed goes under the subject that committed it. A device that changes hands keeps what is
pending for the one before, and pushes it when they are back. Nothing is stored with a transaction:
ranges of local commits belong to others, for as long as something of them is pending or listed as
discarded, and the rest to who syncs now. Here is what they are, and
what is built on them; what changes them is ``sync``'s (``sync.apply.signing``).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from entidb.db.outbox import DiscardedTransaction, read_discarded, scan_ready_rows
from entidb.db.pending import decode_pending
from entidb.db.records import DISCARDED, HELD, READY, sequence_key, sequence_of
from entidb.db.replica import OtherWork, ReplicaState, ranges_of
from entidb.db.writer import Writer
from entidb.storage import Snapshot
from entidb.types import SEQUENCE_MAX

_COUNTED_ROWS = 10_000


def subject_of(state: ReplicaState, sequence: int) -> str | None:
    """Whose transaction the local commit ``sequence`` is; None: of who comes next."""
    at = bisect.bisect_right(state.others, sequence, key=lambda each: each.first) - 1
    if at >= 0 and sequence <= state.others[at].last:
        return state.others[at].subject
    return state.subject


def is_others(state: ReplicaState, sequence: int) -> bool:
    """Whether it was committed under another subject than the present one."""
    return bool(state.others) and subject_of(state, sequence) != state.subject


def own_gaps(others: Sequence[OtherWork], last: int) -> list[tuple[int, int]]:
    """The commits up to ``last`` that are in none of ``others``, as (first, last)."""
    gaps, start = [], 1
    for each in others:
        gaps.append((start, min(each.first - 1, last)))
        start = each.last + 1
    gaps.append((start, last))
    return [gap for gap in gaps if gap[0] <= gap[1]]


def has_pending(snapshot: Snapshot, first: int, last: int) -> bool:
    """Whether a transaction of these commits is in the outbox, ready or held."""
    return any(_keys(snapshot, kind, first, last, 1) for kind in (READY, HELD))


def has_discarded(snapshot: Snapshot, first: int, last: int) -> bool:
    """Whether a transaction of these commits was withdrawn and is listed (R4)."""
    return bool(_keys(snapshot, DISCARDED, first, last, 1))


def only_discarded(snapshot: Snapshot, work: OtherWork) -> list[OtherWork]:
    """The parts of ``work`` of which something is listed as discarded."""
    found = [sequence_of(key) for key in _keys(snapshot, DISCARDED, work.first, work.last, None)]
    return [OtherWork(first, last, work.subject) for first, last in ranges_of(found)]


def _keys(snapshot: Snapshot, kind: bytes, first: int, last: int, limit: int | None) -> list[bytes]:
    start, stop = sequence_key(kind, first), sequence_key(kind, last) + b"\0"
    return snapshot.scan_keys(start, stop, limit=limit)


def discarded_of(view: Writer) -> list[DiscardedTransaction]:
    """Withdrawn transactions, oldest first, each with whose it is."""
    state = view.sync_state
    found = read_discarded(view.snapshot)
    return [replace(each, subject=subject_of(state, each.sequence)) for each in found]


def count_others(snapshot: Snapshot, state: ReplicaState) -> dict[str, int]:
    """How many transactions wait for each of the other subjects."""
    counts: Counter[str] = Counter()
    for each in state.others:
        for kind in (READY, HELD):
            start, stop = sequence_key(kind, each.first), sequence_key(kind, each.last) + b"\0"
            while keys := snapshot.scan_keys(start, stop, limit=_COUNTED_ROWS):
                counts[each.subject] += len(keys)
                start = keys[-1] + b"\0"
    return dict(counts)


class Behind:
    """Which transactions of the present subject wait for another's: they were built on one that is
    pending. To be asked in the order in which they were committed."""

    def __init__(self, view: Writer, others: Sequence[OtherWork]) -> None:
        self._view = view
        self._state = ReplicaState(others=list(others))
        self._found: set[int] = set()

    def waits(self, key: bytes, row: bytes) -> bool:
        transaction = decode_pending(key, row)
        if not any(self._is_waited_for(op.previous) for op in transaction.operations):
            return False
        self._found.add(transaction.sequence)
        return True

    def _is_waited_for(self, previous: int) -> bool:
        """Whether an entity's pending transaction before this one keeps it from being sent."""
        if previous in self._found:
            return True
        return is_others(self._state, previous) and self._view.pending(previous) is not None


def roots_of(view: Writer, sequence: int) -> Iterator[int]:
    """A pending transaction, then those that are pending and that it was built on."""
    seen, left = {sequence}, [sequence]
    while left:
        at = left.pop()
        transaction = view.pending(at)
        if transaction is None:
            continue
        yield at
        before = {op.previous for op in transaction.operations if op.previous} - seen
        seen |= before
        left += before


def awaited_subject(view: Writer, state: ReplicaState, sequence: int) -> str | None:
    """For whom the pending transaction ``sequence`` waits: another subject committed it, or one
    that it was built on. None: for nobody but the server."""
    if not state.others:
        return None
    found = (each for each in roots_of(view, sequence) if is_others(state, each))
    return next((subject_of(state, each) for each in found), None)


def sendable(view: Writer, state: ReplicaState, last: int = SEQUENCE_MAX) -> bool:
    """Whether something that was committed up to ``last`` may go out under the present subject."""
    waiting = Behind(view, state.others)
    for first, end in own_gaps(state.others, last):
        for key, row in scan_ready_rows(view.snapshot, first, end):
            if not waiting.waits(key, row):
                return True
    return False


__all__ = [
    "Behind",
    "awaited_subject",
    "count_others",
    "discarded_of",
    "has_discarded",
    "has_pending",
    "is_others",
    "only_discarded",
    "own_gaps",
    "roots_of",
    "sendable",
    "subject_of",
]

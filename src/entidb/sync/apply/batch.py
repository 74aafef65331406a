"""A push batch: chosen from the outbox, and built again exactly as it was sent (R5).

Nothing here writes; who chooses a batch marks it as in flight in the same commit. What becomes of
the verdicts is ``settle``'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from entidb.db.pending import decode_pending, first_payload, read_first
from entidb.db.records import READY, end_of, sequence_key, sequence_of, versions_of
from entidb.db.replica import ReplicaState, ranges_of
from entidb.db.subjects import Behind
from entidb.db.writer import Writer
from entidb.errors import CorruptionError
from entidb.protocol import PushOperation, PushTransaction
from entidb.storage import Snapshot
from entidb.sync.apply.position import foreign_in_scope
from entidb.sync.apply.seam import BatchLimits, PushBatch
from entidb.types import OPERATION_OVERHEAD_BYTES

_READY_END = end_of(READY)
#: Keys read at a time to count them.
_COUNTED_ROWS = 20_000
#: Outbox rows read before it is known how large they are here.
_FIRST_ROWS = 32
#: And at most, so that they take little memory.
_ROWS_MAX = 2000


def check_ready(writer: Writer) -> None:
    """Raises ``CorruptionError`` where the outbox does not hold as many transactions as it should.
    A damaged page can hide rows, each of them sound: what is behind them would go out without
    what it was built on."""
    found, start = 0, READY
    while keys := writer.snapshot.scan_keys(start, _READY_END, limit=_COUNTED_ROWS):
        found += len(keys)
        if len(keys) < _COUNTED_ROWS:
            break
        start = keys[-1] + b"\0"
    if found != writer.head.ready:
        raise outbox_damaged(f"it should hold {writer.head.ready} transactions, {found} are found")


def outbox_damaged(how: str) -> CorruptionError:
    return CorruptionError(
        f"the outbox is damaged: {how}. Nothing is sent. Run `entidb verify` on this database, "
        "then restore a backup of it, or sync into a new directory"
    )


def choose(
    writer: Writer,
    limits: BatchLimits,
    inflight: list[list[int]],
    apart: frozenset[bytes] = frozenset(),
    state: ReplicaState | None = None,
) -> PushBatch | None:
    """The next batch, for the caller to mark as in flight in the commit this is part of (R5).

    Rows within the ascending ranges ``inflight`` belong to other batches, or have just been
    settled and are gone but still in the snapshot. The batch ends before the first transaction
    that touches an entity in ``apart``. ``state`` is what ``writer`` has, if that was read. What
    others have committed, and what was built on that, is for their own batches (R36)."""
    state = state or writer.sync_state
    if state.foreign_names and foreign_in_scope(writer, state):
        # What is built on another history has to meet this one first (R29).
        return None
    waiting = None
    if state.others:
        inflight = sorted([*inflight, *([each.first, each.last] for each in state.others)])
        waiting = Behind(writer, state.others)
    gaps = _gaps(inflight, limits.sequence_max)
    batch = batch_of(writer, state.cursor, gaps, limits, apart, waiting)
    return batch if batch.keys else None


def _gaps(ranges: list[list[int]], end: int) -> Iterator[tuple[int, int]]:
    """What is not in the ascending ``ranges`` up to ``end``, as (first, last)."""
    start = 0
    for first, last in ranges:
        if first > start:
            yield start, first - 1
        start = last + 1
    yield start, end


def still_fresh(batch: PushBatch, writer: Writer) -> None:
    """The commit under way, ``writer``'s, changes no entity of ``batch``."""
    if batch.moment.is_current():
        batch.moment = writer.moment


def batch_of(
    view: Writer,
    cursor: int,
    ranges: Iterable[Sequence[int]],
    limits: BatchLimits | None = None,
    apart: frozenset[bytes] = frozenset(),
    waiting: Behind | None = None,
) -> PushBatch:
    """The batch of the outbox rows in ``ranges``: all, or as many as ``limits`` allow, without
    those in ``waiting``, up to the first that touches an entity in ``apart``. Nothing rebases what
    is in flight, of which the base versions are read: it is the same however often it is built."""
    infos = view.catalogue.by_number
    batch = PushBatch([], [], [], set(), [], [], [], [], [], [], [], cursor, 0, view.moment)
    ids: list[bytes] = []
    entity_ids: list[bytes] = []
    stamps: list[int] = []
    payloads: list[bytes | None] = []
    operations = size = 0
    few = limits is None or len(infos) <= limits.collections_max
    left_out: set[bytes] = set()
    # What this very commit has moved, changed or withdrawn is read from it.
    pages = map(view.over, _pages(view.snapshot, ranges, limits))
    for key, row in itertools.chain.from_iterable(pages):
        if row is None:
            continue
        transaction_id, stamp, count, number, entity_id, previous, length = read_first(row)
        if limits is not None:
            if (limits.without and _leave_out(view, key, row, limits.without, left_out)) or (
                waiting is not None and waiting.waits(key, row)
            ):
                continue
            if len(batch.keys) >= limits.transactions_max:
                break
        operations += count
        size += len(row)
        if limits is not None and (operations > limits.operations_max or size > limits.bytes_max):
            if batch.keys:
                break
        if count == 1:
            entity_key = infos[number].prefix + entity_id
            if entity_key in apart:
                break
            if not few and _too_many(batch, [number], limits):
                break
            batch.numbers.append(number)
            batch.entity_keys.append(entity_key)
            entity_ids.append(entity_id)
            payloads.append(first_payload(row, length))
        else:
            writes = decode_pending(key, row).operations
            entity_keys = [infos[op.collection].prefix + op.entity_id for op in writes]
            if not apart.isdisjoint(entity_keys):
                break
            if not few and _too_many(batch, [op.collection for op in writes], limits):
                break
            batch.numbers += [op.collection for op in writes]
            batch.entity_keys += entity_keys
            entity_ids += [op.entity_id for op in writes]
            payloads += [op.payload for op in writes]
            previous = any(op.previous for op in writes)
        if previous:
            batch.chained.add(len(batch.keys))
        batch.keys.append(key)
        batch.rows.append(row)
        batch.counts.append(count)
        ids.append(transaction_id)
        stamps.append(stamp)
    if batch.keys:
        _add_transactions(view, batch, ids, stamps, entity_ids, payloads)
    return batch


def _leave_out(
    view: Writer, key: bytes, row: bytes, without: frozenset[int], left_out: set[bytes]
) -> bool:
    """Whether a transaction is kept back, or touches an entity of one that is (``left_out``)."""
    infos = view.catalogue.by_number
    writes = decode_pending(key, row).operations
    keys = [infos[op.collection].prefix + op.entity_id for op in writes]
    if sequence_of(key) not in without and left_out.isdisjoint(keys):
        return False
    left_out.update(keys)
    return True


def _too_many(batch: PushBatch, numbers: list[int], limits: BatchLimits | None) -> bool:
    """Whether the batch would name more collections than a message may."""
    assert limits is not None
    return bool(batch.keys) and len({*batch.numbers, *numbers}) > limits.collections_max


def _pages(
    snapshot: Snapshot, ranges: Iterable[Sequence[int]], limits: BatchLimits | None
) -> Iterator[list[tuple[bytes, bytes]]]:
    """Outbox rows in ``ranges``, so many at a time that they are about a batch together: rows are
    a hundred bytes or sixteen million."""
    bytes_max = BatchLimits().bytes_max if limits is None else limits.bytes_max
    rows = _FIRST_ROWS
    for first, last in ranges:
        start, stop = sequence_key(READY, first), sequence_key(READY, last) + b"\0"
        while page := snapshot.scan(start, stop, limit=rows):
            yield page
            if len(page) < rows:
                break
            start = page[-1][0] + b"\0"
            mean = sum([len(row) for _, row in page]) // len(page) + 1
            rows = max(_FIRST_ROWS, min(bytes_max // mean, _ROWS_MAX))


def _add_transactions(
    view: Writer,
    batch: PushBatch,
    ids: list[bytes],
    stamps: list[int],
    entity_ids: list[bytes],
    payloads: list[bytes | None],
) -> None:
    """The wire form of what is in ``batch``; ``ids`` and ``stamps`` are its transactions',
    ``entity_ids`` and ``payloads`` its operations'."""
    batch.sequences = list(map(sequence_of, batch.keys))
    batch.ranges = ranges_of(batch.sequences)
    batch.entity_rows = view.pending_rows(batch.entity_keys)
    indexes = {number: index for index, number in enumerate(dict.fromkeys(batch.numbers))}
    operations = list(
        map(
            PushOperation,
            map(indexes.__getitem__, batch.numbers),
            entity_ids,
            versions_of(batch.entity_rows),
            payloads,
        )
    )
    if len(operations) == len(ids):
        groups = [[operation] for operation in operations]
    else:
        ends = list(itertools.accumulate(batch.counts))
        groups = [
            operations[end - count : end] for end, count in zip(ends, batch.counts, strict=True)
        ]
    batch.transactions = list(map(PushTransaction, ids, stamps, groups))
    batch.collections = [view.catalogue.by_number[number].name for number in indexes]
    batch.bytes = OPERATION_OVERHEAD_BYTES * len(operations)
    batch.bytes += sum([len(payload) for payload in payloads if payload is not None])

"""WHOLE and READ-YOUR-WRITES: what a program reads is what it wrote, all of it."""

from __future__ import annotations

from collections.abc import Mapping

from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import OverruledValue
from entidb.db.pending import PendingTransaction, decode_pending
from entidb.db.records import (
    DIRTY,
    HELD,
    META_INFLIGHT,
    READY,
    payload_of,
    sequence_key,
    unpack_pending,
    version_of,
)
from entidb.db.replica import Inflight, decode_record
from entidb.protocol import PushRequest
from entidb.testing.invariants import GROUP_COLLECTION, group_is_whole
from entidb.testing.losers import leaves, lost_leaves
from entidb.testing.oracle import Ref
from entidb.testing.watch.commits import DeviceCommit, Records
from entidb.testing.watch.model import (
    DeviceModel,
)


def check_views(watch: DeviceModel, commit: DeviceCommit) -> None:
    records = commit.records
    groups: dict[bytes, None] = {}
    for info, entity_id in commit.entities:
        raw = records.get(info.prefix + entity_id)
        if info.name == GROUP_COLLECTION and entity_id[:15] not in groups:
            groups[entity_id[:15]] = None
            watch.checks.that(
                group_is_whole(records, info.prefix, entity_id),
                "WHOLE",
                f"{watch.name} shows half of a transaction on {entity_id.hex()}",
            )
        if raw is None or not raw[0] & DIRTY:
            continue
        sequence = unpack_pending(raw)[5]
        op_payload = _pending_payload(watch, commit, sequence, info.number, entity_id)
        watch.checks.that(
            op_payload == (payload_of(raw),),
            "READ-YOUR-WRITES",
            f"{watch.name} shows another value of {info.name}/{entity_id.hex()} than its newest "
            "pending write",
        )


def _pending_payload(
    watch: DeviceModel, commit: DeviceCommit, sequence: int, number: int, entity_id: bytes
) -> tuple[bytes | None] | None:
    pending: PendingTransaction | None = None
    if sequence in commit.outbox:
        pending = commit.outbox[sequence][1]
    elif sequence in commit.pending:
        pending = commit.pending[sequence]
    else:
        for kind in (READY, HELD):
            raw = commit.records.get(sequence_key(kind, sequence))
            if raw is not None:
                pending = decode_pending(sequence_key(kind, sequence), raw)
        commit.pending[sequence] = pending
    for op in () if pending is None else pending.operations:
        if op.entity_id == entity_id and op.collection == number:
            return (op.payload,)
    return None


def on_acknowledged(
    watch: DeviceModel, records: Records, transaction_id: bytes, writes: Mapping[Ref, bytes | None]
) -> None:
    """``commit`` returned: the writes are durable, whole, and in the view."""
    by_name = watch.catalogue.by_name
    infos = {name: by_name.get(name) for name, _ in writes}
    if any(info is None or info.synced for info in infos.values()):
        watch.checks.that(
            transaction_id in watch.outbox,
            "LOCAL-DURABLE",
            f"{watch.name} acknowledged {transaction_id.hex()}, which is not durable",
        )
        _check_row(watch, records, transaction_id, writes)
    for (name, entity_id), payload in writes.items():
        info = infos[name]
        raw = None if info is None else records.get(info.prefix + entity_id)
        watch.checks.that(
            (None if raw is None else payload_of(raw)) == payload,
            "READ-YOUR-WRITES",
            f"{watch.name} does not read what it has just written to {name}/{entity_id.hex()}",
        )


def on_push(watch: DeviceModel, records: Records, request: PushRequest) -> None:
    """Every operation names the version that the device has as its base: what another device wrote
    after that is a conflict (R13). And the device knows after a crash that it was sent (R5)."""
    raw = records.get(META_INFLIGHT)
    mark = None if raw is None else decode_record(Inflight, raw)
    marked = [] if mark is None else [*mark.ranges, *mark.after]
    numbers = [number for first, last in marked for number in range(first, last + 1)]
    rows = [records.get(sequence_key(READY, number)) for number in numbers]
    known = {row[:16] for row in rows if row is not None}
    for transaction in request.transactions:
        watch.checks.that(
            transaction.transaction_id in known,
            "SETTLE-FIRST",
            f"{watch.name} sends {transaction.transaction_id.hex()}, which is not in flight on its "
            "disk",
        )
        for op in transaction.operations:
            name = request.collections[op.collection]
            raw = records.get(watch.catalogue.by_name[name].prefix + op.entity_id)
            version = None if raw is None else version_of(raw)
            watch.checks.that(
                version == op.base_version,
                "NO-LOST-UPDATE",
                f"{watch.name} pushes a write of {name}/{op.entity_id.hex()} as made on "
                f"{op.base_version}, and has {version}",
            )


def on_recommitted(watch: DeviceModel, records: Records, entry: DiscardedTransaction) -> None:
    """A discarded transaction was committed again: all of it is in the view."""
    for name, entity_id, payload in entry.operations:
        info = watch.catalogue.by_name[name]
        raw = records.get(info.prefix + entity_id)
        watch.checks.that(
            (None if raw is None else payload_of(raw)) == payload,
            "READ-YOUR-WRITES",
            f"{watch.name} does not read what it has committed again, {name}/{entity_id.hex()}",
        )


def on_written_back(watch: DeviceModel, records: Records, value: OverruledValue) -> None:
    """An overruled value was written back: the view has it again."""
    raw = records.get(watch.catalogue.by_name[value.collection].prefix + value.id_bytes)
    view = leaves(None if raw is None else payload_of(raw))
    due = lost_leaves(value.base_payload, value.payload, value.won_payload)
    if value.path:
        held = leaves(value.payload)
        due = [((*value.path, *inner), leaf) for inner, leaf in held.items()]
    watch.checks.that(
        all(view.get(path) == leaf for path, leaf in due),
        "READ-YOUR-WRITES",
        f"{watch.name} does not read what it has written back to {value.collection}/"
        f"{value.id_bytes.hex()}",
    )


def _check_row(
    watch: DeviceModel, records: Records, transaction_id: bytes, writes: Mapping[Ref, bytes | None]
) -> None:
    sequence = watch.outbox[transaction_id]
    by_number = watch.catalogue.by_number
    for kind in (READY, HELD):
        raw = records.get(sequence_key(kind, sequence))
        if raw is None:
            continue
        row = decode_pending(sequence_key(kind, sequence), raw)
        stored = {
            (by_number[op.collection].name, op.entity_id): op.payload for op in row.operations
        }
        by_name = watch.catalogue.by_name
        due = {ref: payload for ref, payload in writes.items() if by_name[ref[0]].synced}
        watch.checks.that(
            stored == due, "WHOLE", f"{watch.name} keeps half of {transaction_id.hex()}"
        )

"""A pending transaction as a row of the outbox: what ``o`` and ``h`` hold (docs/storage-format.md).

Who reads and who changes the outbox is ``outbox``'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from struct import Struct as Packer
from typing import Final

from msgspec import Struct

from entidb.db.records import HELD, NOT_ONE, READY, sequence_key, sequence_of, unreadable

_OUTBOX = Packer(">16sQI")
_OUTBOX_OP = Packer(">I16sQi")
#: The head of a row and its first operation in one go: most transactions have no other.
_OUTBOX_FIRST = Packer(">16sQII16sQi")
#: Of a row (transaction id, timestamp, operations, collection, entity id, previous, length of the
#: payload)
read_first = _OUTBOX_FIRST.unpack_from
_pack_first = _OUTBOX_FIRST.pack
_FIRST_BYTES: Final = _OUTBOX_FIRST.size


def first_payload(row: bytes, length: int) -> bytes | None:
    """The payload of a row with one operation, which is ``length`` bytes long."""
    return row[_FIRST_BYTES:] if length >= 0 else None


class PendingOp(Struct, gc=False):
    """One write of a pending transaction. ``previous`` is the sequence of the pending transaction
    before this one that touched the same entity: the entity's chain, newest to oldest. A chain
    ends at 0 or at a transaction that is no longer in the outbox."""

    collection: int
    entity_id: bytes
    previous: int
    payload: bytes | None


class PendingTransaction(Struct):
    """One row of the outbox; ``sequence`` is the local commit that made it, and its key."""

    sequence: int
    transaction_id: bytes
    timestamp: int
    operations: list[PendingOp]
    held: bool = False

    def encode(self) -> bytes:
        if len(self.operations) == 1:
            (op,) = self.operations
            return encode_single(
                self.transaction_id,
                self.timestamp,
                op.collection,
                op.entity_id,
                op.payload,
                op.previous,
            )
        parts = [_OUTBOX.pack(self.transaction_id, self.timestamp, len(self.operations))]
        for op in self.operations:
            payload = op.payload
            if payload is None:
                parts.append(_OUTBOX_OP.pack(op.collection, op.entity_id, op.previous, -1))
            else:
                parts.append(
                    _OUTBOX_OP.pack(op.collection, op.entity_id, op.previous, len(payload))
                )
                parts.append(payload)
        return b"".join(parts)

    @property
    def key(self) -> bytes:
        return sequence_key(HELD if self.held else READY, self.sequence)


def encode_creation(
    transaction_id: bytes,
    timestamp: int,
    created: Sequence[tuple[int, Sequence[bytes], Sequence[bytes]]],
) -> bytes:
    """A ``PendingTransaction`` as it is encoded, from columns: of each collection its number, and
    id and payload of entities that no pending transaction has touched before."""
    if len(created) == 1 and len(created[0][1]) == 1:
        number, (entity_id,), (payload,) = created[0]
        return encode_single(transaction_id, timestamp, number, entity_id, payload, 0)
    parts = [_OUTBOX.pack(transaction_id, timestamp, sum(len(ids) for _, ids, _ in created))]
    for number, ids, payloads in created:
        heads = map(_OUTBOX_OP.pack, repeat(number), ids, repeat(0), map(len, payloads))
        parts += chain.from_iterable(zip(heads, payloads, strict=True))
    return b"".join(parts)


def encode_single(
    transaction_id: bytes,
    timestamp: int,
    number: int,
    entity_id: bytes,
    payload: bytes | None,
    previous: int,
) -> bytes:
    """A ``PendingTransaction`` of one operation, as it is encoded."""
    if payload is None:
        return _pack_first(transaction_id, timestamp, 1, number, entity_id, previous, -1)
    length = len(payload)
    head = _pack_first(transaction_id, timestamp, 1, number, entity_id, previous, length)
    return head + payload


def decode_pending(key: bytes, raw: bytes) -> PendingTransaction:
    operations = []
    try:
        transaction_id, timestamp, count = _OUTBOX.unpack_from(raw)
        at = _OUTBOX.size
        for _ in range(count):
            collection, entity_id, previous, length = _OUTBOX_OP.unpack_from(raw, at)
            at += _OUTBOX_OP.size
            if length < 0:
                payload = None
            else:
                payload = raw[at : at + length]
                at += length
            operations.append(PendingOp(collection, entity_id, previous, payload))
    except NOT_ONE as error:
        raise unreadable("a pending transaction", raw) from error
    return PendingTransaction(
        sequence_of(key), transaction_id, timestamp, operations, key[:1] == HELD
    )

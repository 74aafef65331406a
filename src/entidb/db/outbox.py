"""Reading the outbox and the discarded list. ``local`` (local commits) and the sync engine's
rebase change them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from entidb import cbor
from entidb.db.notebook import ROWS_MAX, payload_text, table
from entidb.db.pending import PendingTransaction, decode_pending
from entidb.db.records import DISCARDED, HELD, READY, end_of, sequence_key, sequence_of, unreadable
from entidb.errors import CborDecodeError
from entidb.storage import Snapshot
from entidb.types import SEQUENCE_MAX, uuid_from_bytes

_PAGE_ROWS = 1000


def scan_ready(
    snapshot: Snapshot, first: int = 0, last: int | None = None
) -> Iterator[PendingTransaction]:
    """Transactions ready to be pushed with ``first <= sequence <= last``, oldest first."""
    end = SEQUENCE_MAX if last is None else last
    for key, raw in scan_ready_rows(snapshot, first, end):
        yield decode_pending(key, raw)


def scan_ready_rows(snapshot: Snapshot, first: int, last: int) -> Iterator[tuple[bytes, bytes]]:
    """As ``scan_ready``, still encoded."""
    return _scan(snapshot, sequence_key(READY, first), sequence_key(READY, last) + b"\0")


def read_pending(snapshot: Snapshot) -> Iterator[PendingTransaction]:
    """Every transaction of the outbox, held ones included, oldest first."""
    ready = scan_ready(snapshot)
    held = (decode_pending(key, raw) for key, raw in _scan(snapshot, HELD, end_of(HELD)))
    one, other = next(ready, None), next(held, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one.sequence < other.sequence):
            assert one is not None
            yield one
            one = next(ready, None)
        else:
            yield other
            other = next(held, None)


def _scan(snapshot: Snapshot, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
    while page := snapshot.scan(start, stop, limit=_PAGE_ROWS):
        yield from page
        if len(page) < _PAGE_ROWS:
            return
        start = page[-1][0] + b"\0"


class DiscardedTransaction(Struct, frozen=True):
    """A withdrawn transaction (R4): what it wrote, why it was withdrawn, and what it lost to.

    ``operations`` are (collection, id bytes, payload or None); ``lost_to`` are (collection, id
    bytes, version, device id, timestamp, payload or None) of the server states that won.
    ``code`` is ``conflict``, ``depends``, or the server's refusal. ``subject`` is who committed it,
    or has taken it over: the person or account of the token (R36); None where no server has named
    anybody.
    """

    sequence: int
    transaction_id: bytes
    timestamp: int
    code: str
    message: str
    operations: list[list[Any]]
    lost_to: list[list[Any]]
    at_ms: int
    subject: str | None = None  # not of the record: what the device knows of ranges of commits

    @property
    def id(self) -> uuid.UUID:
        """What named it on its whole way (R3)."""
        return uuid_from_bytes(self.transaction_id)

    def values(self) -> list[tuple[str, uuid.UUID, Any]]:
        """(collection, id, value or None) of each operation."""
        return [
            (name, uuid_from_bytes(raw), None if p is None else cbor.decode_trusted(p))
            for name, raw, p in self.operations
        ]

    def __repr__(self) -> str:
        writes = _writes_of(self)
        first = "; ".join(f"{name!r} {value}" for name, _, value in writes[:2])
        more = f" and {len(writes) - 2} more" if len(writes) > 2 else ""
        return f"<DiscardedTransaction {self.id}, {self.code}: {self.message} ({first}{more})>"

    def _repr_html_(self) -> str:
        writes = _writes_of(self)
        more = f"there are {len(writes) - ROWS_MAX} more" if len(writes) > ROWS_MAX else ""
        title = f"Discarded {self.id}, {self.code}: {self.message}"
        return table(title, ("collection", "id", "value"), writes[:ROWS_MAX], more)


def _writes_of(discarded: DiscardedTransaction) -> list[tuple[str, str, str]]:
    return [
        (name, str(uuid_from_bytes(raw)), payload_text(payload))
        for name, raw, payload in discarded.operations
    ]


def discard_key(discarded: DiscardedTransaction) -> bytes:
    return sequence_key(DISCARDED, discarded.sequence)


def read_discarded(snapshot: Snapshot) -> list[DiscardedTransaction]:
    return [_decode_discarded(key, raw) for key, raw in snapshot.scan(DISCARDED, end_of(DISCARDED))]


def _decode_discarded(key: bytes, raw: bytes) -> DiscardedTransaction:
    try:
        return DiscardedTransaction(sequence_of(key), **cbor.decode_trusted(raw))
    except (CborDecodeError, TypeError) as error:
        raise unreadable("a discarded transaction", raw) from error

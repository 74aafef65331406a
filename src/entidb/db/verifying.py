"""Verify: every record of a database is read once, and held against those that it goes with.

It reads one snapshot, beside normal work, and changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from operator import lt

from entidb import cbor
from entidb.db.core import Core
from entidb.db.index_verify import index_faults
from entidb.db.overruled import read_head, values_of
from entidb.db.pending import decode_pending
from entidb.db.records import (
    ACCEPTED,
    BASE,
    CONFLICT,
    COUNT,
    DIRTY,
    DISCARDED,
    ENTITY,
    FEED,
    HAS_BASE,
    HELD,
    IS_HELD,
    META_HEAD,
    OVERRULED,
    READY,
    STALE,
    TERM,
    EntityRow,
    Head,
    base_key,
    decode_accepted,
    decode_base,
    decode_entity,
    decode_head,
    decode_stale,
    end_of,
    feed_key,
    sequence_of,
    split_feed_key,
    split_numbered_key,
    unpack_u64,
)
from entidb.db.writer import Ref, Writer
from entidb.errors import CorruptionError, EntiDBError
from entidb.types import TERM_BYTES

#: Rows read at a time.
_PAGE = 2_000
#: Pending transactions remembered: entities of several may alternate.
_PENDINGS_KEPT = 64


def verify(database: Core) -> list[str]:
    """Every fault found, one line each. Reads everything once, on one snapshot."""
    faults = list(database.storage.verify())
    if faults:
        # Records that cannot be trusted would only produce follow-up noise.
        return faults
    with database.view() as view:
        return [*_Verify(view).run(), *index_faults(view, database.index_functions)]


class _Verify:
    def __init__(self, view: Writer) -> None:
        self._view = view
        self._snapshot = view.snapshot
        self._tables = {info.table: info for info in view.catalogue.by_name.values()}
        self._unused = {table for table, _ in view.catalogue.garbage}
        self._garbage = {number for _, number in view.catalogue.garbage}
        self._live: dict[int, int] = {}
        self._stale: set[bytes] = set()
        self._stale_there = 0
        self._overruled = 0
        self._pendings: dict[int, tuple[bool, set[Ref]] | None] = {}
        stage = view.stage
        if stage is not None:
            self._unused |= {*stage.tables.values(), *stage.deltas.values()}

    def run(self) -> Iterator[str]:
        yield from self._rows("entity", ENTITY, self._entity)
        yield from self._rows("count", COUNT, self._count)
        yield from self._missing_counts()
        yield from self._rows("list of stale feed rows", STALE, self._stale_list)
        yield from self._rows("feed row", FEED, self._feed)
        yield from self._rows("outbox transaction", READY, self._pending)
        yield from self._rows("held transaction", HELD, self._pending)
        yield from self._rows("base", BASE, self._base)
        yield from self._rows("conflict", CONFLICT, self._conflict)
        yield from self._rows("accepted transaction", ACCEPTED, self._accepted)
        yield from self._rows("term", TERM, self._term)
        yield from self._rows("list of overruled values", OVERRULED, self._overruled_list)
        yield from self._totals()

    def _rows(
        self, what: str, kind: bytes, check: Callable[[bytes, bytes], Iterator[str]]
    ) -> Iterator[str]:
        """The faults of every row of a kind. One that cannot even be read is a fault too, and
        must not hide those of the rows behind it."""
        for key, raw in self._scan(kind):
            try:
                yield from check(key, raw)
            except (CorruptionError, struct.error, LookupError, ValueError, TypeError) as error:
                yield f"{what} {key[1:].hex()} cannot be read: {error!r}"

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        start = prefix
        while page := self._snapshot.scan(start, end_of(prefix), limit=_PAGE):
            yield from page
            start = page[-1][0] + b"\0"

    def _entity(self, key: bytes, raw: bytes) -> Iterator[str]:
        table, entity_id = split_numbered_key(key)
        info = self._tables.get(table)
        if info is None:
            if table not in self._unused:
                yield f"entity {entity_id.hex()} is in table {table}, which no collection has"
            return
        row = decode_entity(raw)
        name = f"{info.name}/{entity_id.hex()}"
        if row.payload is not None:
            self._live[info.number] = self._live.get(info.number, 0) + 1
            try:
                cbor.check(row.payload)
            except EntiDBError as error:
                yield f"entity {name}: {error}"
        yield from self._entity_links(info.number, entity_id, row, name)

    def _count(self, key: bytes, raw: bytes) -> Iterator[str]:
        number = unpack_u64(bytes(4) + key[1:])
        live = self._live.pop(number, 0)
        if unpack_u64(raw) != live:
            name = self._view.catalogue.by_number[number].name
            yield f"collection {name} counts {unpack_u64(raw)}, holds {live}"

    def _missing_counts(self) -> Iterator[str]:
        for number, live in self._live.items():
            yield f"collection number {number} holds {live} and counts nothing"

    def _entity_links(
        self, number: int, entity_id: bytes, row: EntityRow, name: str
    ) -> Iterator[str]:
        if row.sequence and self._snapshot.get(feed_key(row.sequence, number, entity_id)) is None:
            yield f"entity {name}: its feed row at {row.sequence} is missing"
        has_base = self._snapshot.get(base_key(number, entity_id)) is not None
        if has_base != bool(row.flags & DIRTY and row.flags & HAS_BASE):
            yield f"entity {name}: base row and flags disagree"
        if not row.pending:
            return
        held = self._held_writes(row.pending, (number, entity_id))
        if held is None:
            yield f"entity {name}: pending transaction {row.pending} is missing"
        elif bool(row.flags & IS_HELD) != held:
            yield f"entity {name}: held flag and transaction {row.pending} disagree"

    def _held_writes(self, sequence: int, ref: Ref) -> bool | None:
        """Whether the pending transaction that writes ``ref`` is held; None if there is no such
        transaction. What it writes is remembered: the entities of one transaction mostly come
        together, and it may have a hundred thousand of them."""
        if sequence not in self._pendings:
            pending = self._view.pending(sequence)
            if len(self._pendings) >= _PENDINGS_KEPT:
                self._pendings.pop(next(iter(self._pendings)))
            self._pendings[sequence] = (
                None
                if pending is None
                else (pending.held, {(op.collection, op.entity_id) for op in pending.operations})
            )
        known = self._pendings[sequence]
        return None if known is None or ref not in known[1] else known[0]

    def _stale_list(self, key: bytes, raw: bytes) -> Iterator[str]:
        listed = decode_stale(raw)
        if twice := self._stale.intersection(listed):
            yield f"{len(twice)} feed rows are listed as stale twice"
        self._stale.update(listed)

    def _feed(self, key: bytes, raw: bytes) -> Iterator[str]:
        sequence, number, entity_id = split_feed_key(key)
        if number == 0:
            return
        info = self._view.catalogue.by_number.get(number)
        if info is None:
            yield f"feed row at {sequence} names unknown collection {number}"
            return
        found = self._snapshot.get(info.prefix + entity_id)
        stale = found is None or decode_entity(found).sequence != sequence
        self._stale_there += key in self._stale
        # Rows of a replaced table stay until it is emptied.
        if stale and key not in self._stale and number not in self._garbage:
            yield f"feed row at {sequence} for {info.name}/{entity_id.hex()} is stale"
        if key in self._stale and not stale:
            yield f"feed row at {sequence} for {info.name}/{entity_id.hex()} is listed as stale"

    def _pending(self, key: bytes, raw: bytes) -> Iterator[str]:
        transaction = decode_pending(key, raw)
        for op in transaction.operations:
            info = self._view.catalogue.by_number.get(op.collection)
            row_raw = info and self._snapshot.get(info.prefix + op.entity_id)
            if not row_raw or decode_entity(row_raw).pending < transaction.sequence:
                yield (
                    f"outbox transaction {transaction.sequence}: entity "
                    f"{op.entity_id.hex()} does not name it"
                )

    def _base(self, key: bytes, raw: bytes) -> Iterator[str]:
        number, entity_id = split_numbered_key(key)
        try:
            cbor.check(decode_base(raw).payload or b"")
        except EntiDBError as error:
            yield f"base of {entity_id.hex()} in collection {number}: {error}"
        row = self._view.entity((number, entity_id))
        if row is None or not row.pending:
            yield f"base of {entity_id.hex()} in collection {number} has nothing pending on it"

    def _conflict(self, key: bytes, raw: bytes) -> Iterator[str]:
        number, entity_id = split_numbered_key(key)
        row = self._view.entity((number, entity_id))
        if row is None or not row.pending:
            yield f"conflict on {entity_id.hex()} has nothing pending"
        cbor.check(raw)

    def _term(self, key: bytes, raw: bytes) -> Iterator[str]:
        sequence = sequence_of(key)
        if sequence > self._view.head.sequence:
            yield f"a term begins with commit {sequence}, beyond the head"
        if len(raw) != TERM_BYTES:
            yield f"the term that begins with commit {sequence} has {len(raw)} bytes"

    def _accepted(self, key: bytes, raw: bytes) -> Iterator[str]:
        if decode_accepted(raw)[0] > self._head().sequence:
            yield f"accepted transaction {key[1:].hex()} is above the head"

    def _overruled_list(self, key: bytes, raw: bytes) -> Iterator[str]:
        values = values_of(raw)
        for value in values:
            for payload in (value.payload, value.won_payload):
                if payload is not None:
                    cbor.check(payload)
        numbers = [value.number for value in values]
        self._overruled += len(numbers)
        ascending = all(map(lt, numbers, numbers[1:]))
        above = read_head(self._view).next <= max(numbers, default=0)
        if not numbers or numbers[0] < sequence_of(key) or not ascending or above:
            yield f"list of overruled values {sequence_of(key)} has the numbers {numbers[:10]}"

    def _totals(self) -> Iterator[str]:
        head = self._head()
        if (counted := read_head(self._view).count) != self._overruled:
            yield f"{counted} overruled values are counted, {self._overruled} are listed"
        if (counted := self._view.stale_rows) != len(self._stale):
            yield f"{counted} stale feed rows are counted, {len(self._stale)} are listed"
        if missing := len(self._stale) - self._stale_there:
            yield f"{missing} feed rows that are listed as stale are not there"
        for name, counted, kind in (
            ("ready", head.ready, READY),
            ("held", head.held, HELD),
            ("conflicts", head.conflicts, CONFLICT),
            ("discarded", head.discarded, DISCARDED),
        ):
            real = sum(1 for _ in self._scan(kind))
            if counted != real:
                yield f"the head counts {counted} {name}, there are {real}"

    def _head(self) -> Head:
        raw = self._snapshot.get(META_HEAD)
        return Head() if raw is None else decode_head(raw)

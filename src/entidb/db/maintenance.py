"""Checks and housekeeping: verify everything, empty replaced tables, purge tombstones (R28).

All of it runs in bounded commits beside normal work, and can be stopped at any point.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from operator import lt
from typing import Any

from entidb import cbor
from entidb.db.core import Core
from entidb.db.images import pinned_to
from entidb.db.index_verify import index_faults, sweep_places
from entidb.db.overruled import read_head, values_of
from entidb.db.pending import decode_pending
from entidb.db.records import (
    ACCEPTED,
    BASE,
    CLOCK_MARK,
    CONFLICT,
    COUNT,
    DIRTY,
    DISCARDED,
    ENTITY,
    FEED,
    HAS_BASE,
    HELD,
    IS_HELD,
    META_ADOPT,
    META_FLOOR,
    META_FORMAT,
    META_HEAD,
    OVERRULED,
    READY,
    STALE,
    EntityRow,
    Head,
    base_key,
    count_key,
    decode_accepted,
    decode_base,
    decode_entity,
    decode_head,
    decode_stale,
    end_of,
    feed_key,
    format_of,
    pack_u64,
    sequence_key,
    sequence_of,
    split_feed_key,
    split_numbered_key,
    unpack_u64,
)
from entidb.db.replica import Adopt, decode_record
from entidb.db.writer import Ref, Writer
from entidb.errors import CorruptionError, EntiDBError

SWEEP_ROWS = 5_000
PURGE_ROWS = 5_000
#: One clock mark an hour is fine enough for a retention of days; and so many in one of less.
CLOCK_MARK_MS = 3_600_000
CLOCK_MARKS_MIN = 24
_PAGE = 2_000
#: Pending transactions remembered by ``verify``: entities of several may alternate.
_PENDINGS_KEPT = 64

# ---------------------------------------------------------------- replaced tables


def sweep_garbage(database: Core) -> bool:
    """Empty a bounded part of the tables that were replaced; whether there may be more."""
    with database.view() as view:
        if not _sweepable(view):
            return False
    with database.write() as writer:
        chosen = _sweepable(writer)
        if not chosen:
            return False
        table, number = chosen[0]
        more = writer.sweep_table(table, number, SWEEP_ROWS)
        if not more and not sweep_places(writer, table, number, SWEEP_ROWS):
            writer.set_catalogue(writer.catalogue.swept(table))
    return True


def _sweepable(writer: Writer) -> list[tuple[int, int]]:
    """Garbage tables that nothing reads any more: an adoption may still need its sources."""
    if not writer.catalogue.garbage:
        return []
    raw = writer.get(META_ADOPT)
    used = set() if raw is None else {each[1] for each in decode_record(Adopt, raw).sources}
    return [pair for pair in writer.catalogue.garbage if pair[0] not in used]


# ---------------------------------------------------------------- tombstones (R28)


def clock_mark_ms(retention_ms: int) -> int:
    """Milliseconds between two clock marks, so that they are fine enough for a retention."""
    return min(CLOCK_MARK_MS, max(1, retention_ms // CLOCK_MARKS_MIN))


def mark_clock(writer: Writer, every_ms: int = CLOCK_MARK_MS) -> int | None:
    """Remember, once in ``every_ms``, the present time and commit sequence: the timestamps of
    entities come from devices and may be old. Marks from the future are dropped: they were made
    while the clock was wrong, and no new one would be made until that time has come (R27).

    Returns the time of the newest mark that is there already and good: none is due before
    ``every_ms`` after it. None where this commit is to leave one."""
    stop = CLOCK_MARK + pack_u64(2**64 - 1)
    newest = writer.snapshot.scan_keys(CLOCK_MARK, stop, limit=1, reverse=True)
    made_ms = unpack_u64(newest[0][1:]) if newest else None
    if made_ms is not None and made_ms > writer.now_ms:
        for key in writer.snapshot.scan_keys(CLOCK_MARK + pack_u64(writer.now_ms + 1), stop):
            writer.delete(key)
        made_ms = None
    if made_ms is None or made_ms + every_ms <= writer.now_ms:
        writer.put(CLOCK_MARK + pack_u64(writer.now_ms), pack_u64(writer.head.sequence))
        return None
    return made_ms


def sequence_at(database: Core, time_ms: int) -> int:
    """The newest commit sequence known to be at least as old as ``time_ms``; 0 if none is."""
    if time_ms <= 0:
        return 0
    with database.storage.snapshot() as snapshot:
        found = snapshot.scan(
            CLOCK_MARK, CLOCK_MARK + pack_u64(time_ms) + b"\0", limit=1, reverse=True
        )
    return unpack_u64(found[0][1]) if found else 0


def purge_tombstones(database: Core, up_to: int) -> int:
    """Forget tombstones with a sequence of at most ``up_to``, and the ids of transactions accepted
    before; the floor moves in the same commits (R28), and not beyond an image that a device may be
    on its way with (R35). Returns how many tombstones were removed.

    A tombstone with pending changes stays: it is their base."""
    purged = 0
    while True:
        with database.write() as writer:
            floor = read_floor(writer)
            target = min(up_to, writer.head.sequence, pinned_to(writer))
            if floor >= target:
                break
            # A feed row may be stale, but not of an entity that is forgotten.
            writer.sweep_stale()
            keys, reached = _feed_part(writer, floor, target)
            for key in keys:
                purged += _purge_row(writer, key)
            writer.put(META_FLOOR, pack_u64(reached))
    _forget_accepted(database)
    _forget_clock_marks(database)
    return purged


def read_floor(writer: Writer) -> int:
    raw = writer.get(META_FLOOR)
    return 0 if raw is None else unpack_u64(raw)


def _feed_part(writer: Writer, floor: int, target: int) -> tuple[list[bytes], int]:
    """Feed keys from the floor on, at most to ``target``, and the sequence they reach."""
    start, stop = sequence_key(FEED, floor + 1), sequence_key(FEED, target + 1)
    keys = writer.snapshot.scan_keys(start, stop, limit=PURGE_ROWS)
    if len(keys) < PURGE_ROWS:
        return keys, target
    last = split_feed_key(keys[-1])[0]
    cut = [key for key in keys if split_feed_key(key)[0] != last]
    if cut:
        return cut, last - 1
    return writer.snapshot.scan_keys(start, sequence_key(FEED, last + 1)), last


def _purge_row(writer: Writer, key: bytes) -> int:
    sequence, number, entity_id = split_feed_key(key)
    if number == 0 or number not in writer.catalogue.by_number:
        return 0
    row = writer.entity((number, entity_id))
    if row is None or row.payload is not None or row.pending or row.sequence != sequence:
        return 0
    writer.remove_entity((number, entity_id), row)
    return 1


def _forget_accepted(database: Core) -> None:
    """R14: ids are remembered at least as long as tombstones are."""
    start = ACCEPTED
    while True:
        with database.write() as writer:
            floor = read_floor(writer)
            rows = writer.snapshot.scan(start, end_of(ACCEPTED), limit=PURGE_ROWS)
            for key, raw in rows:
                if decode_accepted(raw)[0] <= floor:
                    writer.delete(key)
        if len(rows) < PURGE_ROWS:
            return
        start = rows[-1][0] + b"\0"


def _forget_clock_marks(database: Core) -> None:
    with database.write() as writer:
        floor = read_floor(writer)
        rows = writer.snapshot.scan(CLOCK_MARK, end_of(CLOCK_MARK), limit=PURGE_ROWS)
        for key, raw in rows:
            if unpack_u64(raw) < floor:
                writer.delete(key)


# ---------------------------------------------------------------- verify


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


# ---------------------------------------------------------------- dump


def dump(database: Core) -> Iterator[tuple[str, bytes, int, bytes]]:
    """(collection, id, version, payload) of every synchronised entity, in order: what must be
    byte for byte the same on the server and on every device that is in step with it."""
    with database.view() as view:
        for name, info in sorted(view.catalogue.by_name.items()):
            if not info.synced:
                continue
            for page in view.table_pages(info.table, _PAGE):
                for entity_id, row in page:
                    if row.payload is not None:
                        yield name, entity_id, row.version, row.payload


def inspect(database: Core) -> dict[str, Any]:
    """What is in this database, for people and for ``entidb inspect``: sizes in bytes."""
    with database.view() as view:
        state = view.sync_state
        raw = view.snapshot.get(META_HEAD)
        head = Head() if raw is None else decode_head(raw)
        collections = {
            name: {
                "entities": unpack_u64(view.snapshot.get(count_key(info.number)) or bytes(8)),
                "synced": info.synced,
            }
            for name, info in sorted(view.catalogue.by_name.items())
        }
        floor = read_floor(view)
        overruled = read_head(view).count
        raw_format = view.snapshot.get(META_FORMAT)
        assert raw_format is not None, "a database that is open has a format"
    storage = database.storage.info()
    return {
        "role": database.role.value,
        "device_id": database.device_id.hex(),
        "format": format_of(raw_format),
        "created_ms": database.created_ms,
        "sequence": head.sequence,
        "floor": floor,
        "collections": collections,
        "pending": head.ready,
        "held": head.held,
        "conflicts": head.conflicts,
        "discarded": head.discarded,
        "overruled": overruled,
        "history": (database.history or state.history or b"").hex() or None,
        "db_id": state.db_id,
        "cursor": state.reached,
        "storage": {
            "kind": storage.kind,
            "path": storage.path,
            "file_bytes": storage.file_bytes,
            "used_bytes": storage.used_bytes,
            "map_bytes": storage.map_bytes,
            "records": storage.records,
        },
    }


__all__ = [
    "dump",
    "inspect",
    "clock_mark_ms",
    "mark_clock",
    "purge_tombstones",
    "read_floor",
    "sequence_at",
    "sweep_garbage",
    "verify",
]

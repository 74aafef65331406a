"""Housekeeping: empty replaced tables, purge tombstones (R28).

All of it runs in bounded commits beside normal work, and can be stopped at any point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from entidb.db.core import Core
from entidb.db.images import pinned_to
from entidb.db.index_verify import sweep_places
from entidb.db.overruled import read_head
from entidb.db.records import (
    ACCEPTED,
    CLOCK_MARK,
    FEED,
    META_ADOPT,
    META_FLOOR,
    META_FORMAT,
    META_HEAD,
    Head,
    count_key,
    decode_accepted,
    decode_head,
    end_of,
    format_of,
    pack_u64,
    sequence_key,
    split_feed_key,
    unpack_u64,
)
from entidb.db.replica import Adopt, decode_record
from entidb.db.terms import forget_terms
from entidb.db.writer import Writer

SWEEP_ROWS = 5_000
PURGE_ROWS = 5_000
#: One clock mark an hour is fine enough for a retention of days; and so many in one of less.
CLOCK_MARK_MS = 3_600_000
CLOCK_MARKS_MIN = 24
_PAGE = 2_000

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
    with database.write() as writer:
        forget_terms(writer, PURGE_ROWS)
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
]

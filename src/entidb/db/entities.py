"""The rows of entities within one commit: the one room that writes them.

An entity has a row in the table of its collection; a base row while what is pending was made from
something; a place in the feed, at its latest change (R11); and it counts. Nothing else in the
project writes such rows: who changes an entity calls a verb here, says what changes, and cannot
forget half of it. Nothing is decided here.

Where thousands change at once there is a form of the verb in columns, without an object for each.
The plain form is the law: what the other leaves behind is the same, byte for byte.

    the law           in columns        what becomes of an entity
    show              show_all          its row is replaced, and readers see it change
    put_entity                          its row is replaced; readers see nothing of that
    add_entity        add_entities      it comes to be, here
    accept            accept_all        the server takes a write to it (R11)
    clean             clean_all         what was pending is the server's now, with the same value
    stage_entity      stage_entities    it is put into a table that no reader sees (R20)
    carry_over                          it goes on in another table, with what is pending
    remove_entity     sweep_table       it is forgotten altogether

``replace_tables`` changes the tables of whole collections. A ``watcher`` is called with every
change of a value in any table, from whichever of these; nothing is spent on that while there is
none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from operator import add, ge
from typing import Any

from entidb import cbor
from entidb.db.catalogue import CollectionInfo
from entidb.db.overlay import Overlay, Ref
from entidb.db.records import (
    DIRTY,
    FEED,
    HAS_BASE,
    NO_ID,
    PENDING_HEAD,
    REMOTE,
    TOMBSTONE,
    BaseRow,
    EntityRow,
    absent_base,
    base_key,
    decode_base,
    decode_entity,
    end_of,
    feed_key,
    pack_entity,
    pack_feed_key,
    pack_pending,
    payload_of,
    table_prefix,
    unpack_pending,
    unpack_sequence,
    version_of,
)
from entidb.db.staged import ValuesOfRows
from entidb.db.watcher import Payloads, Watcher, by_info
from entidb.errors import CorruptionError
from entidb.types import ID_BYTES


class Entities(Overlay):
    """The entities of one commit being put together."""

    watcher: Watcher | None = None

    # ------------------------------------------------------------ reading

    def entity(self, ref: Ref) -> EntityRow | None:
        raw = self.get(self.catalogue.by_number[ref[0]].prefix + ref[1])
        return None if raw is None else decode_entity(raw)

    def entities(self, keys: Sequence[bytes]) -> list[EntityRow | None]:
        """As ``entity``, for each of ``keys``: a collection's prefix and an id."""
        return [None if raw is None else decode_entity(raw) for raw in self.get_many(keys)]

    def entity_in(self, table: int, entity_id: bytes) -> EntityRow | None:
        """The row of an entity in a table that need not be its collection's."""
        raw = self.get(table_prefix(table) + entity_id)
        return None if raw is None else decode_entity(raw)

    def table_rows(
        self, table: int, limit: int, after: bytes = b""
    ) -> list[tuple[bytes, EntityRow]]:
        """(id, row) of the first ``limit`` entities behind the id ``after`` that a table had
        before this commit."""
        prefix = table_prefix(table)
        start = prefix + after + b"\0" if after else prefix
        rows = self.snapshot.scan(start, end_of(prefix), limit=limit)
        return [(key[-ID_BYTES:], decode_entity(raw)) for key, raw in rows]

    def table_pages(self, table: int, limit: int) -> Iterator[list[tuple[bytes, EntityRow]]]:
        """All of them, ``limit`` at a time."""
        after = b""
        while page := self.table_rows(table, limit, after):
            yield page
            after = page[-1][0]

    def pending_rows(self, keys: Sequence[bytes]) -> list[bytes]:
        """The rows of entities that the outbox has changes of. Raises ``CorruptionError`` for
        one that knows nothing of it."""
        rows = self.get_many(keys)
        found = [row for row in rows if row and row[0] & DIRTY]
        if len(found) < len(rows):
            at = next(n for n, row in enumerate(rows) if not row or not row[0] & DIRTY)
            raise CorruptionError(
                f"entity {keys[at][-ID_BYTES:].hex()} has pending changes and no row that says "
                "so; nothing was sent. Run verify, and restore a backup"
            )
        return found

    # ------------------------------------------------------------ one row over another

    def put_entity(self, ref: Ref, row: EntityRow, old: EntityRow | None) -> None:
        """Store ``row`` over ``old`` and keep the live count. Its place in the feed stays."""
        info = self.catalogue.by_number[ref[0]]
        self.changes[info.prefix + ref[1]] = row.encode()
        was = None if old is None else old.payload
        if (row.payload is None) != (was is None):
            self.count(ref[0], 1 if was is None else -1)
        if self.watcher is not None and was != row.payload:
            self.watcher.changed(info, [ref[1]], [was], [row.payload])

    def show(self, ref: Ref, row: EntityRow, old: EntityRow | None, sequence: int) -> None:
        """Store ``row`` as something readers see changed at ``sequence``: entity, count, feed."""
        self.move_feed(ref, 0 if old is None else old.sequence, sequence)
        row.sequence = sequence
        self.put_entity(ref, row, old)

    def show_all(
        self, changes: Sequence[tuple[Ref, BaseRow, EntityRow | None]], sequence: int
    ) -> None:
        """As ``show`` of what the server has now, over rows without pending changes, in columns: no
        entity twice, and no deletion."""
        infos = self.catalogue.by_number
        rows: dict[bytes, bytes] = {}
        stale: list[bytes] = []
        born: list[int] = []
        for (number, entity_id), new, old in changes:
            if old is not None and old.sequence:
                stale.append(pack_feed_key(FEED, old.sequence, number, entity_id))
            if old is None or old.payload is None:
                born.append(number)
            head = pack_entity(REMOTE, sequence, new.version, new.device_id, new.timestamp)
            assert new.payload is not None, "a deletion is shown by `show`"
            rows[infos[number].prefix + entity_id] = head + new.payload
            rows[pack_feed_key(FEED, sequence, number, entity_id)] = b""
        for key in stale:
            self.leave_feed(key)
        self.changes.update(rows)
        for number, count in Counter(born).items():
            self.count(number, count)
        if self.watcher is not None:
            theirs = [infos[number] for (number, _), _, _ in changes]
            ids = [entity_id for (_, entity_id), _, _ in changes]
            before = [None if old is None else old.payload for _, _, old in changes]
            for info, told in by_info(theirs, ids, before, [new.payload for _, new, _ in changes]):
                self.watcher.changed(info, *told)

    def remove_entity(self, ref: Ref, old: EntityRow) -> None:
        """Forget the row altogether, tombstone and feed row included."""
        info = self.catalogue.by_number[ref[0]]
        self.changes[info.prefix + ref[1]] = None
        if old.sequence:
            self.changes[feed_key(old.sequence, *ref)] = None
        self.count(ref[0], -(old.payload is not None))
        if self.watcher is not None and old.payload is not None:
            self.watcher.changed(info, [ref[1]], [old.payload], [None])

    # ------------------------------------------------------------ new entities of a local commit

    def add_entity(
        self,
        info: CollectionInfo,
        entity_id: bytes,
        payload: bytes,
        sequence: int,
        timestamp: int,
        version: int,
    ) -> None:
        """Store an entity that has no row yet, shown at ``sequence``: where the collection
        synchronises pending by it, on the absence at ``version``."""
        self.changes[info.prefix + entity_id] = (
            self._new_head(info, sequence, timestamp, version) + payload
        )
        self.changes[feed_key(sequence, info.number, entity_id)] = b""
        self.count(info.number, 1)
        if self.watcher is not None and self.watcher.watches(info):
            self.watcher.changed(info, [entity_id], [None], [payload])

    def add_entities(
        self,
        info: CollectionInfo,
        ids: Sequence[bytes],
        payloads: Sequence[bytes],
        sequence: int,
        timestamp: int,
        version: int,
    ) -> None:
        """As ``add_entity`` for each, in columns."""
        if len(ids) == 1:
            self.add_entity(info, ids[0], payloads[0], sequence, timestamp, version)
            return
        prefix, place = info.prefix, feed_key(sequence, info.number, NO_ID)[: -len(NO_ID)]
        head = self._new_head(info, sequence, timestamp, version)
        rows = [head + payload for payload in payloads]
        self.changes.update(zip([prefix + entity_id for entity_id in ids], rows, strict=True))
        self.changes.update(dict.fromkeys([place + entity_id for entity_id in ids], b""))
        self.count(info.number, len(ids))
        if self.watcher is not None and self.watcher.watches(info):
            self.watcher.changed(info, ids, [None] * len(ids), payloads)

    def _new_head(self, info: CollectionInfo, sequence: int, timestamp: int, version: int) -> bytes:
        if not info.synced:
            return pack_entity(0, sequence, 0, self.device_id, timestamp)
        return pack_pending(DIRTY, sequence, version, self.device_id, timestamp, sequence)

    # ------------------------------------------------------------ writes the server takes

    def accept(
        self,
        info: CollectionInfo,
        entity_id: bytes,
        old: bytes | None,
        payload: bytes | None,
        version: int,
        device_id: bytes,
        timestamp: int,
    ) -> bytes:
        """Store what a device wrote, as ``version``, over the stored row ``old``; returns the row
        that is stored now. On a server the version is the commit sequence too (R11)."""
        number = info.number
        if old is not None:
            self.leave_feed(pack_feed_key(FEED, unpack_sequence(old)[0], number, entity_id))
        if by := (payload is not None) - (old is not None and not old[0] & TOMBSTONE):
            self.count(number, by)
        if payload is None:
            row: bytes = pack_entity(REMOTE | TOMBSTONE, version, version, device_id, timestamp)
        else:
            row = pack_entity(REMOTE, version, version, device_id, timestamp) + payload
        self.changes[info.prefix + entity_id] = row
        self.changes[pack_feed_key(FEED, version, number, entity_id)] = b""
        if self.watcher is not None:
            was = None if old is None else payload_of(old)
            self.watcher.changed(info, [entity_id], [was], [payload])
        return row

    def accept_all(
        self,
        infos: Sequence[CollectionInfo],
        ids: Sequence[bytes],
        olds: Sequence[bytes | None],
        payloads: Sequence[bytes],
        versions: Sequence[int],
        device_id: bytes,
        timestamps: Sequence[int],
    ) -> None:
        """As ``accept`` for each, in columns: no entity twice, and no deletion."""
        numbers = [info.number for info in infos]
        for number, count in Counter(numbers).items():
            self.count(number, count)
        for number, entity_id, old in zip(numbers, ids, olds, strict=True):
            if old is not None:
                self.leave_feed(pack_feed_key(FEED, unpack_sequence(old)[0], number, entity_id))
                if not old[0] & TOMBSTONE:
                    self.count(number, -1)
        heads = map(pack_entity, repeat(REMOTE), versions, versions, repeat(device_id), timestamps)
        keys = [info.prefix + entity_id for info, entity_id in zip(infos, ids, strict=True)]
        self.changes.update(zip(keys, map(add, heads, payloads), strict=True))
        places = map(pack_feed_key, repeat(FEED), versions, numbers, ids)
        self.changes.update(zip(places, repeat(b"")))
        if self.watcher is not None:
            before: Payloads = olds
            if any(olds):
                before = [None if old is None else payload_of(old) for old in olds]
            for info, columns in by_info(infos, ids, before, payloads):
                self.watcher.changed(info, *columns)

    # ------------------------------------------------------------ what was pending is the server's

    def clean(
        self,
        numbers: Sequence[int],
        keys: Sequence[bytes],
        rows: Sequence[bytes],
        sequence: int,
        version: int,
        timestamp: int,
    ) -> bool:
        """What the pending transaction ``sequence`` wrote at ``keys`` is the server's, as
        ``version`` and at ``timestamp`` (0: at the time that it has). Where it is each entity's
        only pending one, on an older base: else False, and nothing has changed."""
        changes = self.changes
        made: list[tuple[bytes, bytes | None]] = []
        for number, key, row in zip(numbers, keys, rows, strict=True):
            if not row or not row[0] & DIRTY or key in changes:
                return False
            flags, shown, base, device, stamp, pending = unpack_pending(row)
            if pending != sequence or base >= version:
                return False
            if flags & HAS_BASE:
                made.append((base_key(number, key[-ID_BYTES:]), None))
            head = pack_entity(flags & TOMBSTONE, shown, version, device, timestamp or stamp)
            made.append((key, head + row[PENDING_HEAD:]))
        changes.update(made)
        return True

    def clean_all(
        self,
        numbers: Sequence[int],
        keys: Sequence[bytes],
        rows: Sequence[bytes],
        sequences: list[int],
        versions: Sequence[int],
        timestamps: Sequence[int],
    ) -> bool:
        """As ``clean`` for each of many transactions of one write each, in columns; False, and
        nothing has changed, if that is false of one."""
        if len(keys) == 1:
            return self.clean(numbers, keys, rows, sequences[0], versions[0], timestamps[0])
        heads = zip(*map(unpack_pending, rows), strict=True)
        flags, shown, before, devices, stamps, pending = heads
        # Not so where one has several operations, or an entity several transactions.
        if list(pending) != sequences or any(map(ge, before, versions)):
            return False
        bases = [
            base_key(number, key[-ID_BYTES:])
            for number, key, flag in zip(numbers, keys, flags, strict=True)
            if flag & HAS_BASE
        ]
        gone = [flag & TOMBSTONE for flag in flags]
        given = [now or was for now, was in zip(timestamps, stamps, strict=True)]
        clean = map(pack_entity, gone, shown, versions, devices, given)
        values = [row[PENDING_HEAD:] for row in rows]
        self.changes.update(dict.fromkeys(bases))
        self.changes.update(zip(keys, map(add, clean, values), strict=True))
        return True

    # ------------------------------------------------------------ out of sight (R20, R28)

    def stage_entity(
        self,
        info: CollectionInfo,
        entity_id: bytes,
        payload: bytes | None,
        version: int,
        device_id: bytes,
        timestamp: int,
        *,
        unseen: bool,
    ) -> int:
        """Put an entity into the table of ``info``, over what an older page has put there
        (``unseen``: nothing); by how much the table's live entities change. The table begins
        empty, so that a deletion only removes."""
        key = info.prefix + entity_id
        there = None if unseen else self.get(key)
        if there is not None and version_of(there) >= version:
            return 0
        if payload is None:
            self.changes[key] = None
        else:
            self.changes[key] = pack_entity(REMOTE, 0, version, device_id, timestamp) + payload
        if self.watcher is not None:
            was = None if there is None else payload_of(there)
            self.watcher.changed(info, [entity_id], [was], [payload])
        return (payload is not None) - (there is not None)

    def stage_entities(
        self,
        infos: Sequence[CollectionInfo | None],
        indexes: Sequence[int],
        ids: Sequence[bytes],
        rows: Sequence[bytes | None],
        payloads: Payloads | None = None,
    ) -> bool:
        """As ``stage_entity``, for what no reader has seen, in columns: ``infos[indexes]`` of each
        its collection (None: it is left out), and its row as ``staged`` makes it (None: it is
        deleted). ``payloads`` are those in the rows, for who has them at hand. False if an entity
        comes twice: then this commit must be dropped."""
        columns: Sequence[Any] = [indexes, ids, rows]
        if not all(rows) or None in infos:
            payloads = None
            each = zip(*columns, strict=True)
            kept = [row for row in each if row[-1] is not None and infos[row[0]] is not None]
            columns = list(zip(*kept, strict=True)) or [()] * len(columns)
        prefixes = [b"" if info is None else info.prefix for info in infos]
        keys = map(add, map(prefixes.__getitem__, columns[0]), columns[1])
        before = len(self.changes)
        self.changes.update(zip(keys, columns[2], strict=True))
        once = len(self.changes) == before + len(columns[1])
        watcher = self.watcher
        if watcher is not None and any(info and watcher.watches(info) for info in infos):
            if payloads is None:
                payloads = ValuesOfRows(columns[2])
            told = columns[1], [None] * len(payloads), payloads
            only = infos[0] if len(infos) == 1 else None
            theirs = [infos[index] for index in columns[0]] if only is None else ()
            for info, those in by_info(theirs, *told) if only is None else [(only, told)]:
                watcher.changed(info, *those)
        return once

    def stage_change(
        self,
        info: CollectionInfo,
        entity_id: bytes,
        payload: bytes | None,
        version: int,
        device_id: bytes,
        timestamp: int,
    ) -> None:
        """Put a change to an entity into a table of changes, to be taken when all of them are
        there; a deletion too. Nothing ever reads that table as a collection's, so no ``watcher`` is
        called."""
        if payload is None:
            row: bytes = pack_entity(REMOTE | TOMBSTONE, 0, version, device_id, timestamp)
        else:
            row = pack_entity(REMOTE, 0, version, device_id, timestamp) + payload
        self.changes[info.prefix + entity_id] = row

    def carry_over(
        self, ref: Ref, row: EntityRow, old_table: int, staged: EntityRow | None
    ) -> None:
        """The row lives on in the collection's new table only, over what was ``staged`` there;
        its place in the feed goes with it."""
        self.changes[table_prefix(old_table) + ref[1]] = None
        self.put_entity(ref, row, staged)

    def replace_tables(
        self, tables: Mapping[int, int | None], counts: Mapping[int, int], sequence: int
    ) -> None:
        """Collections (by number) have other tables from ``sequence`` on (None: in empty ones),
        where they have ``counts`` entities. What was there is garbage, to be swept; where nothing
        was, there is nothing to sweep."""
        catalogue, moves, empty = self.catalogue, {}, set[int]()
        for number, table in tables.items():
            if table is None:
                table, catalogue = catalogue.allocating()
            moves[number] = table
            info = catalogue.by_number[number]
            if not info.indexes and not self.table_rows(info.table, 1):
                empty.add(info.table)
        names = sorted(catalogue.by_number[number].name for number in moves)
        self.set_catalogue(catalogue.moving(moves, empty))
        for number in moves:
            self.set_count(number, counts.get(number, 0))
        # The feed says that whole collections were replaced (R20).
        self.changes[feed_key(sequence, 0, NO_ID)] = cbor.encode_message(names)

    def sweep_table(self, table: int, number: int, limit: int) -> bool:
        """Remove ``limit`` rows of a table that the collection ``number`` had, with their places
        in the feed; whether there may be more."""
        prefix = table_prefix(table)
        rows = self.snapshot.scan(prefix, end_of(prefix), limit=limit)
        for key, raw in rows:
            self.changes[key] = None
            row = decode_entity(raw)
            if row.sequence:
                self.changes[feed_key(row.sequence, number, key[-ID_BYTES:])] = None
        return len(rows) == limit

    # ------------------------------------------------------------ bases

    def base(self, ref: Ref, row: EntityRow) -> BaseRow:
        """What the pending changes of the entity with the row ``row`` were made from."""
        if not row.flags & HAS_BASE:
            return absent_base(row.version)
        raw = self.get(base_key(*ref))
        if raw is None:
            raise CorruptionError(
                f"the base of entity {ref[1].hex()} is missing; run `entidb verify`"
            )
        return decode_base(raw)

    def put_base(self, ref: Ref, base: BaseRow) -> None:
        """Store a base; that there is one is in the flags of the entity's row."""
        self.changes[base_key(*ref)] = base.encode()

    def drop_base(self, ref: Ref) -> None:
        self.changes[base_key(*ref)] = None

    def set_base(self, ref: Ref, row: EntityRow, base: BaseRow) -> None:
        """Replace the base of a dirty entity; what readers see stays."""
        if base.payload is not None:
            self.put_base(ref, base)
            row.flags |= HAS_BASE
        elif row.flags & HAS_BASE:
            self.drop_base(ref)
            row.flags &= ~HAS_BASE
        row.version = base.version
        self.put_entity(ref, row, row)


__all__ = ["Entities", "Payloads", "Ref", "Watcher"]

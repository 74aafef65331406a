"""One storage commit in the making: reads fall through to a snapshot, writes stay in memory.

Everything that changes a database goes through a ``Writer``: local transactions, settling,
applying, the server's pushes. It keeps the rows that belong together in step (an entity, its feed
row, the counters), so that callers say what changes and cannot forget half of it. It decides
nothing about sync, and it never touches the disk: ``Database`` commits its ``changes`` in one go.
"""

from __future__ import annotations

from collections.abc import Sequence

from entidb.db.catalogue import Catalogue, CollectionInfo
from entidb.db.pending import PendingTransaction, decode_pending
from entidb.db.records import (
    FEED,
    HELD,
    META_CATALOGUE,
    META_FORMAT,
    META_HEAD,
    META_INFLIGHT,
    META_STAGE,
    META_STALE,
    META_SYNC,
    NO_ID,
    READY,
    STALE,
    TOMBSTONE,
    EntityRow,
    Head,
    count_key,
    decode_entity,
    decode_head,
    decode_stale,
    encode_format,
    encode_stale,
    end_of,
    feed_key,
    pack_u64,
    sequence_key,
    split_feed_key,
    unpack_u64,
)
from entidb.db.replica import (
    Inflight,
    ReplicaState,
    Stage,
    decode_record,
    decode_state,
    encode_record,
)
from entidb.errors import CorruptionError
from entidb.storage import Snapshot

#: Stale feed rows of one commit that are worth a list; to list fewer costs as much as to remove
#: them.
STALE_FROM = 4
#: And how many may wait. All together are removed much faster than a few at a time, because they
#: share pages; until then they take room, and readers of the feed pass over them.
STALE_ROWS_MAX = 2000

#: (collection number, entity id): what identifies an entity inside one database.
Ref = tuple[int, bytes]


class Writer:
    """The overlay of one commit. Only the thread that holds the database's writer lock uses it."""

    def __init__(
        self,
        snapshot: Snapshot,
        catalogue: Catalogue,
        head: bytes | None,
        device_id: bytes,
        now_ms: int,
        stale_rows_max: int = STALE_ROWS_MAX,
    ) -> None:
        self.snapshot = snapshot
        self.catalogue = catalogue
        self.head = Head() if head is None else decode_head(head)
        #: As it is stored: before this commit, and after it from ``finish`` on.
        self.encoded_head = self.head.encode() if head is None else head
        self.device_id = device_id
        self.now_ms = now_ms
        self.changes: dict[bytes, bytes | None] = {}
        self._counts: dict[int, int] = {}
        self._grown: Catalogue | None = None
        self._stale: list[bytes] = []
        self._stale_rows_max = stale_rows_max

    # ------------------------------------------------------------ raw rows

    def get(self, key: bytes) -> bytes | None:
        if key in self.changes:
            return self.changes[key]
        return self.snapshot.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if len(keys) == 1:
            return [self.get(keys[0])]
        found = self.snapshot.get_many(keys)
        changes = self.changes
        if changes:
            for index, key in enumerate(keys):
                if key in changes:
                    found[index] = changes[key]
        return found

    def put(self, key: bytes, value: bytes) -> None:
        self.changes[key] = value

    def delete(self, key: bytes) -> None:
        self.changes[key] = None

    # ------------------------------------------------------------ head, catalogue, sync records

    def next_sequence(self) -> int:
        self.head.sequence += 1
        return self.head.sequence

    def set_catalogue(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        # ``finish`` encodes it: a commit may change it once for each of a thousand collections.
        self.put(META_CATALOGUE, b"")

    def collection(self, name: str) -> CollectionInfo:
        """The collection called ``name``, made if there is none. Raises ``ScopeError`` when
        there are too many."""
        info = self.catalogue.by_name.get(name)
        if info is None:
            if self.catalogue is not self._grown:
                # Nobody else sees it before it is stored, so that the next ones cost nothing.
                self._grown = self.catalogue.copy()
            info = self._grown.add(name)
            self.set_catalogue(self._grown)
        return info

    @property
    def sync_state(self) -> ReplicaState:
        raw = self.get(META_SYNC)
        return ReplicaState() if raw is None else decode_state(raw)

    def set_sync_state(self, state: ReplicaState) -> None:
        self.put(META_SYNC, encode_record(state))

    @property
    def inflight(self) -> Inflight | None:
        raw = self.get(META_INFLIGHT)
        return None if raw is None else decode_record(Inflight, raw)

    def set_inflight(self, inflight: Inflight | None) -> None:
        self.changes[META_INFLIGHT] = None if inflight is None else encode_record(inflight)

    @property
    def stage(self) -> Stage | None:
        raw = self.get(META_STAGE)
        return None if raw is None else decode_record(Stage, raw)

    def set_stage(self, stage: Stage | None) -> None:
        self.changes[META_STAGE] = None if stage is None else encode_record(stage)

    def abandon_stage(self) -> None:
        """Forget a stage; what it has written becomes garbage."""
        stage = self.stage
        if stage is None:
            return
        catalogue = self.catalogue
        for tables in (stage.tables, stage.deltas):
            for number, table in tables.items():
                catalogue = catalogue.discarding(table, int(number))
        if stage.tables or stage.deltas:
            self.set_catalogue(catalogue)
        self.set_stage(None)

    # ------------------------------------------------------------ entities

    def entity(self, ref: Ref) -> EntityRow | None:
        raw = self.get(self.catalogue.by_number[ref[0]].prefix + ref[1])
        return None if raw is None else decode_entity(raw)

    def put_entity(self, ref: Ref, row: EntityRow, old: EntityRow | None) -> None:
        """Store ``row`` over ``old`` and keep the live count. The feed is ``put_feed``'s."""
        self.changes[self.catalogue.by_number[ref[0]].prefix + ref[1]] = row.encode()
        self.count(ref[0], (row.payload is not None) - (old is not None and _live(old)))

    def show(self, ref: Ref, row: EntityRow, old: EntityRow | None, sequence: int) -> None:
        """Store ``row`` as something readers see changed at ``sequence``: entity, count, feed."""
        self.move_feed(ref, 0 if old is None else old.sequence, sequence)
        row.sequence = sequence
        self.put_entity(ref, row, old)

    def add_entity(self, info: CollectionInfo, entity_id: bytes, row: bytes, sequence: int) -> None:
        """Store the encoded ``row`` of an entity that has none yet, shown at ``sequence``."""
        self.changes[info.prefix + entity_id] = row
        self.changes[feed_key(sequence, info.number, entity_id)] = b""
        self.count(info.number, 1)

    def add_entities(
        self, info: CollectionInfo, ids: Sequence[bytes], rows: Sequence[bytes], sequence: int
    ) -> None:
        """As ``add_entity`` for each, in columns."""
        if len(ids) == 1:
            self.add_entity(info, ids[0], rows[0], sequence)
            return
        prefix, place = info.prefix, feed_key(sequence, info.number, NO_ID)[: -len(NO_ID)]
        self.changes.update(zip([prefix + entity_id for entity_id in ids], rows, strict=True))
        self.changes.update(dict.fromkeys([place + entity_id for entity_id in ids], b""))
        self.count(info.number, len(ids))

    def remove_entity(self, ref: Ref, old: EntityRow) -> None:
        """Forget the row altogether, tombstone and feed row included."""
        self.changes[self.catalogue.by_number[ref[0]].prefix + ref[1]] = None
        if old.sequence:
            self.changes[feed_key(old.sequence, *ref)] = None
        self.count(ref[0], -int(_live(old)))

    def move_feed(self, ref: Ref, old_sequence: int, sequence: int) -> None:
        """The feed holds every entity at its latest change (R11)."""
        if old_sequence:
            self.leave_feed(feed_key(old_sequence, *ref))
        self.changes[feed_key(sequence, *ref)] = b""

    def leave_feed(self, key: bytes) -> None:
        """The feed row at ``key`` is stale: its entity is about to change again. It goes now, or
        later together with others."""
        if key in self.changes:
            self.changes[key] = None
        else:
            self._stale.append(key)

    @property
    def stale_rows(self) -> int:
        """How many stale feed rows wait to be removed."""
        raw = self.get(META_STALE)
        return 0 if raw is None else unpack_u64(raw)

    def sweep_stale(self) -> None:
        """Remove the stale feed rows that wait."""
        if not self.stale_rows:
            return
        for key, raw in self.snapshot.scan(STALE, end_of(STALE)):
            self.changes[key] = None
            self.changes.update(dict.fromkeys(decode_stale(raw)))
        self.put(META_STALE, pack_u64(0))

    def _finish_stale(self) -> None:
        stale, self._stale = self._stale, []
        waiting = self.stale_rows + len(stale) if len(stale) >= STALE_FROM else 0
        if not waiting or waiting > self._stale_rows_max:
            self.changes.update(dict.fromkeys(stale))
            if waiting:
                self.sweep_stale()
            return
        self.put(sequence_key(STALE, self.head.sequence), encode_stale(stale))
        if self.get(META_STALE) is None:
            # From here on an older EntiDB, which knows no stale rows, has to stay away.
            self.put(META_FORMAT, encode_format())
        self.put(META_STALE, pack_u64(waiting))

    def put_replaced(self, sequence: int, record: bytes) -> None:
        """Tell the feed that whole collections were replaced (R20)."""
        self.changes[feed_key(sequence, 0, NO_ID)] = record

    def feed_rows(self) -> list[tuple[tuple[int, int, bytes], bytes]]:
        """What this commit adds to the feed, in order: (sequence, collection, entity_id) and the
        row's record."""
        return sorted(
            (split_feed_key(key), record)
            for key, record in self.changes.items()
            if record is not None and key.startswith(FEED)
        )

    def count(self, collection: int, by: int) -> None:
        if by:
            self._counts[collection] = self._counts.get(collection, 0) + by

    def set_count(self, collection: int, live: int) -> None:
        """The collection's count is ``live`` plus what this commit adds from now on."""
        self._counts.pop(collection, None)
        self.put(count_key(collection), pack_u64(live))

    # ------------------------------------------------------------ outbox

    def pending(self, sequence: int) -> PendingTransaction | None:
        """The pending transaction made by local commit ``sequence``, ready or held."""
        for kind in (READY, HELD):
            key = sequence_key(kind, sequence)
            raw = self.get(key)
            if raw is not None:
                return decode_pending(key, raw)
        return None

    def put_pending(self, transaction: PendingTransaction) -> None:
        self.put(transaction.key, transaction.encode())

    def finish(self) -> dict[bytes, bytes | None]:
        """The whole commit, counters included; empty when nothing changes."""
        for collection, by in self._counts.items():
            if by:
                key = count_key(collection)
                raw = self.get(key)
                live = (0 if raw is None else unpack_u64(raw)) + by
                if live < 0:
                    raise CorruptionError(
                        f"the count of collection number {collection} would fall below zero; "
                        "run `entidb verify` on this database"
                    )
                self.put(key, pack_u64(live))
        self._counts.clear()
        if self._stale:
            self._finish_stale()
        if META_CATALOGUE in self.changes:
            self.put(META_CATALOGUE, self.catalogue.encode())
        head = self.head.encode()
        if head != self.encoded_head:
            self.encoded_head = head
            self.put(META_HEAD, head)
        return self.changes


def _live(row: EntityRow) -> bool:
    return row.payload is not None


def live_delta(old: bytes | None, payload: bytes | None) -> int:
    """By how much a count changes when the encoded row ``old`` is replaced, for hot paths."""
    was = old is not None and not old[0] & TOMBSTONE
    return (payload is not None) - was


def feed_bounds(after: int) -> tuple[bytes, bytes]:
    """Start and stop of a feed scan behind ``after``."""
    return sequence_key(FEED, after + 1), bytes([FEED[0] + 1])


__all__ = ["Ref", "Writer", "feed_bounds", "live_delta"]

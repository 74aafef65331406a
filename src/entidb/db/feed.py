"""The change feed: for every entity its latest change, in commit order, resumable (R11).

The same rows are a program's feed on a device and the log that a server's pull reads. A feed is
bounded by the number of entities; what changed twice shows up once, at the later place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import repeat
from typing import Any

from msgspec import Struct

from entidb import cbor
from entidb.collector import paused
from entidb.db.catalogue import Catalogue
from entidb.db.records import (
    DIRTY,
    ENTITY_HEAD,
    META_FLOOR,
    META_HEAD,
    PENDING_HEAD,
    REMOTE,
    TOMBSTONE,
    decode_head,
    split_feed_key,
    split_feed_keys,
    unpack_entity,
    unpack_pending,
    unpack_u64,
)
from entidb.db.rows import SnapshotRows
from entidb.db.writer import feed_bounds
from entidb.storage import Snapshot
from entidb.types import uuids_from_bytes

PAGE_ROWS = 1000


class ChangeEvent(Struct, frozen=True, gc=False):
    """One entity's latest change, or one ``reset``.

    ``kind`` is ``"put"``, ``"delete"`` or ``"reset"``. ``origin`` is ``"local"`` for the device's
    own transactions, ``"remote"`` for what came from the server. A ``reset`` names a collection
    that was replaced as a whole (first sync, reset): read it anew. ``sequence`` is the local
    commit; events of one transaction share it. ``timestamp`` is a hybrid logical clock.
    """

    sequence: int
    kind: str
    collection: str
    origin: str
    entity_id: uuid.UUID | None = None
    payload: bytes | None = None
    version: int = 0
    timestamp: int = 0
    device_id: bytes = b""

    @property
    def value(self) -> Any:
        """The entity after the change; None after a delete or for a reset."""
        return None if self.payload is None else cbor.decode_trusted(self.payload)


OpenRows = Callable[[], AbstractContextManager[SnapshotRows]]


class ChangeFeed:
    """Iterate to get what changed after ``cursor``, up to the newest commit; iterate again later
    to go on. ``cursor`` moves when the last event of a commit was handed out, so a program that
    stores it after handling an event sees every change at least once, and whole.
    """

    def __init__(self, open_rows: OpenRows, cursor: int, collections: frozenset[str] | None):
        self._open = open_rows
        self._collections = collections
        self._before = cursor
        #: The page that is being handed out, and the place of the event handed out last.
        self._events: list[ChangeEvent] = []
        self._at = -1

    @property
    def cursor(self) -> int:
        """Where to go on: the newest commit that was handed out whole."""
        events, at = self._events, self._at
        if at < 0:
            return self._before
        sequence = events[at].sequence
        if at + 1 == len(events) or events[at + 1].sequence != sequence:
            return sequence
        while at >= 0 and events[at].sequence == sequence:
            at -= 1
        return events[at].sequence if at >= 0 else self._before

    def __iter__(self) -> Iterator[ChangeEvent]:
        while True:
            self._before, self._at = self.cursor, -1
            with paused(), self._open() as rows:
                events, reached, more = read_events(rows.snapshot, rows.catalogue, self._before)
            self._events = events
            chosen = self._collections
            if chosen is None:
                # Only the place is kept; what it means for the cursor is for who asks.
                for self._at, event in enumerate(events):
                    yield event
            else:
                for at, event in enumerate(events):
                    if event.collection in chosen:
                        self._at = at
                        yield event
            self._before, self._at = max(self._before, reached), -1
            if not more:
                return


def read_events(
    snapshot: Snapshot, catalogue: Catalogue, after: int, limit: int = PAGE_ROWS
) -> tuple[list[ChangeEvent], int, bool]:
    """Events after ``after``, whole commits only; the sequence reached; whether there is more."""
    raw_head = snapshot.get(META_HEAD)
    head = 0 if raw_head is None else decode_head(raw_head).sequence
    events: list[ChangeEvent] = []
    raw_floor = snapshot.get(META_FLOOR)
    floor = 0 if raw_floor is None else unpack_u64(raw_floor)
    if 0 < after < floor:
        # Deletions in between may be forgotten, so the reader cannot catch up change by change.
        events += [ChangeEvent(floor, "reset", name, "local") for name in sorted(catalogue.by_name)]
        after = floor
    keys, more = feed_page(snapshot, after, limit)
    if not keys:
        return events, head, False
    events += load_events(snapshot, catalogue, split_feed_keys(keys))
    reached = split_feed_key(keys[-1])[0] if more else head
    return events, reached, more


def feed_page(snapshot: Snapshot, after: int, limit: int) -> tuple[list[bytes], bool]:
    """Up to ``limit`` feed keys after ``after``, cut between commits, and whether there are more;
    a first commit that is larger than ``limit`` comes whole and alone (R19)."""
    start, stop = feed_bounds(after)
    # With their values, which are empty: only so are the keys checked, and a row that names
    # another collection would be left out in silence.
    keys = [key for key, _ in snapshot.scan(start, stop, limit=limit + 1)]
    if len(keys) <= limit:
        return keys, False
    crossing = split_feed_key(keys[limit])[0]
    end = limit
    while end and split_feed_key(keys[end - 1])[0] == crossing:
        end -= 1
    if end:
        return keys[:end], True
    while split_feed_key(keys[-1])[0] == crossing:
        further = [key for key, _ in snapshot.scan(keys[-1] + b"\0", stop, limit=limit)]
        if not further:
            return keys, False
        keys += further
    end = limit
    while split_feed_key(keys[end])[0] == crossing:
        end += 1
    return keys[:end], True


def load_events(
    snapshot: Snapshot, catalogue: Catalogue, places: list[tuple[int, int, bytes]]
) -> list[ChangeEvent]:
    """The events behind feed rows; rows that a replaced collection left behind are skipped."""
    prefixes = {number: info.prefix for number, info in catalogue.by_number.items()}
    names = {number: info.name for number, info in catalogue.by_number.items()}
    entities = [place for place in places if place[1] in prefixes]
    keys = [prefixes[number] + entity_id for _, number, entity_id in entities]
    ids = uuids_from_bytes([entity_id for _, _, entity_id in entities])
    raws = snapshot.get_many(keys)
    events = _alike(entities, ids, raws, names) or _one_by_one(entities, ids, raws, names)
    resets = [sequence for sequence, number, _ in places if number == 0]
    if resets:
        for sequence in resets:
            events += _reset_events(snapshot, sequence)
        # Where its feed row stands: before the other changes of its commit.
        events.sort(key=lambda event: (event.sequence, event.kind != "reset"))
    return events


def _alike(
    entities: list[tuple[int, int, bytes]],
    ids: list[uuid.UUID],
    raws: list[bytes | None],
    names: dict[int, str],
) -> list[ChangeEvent]:
    """The events of rows that are all of one kind, as those of a page mostly are, without a step
    of Python for each; nothing if they are not."""
    rows = [raw for raw in raws if raw is not None]
    kinds = {row[0] for row in rows}
    if len(rows) < len(raws) or len(kinds) != 1 or (flags := kinds.pop()) & TOMBSTONE:
        return []
    unpack, head = (unpack_pending, PENDING_HEAD) if flags & DIRTY else (unpack_entity, ENTITY_HEAD)
    sequences, numbers, _ = zip(*entities, strict=True)
    _, shown, versions, devices, timestamps, *_ = zip(*map(unpack, rows), strict=True)
    if shown != sequences:
        return []
    origin = "remote" if flags & REMOTE else "local"
    return list(
        map(
            ChangeEvent,
            sequences,
            repeat("put"),
            map(names.__getitem__, numbers),
            repeat(origin),
            ids,
            [row[head:] for row in rows],
            versions,
            timestamps,
            devices,
        )
    )


def _one_by_one(
    entities: list[tuple[int, int, bytes]],
    ids: list[uuid.UUID],
    raws: list[bytes | None],
    names: dict[int, str],
) -> list[ChangeEvent]:
    events: list[ChangeEvent] = []
    for (sequence, number, _), entity_id, raw in zip(entities, ids, raws, strict=True):
        if raw is None:
            continue
        # Unpacked here: an object for the row between two others costs as much as the event.
        if raw[0] & DIRTY:
            flags, shown, version, device, timestamp, _ = unpack_pending(raw)
            payload = raw[PENDING_HEAD:]
        else:
            flags, shown, version, device, timestamp = unpack_entity(raw)
            payload = raw[ENTITY_HEAD:]
        if shown != sequence:
            continue
        gone = flags & TOMBSTONE
        events.append(
            ChangeEvent(
                sequence,
                "delete" if gone else "put",
                names[number],
                "remote" if flags & REMOTE else "local",
                entity_id,
                None if gone else payload,
                version,
                timestamp,
                device,
            )
        )
    return events


def _reset_events(snapshot: Snapshot, sequence: int) -> list[ChangeEvent]:
    start, stop = feed_bounds(sequence - 1)
    found = snapshot.scan(start, stop, limit=1)
    names: list[str] = cbor.decode_trusted(found[0][1]) if found else []
    return [ChangeEvent(sequence, "reset", name, "remote") for name in names]

"""The change feed: for every entity its latest change, in commit order, resumable (R11).

The same rows are a program's feed on a device and the log that a server's pull reads. A feed is
bounded by the number of entities; what changed twice shows up once, at the later place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from msgspec import Struct

from entidb import cbor
from entidb.db.catalogue import Catalogue
from entidb.db.records import (
    META_FLOOR,
    META_HEAD,
    REMOTE,
    decode_entity,
    decode_head,
    split_feed_key,
    unpack_u64,
)
from entidb.db.rows import SnapshotRows
from entidb.db.writer import feed_bounds
from entidb.storage import Snapshot
from entidb.types import uuid_from_bytes

PAGE_ROWS = 1000


class ChangeEvent(Struct, frozen=True):
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
        self.cursor = cursor
        self._open = open_rows
        self._collections = collections

    def __iter__(self) -> Iterator[ChangeEvent]:
        while True:
            with self._open() as rows:
                events, reached, more = read_events(rows.snapshot, rows.catalogue, self.cursor)
            for number, event in enumerate(events):
                wanted = self._collections is None or event.collection in self._collections
                if wanted:
                    last = number + 1 == len(events) or (
                        events[number + 1].sequence != event.sequence
                    )
                    if last:
                        self.cursor = event.sequence
                    yield event
            self.cursor = max(self.cursor, reached)
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
    events += load_events(snapshot, catalogue, [split_feed_key(key) for key in keys])
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
    infos = catalogue.by_number
    wanted = [
        (sequence, infos[number], entity_id)
        for sequence, number, entity_id in places
        if number in infos
    ]
    raws = iter(snapshot.get_many([info.prefix + entity_id for _, info, entity_id in wanted]))
    events: list[ChangeEvent] = []
    for sequence, number, entity_id in places:
        if number == 0:
            events += _reset_events(snapshot, sequence)
            continue
        if number not in infos:
            continue
        raw = next(raws)
        row = None if raw is None else decode_entity(raw)
        if row is None or row.sequence != sequence:
            continue
        events.append(
            ChangeEvent(
                sequence,
                "delete" if row.payload is None else "put",
                infos[number].name,
                "remote" if row.flags & REMOTE else "local",
                uuid_from_bytes(entity_id),
                row.payload,
                row.version,
                row.timestamp,
                row.device_id,
            )
        )
    return events


def _reset_events(snapshot: Snapshot, sequence: int) -> list[ChangeEvent]:
    start, stop = feed_bounds(sequence - 1)
    found = snapshot.scan(start, stop, limit=1)
    names: list[str] = cbor.decode_trusted(found[0][1]) if found else []
    return [ChangeEvent(sequence, "reset", name, "remote") for name in names]

"""The change feed: for every entity its latest change, in commit order, resumable (R11).

The same rows are a program's feed on a device and the log that a server's pull reads. A feed is
bounded by the number of entities; an entity that changed twice appears once, at the later place. At
its former place a row may wait to be removed (``writer``); readers skip it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, repeat
from operator import length_hint
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
    META_STALE,
    NOT_ONE,
    PENDING_HEAD,
    REMOTE,
    TOMBSTONE,
    decode_head,
    split_feed_key,
    split_feed_keys,
    unpack_entity,
    unpack_pending,
    unpack_shown,
    unpack_u64,
    unreadable,
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
        payload = self.payload
        return None if payload is None else cbor.decode_trusted(payload)


OpenRows = Callable[[], AbstractContextManager[SnapshotRows]]


class ChangeFeed:
    """Iterate to get what changed after ``cursor``, up to the newest commit; iterate again later
    to go on. ``cursor`` moves when the last event of a commit was handed out, so a program that
    stores it after handling an event sees every change at least once, and whole.
    """

    def __init__(self, open_rows: OpenRows, cursor: int, collections: frozenset[str] | None):
        self._open = open_rows
        self._collections = collections
        self._turn_to(cursor, [])

    @property
    def cursor(self) -> int:
        """Where to go on: the newest commit all of whose events were handed out."""
        before, events, left = self._page
        # The event handed out last: a list's iterator knows exactly how many are left in it.
        at = len(events) - length_hint(left) - 1
        if at < 0:
            return before
        sequence = events[at].sequence
        if at + 1 == len(events) or events[at + 1].sequence != sequence:
            return sequence
        while at >= 0 and events[at].sequence == sequence:
            at -= 1
        return events[at].sequence if at >= 0 else before

    def __iter__(self) -> Iterator[ChangeEvent]:
        # Not a generator: no step of Python for an event, only for a page.
        return chain.from_iterable(self._pages())

    def _pages(self) -> Iterator[Iterator[ChangeEvent]]:
        chosen = self._collections
        while True:
            before = self.cursor
            self._turn_to(before, [])
            with paused(), self._open() as rows:
                events, reached, more = read_events(rows.snapshot, rows.catalogue, before)
            left = self._turn_to(before, events)
            if chosen is None:
                yield left
            else:
                yield (event for event in left if event.collection in chosen)
            self._turn_to(max(self._page[0], reached), [])
            if not more:
                return

    def _turn_to(self, before: int, events: list[ChangeEvent]) -> Iterator[ChangeEvent]:
        left = iter(events)
        #: Where the page begins, its events, and what is left of them: one object, so that
        #: Ctrl-C cannot fall between them.
        self._page = before, events, left
        return left


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
    # Proved, because a row that names another collection would be left out in silence.
    keys = snapshot.scan_keys(start, stop, limit=limit + 1, proved=True)
    if len(keys) <= limit:
        return keys, False
    crossing = split_feed_key(keys[limit])[0]
    end = limit
    while end and split_feed_key(keys[end - 1])[0] == crossing:
        end -= 1
    if end:
        return keys[:end], True
    while split_feed_key(keys[-1])[0] == crossing:
        further = snapshot.scan_keys(keys[-1] + b"\0", stop, limit=limit, proved=True)
        if not further:
            return keys, False
        keys += further
    end = limit
    while split_feed_key(keys[end])[0] == crossing:
        end += 1
    return keys[:end], True


def latest_of(keys: Sequence[bytes]) -> Sequence[int]:
    """The last position of each entity in ``keys``. Feed rows of one entity before its last one are
    stale: its payload is read once and not once for each of them."""
    last = dict(zip(keys, range(len(keys)), strict=True))
    return range(len(keys)) if len(last) == len(keys) else sorted(last.values())


def load_events(
    snapshot: Snapshot, catalogue: Catalogue, places: list[tuple[int, int, bytes]]
) -> list[ChangeEvent]:
    """The events behind feed rows; rows that are stale or of a replaced collection are skipped."""
    if not places:
        return []
    # In columns: for most pages no step of Python is taken for an event.
    sequences, numbers, entity_ids = zip(*places, strict=True)
    known = catalogue.by_number
    found = set(numbers)
    if not found <= known.keys():
        entities = [place for place in places if place[1] in known]
        events = load_events(snapshot, catalogue, entities)
        if 0 in found:
            for sequence, number in zip(sequences, numbers, strict=True):
                if number == 0:
                    events += _reset_events(snapshot, sequence)
            # The place of its feed row: before the other changes of its commit.
            events.sort(key=lambda event: (event.sequence, event.kind != "reset"))
        return events
    names: Iterable[str]
    if len(found) == 1:
        info = known[numbers[0]]
        prefix = info.prefix
        keys = [prefix + entity_id for entity_id in entity_ids]
        names = repeat(info.name, len(keys))
    else:
        keys = [known[number].prefix + entity_id for _, number, entity_id in places]
        names = [known[number].name for number in numbers]
    waiting = snapshot.get(META_STALE)
    if waiting and unpack_u64(waiting) and len(kept := latest_of(keys)) < len(keys):
        return load_events(snapshot, catalogue, [places[at] for at in kept])
    raws = snapshot.get_many(keys)
    ids = uuids_from_bytes(entity_ids)
    try:
        events = _alike(sequences, names, ids, raws)
        if events:
            return events
        # Without entities that have changed since: they come with that change.
        current = [
            (sequence, name, entity_id, raw)
            for sequence, name, entity_id, raw in zip(sequences, names, ids, raws, strict=True)
            if raw is not None and unpack_shown(raw)[0] == sequence
        ]
        if 0 < len(current) < len(raws):
            events = _alike(*zip(*current, strict=True))
        return events or _one_by_one(current)
    except NOT_ONE as error:
        raise unreadable(
            "an entity", min((raw for raw in raws if raw is not None), key=len)
        ) from error


def _alike(
    sequences: tuple[int, ...],
    names: Iterable[str],
    ids: Sequence[uuid.UUID],
    raws: Sequence[bytes | None],
) -> list[ChangeEvent]:
    """The events of rows that are all of one kind, as those of a page mostly are, without a step
    of Python for each; nothing if they are not."""
    rows = [raw for raw in raws if raw is not None]
    kinds = {row[0] for row in rows}
    if len(rows) < len(raws) or len(kinds) != 1 or (flags := kinds.pop()) & TOMBSTONE:
        return []
    shown, versions, devices, timestamps = zip(*map(unpack_shown, rows), strict=True)
    if shown != sequences:
        return []
    head = PENDING_HEAD if flags & DIRTY else ENTITY_HEAD
    origin = "remote" if flags & REMOTE else "local"
    return list(
        map(
            ChangeEvent,
            sequences,
            repeat("put"),
            names,
            repeat(origin),
            ids,
            [row[head:] for row in rows],
            versions,
            timestamps,
            devices,
        )
    )


def _one_by_one(current: list[tuple[int, str, uuid.UUID, bytes]]) -> list[ChangeEvent]:
    events: list[ChangeEvent] = []
    for sequence, name, entity_id, raw in current:
        # Unpacked here: an object for the row between two others costs as much as the event.
        if raw[0] & DIRTY:
            flags, _, version, device, timestamp, _ = unpack_pending(raw)
            payload = raw[PENDING_HEAD:]
        else:
            flags, _, version, device, timestamp = unpack_entity(raw)
            payload = raw[ENTITY_HEAD:]
        gone = flags & TOMBSTONE
        events.append(
            ChangeEvent(
                sequence,
                "delete" if gone else "put",
                name,
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

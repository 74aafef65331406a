"""A page of the change feed on its way from the store into a message (R19).

The plain page is a list of commits; the page in columns holds the same operations without an object
for each of them.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, cast

from entidb import protocol
from entidb.db.catalogue import Catalogue, CollectionInfo
from entidb.db.feed import feed_page, latest_of
from entidb.db.records import ENTITY_HEAD, TOMBSTONE, split_feed_keys, unpack_entity
from entidb.db.writer import Writer
from entidb.errors import CorruptionError
from entidb.protocol import COLUMN_HEAD_BYTES, TOMBSTONE_SIZE, PullRequest, PullResponse

#: Feed rows looked at for one page at most, however many a filter or ``have`` leaves out, so that
#: a page takes bounded time.
SCAN_ROWS_MAX = 20_000
#: Entities read at a time while a page fills: as many as can be 16 MiB each without hurting.
#: A thousand at a time would be 16 GB then.
READ_ROWS = 16
#: And at most, when they turn out to be small.
READ_ROWS_MAX = 64
#: Payload bytes of a page at most, whatever a client asks for; a larger single commit is sent
#: whole (R19).
PAGE_BYTES_MAX = 8 * 1024 * 1024
#: A page ends at the first commit after it names so many collections. With the largest commit it
#: still names fewer than the 4,096 that devices take.
PAGE_NAMES_MAX = 1024
#: What a pulled operation takes on the wire beside its payload, roughly.
OPERATION_OVERHEAD_BYTES = 32


class Page:
    """One page on its way from the feed into a message (R19)."""

    def __init__(
        self, view: Writer, request: PullRequest, wanted: Mapping[int, CollectionInfo]
    ) -> None:
        self.names: list[str] = []
        self._encoded = protocol.PullPage()
        self._view = view
        self._request = request
        self._wanted = wanted
        self._bytes_max = min(request.bytes_max, PAGE_BYTES_MAX)
        self._indexes: dict[int, int] = {}
        self._last = 0
        self._size = 0

    def fill(self, limit: int, head: int) -> tuple[int, bool]:
        """Read up to ``limit`` rows of the feed; the cursor that the page reaches, and whether
        there is more."""
        feed_keys, more = feed_page(self._view.snapshot, known_up_to(self._request), limit)
        places = split_feed_keys(feed_keys)
        chosen = [place for place in places if place[1] in self._wanted]
        if self._request.have:
            have = _Ranges(self._request.have)
            chosen = [place for place in chosen if not have.contains(place[0])]
        prefixes = {number: info.prefix for number, info in self._wanted.items()}
        keys = [prefixes[number] + entity_id for _, number, entity_id in chosen]
        if self._view.stale_rows and len(kept := latest_of(keys)) < len(keys):
            keys, chosen = [keys[at] for at in kept], [chosen[at] for at in kept]
        at = read = 0
        rows = READ_ROWS
        while at < len(keys):
            raws = self._view.snapshot.get_many(keys[at : at + rows])
            if not self._add(chosen[at : at + rows], raws):
                return self._last, True
            at += rows
            # As many as fit, going by those that were read; stale ones are none of the page's.
            read += sum([len(raw) for raw in raws if raw is not None])
            read += (OPERATION_OVERHEAD_BYTES - ENTITY_HEAD) * len(raws)
            mean = read // at + 1
            rows = max(READ_ROWS, min((self._bytes_max - self._size) // mean, READ_ROWS_MAX))
        # A pull moves the cursor over what it leaves out as well (R31).
        return (places[-1][0] if more else head), more

    def _add(self, places: Sequence[tuple[int, int, bytes]], raws: Sequence[bytes | None]) -> bool:
        """False if the page is full: cut between commits, the rest opens the next one."""
        size, last, bytes_max = self._size, self._last, self._bytes_max
        begin, add, indexes = self._encoded.begin, self._encoded.add, self._indexes
        for (sequence, number, entity_id), raw in zip(places, raws, strict=True):
            if raw is None:
                raise _corrupt(sequence, entity_id, "names an entity that is not there")
            flags, _, version, device, timestamp = unpack_entity(raw)
            if version != sequence and self._is_stale((sequence, number, entity_id), version):
                continue
            if sequence != last:
                if size >= bytes_max or len(indexes) >= PAGE_NAMES_MAX:
                    return False
                begin(version, device, timestamp)
                last = self._last = sequence
            size += OPERATION_OVERHEAD_BYTES + len(raw) - ENTITY_HEAD
            index = indexes.get(number)
            if index is None:
                index = indexes[number] = len(self.names)
                self.names.append(self._wanted[number].name)
            add(index, entity_id, None if flags & TOMBSTONE else raw[ENTITY_HEAD:])
        self._size = size
        return True

    @property
    def is_empty(self) -> bool:
        return not self.names

    def _is_stale(self, place: tuple[int, int, bytes], version: int) -> bool:
        """Whether the entity of a feed row, which is at ``version``, has changed since; then it
        comes with that change. Raises ``CorruptionError`` if that cannot be."""
        sequence, _, entity_id = place
        if version < sequence or version > self._view.head.sequence:
            raise _corrupt(sequence, entity_id, f"names an entity that is at {version}")
        return version > sequence

    def encode(self, message: PullResponse) -> bytes:
        return self._encoded.encode(message)


class ColumnPage(Page):
    """The same page in columns: rows of the store cut into pieces, without a loop over them."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._ids: list[bytes] = []
        self._heads: list[bytes] = []
        self._sizes: list[int] = []
        self._values: list[bytes] = []
        self._columns: list[int] = []

    def _add(self, places: Sequence[tuple[int, int, bytes]], raws: Sequence[bytes | None]) -> bool:
        if None in raws:
            sequence, _, entity_id = places[list(raws).index(None)]
            raise _corrupt(sequence, entity_id, "names an entity that is not there")
        rows = cast("Sequence[bytes]", raws)
        heads = [row[ENTITY_HEAD - COLUMN_HEAD_BYTES : ENTITY_HEAD] for row in rows]
        versions = protocol.column_versions(b"".join(heads))
        if versions != [place[0] for place in places]:
            kept = [at for at, v in enumerate(versions) if not self._is_stale(places[at], v)]
            places, rows = [places[at] for at in kept], [rows[at] for at in kept]
            heads = [heads[at] for at in kept]
        count = self._fitting(places, rows)
        if count:
            self._keep(places[:count], rows[:count], b"".join(heads[:count]))
        return count == len(places)

    def _keep(
        self, places: Sequence[tuple[int, int, bytes]], rows: Sequence[bytes], heads: bytes
    ) -> None:
        sequences, numbers, entity_ids = zip(*places, strict=True)
        for number in dict.fromkeys(numbers):
            if number not in self._indexes:
                self._indexes[number] = len(self.names)
                self.names.append(self._wanted[number].name)
        self._ids += entity_ids
        self._columns += map(self._indexes.__getitem__, numbers)
        self._heads.append(heads)
        self._sizes += [
            TOMBSTONE_SIZE if row[0] & TOMBSTONE else len(row) - ENTITY_HEAD for row in rows
        ]
        self._values += [row[ENTITY_HEAD:] for row in rows]
        self._last = sequences[-1]

    def _fitting(self, places: Sequence[tuple[int, int, bytes]], rows: Sequence[bytes]) -> int:
        """How many rows of these the page takes: all, or those before the commit that finds it
        full."""
        overhead = OPERATION_OVERHEAD_BYTES - ENTITY_HEAD
        whole = self._size + sum(map(len, rows)) + overhead * len(rows)
        full_of_names = len(self._indexes) >= PAGE_NAMES_MAX
        if whole < self._bytes_max and not full_of_names:
            self._size = whole
            return len(rows)
        last = self._last
        for at, ((sequence, _, _), row) in enumerate(zip(places, rows, strict=True)):
            if sequence != last and (full_of_names or self._size >= self._bytes_max):
                return at
            last = sequence
            self._size += len(row) + overhead
        return len(rows)

    def encode(self, message: PullResponse) -> bytes:
        count = len(self._ids)
        return protocol.encode_columns(
            message,
            ids=b"".join(self._ids),
            heads=b"".join(self._heads),
            sizes=struct.pack(f">{count}I", *self._sizes),
            values=b"".join(self._values),
            indexes=struct.pack(f">{count}H", *self._columns),
        )


def _corrupt(sequence: int, entity_id: bytes, why: str) -> CorruptionError:
    return CorruptionError(
        f"the feed row of commit {sequence} for {entity_id.hex()} {why}; the page was not sent. "
        "Run verify, and restore a backup"
    )


class _Ranges:
    """Membership in the ascending inclusive ranges of ``PullRequest.have``."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._starts = [first for first, _ in ranges]
        self._ends = [last for _, last in ranges]

    def contains(self, version: int) -> bool:
        if not self._starts:
            return False
        at = bisect_right(self._starts, version) - 1
        return at >= 0 and version <= self._ends[at]


def known_up_to(request: PullRequest) -> int:
    """Up to where the device has everything: its cursor, and what follows it of its own (R21)."""
    if request.have and request.have[0][0] == request.cursor + 1:
        return request.have[0][1]
    return request.cursor


def wanted_collections(
    catalogue: Catalogue, asked: list[str] | None, allowed: frozenset[str] | None
) -> list[CollectionInfo]:
    """The collections to send: those asked for that the token grants."""
    names = None if asked is None else frozenset(asked)
    return [
        info
        for info in catalogue.by_name.values()
        if info.synced
        and (names is None or info.name in names)
        and (allowed is None or info.name in allowed)
    ]

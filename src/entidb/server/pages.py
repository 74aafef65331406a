"""A page of the change feed on its way from the store into a message (R19).

The plain page is a list of commits; the page in columns holds the same operations without an object
for each of them.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from msgspec.structs import replace

from entidb import protocol
from entidb.db.catalogue import Catalogue, CollectionInfo
from entidb.db.feed import feed_page, latest_of
from entidb.db.records import count_key, payloads_of, shown_fields, split_feed_keys, unpack_u64
from entidb.db.writer import Writer
from entidb.errors import CorruptionError
from entidb.protocol import (
    TOMBSTONE_SIZE,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    RoundRequest,
    Verdict,
)
from entidb.storage.weighing import weighing

#: Feed rows looked at for one page at most, however many a filter or ``have`` leaves out, so that
#: a page takes bounded time.
SCAN_ROWS_MAX = 20_000
#: Entities read at a time while a page fills: as many as can be 16 MiB each without hurting.
#: A thousand at a time would be 16 GB then.
READ_ROWS = 16
#: And at most, when they turn out to be small.
READ_ROWS_MAX = 64
#: Where each read takes its time, and it is known before how much it brings.
READ_FAR_MAX = 512
#: Payload bytes of a page at most, whatever a client asks for; a larger single commit is sent
#: whole (R19).
PAGE_BYTES_MAX = 8 * 1024 * 1024
#: A page ends at the first commit after it names so many collections. With the largest commit it
#: still names fewer than the 4,096 that devices take.
PAGE_NAMES_MAX = 1024
#: What a pulled operation takes on the wire beside its payload, roughly.
OPERATION_OVERHEAD_BYTES = 32

#: A state of a database, to be read by one thread.
View = Writer
#: The place of an entity in the feed: commit, number of its collection, id.
Place = tuple[int, int, bytes]
#: Of each entity its version, device and time, one after another.
Fields = Sequence[Any]
Payloads = Sequence[bytes | None]


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
        self._bytes_read = 0
        self._weigh = weighing(view.snapshot)

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
        at, rows = 0, READ_ROWS
        while at < len(keys):
            part = chosen[at : at + rows]
            fields, payloads = self._read(part, keys[at : at + rows])
            if not self._add(part, fields, payloads):
                return self._last, True
            at += rows
            # As many as fit, going by those that were read; stale ones are none of the page's.
            if at >= len(keys):
                break
            mean = self._bytes_read // at + 1
            rows = self._at_once((self._bytes_max - self._size) // mean, keys, at)
        # A pull moves the cursor over what it leaves out as well (R31).
        return (places[-1][0] if more else head), more

    def _at_once(self, rows: int, keys: Sequence[bytes], at: int) -> int:
        """How many of ``rows`` are read at once, from ``at`` on."""
        ahead = keys[at : at + min(rows, READ_FAR_MAX)]
        if self._weigh is not None and len(ahead) > READ_ROWS_MAX:
            weight = self._weigh(ahead)
            if weight is not None and weight <= PAGE_BYTES_MAX:
                return len(ahead)
            self._weigh = None  # nor will the next ones be any better, mostly
        return max(READ_ROWS, min(rows, READ_ROWS_MAX))

    def _read(self, places: Sequence[Place], keys: Sequence[bytes]) -> tuple[Fields, Payloads]:
        rows = self._view.snapshot.get_many(keys)
        if None in rows:
            sequence, _, entity_id = places[rows.index(None)]
            raise _corrupt(sequence, entity_id, "names an entity that is not there")
        there = cast("list[bytes]", rows)
        payloads = payloads_of(there)
        self._bytes_read += _weight(payloads)
        return shown_fields(there), payloads

    def _add(self, places: Sequence[Place], fields: Fields, payloads: Payloads) -> bool:
        """False if the page is full: cut between commits, the rest opens the next one."""
        size, last, bytes_max = self._size, self._last, self._bytes_max
        begin, add, indexes = self._encoded.begin, self._encoded.add, self._indexes
        for place, version, device, timestamp, payload in zip(
            places, fields[::3], fields[1::3], fields[2::3], payloads, strict=True
        ):
            sequence, number, entity_id = place
            if version != sequence and self._is_stale(place, version):
                continue
            if sequence != last:
                if size >= bytes_max or len(indexes) >= PAGE_NAMES_MAX:
                    return False
                begin(version, device, timestamp)
                last = self._last = sequence
            size += OPERATION_OVERHEAD_BYTES + (0 if payload is None else len(payload))
            index = indexes.get(number)
            if index is None:
                index = indexes[number] = len(self.names)
                self.names.append(self._wanted[number].name)
            add(index, entity_id, payload)
        self._size = size
        return True

    @property
    def is_empty(self) -> bool:
        return not self.names

    def _is_stale(self, place: Place, version: int) -> bool:
        """Whether the entity of a feed row, which is at ``version``, has changed since; then it
        comes with that change. Raises ``CorruptionError`` if that cannot be."""
        sequence, _, entity_id = place
        if version < sequence or version > self._view.head.sequence:
            raise _corrupt(sequence, entity_id, f"names an entity that is at {version}")
        return version > sequence

    def encode(self, message: PullResponse) -> bytes:
        return self._encoded.encode(message)


class ColumnPage(Page):
    """The same page in columns, a few dozen entities at a time and none by itself."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._ids: list[bytes] = []
        self._heads: list[bytes] = []
        self._sizes: list[int] = []
        self._values: list[bytes] = []
        self._columns: list[int] = []

    def _add(self, places: Sequence[Place], fields: Fields, payloads: Payloads) -> bool:
        versions = fields[::3]
        if versions != tuple([place[0] for place in places]):
            kept = [at for at, v in enumerate(versions) if not self._is_stale(places[at], v)]
            places, payloads = [places[at] for at in kept], [payloads[at] for at in kept]
            fields = [field for at in kept for field in fields[3 * at : 3 * at + 3]]
        count = self._fitting(places, payloads)
        if count:
            self._keep(places[:count], fields[: 3 * count], payloads[:count])
        return count == len(places)

    def _keep(self, places: Sequence[Place], fields: Fields, payloads: Payloads) -> None:
        sequences, numbers, entity_ids = zip(*places, strict=True)
        for number in dict.fromkeys(numbers):
            if number not in self._indexes:
                self._indexes[number] = len(self.names)
                self.names.append(self._wanted[number].name)
        self._ids += entity_ids
        self._columns += map(self._indexes.__getitem__, numbers)
        self._heads.append(protocol.column_heads(fields))
        if None in payloads:
            self._sizes += [TOMBSTONE_SIZE if value is None else len(value) for value in payloads]
            self._values += filter(None, payloads)
        else:
            values = cast("Sequence[bytes]", payloads)
            self._sizes += map(len, values)
            self._values += values
        self._last = sequences[-1]

    def _fitting(self, places: Sequence[Place], payloads: Payloads) -> int:
        """How many of these the page takes: all, or those before the commit that finds it full."""
        whole = self._size + _weight(payloads)
        full_of_names = len(self._indexes) >= PAGE_NAMES_MAX
        if whole < self._bytes_max and not full_of_names:
            self._size = whole
            return len(payloads)
        last = self._last
        for at, ((sequence, _, _), payload) in enumerate(zip(places, payloads, strict=True)):
            if sequence != last and (full_of_names or self._size >= self._bytes_max):
                return at
            last = sequence
            self._size += _weight([payload])
        return len(payloads)

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


def _weight(payloads: Payloads) -> int:
    """What operations with these payloads take on the wire, roughly."""
    values = filter(None, payloads) if None in payloads else cast("Sequence[bytes]", payloads)
    return OPERATION_OVERHEAD_BYTES * len(payloads) + sum(map(len, values))


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


def seen_by(request: PullRequest | PushRequest | RoundRequest) -> int:
    """The newest commit that the device says it has seen. What it got for its own pushes counts
    (R21), and what it built on."""
    if isinstance(request, RoundRequest):
        return max(seen_by(request.pull), seen_by(request.push))
    newest = max(request.cursor, 0 if request.seen is None else request.seen.version)
    if isinstance(request, PullRequest):
        return max(newest, request.have[-1][1]) if request.have else newest
    for transaction in request.transactions:
        for operation in transaction.operations:
            if operation.base_version > newest:
                newest = operation.base_version
    return newest


def unseen(request: RoundRequest, answer: PushResponse | None) -> PullRequest:
    """What the device of a round has to pull once it has ``answer``: what the answer has accepted
    it has. None: nothing was decided."""
    pull = request.pull
    if answer is None:
        return pull
    accepted = {
        (result.version, result.version)
        for result in answer.results
        if result.verdict == Verdict.ACCEPTED and result.version > pull.cursor
    }
    joined: list[tuple[int, int]] = []
    for first, last in sorted([*pull.have, *accepted]):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return replace(pull, have=joined)


def live_entities(view: View, wanted: Iterable[int]) -> int:
    """How many there are in the collections with these numbers."""
    counts = view.snapshot.get_many([count_key(number) for number in wanted])
    return sum(unpack_u64(raw) for raw in counts if raw is not None)


def wanted_collections(
    catalogue: Catalogue, asked: list[str] | None, allowed: frozenset[str] | None
) -> dict[int, CollectionInfo]:
    """The collections to send, by number: those asked for that the token grants."""
    names = None if asked is None else frozenset(asked)
    return {
        info.number: info
        for info in catalogue.by_name.values()
        if info.synced
        and (names is None or info.name in names)
        and (allowed is None or info.name in allowed)
    }

"""What one commit is put together over: a snapshot that reads fall through to, and the changes.

Beside the changes themselves it keeps what all of them have in common: the catalogue as the commit
leaves it, places in the feed (R11), the count of each collection. Rows of entities are
``entities``'s, which calls this for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from entidb.db.catalogue import Catalogue, CollectionInfo
from entidb.db.records import (
    FEED,
    FORMAT_PLAIN,
    META_CATALOGUE,
    META_FORMAT,
    META_STALE,
    STALE,
    count_key,
    decode_stale,
    encode_format,
    encode_stale,
    end_of,
    format_of,
    pack_feed_key,
    pack_u64,
    sequence_key,
    split_feed_key,
    unpack_u64,
)
from entidb.errors import CorruptionError
from entidb.storage import Snapshot

#: Stale feed rows of one commit that are worth a list; to list fewer costs as much as to remove
#: them.
STALE_FROM = 4
#: And how many may wait. All together are removed much faster than a few at a time, because they
#: share pages; until then they take room, and readers of the feed pass over them.
STALE_ROWS_MAX = 2000
#: Collections whose counts are taken along from one commit to the next, or a few more.
COUNTS_KEPT = 16

#: (collection number, entity id): what identifies an entity inside one database.
Ref = tuple[int, bytes]


class Overlay:
    """Reads fall through to ``snapshot``, writes stay in ``changes``."""

    _grown: Catalogue | None = None

    def __init__(
        self, snapshot: Snapshot, catalogue: Catalogue, device_id: bytes, stale_rows_max: int
    ) -> None:
        self.snapshot = snapshot
        self.catalogue = catalogue
        self.device_id = device_id
        self.changes: dict[bytes, bytes | None] = {}
        self._counts: dict[int, int] = {}
        #: Of some collections, how many entities they have: as this commit leaves them from
        #: ``finish_places`` on. Never changed, but replaced.
        self.known_counts: dict[int, int] = {}
        self._stale: list[bytes] = []
        self._stale_rows_max = stale_rows_max

    # ------------------------------------------------------------ raw rows

    def get(self, key: bytes) -> bytes | None:
        if key in self.changes:
            return self.changes[key]
        return self.snapshot.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if len(keys) == 1:
            (key,) = keys
            return [self.changes[key] if key in self.changes else self.snapshot.get(key)]
        found = self.snapshot.get_many(keys)
        changes = self.changes
        if changes:
            for index, key in enumerate(keys):
                if key in changes:
                    found[index] = changes[key]
        return found

    def over(self, page: list[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes | None]]:
        """Rows of the snapshot as this commit leaves them, so far."""
        changes = self.changes
        return [(key, changes.get(key, raw)) for key, raw in page] if changes else page

    @property
    def is_empty(self) -> bool:
        """Whether this commit changes nothing so far."""
        return not self.changes

    # ------------------------------------------------------------ catalogue

    def set_catalogue(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        # ``finish`` encodes it: a commit may change it once for each of a thousand collections.
        self.changes[META_CATALOGUE] = b""

    def collection(self, name: str) -> CollectionInfo:
        """The collection called ``name``, made if there is none. Raises ``ScopeError`` when
        there are too many."""
        info = self.catalogue.by_name.get(name)
        if info is None:
            if self.catalogue is not self._grown:
                # Nothing else sees it before it is stored, so the next ones cost nothing.
                self._grown = self.catalogue.copy()
            info = self._grown.add(name)
            self.set_catalogue(self._grown)
        return info

    # ------------------------------------------------------------ feed

    def move_feed(self, ref: Ref, old_sequence: int, sequence: int) -> None:
        """The feed holds every entity at its latest change (R11)."""
        if old_sequence:
            self.leave_feed(pack_feed_key(FEED, old_sequence, *ref))
        self.changes[pack_feed_key(FEED, sequence, *ref)] = b""

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
        self.changes[META_STALE] = pack_u64(0)

    def feed_rows(self) -> list[tuple[tuple[int, int, bytes], bytes]]:
        """What this commit adds to the feed, in order: (sequence, collection, entity_id) and the
        row's record."""
        return sorted(
            (split_feed_key(key), record)
            for key, record in self.changes.items()
            if record is not None and key.startswith(FEED)
        )

    # ------------------------------------------------------------ counts

    def count(self, collection: int, by: int) -> None:
        if by:
            self._counts[collection] = self._counts.get(collection, 0) + by

    def set_count(self, collection: int, live: int) -> None:
        """The collection's count is ``live`` plus what this commit adds from now on."""
        self._counts.pop(collection, None)
        self.changes[count_key(collection)] = pack_u64(live)
        self.known_counts = self.known_counts | {collection: live}

    # ------------------------------------------------------------ the end of a commit

    def finish_places(self, sequence: int) -> None:
        """Counts, stale places and the catalogue, once for the whole commit, whose newest change
        is at ``sequence``."""
        if self._counts:
            self._finish_counts()
        if self._stale:
            stale, self._stale = self._stale, []
            if len(stale) < STALE_FROM:
                self.changes.update(dict.fromkeys(stale))
            else:
                self._finish_stale(stale, sequence)
        if META_CATALOGUE in self.changes:
            self.changes[META_CATALOGUE] = self.catalogue.encode()

    def _finish_counts(self) -> None:
        known = self.known_counts
        counts = dict(known) if len(known) < COUNTS_KEPT else {}
        for collection, by in self._counts.items():
            if by:
                key = count_key(collection)
                if (live := known.get(collection)) is None:
                    raw = self.get(key)
                    live = 0 if raw is None else unpack_u64(raw)
                live += by
                if live < 0:
                    raise CorruptionError(
                        f"the count of collection number {collection} would fall below zero; "
                        "run `entidb verify` on this database"
                    )
                self.changes[key] = pack_u64(live)
                counts[collection] = live
        self.known_counts = counts
        self._counts.clear()

    def _finish_stale(self, stale: list[bytes], sequence: int) -> None:
        waiting = self.stale_rows + len(stale)
        if waiting > self._stale_rows_max:
            self.changes.update(dict.fromkeys(stale))
            self.sweep_stale()
            return
        self.changes[sequence_key(STALE, sequence)] = encode_stale(stale)
        if self.get(META_STALE) is None:
            # From here on an older EntiDB, which knows no stale rows, has to stay away.
            raw = self.get(META_FORMAT)
            self.changes[META_FORMAT] = encode_format(max(FORMAT_PLAIN, format_of(raw or b"")))
        self.changes[META_STALE] = pack_u64(waiting)

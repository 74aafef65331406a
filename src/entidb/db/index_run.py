"""Building an index from sorted runs: many places made beside the work of others, written in order.

The places of entities in the order of their ids lie all over an index, and each commit would write
most of its pages again. So a run reads many entities, without the turn to write, sorts their
places, and writes them a part at a time. What is committed meanwhile, by any process, keeps its own
places in step, as always. The run learns from the feed (R11) which entities those commits changed:
it leaves out what it has read of them, and looks at each of them again, in the turn.
"""

from __future__ import annotations

import math
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from entidb import cbor
from entidb.db.catalogue import CollectionInfo, IndexInfo
from entidb.db.index_columns import names_of
from entidb.db.index_keys import index_prefix
from entidb.db.index_parts import Parts
from entidb.db.indexing import MakePlaces, places_of
from entidb.db.records import (
    DIRTY,
    ENTITY_HEAD,
    FEED,
    META_FLOOR,
    PENDING_HEAD,
    TOMBSTONE,
    end_of,
    payload_of,
    split_feed_keys,
    unpack_u64,
)
from entidb.db.writer import Writer, feed_bounds
from entidb.storage.base import opening_of
from entidb.types import ID_BYTES

#: Entities of the first run, of those after runs that came to their end (each so many times as long
#: as the one before, so that a program that runs for a second gets on, too), at most, and of those
#: after runs that did not, at least.
FIRST_ROWS: Final = 10_000
LONGER: Final = 16
ROWS_MIN: Final = 1_000
ROWS_MAX: Final = 10_000_000
#: Bytes of all runs of a process together, and of one of them at least.
_BYTES_MAX: Final = 96 << 20
_BYTES_LEAST: Final = 4 << 20
_PAGE_ROWS: Final = 512
#: Entities that are read in one snapshot. A longer one would keep a file from growing.
_AT_ONCE: Final = 8_192
#: Rows of the feed that are read at once; and that are learnt from while others wait: an entity of
#: its own is as much work as so many of others. Times in a row at which that may be too few.
_FEED_ROWS: Final = 2_000
LEARNT_MAX: Final = 20_000
_NOTE: Final = 4
_BEHIND_MAX: Final = 3
#: Changed entities that a run knows of, and that one commit looks at again, at most.
CHANGED_MAX: Final = 100_000
_LOOKED_AT_MAX: Final = 500
#: Of a changed entity: it was read with a place; it has one now.
_HAD: Final = 2
_HAS: Final = 1


class IndexRun:
    """The places of the entities behind the id ``after`` of a table, up to ``last`` (None: all).
    ``read`` reads them; what is committed from the moment of ``view`` on, it learns."""

    def __init__(
        self, view: Writer, info: CollectionInfo, index: IndexInfo, make: MakePlaces, rows: int
    ) -> None:
        self.rows = rows
        self.number, self.table = index.number, info.table
        self.after = index.after if index.table == info.table else b""
        #: Up to where it has read, until it has read all.
        self.last: bytes | None = self.after
        self.is_read = False
        #: Whether it did not come to its end, because it cannot know what was changed meanwhile.
        self.is_void = False
        self._prefix, self._info = index_prefix(index.number, info.table), info
        self._make, self._names = make, names_of(index)
        self._parts = Parts(self._prefix)
        self._read = 0
        self._opening = opening_of(view.snapshot.mark)
        #: The commit up to which it has learnt what was changed, and where in the feed it goes on
        #: if it has learnt more. Whether it has to learn more before it may write, and how many
        #: times in a row.
        self._sequence, self._feed_from = view.head.sequence, b""
        self._is_behind = False
        self._behind = 0
        #: Entities that it has read and that have a place: their ids, of each page joined, the
        #: first of each page, and how many.
        self._ids: list[bytes] = []
        self._firsts: list[bytes] = []
        self._having = 0
        #: Entities of its own that were changed since: whether it has read that they have a place,
        #: and whether they have one now. Those that are to be looked at again; and what the commit
        #: of now sees of some of them.
        self._changed: dict[bytes, int] = {}
        self._due: dict[bytes, None] = {}
        self._seen: dict[bytes, int] = {}
        with _lock:
            _runs.add(self)

    # ------------------------------------------------------------ reading

    def read(self, view: Writer, is_ended: Callable[[], bool]) -> None:
        """Some more, as it is in ``view``, which is newer than all before. It ``is_read`` when it
        has so many ``rows``, or as much as there is room for, or once it ``is_ended``."""
        if not self._learn(view):
            self.is_read = True
            return
        read = 0
        for page in _pages(view, self._info, self.last or b""):
            self._add(page)
            read += len(page)
            if len(page) < _PAGE_ROWS:
                continue  # these are the last
            self.is_read = self._read >= self.rows or is_ended() or self._is_full()
            if self.is_read or read >= _AT_ONCE:
                break
        else:
            self.is_read = True
            if read == self._read:
                # All in one view. After several, the next run reads what came meanwhile: there may
                # be more of it than should be looked at one by one.
                self.last = None
        if self.is_read:
            self._parts.sort()

    def _add(self, page: list[tuple[bytes, bytes]]) -> None:
        ids, payloads = _columns(page)
        places, ids = places_of(b"", ids, payloads, self._names, self._make)
        self._parts.add(places)
        if ids:
            self._ids.append(b"".join(ids))
            self._firsts.append(ids[0])
            self._having += len(ids)
        self.last = page[-1][0][-ID_BYTES:]
        self._read += len(page)

    @property
    def size(self) -> int:
        """In bytes."""
        return self._parts.size + ID_BYTES * self._having

    def _is_full(self) -> bool:
        with _lock:
            others = sum([run.size for run in _runs if run is not self])
        return self.size >= max(_BYTES_LEAST, _BYTES_MAX - others)

    # ------------------------------------------------------------ what is committed meanwhile

    def _learn(self, view: Writer, most: float = math.inf) -> bool:
        """Which of its entities were changed up to ``view``; if that is more than
        ``most``, it is behind. False, and it is void, if nobody can say that any
        more: what was read or written may be lost, tombstones are purged, or there were too many
        changes."""
        snapshot, head, number = view.snapshot, view.head.sequence, self._info.number
        if opening_of(snapshot.mark) != self._opening or head < self._sequence:
            self.is_void = True
        elif head > self._sequence:
            raw = snapshot.get(META_FLOOR)
            self.is_void |= raw is not None and unpack_u64(raw) > self._sequence
        self._is_behind = False
        while head > self._sequence and not self.is_void and not self._is_behind:
            start, stop = self._feed_from or feed_bounds(self._sequence)[0], end_of(FEED)
            keys = snapshot.scan_keys(start, stop, limit=_FEED_ROWS)
            # What is behind the last one that was read will be read as it is then.
            last = self.last
            mine = [
                one
                for _, collection, one in split_feed_keys(keys)
                if collection == number and one > self.after and (last is None or one <= last)
            ]
            for one in mine:
                self._take_note(one)
            most -= len(keys) + _NOTE * len(mine)
            self.is_void = len(self._changed) > CHANGED_MAX
            if len(keys) < _FEED_ROWS:
                self._sequence, self._feed_from = head, b""
            else:
                self._feed_from = keys[-1] + b"\0"
                self._is_behind = most < 0
        self._behind += self._is_behind
        self.is_void |= self._behind > _BEHIND_MAX
        return not self.is_void

    def _take_note(self, entity_id: bytes) -> None:
        self._changed[entity_id] = _HAD if self._has(entity_id) else 0
        self._due[entity_id] = None

    def _has(self, entity_id: bytes) -> bool:
        """Whether it has read that the entity has a place."""
        page = bisect_right(self._firsts, entity_id) - 1
        if page < 0:
            return False
        ids = self._ids[page]
        at = ids.find(entity_id)
        while at > 0 and at % ID_BYTES:
            at = ids.find(entity_id, at + 1)
        return at >= 0

    def _unchanged(self, places: list[bytes]) -> list[bytes]:
        """Those of entities that were not changed since."""
        changed = self._changed
        if not changed:
            return places
        return [place for place in places if place[-ID_BYTES:] not in changed]

    def _look_again(self, writer: Writer, count: int) -> None:
        """Put some of the changed entities into their places."""
        prefix, make = self._prefix, self._make
        ids = list(islice(self._due, count))
        keys = [self._info.prefix + one for one in ids]
        self._seen = {}
        for one, raw in zip(ids, writer.snapshot.get_many(keys), strict=True):
            payload = None if raw is None else payload_of(raw)
            found = () if payload is None else make(cbor.decode_trusted(payload))
            for fields in found:
                writer.put(prefix + fields + one, b"")
            self._seen[one] = self._changed[one] & _HAD | (_HAS if found else 0)

    @property
    def counted(self) -> int:
        """Entities of its own that have a place as the commit of now leaves it."""
        known = self._changed | self._seen
        had = sum([each & _HAD for each in known.values()]) // _HAD
        return self._having - had + sum([each & _HAS for each in known.values()])

    # ------------------------------------------------------------ writing

    def goes_on(
        self, view: Writer, info: CollectionInfo, index: IndexInfo, most: float = math.inf
    ) -> bool:
        """Whether its next part is what the index lacks; it has learnt then what was committed, or
        ``most`` of it, for others wait."""
        after = index.after if index.table == info.table else b""
        mine = (self.number, self.table, self.after) == (index.number, info.table, after)
        return mine and self.is_read and not self.is_void and self._learn(view, most)

    def is_overtaken(self, info: CollectionInfo, index: IndexInfo) -> bool:
        """Whether somebody else has carried on the build of this very index: it is neither where
        this run begins nor where it ends."""
        after = index.after if index.table == info.table else b""
        mine = (self.number, self.table) == (index.number, info.table)
        return mine and not self.is_void and after not in (self.after, self.last)

    @property
    def is_over(self) -> bool:
        """Whether all of it is written."""
        return self.is_read and not self.is_void and self._parts.is_over and not self._due

    def make_ready(self, count: int) -> None:
        """Merge what ``write`` is about to put, before the turn is taken."""
        self._parts.make_ready(count)

    def write(self, writer: Writer, count: int) -> tuple[int, bool]:
        """Put the next ``count`` places into a commit, or some more: how many, and whether these
        are the last. It goes on in that commit; ``wrote`` has to be called when that is through."""
        if self._is_behind:
            return 0, False
        places = self._parts.make_ready(count)
        writer.changes.update(dict.fromkeys(self._unchanged(places), b""))
        self._look_again(writer, min(count, _LOOKED_AT_MAX))
        is_last = self._parts.is_last and len(self._seen) == len(self._due)
        return len(places) + len(self._seen), is_last

    def wrote(self) -> None:
        if self._is_behind:
            return
        self._behind = 0
        self._parts.took()
        self._changed |= self._seen
        for one in self._seen:
            self._due.pop(one, None)
        self._seen = {}


#: Those of this process, and who looks at them.
_runs: weakref.WeakSet[IndexRun] = weakref.WeakSet()
_lock: Final = threading.Lock()


def _pages(view: Writer, info: CollectionInfo, after: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
    stop = end_of(info.prefix)
    start = info.prefix + after + b"\0" if after else info.prefix
    while page := view.snapshot.scan(start, stop, limit=_PAGE_ROWS):
        yield page
        start = page[-1][0] + b"\0"


def _columns(page: list[tuple[bytes, bytes]]) -> tuple[list[bytes], list[bytes]]:
    """The ids and payloads of entities, without deleted ones."""
    heads = {_head_of(flags) for flags in {raw[:1] for _, raw in page}}
    if len(heads) == 1 and (head := heads.pop()):
        return [key[-ID_BYTES:] for key, _ in page], [raw[head:] for _, raw in page]
    ids, payloads = [], []
    for key, raw in page:
        payload = payload_of(raw)
        if payload is not None:
            ids.append(key[-ID_BYTES:])
            payloads.append(payload)
    return ids, payloads


def _head_of(flags: bytes) -> int:
    """Where the payload begins of a row that begins with ``flags``; 0: ``payload_of`` knows."""
    if not flags or flags[0] & TOMBSTONE:
        return 0
    return PENDING_HEAD if flags[0] & DIRTY else ENTITY_HEAD


__all__ = ["FIRST_ROWS", "LONGER", "ROWS_MAX", "ROWS_MIN", "IndexRun"]

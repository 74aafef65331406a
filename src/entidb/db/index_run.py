"""Building an index from sorted runs: many places made beside the work of others, written in order.

The places of entities in the order of their ids lie all over an index, and each commit would write
most of its pages again. So a run reads many entities in one snapshot, without the turn to write,
sorts their places, and writes them a part at a time. It counts for as long as nobody else commits;
then what it has written stays, and the rest is done entity by entity, in the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final

from entidb.db.catalogue import CollectionInfo, IndexInfo
from entidb.db.index_columns import names_of
from entidb.db.index_keys import index_prefix
from entidb.db.indexing import MakePlaces, places_of_rows
from entidb.db.moment import Moment
from entidb.db.records import end_of
from entidb.db.writer import Writer
from entidb.types import ID_BYTES

#: Entities of the first run, of those after runs that came to their end, at most, and of those
#: after runs that did not, at least.
FIRST_ROWS: Final = 10_000
ROWS_MIN: Final = 1_000
ROWS_MAX: Final = 160_000
#: Places of one commit, which others wait for.
PLACES: Final = 5_000
_PAGE_ROWS: Final = 512
#: Places that are sorted at once.
_SORTED: Final = 10_000


class IndexRun:
    """The places of the entities behind the id ``after`` of a table, up to ``last`` (None: all)."""

    def __init__(
        self,
        view: Writer,
        info: CollectionInfo,
        index: IndexInfo,
        make: MakePlaces,
        rows: int,
        is_ended: Callable[[], bool],
    ) -> None:
        """Of some ``rows`` entities, or fewer once it ``is_ended``."""
        self.rows = rows
        self.number, self.table = index.number, info.table
        self.after = index.after if index.table == info.table else b""
        self.last: bytes | None = None
        #: Until when it is true; passes its own commits.
        self.moment: Moment = view.moment
        #: Entities that have a place.
        self.counted = 0
        #: Whether it did not come to its end, because somebody committed.
        self.is_void = False
        self._at = 0
        prefix, names, read = index_prefix(index.number, info.table), names_of(index), 0
        sorted_parts: list[list[bytes]] = []
        places: list[bytes] = []
        for page in _pages(view, info, self.after):
            made, counted = places_of_rows(prefix, page, names, make)
            places += made
            if len(places) >= _SORTED:
                places.sort()
                sorted_parts.append(places)
                places = []
            self.counted += counted
            read += len(page)
            if len(page) == _PAGE_ROWS and (read >= rows or is_ended()):
                self.last = page[-1][0][-ID_BYTES:]
                break
        places.sort()
        self._places = _merged([*sorted_parts, places])

    def goes_on(self, info: CollectionInfo, index: IndexInfo) -> bool:
        """Whether its next part is what the index lacks, and nobody has committed meanwhile."""
        after = index.after if index.table == info.table else b""
        mine = (self.number, self.table, self.after) == (index.number, info.table, after)
        return mine and not self.is_void and self.moment.is_current()

    def is_overtaken(self, info: CollectionInfo, index: IndexInfo) -> bool:
        """Whether somebody else has carried on the build of this very index: it is neither where
        this run begins nor where it ends."""
        after = index.after if index.table == info.table else b""
        mine = (self.number, self.table) == (index.number, info.table)
        return mine and not self.is_void and after not in (self.after, self.last)

    def write(self, writer: Writer, count: int) -> bool:
        """Put the next ``count`` places into a commit; whether these are the last. ``wrote`` has to
        be called when the commit is through."""
        part = self._places[self._at : self._at + count]
        writer.changes.update(dict.fromkeys(part, b""))
        return self._at + count >= len(self._places)

    def wrote(self, moment: Moment, count: int) -> None:
        self._at += count
        self.moment = moment
        if self._at >= len(self._places):
            self._places = []


def _merged(parts: list[list[bytes]]) -> list[bytes]:
    """All of them in order, where each is. Sorting all at once would hold the interpreter, for
    which other threads wait, four times as long."""
    while len(parts) > 1:
        parts = [sorted(chain.from_iterable(parts[at : at + 2])) for at in range(0, len(parts), 2)]
    return parts[0]


def _pages(view: Writer, info: CollectionInfo, after: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
    stop = end_of(info.prefix)
    start = info.prefix + after + b"\0" if after else info.prefix
    while page := view.snapshot.scan(start, stop, limit=_PAGE_ROWS):
        yield page
        start = page[-1][0] + b"\0"


__all__ = ["FIRST_ROWS", "PLACES", "ROWS_MAX", "ROWS_MIN", "IndexRun"]

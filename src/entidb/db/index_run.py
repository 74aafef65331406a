"""Building an index from sorted runs: many places made beside the work of others, written in order.

The places of entities in the order of their ids lie all over an index, and each commit would write
most of its pages again. So a run reads many entities in one snapshot, without the turn to write,
sorts their places, and writes them a part at a time. What is committed meanwhile keeps its own
places in step, as always, and the run hears of it: it leaves out what is no place any more. After a
commit that it has not heard of, such as another process's, what it has written stays, and the rest
is done entity by entity, in the turn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from entidb.db.catalogue import CollectionInfo, IndexInfo
from entidb.db.index_columns import names_of
from entidb.db.index_keys import index_prefix
from entidb.db.indexing import Counted, Listener, MakePlaces, places_of_rows
from entidb.db.moment import Moment
from entidb.db.records import end_of
from entidb.db.writer import Writer
from entidb.types import ID_BYTES

#: Entities of the first run, of those after runs that came to their end, at most, and of those
#: after runs that did not, at least.
FIRST_ROWS: Final = 10_000
ROWS_MIN: Final = 1_000
ROWS_MAX: Final = 160_000
_PAGE_ROWS: Final = 512
#: Places that are sorted at once.
_SORTED: Final = 10_000


class IndexRun:
    """The places of the entities behind the id ``after`` of a table, up to ``last`` (None: all), as
    they are in ``view``; ``read`` reads them. It hears of commits from here on."""

    def __init__(self, view: Writer, info: CollectionInfo, index: IndexInfo) -> None:
        self.rows = 0
        self.number, self.table = index.number, info.table
        self.after = index.after if index.table == info.table else b""
        self.last: bytes | None = None
        #: Whether it did not come to its end, because of a commit that it has not heard of.
        self.is_void = False
        self._prefix = index_prefix(index.number, info.table)
        #: Of the last commit that it has heard of, and what its mark is once that is stored.
        self._moment, self._mark = view.moment, view.moment.mark
        self._is_read = False
        #: Entities that have a place; what became of that since they were read.
        self._counted = 0
        self._since: list[Counted] = []
        #: Places that were taken away since they were read.
        self._gone: set[bytes] = set()
        #: Sorted places, and how many of each are written; what the commit of now takes.
        self._parts: list[list[bytes]] = []
        self._taken: list[int] = []
        self._taking: list[int] = []

    def read(
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
        prefix, names, read = self._prefix, names_of(index), 0
        places: list[bytes] = []
        for page in _pages(view, info, self.after):
            made, counted = places_of_rows(prefix, page, names, make)
            places += made
            if len(places) >= _SORTED:
                places.sort()
                self._parts.append(places)
                places = []
            self._counted += counted
            read += len(page)
            if len(page) == _PAGE_ROWS and (read >= rows or is_ended()):
                self.last = page[-1][0][-ID_BYTES:]
                break
        places.sort()
        self._parts.append(places)
        self._taken = [0] * len(self._parts)
        self._is_read = True

    # ------------------------------------------------------------ what is committed meanwhile

    def hears(self, moment: Moment) -> bool:
        """Whether a commit that is decided at ``moment`` is the next one."""
        return moment.mark == self._mark == self._moment.mark and not self.is_void

    def hear(
        self,
        moment: Moment,
        changes: Mapping[bytes, bytes | None],
        uncounted: Mapping[bytes, list[Counted]],
    ) -> None:
        """At the end of a commit, which may still fail: then no mark is the one that is expected,
        and the run is void."""
        if not changes:
            return
        prefix = self._prefix
        self._moment, self._mark = moment, moment.mark + 1
        # What is put again after that, its commit puts.
        gone = [key for key, to in changes.items() if to is None and key.startswith(prefix)]
        self._gone.update(gone)
        self._since += uncounted.get(prefix, ())

    @property
    def is_current(self) -> bool:
        """Whether it has heard of all that was committed."""
        return self._moment.mark == self._mark and self._moment.is_current()

    @property
    def counted(self) -> int:
        """Entities of its own that have a place now."""
        last = self.last
        return self._counted + sum([by for one, by in self._since if last is None or one <= last])

    def goes_on(self, info: CollectionInfo, index: IndexInfo) -> bool:
        """Whether its next part is what the index lacks, and it has heard of all commits."""
        after = index.after if index.table == info.table else b""
        mine = (self.number, self.table, self.after) == (index.number, info.table, after)
        return mine and self._is_read and not self.is_void and self.is_current

    def is_overtaken(self, info: CollectionInfo, index: IndexInfo) -> bool:
        """Whether somebody else has carried on the build of this very index: it is neither where
        this run begins nor where it ends."""
        after = index.after if index.table == info.table else b""
        mine = (self.number, self.table) == (index.number, info.table)
        return mine and not self.is_void and after not in (self.after, self.last)

    def write(self, writer: Writer, count: int) -> tuple[int, bool]:
        """Put the next ``count`` places into a commit, or some more: how many, and whether these
        are the last. ``wrote`` has to be called when the commit is through."""
        # The parts are merged as far as they are written. To sort all at once would hold the
        # interpreter, for which other threads wait, for as long as a commit takes.
        taking = list(self._taken)
        due = [at for at, part in enumerate(self._parts) if taking[at] < len(part)]
        while due and count > 0:
            share = max(1, count // len(due))
            ends = [min(taking[at] + share, len(self._parts[at])) for at in due]
            up_to = min([self._parts[at][end - 1] for at, end in zip(due, ends, strict=True)])
            for at, end in zip(due, ends, strict=True):
                part, begin = self._parts[at], taking[at]
                taking[at] = bisect_right(part, up_to, begin, end)
                places = part[begin : taking[at]]
                if self._gone:
                    places = [place for place in places if place not in self._gone]
                writer.changes.update(dict.fromkeys(places, b""))
                count -= taking[at] - begin
            due = [at for at in due if taking[at] < len(self._parts[at])]
        self._taking = taking
        return sum(taking) - sum(self._taken), not due

    def wrote(self, moment: Moment) -> None:
        self._taken, self._moment, self._mark = self._taking, moment, moment.mark
        if all(at == len(part) for at, part in zip(self._taken, self._parts, strict=True)):
            self._parts, self._taken = [], []


def listener_of(run: IndexRun | None, moment: Moment) -> Listener | None:
    """For a commit that is decided at ``moment``; None if there is no run, or none that goes on."""
    return partial(run.hear, moment) if run is not None and run.hears(moment) else None


def _pages(view: Writer, info: CollectionInfo, after: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
    stop = end_of(info.prefix)
    start = info.prefix + after + b"\0" if after else info.prefix
    while page := view.snapshot.scan(start, stop, limit=_PAGE_ROWS):
        yield page
        start = page[-1][0] + b"\0"


__all__ = ["FIRST_ROWS", "ROWS_MAX", "ROWS_MIN", "IndexRun", "listener_of"]

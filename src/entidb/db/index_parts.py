"""Many places in little memory: sorted in parts, and merged as far as they are taken.

To sort all at once would hold the interpreter, for which other threads wait, for as long as a
commit takes. And a place as an object of its own takes twice the memory of its bytes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import Final

#: Places that are sorted at once.
_SORTED: Final = 10_000
#: Places at which a merge can stop, about.
_STOPS: Final = 16_384
_OFFSET: Final = array("I").itemsize


class _Part:
    """Sorted places in one piece of memory. ``taken`` of them are taken, ``taking`` when that
    has come to pass which is made ready."""

    __slots__ = ("_all", "_ends", "taken", "taking")

    def __init__(self, places: list[bytes]) -> None:
        places.sort()
        self._all = b"".join(places)
        self._ends = array("I", accumulate(map(len, places), initial=0))
        self.taken = self.taking = 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, at: int) -> bytes:
        return self._all[self._ends[at] : self._ends[at + 1]]

    def between(self, begin: int, end: int, prefix: bytes) -> list[bytes]:
        each = self._all
        return [prefix + each[a:b] for a, b in pairwise(self._ends[begin : end + 1])]

    @property
    def size(self) -> int:
        return len(self._all) + _OFFSET * len(self._ends)


class Parts:
    """Places, which are added, then sorted, then taken in order. All begin with ``prefix``, which
    is not kept with each."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._parts: list[_Part] = []
        self._unsorted: list[bytes] = []
        #: In bytes, of what is sorted.
        self.size = 0
        #: Where a merge can stop; about so many places are between two of them.
        self._stops: list[bytes] = []
        self._every = 1
        #: How many stops are taken, and whether all is.
        self._at = 0
        self.is_over = False
        #: What is taken next, once that is known: the stops, and the places.
        self._next: tuple[int, list[bytes]] | None = None

    def add(self, places: list[bytes]) -> None:
        """Without their prefix."""
        self._unsorted += places
        if len(self._unsorted) >= _SORTED:
            self._pack()

    def _pack(self) -> None:
        part, self._unsorted = _Part(self._unsorted), []
        self._parts.append(part)
        self.size += part.size

    def sort(self) -> None:
        """All are added."""
        self._pack()
        every = self._every = 1 + sum(map(len, self._parts)) // _STOPS
        self._stops = sorted(
            [part[at] for part in self._parts for at in range(every - 1, len(part), every)]
        )

    def make_ready(self, count: int) -> list[bytes]:
        """The next ``count``, or some more, in order; the same until ``took`` is called."""
        if self._next is None:
            self._next = self._merge(count)
        return self._next[1]

    def _merge(self, count: int) -> tuple[int, list[bytes]]:
        if self.is_over:
            return self._at, []
        at = self._at + max(1, count // self._every)
        stop = self._stops[at - 1] if at < len(self._stops) else None
        places: list[bytes] = []
        for part in self._parts:
            end = len(part)
            part.taking = end if stop is None else bisect_right(part, stop, part.taken, end)
            places += part.between(part.taken, part.taking, self._prefix)
        places.sort()
        return at, places

    @property
    def is_last(self) -> bool:
        """Whether nothing is left behind what is ready."""
        return self.is_over or (self._next is not None and self._next[0] >= len(self._stops))

    def took(self) -> None:
        if self._next is None:
            return
        self._at, self._next = self._next[0], None
        for part in self._parts:
            part.taken = part.taking
        if self._at >= len(self._stops):
            self.is_over, self._parts, self._stops, self.size = True, [], [], 0


__all__ = ["Parts"]

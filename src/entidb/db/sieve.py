"""Passing over entities that cannot meet a condition, many at once and undecoded.

Canonical CBOR has one encoding for a value, so an entity whose ``kind`` is ``"tea"`` holds the
bytes of that key followed by those of that value. What is looked for is looked for in many rows
laid end to end: one search over them costs a fraction of a search in each.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

from entidb.db.conditions import Condition

#: Where in bytes, from a place on, is what is looked for; -1 if it is not there.
_Search = Callable[[bytes, int], int]
#: Different bytes that are searched for one after the other; more are one pattern.
_SEARCHES_MAX: Final = 4
#: And so many are more work to look for than decoding is.
_NEEDLES_MAX: Final = 100
_PATTERN_BYTES_MAX: Final = 4096
#: Bytes of rows that are laid end to end.
_JOINED_BYTES_MAX: Final = 4 << 20
#: A sieve that lets through more than one in so many is not worth its time, and is left out for so
#: many calls: what is alike often stands together.
_OF: Final = 2
_RESTS: Final = 8


class Sieve:
    """Which of many rows may meet a condition. Made anew for each reading."""

    __slots__ = ("_rests", "_searches")

    def __init__(self, condition: Condition) -> None:
        self._searches = _searches(condition)
        self._rests = 0

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._searches)

    def lets(self, row: bytes) -> bool:
        """Whether a single one may."""
        return not self._searches or any(find(row, 0) >= 0 for find in self._searches)

    def through(self, rows: Sequence[bytes]) -> Sequence[int]:
        """The places of those that may; the others do not."""
        if not self._searches:
            return range(len(rows))
        if self._rests:
            self._rests -= 1
            return range(len(rows))
        if sum(map(len, rows)) > _JOINED_BYTES_MAX:
            return [at for at, row in enumerate(rows) if self.lets(row)]
        joined = b"".join(rows)
        ends: list[int] | None = None
        found: set[int] = set()
        for find in self._searches:
            at = find(joined, 0)
            while at >= 0:
                if ends is None:
                    ends = list(accumulate(map(len, rows)))
                # What begins in one row and ends in the next is in neither; who decodes it sees.
                row = bisect_right(ends, at)
                if row >= len(ends):
                    break  # nothing is found behind the end of all, where an empty text is
                found.add(row)
                at = find(joined, ends[row])
        if len(found) * _OF > len(rows):
            self._rests = _RESTS
        return sorted(found)


def _searches(condition: Condition) -> tuple[_Search, ...]:
    needles = condition.needles()
    if not needles:
        pattern = condition.pattern()
        if pattern is None or len(pattern) > _PATTERN_BYTES_MAX:
            return ()
        return (_by_pattern(pattern),)
    if not all(needles) or len(needles) > _NEEDLES_MAX:
        return ()
    if len(needles) <= _SEARCHES_MAX:
        return tuple(map(_by_bytes, needles))
    return (_by_pattern(b"|".join(map(re.escape, needles))),)


def _by_bytes(needle: bytes) -> _Search:
    return lambda rows, start: rows.find(needle, start)


def _by_pattern(pattern: bytes) -> _Search:
    search = re.compile(pattern, re.DOTALL).search

    def find(rows: bytes, start: int) -> int:
        found = search(rows, start)
        return -1 if found is None else found.start()

    return find


__all__ = ["Sieve"]

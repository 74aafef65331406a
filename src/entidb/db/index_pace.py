"""How much one commit of a build does: as much as keeps others waiting for a few milliseconds.

A commit of so many places takes 5 ms where they lie together and the disk is fast, and 100 ms where
each lies in a page of its own. So what counts is the time that the last ones took, each from the
moment it had the turn. A part of that is the same however little is done, above all the flush: one
commit in a while is small, and what others take longer than that is the time that counts.
"""

from __future__ import annotations

from collections import deque
from typing import Final

#: Seconds that a commit of a build may take longer than a small one. Who writes meanwhile waits for
#: one of them, for its own flush, and for the interpreter.
STEP_S: Final = 0.010
#: Places, or rows, of a small commit, which is the first of so many; and how many of those say how
#: long one takes.
LEAST: Final = 250
_SMALL_EVERY: Final = 32
_SMALL_KEPT: Final = 4
#: How much the last commit says about the next.
_NEWS: Final = 0.3
#: What was expensive may not be so any more: it is forgotten by so much with each small commit.
_KEPT: Final = 0.98


class Pace:
    """For one kind of work."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = min(most, LEAST)
        self._large = self._least
        self._steps = 0
        #: Seconds of small ones, and how much each did; seconds for each place more.
        self._small: deque[tuple[float, int]] = deque(maxlen=_SMALL_KEPT)
        self._each_s = 0.0

    @property
    def count(self) -> int:
        """How much the next commit does."""
        return self._large if self._steps % _SMALL_EVERY else self._least

    def took(self, done: int, seconds: float) -> None:
        """A commit did so much, and had the turn for so long."""
        if done < self._least:
            return  # the last of something says nothing about the next
        self._steps += 1
        if done < 2 * self._least or not self._small:
            self._small.append((seconds, done))
            self._each_s *= _KEPT
        else:
            small_s, small = (
                sum(column) / len(self._small) for column in zip(*self._small, strict=True)
            )
            each_s = max(0.0, seconds - small_s) / (done - small)
            self._each_s += (each_s - self._each_s) * (_NEWS if self._each_s else 1)
        fits = self._most if self._each_s <= 0 else int(STEP_S / self._each_s)
        # One that was quick may have been lucky: a page that is written twice is written once.
        self._large = max(self._least, min(fits, 2 * self._large, self._most))


class Paces:
    """Of one database: places of runs, entities that are looked at in the turn, places that are
    emptied."""

    def __init__(self) -> None:
        self.places = Pace(5_000)
        self.rows = Pace(2_000)
        self.dropped = Pace(5_000)


__all__ = ["LEAST", "STEP_S", "Pace", "Paces"]

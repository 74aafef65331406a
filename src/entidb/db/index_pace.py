"""How much one commit of a build does: as much as keeps others waiting for a few milliseconds.

A commit of so many places takes 5 ms where they lie together and the disk is fast, and 100 ms where
each lies in a page of its own. So what counts is the time that the last ones took, each from the
moment it had the turn.
"""

from __future__ import annotations

from typing import Final

#: Seconds that a commit of a build may take. Who writes meanwhile waits for one of them, for its
#: own flush, and for the interpreter.
STEP_S: Final = 0.010
#: Places, or rows, of one commit at least: where a flush alone takes longer than that, less of them
#: would only be more flushes.
LEAST: Final = 250


class Pace:
    """For one kind of work: ``count`` is how much the next commit does, ``most`` at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = min(most, LEAST)
        self.count = min(most, 2 * LEAST)

    def took(self, done: int, seconds: float) -> None:
        """A commit did so much, and had the turn for so long."""
        if done < self._least:
            return  # the last of something says nothing about the next
        fits = self._most if seconds <= 0 else int(done * STEP_S / seconds)
        # One that was quick may have been lucky: a page that is written twice is written once.
        self.count = max(self._least, min(fits, 2 * self.count, self._most))


class Paces:
    """Of one database: places of runs, entities that are looked at in the turn, places that are
    emptied."""

    def __init__(self) -> None:
        self.places = Pace(5_000)
        self.rows = Pace(2_000)
        self.dropped = Pace(5_000)


__all__ = ["LEAST", "STEP_S", "Pace", "Paces"]

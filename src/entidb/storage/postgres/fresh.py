"""Which records of a large commit are new: PostgreSQL stores those in two thirds of the time that
it takes where each may replace another.

What a commit replaces was mostly read in its turn, and small records with short keys are replaced
again and again; all others are taken to be new. Where that is wrong PostgreSQL refuses the commit,
which has changed nothing then, and is made once more without guessing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from entidb.storage.checksums import Puts

Pairs = list[tuple[bytes, bytes]]

#: Records of a commit that are worth a guess.
_FROM: Final = 100
#: Keys of counters and of what there is once in a store are no longer than this.
_SHORT: Final = 12
#: Keys that are noted in one turn; who reads more is not guessed for.
_NOTED_MAX: Final = 20_000
#: Large commits without a guess after one that was wrong.
_WARY: Final = 16


class Fresh:
    """Of one opener. Used by the thread that has the turn; others may note what they have read."""

    def __init__(self) -> None:
        self._there: set[bytes] = set()
        self._noting = False
        self._wary = 0

    def turn_begins(self) -> None:
        self._noting = True

    def turn_ends(self) -> None:
        self._noting = False
        self._there = set()

    @property
    def noting(self) -> bool:
        """Whether what is read now may be about to be replaced."""
        return self._noting and len(self._there) <= _NOTED_MAX

    def note(self, keys: Iterable[bytes], found: Iterable[bytes | None]) -> None:
        """Those of ``keys`` whose values were ``found`` are there."""
        there = [key for key, value in zip(keys, found, strict=True) if value is not None]
        self._there.update(there)

    def guess(self, puts: Puts) -> tuple[Pairs, Pairs]:
        """What may be there already, and what is new."""
        if len(puts) < _FROM or not self.noting:
            return list(puts), []
        if self._wary:
            self._wary -= 1
            return list(puts), []
        there, pairs = self._there, list(puts)
        old = [pair for pair in pairs if len(pair[0]) <= _SHORT or pair[0] in there]
        if len(old) == len(pairs):
            return old, []
        return old, [pair for pair in pairs if len(pair[0]) > _SHORT and pair[0] not in there]

    def was_wrong(self) -> None:
        self._wary = _WARY


__all__ = ["Fresh"]

"""The listeners of a cycle's states and progress, and whether the cycle is inside one of them
now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from entidb.sync.state import SyncProgress, SyncState

StateListener = Callable[[SyncState, SyncState], None]
ProgressListener = Callable[[SyncProgress], None]


class Listeners:
    """The listeners of one engine."""

    def __init__(self) -> None:
        self.state: list[StateListener] = []
        self.progress: list[ProgressListener] = []
        #: Not 0 while the cycle's thread is inside a listener of the program: another number for
        #: each call.
        self.inside = 0
        self._told = 0

    def tell(self, listeners: Sequence[Callable[..., None]], *what: Any) -> None:
        """Call them one after the other. What one raises reaches the caller."""
        try:
            for listener in list(listeners):
                self._told += 1
                self.inside = self._told
                listener(*what)
        finally:
            self.inside = 0

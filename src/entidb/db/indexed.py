"""A database with indexes: what programs ask of them, and the thread that builds them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from functools import cached_property

from entidb.db.core import Core
from entidb.db.index_builder import IndexBuilder
from entidb.db.index_care import IndexStatus, build_on, declare, rebuild, statuses
from entidb.db.indexing import Index, checked
from entidb.types import Uncopied, check_number


class Indexed(Uncopied, Core):
    """The part of a ``Database`` that is about its indexes."""

    @cached_property
    def _builder(self) -> IndexBuilder:
        return IndexBuilder(self)

    def _declare_indexes(self, name: str, indexes: Sequence[Index]) -> None:
        if declare(self, name, checked(name, indexes)):
            self._builder.start()

    def _end_builder(self) -> None:
        """A build that is under way goes on when the database is opened the next time."""
        if "_builder" in vars(self):
            self._builder.end()
        self.index_run = None  # and its memory

    def indexes(self) -> list[IndexStatus]:
        """The indexes of all collections, and how far each is built."""
        return statuses(self)

    def build_indexes(self) -> None:
        """Build in the background what is to be built, unless that is under way."""
        self._builder.start()

    def wait_for_indexes(self, timeout_s: float | None = None) -> bool:
        """Return True when all indexes that this program can build are ready, and build meanwhile;
        False when ``timeout_s`` seconds are over, and the rest is built in the background. Raises
        ``ConfigError``, and what a commit does; what was built stays."""
        if timeout_s is not None:
            check_number("timeout_s", timeout_s, 0, threading.TIMEOUT_MAX)
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s

        def is_over() -> bool:
            return time.monotonic() >= until

        try:
            while build_on(self, is_over):
                if is_over():
                    self._builder.start()
                    return False
            return True
        finally:
            self.index_right.give_back()

    def rebuild_indexes(self, name: str | None = None) -> int:
        """Have the indexes of collection ``name``, or of all, built from nothing, in the
        background; how many there are. Queries do without them until they are ready."""
        count = rebuild(self, name)
        self._builder.start()
        return count


__all__ = ["Indexed"]

"""A database with indexes: what programs ask of them, and the thread that builds them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from entidb.db.core import Core
from entidb.db.index_builder import IndexBuilder
from entidb.db.index_care import IndexStatus, build_step, declare, rebuild, statuses
from entidb.db.indexing import Index, checked


class Indexed(Core):
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

    def indexes(self) -> list[IndexStatus]:
        """The indexes of all collections, and how far each is built."""
        return statuses(self)

    def build_indexes(self) -> None:
        """Build in the background what is to be built, unless that is under way."""
        self._builder.start()

    def wait_for_indexes(self) -> None:
        """Return when all indexes that this program can build are ready, and build meanwhile.
        Raises what a commit does; what was built stays."""
        while build_step(self):
            continue

    def rebuild_indexes(self, name: str | None = None) -> int:
        """Have the indexes of collection ``name``, or of all, built from nothing, in the
        background; how many there are. Queries do without them until they are ready."""
        count = rebuild(self, name)
        self._builder.start()
        return count


__all__ = ["Indexed"]

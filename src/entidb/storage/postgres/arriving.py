"""Stores in PostgreSQL that take several commits to make, and get their names together when they
are complete: until then nobody opens them.

Each is made under a name that is known for what it is, under a right that goes with the process.
What a dead process left behind is removed by the next who makes the same store, and by
``remove_dead``.

Not here: what is put into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Final

from psycopg import errors

from entidb.errors import DatabaseLockedError, DatabaseMovedError, StorageError
from entidb.storage.postgres.shelf import Shelf
from entidb.storage.postgres.store import PostgresStorage

#: Ends the name of one that is being made; no database of a server is called so.
_MARK: Final = "@copy"
#: Had by who makes a store; and for how many seconds who only clears up may have it.
ARRIVING: Final = "arriving"
_CLEARED_S: Final = 1.0
_TRIES: Final = 3


class Arriving:
    """Stores that are being made. ``arriving`` makes one of these."""

    def __init__(self, address: str, shelf: Shelf, names: Sequence[str], stack: ExitStack) -> None:
        self._shelf = shelf
        self._names = names
        self._stores = {name: self._begin(address, name, stack) for name in names}

    def _begin(self, address: str, name: str, stack: ExitStack) -> PostgresStorage:
        if self._shelf.holds(name):
            raise self._exists()
        for _ in range(_TRIES):
            store = stack.enter_context(closing(PostgresStorage.open(address, name + _MARK)))
            right = store.claim(ARRIVING)
            stack.callback(right.give_back)
            if not right.take(_CLEARED_S):
                raise DatabaseLockedError(
                    f"another copy to {self._shelf.where}#{name} is under way; wait for it, or "
                    "name another place"
                )
            with suppress(DatabaseMovedError):  # somebody has just cleared it away
                if store.mark() == 0:
                    stack.callback(self._shelf.remove, name + _MARK)
                    return store
            self._shelf.remove(name + _MARK)
        raise StorageError(f"{store.path} cannot be made anew")

    def store(self, name: str) -> PostgresStorage:
        """The one that is to get ``name``: empty, and closed by ``arriving``."""
        return self._stores[name]

    def finish(self) -> None:
        """Give all of them their names, in one commit. Raises ``StorageError``, code ``exists``, if
        one of the names was given to another meanwhile: then none has it."""
        named = [name + _MARK for name in self._names]
        with self._shelf.connection(f"naming stores at {self._shelf.where}") as connection:
            try:
                connection.execute(
                    "UPDATE entidb_store s SET name = n.name, epoch = epoch + 1, mark = mark + 1 "
                    "FROM unnest(%s::text[], %s::text[]) AS n(made, name) WHERE s.name = n.made",
                    (named, list(self._names)),
                )
            except errors.UniqueViolation as error:
                raise self._exists() from error

    def _exists(self) -> StorageError:
        there = sorted(set(self._names) & set(self._shelf.names()))
        return StorageError(
            f"there is a store {there[0]!r} at {self._shelf.where} already; name another, or "
            "remove that one"
            if there
            else f"a store at {self._shelf.where} exists already",
            code="exists",
        )


@contextmanager
def arriving(address: str, names: Sequence[str]) -> Iterator[Arriving]:
    """What is not finished when the block ends is gone. Raises as ``PostgresStorage.open``, and
    ``StorageError``, code ``exists``, if there is a store of one of the ``names``."""
    with ExitStack() as stack:
        shelf = stack.enter_context(closing(Shelf(address)))
        yield Arriving(address, shelf, names, stack)


def remove_dead(address: str, shelf: Shelf, is_made_for: Callable[[str], str | None]) -> list[str]:
    """Remove the stores of dead processes; the names that these were to get. ``is_made_for`` says
    which name another one was to get, whose maker has the right ``ARRIVING``; None: it is no such
    store."""
    removed = []
    for made in shelf.names():
        name = is_made_for(made.removesuffix(_MARK))
        if name is None or made == name:
            continue
        with suppress(StorageError):  # it has just got its name, or is gone
            store = PostgresStorage.open(address, made, create=False)
            with closing(store):
                right = store.claim(ARRIVING)
                if right.take(0):
                    shelf.remove(made)
                    removed.append(name)
    return removed


__all__ = ["ARRIVING", "Arriving", "arriving", "remove_dead"]

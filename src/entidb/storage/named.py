"""One store among those in a PostgreSQL database, for code that decides where a database is:
opening it, and making one that is not there. PostgreSQL's own code is imported when it is used.

Not here: stores on disk (``opening``), and what an address is (``addresses``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING

from entidb.storage.addresses import split_name
from entidb.storage.base import Storage
from entidb.storage.opening import open_shelf

if TYPE_CHECKING:
    from entidb.storage.postgres.arriving import Arriving


def open_named(place: str, *, read_only: bool = False) -> Storage:
    """The store at ``postgresql://…#NAME``, which is not made, and neither are the tables. Errors
    are those of ``PostgresStorage.open``."""
    address, name = split_name(place)
    # Says what is missing where the extra is.
    with closing(open_shelf(address, read_only=True)):
        from entidb.storage.postgres import PostgresStorage

        return PostgresStorage.open(address, name or "", create=False, read_only=read_only)


def arriving(address: str, names: Sequence[str]) -> AbstractContextManager[Arriving]:
    """Stores in PostgreSQL that get their ``names`` when they are complete: see
    ``entidb.storage.postgres.arriving``."""
    open_shelf(address).close()  # says what is missing where the extra is
    from entidb.storage.postgres.arriving import arriving

    return arriving(address, names)


__all__ = ["arriving", "open_named"]

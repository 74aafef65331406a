"""Stores on disk, and in PostgreSQL: opening one, and looking at one that is closed. The only place
that knows which backend a directory or an address holds; the layers above ask here.

A backend is imported when the first store on disk is asked for (each function imports it): a
program that keeps its databases in memory, or opens none, does not load it. One that gives up its
rights, or changes its root directory, before it opens a database imports
``entidb.storage.LmdbStorage`` first.

Not here: what a store promises (``base``), and a store in memory (``memory``).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final

from entidb.errors import ConfigError
from entidb.storage.addresses import whole
from entidb.storage.base import Storage
from entidb.storage.directories import absolute

if TYPE_CHECKING:
    from entidb.storage.postgres.examining import ServerFacts
    from entidb.storage.postgres.shelf import Shelf

_SCARCE: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


def open_storage(path: str | os.PathLike[str], **options: Any) -> Storage:
    """Open the store in the directory ``path``. ``options`` and errors are those of
    ``LmdbStorage.open``."""
    from entidb.storage.lmdb import LmdbStorage

    return LmdbStorage.open(path, **options)


def open_shelf(address: str, *, read_only: bool = False) -> Shelf:
    """The stores in the PostgreSQL database at ``address``, whose tables are made if they are not
    there, but for one who only reads. Errors are those of ``PostgresStorage.open``; and
    ``ConfigError`` where the extra ``postgres`` is not installed."""
    try:
        from entidb.storage.postgres.shelf import Shelf
    except ImportError as error:
        raise _missing(error) from error
    return Shelf(whole(address), read_only=read_only)


def examine_server(address: str) -> ServerFacts:
    """What there is to know of the PostgreSQL server at ``address``, without writing there. Raises
    ``ConfigError``, ``StorageError``."""
    try:
        from entidb.storage.postgres.examining import examine
    except ImportError as error:
        raise _missing(error) from error
    return examine(address)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        "databases in PostgreSQL need a package that is not installed "
        f'({error.name or error}): pip install "entidb[postgres]"'
    )


def wants_room(error: BaseException | None) -> bool:
    """Whether ``error``, of opening a store, came from a process or a system without open files or
    memory for it: it may be opened after another one was closed."""
    from entidb.storage.lmdb.failures import code_of

    while error is not None:
        if isinstance(error, Exception) and code_of(error) in _SCARCE:
            return True
        error = error.__cause__
    return False


def holds_store(path: str | os.PathLike[str]) -> bool:
    """Whether there is a store in the directory ``path``, in whatever state."""
    from entidb.storage.lmdb.left import DATA

    return os.path.isfile(os.path.join(path, DATA))


def closed_faults(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the files of the closed store in ``path``, found without opening it: a
    damaged one can end the process that does. Empty when all is well, or when there is no store.

    Raises ``DatabaseLockedError`` if it is open, here or in another process, ``FormatError`` if it
    is not a store at all."""
    from entidb.storage.lmdb import LmdbStorage

    return LmdbStorage.closed_faults(path)


def doubtful_bytes(path: str | os.PathLike[str]) -> int:
    """How many bytes opening the store in ``path`` would read to see that it is well; 0 if none,
    or if there is no store. Cheap, and a hint: nothing is locked."""
    from entidb.storage.lmdb import LmdbStorage

    return LmdbStorage.doubtful_bytes(path)


def look(path: str | os.PathLike[str]) -> None:
    """Read the store in ``path`` as opening it would, so that opening need not: for doing it
    somewhere else. What is found is what opening raises, as long as the files are the same."""
    from entidb.storage.lmdb import LmdbStorage

    LmdbStorage.look(path)


def remove_store(path: str | os.PathLike[str]) -> None:
    """Remove the files of the closed store in ``path``, and the directory if nothing else stands
    there. Raises ``DatabaseLockedError`` if somebody has it open, ``StorageError``."""
    from entidb.storage.lmdb.removal import remove_store

    remove_store(absolute(path))


__all__ = [
    "examine_server",
    "closed_faults",
    "doubtful_bytes",
    "holds_store",
    "look",
    "open_shelf",
    "open_storage",
    "remove_store",
]

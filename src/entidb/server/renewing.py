"""A new history for databases that were put back by other means than ours: a backup of PostgreSQL,
a snapshot of a disk (R29).

What the devices have seen since is not in them, and nothing in them says so. A copy that EntiDB has
made begins its history by itself when it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from entidb.db import Database, Role
from entidb.errors import ConfigError
from entidb.server.config import ServerConfig, directory_name, is_db_id
from entidb.server.directory import DataDirectory, list_databases
from entidb.storage.addresses import is_address, shown, split_name
from entidb.storage.named import open_named
from entidb.storage.opening import holds_store, open_shelf
from entidb.types import path_text

#: Whoever asks for it gets it, however often.
_TIMES: Final = 1 << 31


def renew(place: str | os.PathLike[str]) -> list[str]:
    """Begin a new history (R29) of the database at ``place``, a directory or
    ``postgresql://…#NAME``; or of all databases of a server, which is a data directory or an
    address without a name. The places of those that were renewed, without a password. Devices
    notice with their next request, and choose between ``reset(keep="server")`` and
    ``reset(keep="device")``.

    A data directory must not be served meanwhile. Databases in PostgreSQL may be: all nodes answer
    with the new history from then on. Each database is one commit; after an error those before it
    are done, and to repeat it does no harm.

    Raises ``ConfigError`` if there is no database, or one of a device; ``DatabaseLockedError``,
    ``StorageError``, ``FormatError``."""
    where = path_text(place)
    with _databases(where) as places:
        for each in places:
            with closing(_opened(each)) as database:
                database.begin_history(_TIMES, 0)
        return [shown(each) for each in places]


@contextmanager
def _databases(place: str) -> Iterator[list[str]]:
    if is_address(place):
        if split_name(place)[1] is not None:
            yield [place]
            return
        with closing(open_shelf(place, read_only=True)) as shelf:
            names = [name for name in shelf.names() if is_db_id(name)]
        yield _some([f"{place}#{name}" for name in names], place)
    elif holds_store(place):
        yield [place]
    else:
        names = _some(list_databases(place), place)
        taken = DataDirectory.take(ServerConfig(data_dir=place, insecure_no_auth=True))
        try:
            yield [str(Path(place) / directory_name(name)) for name in names]
        finally:
            taken.release()


def _some(places: list[str], place: str) -> list[str]:
    if not places:
        raise ConfigError(
            f"there is no database in {shown(place)}: check the path", code="no_database"
        )
    return places


def _opened(place: str) -> Database:
    if is_address(place):
        return Database(open_named(place), role=Role.SERVER, create=False, where=shown(place))
    return Database.open(place, role=Role.SERVER, create=False)


__all__ = ["renew"]

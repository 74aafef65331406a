"""The place of databases that is a PostgreSQL database: each of them is a store of that name there.

Any number of servers may serve it at the same time, and none of them owns anything: the turn to
commit, the mark that proves what is remembered, and the fence are the store's own. So nothing is
locked here, and a database may get another name while other nodes have it open: they find it gone.

Needs the extra ``postgres``, which is imported when a server is made for such a place.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from entidb.db import Database, Role, copy_database
from entidb.errors import LocalError, StorageError
from entidb.server.config import ServerConfig, is_db_id
from entidb.server.news import MarkSource
from entidb.server.place import ASIDE_MS, Aside, exists, unknown_database
from entidb.storage.opening import open_shelf

if TYPE_CHECKING:
    from entidb.storage.postgres.shelf import Shelf

logger = logging.getLogger("entidb.server")

#: Ends the name of a copy that takes the place of a database in a moment.
_RESTORED: Final = "!restored"
#: Between the name of a database that is put aside and the time: no database is called so.
_ASIDE: Final = "@"


class PostgresPlace:
    """``config.address`` as the ``Place`` of databases."""

    root: Final = None
    waits: Final = True

    def __init__(self, config: ServerConfig, **options: Any) -> None:
        """Connects, checks and makes the tables. Raises ``ConfigError`` for an address that cannot
        be and where the extra is missing, ``StorageError`` if the server cannot be reached or may
        lose commits, ``FormatError`` for tables of a newer program."""
        assert config.address is not None
        self._address: Final = config.address
        self._options = options
        self._lock = threading.Lock()
        #: Had where a copy is made here, or what others have left is looked at.
        self._taking = threading.Lock()
        self._shelf: Shelf | None = None
        self._process = os.getpid()
        shelf = open_shelf(self._address)
        self.where: Final = shelf.where
        # Nothing is kept that a process which is forked now could not use.
        shelf.close()

    def begin(self) -> None:
        self.shelf()

    def shelf(self) -> Shelf:
        """The connections of this process, which are made with the first use. Raises
        ``StorageError``."""
        with self._lock:
            if self._shelf is None or self._process != os.getpid():
                self._process = os.getpid()
                self._shelf = open_shelf(self._address)
            return self._shelf

    def open(self, db_id: str, create: bool) -> Database:
        self.shelf()
        return self._open(db_id, create, role=Role.SERVER, **self._options)

    def _open(self, name: str, create: bool, **options: Any) -> Database:
        from entidb.storage.postgres import PostgresStorage

        try:
            store = PostgresStorage.open(self._address, name, create=create)
        except StorageError as error:
            if error.code == "no_store":
                raise unknown_database() from error
            raise
        try:
            if not create and store.mark() == 0:
                raise unknown_database()  # whoever made the store has not made the database yet
            return Database(store, **options)
        except BaseException:
            store.close()
            raise

    def names(self) -> list[str]:
        return [name for name in self.shelf().names() if is_db_id(name)]

    def holds(self, db_id: str) -> bool:
        return self.shelf().holds(db_id)

    def sizes(self, only: str | None = None) -> dict[str, int]:
        sizes = self.shelf().sizes(only)
        return {name: size for name, size in sizes.items() if is_db_id(name)}

    def rename(self, db_id: str, to: str) -> None:
        self._rename(db_id, to)

    def put_aside(self, db_id: str, now: int) -> Aside:
        aside = self._free_aside(db_id, now)
        self._rename(db_id, aside.id)
        return aside

    def _free_aside(self, db_id: str, now: int) -> Aside:
        while self.holds(f"{db_id}{_ASIDE}{now}"):
            now += 1
        return Aside(f"{db_id}{_ASIDE}{now}", db_id, now, now + ASIDE_MS)

    def aside(self) -> list[Aside]:
        found = []
        for each in self.shelf().names():
            name, at, moment = each.rpartition(_ASIDE)
            if at and is_db_id(name) and moment.isascii() and moment.isdigit():
                found.append(Aside(each, name, int(moment), int(moment) + ASIDE_MS))
        return found

    def open_aside(self, aside: Aside) -> Database:
        return self._open(aside.id, False, role=Role.SERVER, read_only=True)

    def take_back(self, aside: Aside) -> None:
        self._rename(aside.id, aside.name)

    def _rename(self, name: str, to: str) -> None:
        try:
            if not self.shelf().rename(name, to):
                raise unknown_database()
        except StorageError as error:
            if error.code == "exists":
                raise exists(to) from error
            raise

    @contextmanager
    def taken_in(
        self, db_id: str, backup: Path, at: Callable[[int, int], None]
    ) -> Iterator[Callable[[int], Aside | None]]:
        """See ``TakesIn``."""
        from entidb.storage.postgres import PostgresStorage
        from entidb.storage.postgres.arriving import ARRIVING

        name = f"{db_id}{_RESTORED}"

        def take_the_place(now: int) -> Aside | None:
            aside = self._free_aside(db_id, now) if self.holds(db_id) else None
            self.shelf().replace(db_id, name, None if aside is None else aside.id)
            return aside

        with self._taking:
            try:
                self.shelf().remove(name)  # what a node has left that was killed
                copy_database(backup, f"{self._address}#{name}", on_progress=at)
                # Whoever clears up after dead processes sees that this one lives.
                with closing(PostgresStorage.open(self._address, name, create=False)) as store:
                    store.claim(ARRIVING).take()
                    yield take_the_place
            finally:
                with suppress(StorageError):  # it goes with what is cleared up
                    self.shelf().remove(name)

    def clear_left(self) -> None:
        from entidb.storage.postgres.arriving import remove_dead

        if not self._taking.acquire(blocking=False):
            return
        try:
            for name in remove_dead(self._address, self.shelf(), _made_for):
                logger.warning("what a node that was killed had begun to copy to %s is gone", name)
        finally:
            self._taking.release()

    def remove(self, aside: Aside) -> None:
        self.shelf().remove(aside.id)

    def news(self) -> MarkSource:
        from entidb.storage.postgres.news import PostgresNews

        return PostgresNews(lambda: self.shelf().node)

    def check(self) -> str | None:
        try:
            self.shelf().check()
        except (StorageError, LocalError):
            return "storage"
        return None

    def close(self) -> None:
        with self._lock:
            shelf, self._shelf = self._shelf, None
        if shelf is not None and self._process == os.getpid():
            shelf.close()


def _made_for(made: str) -> str | None:
    name = made.removesuffix(_RESTORED)
    return name if is_db_id(name) else None


__all__ = ["PostgresPlace"]

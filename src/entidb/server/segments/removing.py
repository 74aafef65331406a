"""Files of images that go: because what is in them was erased, in every directory that has them; or
because their database is not there any more.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeVar

from entidb.db import Database
from entidb.db.images import read_images
from entidb.errors import EntiDBError, ServerBusyError
from entidb.server.config import db_id_of
from entidb.server.segments.files import KeptFiles
from entidb.server.segments.places import ImagePlaces
from entidb.server.segments.rows import drop_images
from entidb.storage.disk_errors import said_of

logger = logging.getLogger("entidb.server")

#: The right to make images and to clear up, among the processes of a server.
RIGHT: Final = "segments"
#: Seconds to wait for another process that makes an image to end.
_DROP_WAIT_S: Final = 30.0


class OpenImages(Protocol):
    """A database that is open, by its name."""

    @property
    def db_id(self) -> str: ...
    @property
    def database(self) -> Database: ...


S_co = TypeVar("S_co", bound=OpenImages, covariant=True)


class WithImages(Protocol[S_co]):
    """What is needed of ``stores``."""

    def using(self, db_id: str, *, create: bool) -> AbstractContextManager[S_co]: ...


class ImageRemoval:
    """Thread-safe. ``files`` gives the files of a database, ``lock_of`` the lock that this process
    has where it makes an image or removes files, ``holds`` says whether there is a database."""

    def __init__(
        self,
        stores: WithImages[OpenImages],
        places: ImagePlaces,
        files: Callable[[str], KeptFiles],
        lock_of: Callable[[str], threading.Lock],
        holds: Callable[[str], bool] | None,
    ) -> None:
        self._stores, self._places = stores, places
        self._files, self._lock_of, self._holds = files, lock_of, holds

    def look(self) -> None:
        root = self._places.root
        if root is None or not root.is_dir():
            return
        try:
            self._places.note()
            self.pay()
        except (EntiDBError, OSError) as error:
            doing = f"images that are to be removed from {root} may be there"
            logger.warning("%s", said_of(error, doing))

    def remove_strays(self) -> None:
        """Folders of databases that are not there any more."""
        root, holds = self._places.root, self._holds
        if root is None or holds is None or not root.is_dir():
            return
        for entry in list(os.scandir(root)):
            db_id = db_id_of(entry.name)
            if db_id is not None and not holds(db_id):
                with self._lock_of(db_id):
                    # What else is in there is not ours, and stays.
                    self._files(db_id).sweep([])

    def drop(self, db_id: str) -> None:
        """No image counts any more, also none that is being made, and their files go: what was
        erased from the database must not stay in them. Those in the directories of other nodes go
        when these ``pay``. Raises as ``Stores.use``, and ``ServerBusyError`` where another process
        is at them for long: they count no more then, and are still there."""
        with self._stores.using(db_id, create=False) as store:
            drop_images(store.database)
            self._places.owe(db_id)
            kept = self._sweep(store)
        self._places.pay(db_id, emptied=not kept)

    def pay(self) -> None:
        """Remove what other nodes have asked this directory to be rid of (``places``). Raises as
        ``drop``."""
        owed = self._places.owed_here()
        if owed:
            self.remove_strays()
        for db_id in owed:
            kept = False
            if self._holds is None or self._holds(db_id):
                with self._stores.using(db_id, create=False) as store:
                    kept = self._sweep(store)
            self._places.pay(db_id, emptied=not kept)

    def _sweep(self, store: OpenImages) -> bool:
        """Remove all files but those of images that the database names; whether it names any."""
        # What is being made ends before its next segment.
        with self._lock_of(store.db_id):
            right = store.database.right(RIGHT)
            if not right.take(_DROP_WAIT_S):
                raise ServerBusyError(
                    f"another process of this server is making an image of {store.db_id!r} and "
                    "does not end: the files of images are still there; do this again"
                )
            try:
                with store.database.view() as view:
                    kept = [row.id for row in read_images(view).rows]
                self._files(store.db_id).sweep(kept)
                return bool(kept)
            finally:
                right.give_back()


__all__ = ["RIGHT", "ImageRemoval"]

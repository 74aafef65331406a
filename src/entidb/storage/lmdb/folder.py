"""The directory of an open store, and the data file that is made anew in it.

What is made or replaced in it is reached through the open directory and not through its path,
which may lead to another one by now. On Windows a directory that is open cannot be moved, so there
the path is as good.

Not here: whose directory it is (``place``), and what a copy holds (``store``).
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Final

from entidb.errors import StorageError
from entidb.storage.directories import (
    make_folder,
    occupy_standard_numbers,
    sync_directory,
    sync_path,
)
from entidb.storage.lmdb.left import DATA

TEMPORARY: Final = ".entidb-new"


class Folder:
    """The directory at ``path``, open. Raises ``OSError``, as all that it does."""

    def __init__(self, path: str) -> None:
        self.path = path
        occupy_standard_numbers()  # this is the first thing of a store that is opened
        #: Of the directory; -1 where there is none, and when it is closed.
        self.descriptor = -1 if sys.platform == "win32" else os.open(path, os.O_RDONLY)

    def check_link(self) -> None:
        """Raises ``StorageError`` where the data file is a link: a new one would take the place of
        the link, and what that leads to would stay as it is and look like the database."""
        data = os.path.join(self.path, DATA)
        if os.path.islink(data):
            raise StorageError(
                f"{data} is a link to {os.path.realpath(data)}, in whose place no new file can be "
                "put; nothing was changed. Put the directory itself on the other disk, and a link "
                "to it here"
            )

    def make_temporary(self) -> str:
        """An empty directory inside this one; its path."""
        self.remove_temporary()
        where = os.path.join(self.path, TEMPORARY)
        try:
            make_folder(self._at(TEMPORARY), self.path if self.descriptor < 0 else self.descriptor)
        except FileExistsError as error:
            raise StorageError(
                f"{where} is in the way, and cannot be removed: somebody else's process left it. "
                "Remove it as that user or as root, and try again; nothing was changed"
            ) from error
        return where

    def remove_temporary(self) -> None:
        shutil.rmtree(self._at(TEMPORARY), ignore_errors=True, dir_fd=self._dir_fd())

    def open_new(self) -> int:
        """A descriptor of the data file in the temporary directory."""
        return os.open(self._at(TEMPORARY, DATA), os.O_RDWR, dir_fd=self._dir_fd())

    def put_new(self) -> None:
        """Put that data file in the place of the present one."""
        new, old = self._at(TEMPORARY, DATA), self._at(DATA)
        if sys.platform == "win32":
            sync_path(new)
            os.replace(new, old)
        else:
            os.replace(new, old, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def sync(self) -> None:
        """Make durable which files are in it."""
        sync_directory(self.descriptor)

    def stat(self) -> os.stat_result:
        return os.stat(self.path) if self.descriptor < 0 else os.fstat(self.descriptor)

    def close(self) -> None:
        """Idempotent."""
        folder, self.descriptor = self.descriptor, -1
        if folder >= 0:
            os.close(folder)

    def _at(self, *names: str) -> str:
        """The name of something in the directory, as the functions with ``dir_fd`` want it."""
        return os.path.join(*names) if self.descriptor >= 0 else os.path.join(self.path, *names)

    def _dir_fd(self) -> int | None:
        return self.descriptor if self.descriptor >= 0 else None

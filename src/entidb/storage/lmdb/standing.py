"""Whether the path of a store still leads to the file that is open: its directory may have been
moved, deleted or replaced since.

Not here: which file is open, and the locks on it (``place``).
"""

from __future__ import annotations

import os
import time
from typing import Final

from entidb.errors import DatabaseMovedError

#: Longer than a tick of the clock that file systems take their times from; some count in seconds.
_TICK_S: Final = 0.05
_COARSE_TICK_S: Final = 3.0


class Standing:
    """The directory and the data file at a path, by their numbers in the file system."""

    def __init__(self, path: str, data_path: str) -> None:
        self._path = path
        self._data_path = data_path
        #: For the system, which wants bytes and is asked before every commit.
        self._system_path = os.fsencode(path)
        self._identity: tuple[int, int] | None = None
        #: The directory as it was last seen, and as it is if nothing in it has changed.
        self._seen: tuple[int, int, int] | None = None
        self._seen_at = 0.0
        self._settled: tuple[int, int, int] | None = None

    def know(self, descriptor: int) -> None:
        """From now on the data file that is open is that of ``descriptor``."""
        found = os.fstat(descriptor)
        self._identity = (found.st_ino, found.st_dev)
        self._settled = self._seen = None

    def check(self) -> None:
        """Raise ``DatabaseMovedError`` if the path no longer leads to the file that is open. Cheap
        enough to precede every commit.

        The directory is looked at, and the file only when the directory has changed: where a
        file's times have been read, some systems write them anew with every commit."""
        if self._identity is None:
            return
        try:
            here = os.stat(self._system_path)
            seen = (here.st_mtime_ns, here.st_ino, here.st_dev)
            if seen != self._settled:
                self._check_data(seen)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._moved("nothing stands there any more") from error
        except OSError:
            return  # It cannot be looked at, which proves nothing: a process may give up rights.

    def _check_data(self, seen: tuple[int, int, int]) -> None:
        found = os.stat(self._data_path)
        if (found.st_ino, found.st_dev) != self._identity:
            raise self._moved("another database stands there now")
        # Two changes within one tick of the system's clock leave the same time behind.
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        elif now - self._seen_at > (_TICK_S if seen[0] % 1_000_000_000 else _COARSE_TICK_S):
            self._settled = seen

    def _moved(self, what: str) -> DatabaseMovedError:
        return DatabaseMovedError(
            f"{self._path} is not the database that is open: {what}. It was moved, deleted or "
            "replaced since it was opened; nothing was written to either. Put it back, or close "
            "this one and open the path again"
        )

"""Waiting for the mark of a store to become another one: for a commit of another process.

The system tells of what is written to the file, where it does (``file_events``); elsewhere the
mark is looked at again and again.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from entidb.storage.file_events import FileWatch, watch_file
from entidb.storage.lmdb.open_file import OpenFile

#: Seconds between two looks at the mark, where the system tells nothing: half of it is how long
#: news wait, and a look costs some tens of microseconds with waking up for it. Less within so many
#: seconds of other news, and more where there was none for a while.
_LOOK_SECONDS: Final = 0.03
_LOOK_BUSY_SECONDS: Final = 0.01
_BUSY_SECONDS: Final = 1.0
_LOOK_IDLE_SECONDS: Final = 0.05
_IDLE_SECONDS: Final = 10.0
#: Where it tells: seconds from one piece of news to the next, so that who commits all the time does
#: not wake this process each time.
_PACE_SECONDS: Final = 0.005
#: And how long what this process has committed itself may wait: it is no news to anybody here, and
#: whoever has committed it goes on meanwhile.
_OWN_SECONDS: Final = 0.01
#: Seconds between two looks all the same, and how often one may find, one after the other, what the
#: system had said nothing of for as long as that: then it does not tell, as for a file that
#: another machine writes.
_CHECK_SECONDS: Final = 0.25
_MISSED_MAX: Final = 3


class MarkWaiting:
    """``wait`` of a store, for as long as its file is open."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._news_at = time.monotonic()
        self._watch: FileWatch | None = None
        #: The file that is watched: a compaction puts another in its place.
        self._watched: tuple[int, int] | None = None
        self._missed = 0

    def wait(self, mark: int, timeout_s: float) -> bool:
        """See ``Storage.wait``."""
        read_mark = self._file.mark
        began = now = time.monotonic()
        deadline = now + timeout_s
        early = self._news_at + _PACE_SECONDS - now
        if early > 0 and self._watching() is not None:
            time.sleep(min(early, max(0.0, timeout_s)))
        is_own = False
        while True:
            watch = self._watching()
            stirring = watch.next if watch is not None else None
            newest = read_mark()
            found = newest != mark
            now = time.monotonic()
            left = deadline - now
            if found and not is_own and newest == self._file.newest and left > 0:
                is_own = True
                time.sleep(min(_OWN_SECONDS, left))
                continue
            if found or left <= 0:
                break
            if stirring is not None:
                stirring.wait(min(left, _CHECK_SECONDS))
            else:
                time.sleep(min(self._pause(now), left))
        if found:
            self._note(watch, began, now)
        return found

    def end(self) -> None:
        """Wake who waits: the file is closed. Idempotent."""
        with self._lock:
            watch, self._watch, self._watched = self._watch, None, None
            self._missed = _MISSED_MAX
        if watch is not None:
            watch.end()

    def _pause(self, now: float) -> float:
        quiet = now - self._news_at
        if quiet < _BUSY_SECONDS:
            return _LOOK_BUSY_SECONDS
        return _LOOK_SECONDS if quiet < _IDLE_SECONDS else _LOOK_IDLE_SECONDS

    def _watching(self) -> FileWatch | None:
        """The watch on the file that is open now; None where the system does not tell."""
        place = self._file.place
        # The only process: its own commits change the mark after the file.
        if self._missed >= _MISSED_MAX or not place.shared:
            return None
        try:
            info = os.fstat(place.descriptor)
        except OSError:
            return None  # Closed meanwhile: the look at the mark says so.
        if self._watched == (info.st_dev, info.st_ino):
            return self._watch
        with self._lock:
            if self._missed >= _MISSED_MAX or self._watched == (info.st_dev, info.st_ino):
                return self._watch  # another thread was faster
            before, self._watch = self._watch, watch_file(place.data_path)
            self._watched = (info.st_dev, info.st_ino)
        if before is not None:
            before.end()
        return self._watch

    def _note(self, watch: FileWatch | None, began: float, now: float) -> None:
        """There are news: whether the system has told of them."""
        self._news_at = now
        if watch is None:
            return
        if watch.stirred_at >= began - 2 * _CHECK_SECONDS:
            self._missed = 0
            return
        self._missed += 1
        if self._missed >= _MISSED_MAX:
            self.end()


__all__ = ["MarkWaiting"]

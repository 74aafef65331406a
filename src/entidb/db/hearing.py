"""Hearing of what other processes commit: one thread for each database that has observers, which
waits for another mark of the store.

Not here: telling the observers, and in which order (``observers``).
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

from entidb.errors import EntiDBError
from entidb.events import Thread
from entidb.storage import Storage

#: Seconds of one wait: a thread whose database is dropped or without listeners ends within it.
_WAIT_SECONDS: Final = 0.25
#: Before it is tried again, where there is nothing to read yet: mostly at once, so each pause is
#: twice the one before it.
_PAUSE_SECONDS: Final = 0.0005
_PAUSE_SECONDS_MAX: Final = 0.02
_FAILED_SECONDS: Final = 1.0

_log = logging.getLogger("entidb.db")


class Hearing:
    """Calls ``hear`` in a thread of its own when another process has committed. Nothing here keeps
    what it belongs to alive."""

    def __init__(self, storage: Storage, hear: Callable[[], int], wanted: Callable[[], bool]):
        """``hear`` returns the mark up to which it has heard; ``wanted`` says whether anybody
        listens. Both are methods of one object, which is referred to weakly."""
        self._storage = weakref.ref(storage)
        self._hear = weakref.WeakMethod(hear)
        self._wanted = weakref.WeakMethod(wanted)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pause_s = _PAUSE_SECONDS

    def start(self) -> None:
        """Have the thread run, if it does not."""
        with self._lock:
            if self._thread is None:
                self._thread = thread = Thread(
                    target=_run, args=[self], name="entidb-hearing", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    self._thread = None  # the next one tries again
                    raise

    def is_me(self) -> bool:
        """Whether this is that thread."""
        return self._thread is threading.current_thread()

    def goes_on(self) -> bool:
        """Whether the thread goes on; if not, ``start`` begins another."""
        wanted = self._wanted()
        with self._lock:
            if wanted is not None and wanted():
                return True
            self._thread = None
            return False

    def step(self, mark: int) -> int:
        """Wait a moment, and hear what there is; the mark up to which that was."""
        storage = self._storage()
        # Not the store itself, where its ``wait`` can do without: it may be lost meanwhile.
        wait = None if storage is None else storage.wait
        del storage
        changed = wait is not None and (mark < 0 or wait(mark, _WAIT_SECONDS))
        del wait
        hear = self._hear()
        if hear is None or not changed:
            return mark
        heard = hear()
        if heard == mark:
            # A commit under way: the mark is ahead of what can be read, maybe for long.
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _PAUSE_SECONDS_MAX)
        else:
            self._pause_s = _PAUSE_SECONDS
        return heard


def _run(hearing: Hearing) -> None:
    mark = -1  # of no state
    while hearing.goes_on():
        try:
            mark = hearing.step(mark)
        except EntiDBError:
            # Closed, moved, or no room to follow its growth: whoever uses it is told, and by the
            # next commit that can be read everything is heard.
            time.sleep(_PAUSE_SECONDS_MAX)
        except Exception:
            # Without this thread nobody would hear of other processes any more.
            _log.exception("hearing of what other processes commit failed")
            time.sleep(_FAILED_SECONDS)


__all__ = ["Hearing"]

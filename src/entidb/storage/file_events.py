"""Being told by the system that a file was written, instead of looking at it again and again.

The system gives a user few queues of such events (128 on most), and a server has many files: so a
process has one queue, and one thread that reads it for all.

On Linux (inotify(7)); elsewhere, and where the system gives no queue, nobody is told and callers
look as before. A network's file system tells only of what this machine writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import select
import struct
import sys
import threading
import time
import weakref
from typing import Any, Final

from entidb.events import SafeEvent, Thread

_IN_MODIFY: Final = 0x2
#: inotify(7): the watch, what happened (and to whom: not used), and how long a name follows.
_EVENT: Final = struct.Struct("=iIII")
_READ_BYTES: Final = 2**16
_OVERFLOWN: Final = -1
#: Seconds from the first thing that happened until all are read: a commit writes twice, and whoever
#: commits in this process is not to be kept from going on. More while things happen all the time.
_PAUSE_SECONDS: Final = 0.0005
_PAUSE_SECONDS_MAX: Final = 0.01
#: What happened after so long is the first after a rest.
_REST_SECONDS: Final = 0.02

_log = logging.getLogger("entidb.storage")


class FileWatch:
    """One file that is watched."""

    def __init__(self, queue: _Queue, number: int) -> None:
        self._queue = queue
        self._number = number
        self._lock = threading.Lock()
        self._ended = False
        #: Set by the next thing that happens to the file. Who waits for it takes it before looking
        #: at the file, and another one afterwards.
        self.next = SafeEvent()
        #: When the last thing happened, by the monotonic clock.
        self.stirred_at = time.monotonic()

    def stir(self) -> None:
        """Wake who waits."""
        self.stirred_at = time.monotonic()
        with self._lock:
            if self._ended:
                return
            happened, self.next = self.next, SafeEvent()
        happened.set()

    def end(self) -> None:
        """Watch no longer: wake who waits, and whoever will. Idempotent."""
        self._queue.drop(self._number, self)
        with self._lock:
            self.next.set()
            self._ended = True


class _Queue:
    """What the system tells this process. Its thread ends when nothing is watched any more."""

    def __init__(self) -> None:
        """Raises ``OSError`` if the system gives no queue."""
        self.descriptor = _checked(_library().inotify_init1(os.O_CLOEXEC))
        #: By the system's number of the file: one file may be watched twice.
        self._watches: dict[int, weakref.WeakSet[FileWatch]] = {}

    def add(self, path: str) -> FileWatch:
        """``_lock`` is held. Raises ``OSError``."""
        name = os.fsencode(path)
        number = _checked(_library().inotify_add_watch(self.descriptor, name, _IN_MODIFY))
        watch = FileWatch(self, number)
        self._watches.setdefault(number, weakref.WeakSet()).add(watch)
        return watch

    def drop(self, number: int, watch: FileWatch) -> None:
        with _lock:
            watches = self._watches.get(number)
            if watches is None or self is not _queue:
                return
            watches.discard(watch)
            if not watches:
                # The system answers with a last event, so the thread wakes and may end.
                del self._watches[number]
                _library().inotify_rm_watch(self.descriptor, number)

    def run(self) -> None:
        pause = _PAUSE_SECONDS
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        while not self._is_over():
            began = time.monotonic()
            poll.poll()
            rested = time.monotonic() - began > _REST_SECONDS
            pause = _PAUSE_SECONDS if rested else min(2 * pause, _PAUSE_SECONDS_MAX)
            time.sleep(pause)
            for watch in self._watched(_numbers(os.read(self.descriptor, _READ_BYTES))):
                watch.stir()

    def _watched(self, numbers: set[int]) -> list[FileWatch]:
        with _lock:
            if _OVERFLOWN in numbers:
                numbers = set(self._watches)
            return [each for number in numbers for each in self._watches.get(number, ())]

    def _is_over(self) -> bool:
        global _queue
        with _lock:
            if self is _queue and any(self._watches.values()):
                return False
            if self is _queue:
                _queue = None
            os.close(self.descriptor)
            return True


_lock = threading.Lock()
_queue: _Queue | None = None


def watch_file(path: str) -> FileWatch | None:
    """Watch the file ``path`` until the watch is ended; None where the system does not tell of
    what is written."""
    global _queue
    if not sys.platform.startswith("linux"):
        return None
    with _lock:
        queue = _queue
        try:
            if queue is None:
                queue = _Queue()
            watch = queue.add(path)
        except OSError as error:
            # Too many queues or files for this user, mostly.
            _log.debug("the system tells nothing of %s: %s", path, error)
            if queue is not None and queue is not _queue:
                os.close(queue.descriptor)
            return None
        if queue is _queue:
            return watch
        try:
            Thread(target=queue.run, name="entidb-file-events", daemon=True).start()
        except RuntimeError as error:
            _log.debug("no thread to hear of %s: %s", path, error)
            os.close(queue.descriptor)
            return None
        _queue = queue
        return watch


def _numbers(raw: bytes) -> set[int]:
    """Of which files the events in ``raw`` are."""
    found, at = set(), 0
    while at < len(raw):
        number, _, _, name_bytes = _EVENT.unpack_from(raw, at)
        found.add(number)
        at += _EVENT.size + name_bytes
    return found


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _after_fork() -> None:
    """The queue is the parent's: who reads it takes the parent's events."""
    global _lock, _queue
    _lock = threading.Lock()
    queue, _queue = _queue, None
    if queue is not None:
        with contextlib.suppress(OSError):
            os.close(queue.descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


__all__ = ["FileWatch", "watch_file"]

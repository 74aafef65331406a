"""Whose turn it is to commit, among all processes that have the store open.

The turn is the lock of a file of its own: the system gives it back when its owner ends, whatever it
was doing. What is written in that file is shared memory of all processes: whether one waits, so
that a process which comes again at once lets it go first; since when the one waits that has waited
too long already, so that all others let it go first; and whether a commit was under way when its
owner died, so that the next one sees to what it left before he looks at the newest state.

Not here: whose turn it is within a process (``entidb.storage.turns``).
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from entidb.storage.directories import is_still_at, open_or_make
from entidb.storage.lmdb.failures import storage_error
from entidb.storage.locks import system_holders
from entidb.types import Uncopied

TURN: Final = "entidb.turn"
#: Bytes of the file: a process waits; a commit is under way; since when one waits, and when it
#: last said so.
_WAITED_FOR: Final = 0
COMMITTING: Final = 8
_LONGEST: Final = 16
_LONGEST_NOTE: Final = struct.Struct("=dd")
_BYTES: Final = 64
#: Seconds between two tries to get the turn, at first and after a while. A process that waits notes
#: how long it pauses, in so many steps; one that comes later stays back for longer than that.
_PAUSE_SECONDS: Final = 0.0002
_PAUSE_SECONDS_MAX: Final = 0.002
_STEP_SECONDS: Final = 0.0001
#: Who comes when the turn is free has it, which is fast, and in no order. So some wait too long:
#: after so many seconds the others let them go first. One that has died, or was stopped, says no
#: more that it waits, and counts no longer.
_LONG_SECONDS: Final = 0.1
_FRESH_SECONDS: Final = 0.05
#: Between two tries to get another right.
_CLAIM_SECONDS: Final = 0.05
#: What the files of other rights are called, before their names.
CLAIM: Final = "entidb."


class SoleTurn:
    """The turn of a process that has the store to itself."""

    mine = True

    def __init__(self) -> None:
        self.memory = bytearray(_BYTES)

    def take(self, timeout_s: float | None = None) -> bool:
        return True

    def give_back(self) -> None:
        return

    def holder(self) -> str:
        return ""

    def recover_by(self, recover: Callable[[], None]) -> None:
        return

    def close(self) -> None:
        return

    forget = close


if sys.platform == "win32":

    def _flock(descriptor: int, kind: int) -> None:
        raise AssertionError("one process at a time has a store open here")

    _TAKE: Final = 0
    _GIVE_BACK: Final = 0
else:
    import fcntl

    _flock = fcntl.flock
    _TAKE: Final = fcntl.LOCK_EX | fcntl.LOCK_NB
    _GIVE_BACK: Final = fcntl.LOCK_UN


class FileClaim(Uncopied):
    """A right that one process has at a time: the lock of a file of its own."""

    __slots__ = ("__weakref__", "_descriptor", "_file", "_like", "_lock", "_path", "mine")

    def __init__(self, path: str, like: os.stat_result) -> None:
        self.mine = False
        #: Threads take and give back as they come, and the descriptor may be exchanged meanwhile.
        #: Reentrant for signal handlers and the collector.
        self._lock = threading.RLock()
        self._path = path
        self._like = like
        self._descriptor = -1
        #: Which file that is.
        self._file = like

    def take(self, timeout_s: float | None = None) -> bool:
        """Raises ``StorageError`` where no file can be made."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_taken():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            time.sleep(_CLAIM_SECONDS if left is None else min(left, _CLAIM_SECONDS))
        return True

    def _is_taken(self) -> bool:
        with self._lock:
            if self.mine:
                return True
            if self._descriptor >= 0 and not is_still_at(self._path, self._file):
                self.forget()  # deleted: who takes it now takes another file
            try:
                if self._descriptor < 0:
                    self._descriptor = open_or_make(self._path, self._like)
                    self._file = os.fstat(self._descriptor)
                _flock(self._descriptor, _TAKE)
            except BlockingIOError:
                return False
            except OSError as error:
                raise storage_error(error, f"opening {self._path}") from error
            self.mine = True
            return True

    def give_back(self) -> None:
        with self._lock:
            self.mine = False
            if self._descriptor >= 0:
                _flock(self._descriptor, _GIVE_BACK)

    def holder(self) -> str:
        pids = system_holders(self._path)
        return f"process {pids[0]}" if pids else ""

    def forget(self) -> None:
        """In a forked child: the right is the parent's. Takes no lock, which a thread that is not
        there may have."""
        descriptor, self._descriptor, self.mine = self._descriptor, -1, False
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.forget()


class FileTurn:
    """The turn of this process; one thread of it at a time calls this."""

    __slots__ = ("_descriptor", "_path", "_recover", "memory", "mine")

    def __init__(self, path: str, like: os.stat_result, first: bool) -> None:
        """``first``: no other process has the store open, and what the file says is of
        processes that ended. Raises ``OSError``."""
        self.mine = False
        self._path = path
        #: What all share. ``COMMITTING`` is not 0 while a commit is under way, and stays so
        #: when its outcome is unknown: the process that takes the turn next finds out.
        self.memory: mmap.mmap
        self._recover: Callable[[], None] = _nothing
        self._descriptor = open_or_make(path, like)
        try:
            if first or os.fstat(self._descriptor).st_size < _BYTES:
                # Written and not only set to that size: a page without room on the disk
                # behind it ends the process that touches it.
                os.pwrite(self._descriptor, bytes(_BYTES), 0)
            self.memory = mmap.mmap(self._descriptor, _BYTES)
        except BaseException:
            os.close(self._descriptor)
            raise

    def recover_by(self, recover: Callable[[], None]) -> None:
        """``recover`` sees to what a commit left whose owner died in it."""
        self._recover = recover

    def take(self, timeout_s: float | None = None) -> bool:
        if self.mine or self._descriptor < 0:  # closed: whatever comes next says so
            return True
        memory = self.memory
        waited_for = memory[_WAITED_FOR]
        try:
            if waited_for and not self._wait(waited_for, timeout_s):
                return False
            _flock(self._descriptor, _TAKE)
        except BlockingIOError:
            if not self._wait(0, timeout_s):
                return False
        self.mine = True
        if memory[COMMITTING]:
            self._recover()
            memory[COMMITTING] = 0
        return True

    def give_back(self) -> None:
        self.mine = False
        if self._descriptor >= 0:
            _flock(self._descriptor, _GIVE_BACK)

    def holder(self) -> str:
        pids = system_holders(self._path)
        return f"process {pids[0]}" if pids else ""

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            self.give_back()
        self.forget()

    def forget(self) -> None:
        """In a forked child: the turn is the parent's."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self.memory.close()
            os.close(descriptor)

    def _try(self) -> bool:
        try:
            _flock(self._descriptor, _TAKE)
        except BlockingIOError:
            return False
        return True

    def _wait(self, waited_for: int, timeout_s: float | None) -> bool:
        began = time.monotonic()
        deadline = None if timeout_s is None else began + timeout_s
        pause, longest = _PAUSE_SECONDS, (waited_for + 1) * _STEP_SECONDS
        while True:
            left = longest if deadline is None else min(longest, deadline - time.monotonic())
            if left > 0:
                time.sleep(left)
            ahead = self._who_is_ahead(began)
            if (ahead is None or ahead == began or left <= 0) and self._try():
                if ahead == began:
                    _LONGEST_NOTE.pack_into(self.memory, _LONGEST, 0.0, 0.0)
                # A process that waits still notes it again when its pause is over.
                self.memory[_WAITED_FOR] = 0
                return True
            self.memory[_WAITED_FOR] = int(pause / _STEP_SECONDS) + 1
            if left <= 0:
                return False
            pause = longest = min(pause * 1.2, _PAUSE_SECONDS_MAX)
            if ahead == began:
                longest = _PAUSE_SECONDS  # the others wait for this one now

    def _who_is_ahead(self, began: float) -> float | None:
        """Since when the process waits that goes first because it waits so long; the one that
        waits since ``began`` may become it. None: there is none."""
        now = time.monotonic()
        since, said = _LONGEST_NOTE.unpack_from(self.memory, _LONGEST)
        # Told by another clock, it is no time of this one.
        there = abs(now - said) < _FRESH_SECONDS and since <= said
        if there and since < began:
            return float(since)
        if now - began < _LONG_SECONDS:
            return None
        _LONGEST_NOTE.pack_into(self.memory, _LONGEST, began, now)
        return began


def _nothing() -> None:
    return

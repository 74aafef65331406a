"""A compacted copy of a store's file, which gives way to commits; so does the look at it.

LMDB writes a copy as fast as the disk takes it, and whoever commits meanwhile waits behind it with
each flush. So what LMDB copies goes through a pipe: while others commit, it is written and flushed
in small pieces, with a rest after each one as long as that piece took. While nobody does, nothing
is waited for.

Not here: the snapshot that keeps the map in its place (``store``), and what is flushed at the end.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from entidb.errors import DatabaseClosedError
from entidb.events import Thread
from entidb.storage.lmdb.left import DATA
from entidb.storage.lmdb.open_file import as_bytes

#: Bytes of a piece: what a flush of a commit has in front of it at most.
PIECE_BYTES: Final = 64 * 1024
#: Seconds after another's commit for which more of them are expected; and a rest at most.
_LATELY_S: Final = 0.25
_REST_S: Final = 0.05
#: Seconds for which the interpreter is let go, after about as much work as one of its turns.
_LET_GO_S: Final = 0.005
#: Seconds between two looks whether LMDB has come to its end: a child of this process may hold the
#: other end of the pipe open.
_LOOK_MS: Final = 50
#: macOS has one kind of flush.
_flush = getattr(os, "fdatasync", os.fsync)


def copy_file(env: Any, directory: str, go_on: Callable[[], None] | None = None) -> None:
    """A compacted copy of one snapshot of ``env`` in the empty ``directory``, not yet flushed as a
    whole. The caller keeps the map where it is. ``go_on`` is called between two pieces, and ends
    it by raising. Raises ``OSError`` and ``lmdb.Error``."""
    if sys.platform == "win32":
        env.copy(as_bytes(directory), compact=True)
        return
    reads, writes = os.pipe()
    filling = _Filling(env, writes)
    try:
        try:
            filling.start()
        except RuntimeError:  # the system gives no thread
            env.copy(as_bytes(directory), compact=True)
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        target = os.open(os.path.join(directory, DATA), flags, 0o600)
        try:
            _take(env, reads, target, filling, go_on)
        finally:
            os.close(target)
    finally:
        # LMDB ends at its next write, if it has not ended.
        os.close(reads)
        filling.end()
    if filling.error is not None:
        raise filling.error


class _Filling(Thread):
    """LMDB writes into the pipe on it."""

    def __init__(self, env: Any, writes: int) -> None:
        super().__init__(name="entidb-copying", daemon=True)
        self._env = env
        self._writes = writes
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._env.copyfd(self._writes, compact=True)
        except BaseException as error:
            self.error = error
        finally:
            os.close(self._writes)

    def end(self) -> None:
        if self.ident is None:
            os.close(self._writes)  # it was never begun
        else:
            self.join()


def _take(
    env: Any, reads: int, target: int, filling: Thread, go_on: Callable[[], None] | None
) -> None:
    """Write what comes out of the pipe, until its end."""
    os.set_blocking(reads, False)
    ready = select.poll()
    ready.register(reads, select.POLLIN)
    newest, others_at = _last_commit(env), -math.inf
    piece = bytearray()
    while True:
        if go_on is not None:
            go_on()
        # Looked at before the pipe: what it has written by then is there.
        went_on = filling.is_alive()
        ready.poll(_LOOK_MS if went_on else 0)
        with contextlib.suppress(BlockingIOError):
            came = os.read(reads, PIECE_BYTES - len(piece))
            piece += came
            if not came or len(piece) == PIECE_BYTES:
                began = time.monotonic()
                _write(target, piece)
                piece.clear()
                if not came:
                    return
                commit = _last_commit(env)
                if commit != newest:
                    newest, others_at = commit, began
                if began - others_at < _LATELY_S:
                    _flush(target)
                    time.sleep(min(time.monotonic() - began, _REST_S))
            continue
        if not went_on:
            _write(target, piece)
            return


def resting(mark: Callable[[], int]) -> Callable[[], None]:
    """For a look at a copy, on a thread of the process that commits: called now and then, it lets
    the interpreter go for a moment while ``mark``, the number of the newest commit, goes on."""
    newest, others_at = mark(), -math.inf

    def rest() -> None:
        nonlocal newest, others_at
        try:
            now, commit = time.monotonic(), mark()
        except DatabaseClosedError:
            return  # nobody commits
        if commit != newest:
            newest, others_at = commit, now
        if now - others_at < _LATELY_S:
            time.sleep(_LET_GO_S)

    return rest


def _last_commit(env: Any) -> int:
    number: int = env.info()["last_txnid"]
    return number


def _write(target: int, piece: bytearray) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(target, rest) :]
    rest.release()


__all__ = ["PIECE_BYTES", "copy_file", "resting"]

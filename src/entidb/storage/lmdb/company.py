"""Who else has a store open: the door through which every process comes and goes, and what those
inside tell the next one.

Each process that has the store open holds shared locks on ``entidb.lock`` and on the data file, as
long as it has it. An EntiDB before 0.5 takes the first of the two alone, so that it and these keep
each other out. A process that comes, goes, or needs the store alone holds the *door* meanwhile, a
lock on the directory itself: so it is certain who is the first and who the last, and two locks that
have to be changed are changed without another process in between. Processes that only look, where
no process is inside, hold the door together with others that look, and keep all others out.

When the owner of LMDB's own writer lock is killed, only Linux gives the lock to the next (a robust
mutex); so only there a store is open in several processes.

Not here: what is locked, and in which order (``place``), and whose turn it is to commit (``turn``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Final

from entidb.errors import DatabaseLockedError
from entidb.storage.locks import FileLock, HeldError, system_holders, written_holder

SHARING: Final = sys.platform.startswith("linux")
#: Seconds to wait for a process that comes, goes or has the store alone for a moment.
_DOOR_SECONDS: Final = 10.0
#: For those who look, who may be commands of a moment, or stay for hours.
_LOOKERS_SECONDS: Final = 2.0
#: For the others to close, when the store is needed alone.
ALONE_SECONDS: Final = 5.0
_LOOK_FIRST_SECONDS: Final = 0.0005
LOOK_SECONDS: Final = 0.02
_NAMESPACE: Final = "/proc/self/ns/pid"


def take_door(folder: int, *, look: bool = False, timeout_s: float = _DOOR_SECONDS) -> FileLock:
    """The door of the directory that ``folder`` has open: alone, or to ``look`` together with
    others. Waits a bounded time; raises ``HeldError``, ``OSError``."""
    began = time.monotonic()
    pause = _LOOK_FIRST_SECONDS
    while True:
        try:
            return FileLock(os.open(".", os.O_RDONLY, dir_fd=folder), shared=look)
        except HeldError:
            waited = time.monotonic() - began
            limit = timeout_s
            if waited >= _LOOKERS_SECONDS and not look and _only_lookers(folder):
                limit = _LOOKERS_SECONDS
            if waited >= limit:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LOOK_SECONDS)


def _only_lookers(folder: int) -> bool:
    """Whether those who have the door have it together."""
    try:
        FileLock(os.open(".", os.O_RDONLY, dir_fd=folder), shared=True).release()
    except HeldError:
        return False
    return True


@contextlib.contextmanager
def nobody_else(folder: int, data: FileLock, path: str) -> Iterator[None]:
    """Holds the door and the lock of the data file alone while the block runs, so that no process
    else has the store open. Waits for the others to close it, and raises ``DatabaseLockedError``,
    which says who they are."""
    try:
        door = take_door(folder)
    except HeldError as error:
        raise others_stay(path, [error.holder]) from error
    try:
        deadline = time.monotonic() + ALONE_SECONDS
        while not data.have_alone():
            data.share()
            if time.monotonic() > deadline:
                raise others_stay(path, [])
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        door.release()


def others_stay(path: str, known: list[str]) -> DatabaseLockedError:
    pids = [pid for pid in known if pid] or holders(path)
    who = f"process {pids[0]}" if len(pids) == 1 else f"processes {', '.join(pids)}"
    return DatabaseLockedError(
        f"{path} is open in {who if pids else 'other processes'} too, and this needs it alone; "
        "nothing was changed. Close it there and try again"
    )


def holders(path: str) -> list[str]:
    """The numbers of the other processes that have the data file in directory ``path`` open, as
    far as the system tells them."""
    return system_holders(os.path.join(path, "data.mdb"))


def open_note(files: tuple[str, ...]) -> bytes:
    """What the first process inside leaves for those who join it: which files they share, and
    among which processes a number means the same one. Raises ``OSError``."""
    numbers = " ".join(str(os.stat(path).st_ino) for path in files)
    return f"open {numbers} {_namespace()} .\n".encode()


def _namespace() -> str:
    try:
        return os.readlink(_NAMESPACE).strip("pid:[]") or "0"
    except OSError:
        return "0"


def why_not_join(found: bytes, files: tuple[str, ...]) -> str | None:
    """Why the store of those who left the note ``found`` cannot be joined, in words; None if it
    can be."""
    fields = found.partition(b"\n")[2].split()
    if len(fields) < len(files) + 3 or fields[0] != b"open":
        return (
            "Its lock file was replaced while it was open, or its data file is that of another "
            "directory, linked into this one"
        )
    for path, number in zip(files, fields[1:], strict=False):
        try:
            same = str(os.stat(path).st_ino).encode() == number
        except OSError:
            same = False
        if not same:
            return f"{os.path.basename(path)} was deleted or replaced while it was open"
    if fields[len(files) + 1] != _namespace().encode():
        return (
            "That is in another container, and processes that share a database must see each "
            "other: one container, or a common process namespace"
        )
    return None


__all__ = [
    "ALONE_SECONDS",
    "LOOK_SECONDS",
    "SHARING",
    "holders",
    "nobody_else",
    "open_note",
    "others_stay",
    "take_door",
    "why_not_join",
    "written_holder",
]

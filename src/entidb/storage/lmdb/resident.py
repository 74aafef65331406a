"""Giving back memory that holds pages of a mapped file.

Pages of a file that was read through a map stay in the process until another program needs the
room. They cost nothing, but they count: to a person, or to a container with a limit, a server that
has sent a large database to a device looks as if it had leaked all of it. The pages stay in the
system's cache; only this process lets go of them.

On Linux; elsewhere nothing is done and nothing is wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

from entidb.events import SafeEvent, Thread

#: Bytes of mapped files that may be resident before they are given back.
RESIDENT_BYTES_MAX: Final = 96 * 2**20
_DONTNEED: Final = 4  # MADV_DONTNEED, on every Linux
_MAPS: Final = "/proc/self/maps"
#: Seconds between two looks while a file is read at once: a disk reads some ten MiB meanwhile.
_LOOK_SECONDS: Final = 0.02
_STATM: Final = "/proc/self/statm"


def shed(path: str, limit: int = RESIDENT_BYTES_MAX) -> bool:
    """Let go of the resident pages of the file ``path``, which is mapped here, if this process
    holds more than ``limit`` bytes of mapped files; whether it did. The caller sees to it that
    the map stays where it is meanwhile."""
    if not sys.platform.startswith("linux") or mapped_bytes() <= limit:
        return False
    advise = _madvise()
    shed_some = False
    for start, length in _mappings(path):
        shed_some |= advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED) == 0
    return shed_some


@contextlib.contextmanager
def shedding(path: str, limit: int = RESIDENT_BYTES_MAX) -> Iterator[None]:
    """``shed`` now and then while the block runs, from a thread: for one call that reads the whole
    file. The caller sees to it that the map stays where it is meanwhile."""
    if not sys.platform.startswith("linux") or os.stat(path).st_size <= limit:
        yield
        return
    over = SafeEvent()
    thread = Thread(
        target=_shed_until, args=(over, path, limit), name="entidb-shedder", daemon=True
    )
    try:
        thread.start()
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def _shed_until(over: threading.Event, path: str, limit: int) -> None:
    while not over.wait(_LOOK_SECONDS):
        shed(path, limit)


def mapped_bytes() -> int:
    """Resident bytes of mapped files in this process; 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError), open(_STATM, "rb") as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _mappings(path: str) -> list[tuple[int, int]]:
    """Start and length of every map of ``path``, as far as the file goes."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        size = os.stat(path).st_size
        with open(_MAPS, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                if line.rstrip("\n").endswith(path):
                    ends, _, offset, *_ = line.split(maxsplit=5)
                    start, end = (int(text, 16) for text in ends.split("-"))
                    length = min(end - start, size - int(offset, 16))
                    if length > 0:
                        found.append((start, length))
    return found


@functools.cache
def _madvise() -> Callable[..., Any]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.restype = ctypes.c_int
    return function


__all__ = ["RESIDENT_BYTES_MAX", "mapped_bytes", "shed", "shedding"]

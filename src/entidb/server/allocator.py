"""What the C library's allocator does with the large tables of an open database.

LMDB asks for two MiB of zeros for each database that it opens, and touches a few pages of them.
From a mapping of their own they cost those few pages. But glibc learns from messages that come and
go to take ever larger pieces from its heap, where it writes all the zeros. So while a database is
being opened large pieces are mappings, and afterwards glibc has what it would have learned.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_OPENING_BYTES: Final = 1024 * 1024
#: The largest that glibc takes, and what it learns in a server that is busy; and twice that, as it
#: sets the other one by itself.
_USUAL_BYTES: Final = 32 * 1024 * 1024
_KEPT_BYTES: Final = 2 * _USUAL_BYTES


def _load() -> Callable[[int, int], int] | None:
    """``mallopt``, where the allocator is glibc's and no operator has set it up."""
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_HAND):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return None
    function: Callable[[int, int], int] = library.mallopt
    return function


_SET_BY_HAND: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_mallopt: Final = _load()
_lock: Final = threading.Lock()
_opening = 0


@contextlib.contextmanager
def large_pieces_apart() -> Iterator[None]:
    """Inside the block what is a MiB or larger gets a mapping of its own, in every thread."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(by: int) -> None:
    global _opening
    if _mallopt is None:
        return
    with _lock:
        _opening += by
        _mallopt(_MMAP_THRESHOLD, _OPENING_BYTES if _opening else _USUAL_BYTES)
        _mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)

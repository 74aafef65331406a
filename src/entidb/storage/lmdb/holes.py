"""Room in the data file that nothing uses, given back to the disk from where it lies.

LMDB keeps the pages that a commit has freed for those that follow, and its file never shrinks: what
a device held in its outbox lies between what it keeps. Moving that together needs the store alone
(``compact``). A hole needs nobody's leave: the system takes back the blocks below a range of the
file, which then reads as zeros, and LMDB writes there again whenever it likes.

Only such pages are given back as LMDB would write on at once, were there a commit: those that were
free before every state that any process still reads, and before the newest commit. The writer's
lock is held meanwhile, so none of them is taken. Killed at any moment, the file is as it was, with
more or fewer holes.

On Linux, and on file systems that can do it; elsewhere nothing is done and nothing is wrong.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

from entidb.storage.lmdb.headers import UNREADABLE, Header, read_headers
from entidb.storage.lmdb.pages import free_pages

#: Bytes on the disk over what is used that are not worth it, and their part of what is used.
SPARE_BYTES_MIN: Final = 1024 * 1024
_SPARE_PART: Final = 16
#: Shorter runs of free pages stay: each hole is an entry in the file's table of blocks.
RUN_PAGES_MIN: Final = 4
#: Holes of one step, and pages: others may wait for the turn meanwhile.
STEP_HOLES_MAX: Final = 64
STEP_PAGES_MAX: Final = 16 * 1024
_BLOCK_BYTES: Final = 512  # of ``st_blocks``, whatever the file system has
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
#: First page of a run, and how many there are.
Run = tuple[int, int]


class Holes:
    """Of one open data file. Used by the thread that has the turn."""

    def __init__(self) -> None:
        #: The commit in whose free pages nothing is left to find.
        self._done_at = 0
        self._possible = sys.platform == "linux"

    def step(self, descriptor: int, begin: Callable[[], Any], readers: Callable[[], str]) -> bool:
        """Give back a bounded part of what the file at ``descriptor`` has no use for; whether it is
        worth another step, now or later. ``begin`` begins LMDB's transaction for a write, and
        ``readers`` reads its table of readers. Raises ``OSError``, ``lmdb.Error``."""
        header = self._header(descriptor)
        if header is None or not is_spared(descriptor, header):
            return False
        if header.transaction == self._done_at:
            return True
        transaction = begin()
        try:
            return self._step_alone(descriptor, oldest_read(readers()))
        finally:
            # Nothing was written: this only gives the writer's lock back.
            transaction.commit()

    def _header(self, descriptor: int) -> Header | None:
        """That of the newest commit; None where nothing can be given back."""
        if not self._possible:
            return None
        try:
            return read_headers(descriptor).newer_first()[0]
        except UNREADABLE:
            return None  # Whoever reads in it finds out, and says so.

    def _step_alone(self, descriptor: int, oldest: int) -> bool:
        header = self._header(descriptor)
        if header is None:
            return False
        try:
            # What the newest commit has freed belongs to the state before it, and that is what is
            # left if its header is lost.
            kept = header.transaction - 1
            free = free_pages(descriptor, header, min(oldest, kept))
        except UNREADABLE:
            self._possible = False
            return False
        left = STEP_PAGES_MAX
        for number, (first, count) in enumerate(self._full_runs(descriptor, header, free)):
            if number == STEP_HOLES_MAX or left <= 0:
                return True
            if not punch(descriptor, first * header.page_bytes, count * header.page_bytes):
                self._possible = False
                return False
            left -= count
        if oldest >= kept:
            self._done_at = header.transaction
        return is_spared(descriptor, header)

    def _full_runs(self, descriptor: int, header: Header, free: Iterable[int]) -> Iterable[Run]:
        """Runs of free pages below which there is something on the disk, in parts that one step
        can do."""
        for first, count in runs_of(free):
            for begin in range(first, first + count, STEP_PAGES_MAX):
                part = min(STEP_PAGES_MAX, first + count - begin)
                if part >= RUN_PAGES_MIN and _has_data(descriptor, begin, part, header.page_bytes):
                    yield begin, part


def is_spared(descriptor: int, header: Header) -> bool:
    """Whether the file takes so much more on the disk than it uses that giving it back is worth
    it."""
    trees = (header.free, header.main)
    pages = sum(tree.branch_pages + tree.leaf_pages + tree.overflow_pages for tree in trees)
    used = (pages + 2) * header.page_bytes
    there = os.fstat(descriptor).st_blocks * _BLOCK_BYTES
    return there - used > max(SPARE_BYTES_MIN, used // _SPARE_PART)


def oldest_read(readers: str) -> int:
    """The oldest commit that a process reads, by LMDB's table of readers: pages that a later one
    has freed are read still. If a line is not as it should be, a commit before all others."""
    oldest = sys.maxsize
    for line in readers.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[0].isdecimal():
            if fields[2] != "-":
                oldest = min(oldest, int(fields[2]) if fields[2].isdecimal() else 0)
        elif fields[:1] not in (["pid"], ["(no"]):
            oldest = 0
    return oldest


def runs_of(pages: Iterable[int]) -> list[Run]:
    """Of pages in order, those that follow each other."""
    runs: list[Run] = []
    first = last = -2
    for page in pages:
        if page != last + 1:
            if first >= 0:
                runs.append((first, last + 1 - first))
            first = page
        last = page
    if first >= 0:
        runs.append((first, last + 1 - first))
    return runs


def _has_data(descriptor: int, first: int, count: int, page_bytes: int) -> bool:
    try:
        at = os.lseek(descriptor, first * page_bytes, os.SEEK_DATA)
    except OSError:
        return False  # Nothing but a hole up to the end of the file.
    return at < (first + count) * page_bytes


def punch(descriptor: int, offset: int, length: int) -> bool:
    """Give the disk back what is below so many bytes of the file; whether that can be done here."""
    call = _fallocate()
    if call is None:
        return False
    mode = _KEEP_SIZE | _PUNCH_HOLE
    return bool(call(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0)


@functools.cache
def _fallocate() -> Callable[..., Any] | None:
    """Its 64-bit form, where the C library has it by that name."""
    function: Callable[..., Any] | None = getattr(ctypes.CDLL(None), "fallocate64", None)
    return function

"""The two headers of an LMDB data file, which its commits write in turn: reading them, and whether
both can come from LMDB.

The code that opens a store reads them once and passes them on. Nothing here changes a file.

Not here: whether the file is all there (``closed_file``), and the pages below a header (``pages``).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from entidb.storage.lmdb.layout import (
    BRANCH,
    LEAF,
    META,
    META_BYTES,
    META_END,
    META_FLAG,
    NO_PAGE,
    NODE,
    PAGE_HEADER,
    PAGE_SIZES,
    TREE,
    read_at,
)

_U64: Final = struct.Struct("=Q")
_U32: Final = struct.Struct("=I")
_PAGE_SIZE_AT: Final = PAGE_HEADER.size + META.size
_INTEGER_KEY: Final = 0x08
#: LMDB's own bound (CURSOR_STACK).
_DEPTH_MAX: Final = 32


class Unreadable(Exception):
    """A page that cannot be read any further; the message is the fault."""


#: The last two: a file that is cut short, or a number that leads out of its page, in a place where
#: nothing compares it first.
UNREADABLE: Final = (Unreadable, struct.error, IndexError)


def said(error: Exception) -> str:
    """The fault that one of ``UNREADABLE`` is."""
    return str(error) if isinstance(error, Unreadable) else "a page is not what it must be"


class Tree(NamedTuple):
    page_bytes: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class Header(NamedTuple):
    """What one of the two meta pages says."""

    number: int
    page_flags: int
    magic: int
    version: int
    address: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int

    @property
    def page_bytes(self) -> int:
        return self.free.page_bytes


@dataclass(frozen=True, slots=True)
class Headers:
    """Both headers as they were in the file when it was read; ``raw`` is their bytes."""

    raw: bytes
    first: Header
    second: Header

    def newer_first(self) -> tuple[Header, Header]:
        """The header that LMDB goes by, and the other: the first while both are of no commit."""
        if self.second.transaction > self.first.transaction:
            return self.second, self.first
        return self.first, self.second

    def are_in(self, descriptor: int) -> bool:
        """Whether the file still says the same."""
        first, second = self.raw[:META_BYTES], self.raw[META_BYTES:]
        return (
            read_at(descriptor, META_BYTES, 0) == first
            and read_at(descriptor, META_BYTES, self.first.page_bytes) == second
        )

    @property
    def transaction(self) -> int:
        """The number of the commit that LMDB goes by."""
        return max(self.first.transaction, self.second.transaction)


def read_headers(descriptor: int) -> Headers:
    """Raises one of ``UNREADABLE`` where they cannot be found."""
    first = pread(descriptor, META_BYTES, 0)
    if len(first) < META_BYTES:
        raise Unreadable("the file is shorter than its header")
    (page_bytes,) = _U32.unpack_from(first, _PAGE_SIZE_AT)
    if page_bytes not in PAGE_SIZES:
        raise Unreadable(f"the header names a page size of {page_bytes}")
    second = pread(descriptor, META_BYTES, page_bytes)
    if len(second) < META_BYTES:
        raise Unreadable("the file is shorter than its headers")
    headers = Headers(first + second, parsed_header(first), parsed_header(second))
    if headers.second.page_bytes != page_bytes:
        raise Unreadable("the headers name different page sizes")
    return headers


def parsed_header(raw: bytes) -> Header:
    number, _, page_flags, _, _ = PAGE_HEADER.unpack_from(raw, 0)
    magic, version, address, _ = META.unpack_from(raw, PAGE_HEADER.size)
    free = Tree._make(TREE.unpack_from(raw, _PAGE_SIZE_AT))
    main = Tree._make(TREE.unpack_from(raw, _PAGE_SIZE_AT + TREE.size))
    last_page, transaction = META_END.unpack_from(raw, META_BYTES - META_END.size)
    return Header(number, page_flags, magic, version, address, free, main, last_page, transaction)


def header_fault(descriptor: int, headers: Headers, known: int = 0) -> str | None:
    """What shows that the two cannot both come from LMDB, or that the newer one does not fit the
    list of free pages that belongs to it; None if all is well. What a failed write left in the
    older one is no damage: the next commit replaces it.

    ``known`` is a commit that was certainly there once.

    For a process that has the file to itself: headers that are being written need not agree. A
    header with a wrong transaction number would make LMDB go back to the commit before the last
    one."""
    try:
        return _header_fault(descriptor, headers, known)
    except UNREADABLE as error:
        return said(error)


def _header_fault(descriptor: int, headers: Headers, known: int) -> str | None:
    for number, header in enumerate((headers.first, headers.second)):
        if header.number != number or header.page_flags != META_FLAG:
            return f"header {number} is not marked as one"
        if header.free.flags != _INTEGER_KEY or header.main.flags or header.address:
            return f"header {number} names options that are never used"
    newer, older = headers.newer_first()
    # Commits write the headers in turn: even numbers into the first, odd ones into the second.
    if newer.transaction % 2 != newer.number or older.transaction not in _before(newer.transaction):
        numbers = f"{headers.first.transaction} and {headers.second.transaction}"
        return f"its headers are of commits {numbers}"
    # A commit lists the pages it frees under its own number, and no later one is listed.
    listed = _last_listed(descriptor, newer)
    if listed > newer.transaction:
        return _wrong_end(newer, listed)
    return _older_fault(descriptor, newer, listed, older, known)


def _older_fault(
    descriptor: int, newer: Header, listed: int, older: Header, known: int
) -> str | None:
    """What the older header says against the newer one. LMDB does not read it, so nothing in it
    has to be right: when the write of a header fails, LMDB puts back the commit number that was
    there before, and leaves the roots of the commit that failed."""
    try:
        listed_before = _last_listed(descriptor, older)
    except UNREADABLE:
        return None
    if listed_before > older.transaction:
        # The roots are of the commit after the newer one. Its header was not written whole, or it
        # was, and its number is wrong now; but then nobody put the old last page back.
        was_there = known > newer.transaction or older.last_page > newer.last_page
        return _wrong_end(older, listed_before) if was_there else None
    # Into a tree that was not empty every commit frees at least the root it replaces. The pages
    # of both commits are there: LMDB uses none of the older one's again before its header is
    # replaced.
    if older.main.root != NO_PAGE and listed != newer.transaction:
        return _wrong_end(newer, listed)
    return None


def _wrong_end(header: Header, listed: int) -> str:
    return f"the list of free pages of commit {header.transaction} ends with commit {listed}"


def _before(newest: int) -> set[int]:
    """Which commits the other header can be of. A write of the next number that stopped between
    its bytes, and was not put back, leaves the low ones of the new number and the rest of the old:
    less than both, since without a carry it would be the new number."""
    old, new = max(newest - 1, 0), newest + 1
    masks = [(1 << 8 * count) - 1 for count in range(_U64.size)]
    torn = {old & ~mask | new & mask for mask in masks}
    return {number for number in torn if number < newest or number == newest == 0}


def _last_listed(descriptor: int, header: Header) -> int:
    """The last key in the list of free pages; 0 if the list is empty."""
    number, page = header.free.root, b""
    for _ in range(_DEPTH_MAX):
        if number == NO_PAGE:
            return 0
        page = read_page(descriptor, number, header.page_bytes)
        _, _, flags, lower, _ = PAGE_HEADER.unpack_from(page, 0)
        at = _last_node(page, lower)
        low, high, node_flags, _ = NODE.unpack_from(page, at)
        if flags == LEAF and at + 16 <= len(page):
            last: int = _U64.unpack_from(page, at + 8)[0]
            return last
        if flags != BRANCH:
            raise Unreadable(f"page {number} is no page of the list of free pages")
        number = low | high << 16 | node_flags << 32
    raise Unreadable("the list of free pages is too deep")


def _last_node(page: bytes, lower: int) -> int:
    if not PAGE_HEADER.size < lower <= len(page) or lower % 2:
        raise Unreadable("a page of the list of free pages has wrong bounds")
    at: int = struct.unpack_from("=H", page, lower - 2)[0]
    if at + NODE.size > len(page):
        raise Unreadable("a page of the list of free pages has wrong bounds")
    return at


def pread(descriptor: int, count: int, offset: int) -> bytes:
    try:
        return read_at(descriptor, count, offset)
    except OSError as error:
        said = os.strerror(error.errno or 0).lower()
        raise Unreadable(f"the disk does not give what is at byte {offset}: {said}") from error


def read_page(descriptor: int, number: int, page_bytes: int) -> bytes:
    page = b""
    if number * page_bytes < 2**62:
        page = pread(descriptor, page_bytes, number * page_bytes)
    if len(page) < page_bytes:
        raise Unreadable(f"page {number} is behind the end of the file")
    return page

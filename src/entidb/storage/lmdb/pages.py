"""Whether the pages of an LMDB data file make up two sound trees, read with ``pread``.

LMDB trusts its pages: a flipped bit in a page's header or in a page number makes it skip records,
return older ones (whose checksums are right), loop, or touch memory that is not there. Here every
page that can be reached is looked at without being mapped, and everything that two pages say of
one thing is compared: page numbers, bounds, the order of keys over page borders, the counts of the
header, and that no page is used twice or is used and free at once. That last one is what finds a
pointer that leads to an older copy of a page.

What records hold is proved by their own checksums (``snapshot``). Nothing here changes a file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from entidb.errors import CorruptionError
from entidb.storage.base import KEY_BYTES_MAX
from entidb.storage.lmdb.layout import (
    BIG_DATA,
    BRANCH,
    LEAF,
    META,
    META_BYTES,
    META_END,
    META_FLAG,
    NO_PAGE,
    NODE,
    OVERFLOW,
    PAGE_HEADER,
    PAGE_SIZES,
    TREE,
    open_to_read,
    read_at,
)

_U64: Final = struct.Struct("=Q")
_PAGE_SIZE_AT: Final = PAGE_HEADER.size + META.size
_INTEGER_KEY: Final = 0x08
#: LMDB's own bound (CURSOR_STACK).
_DEPTH_MAX: Final = 32


class _Bad(Exception):
    """A page that cannot be read any further; the message is the fault."""


#: The last two: a file that is cut short, or a number that leads out of its page, in a place where
#: nothing compares it first.
_UNREADABLE: Final = (_Bad, struct.error, IndexError)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, _Bad) else "a page is not what it must be"


@dataclass(frozen=True)
class _Tree:
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


@dataclass(frozen=True)
class Header:
    """What one of the two meta pages says; they take turns."""

    page_bytes: int
    number: int
    page_flags: int
    address: int
    free: _Tree
    main: _Tree
    last_page: int
    transaction: int


def check_headers(path: str, known: int = 0) -> None:
    """Raise ``CorruptionError`` if the two headers of the file at ``path`` cannot both come from
    LMDB, or the newer one does not fit the list of free pages that belongs to it. What a failed
    write left in the older one is no damage: the next commit replaces it.

    ``known`` is a commit that was certainly there once.

    For whoever has the file to itself: headers that are being written need not agree. A header
    with a wrong transaction number would make LMDB go back to the commit before the last one.
    """
    descriptor = open_to_read(path)
    try:
        fault = _header_fault(descriptor, known)
    except _UNREADABLE as error:
        fault = _said(error)
    finally:
        os.close(descriptor)
    if fault is not None:
        raise damaged_file(path, [fault])


def damaged_file(path: str, faults: list[str]) -> CorruptionError:
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    return CorruptionError(
        f"{path} is damaged: {faults[0]}{more}; it was not touched. Restore a backup, or fetch a "
        "device's data anew from its server"
    )


def read_raw_headers(path: str) -> tuple[bytes, int]:
    """The bytes of both headers, and the number of the commit that LMDB goes by; nothing and 0
    where there are none."""
    descriptor = open_to_read(path)
    try:
        headers = _read_headers(descriptor)
        raw = [read_at(descriptor, META_BYTES, n * headers[0].page_bytes) for n in (0, 1)]
    except _UNREADABLE:
        return b"", 0
    finally:
        os.close(descriptor)
    return b"".join(raw), newer_first(headers)[0].transaction


def closed_file_faults(path: str) -> list[str]:
    """As ``page_faults``, of the newest commit in a file that nobody has open: for looking at a
    file before it is mapped, which a program need not survive if it is damaged."""
    descriptor = open_to_read(path)
    try:
        fault = _header_fault(descriptor)
        if fault is not None:
            return [fault]
        headers = _read_headers(descriptor)
    except _UNREADABLE as error:
        return [_said(error)]
    finally:
        os.close(descriptor)
    return list(page_faults(path, newer_first(headers)[0]))


def read_header(path: str, transaction: int) -> Header | None:
    """The header of commit ``transaction``, None if there is none. Its place is written again two
    commits later, so the caller keeps writers away."""
    descriptor = open_to_read(path)
    try:
        headers = _read_headers(descriptor)
    except _UNREADABLE:
        return None
    finally:
        os.close(descriptor)
    return next((header for header in headers if header.transaction == transaction), None)


def page_faults(path: str, header: Header) -> Iterator[str]:
    """One line per fault in the trees that belong to ``header``; nothing when all is well. The
    caller holds a snapshot of that commit, so that writers do not use its pages again."""
    descriptor = open_to_read(path)
    try:
        yield from _Walk(descriptor, header).run()
    except _UNREADABLE as error:
        yield f"the walk over the pages ended early: {_said(error)}"
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- headers


def _read_headers(descriptor: int) -> tuple[Header, Header]:
    raw = _pread(descriptor, META_BYTES, 0)
    if len(raw) < META_BYTES:
        raise _Bad("the file is shorter than its header")
    (page_bytes,) = struct.unpack_from("=I", raw, _PAGE_SIZE_AT)
    if page_bytes not in PAGE_SIZES:
        raise _Bad(f"the header names a page size of {page_bytes}")
    second = _pread(descriptor, META_BYTES, page_bytes)
    if len(second) < META_BYTES:
        raise _Bad("the file is shorter than its headers")
    if second[_PAGE_SIZE_AT : _PAGE_SIZE_AT + 4] != raw[_PAGE_SIZE_AT : _PAGE_SIZE_AT + 4]:
        raise _Bad("the headers name different page sizes")
    return _read_header(raw), _read_header(second)


def _read_header(raw: bytes) -> Header:
    number, _, page_flags, _, _ = PAGE_HEADER.unpack_from(raw, 0)
    _, _, address, _ = META.unpack_from(raw, PAGE_HEADER.size)
    free = _Tree(*TREE.unpack_from(raw, _PAGE_SIZE_AT)[1:])
    main = _Tree(*TREE.unpack_from(raw, _PAGE_SIZE_AT + TREE.size)[1:])
    last_page, transaction = META_END.unpack_from(raw, META_BYTES - META_END.size)
    (page_bytes,) = struct.unpack_from("=I", raw, _PAGE_SIZE_AT)
    return Header(page_bytes, number, page_flags, address, free, main, last_page, transaction)


def _header_fault(descriptor: int, known: int = 0) -> str | None:
    headers = _read_headers(descriptor)
    for number, header in enumerate(headers):
        if header.number != number or header.page_flags != META_FLAG:
            return f"header {number} is not marked as one"
        if header.free.flags != _INTEGER_KEY or header.main.flags or header.address:
            return f"header {number} names options that are never used"
    newer, older = newer_first(headers)
    # Commits write the headers in turn: even numbers into the first, odd ones into the second.
    if newer.transaction % 2 != newer.number or older.transaction not in _before(newer.transaction):
        numbers = f"{headers[0].transaction} and {headers[1].transaction}"
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
    except _UNREADABLE:
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


def newer_first(headers: tuple[Header, Header]) -> tuple[Header, Header]:
    """The header that LMDB goes by, and the other: the first while both are of no commit."""
    first, second = headers
    return (second, first) if second.transaction > first.transaction else (first, second)


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
        page = _read_page(descriptor, number, header.page_bytes)
        _, _, flags, lower, _ = PAGE_HEADER.unpack_from(page, 0)
        at = _last_node(page, lower)
        low, high, node_flags, _ = NODE.unpack_from(page, at)
        if flags == LEAF and at + 16 <= len(page):
            last: int = _U64.unpack_from(page, at + 8)[0]
            return last
        if flags != BRANCH:
            raise _Bad(f"page {number} is no page of the list of free pages")
        number = low | high << 16 | node_flags << 32
    raise _Bad("the list of free pages is too deep")


def _last_node(page: bytes, lower: int) -> int:
    if not PAGE_HEADER.size < lower <= len(page) or lower % 2:
        raise _Bad("a page of the list of free pages has wrong bounds")
    at: int = struct.unpack_from("=H", page, lower - 2)[0]
    if at + NODE.size > len(page):
        raise _Bad("a page of the list of free pages has wrong bounds")
    return at


def _pread(descriptor: int, count: int, offset: int) -> bytes:
    try:
        return read_at(descriptor, count, offset)
    except OSError as error:
        said = os.strerror(error.errno or 0).lower()
        raise _Bad(f"the disk does not give what is at byte {offset}: {said}") from error


def _read_page(descriptor: int, number: int, page_bytes: int) -> bytes:
    page = b""
    if number * page_bytes < 2**62:
        page = _pread(descriptor, page_bytes, number * page_bytes)
    if len(page) < page_bytes:
        raise _Bad(f"page {number} is behind the end of the file")
    return page


# ---------------------------------------------------------------- trees


class _Walk:
    """One pass over the list of free pages and the tree of records."""

    def __init__(self, descriptor: int, header: Header) -> None:
        self._descriptor = descriptor
        self._header = header
        self._bytes = header.page_bytes
        pages = os.fstat(descriptor).st_size // header.page_bytes
        self._pages = min(header.last_page + 1, pages)
        #: 1 where a page is used by a tree.
        self._used = bytearray(self._pages)

    def run(self) -> Iterator[str]:
        self._used[:2] = b"\1\1"
        free: list[tuple[bytes, bytes]] = []
        yield from _TreeWalk(self, self._header.free, free).run()
        yield from _TreeWalk(self, self._header.main, None).run()
        yield from self._free_pages(free)

    def page(self, number: int) -> bytes:
        """The page, which from now on is in use; only once, so no walk is endless."""
        self.take(number, 1)
        return _read_page(self._descriptor, number, self._bytes)

    def take(self, first: int, count: int) -> None:
        if not 2 <= first <= first + count <= self._pages:
            raise _Bad(f"page {first} (with {count - 1} more) is outside the file")
        if any(self._used[first : first + count]):
            raise _Bad(f"page {first} is used twice")
        self._used[first : first + count] = b"\1" * count

    def take_value(self, first: int, length: int) -> int:
        """Take the pages of a value that has its own, with one header; how many there are."""
        count = (PAGE_HEADER.size - 1 + length) // self._bytes + 1
        self.take(first, count)
        raw = _pread(self._descriptor, PAGE_HEADER.size, first * self._bytes)
        number, _, flags, low, high = PAGE_HEADER.unpack(raw)
        if number != first or flags != OVERFLOW or low | high << 16 != count:
            raise _Bad(f"page {first} does not begin a value of {length} bytes")
        return count

    def read_value(self, first: int, length: int) -> bytes:
        at = first * self._bytes + PAGE_HEADER.size
        return _pread(self._descriptor, length, at)

    def _free_pages(self, lists: list[tuple[bytes, bytes]]) -> Iterator[str]:
        last_page = self._header.last_page
        free = set[int]()
        for key, raw in lists:
            commit = _U64.unpack(key)[0]
            count = _U64.unpack_from(raw, 0)[0]
            if commit > self._header.transaction or count * 8 + 8 > len(raw):
                yield f"the pages freed by commit {commit} are not a list"
                continue
            for number in struct.unpack_from(f"={count}Q", raw, 8):
                if not 2 <= number <= last_page:
                    yield f"page {number}, listed as free, is outside the file"
                elif number in free:
                    yield f"page {number} is listed as free twice"
                elif number < self._pages and self._used[number]:
                    yield f"page {number} is in use and listed as free"
                else:
                    free.add(number)
        if last_page not in free and not (last_page < self._pages and self._used[last_page]):
            yield f"the header's last page, {last_page}, is neither in use nor free"


class _TreeWalk:
    """In key order through one tree, comparing what is found with what its header counts."""

    def __init__(self, walk: _Walk, tree: _Tree, records: list[tuple[bytes, bytes]] | None) -> None:
        self._walk = walk
        self._tree = tree
        #: The list of free pages is small and is kept; other records are only walked over.
        self._records = records
        self._branches = self._leaves = self._overflow = self._entries = 0
        self._previous: bytes | int | None = None

    def run(self) -> Iterator[str]:
        tree = self._tree
        name = "records" if self._records is None else "free pages"
        if tree.root != NO_PAGE:
            self._descend(tree.root, 1, None, None)
        found = (self._branches, self._leaves, self._overflow, self._entries)
        counted = (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries)
        if found != counted:
            yield (
                f"the header counts {counted} branches, leaves, other pages and entries of the "
                f"{name}; there are {found}"
            )

    def _descend(
        self, number: int, depth: int, low: bytes | int | None, high: bytes | int | None
    ) -> None:
        page = self._walk.page(number)
        stored, _, flags, lower, upper = PAGE_HEADER.unpack_from(page, 0)
        if stored != number:
            raise _Bad(f"page {number} says it is page {stored}")
        if depth > self._tree.depth or flags != (BRANCH if depth < self._tree.depth else LEAF):
            raise _Bad(f"page {number} is of the wrong kind for its place in the tree")
        nodes = self._nodes(page, number, lower, upper, branch=flags == BRANCH)
        if flags == LEAF:
            self._leaves += 1
            for key, length, at, big in nodes:
                self._leaf_node(number, page, key, length, at, big, low, high)
            return
        self._branches += 1
        # The first key of a branch page is never compared; its child begins where the page does.
        keys = [low, *(self._key(key) for key, _, _, _ in nodes[1:]), high]
        for (_, child, _, _), first, after in zip(nodes, keys, keys[1:], strict=False):
            self._descend(child, depth + 1, first, after)

    def _leaf_node(
        self,
        number: int,
        page: bytes,
        raw_key: bytes,
        length: int,
        at: int,
        big: bool,
        low: bytes | int | None,
        high: bytes | int | None,
    ) -> None:
        key = self._key(raw_key)
        if (
            (self._previous is not None and not _below(self._previous, key))
            or (low is not None and _below(key, low))
            or (high is not None and not _below(key, high))
        ):
            raise _Bad(f"page {number}: key {raw_key.hex()} is out of order")
        self._previous = key
        self._entries += 1
        if big:
            first = _U64.unpack_from(page, at)[0]
            self._overflow += self._walk.take_value(first, length)
        if self._records is None:
            return
        value = self._walk.read_value(first, length) if big else page[at : at + length]
        if len(value) < 8:
            raise _Bad(f"page {number}: a list of free pages is cut short")
        self._records.append((raw_key, value))

    def _key(self, raw: bytes) -> bytes | int:
        if self._records is None:
            return raw
        if len(raw) != 8:
            raise _Bad("a list of free pages has no commit")
        number: int = _U64.unpack(raw)[0]
        return number

    def _nodes(
        self, page: bytes, number: int, lower: int, upper: int, *, branch: bool
    ) -> list[tuple[bytes, int, int, bool]]:
        """(key, child page or length of the value, where the value begins, whether it is on pages
        of its own) of each node. Together the nodes fill the page from ``upper`` to its end."""
        size = len(page)
        if lower % 2 or not PAGE_HEADER.size < lower <= upper <= size:
            raise _Bad(f"page {number} has wrong bounds")
        offsets = struct.unpack_from(f"={(lower - PAGE_HEADER.size) // 2}H", page, 16)
        nodes = []
        spans = []
        for at in offsets:
            if at < upper or at % 2 or at + NODE.size > size:
                raise _Bad(f"page {number} has a node outside its bounds")
            low, high, flags, key_bytes = NODE.unpack_from(page, at)
            value_at = at + NODE.size + key_bytes
            if branch:
                length, big, stored = low | high << 16 | flags << 32, False, 0
            else:
                length, big = low | high << 16, flags == BIG_DATA
                stored = 8 if big else length
            if key_bytes > KEY_BYTES_MAX or value_at + stored > size:
                raise _Bad(f"page {number} has a node that does not fit it")
            if not branch and (flags & ~BIG_DATA or not key_bytes):
                raise _Bad(f"page {number} has a node of an unknown kind")
            spans.append((at, value_at + stored + ((value_at + stored) & 1)))
            nodes.append((page[at + NODE.size : value_at], length, value_at, big))
        spans.sort()
        ends = [upper, *(end for _, end in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != size:
            raise _Bad(f"page {number} has nodes that overlap or leave gaps")
        return nodes


def _below(one: bytes | int, other: bytes | int) -> bool:
    """Keys of one tree are all bytes or all numbers."""
    return one < other  # type: ignore[operator]

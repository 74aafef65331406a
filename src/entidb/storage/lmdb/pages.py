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
from collections.abc import Callable, Iterator
from operator import lt
from typing import Final

from entidb.errors import CorruptionError
from entidb.storage.base import KEY_BYTES_MAX
from entidb.storage.lmdb.headers import (
    UNREADABLE,
    Header,
    Tree,
    Unreadable,
    header_fault,
    pread,
    read_headers,
    read_page,
    said,
)
from entidb.storage.lmdb.layout import (
    BIG_DATA,
    BRANCH,
    LEAF,
    NO_PAGE,
    NODE,
    OVERFLOW,
    PAGE_HEADER,
    open_to_read,
)

#: Pages between two calls of who may rest: half a millisecond's work or so.
_REST_EVERY: Final = 32
_U64: Final = struct.Struct("=Q")
#: A node whose length takes two bytes and which has no flags: what is between is nothing.
_SMALL_NODE: Final = struct.Struct("=HIH")


def damaged_file(path: str, faults: list[str]) -> CorruptionError:
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    return CorruptionError(
        f"{path} is damaged: {faults[0]}{more}; it was not touched. Restore a backup, or fetch a "
        "device's data anew from its server"
    )


def closed_file_faults(path: str, rest: Callable[[], None] | None = None) -> list[str]:
    """As ``page_faults``, of the newest commit in a file that no process has open: for looking at a
    file before it is mapped, which a program need not survive if it is damaged."""
    descriptor = open_to_read(path)
    try:
        headers = read_headers(descriptor)
        fault = header_fault(descriptor, headers)
        if fault is not None:
            return [fault]
    except UNREADABLE as error:
        return [said(error)]
    finally:
        os.close(descriptor)
    return list(page_faults(path, headers.newer_first()[0], rest))


def read_header(path: str, transaction: int) -> Header | None:
    """The header of commit ``transaction``, None if there is none. Its place is written again two
    commits later, so the caller keeps writers away."""
    descriptor = open_to_read(path)
    try:
        headers = read_headers(descriptor)
    except UNREADABLE:
        return None
    finally:
        os.close(descriptor)
    both = headers.newer_first()
    return next((header for header in both if header.transaction == transaction), None)


def page_faults(path: str, header: Header, rest: Callable[[], None] | None = None) -> Iterator[str]:
    """One line per fault in the trees that belong to ``header``; nothing when all is well. The
    caller holds a snapshot of that commit, so that writers do not use its pages again. ``rest`` is
    called now and then, and may sleep."""
    descriptor = open_to_read(path)
    try:
        yield from _Walk(descriptor, header, rest).run()
    except UNREADABLE as error:
        yield f"the walk over the pages ended early: {said(error)}"
    finally:
        os.close(descriptor)


def free_pages(descriptor: int, header: Header, up_to: int) -> list[int]:
    """In order, the pages that commits up to ``up_to`` have freed, by the list that belongs to
    ``header``. The caller keeps writers away. Raises one of ``UNREADABLE`` where the list, or a
    page in it, is not what it must be."""
    walk, lists = _Walk(descriptor, header), list[tuple[bytes, bytes]]()
    for fault in _TreeWalk(walk, header.free, lists).run():
        raise Unreadable(fault)
    pages: list[int] = []
    for key, raw in lists:
        if _U64.unpack(key)[0] <= up_to:
            pages += struct.unpack_from(f"={_U64.unpack_from(raw, 0)[0]}Q", raw, 8)
    pages.sort()
    if pages and not 2 <= pages[0] <= pages[-1] <= header.last_page:
        raise Unreadable("a page that is listed as free is outside the file")
    return pages


class _Walk:
    """One pass over the list of free pages and the tree of records."""

    def __init__(
        self, descriptor: int, header: Header, rest: Callable[[], None] | None = None
    ) -> None:
        self._descriptor = descriptor
        self._rest = rest
        self._taken = 0
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
        self._taken += 1
        if self._rest is not None and self._taken % _REST_EVERY == 0:
            self._rest()
        return read_page(self._descriptor, number, self._bytes)

    def take(self, first: int, count: int) -> None:
        if not 2 <= first <= first + count <= self._pages:
            raise Unreadable(f"page {first} (with {count - 1} more) is outside the file")
        if any(self._used[first : first + count]):
            raise Unreadable(f"page {first} is used twice")
        self._used[first : first + count] = b"\1" * count

    def take_value(self, first: int, length: int) -> int:
        """Take the pages of a value that has its own, with one header; how many there are."""
        count = (PAGE_HEADER.size - 1 + length) // self._bytes + 1
        self.take(first, count)
        raw = pread(self._descriptor, PAGE_HEADER.size, first * self._bytes)
        number, _, flags, low, high = PAGE_HEADER.unpack(raw)
        if number != first or flags != OVERFLOW or low | high << 16 != count:
            raise Unreadable(f"page {first} does not begin a value of {length} bytes")
        return count

    def read_value(self, first: int, length: int) -> bytes:
        at = first * self._bytes + PAGE_HEADER.size
        return pread(self._descriptor, length, at)

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

    def __init__(self, walk: _Walk, tree: Tree, records: list[tuple[bytes, bytes]] | None) -> None:
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
            raise Unreadable(f"page {number} says it is page {stored}")
        if depth > self._tree.depth or flags != (BRANCH if depth < self._tree.depth else LEAF):
            raise Unreadable(f"page {number} is of the wrong kind for its place in the tree")
        if flags == LEAF and self._records is None:
            ordinary = ordinary_keys(page, lower, upper)
            if ordinary and self._follow(ordinary, low, high):
                return
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

    def _follow(self, keys: list[bytes], low: bytes | int | None, high: bytes | int | None) -> bool:
        """Take a whole leaf, if its keys are in order and where they belong."""
        if (
            (self._previous is not None and not _below(self._previous, keys[0]))
            or (low is not None and _below(keys[0], low))
            or (high is not None and not _below(keys[-1], high))
            or not all(map(lt, keys, keys[1:]))
        ):
            return False
        self._leaves += 1
        self._entries += len(keys)
        self._previous = keys[-1]
        return True

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
            raise Unreadable(f"page {number}: key {raw_key.hex()} is out of order")
        self._previous = key
        self._entries += 1
        if big:
            first = _U64.unpack_from(page, at)[0]
            self._overflow += self._walk.take_value(first, length)
        if self._records is None:
            return
        value = self._walk.read_value(first, length) if big else page[at : at + length]
        if len(value) < 8:
            raise Unreadable(f"page {number}: a list of free pages is cut short")
        self._records.append((raw_key, value))

    def _key(self, raw: bytes) -> bytes | int:
        if self._records is None:
            return raw
        if len(raw) != 8:
            raise Unreadable("a list of free pages has no commit")
        number: int = _U64.unpack(raw)[0]
        return number

    def _nodes(
        self, page: bytes, number: int, lower: int, upper: int, *, branch: bool
    ) -> list[tuple[bytes, int, int, bool]]:
        """(key, child page or length of the value, where the value begins, whether it is on pages
        of its own) of each node. Together the nodes fill the page from ``upper`` to its end."""
        size = len(page)
        if lower % 2 or not PAGE_HEADER.size < lower <= upper <= size:
            raise Unreadable(f"page {number} has wrong bounds")
        offsets = struct.unpack_from(f"={(lower - PAGE_HEADER.size) // 2}H", page, 16)
        nodes = []
        spans = []
        for at in offsets:
            if at < upper or at % 2 or at + NODE.size > size:
                raise Unreadable(f"page {number} has a node outside its bounds")
            low, high, flags, key_bytes = NODE.unpack_from(page, at)
            value_at = at + NODE.size + key_bytes
            if branch:
                length, big, stored = low | high << 16 | flags << 32, False, 0
            else:
                length, big = low | high << 16, flags == BIG_DATA
                stored = 8 if big else length
            if key_bytes > KEY_BYTES_MAX or value_at + stored > size:
                raise Unreadable(f"page {number} has a node that does not fit it")
            if not branch and (flags & ~BIG_DATA or not key_bytes):
                raise Unreadable(f"page {number} has a node of an unknown kind")
            spans.append((at, value_at + stored + ((value_at + stored) & 1)))
            nodes.append((page[at + NODE.size : value_at], length, value_at, big))
        spans.sort()
        ends = [upper, *(end for _, end in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != size:
            raise Unreadable(f"page {number} has nodes that overlap or leave gaps")
        return nodes


def ordinary_keys(page: bytes, lower: int, upper: int) -> list[bytes]:
    """The keys of a leaf page on which nothing is wrong and each value is beside its key, as on
    nearly all pages; nothing if it is another, for which ``_nodes`` finds out more slowly what it
    is."""
    size = len(page)
    if lower % 2 or upper % 2 or not PAGE_HEADER.size < lower <= upper <= size - NODE.size:
        return []
    offsets = struct.unpack_from(f"={(lower - PAGE_HEADER.size) // 2}H", page, 16)
    starts, ends, keys = set(offsets), {upper}, []
    unpack = _SMALL_NODE.unpack_from
    if max(offsets) > size - NODE.size:
        return []
    for at in offsets:
        length, more, key_bytes = unpack(page, at)
        if more or not 0 < key_bytes <= KEY_BYTES_MAX:
            return []
        value_at = at + 8 + key_bytes
        keys.append(page[at + 8 : value_at])
        ends.add((value_at + length + 1) & -2)
    # Each node ends behind its beginning, so as many different ends as there are nodes, which are
    # the beginnings of all but the first and the end of the page, leave no gap and no overlap.
    starts.add(size)
    return keys if starts == ends and len(starts) == len(offsets) + 1 else []


def _below(one: bytes | int, other: bytes | int) -> bool:
    """Keys of one tree are all bytes or all numbers."""
    return one < other  # type: ignore[operator]

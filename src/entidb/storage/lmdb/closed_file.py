"""Whether a file is an LMDB data file and all there: read with ``pread`` and never mapped.

Touching a page behind the end of a mapped file is a SIGBUS, which no program survives, so the file
is looked at before it is mapped. Nothing here changes what a file says.

Not here: whether its pages are sound (``pages``).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from entidb.errors import FormatError
from entidb.storage.lmdb.layout import (
    BIG_DATA,
    BRANCH,
    LEAF,
    MAGIC,
    META,
    META_BYTES,
    META_END,
    META_FLAG,
    NO_PAGE,
    NODE,
    PAGE_HEADER,
    PAGE_SIZES,
    TREE,
    VERSION,
    open_to_read,
    read_at,
    write_at,
)


@dataclass(frozen=True)
class _Meta:
    page_bytes: int
    roots: tuple[int, int]
    last_page: int
    transaction: int


def check_data_file(path: str) -> None:
    """Raise ``FormatError`` (``not_a_database`` or ``truncated``) unless every page that can be
    reached in the file at ``path`` lies inside it."""
    descriptor = open_to_read(path)
    try:
        _check(descriptor, path, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def write_headers_again(descriptor: int, path: str) -> None:
    """Bring a file that nobody has mapped onto the disk as it is read now; raises ``OSError``.
    ``descriptor`` may write it, ``path`` is for messages.

    After a write that failed the two can differ: the system may take for written what never was,
    and the disk may hold the header of a commit that failed, under whose pages the next commit
    would write before it replaces that header. A sync alone writes only what counts as changed."""
    page_bytes = _read_meta(descriptor, path, 0).page_bytes
    for offset in (0, page_bytes):
        write_at(descriptor, read_at(descriptor, META_BYTES, offset), offset)
    os.fsync(descriptor)


def _check(descriptor: int, path: str, size: int) -> None:
    first = _read_meta(descriptor, path, 0)
    second = _read_meta(descriptor, path, first.page_bytes)
    if second.page_bytes != first.page_bytes:
        raise _not_a_database(path, "its two headers disagree")
    last_page = max(first.last_page, second.last_page)
    if size >= (last_page + 1) * first.page_bytes:
        return
    # The last pages may have been freed by the very commit that took them, and are then never
    # written: a healthy file can be a little short. Only what can be reached counts.
    newer = max(first, second, key=lambda meta: meta.transaction)
    if not _reachable_inside(descriptor, newer, size):
        raise _truncated(path, size, (last_page + 1) * first.page_bytes)


def _read_meta(descriptor: int, path: str, offset: int) -> _Meta:
    raw = read_at(descriptor, META_BYTES, offset)
    if len(raw) < META_BYTES:
        known = len(raw) >= 24 and struct.unpack_from("=I", raw, 16)[0] == MAGIC
        if known or not raw or offset:
            raise _truncated(path, offset + len(raw), offset + META_BYTES)
        raise _not_a_database(path, "it is too short")
    _, _, flags, _, _ = PAGE_HEADER.unpack_from(raw, 0)
    magic, version, _, _ = META.unpack_from(raw, 16)
    if magic != MAGIC or not flags & META_FLAG:
        raise _not_a_database(path, "its header is not LMDB's")
    if version != VERSION:
        raise _not_a_database(path, f"its LMDB format is {version} and not {VERSION}")
    free = TREE.unpack_from(raw, 40)
    main = TREE.unpack_from(raw, 88)
    if free[0] not in PAGE_SIZES:
        raise _not_a_database(path, f"its page size is {free[0]}")
    last_page, transaction = META_END.unpack_from(raw, 136)
    return _Meta(free[0], (free[7], main[7]), last_page, transaction)


def _reachable_inside(descriptor: int, meta: _Meta, size: int) -> bool:
    """Walk both trees; whether all their pages end inside ``size`` bytes."""
    pages = size // meta.page_bytes
    todo = [root for root in meta.roots if root != NO_PAGE]
    seen = 0
    while todo:
        number = todo.pop()
        seen += 1
        if number >= pages or seen > pages:
            return False
        page = read_at(descriptor, meta.page_bytes, number * meta.page_bytes)
        children, end = _page_targets(page)
        if end > pages:
            return False
        todo.extend(children)
    return True


def _page_targets(page: bytes) -> tuple[list[int], int]:
    """The child pages of a branch page, and the page after the last big value of a leaf page."""
    _, _, flags, lower, _ = PAGE_HEADER.unpack_from(page, 0)
    count = (min(lower, len(page)) - PAGE_HEADER.size) // 2
    children: list[int] = []
    end = 0
    for offset in struct.unpack_from(f"={count}H", page, PAGE_HEADER.size):
        if offset + NODE.size > len(page):
            return [], NO_PAGE
        low, high, node_flags, key_bytes = NODE.unpack_from(page, offset)
        if flags & BRANCH:
            children.append(low | high << 16 | node_flags << 32)
        elif flags & LEAF and node_flags & BIG_DATA:
            at = offset + NODE.size + key_bytes
            if at + 8 > len(page):
                return [], NO_PAGE
            (first,) = struct.unpack_from("=Q", page, at)
            data_bytes = low | high << 16
            end = max(end, first + (PAGE_HEADER.size - 1 + data_bytes) // len(page) + 1)
    return children, end


def _not_a_database(path: str, why: str) -> FormatError:
    return FormatError(
        f"{path} is not a database this version can open: {why}; it was not touched. "
        "Check the path, or restore a backup"
    )


def _truncated(path: str, size: int, needed: int) -> FormatError:
    return FormatError(
        f"{path} was cut short: it has {size} bytes and needs {needed}; it was not touched. "
        "Restore a backup",
        code="truncated",
    )

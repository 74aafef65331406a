"""Whether a file is an LMDB data file and all there: read with ``pread`` and never mapped.

Touching a page behind the end of a mapped file is a SIGBUS, which no program survives, so the file
is looked at before it is mapped. Nothing here changes what a file says.

Not here: whether its pages are sound (``pages``).
"""

from __future__ import annotations

import os
import struct

from entidb.errors import FormatError
from entidb.storage.lmdb.headers import Header, Headers, parsed_header
from entidb.storage.lmdb.layout import (
    BIG_DATA,
    BRANCH,
    LEAF,
    MAGIC,
    META_BYTES,
    META_FLAG,
    NO_PAGE,
    NODE,
    PAGE_HEADER,
    PAGE_SIZES,
    VERSION,
    read_at,
    write_at,
)


def check_data_file(descriptor: int, path: str) -> Headers:
    """The headers of the open file; ``path`` is for messages. Raises ``FormatError``
    (``not_a_database`` or ``truncated``) unless every page that can be reached in it lies inside
    it."""
    raw_first, first = _read_header(descriptor, path, 0)
    raw_second, second = _read_header(descriptor, path, first.page_bytes)
    if second.page_bytes != first.page_bytes:
        raise _not_a_database(path, "its two headers disagree")
    headers = Headers(raw_first + raw_second, first, second)
    needed = (max(first.last_page, second.last_page) + 1) * first.page_bytes
    size = os.fstat(descriptor).st_size
    # The last pages may have been freed by the very commit that took them, and are then never
    # written: a healthy file can be a little short. Only what can be reached counts.
    if size < needed and not _reachable_inside(descriptor, headers.newer_first()[0], size):
        raise _truncated(path, size, needed)
    return headers


def write_headers_again(descriptor: int, path: str) -> None:
    """Bring a file that no process has mapped onto the disk as it is read now; raises ``OSError``.
    ``descriptor`` may write it, ``path`` is for messages.

    After a write that failed the two can differ: the system may take for written what never was,
    and the disk may hold the header of a commit that failed, under whose pages the next commit
    would write before it replaces that header. A sync alone writes only what counts as changed."""
    _, first = _read_header(descriptor, path, 0)
    for offset in (0, first.page_bytes):
        write_at(descriptor, read_at(descriptor, META_BYTES, offset), offset)
    os.fsync(descriptor)


def _read_header(descriptor: int, path: str, offset: int) -> tuple[bytes, Header]:
    raw = read_at(descriptor, META_BYTES, offset)
    if len(raw) < META_BYTES:
        known = len(raw) >= 24 and struct.unpack_from("=I", raw, 16)[0] == MAGIC
        if known or not raw or offset:
            raise _truncated(path, offset + len(raw), offset + META_BYTES)
        raise _not_a_database(path, "it is too short")
    header = parsed_header(raw)
    if header.magic != MAGIC or not header.page_flags & META_FLAG:
        raise _not_a_database(path, "its header is not LMDB's")
    if header.version != VERSION:
        raise _not_a_database(path, f"its LMDB format is {header.version} and not {VERSION}")
    if header.page_bytes not in PAGE_SIZES:
        raise _not_a_database(path, f"its page size is {header.page_bytes}")
    return raw, header


def _reachable_inside(descriptor: int, header: Header, size: int) -> bool:
    """Walk both trees; whether all their pages end inside ``size`` bytes."""
    pages = size // header.page_bytes
    todo = [root for root in (header.free.root, header.main.root) if root != NO_PAGE]
    seen = 0
    while todo:
        number = todo.pop()
        seen += 1
        if number >= pages or seen > pages:
            return False
        page = read_at(descriptor, header.page_bytes, number * header.page_bytes)
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

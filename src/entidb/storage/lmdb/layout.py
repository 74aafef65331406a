"""How an LMDB data file is laid out, and reading it with ``pread``.

Layout: LMDB 0.9, ``mdb.c`` (MDB_page, MDB_meta, MDB_node), in the byte order of the machine.

Not here: what has to be true of a file (``closed_file``) and of its pages (``pages``).
"""

from __future__ import annotations

import os
import struct
import sys
from typing import Final

from entidb.storage.directories import open_file

MAGIC: Final = 0xBEEFC0DE
VERSION: Final = 1
PAGE_HEADER: Final = struct.Struct("=QHHHH")
#: magic, version, address, map size; then two trees; then last page, transaction.
META: Final = struct.Struct("=IIQQ")
TREE: Final = struct.Struct("=IHHQQQQQ")
META_END: Final = struct.Struct("=QQ")
NODE: Final = struct.Struct("=HHHH")
META_BYTES: Final = PAGE_HEADER.size + META.size + 2 * TREE.size + META_END.size
BRANCH, LEAF, OVERFLOW, META_FLAG = 0x01, 0x02, 0x04, 0x08
BIG_DATA: Final = 0x01
NO_PAGE: Final = 2**64 - 1
PAGE_SIZES: Final = frozenset(1 << n for n in range(9, 17))


if sys.platform == "win32":

    def open_to_read(path: str) -> int:
        return open_file(path, os.O_RDONLY)

    def read_at(descriptor: int, count: int, offset: int) -> bytes:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)

    def write_at(descriptor: int, content: bytes, offset: int) -> int:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, content)

else:

    def open_to_read(path: str) -> int:
        return open_file(path, os.O_RDONLY)

    read_at, write_at = os.pread, os.pwrite

"""Where bits are flipped: anywhere, or only in what LMDB itself goes by."""

from __future__ import annotations

import random
import struct
from pathlib import Path

_HEADER = struct.Struct("=QHHHH")
_NODE_BYTES = 8
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_HEADER_OF_FILE_BYTES = 152


def page_bytes(data: Path) -> int:
    size: int = struct.unpack_from("=I", data.read_bytes(), 40)[0]
    return size


def anywhere(data: Path, source: random.Random, count: int) -> list[int]:
    """Numbers of ``count`` different bits of the file."""
    return source.sample(range(data.stat().st_size * 8), count)


def in_headers(data: Path) -> list[int]:
    """Every bit of the two headers of the file."""
    starts = (0, page_bytes(data) * 8)
    return [start + bit for start in starts for bit in range(_HEADER_OF_FILE_BYTES * 8)]


def in_structure(data: Path, source: random.Random, count: int) -> list[int]:
    """As ``anywhere``, but only of headers, of offsets, and of the heads of nodes: few bytes of
    the file, which do the most harm."""
    raw, size = data.read_bytes(), page_bytes(data)
    places: list[int] = []
    for start in range(0, len(raw), size):
        places += [start + at for at in _structure_of(raw[start : start + size], start // size)]
    return [place * 8 + source.randrange(8) for place in source.sample(places, count)]


def _structure_of(page: bytes, number: int) -> list[int]:
    if number < 2:
        return list(range(_HEADER_OF_FILE_BYTES))
    stored, _, flags, lower, _ = _HEADER.unpack_from(page)
    if stored != number or not flags & (_BRANCH | _LEAF | _OVERFLOW):
        return []
    places = list(range(_HEADER.size))
    if flags & _OVERFLOW or lower > len(page):
        return places
    places += range(_HEADER.size, lower)
    for (at,) in struct.iter_unpack("=H", page[_HEADER.size : lower]):
        places += range(at, min(at + _NODE_BYTES, len(page)))
    return places


def flip(data: Path, bit: int) -> None:
    with data.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes((byte ^ 1 << bit % 8,)))

"""Heads of items, for code that joins encoded parts by hand (RFC 8949, section 3)."""

from __future__ import annotations

import struct
from typing import Final

from entidb.cbor.faults import INTEGER_MAX, text_fault
from entidb.errors import CborEncodeError

_HEAD_1: Final = struct.Struct(">BB").pack
_HEAD_2: Final = struct.Struct(">BH").pack
_HEAD_4: Final = struct.Struct(">BI").pack
_HEAD_8: Final = struct.Struct(">BQ").pack


def head(major: int, argument: int) -> bytes:
    """Initial byte and argument (RFC 8949, section 3); ``major`` is the major type times 32."""
    if argument < 24:
        return bytes((major | argument,))
    if argument < 2**8:
        return _HEAD_1(major | 24, argument)
    if argument < 2**16:
        return _HEAD_2(major | 25, argument)
    if argument < 2**32:
        return _HEAD_4(major | 26, argument)
    return _HEAD_8(major | 27, argument)


#: What nearly all are below, so many of each kind.
_CACHED: Final = 256
_UINTS: Final = tuple(head(0x00, n) for n in range(_CACHED))
_BYTES_HEADS: Final = tuple(head(0x40, n) for n in range(_CACHED))
_TEXT_HEADS: Final = tuple(head(0x60, n) for n in range(_CACHED))
_ARRAY_HEADS: Final = tuple(head(0x80, n) for n in range(_CACHED))
_MAP_HEADS: Final = tuple(head(0xA0, n) for n in range(_CACHED))


def uint(number: int) -> bytes:
    """The item of an integer in 0 … 2^64-1; raises ``CborEncodeError`` outside."""
    if 0 <= number < _CACHED:
        return _UINTS[number]
    if 0 <= number <= INTEGER_MAX:
        return head(0x00, number)
    raise CborEncodeError(f"$: {number} is not in 0 to 2^64-1")


def bytes_head(length: int) -> bytes:
    """The head of a byte string of ``length`` (not negative) bytes."""
    return _BYTES_HEADS[length] if 0 <= length < _CACHED else head(0x40, length)


def text(string: str) -> bytes:
    """The whole item of a text; raises ``CborEncodeError`` for lone surrogates."""
    try:
        raw = string.encode()
    except UnicodeEncodeError as error:
        raise CborEncodeError(f"$: {text_fault(string)}") from error
    length = len(raw)
    return (_TEXT_HEADS[length] if length < _CACHED else head(0x60, length)) + raw


def array_head(length: int) -> bytes:
    """The head of an array of ``length`` (not negative) items."""
    return _ARRAY_HEADS[length] if 0 <= length < _CACHED else head(0x80, length)


def map_head(length: int) -> bytes:
    """The head of a map of ``length`` (not negative) pairs; the caller sorts them."""
    return _MAP_HEADS[length] if 0 <= length < _CACHED else head(0xA0, length)

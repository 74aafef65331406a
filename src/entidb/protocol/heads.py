"""The heads of the CBOR items that occur most in messages, made once."""

from __future__ import annotations

import struct
from typing import Final

from entidb import cbor

# --- encoding ---------------------------------------------------------------------------------
#
# Pushes and pulls are joined by hand: it is several times faster than building lists of lists for a
# general encoder, and an id stays a byte string whatever its bytes are (a general DAG-CBOR encoder
# takes one UUIDv7 in twenty for a content identifier and writes tag 42). Keys are in canonical
# order: shorter first, then by bytes.

NULL: Final = b"\xf6"
ID: Final = b"\x50"
_UINTS: Final = tuple(cbor.uint(number) for number in range(1024))
_BYTES_HEADS: Final = tuple(cbor.bytes_head(length) for length in range(4096))
_ARRAY_HEADS: Final = tuple(cbor.array_head(length) for length in range(256))
_pack_2: Final = struct.Struct(">BH").pack
_pack_4: Final = struct.Struct(">BI").pack
_pack_8: Final = struct.Struct(">BQ").pack


def uint(number: int) -> bytes:
    if number < 1024:
        return _UINTS[number]
    if number > 0xFFFFFFFF:
        return _pack_8(0x1B, number)
    return _pack_4(0x1A, number) if number > 0xFFFF else _pack_2(0x19, number)


def bytes_head(length: int) -> bytes:
    return _BYTES_HEADS[length] if length < 4096 else cbor.bytes_head(length)


def array_head(length: int) -> bytes:
    return _ARRAY_HEADS[length] if length < 256 else cbor.array_head(length)

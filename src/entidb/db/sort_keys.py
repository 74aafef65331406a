"""Bytes that sort as values do: what an index orders entities by.

    null < false < true < numbers < text < bytes < lists < maps

Integers and floats are ordered together, and exactly so beyond 2^53; text by its UTF-8. Equal
values have equal bytes, 1 and 1.0 too. What is encoded ends by itself, so that several values can
follow each other. The order is that of ``conditions.order_key``, which is the law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import neg
from struct import Struct as Packer
from typing import Any, Final

from entidb.db.looking import MISSING

#: A field that is not there, in an index where one before it is. Before all that can be.
ABSENT: Final = b"\x08"
_NULL: Final = b"\x10"
_FALSE: Final = b"\x20"
_TRUE: Final = b"\x21"
_NUMBER: Final = b"\x30"
TEXT: Final = b"\x40"
_BYTES: Final = b"\x50"
_LIST: Final = b"\x60"
_MAP: Final = b"\x70"
#: Ends a list or a map: before any member.
_END: Final = b"\x00"
#: A zero within text, and the end of it, which comes before any.
_ZERO, TEXT_END = b"\x00\xff", b"\x00\x01"

_DOUBLE: Final = Packer(">d").pack
_BITS: Final = Packer(">Q")
_SIGN: Final = 1 << 63
_ALL: Final = (1 << 64) - 1
#: Every integer up to here is a float.
_EXACT: Final = 1 << 53
_REST: Final = Packer(">H").pack
_WHOLE: Final = Packer(">cdH").pack


def sort_key(value: Any) -> bytes:
    """The bytes that ``value`` sorts by: a plain value, or ``MISSING``."""
    return _KEYS[type(value)](value)


def sort_keys(values: Sequence[Any]) -> list[bytes]:
    """As ``sort_key`` of each; where all are text, or integers that are small and not negative,
    without a step of Python for each."""
    if len(values) < _MANY:
        return list(map(sort_key, values))
    kinds = set(map(type, values))
    if kinds == _TEXTS:
        if "\x00" not in "".join(values):
            return [TEXT + raw + TEXT_END for raw in map(str.encode, values)]
    elif kinds == _INTEGERS and min(values) >= 0 and max(values) <= _EXACT:
        # Of a float that is not negative, zero included, the opposite has the bits that sort.
        opposites = map(neg, map(float, values))
        return list(map(_WHOLE, repeat(_NUMBER), opposites, repeat(0)))
    return list(map(sort_key, values))


def plain_texts(values: Sequence[Any]) -> list[bytes] | None:
    """What stands between ``TEXT`` and ``TEXT_END`` in the key of each of ``values``; None unless
    all are text without a zero in it."""
    if set(map(type, values)) != _TEXTS or "\x00" in "".join(values):
        return None
    return list(map(str.encode, values))


def text_start(text: str) -> bytes:
    """What the bytes of all text that begins with ``text`` begin with."""
    return TEXT + text.encode().replace(b"\x00", _ZERO)


def _boolean(value: bool) -> bytes:
    return _TRUE if value else _FALSE


def _integer(value: int) -> bytes:
    if -_EXACT <= value <= _EXACT:
        return _float(float(value))
    # The float below it, and by how much it is more.
    near = float(value)
    if near > value:
        near = math.nextafter(near, -math.inf)
    return _NUMBER + _bits(near) + _REST(value - int(near))


def _float(value: float) -> bytes:
    return _NUMBER + _bits(value) + b"\x00\x00"


def _bits(value: float) -> bytes:
    """The bits of a float so that they sort: negative ones the other way round."""
    (bits,) = _BITS.unpack(_DOUBLE(value or 0.0))
    return _BITS.pack(bits ^ _ALL if bits & _SIGN else bits | _SIGN)


def _text(value: str) -> bytes:
    raw = value.encode()
    if b"\x00" in raw:
        raw = raw.replace(b"\x00", _ZERO)
    return TEXT + raw + TEXT_END


def _octets(value: bytes) -> bytes:
    return _BYTES + value.replace(b"\x00", _ZERO) + TEXT_END


def _list(value: list[Any]) -> bytes:
    return _LIST + b"".join(map(sort_key, value)) + _END


def _map(value: dict[str, Any]) -> bytes:
    parts = [_text(name) + sort_key(value[name]) for name in sorted(value)]
    return _MAP + b"".join(parts) + _END


_KEYS: Final[dict[type, Callable[[Any], bytes]]] = {
    type(MISSING): lambda value: ABSENT,
    type(None): lambda value: _NULL,
    bool: _boolean,
    int: _integer,
    float: _float,
    str: _text,
    bytes: _octets,
    list: _list,
    dict: _map,
}

#: Values that are worth a look at what all of them are.
_MANY: Final = 4
_TEXTS: Final = {str}
_INTEGERS: Final = {int}

__all__ = ["ABSENT", "TEXT", "TEXT_END", "plain_texts", "sort_key", "sort_keys", "text_start"]

"""What the canonical encoding of a number between two bounds looks like, as a pattern of bytes.

A pattern is a sieve: all numbers between the bounds meet it, and some beside them do.
"""

from __future__ import annotations

import math
import re
from struct import Struct
from typing import Final

#: First byte of an integer that is not negative, how many bytes follow, and which it can be.
_WIDTHS: Final = (
    (0x18, 1, 24, 0xFF),
    (0x19, 2, 0x100, 0xFFFF),
    (0x1A, 4, 0x1_0000, 0xFFFF_FFFF),
    (0x1B, 8, 0x1_0000_0000, (1 << 64) - 1),
)
#: What the first byte of a negative one has more. It counts from -1 downwards.
_NEGATIVE: Final = 0x20
_INTEGER_MAX: Final = (1 << 64) - 1
_FLOAT: Final = b"\xfb"
_DOUBLE: Final = Struct(">d").pack
_MAX: Final = math.nextafter(math.inf, 0.0)


def number_pattern(low: int | float | None, high: int | float | None) -> bytes | None:
    """The source of a regular expression (for ``re.DOTALL``) that the encoding of every number from
    ``low`` to ``high`` begins with a match of; None: to the end. None if there is no such
    number."""
    if low is not None and high is not None and low > high:
        return None
    least = -_INTEGER_MAX - 1 if low is None else math.ceil(low)
    most = _INTEGER_MAX if high is None else math.floor(high)
    parts = [
        *_integers(0, max(least, 0), min(most, _INTEGER_MAX)),
        *_integers(_NEGATIVE, max(-1 - most, 0), min(-1 - least, _INTEGER_MAX)),
        *_floats(
            -_MAX if low is None else math.nextafter(low, -math.inf),
            _MAX if high is None else math.nextafter(high, math.inf),
        ),
    ]
    return b"(?:%s)" % b"|".join(parts) if parts else None


def _integers(kind: int, low: int, high: int) -> list[bytes]:
    """Of integers of one sign, by how far they are from where that begins."""
    if low > high:
        return []
    parts = [_class(kind + low, kind + min(high, 23))] if low <= 23 else []
    for first, size, least, most in _WIDTHS:
        start, stop = max(low, least), min(high, most)
        if start <= stop:
            parts.append(
                re.escape(bytes([kind + first]))
                + _between(start.to_bytes(size, "big"), stop.to_bytes(size, "big"))
            )
    return parts


def _floats(low: float, high: float) -> list[bytes]:
    parts = []
    # Those that are not negative sort as their bits do, the others against it.
    if high >= 0:
        parts.append(_FLOAT + _between(_DOUBLE(max(low, 0.0)), _DOUBLE(min(high, _MAX))))
    if low < 0:
        parts.append(_FLOAT + _between(_DOUBLE(min(high, -0.0)), _DOUBLE(max(low, -_MAX))))
    return parts


def _between(low: bytes, high: bytes) -> bytes:
    """What the bytes from ``low`` to ``high``, which are as long, have first: those that all share,
    and one more."""
    for at, (one, other) in enumerate(zip(low, high, strict=True)):
        if one != other:
            return re.escape(low[:at]) + _class(one, other)
    return re.escape(low)


def _class(first: int, last: int) -> bytes:
    return b"[%s-%s]" % (re.escape(bytes([first])), re.escape(bytes([last])))


__all__ = ["number_pattern"]

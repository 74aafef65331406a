"""How much there is in a value: containers, items and nesting, counted before they cost memory.

Most of it looks at the heads of encoded items and builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from entidb.types import NESTING_MAX, VALUE_CONTAINERS_MAX, VALUE_ITEMS_MAX

#: All bytes that cannot be the head of an array or a map.
NOT_CONTAINER: Final = bytes(b for b in range(256) if not 0x80 <= b <= 0xBF)
#: Weights for ``weigh`` and ``heavier``: every item counts, or arrays and maps only.
ITEMS: Final = b"\x01" * 256
_CONTAINERS: Final = bytes(0x80 <= b <= 0xBF for b in range(256))


def too_much(payload: bytes) -> str | None:
    """Why ``payload`` is too much work to be written as one value; None if it is not. ``check``
    still reads what was stored before there was this bound."""
    if len(payload) > VALUE_CONTAINERS_MAX:
        if containers_over(payload, VALUE_CONTAINERS_MAX):
            return f"more than {VALUE_CONTAINERS_MAX} maps and lists in one value"
        if len(payload) > VALUE_ITEMS_MAX and heavier(payload, ITEMS, VALUE_ITEMS_MAX):
            return f"more than {VALUE_ITEMS_MAX} keys and values in one value"
    return None


def is_flat(payload: bytes) -> bool:
    """Whether ``payload`` has so few containers that they cannot be nested too deep."""
    return len(payload) <= NESTING_MAX or len(payload.translate(None, NOT_CONTAINER)) <= NESTING_MAX


def nested_too_deep(value: Any) -> bool:
    """Whether more than ``NESTING_MAX`` containers are inside each other, level by level."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(NESTING_MAX):
        if not level:
            return False
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (list, dict))
        ]
    return bool(level)


def containers_over(payload: bytes, limit: int) -> bool:
    """Whether ``payload`` has more arrays and maps than ``limit``."""
    return containers_at_most(payload) > limit and heavier(payload, _CONTAINERS, limit)


def containers_in(payload: bytes) -> int:
    """How many arrays and maps ``payload`` has."""
    return weigh(payload, _CONTAINERS, len(payload))


def containers_together(payloads: Iterable[bytes], limit: int) -> int | None:
    """How many arrays and maps ``payloads`` have together, or a number not below that; None if
    they are more than ``limit``."""
    values = list(payloads)
    at_most = sum(map(containers_at_most, values))
    if at_most <= limit:
        return at_most
    count = 0
    for value in values:
        count += weigh(value, _CONTAINERS, limit - count)
        if count > limit:
            return None
    return count


def containers_at_most(data: bytes) -> int:
    """How many arrays and maps ``data`` has at most; bytes inside texts and numbers count too."""
    return len(data.translate(None, NOT_CONTAINER))


def heavier(data: bytes, weights: bytes, limit: int) -> bool:
    """Whether the items of ``data`` weigh more than ``limit``."""
    return weigh(data, weights, limit) > limit


def weigh(data: bytes, weights: bytes, limit: int) -> int:
    """What the items of ``data`` weigh, by the first byte of each; as soon as that is over
    ``limit``, what they weigh up to there. It looks at heads only and builds nothing, so what is
    too much for memory never gets into it. For bytes that are not CBOR the answer means nothing:
    decoding refuses them."""
    position = weight = 0
    end = len(data)
    while position < end:
        head = data[position]
        weight += weights[head]
        if weight > limit:
            return weight
        step = _STEPS[head]
        if not step:
            width = 1 << (head & 31) - 24
            step = 1 + width + int.from_bytes(data[position + 1 : position + 1 + width], "big")
        position += step
    return weight


def _stride(head: int) -> int:
    """Bytes from the item with this head to the next one, whether inside or after it; 0 for a
    string that is long enough to have its length in bytes of its own."""
    major, info = head >> 5, head & 31
    if major in (2, 3):
        return 1 + info if info < 24 else int(info > 27)
    return 1 + (1 << info - 24) if 24 <= info <= 27 else 1


_STEPS: Final = bytes(map(_stride, range(256)))

"""Canonical bytes to values: libipld reads them, and what it lets pass is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import libipld

from entidb.cbor.encoding import LINK
from entidb.cbor.heads import array_head
from entidb.cbor.weight import NOT_CONTAINER, containers_over, is_flat, nested_too_deep
from entidb.errors import CborDecodeError
from entidb.types import CONTAINERS_MAX, NESTING_MAX

_encode = libipld.encode_dag_cbor
_decode = libipld.decode_dag_cbor

_TOO_MANY: Final = f"more than {CONTAINERS_MAX} maps and lists in one value"
_NULL: Final = b"\xf6"
#: Values proved together: enough to share the cost of a call, few enough to stay in the cache.
_AT_ONCE: Final = 16


def decode(data: bytes) -> Any:
    """The value of exactly one canonical item.

    Raises ``CborDecodeError`` for everything else: what comes back encodes to ``data`` again.
    The cost of the worst input is linear in its length.
    """
    value = decode_trusted(data)
    try:
        canonical = _encode(value) == data and not (0xD8 in data and LINK in data)
    except (ValueError, TypeError, RecursionError) as error:
        raise CborDecodeError(f"not canonical CBOR: {_why(error)}") from error
    if not canonical:
        # A link, a longer form than needed, or only a byte string that looks like one of them.
        _verify_heads(data)
    return value


def check(payload: bytes) -> Any:
    """As ``decode``, for entity values from outside: refuses nesting over ``NESTING_MAX`` and
    more containers than ``CONTAINERS_MAX`` too, so that what passes here can be written by
    ``encode`` on every device."""
    if len(payload) > CONTAINERS_MAX and _too_many_containers(payload):
        raise CborDecodeError(_TOO_MANY)
    value = decode(payload)
    if (
        len(payload) > NESTING_MAX
        and len(payload.translate(None, NOT_CONTAINER)) > NESTING_MAX
        and nested_too_deep(value)
    ):
        raise CborDecodeError(f"more than {NESTING_MAX} maps and lists inside each other")
    return value


def _too_many_containers(payload: bytes) -> bool:
    # An empty list is one byte here and seventy once it is decoded, and the garbage collector
    # looks at each: 16 MiB of them are 1.2 GB and ten seconds.
    return containers_over(payload, CONTAINERS_MAX)


def all_pass(payloads: Sequence[bytes]) -> bool:
    """Whether ``check`` accepts each of ``payloads`` and none of them is null, at half the price of
    asking one by one. Where this returns False, ``check`` says what is wrong.
    """
    for at in range(0, len(payloads), _AT_ONCE):
        some = payloads[at : at + _AT_ONCE]
        if not _obviously_pass(some) and not all(map(_passes, some)):
            return False
    return True


def _obviously_pass(payloads: Sequence[bytes]) -> bool:
    # An item of CBOR ends where its own heads say, so bytes that are one item after another can
    # be cut in one way only: if each payload is one item, and all of them joined are the encoding
    # of all values in turn, then each is the encoding of its value.
    joined = b"".join(payloads)
    if len(joined) > CONTAINERS_MAX:
        # They may be too many to decode even one of them before they are counted.
        return False
    try:
        canonical = _encode(list(map(_decode, payloads))) == array_head(len(payloads)) + joined
    except (ValueError, TypeError, RecursionError):
        return False
    return (
        canonical
        and _NULL not in payloads
        and not (0xD8 in joined and LINK in joined)
        # So few containers in all of them that no single one can have too many, or too deep.
        and (
            len(joined.translate(None, NOT_CONTAINER)) <= NESTING_MAX or all(map(is_flat, payloads))
        )
    )


def _passes(payload: bytes) -> bool:
    try:
        return check(payload) is not None
    except CborDecodeError:
        return False


def decode_trusted(data: bytes) -> Any:
    """The value of bytes whose canonical form was proved before (records, own encodings).

    Garbage still raises ``CborDecodeError``, but other forms of the same value are not noticed.
    """
    try:
        return _decode(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise CborDecodeError(f"not canonical CBOR: {_why(error)}") from error


def decode_all_trusted(items: Sequence[bytes]) -> list[Any]:
    """As ``decode_trusted`` of each, without a step in Python between two."""
    try:
        return list(map(_decode, items))
    except (ValueError, TypeError, RecursionError):
        return list(map(decode_trusted, items))  # says what is wrong, with the first that is


#: What a part of libipld's message means, in our words; the first match counts.
_REASONS: Final = (
    ("UnicodeDecodeError", "text that is not UTF-8"),
    ("recursion", "nested too deep"),
    ("sorted and unique", "map keys that are out of order, or twice"),
    ("keys must be strings", "a map key that is no text"),
    ("Indefinite", "an indefinite length"),
    ("out of range", "a number that is NaN, infinite or too large"),
    ("tags are not supported", "a tag"),
    ("CID", "a tag"),
    ("multiple objects", "bytes after the item"),
    ("end of data", "it ends too early"),
    ("exceeds remaining", "it ends too early"),
    ("major type", "a float that is not 64 bits, or a simple value"),
)


def _why(error: Exception) -> str:
    text = str(error)
    return next((ours for part, ours in _REASONS if part in text), "bytes outside the profile")


def _verify_heads(data: bytes) -> None:
    """Refuse tags, longer forms and short floats in ``data``, which libipld has decoded: lengths,
    key order, UTF-8 and the numbers' range are proved by that."""
    position = 0
    items_left = 1
    while items_left:
        head = data[position]
        major, info = head >> 5, head & 31
        position += 1
        items_left -= 1
        if major == 7:
            if head == 0xFB:
                position += 8
            elif not 0xF4 <= head <= 0xF6:
                raise _refused(data, position - 1, "a float that is not 64 bits, or a simple value")
            continue
        if major == 6:
            raise _refused(data, position - 1, "a tag")
        if info < 24:
            argument = info
        else:
            width = 1 << (info - 24)
            argument = int.from_bytes(data[position : position + width], "big")
            if argument < _WIDTH_NEEDED_FROM[width]:
                raise _refused(data, position - 1, "a number longer than needed")
            position += width
        if major in (2, 3):
            position += argument
        elif major == 4:
            items_left += argument
        elif major == 5:
            items_left += 2 * argument
    if position != len(data):
        raise _refused(data, position, "bytes after the item")


#: Smallest argument that needs a head argument of so many bytes (RFC 8949, section 4.2.1).
_WIDTH_NEEDED_FROM: Final = {1: 24, 2: 2**8, 4: 2**16, 8: 2**32}


def _refused(data: bytes, position: int, what: str) -> CborDecodeError:
    return CborDecodeError(f"not canonical CBOR: {what} at byte {position} of {len(data)}")

"""Canonical CBOR: the one place that knows which bytes and values the project accepts.

The profile is DAG-CBOR without links: RFC 8949 deterministic encoding (section 4.2.1), text keys
sorted by length and then bytewise, shortest integers in -2^64 … 2^64-1, floats always 64 bits, no
NaN, no infinities, no -0.0, no tags, no indefinite lengths. One value has exactly one encoding, so
comparing bytes is comparing values (R24).

libipld does the work; this module closes the gaps it has towards the profile (3.5.0):

* a byte string that happens to parse as a content identifier (every twentieth UUIDv7 does) is
  written as a link, tag 42, and links are read as byte strings;
* -0.0 is written as 0.0 in silence;
* integers and lengths in a longer form than needed, and 32-bit floats, are read;
* a value it cannot write is refused without saying where it stands.

Each is looked for at the speed of C (a byte pattern, a comparison with the re-encoding), and only
a hit pays for a walk in Python. Records and messages are laid out elsewhere.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import re
import struct
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol, Self, runtime_checkable

import libipld

from entidb.errors import CborDecodeError, CborEncodeError
from entidb.types import CONTAINERS_MAX, NESTING_MAX, VALUE_CONTAINERS_MAX, VALUE_ITEMS_MAX

_encode = libipld.encode_dag_cbor
_decode = libipld.decode_dag_cbor

_INTEGER_MAX: Final = 2**64 - 1
_INTEGER_MIN: Final = -(2**64)
#: Head of tag 42, as libipld writes it before what it takes for a link.
_LINK: Final = b"\xd8\x2a"
#: What 0.0 looks like, and therefore -0.0 too, after libipld wrote it.
_ZERO: Final = b"\xfb\0\0\0\0\0\0\0\0"
_NULL: Final = b"\xf6"
#: Values proved together: enough to share the cost of a call, few enough to stay in the cache.
_AT_ONCE: Final = 16
#: All bytes that cannot be the head of an array or a map.
_NOT_CONTAINER: Final = bytes(b for b in range(256) if not 0x80 <= b <= 0xBF)
#: Weights for ``weigh`` and ``heavier``: every item counts, or arrays and maps only.
ITEMS: Final = b"\x01" * 256
_CONTAINERS: Final = bytes(0x80 <= b <= 0xBF for b in range(256))


@runtime_checkable
class CborEncode(Protocol):
    """Something that turns itself into canonical CBOR."""

    def to_cbor(self) -> bytes:
        """One canonical item; raises ``CborEncodeError`` where the profile cannot say it."""
        ...


@runtime_checkable
class CborDecode(Protocol):
    """Something that can be made from canonical CBOR."""

    @classmethod
    def from_cbor(cls, data: bytes) -> Self:
        """The object ``data`` stands for; raises ``CborDecodeError`` for anything that is not
        one canonical item of the right shape."""
        ...


# ---------------------------------------------------------------- values to bytes


def encode(value: Any) -> bytes:
    """The canonical encoding of ``value``: maps with text keys, lists, text, bytes, integers,
    floats, booleans and None, at most ``NESTING_MAX`` containers inside each other,
    ``VALUE_CONTAINERS_MAX`` in all, and ``VALUE_ITEMS_MAX`` items of any kind.

    Subclasses of these types (``StrEnum``, ``OrderedDict``) are written as their base. Raises
    ``CborEncodeError``, whose ``path`` and message name the place and the way out.
    """
    payload = encode_message(value)
    if (
        len(payload) > NESTING_MAX
        and len(payload.translate(None, _NOT_CONTAINER)) > NESTING_MAX
        and _nested_too_deep(value)
    ):
        raise _diagnose(value, "nested too deep")
    if len(payload) > VALUE_CONTAINERS_MAX and (reason := too_much(payload)) is not None:
        raise CborEncodeError(f"$: {reason}; make several entities of it")
    return payload


def encode_message(value: Any) -> bytes:
    """As ``encode``, without counting the nesting: for envelopes, whose shape our own code
    fixes. libipld's own limit still turns a bottomless value into ``CborEncodeError``."""
    try:
        payload: bytes = _encode(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise _diagnose(value, "canonical CBOR cannot say it") from error
    # A search for one byte costs a fraction of a search for a pattern, and mostly settles it.
    if 0xFB in payload and _ZERO in payload and _has_negative_zero(value):
        raise _diagnose(value, "-0.0")
    if 0xD8 in payload and _LINK in payload:
        return _encode_exactly(value)
    return payload


def _encode_exactly(value: Any) -> bytes:
    """The same encoding written in Python, for values in which libipld may have seen a link."""
    if _nested_too_deep(value):
        raise _diagnose(value, "nested too deep")
    parts: list[bytes] = []
    _append(parts.append, value)
    return b"".join(parts)


def _append(add: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, str):
        raw = value.encode()
        add(_head(0x60, len(raw)) + raw)
    elif isinstance(value, bytes):
        add(_head(0x40, len(value)) + value)
    elif value is None or value is True or value is False:
        add(_encode(value))
    elif isinstance(value, int):
        add(_head(0, value) if value >= 0 else _head(0x20, -1 - value))
    elif isinstance(value, float):
        add(_FLOAT.pack(0xFB, value))
    elif isinstance(value, list):
        add(_head(0x80, len(value)))
        for item in value:
            _append(add, item)
    else:
        add(_head(0xA0, len(value)))
        # Shorter keys have smaller heads, so sorting the encoded keys is both orders at once.
        pairs = {text(key): item for key, item in value.items()}
        for key in sorted(pairs):
            add(key)
            _append(add, pairs[key])


def _nested_too_deep(value: Any) -> bool:
    """Whether more than ``NESTING_MAX`` containers stand inside each other, level by level."""
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


def _has_negative_zero(value: Any) -> bool:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
        elif isinstance(item, float) and item == 0 and math.copysign(1, item) < 0:
            return True
    return False


# ---------------------------------------------------------------- saying what is wrong, and where

_PLAIN_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_TOO_MANY: Final = f"more than {CONTAINERS_MAX} maps and lists in one value"
_TYPES_ALLOWED: Final = "use a map with text keys, a list, text, bytes, int, float, bool or None"

#: What to do instead, by type; the first match counts.
_WAYS_OUT: Final[tuple[tuple[Any, str], ...]] = (
    (datetime.datetime, "use text such as value.isoformat(), or int milliseconds"),
    ((datetime.date, datetime.time), "use text such as value.isoformat()"),
    (datetime.timedelta, "use int of the smallest unit, or value.total_seconds()"),
    (uuid.UUID, "use str(value) or value.bytes"),
    (decimal.Decimal, "use str or int of the smallest unit"),
    (tuple, "use list(value)"),
    ((set, frozenset), "use sorted(value), which is a list"),
    ((bytearray, memoryview), "use bytes(value)"),
    (enum.Enum, "use value.value"),
    (complex, "use a list of two floats"),
    (pathlib.PurePath, "use str(value)"),
)


def _diagnose(value: Any, reason: str) -> CborEncodeError:
    """The error for the first thing in ``value`` that the profile cannot say."""
    todo: list[tuple[str, Any, int]] = [("$", value, 0)]
    while todo:
        path, item, depth = todo.pop()
        fault = _fault(item, depth)
        if fault is not None:
            return CborEncodeError(f"{path}: {fault}", path=path)
        if isinstance(item, dict):
            for key in item:
                fault = _key_fault(key)
                if fault is not None:
                    return CborEncodeError(f"{path}: {fault}", path=path)
            children = [(path + _step(key), item[key], depth + 1) for key in item]
        elif isinstance(item, list):
            children = [(f"{path}[{n}]", child, depth + 1) for n, child in enumerate(item)]
        else:
            continue
        # Last in, first out: reversed, the first fault in reading order is the one reported.
        todo.extend(reversed(children))
    return CborEncodeError(f"$: {reason}; {_TYPES_ALLOWED}")


def _fault(item: Any, depth: int) -> str | None:
    if isinstance(item, (dict, list)):
        if depth < NESTING_MAX:
            return None
        return (
            f"more than {NESTING_MAX} maps and lists inside each other; "
            "make the value flatter (or does it contain itself?)"
        )
    if item is None or isinstance(item, (bool, bytes)):
        return None
    if isinstance(item, str):
        return _text_fault(item)
    if isinstance(item, int):
        if _INTEGER_MIN <= item <= _INTEGER_MAX:
            return None
        return "int outside -2^64 to 2^64-1 cannot be stored; use str"
    if isinstance(item, float):
        return _float_fault(item)
    name = type(item).__name__
    if dataclasses.is_dataclass(item):
        return f"{name} cannot be stored; use dataclasses.asdict(value), or a typed collection"
    for kind, way_out in _WAYS_OUT:
        if isinstance(item, kind):
            return f"{name} cannot be stored; {way_out}"
    return f"{name} cannot be stored; {_TYPES_ALLOWED}"


def _float_fault(item: float) -> str | None:
    if not math.isfinite(item):
        return f"float {item!r} cannot be stored; use None, or text such as {str(item)!r}"
    if item == 0 and math.copysign(1, item) < 0:
        return "float -0.0 cannot be stored, because it equals 0.0 in other bytes; use 0.0"
    return None


def _text_fault(item: str) -> str | None:
    try:
        item.encode()
    except UnicodeEncodeError as error:
        return (
            f"text with a lone surrogate at position {error.start} cannot be stored; "
            "clean it with value.encode(errors='replace').decode(), or use bytes"
        )
    return None


def _key_fault(key: Any) -> str | None:
    if not isinstance(key, str):
        return f"map key {key!r} is {type(key).__name__}, not text; use str(key)"
    fault = _text_fault(key)
    return None if fault is None else f"map key {key!r}: {fault}"


def _step(key: str) -> str:
    return f".{key}" if _PLAIN_NAME.match(key) else f"[{json.dumps(key, ensure_ascii=False)}]"


# ---------------------------------------------------------------- bytes to values


def decode(data: bytes) -> Any:
    """The value of exactly one canonical item.

    Raises ``CborDecodeError`` for everything else: what comes back encodes to ``data`` again.
    The cost of the worst input is linear in its length.
    """
    value = decode_trusted(data)
    try:
        canonical = _encode(value) == data and not (0xD8 in data and _LINK in data)
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
        and len(payload.translate(None, _NOT_CONTAINER)) > NESTING_MAX
        and _nested_too_deep(value)
    ):
        raise CborDecodeError(f"more than {NESTING_MAX} maps and lists inside each other")
    return value


def all_pass(payloads: Sequence[bytes]) -> bool:
    """Whether ``check`` accepts each of ``payloads`` and none of them is null, at half the price
    of asking one by one. What is wrong where this says False, ``check`` tells.
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
        and not (0xD8 in joined and _LINK in joined)
        # So few containers in all of them that no single one can have too many, or too deep.
        and (
            len(joined.translate(None, _NOT_CONTAINER)) <= NESTING_MAX
            or all(map(_is_flat, payloads))
        )
    )


def _passes(payload: bytes) -> bool:
    try:
        return check(payload) is not None
    except CborDecodeError:
        return False


def too_much(payload: bytes) -> str | None:
    """Why ``payload`` is too much work to be written as one value, None if it is not. What was
    stored before there was this bound is read all the same (``check``)."""
    if len(payload) > VALUE_CONTAINERS_MAX:
        if containers_over(payload, VALUE_CONTAINERS_MAX):
            return f"more than {VALUE_CONTAINERS_MAX} maps and lists in one value"
        if len(payload) > VALUE_ITEMS_MAX and heavier(payload, ITEMS, VALUE_ITEMS_MAX):
            return f"more than {VALUE_ITEMS_MAX} keys and values in one value"
    return None


def _is_flat(payload: bytes) -> bool:
    return (
        len(payload) <= NESTING_MAX or len(payload.translate(None, _NOT_CONTAINER)) <= NESTING_MAX
    )


def _too_many_containers(payload: bytes) -> bool:
    # An empty list is one byte here and seventy once it is decoded, and the garbage collector
    # looks at each: 16 MiB of them are 1.2 GB and ten seconds.
    return containers_over(payload, CONTAINERS_MAX)


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
    return len(data.translate(None, _NOT_CONTAINER))


def heavier(data: bytes, weights: bytes, limit: int) -> bool:
    """Whether the items of ``data`` weigh more than ``limit``."""
    return weigh(data, weights, limit) > limit


def weigh(data: bytes, weights: bytes, limit: int) -> int:
    """What the items of ``data`` weigh, by the first byte of each; as soon as that is over
    ``limit``, what they weigh up to there. Looks at heads only and builds nothing, so that what is
    too much for memory never gets there. What it says of bytes that are no CBOR is of no account:
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


def decode_trusted(data: bytes) -> Any:
    """The value of bytes whose canonical form was proved before (records, own encodings).

    Garbage still raises ``CborDecodeError``, but other forms of the same value are not noticed.
    """
    try:
        return _decode(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise CborDecodeError(f"not canonical CBOR: {_why(error)}") from error


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


def _stride(head: int) -> int:
    """Bytes from the item with this head to the next one, whether inside or after it; 0 for a
    string that is long enough to have its length in bytes of its own."""
    major, info = head >> 5, head & 31
    if major in (2, 3):
        return 1 + info if info < 24 else int(info > 27)
    return 1 + (1 << info - 24) if 24 <= info <= 27 else 1


_STEPS: Final = bytes(map(_stride, range(256)))

#: Smallest argument that needs a head argument of so many bytes (RFC 8949, section 4.2.1).
_WIDTH_NEEDED_FROM: Final = {1: 24, 2: 2**8, 4: 2**16, 8: 2**32}


def _refused(data: bytes, position: int, what: str) -> CborDecodeError:
    return CborDecodeError(f"not canonical CBOR: {what} at byte {position} of {len(data)}")


# ---------------------------------------------------------------- heads, for joining by hand

_FLOAT: Final = struct.Struct(">Bd")
_HEAD_1: Final = struct.Struct(">BB").pack
_HEAD_2: Final = struct.Struct(">BH").pack
_HEAD_4: Final = struct.Struct(">BI").pack
_HEAD_8: Final = struct.Struct(">BQ").pack


def _head(major: int, argument: int) -> bytes:
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


_CACHED: Final = 1024
_UINTS: Final = tuple(_head(0x00, n) for n in range(_CACHED))
_BYTES_HEADS: Final = tuple(_head(0x40, n) for n in range(_CACHED))
_TEXT_HEADS: Final = tuple(_head(0x60, n) for n in range(_CACHED))
_ARRAY_HEADS: Final = tuple(_head(0x80, n) for n in range(_CACHED))
_MAP_HEADS: Final = tuple(_head(0xA0, n) for n in range(_CACHED))


def uint(number: int) -> bytes:
    """The item of an integer in 0 … 2^64-1; raises ``CborEncodeError`` outside."""
    if 0 <= number < _CACHED:
        return _UINTS[number]
    if 0 <= number <= _INTEGER_MAX:
        return _head(0x00, number)
    raise CborEncodeError(f"$: {number} is not in 0 to 2^64-1")


def bytes_head(length: int) -> bytes:
    """What stands before the bytes of a byte string of ``length`` (not negative) bytes."""
    return _BYTES_HEADS[length] if 0 <= length < _CACHED else _head(0x40, length)


def text(string: str) -> bytes:
    """The whole item of a text; raises ``CborEncodeError`` for lone surrogates."""
    try:
        raw = string.encode()
    except UnicodeEncodeError as error:
        raise CborEncodeError(f"$: {_text_fault(string)}") from error
    length = len(raw)
    return (_TEXT_HEADS[length] if length < _CACHED else _head(0x60, length)) + raw


def array_head(length: int) -> bytes:
    """What stands before the ``length`` (not negative) items of an array."""
    return _ARRAY_HEADS[length] if 0 <= length < _CACHED else _head(0x80, length)


def map_head(length: int) -> bytes:
    """What stands before the ``length`` (not negative) pairs of a map; the caller sorts them."""
    return _MAP_HEADS[length] if 0 <= length < _CACHED else _head(0xA0, length)

"""Values to canonical bytes: libipld writes them, and what it gets wrong is looked for."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, Final

import libipld

from entidb.cbor.faults import diagnose
from entidb.cbor.heads import head, text
from entidb.cbor.weight import NOT_CONTAINER, nested_too_deep, too_much
from entidb.errors import CborEncodeError
from entidb.types import NESTING_MAX, VALUE_CONTAINERS_MAX

_encode = libipld.encode_dag_cbor

#: Head of tag 42, as libipld writes it before what it takes for a link.
LINK: Final = b"\xd8\x2a"
#: What 0.0 looks like, and therefore -0.0 too, after libipld wrote it.
_ZERO: Final = b"\xfb\0\0\0\0\0\0\0\0"
_FLOAT: Final = struct.Struct(">Bd")


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
        and len(payload.translate(None, NOT_CONTAINER)) > NESTING_MAX
        and nested_too_deep(value)
    ):
        raise diagnose(value, "nested too deep")
    if len(payload) > VALUE_CONTAINERS_MAX and (reason := too_much(payload)) is not None:
        raise CborEncodeError(f"$: {reason}; make several entities of it")
    return payload


def encode_message(value: Any) -> bytes:
    """As ``encode``, without counting the nesting: for envelopes, whose shape our own code
    fixes. libipld's own limit still turns a bottomless value into ``CborEncodeError``."""
    try:
        payload: bytes = _encode(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise diagnose(value, "canonical CBOR cannot express it") from error
    # A search for one byte costs a fraction of a search for a pattern, and mostly settles it.
    if 0xFB in payload and _ZERO in payload and _has_negative_zero(value):
        raise diagnose(value, "-0.0")
    if 0xD8 in payload and LINK in payload:
        return _encode_exactly(value)
    return payload


def _encode_exactly(value: Any) -> bytes:
    """The same encoding written in Python, for values in which libipld may have seen a link."""
    if nested_too_deep(value):
        raise diagnose(value, "nested too deep")
    parts: list[bytes] = []
    _append(parts.append, value)
    return b"".join(parts)


def _append(add: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, str):
        raw = value.encode()
        add(head(0x60, len(raw)) + raw)
    elif isinstance(value, bytes):
        add(head(0x40, len(value)) + value)
    elif value is None or value is True or value is False:
        add(_encode(value))
    elif isinstance(value, int):
        add(head(0, value) if value >= 0 else head(0x20, -1 - value))
    elif isinstance(value, float):
        add(_FLOAT.pack(0xFB, value))
    elif isinstance(value, list):
        add(head(0x80, len(value)))
        for item in value:
            _append(add, item)
    else:
        add(head(0xA0, len(value)))
        # Shorter keys have smaller heads, so sorting the encoded keys is both orders at once.
        pairs = {text(key): item for key, item in value.items()}
        for key in sorted(pairs):
            add(key)
            _append(add, pairs[key])


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

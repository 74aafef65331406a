"""Whether a plain value equals another, comes before it, or is one of several; and the encodings
that an equal one can have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from entidb import cbor
from entidb.db.looking import MISSING, NUMBERS, RANKS, order_key

#: Whether a plain value meets a condition.
Test = Callable[[Any], bool]
#: What is equal to something if its key in an order is the same, and can be looked up by that.
_LOOKED_UP: Final = frozenset(RANKS) - {list, dict, type(MISSING)}


def one_of(others: Sequence[Any]) -> Test | None:
    """Whether a value is equal to one of ``others``, however many; None for lists and maps."""
    if not _LOOKED_UP.issuperset(map(type, others)):
        return None
    keys = frozenset(map(order_key, others))
    return lambda got: type(got) in _LOOKED_UP and order_key(got) in keys


def equals(other: Any) -> Test:
    kind = type(other)
    if kind is bool or other is None:
        return lambda got: got is other
    if kind in NUMBERS:
        return lambda got: type(got) in NUMBERS and got == other
    if kind in (list, dict):
        key = order_key(other)
        return lambda got: type(got) is kind and order_key(got) == key
    return lambda got: type(got) is kind and got == other


def ordered(sign: str, other: Any) -> Test:
    kinds: tuple[type, ...] = NUMBERS if type(other) in NUMBERS else (type(other),)
    if kinds[0] in (list, dict):
        key = order_key(other)
        whole = _compare(sign, key)
        return lambda got: type(got) is kinds[0] and whole(order_key(got))
    judge = _compare(sign, other)
    return lambda got: type(got) in kinds and judge(got)


def _compare(sign: str, other: Any) -> Test:
    if sign == "<":
        return lambda got: bool(got < other)
    if sign == "<=":
        return lambda got: bool(got <= other)
    if sign == ">":
        return lambda got: bool(got > other)
    return lambda got: bool(got >= other)


def encodings(value: Any) -> list[bytes]:
    """The ways in which an equal value can be encoded in a payload. For lists and maps with numbers
    in them there are too many to look for."""
    kind = type(value)
    if kind in NUMBERS:
        found = [cbor.encode_message(value)]
        if kind is int and float(value) == value:
            found.append(cbor.encode_message(float(value)))
        elif kind is float and value.is_integer() and -(2**64) <= value < 2**64:
            found.append(cbor.encode_message(int(value)))
        return found
    return [] if kind in (list, dict) else [cbor.encode_message(value)]


__all__ = ["Test", "encodings", "equals", "one_of", "ordered"]

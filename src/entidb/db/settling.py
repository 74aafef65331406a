"""What has no encoding of its own and yet a meaning that is stored: -0.0 is 0.0, a scalar of
numpy is Python's, and a date in a condition is the text that an entity holds."""

from __future__ import annotations

import ipaddress
import pathlib
from typing import Any, Final, cast

import msgspec

from entidb import cbor
from entidb.errors import CborEncodeError, QueryError
from entidb.types import repr_of

#: Classes that are stored as their text, beyond what msgspec knows.
AS_TEXT: Final[tuple[type, ...]] = (
    pathlib.PurePath,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
)
#: Integers up to here are what they are, in every encoding.
_PLAIN_MAX: Final = 1 << 53


def settled_or(error: CborEncodeError, value: Any, lists: tuple[type, ...] = (list,)) -> Any:
    try:
        return settled(value, lists)
    except RecursionError:
        raise error from None


def settled(value: Any, lists: tuple[type, ...] = (list,)) -> Any:
    """``value`` with -0.0 as 0.0 and numpy's scalars as Python's own; members of ``lists`` become
    lists. For values that canonical CBOR refuses; all others never come here."""
    if isinstance(value, dict):
        return {settled(name): settled(item, lists) for name, item in value.items()}
    if isinstance(value, lists):
        return [settled(item, lists) for item in cast("list[Any]", value)]
    if isinstance(value, float):
        return float(value) + 0.0  # -0.0 + 0.0 is 0.0
    return numpy_item(value)


def numpy_item(value: Any) -> Any:
    """The Python value of a numpy scalar; anything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return value


def plain(value: Any) -> Any:
    """``value`` as an entity stores it: dates, UUIDs, enums, decimals, paths and addresses become
    text or what else msgspec makes of them. Raises ``QueryError`` for what no entity can hold."""
    kind = type(value)
    if kind is bool or value is None or (kind is str and value.isascii()):
        return value
    if kind is int and -_PLAIN_MAX <= value <= _PLAIN_MAX:
        return value
    try:
        # Equal sets are equal lists, in the order in which typed collections store them.
        made = msgspec.to_builtins(
            value, builtin_types=(bytes,), str_keys=True, order="deterministic", enc_hook=_other
        )
        # The same way for all values: what comes back is what an entity would hold.
        return cbor.decode_trusted(cbor.encode(settled(made, (list, tuple))))
    except RecursionError as error:
        raise QueryError(
            "no entity can hold a value that is nested so deep, so none can be found by it"
        ) from error
    except (CborEncodeError, TypeError, ValueError) as error:
        raise QueryError(
            f"no entity can hold {repr_of(value, 200)}, so none can be found by it: {error}"
        ) from error


def _other(value: Any) -> Any:
    """What msgspec asks for a value that it does not know."""
    if isinstance(value, AS_TEXT):
        return str(value)
    item = numpy_item(value)
    if item is value:
        raise TypeError(f"a value of class {type(value).__name__} cannot be stored")
    return item


__all__ = ["AS_TEXT", "numpy_item", "plain", "settled", "settled_or"]

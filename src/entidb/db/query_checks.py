"""What a query is given: fields, and the end of a page. Each mistake is said when it is made."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from entidb import cbor
from entidb.db.conditions import Field
from entidb.db.looking import Path
from entidb.db.plain import ValueCodec
from entidb.db.plans import Order
from entidb.errors import CborEncodeError, QueryError, ValueTypeError


def order_of(given: object) -> Order:
    """``"price"``, ``"-price"`` or ``F.price`` as what is sorted by. Raises ``QueryError``."""
    if isinstance(given, Field):
        return Order(given._path)
    if isinstance(given, str) and given.removeprefix("-"):
        return Order(tuple(given.removeprefix("-").split(".")), given.startswith("-"))
    raise QueryError(f'order_by takes a field, like "price", "-price" or F.price, not {given!r}')


def check_fields(name: str, known: Sequence[str] | None, paths: Iterable[Path]) -> None:
    """A field that the class of a typed collection does not know (``known``), or that no entity can
    have, is a mistake of the program."""
    for path in paths:
        for part in path:
            if not part.isascii():
                _check_text(part)
        if known is not None and path and path[0] not in known:
            raise QueryError(f"{name!r} has no field {path[0]!r}; its class has {', '.join(known)}")


def _check_text(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise QueryError(
            f"no entity can have a field {name!r}: a lone surrogate at position {error.start} is "
            "no text"
        ) from error


def place_behind(last: object, codec: ValueCodec[Any] | None) -> tuple[uuid.UUID, Any]:
    """The id that a page ended with, and its value as it is stored, for an order of fields: None
    without a ``codec``. Raises ``QueryError``."""
    given = last if isinstance(last, tuple) and len(last) == 2 else (None, None)
    entity_id, value = given
    if type(entity_id) is not uuid.UUID:
        raise QueryError(
            f"after() takes the last (id, value) of the page before, or None, not {last!r:.200}"
        )
    if codec is None:
        return entity_id, None
    try:
        return entity_id, cbor.decode_trusted(codec.encode(value))
    except (CborEncodeError, ValueTypeError) as error:
        raise QueryError(
            f"after() takes the last (id, value) of the page before, as it was read: {error}"
        ) from error


__all__ = ["check_fields", "order_of", "place_behind"]

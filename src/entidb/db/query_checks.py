"""What a query is given: fields and orders. Each mistake is said when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from entidb.db.conditions import Field
from entidb.db.looking import Path
from entidb.db.plans import Order
from entidb.errors import QueryError
from entidb.types import repr_of


def order_of(given: object) -> Order:
    """``"price"``, ``"-price"`` or ``F.price`` as what is sorted by. Raises ``QueryError``."""
    if isinstance(given, Field):
        return Order(given._path)
    if isinstance(given, str) and given.removeprefix("-"):
        return Order(tuple(given.removeprefix("-").split(".")), given.startswith("-"))
    raise QueryError(
        f'order_by takes a field, like "price", "-price" or F.price, not {repr_of(given, 80)}'
    )


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


__all__ = ["check_fields", "order_of"]

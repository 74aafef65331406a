"""Between Python values and payloads: plain values, and values of one class. Nothing is stored
here; ``kinds`` and ``models`` say which classes are possible, ``shapes`` what survives a write.

A typed value is read back before it is stored: a value that would not come back equal is refused,
and so is one that could not be read any more. So no program finds that out a year later.
"""

from __future__ import annotations

import typing
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from entidb.db.plain import PlainCodec, V, ValueCodec
from entidb.db.reading import OnInvalid, Upgrade, codec_reading
from entidb.errors import EntiDBError, ValueTypeError

if TYPE_CHECKING:
    from entidb.db.typed import TypedCodec


def codec_for(
    kind: type[V] | None,
    *,
    exact: bool = False,
    on_invalid: OnInvalid = "raise",
    upgrade: Upgrade | None = None,
) -> ValueCodec[V]:
    """The codec of a collection opened with ``type=kind``; ``exact`` keeps nothing of what is
    stored. Raises ``ValueTypeError`` for a class that a collection cannot have, ``ConfigError`` for
    the other two."""
    return codec_reading(_codec_of(kind, exact), on_invalid, upgrade)


def _codec_of(kind: type[V] | None, exact: bool) -> ValueCodec[V]:
    if kind is None:
        return cast("ValueCodec[V]", _PLAIN)
    try:
        return cast("ValueCodec[V]", _typed(cast(Any, kind), exact))
    except TypeError as error:
        if isinstance(error, EntiDBError):
            raise
        # A type without a hash, such as one annotated with a list.
        return cast("ValueCodec[V]", _typed.__wrapped__(kind, exact))


@lru_cache(maxsize=256)
def _typed(kind: Any, exact: bool) -> ValueCodec[Any]:
    # A server has no typed collections, nor have many programs.
    from entidb.db.forms import is_model
    from entidb.db.typed import MsgspecCodec, PydanticCodec

    made: TypedCodec[Any]
    origin = typing.get_origin(kind) or kind
    pydantic = isinstance(origin, type) and hasattr(origin, "__is_pydantic_dataclass__")
    if is_model(kind) or pydantic:
        made = PydanticCodec(kind)
    else:
        made = MsgspecCodec(kind)
    if exact:
        made.keep = None
    return made


def located(error: ValueTypeError, collection: str, entity_id: bytes) -> ValueTypeError:
    """The same error, naming the entity."""
    identity = uuid.UUID(bytes=entity_id)
    return ValueTypeError(
        f"entity {identity} of {collection!r}: {error}",
        collection=collection,
        entity_id=identity,
        field=error.field,
        reason=error.reason,
    )


_PLAIN: Final = PlainCodec()

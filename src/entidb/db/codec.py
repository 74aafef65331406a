"""Between Python values and payloads: plain values, dataclasses, attrs classes, msgspec Structs,
pydantic models. Nothing is stored here.
"""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec

from entidb import cbor
from entidb.errors import CborEncodeError, ValueTypeError

V = TypeVar("V")


class ValueCodec(Protocol[V]):
    def encode(self, value: V) -> bytes: ...

    def decode(self, payload: bytes) -> V: ...


class PlainCodec:
    """Values as canonical CBOR says them: maps, lists, text, bytes, numbers, booleans."""

    def encode(self, value: Any) -> bytes:
        if value is None:
            raise CborEncodeError(
                "$: an entity cannot be None; use `del collection[id]` to delete it, or a map "
                "with a field that is None",
            )
        return cbor.encode(value)

    decode = staticmethod(cbor.decode_trusted)


class TypedCodec(Generic[V]):
    """Values of one class, converted by msgspec: dates, UUIDs and decimals become text, and come
    back as what the class says.

    ``encode`` raises ``ValueTypeError`` for a value of another class; ``decode`` raises it for
    an entity that does not fit the class (another version of the application wrote it).
    """

    def __init__(self, kind: type[V]) -> None:
        self._kind = kind

    def encode(self, value: V) -> bytes:
        if not isinstance(value, self._kind):
            raise ValueTypeError(
                f"expected {self._kind.__name__}, got {type(value).__name__}: this collection was "
                f"opened with type={self._kind.__name__}; give an instance of it, or open the "
                "collection without a type"
            )
        try:
            plain = msgspec.to_builtins(value, builtin_types=(bytes,), str_keys=True)
        except (TypeError, ValueError) as error:
            raise _cannot_be_stored(self._kind, error) from error
        return cbor.encode(plain)

    def decode(self, payload: bytes) -> V:
        try:
            return msgspec.convert(
                cbor.decode_trusted(payload), self._kind, builtin_types=(bytes,), str_keys=True
            )
        except msgspec.ValidationError as error:
            raise _does_not_fit(self._kind, error) from error


class PydanticCodec(Generic[V]):
    """Values of one pydantic model, found by its methods, so that pydantic is not needed here."""

    def __init__(self, kind: type[V]) -> None:
        self._kind = kind

    def encode(self, value: V) -> bytes:
        if not isinstance(value, self._kind):
            raise ValueTypeError(
                f"expected {self._kind.__name__}, got {type(value).__name__}: give an instance of "
                "the model this collection was opened with"
            )
        try:
            plain = cast(Any, value).model_dump(mode="json")
        except (TypeError, ValueError) as error:
            raise _cannot_be_stored(self._kind, error) from error
        return cbor.encode(plain)

    def decode(self, payload: bytes) -> V:
        value = cbor.decode_trusted(payload)
        try:
            made: V = cast(Any, self._kind).model_validate(value)
        except ValueError as error:
            raise _does_not_fit(self._kind, error) from error
        return made


def codec_for(kind: type[V] | None) -> ValueCodec[V]:
    """The codec of a collection opened with ``type=kind``."""
    if kind is None:
        return cast("ValueCodec[V]", _PLAIN)
    if hasattr(kind, "model_dump") and hasattr(kind, "model_validate"):
        return PydanticCodec(kind)
    return TypedCodec(kind)


def _cannot_be_stored(kind: type, error: Exception) -> ValueTypeError:
    return ValueTypeError(f"a field of {kind.__name__} cannot be stored: {error}")


def _does_not_fit(kind: type, error: Exception) -> ValueTypeError:
    return ValueTypeError(
        f"the stored entity does not fit {kind.__name__}: {error}. Another version of the "
        "application may have written it; give new fields a default, or read it without a type"
    )


_PLAIN = PlainCodec()

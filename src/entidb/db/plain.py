"""Plain values and payloads: maps, lists, text, bytes, numbers and booleans, in canonical CBOR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from entidb import cbor
from entidb.db.settling import settled_or
from entidb.errors import CborEncodeError, ValueTypeError

V = TypeVar("V")
#: (the payload to write, the payload that is stored) -> what is written.
Keep = Callable[[bytes, bytes], bytes]


class ValueCodec(Protocol[V]):
    #: Takes over what the class does not know; None where there is nothing to take over.
    keep: Keep | None
    #: Name of the class of its values; empty where there is none.
    kind: str
    #: The fields a value can be looked for by; None for any.
    stored_names: tuple[str, ...] | None
    #: Makes a payload of the newest shape; None where all are read as they are stored.
    upgraded: Callable[[bytes], bytes] | None
    #: What to read instead of an entity that does not fit, None to leave it out; where this is
    #: None itself, such an entity raises.
    instead: Callable[[ValueTypeError, Any], Any] | None

    def encode(self, value: V) -> bytes: ...

    def decode(self, payload: bytes) -> V: ...

    def patch(self, stored: bytes, changes: Mapping[str, Any]) -> bytes:
        """The payload ``stored`` with the fields in ``changes`` set, and all else as it is."""
        ...

    def make(self, fields: Mapping[str, Any]) -> bytes:
        """The payload of a new value with these fields, and with defaults for all others."""
        ...


# ---------------------------------------------------------------- plain values


class PlainCodec:
    """Values as canonical CBOR has them: maps, lists, text, bytes, numbers, booleans."""

    kind = ""
    keep: Keep | None = None
    stored_names: tuple[str, ...] | None = None
    upgraded: Callable[[bytes], bytes] | None = None
    instead: Callable[[ValueTypeError, Any], Any] | None = None

    def encode(self, value: Any) -> bytes:
        if value is None:
            raise CborEncodeError(
                "$: an entity cannot be None; use `del collection[id]` to delete it, or a map "
                "with a field that is None",
            )
        try:
            return cbor.encode(value)
        except CborEncodeError as error:
            return cbor.encode(settled_or(error, value))

    decode = staticmethod(cbor.decode_trusted)

    def patch(self, stored: bytes, changes: Mapping[str, Any]) -> bytes:
        value = cbor.decode_trusted(stored)
        if type(value) is not dict:
            raise ValueTypeError(
                f"the entity is no map of fields but {type(value).__name__}: write it whole"
            )
        return self.encode({**value, **changes})

    def make(self, fields: Mapping[str, Any]) -> bytes:
        return self.encode(dict(fields))

"""Values of one class and payloads: dataclasses, attrs classes, msgspec Structs, pydantic models.

A typed value is read back before it is stored, unless it comes back for certain (``certain``): what
would not come back equal is refused, and so is what could not be read any more. No program finds
out a year later.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, Generic

import msgspec

from entidb import cbor
from entidb.db.certain import Certain, certain
from entidb.db.difference import difference, part_of, same
from entidb.db.forms import is_model, is_typed_dict, label_of
from entidb.db.kinds import examine
from entidb.db.models import Model, examine_model
from entidb.db.plain import Keep, V
from entidb.db.settling import AS_TEXT, numpy_item, settled, settled_or
from entidb.db.shapes import Fields, Shape, keep_unknown
from entidb.db.times import odd_times
from entidb.errors import CborEncodeError, EntiDBError, ValueTypeError
from entidb.types import reason_of_msgspec

# ---------------------------------------------------------------- values of a class


_NOTHING: Final = cbor.encode({})


def _encoded(plain: Any) -> tuple[Any, bytes]:
    """What is stored of ``plain``, and its payload."""
    try:
        return plain, cbor.encode(plain)
    except CborEncodeError as error:
        plain = settled_or(error, plain, (list, tuple))
        return plain, cbor.encode(plain)


class TypedCodec(ABC, Generic[V]):
    """What all typed codecs share. ``encode`` raises ``ValueTypeError`` for a value of another
    class and for one that would not come back as it is; ``decode`` for an entity that does not
    fit the class (another version of the application wrote it).
    """

    def __init__(self, kind: Any, shape: Shape | None, *, bare: bool) -> None:
        self.upgraded: Callable[[bytes], bytes] | None = None
        self.instead: Callable[[ValueTypeError, Any], Any] | None = None
        self._kind = kind
        self.kind = self._name = label_of(kind)
        self._origin = _class_of(kind)
        self._checked = (
            isinstance(self._origin, type)
            and self._origin is not Any
            and not is_typed_dict(self._origin)
        )
        self._bare = bare
        #: Whether a number may stand where a Decimal belongs.
        self._decimals = False
        self._odd_times = odd_times(kind)
        #: Answers for a value whether reading it back would prove nothing; None: for no value.
        self._certain: Certain | None = None
        self.keep: Keep | None = None if shape is None else partial(keep_unknown, shape)
        self.stored_names: tuple[str, ...] | None = None
        if isinstance(shape, Fields) and not shape.open:
            self.stored_names = tuple(sorted(shape.known))

    def encode(self, value: V) -> bytes:
        if self._checked and not isinstance(value, self._origin):
            raise ValueTypeError(
                f"expected {self._name}, got {type(value).__name__}: this collection was opened "
                f"with type={self._name}; give an instance of it, or open the collection without "
                "a type"
            )
        plain = self._plain(value)
        if plain is None:
            raise ValueTypeError("an entity cannot be None; use `del collection[id]`")
        plain, payload = _encoded(plain)
        if self._certain is not None and self._certain(value):
            return payload
        try:
            back = self._value(plain)
        except ValueTypeError as error:
            raise ValueTypeError(
                f"this {self._name} could not be read again: {_about(error)}; nothing was stored",
                field=error.field,
                reason=error.reason,
            ) from error
        odd = self._odd_times
        if self._bare or not same(value, back) or (odd is not None and odd(value)):
            where = difference(value, back)
            if where is not None:
                raise self._not_the_same(where)
        if self._decimals and (read := self._plain(back)) != plain:
            # A number where a Decimal belongs would be found as a number alone.
            payload = _encoded(read)[1]
        return payload

    def decode(self, payload: bytes) -> V:
        try:
            return self._value(cbor.decode_trusted(payload))
        except ValueTypeError as error:
            raise ValueTypeError(
                f"the stored entity does not fit {self._name}: {_about(error)}. Another version "
                "of the application may have written it; give new fields a default, or open the "
                "collection with upgrade or on_invalid; collection.raw reads it without a type",
                field=error.field,
                reason=error.reason,
            ) from error

    def patch(self, stored: bytes, changes: Mapping[str, Any]) -> bytes:
        before = cbor.decode_trusted(stored)
        keys = self._keys()
        if type(before) is dict:
            before = self._without_aliases(before, changes)
        unknown = [name for name in changes if name not in keys]
        if unknown or type(before) is not dict:
            raise ValueTypeError(
                f"{self._name} has no field {unknown[0]!r}; it has {', '.join(sorted(keys))}"
                if unknown
                else f"the stored entity is no map of fields but {type(before).__name__}",
                field=unknown[0] if unknown else None,
            )
        parts = {name: self._part(name, value) for name, value in changes.items()}
        wanted = {**before, **{keys[name]: part for name, part in parts.items()}}
        try:
            back = self._value(settled(wanted, (list, tuple)))
        except ValueTypeError as error:
            raise ValueTypeError(
                f"the changed entity would not fit {self._name}: {_about(error)}; nothing was "
                "stored",
                field=error.field,
                reason=error.reason,
            ) from error
        for name, value in changes.items():
            got = part_of(back, name)
            if isinstance(value, type(got)) and (where := difference(value, got, name)):
                raise self._not_the_same(where)
        whole = self._plain(back)
        made = {keys[name]: whole[keys[name]] for name in changes if keys[name] in whole}
        made |= {name: whole[name] for name in self._derived() if name in whole}
        gone = {keys[name] for name in changes} - made.keys()
        after = {name: item for name, item in before.items() if name not in gone} | made
        payload = cbor.encode(settled(after, (list, tuple)))
        return payload if self.keep is None else self.keep(payload, stored)

    def make(self, fields: Mapping[str, Any]) -> bytes:
        value = self.decode(self.patch(_NOTHING, fields))
        if dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
            # msgspec leaves a default to the class, and what is not the object's is not stored.
            for field in dataclasses.fields(value):
                vars(value).setdefault(field.name, getattr(value, field.name))
        return self.encode(value)

    @abstractmethod
    def _plain(self, value: Any) -> Any: ...

    @abstractmethod
    def _value(self, plain: Any) -> V:
        """Raises ``ValueTypeError`` with field and reason."""

    @abstractmethod
    def _part(self, name: str, value: Any) -> Any:
        """The plain value of ``value`` for the field ``name``."""

    @abstractmethod
    def _keys(self) -> dict[str, str]:
        """Field -> key in the stored map."""

    def _without_aliases(self, stored: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """``stored`` without other keys that the fields ``names`` could be read from."""
        return stored

    def _derived(self) -> tuple[str, ...]:
        """Keys that follow from other fields, and are written with them."""
        return ()

    def _not_the_same(self, where: tuple[str, str]) -> ValueTypeError:
        field, reason = where
        return ValueTypeError(
            f"this {self._name} would not come back as it is: {field or 'it'} {reason}; nothing "
            "was stored",
            field=field,
            reason=reason,
        )


def _class_of(kind: Any) -> Any:
    """The class that a value of ``kind`` is an instance of, or something that is no class."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _class_of(kind.__origin__)
    return kind if origin is None or origin in (typing.Union, types.UnionType) else origin


def _about(error: ValueTypeError) -> str:
    return f"{error.field}: {error.reason}" if error.field else f"{error.reason}"


class MsgspecCodec(TypedCodec[V]):
    """Values that msgspec converts: dates, UUIDs and decimals become text, and come back as what
    the class says."""

    def __init__(self, kind: Any) -> None:
        found = examine(kind)
        super().__init__(kind, found.shape, bare=found.bare)
        self._certain = certain(kind)
        self._decimals = found.decimals
        self._convert = partial(
            msgspec.convert,
            type=kind,
            builtin_types=(bytes,),
            str_keys=True,
            dec_hook=self._decode_other,
        )
        self._models: dict[type, PydanticCodec[Any]] = {m: PydanticCodec(m) for m in found.models}
        self._to_builtins = partial(
            msgspec.to_builtins,
            builtin_types=(bytes,),
            str_keys=True,
            order="deterministic" if found.sets else None,
            enc_hook=self._encode_other,
        )

    def _plain(self, value: Any) -> Any:
        try:
            return self._to_builtins(value)
        except EntiDBError:
            raise
        except Exception as error:
            raise _cannot_be_stored(self._name, error) from error

    def _value(self, plain: Any) -> V:
        try:
            return self._convert(plain)  # type: ignore[no-any-return]
        except ValueTypeError:
            raise
        except msgspec.ValidationError as error:
            raise _does_not_fit(*reason_of_msgspec(str(error))) from error
        except Exception as error:
            raise _does_not_fit(None, f"{type(error).__name__}: {error}") from error

    def _encode_other(self, value: Any) -> Any:
        codec = self._models.get(type(value))
        if codec is not None:
            return codec._plain(value)
        if isinstance(value, AS_TEXT):
            return str(value)
        if isinstance(value, str):
            return str(value)
        if isinstance(value, bytes):
            return bytes(value)
        if isinstance(value, (int, float)):
            return int(value) if isinstance(value, int) else float(value)
        item = numpy_item(value)
        if item is value:
            raise TypeError(f"{type(value).__name__} is no class that can be stored")
        return item

    def _decode_other(self, kind: Any, plain: Any) -> Any:
        codec = self._models.get(kind)
        if codec is not None:
            return codec._value(plain)
        if kind is object:
            return plain
        if not isinstance(plain, str):
            raise ValueError(f"expected text, got {type(plain).__name__}")
        return kind(plain)

    def _part(self, name: str, value: Any) -> Any:
        return self._plain(value)

    def _keys(self) -> dict[str, str]:
        origin = self._origin
        if isinstance(origin, type) and issubclass(origin, msgspec.Struct):
            pairs = zip(origin.__struct_fields__, origin.__struct_encode_fields__, strict=True)
            return dict(pairs)
        if dataclasses.is_dataclass(origin):
            return {each.name: each.name for each in dataclasses.fields(origin)}
        if is_typed_dict(origin):
            return {name: name for name in typing.get_type_hints(origin)}
        return {each.name: each.name for each in getattr(origin, "__attrs_attrs__", ())}


class PydanticCodec(TypedCodec[V]):
    """Values of one pydantic model or dataclass, found by its methods, so that pydantic is not
    needed here. Stored under the names of its fields, whatever their aliases."""

    def __init__(self, kind: Any) -> None:
        self._model: Model = examine_model(kind)
        super().__init__(kind, self._model.shape, bare=self._model.bare)
        self._how: dict[str, Any] = {"by_alias": False, "warnings": False}
        if self._model.round_trip:
            self._how["round_trip"] = True
        reading: dict[str, Any] = {}
        if self._model.by_name:
            reading |= {"by_name": True, "by_alias": True}
        if self._model.lenient:
            # What is stored as text is no datetime yet, which is all that `strict` would allow.
            reading["strict"] = False
        self._adapter = None if is_model(kind) else _adapter_of(kind)
        validate = kind.model_validate if self._adapter is None else self._adapter.validate_python
        self._validate = partial(validate, **reading)

    def _plain(self, value: Any) -> Any:
        return self._dumped(value)

    def _dumped(self, value: Any, **which: Any) -> Any:
        dump = value.model_dump if self._adapter is None else self._adapter.dump_python
        arguments = (value,) if self._adapter is not None else ()
        try:
            if not self._model.python:
                try:
                    return dump(*arguments, mode="json", **self._how, **which)
                except (TypeError, ValueError):
                    # Something of another type than annotated: numpy's scalars, at best.
                    return _plain_python(dump(*arguments, mode="python", **self._how, **which))
            return _plain_python(dump(*arguments, mode="python", **self._how, **which))
        except EntiDBError:
            raise
        except Exception as error:
            raise _cannot_be_stored(self._name, error) from error

    def _value(self, plain: Any) -> V:
        try:
            return self._validate(plain)  # type: ignore[no-any-return]
        except Exception as error:
            raise _does_not_fit(*_from_pydantic(error)) from error

    def _part(self, name: str, value: Any) -> Any:
        if self._adapter is not None:
            return _plain_python(_dump_any(value))
        # A model that has this field alone: the others need not fit, and its serializer counts.
        made = self._kind.model_construct()
        vars(made)[name] = value
        return self._dumped(made, include={name})[name]

    def _keys(self) -> dict[str, str]:
        if getattr(self._kind, "__pydantic_root_model__", False):
            return {}
        fields = getattr(self._kind, "model_fields", None) or self._kind.__pydantic_fields__
        return {name: name for name in fields}

    def _without_aliases(self, stored: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        aliases = {a for name in names for a in self._model.aliases.get(name, ())}
        return {name: value for name, value in stored.items() if name not in aliases}

    def _derived(self) -> tuple[str, ...]:
        return () if self._model.round_trip else self._model.computed


def _adapter_of(kind: Any) -> Any:
    return sys.modules["pydantic"].TypeAdapter(kind)


def _dump_any(value: Any) -> Any:
    """``value`` with the models in it dumped, for a single field."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="python", by_alias=False, warnings=False)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {each.name: _dump_any(getattr(value, each.name)) for each in fields}
    if isinstance(value, dict):
        return {name: _dump_any(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_dump_any(item) for item in value]
    return value


_PLAIN_TYPES: Final = frozenset({str, int, bool, type(None), bytes})


def _plain_python(value: Any) -> Any:
    """What pydantic dumped in its Python mode, as plain values: as in its JSON mode, but bytes
    stay bytes, secrets are not masked, and equal sets become equal lists."""
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if kind is float:
        return value + 0.0
    if isinstance(value, dict):
        return {_plain_key(name): _plain_python(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain_python(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return _in_order([_plain_python(item) for item in value])
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if hasattr(value, "get_secret_value"):
        return _plain_python(value.get_secret_value())
    item = numpy_item(value)
    if item is not value:
        return item
    return sys.modules["pydantic_core"].to_jsonable_python(value)


def _in_order(members: list[Any]) -> list[Any]:
    try:
        return sorted(members)
    except TypeError:
        return sorted(members, key=cbor.encode_message)


def _plain_key(name: Any) -> Any:
    plain = _plain_python(name)
    if isinstance(plain, bool):
        return "true" if plain else "false"
    return str(plain) if isinstance(plain, (int, float)) else plain


# ---------------------------------------------------------------- what went wrong


def _cannot_be_stored(name: str, error: Exception) -> ValueTypeError:
    if isinstance(error, RecursionError):
        return ValueTypeError(f"this {name} is nested too deep (or does it contain itself?)")
    return ValueTypeError(f"a field of {name} cannot be stored: {_plain_text(str(error))}")


def _does_not_fit(field: str | None, reason: str) -> ValueTypeError:
    return ValueTypeError(reason, field=field, reason=reason)


def _plain_text(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def _from_pydantic(error: Exception) -> tuple[str | None, str]:
    errors = getattr(error, "errors", None)
    if errors is None:
        return None, f"{type(error).__name__}: {error}"
    first = errors(include_url=False, include_context=False, include_input=False)[0]
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in first["loc"])
    reason = "it is missing" if first["type"] == "missing" else _plain_text(first["msg"])
    return place.lstrip(".") or None, reason[:1].lower() + reason[1:]

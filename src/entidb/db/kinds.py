"""What can be known of a class before its first value is stored: which places of it cannot come
back as they were, and its shape. Dataclasses, attrs classes, msgspec Structs, TypedDicts and
whatever else msgspec converts; pydantic models are ``models``' subject.

A class is refused here with the field named. What a class does not tell (a converter, a custom
``__post_init__``, a value of another type than annotated) is found when a value is written.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from msgspec import inspect as described

from entidb.db.forms import (
    SeenForm,
    form_of,
    has_own_eq,
    is_model,
    label_of,
    refused,
    seen,
    union,
)
from entidb.db.models import examine_model
from entidb.db.settling import AS_TEXT
from entidb.db.shapes import Fields, Items, Places, Shape, Values
from entidb.types import kind_name, repr_of


def _is_type(kind: Any) -> bool:
    forms = (type, typing.TypeVar, typing.NewType)
    return (
        isinstance(kind, forms)
        or kind is Any
        or typing.get_origin(kind) is not None
        or hasattr(kind, "__value__")
    )


@dataclass
class Examined:
    """What is known of a class that msgspec converts. ``bare`` says that some field does not
    take part in comparisons, so that two equal values may differ; ``decimals`` that there are such,
    which numbers are equal to."""

    shape: Shape | None
    bare: bool
    tuples: bool
    sets: bool
    decimals: bool
    models: tuple[type, ...]


def examine(kind: Any) -> Examined:
    """Raises ``ValueTypeError`` for what cannot come back as it was."""
    walk = _Walk()
    found = walk.place(_described(kind, label_of(kind)), label_of(kind))
    if found.forms == {"null"}:
        raise refused(label_of(kind), "nothing but None", "an entity cannot be None")
    return Examined(
        found.shape, walk.bare, walk.tuples, walk.sets, walk.decimals, tuple(walk.models)
    )


# ---------------------------------------------------------------- describing


def _described(kind: Any, path: str) -> Any:
    if not _is_type(kind):
        what = repr_of(kind, 60) if isinstance(kind, str) else f"an object of {kind_name(kind)}"
        raise refused("type", f"{what} is no type", "give the class itself")
    try:
        return described.type_info(kind)
    except (TypeError, ValueError, NameError, AttributeError, RecursionError) as error:
        _find_refused(kind, path)
        raise refused(
            path, _reason_of(kind, error), "take it off, or use another class for the database"
        ) from error


def _find_refused(kind: Any, path: str) -> None:
    """Raise for the field of ``kind`` that makes msgspec refuse it, if it is one field."""
    if not isinstance(kind, type) or issubclass(kind, Enum):
        return
    for name, note in getattr(kind, "__annotations__", {}).items():
        if isinstance(note, dataclasses.InitVar) or str(note).startswith(
            ("InitVar", "dataclasses.I")
        ):
            reason = "an InitVar is not kept by the object, so it cannot be stored"
            raise refused(f"{path}.{name}", reason, "make it an ordinary field")
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError) as error:
        reason = f"an annotation cannot be resolved ({error})"
        raise refused(path, reason, "define that class in a module, before this one") from error
    for name, hint in hints.items():
        if typing.get_origin(hint) is typing.ClassVar or hint is kind:
            continue
        try:
            described.type_info(hint)
        except (TypeError, ValueError, NameError, AttributeError) as error:
            for part in typing.get_args(hint) or (hint,):
                if dataclasses.is_dataclass(part):
                    _described(part, f"{path}.{name}")
            raise refused(f"{path}.{name}", _reason_of(hint, error), _ONE_KIND) from error


_ONE_KIND: Final = "give it one type, or make it a class of its own with that field"


def _reason_of(hint: Any, error: Exception) -> str:
    members = typing.get_args(hint)
    if "unions" in str(error) and members:
        names = " | ".join(label_of(each) for each in members)
        return f"{names} is ambiguous: which one it was cannot be told when it is read"
    for part in (hint, *members):
        if isinstance(part, type) and issubclass(part, Enum) and not _alike(part):
            if not list(part):
                return f"{part.__name__} has no members"
            return f"{part.__name__} has members that are neither all text nor all whole numbers"
    return _said(error)


def _alike(kind: type[Enum]) -> bool:
    kinds = {type(member.value) for member in kind}
    return kinds in ({str}, {int})


def _said(error: Exception) -> str:
    text = str(error).partition(" - type ")[0].replace("`", "")
    return f"it cannot be stored ({text})"


# ---------------------------------------------------------------- walking

_FORMS: Final[dict[type, SeenForm]] = {
    described.AnyType: seen("any", clear=True, label="Any"),
    described.NoneType: seen("null", clear=True, label="None"),
    described.BoolType: seen("bool", clear=True, label="bool"),
    described.IntType: seen("int", clear=True, label="int"),
    described.FloatType: seen("float", clear=True, label="float"),
    described.StrType: seen("text", clear=True, label="str"),
    described.BytesType: seen("bytes", clear=True, label="bytes"),
    described.ByteArrayType: seen("text", label="bytearray"),
    described.DateTimeType: seen("text", label="datetime"),
    described.TimeType: seen("text", label="time"),
    described.DateType: seen("text", label="date"),
    described.TimeDeltaType: seen("text", label="timedelta"),
    described.UUIDType: seen("text", label="UUID"),
    #: Read from a number too: what was a float would come back as a Decimal.
    described.DecimalType: seen("text", "int", "float", label="Decimal"),
}
_KEY_TYPES: Final = (
    described.AnyType,
    described.IntType,
    described.FloatType,
    described.StrType,
    described.DateTimeType,
    described.TimeType,
    described.DateType,
    described.TimeDeltaType,
    described.UUIDType,
    described.DecimalType,
    described.EnumType,
    described.LiteralType,
)
_LISTS: Final = (described.ListType, described.VarTupleType, described.SetType)
_CLASSES: Final = (described.DataclassType, described.TypedDictType, described.StructType)


class _Walk:
    def __init__(self) -> None:
        self.bare = self.tuples = self.sets = self.decimals = False
        self.models: list[type] = []
        self._made: dict[int, SeenForm] = {}
        #: Keeps what ``_made`` names by its address alive.
        self._kept: list[Any] = []

    def place(self, info: Any, path: str) -> SeenForm:
        known = _FORMS.get(type(info))
        if known is not None:
            self.decimals |= isinstance(info, described.DecimalType)
            return known
        if isinstance(info, described.Metadata):
            return self.place(info.type, path)
        if isinstance(info, described.UnionType):
            return union([self.place(each, path) for each in info.types], path)
        if isinstance(info, (described.EnumType, described.LiteralType)):
            return _values(info)
        if isinstance(info, (*_LISTS, described.FrozenSetType, described.CollectionType)):
            return self._list(info, path)
        if isinstance(info, described.TupleType):
            self.tuples = True
            below = [self.place(each, f"{path}[{n}]") for n, each in enumerate(info.item_types)]
            return _places(below, label="tuple")
        if isinstance(info, described.DictType):
            return self._dict(info, path)
        if isinstance(info, (*_CLASSES, described.NamedTupleType)):
            return self._class(info, path)
        if isinstance(info, described.CustomType):
            return self._custom(info.cls, path)
        raise refused(path, f"{type(info).__name__.removesuffix('Type')} cannot be stored", _OTHER)

    def _list(self, info: Any, path: str) -> SeenForm:
        self.sets |= isinstance(info, (described.SetType, described.FrozenSetType))
        self.tuples |= isinstance(info, described.VarTupleType)
        member = self.place(info.item_type, f"{path}[]")
        if isinstance(info, (described.SetType, described.FrozenSetType)):
            _check_members(info, member, path)
        shape = None if member.shape is None else Items(member.shape)
        clear = isinstance(info, described.ListType) and member.clear
        label = type(info).__name__.removesuffix("Type").removeprefix("Var").lower()
        return seen("list", clear=clear, shape=shape, label=label)

    def _dict(self, info: Any, path: str) -> SeenForm:
        keys = info.key_type.types if isinstance(info.key_type, described.UnionType) else ()
        for key in keys or (info.key_type,):
            if not isinstance(key, _KEY_TYPES):
                raise refused(path, "a map has text keys, and these cannot be made of text", _OTHER)
        if len(keys) > 1:
            reason = "keys of several types are all stored as text, and cannot be told apart"
            raise refused(path, reason, "give the keys one type")
        member = self.place(info.value_type, f"{path}[]")
        shape = None if member.shape is None else Values(member.shape)
        plain = isinstance(info.key_type, (described.StrType, described.AnyType))
        return seen("map", clear=plain and member.clear, shape=shape, label="dict")

    def _class(self, info: Any, path: str) -> SeenForm:
        made = self._made.get(id(info))
        if made is not None:
            return made
        self._kept.append(info)
        if isinstance(info, described.NamedTupleType) or getattr(info, "array_like", False):
            return self._row(info, path)
        shape = Fields(label_of(info.cls))
        made = self._made[id(info)] = seen("map", shape=shape, label=shape.name)
        self._settings(info, shape)
        private = isinstance(info, described.DataclassType) and hasattr(info.cls, "__attrs_attrs__")
        for field in info.fields:
            where = f"{path}.{field.name}"
            if private and field.name.startswith("_"):
                reason = "a field of an attrs class with a leading underscore is not stored"
                raise refused(where, reason, "give it a name without one")
            shape.known.add(field.encode_name)
            if field.required:
                shape.required.add(field.encode_name)
            below = self.place(field.type, where).shape
            if below is not None:
                shape.below[field.encode_name] = below
        self.bare |= has_own_eq(typing.get_origin(info.cls) or info.cls)
        return made

    def _settings(self, info: Any, shape: Fields) -> None:
        shape.closed = bool(getattr(info, "forbid_unknown_fields", False))
        tag = getattr(info, "tag_field", None)
        if tag is not None:
            shape.known.add(tag)
            shape.tags[tag] = frozenset([info.tag])

    def _row(self, info: Any, path: str) -> SeenForm:
        """A class that is stored as a list of its fields."""
        struct = isinstance(info, described.StructType)
        self.tuples |= not struct
        below: list[Shape | None] = [None] if struct and info.tag_field else []
        shape = Places(below, grows=struct)
        made = self._made[id(info)] = seen("list", shape=shape, label=label_of(info.cls))
        for field in info.fields:
            below.append(self.place(field.type, f"{path}.{field.name}").shape)
        return made

    def _custom(self, kind: Any, path: str) -> SeenForm:
        if kind is object:
            return seen("any", clear=True)
        if is_model(kind):
            self.models.append(kind)
            found = examine_model(kind, path)
            self.bare |= found.bare
            return seen("map", shape=found.shape, label=label_of(kind))
        if isinstance(kind, type) and issubclass(kind, AS_TEXT):
            return seen("text", label=label_of(kind))
        raise refused(path, f"{label_of(kind)} is no class that can be stored", _OTHER)


_OTHER: Final = (
    "use a dataclass, an attrs class, a msgspec Struct, a pydantic model, or what docs/concepts.md "
    "names under typed collections"
)


def _check_members(info: Any, member: SeenForm, path: str) -> None:
    """Sets are stored in order, so that equal sets are equal bytes; their members need one."""
    several = isinstance(info.item_type, described.UnionType)
    if "map" in member.forms or (several and not member.forms <= {"int", "float", "bool"}):
        raise refused(path, "a set of these members has no order to be stored in", "use a list")


def _values(info: Any) -> SeenForm:
    if isinstance(info, described.EnumType):
        values = [each.value for each in info.cls]
        clear = issubclass(info.cls, (str, int))
    else:
        values, clear = list(info.values), True
    forms = frozenset(form_of(each) for each in values)
    return SeenForm(
        forms, clear, None, label_of(getattr(info, "cls", "Literal")), frozenset(values)
    )


def _places(below: Sequence[SeenForm], label: str) -> SeenForm:
    shapes = [each.shape for each in below]
    shape = Places(shapes) if any(each is not None for each in shapes) else None
    return seen("list", shape=shape, label=label)


__all__ = ["Examined", "examine"]

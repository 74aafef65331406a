"""What pydantic models say of themselves: how one is dumped and validated so that it comes back as
it was, which fields never would, and its shape. pydantic is found by the methods and attributes of
the class; it is not imported, and not needed here.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import datetime
import decimal
import inspect
import re
import types
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from entidb.db.forms import (
    SeenForm,
    form_of,
    has_own_eq,
    is_typed_dict,
    label_of,
    refused,
    seen,
    union,
)
from entidb.db.shapes import Fields, Items, Places, Shape, Values

_CLEAR: Final[dict[Any, SeenForm]] = {
    Any: seen("any", clear=True, label="Any"),
    object: seen("any", clear=True, label="object"),
    None: seen("null", clear=True, label="None"),
    type(None): seen("null", clear=True, label="None"),
    bool: seen("bool", clear=True, label="bool"),
    int: seen("int", clear=True, label="int"),
    float: seen("float", clear=True, label="float"),
    str: seen("text", clear=True, label="str"),
    bytes: seen("bytes", clear=True, label="bytes"),
}
_AS_TEXT: Final = (
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
)
#: Modules of classes that pydantic turns into text, and back, by itself.
_AS_TEXT_MODULES: Final = ("pathlib", "ipaddress", "fractions", "re", "zoneinfo")
#: Their values change in pydantic's JSON mode: bytes become text, and what may be bytes.
_NEED_PYTHON: Final = (Any, object, bytes)
_SETS: Final = (set, frozenset, collections.abc.Set, collections.abc.MutableSet)
_LISTS: Final = (
    list,
    collections.deque,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Collection,
)
_MAPS: Final = (
    dict,
    collections.defaultdict,
    collections.OrderedDict,
    collections.Counter,
    collections.abc.Mapping,
    collections.abc.MutableMapping,
)
_USED_UP: Final = (
    collections.abc.Iterable,
    collections.abc.Iterator,
    collections.abc.Generator,
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
)
_UNIONS: Final = (typing.Union, types.UnionType)
_OTHER: Final = "use a type that can be stored, or leave the field to another class"


@dataclass
class Model:
    """How a model is dumped and validated. ``python``: in pydantic's Python mode, the rest being
    converted by the codec. ``bare``: equal values may differ."""

    shape: Shape | None = None
    bare: bool = False
    python: bool = False
    round_trip: bool = False
    lenient: bool = False
    by_name: bool = False
    computed: tuple[str, ...] = ()
    #: Field -> other keys it is read from.
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)


def examine_model(kind: Any, path: str | None = None) -> Model:
    """Raises ``ValueTypeError`` for a model with fields that cannot come back as they were."""
    walk = _Walk()
    path = path or label_of(kind)
    found = walk.annotation(kind, path, ())
    model = walk.model
    model.shape = found.shape
    model.computed = tuple(getattr(kind, "model_computed_fields", ()))
    infos = getattr(kind, "model_fields", None) or getattr(kind, "__pydantic_fields__", {})
    model.aliases = {name: tuple({*_aliases(info)} - {name}) for name, info in infos.items()}
    if model.by_name and not _knows_by_name(kind):
        raise refused(
            path,
            "its aliases cannot be read back by this version of pydantic",
            "use pydantic 2.11 or newer, or set populate_by_name",
        )
    return model


def _knows_by_name(kind: Any) -> bool:
    validate = getattr(kind, "model_validate", None)
    return validate is None or "by_name" in inspect.signature(validate).parameters


class _Walk:
    def __init__(self) -> None:
        self.model = Model()
        self._made: dict[Any, SeenForm] = {}
        #: Names of the type aliases that are being followed.
        self._aliases: set[str] = set()

    # ------------------------------------------------------------ annotations

    def annotation(self, note: Any, path: str, extra: tuple[Any, ...]) -> SeenForm:
        """The place that is annotated with ``note`` and has ``extra`` beside it: what stands in
        ``Annotated``, and ``"custom"`` for a serializer of its own."""
        if type(note).__name__ == "TypeAliasType":
            return self._alias(note, path, extra)
        if getattr(note, "__forward_arg__", note if isinstance(note, str) else "") in self._aliases:
            return self._itself()
        note, extra = _unwrapped(note, extra)
        if type(note).__name__ == "TypeAliasType":
            return self._alias(note, path, extra)
        self._metadata(extra)
        if note in _NEED_PYTHON or _is_secret(note):
            self.model.python = True
        if isinstance(note, typing.TypeVar):
            bound = note.__bound__
            self.model.python |= bound is None
            return _CLEAR[Any] if bound is None else self.annotation(bound, path, extra)
        try:
            known = _CLEAR.get(note)
        except TypeError:
            known = None
        if known is not None:
            return known
        origin = typing.get_origin(note) or note
        arguments = typing.get_args(note)
        if origin in _UNIONS:
            return self._union(arguments, path, extra)
        if origin is typing.Literal:
            forms = frozenset(form_of(_plain_member(each)) for each in arguments)
            clear = not any(isinstance(each, Enum) for each in arguments)
            values = frozenset(_plain_member(each) for each in arguments)
            return SeenForm(forms, clear, None, "Literal", values)
        if origin in _USED_UP:
            raise refused(path, f"{label_of(note)} is used up when it is read", "use a list")
        if origin in (*_SETS, *_LISTS):
            return self._list(origin, arguments, path)
        if origin is tuple:
            return self._tuple(arguments, path)
        if origin in _MAPS:
            return self._map(origin, arguments, path)
        return self._class(note, origin, path, extra)

    def _alias(self, alias: Any, path: str, extra: tuple[Any, ...]) -> SeenForm:
        if alias.__name__ in self._aliases:
            return self._itself()
        self._aliases.add(alias.__name__)
        found = self.annotation(alias.__value__, path, extra)
        self._aliases.discard(alias.__name__)
        return found

    def _itself(self) -> SeenForm:
        """A type that contains itself without a class between: what it holds is not followed."""
        self.model.python = True
        return _CLEAR[Any]

    def _union(self, arguments: tuple[Any, ...], path: str, extra: tuple[Any, ...]) -> SeenForm:
        decided = any(
            getattr(each, "discriminator", None) is not None
            or type(each).__name__ == "Discriminator"
            for each in extra
        )
        return union([self.annotation(each, path, ()) for each in arguments], path, decided=decided)

    def _list(self, origin: Any, arguments: tuple[Any, ...], path: str) -> SeenForm:
        self.model.python |= origin in _SETS or not arguments
        member = self.annotation(arguments[0] if arguments else Any, f"{path}[]", ())
        if origin in _SETS and "map" in member.forms:
            raise refused(path, "a set of maps has no order to be stored in", "use a list")
        shape = None if member.shape is None or origin in _SETS else Items(member.shape)
        clear = origin is list and member.clear
        return seen("list", clear=clear, shape=shape, label=label_of(origin))

    def _tuple(self, arguments: tuple[Any, ...], path: str) -> SeenForm:
        self.model.python |= not arguments
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            member = self.annotation(arguments[0], f"{path}[]", ())
            shape = None if member.shape is None else Items(member.shape)
            return seen("list", shape=shape, label="tuple")
        below = [self.annotation(each, f"{path}[{n}]", ()) for n, each in enumerate(arguments)]
        return _places(below)

    def _map(self, origin: Any, arguments: tuple[Any, ...], path: str) -> SeenForm:
        self.model.python |= not arguments
        key = arguments[0] if arguments else Any
        if origin is collections.OrderedDict:
            raise refused(path, "the order of keys is not stored", "use a dict, or a list of pairs")
        if origin is collections.Counter:
            arguments = (key, int)
        self._key(key, path)
        member = self.annotation(arguments[1] if arguments else Any, f"{path}[]", ())
        shape = None if member.shape is None else Values(member.shape)
        clear = origin is dict and key in (str, Any) and member.clear
        return seen("map", clear=clear, shape=shape, label=label_of(origin))

    def _key(self, note: Any, path: str) -> None:
        bare, _ = _unwrapped(note, ())
        found = _Walk().annotation(note, path, ())
        if typing.get_origin(bare) in _UNIONS and found.forms != {"text"}:
            reason = "keys of several types are all stored as text, and cannot be told apart"
            raise refused(path, reason, "give the keys one type")
        if found.forms & {"list", "map", "null"} or bare is bytes:
            reason = "a map has text keys, and these cannot be made of text"
            raise refused(path, reason, "use a list of pairs")

    # ------------------------------------------------------------ classes

    def _class(self, note: Any, origin: Any, path: str, extra: tuple[Any, ...]) -> SeenForm:
        made = self._made.get(note)
        if made is not None:
            return made
        if hasattr(note, "model_fields") and hasattr(note, "model_dump"):
            return self._model(note, path)
        if is_typed_dict(origin):
            return self._typed_dict(note, origin, path)
        if dataclasses.is_dataclass(origin):
            return self._dataclass(note, origin, path)
        if isinstance(note, type) and issubclass(note, tuple) and hasattr(note, "_fields"):
            hints = typing.get_type_hints(note, include_extras=True)
            names = note._fields
            return _places([self.annotation(hints.get(n, Any), f"{path}.{n}", ()) for n in names])
        if isinstance(note, type) and issubclass(note, Enum):
            return _enum(note, path)
        if origin is decimal.Decimal:
            return seen("text", "int", "float", label="Decimal")
        if _has_text(note, origin) or _is_secret(note):
            return seen("text", label=label_of(note))
        if origin is complex:
            return seen("text", label="complex")
        if hasattr(origin, "__get_pydantic_core_schema__") or extra:
            # It says itself how it is stored; whether that comes back is seen at the write.
            return seen("text", label=label_of(note))
        raise refused(path, f"{label_of(note)} is no type that can be stored", _OTHER)

    def _model(self, kind: Any, path: str) -> SeenForm:
        _complete(kind, path)
        if getattr(kind, "__pydantic_root_model__", False):
            self._made[kind] = self._itself()
            info = kind.model_fields["root"]
            found = self.annotation(info.annotation, path, tuple(info.metadata))
            self._made[kind] = found
            return found
        shape = Fields(label_of(kind))
        made = self._made[kind] = seen("map", shape=shape, label=shape.name)
        config = kind.model_config
        self._settings(shape, config, kind)
        decorators = getattr(kind, "__pydantic_decorators__", None)
        if decorators is None:
            raise refused(path, "it looks like a pydantic model and is none", _OTHER)
        custom = {
            name for each in decorators.field_serializers.values() for name in each.info.fields
        }
        self._fields(
            kind.model_fields, shape, path, custom, decided=not decorators.model_serializers
        )
        for name, info in kind.model_computed_fields.items():
            shape.known |= {name, info.alias} - {None}
        if kind.model_computed_fields and (shape.open or shape.closed):
            self.model.round_trip = True
        self.model.bare |= has_own_eq(kind)
        return made

    def _settings(self, shape: Fields, config: Mapping[str, Any], kind: Any) -> None:
        shape.open = config.get("extra") == "allow"
        shape.closed = config.get("extra") == "forbid"
        self.model.python |= shape.open
        self.model.lenient |= bool(config.get("strict"))

    def _fields(
        self,
        fields: Mapping[str, Any],
        shape: Fields,
        path: str,
        custom: set[str],
        *,
        decided: bool = True,
    ) -> None:
        aliases: dict[str, str] = {}
        for name, info in fields.items():
            where = f"{path}.{name}"
            if info.exclude or getattr(info, "exclude_if", None) is not None:
                raise refused(
                    where,
                    "pydantic leaves it out when the model is dumped, so it would not come back",
                    "take `exclude` off, make it a PrivateAttr, or use another model here",
                )
            extra = (*info.metadata, *([info] if info.discriminator is not None else []))
            if custom & {name, "*"}:
                extra += ("custom",)
            found = self.annotation(info.annotation, where, extra)
            aliases.update(dict.fromkeys(_aliases(info), name))
            shape.known.add(name)
            if info.is_required():
                shape.required.add(name)
            if found.values is not None and decided and "null" not in found.forms:
                shape.tags[name] = found.values
            if found.shape is not None and decided:
                shape.below[name] = found.shape
        for alias, name in aliases.items():
            if alias in shape.known and alias != name:
                raise refused(
                    f"{path}.{name}",
                    f"its alias {alias!r} is the name of another field",
                    "give it an alias of its own",
                )
        shape.known |= aliases.keys()
        self.model.by_name |= any(alias != name for alias, name in aliases.items())

    def _dataclass(self, note: Any, origin: Any, path: str) -> SeenForm:
        shape = Fields(label_of(note))
        made = self._made[note] = seen("map", shape=shape, label=shape.name)
        infos = getattr(origin, "__pydantic_fields__", None)
        self.model.bare |= has_own_eq(origin)
        if infos is not None:
            config = getattr(origin, "__pydantic_config__", None) or {}
            self._settings(shape, config, origin)
            self._fields(infos, shape, path, set())
            return made
        hints = _hints(origin, path)
        for each in dataclasses.fields(origin):
            found = self.annotation(hints[each.name], f"{path}.{each.name}", ())
            self._field(shape, each.name, found)
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
                shape.required.add(each.name)
        return made

    def _typed_dict(self, note: Any, origin: Any, path: str) -> SeenForm:
        shape = Fields(label_of(note))
        made = self._made[note] = seen("map", shape=shape, label=shape.name)
        for name, hint in _hints(origin, path).items():
            self._field(shape, name, self.annotation(hint, f"{path}.{name}", ()))
        shape.required |= origin.__required_keys__
        return made

    def _field(self, shape: Fields, name: str, found: SeenForm) -> None:
        shape.known.add(name)
        if found.shape is not None:
            shape.below[name] = found.shape
        if found.values is not None and "null" not in found.forms:
            shape.tags[name] = found.values

    def _metadata(self, extra: tuple[Any, ...]) -> None:
        for each in extra:
            name = each.__name__ if isinstance(each, type) else type(each).__name__
            self.model.round_trip |= name == "Json"
            self.model.lenient |= name == "Strict"


def _unwrapped(note: Any, extra: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """``note`` without what only wraps it, and the metadata of the wrapping."""
    while True:
        origin = typing.get_origin(note)
        if origin is typing.Annotated:
            note, extra = note.__origin__, (*extra, *note.__metadata__)
        elif origin in (typing.Required, typing.NotRequired, typing.Final):
            note = typing.get_args(note)[0]
        elif isinstance(note, typing.NewType):
            note = note.__supertype__
        else:
            return note, extra


def _complete(kind: Any, path: str) -> None:
    if getattr(kind, "__pydantic_complete__", True):
        return
    try:
        kind.model_rebuild()
    except AttributeError as error:
        raise refused(path, "it is no model of its own", "give a class derived from it") from error
    except Exception as error:
        reason = f"an annotation cannot be resolved ({_first_line(error)})"
        raise refused(path, reason, "define that class in a module, before this one") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].replace("`", "")


def _hints(kind: Any, path: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError) as error:
        reason = f"an annotation cannot be resolved ({error})"
        raise refused(path, reason, "define that class in a module, before this one") from error


def _places(below: list[SeenForm]) -> SeenForm:
    shapes = [each.shape for each in below]
    shape = Places(shapes) if any(each is not None for each in shapes) else None
    return seen("list", shape=shape, label="tuple")


def _enum(kind: type[Enum], path: str) -> SeenForm:
    values = [each.value for each in kind]
    if not all(isinstance(each, (str, int, float)) for each in values):
        reason = f"{kind.__name__} has members that are neither text nor numbers"
        raise refused(path, reason, "give its members values of text or numbers")
    forms = frozenset(form_of(each) for each in values)
    return SeenForm(forms, issubclass(kind, (str, int)), None, kind.__name__, frozenset(values))


def _plain_member(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _is_secret(note: Any) -> bool:
    origin = typing.get_origin(note) or note
    return isinstance(origin, type) and hasattr(origin, "get_secret_value")


def _has_text(note: Any, origin: Any) -> bool:
    return isinstance(origin, type) and (
        issubclass(origin, (*_AS_TEXT, re.Pattern)) or origin.__module__ in _AS_TEXT_MODULES
    )


def _aliases(info: Any) -> Iterator[str]:
    """Every key of a map that ``info``'s field can be read from, beside its name."""
    for alias in (info.alias, info.validation_alias):
        for each in getattr(alias, "choices", [alias]):
            first = getattr(each, "path", [each])[0]
            if isinstance(first, str):
                yield first


Dump = Callable[[Any], Any]

__all__ = ["Model", "examine_model"]

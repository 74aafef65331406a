"""What each kind of field does, found out by storing one: the tables of `docs/fields.md`.

python -m tests.db.fields      writes them anew
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import typing
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import attrs
import msgspec
import pydantic

from entidb.db import Database
from entidb.errors import ValueTypeError

PAGE: Final = Path(__file__).parents[2] / "docs" / "fields.md"


class Colour(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: int


class Inner(msgspec.Struct):
    n: int


class Unknown:
    """A class that nobody knows how to store."""


#: Annotation as it is written -> the annotation, and a value.
COMMON: Final[dict[str, tuple[Any, Any]]] = {
    "str": (str, "tea"),
    "int": (int, 3),
    "float": (float, 1.5),
    "bool": (bool, True),
    "bytes": (bytes, b"\x01"),
    "str | None": (str | None, None),
    "Any": (Any, {"a": [1]}),
    "list[int]": (list[int], [1, 2]),
    "dict[str, int]": (dict[str, int], {"a": 1}),
    "dict[int, str]": (dict[int, str], {1: "a"}),
    "tuple[int, str]": (tuple[int, str], (1, "a")),
    "tuple[int, ...]": (tuple[int, ...], (1, 2)),
    "set[int]": (set[int], {2, 1}),
    "frozenset[str]": (frozenset[str], frozenset("ba")),
    "datetime": (datetime.datetime, datetime.datetime(2030, 1, 2, 3, 4)),
    "date": (datetime.date, datetime.date(2030, 1, 2)),
    "time": (datetime.time, datetime.time(3, 4)),
    "timedelta": (datetime.timedelta, datetime.timedelta(minutes=5)),
    "UUID": (uuid.UUID, uuid.UUID(int=1)),
    "Decimal": (decimal.Decimal, decimal.Decimal("1.10")),
    "Path": (pathlib.PurePosixPath, pathlib.PurePosixPath("/a/b")),
    "IPv4Address": (ipaddress.IPv4Address, ipaddress.IPv4Address("10.0.0.1")),
    "Enum": (Colour, Colour.RED),
    "Literal": (Literal["a", "b"], "a"),
    "NamedTuple": (Point, Point(1, 2)),
    "int | str": (int | str, "a"),
    "datetime | str": (datetime.datetime | str, "a"),
    "set[int] | list[int]": (set[int] | list[int], [1]),
    "dict[tuple[int, int], str]": (dict[tuple[int, int], str], {(1, 2): "a"}),
    "an unknown class": (Unknown, Unknown()),
}


def dataclass_of(note: Any) -> Any:
    return dataclasses.make_dataclass("Kind", [("x", note)])


def attrs_of(note: Any) -> Any:
    return attrs.make_class("Kind", {"x": attrs.field(type=note)})


def struct_of(note: Any) -> Any:
    return msgspec.defstruct("Kind", [("x", note)])


def model_of(note: Any) -> Any:
    return pydantic.create_model("Kind", x=(note, ...))


LIBRARIES: Final[dict[str, Callable[[Any], Any]]] = {
    "dataclass": dataclass_of,
    "attrs": attrs_of,
    "msgspec": struct_of,
    "pydantic": model_of,
}


@dataclasses.dataclass
class WithDefaults:
    x: int = 1
    y: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Derived:
    x: int
    y: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.y = 2 * self.x


@dataclasses.dataclass
class NotCompared:
    x: int
    y: int = dataclasses.field(compare=False, default=0)


@dataclasses.dataclass
class WithInitVar:
    x: int
    y: dataclasses.InitVar[int] = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    x: int


@dataclasses.dataclass
class WithClassVar:
    x: int
    y: typing.ClassVar[int] = 7


@attrs.define
class Converted:
    x: int = attrs.field(converter=int)


@attrs.define
class Private:
    _x: int


@attrs.define
class Doubled:
    x: int = attrs.field(converter=lambda x: 2 * x)


class Renamed(msgspec.Struct, rename="camel"):
    some_name: int


class Tagged(msgspec.Struct, tag="t"):
    x: int


class AsArray(msgspec.Struct, array_like=True):
    x: int
    y: int = 0


class Omitting(msgspec.Struct, omit_defaults=True):
    x: int
    y: int = 0


class Forbidding(msgspec.Struct, forbid_unknown_fields=True):
    x: int


class Aliased(pydantic.BaseModel):
    x: int = pydantic.Field(alias="y")


class Excluding(pydantic.BaseModel):
    x: int = pydantic.Field(exclude=True)


class Secret(pydantic.BaseModel):
    x: pydantic.SecretStr


class Computing(pydantic.BaseModel):
    x: int

    @pydantic.computed_field
    def y(self) -> int:
        return 2 * self.x


class WithPrivate(pydantic.BaseModel):
    x: int
    _y: int = pydantic.PrivateAttr(default=7)


class OfJson(pydantic.BaseModel):
    x: pydantic.Json[list[int]]


class OfUrl(pydantic.BaseModel):
    x: pydantic.HttpUrl


class Allowing(pydantic.BaseModel, extra="allow"):
    x: int


class ForbiddingModel(pydantic.BaseModel, extra="forbid"):
    x: int


class Strict(pydantic.BaseModel, strict=True):
    x: datetime.date


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"


class Pet(pydantic.BaseModel):
    x: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


class Stripping(pydantic.BaseModel):
    x: Annotated[str, pydantic.StringConstraints(strip_whitespace=True)]


#: Words -> a value of a class that has this.
SPECIAL: Final[dict[str, dict[str, Callable[[], Any]]]] = {
    "dataclass": {
        "defaults, `default_factory`": lambda: WithDefaults(),
        "`field(init=False)`": lambda: Derived(3),
        "`field(compare=False)`": lambda: NotCompared(1, 2),
        "`InitVar`": lambda: WithInitVar(1, 2),
        "`ClassVar`": lambda: WithClassVar(1),
        "`frozen`, `slots`, `kw_only`": lambda: Frozen(x=1),
    },
    "attrs": {
        "a converter": lambda: Converted("1"),
        "a converter that changes its own result": lambda: Doubled(1),
        "a name with a leading underscore": lambda: Private(1),
    },
    "msgspec": {
        "`rename`": lambda: Renamed(1),
        "`tag`": lambda: Tagged(1),
        "`array_like`": lambda: AsArray(1),
        "`omit_defaults`": lambda: Omitting(1),
        "`forbid_unknown_fields`": lambda: Forbidding(1),
    },
    "pydantic": {
        "an alias": lambda: Aliased(y=1),
        "`exclude`": lambda: Excluding(x=1),
        "`SecretStr`": lambda: Secret(x=pydantic.SecretStr("key")),
        "a computed field": lambda: Computing(x=1),
        "a private attribute": lambda: WithPrivate(x=1),
        "`Json`": lambda: OfJson(x="[1]"),  # type: ignore[arg-type]
        "`HttpUrl`": lambda: OfUrl(x="http://a.example"),  # type: ignore[arg-type]
        '`extra="allow"`, and an unknown field': lambda: Allowing(x=1, z=2),  # type: ignore[call-arg]
        '`extra="forbid"`': lambda: ForbiddingModel(x=1),
        "`strict`": lambda: Strict(x=datetime.date(2030, 1, 2)),
        "a discriminated union": lambda: Pet(x=Cat()),
        "a constraint that changes the value": lambda: Stripping(x=" a "),
    },
}


def outcome(kind: Any, value: Any) -> str:
    """What is stored of ``value``, or that it is refused: which of them, it is tried here. What is
    stored has come back equal."""
    with Database.in_memory() as db:
        try:
            found = db.collection("fields", kind)
        except ValueTypeError:
            return "the class is refused"
        try:
            entity_id = found.add(value)
        except ValueTypeError:
            return "the value is refused"
        assert found[entity_id] == value
        return f"`{_shown(found.raw[entity_id])}`"


def _shown(stored: Any) -> str:
    stored = stored["x"] if isinstance(stored, dict) and list(stored) == ["x"] else stored
    if isinstance(stored, bytes):
        return repr(stored)
    return json.dumps(stored, ensure_ascii=False).replace("|", "\\|")


def tables() -> Iterator[str]:
    yield "## Types"
    yield ""
    yield f"| annotation | {' | '.join(LIBRARIES)} |"
    yield "|---|" + "---|" * len(LIBRARIES)
    for written, (note, value) in COMMON.items():
        cells = [_common(make, note, value) for make in LIBRARIES.values()]
        named = written if " class " in written else "`" + written.replace("|", "\\|") + "`"
        yield f"| {named} | " + " | ".join(cells) + " |"
    for library, rows in SPECIAL.items():
        yield ""
        yield f"## Of {library}"
        yield ""
        yield "| what the class has | is stored as |"
        yield "|---|---|"
        for words, make_value in rows.items():
            value = make_value()
            yield f"| {words} | {outcome(type(value), value)} |"


def _common(make: Callable[[Any], Any], note: Any, value: Any) -> str:
    try:
        kind = make(note)
    except pydantic.errors.PydanticSchemaGenerationError:
        return "no such class"
    return outcome(kind, kind(x=value))


def written(text: str) -> str:
    """``text`` of the page with the tables as they are now."""
    return text.partition("## Types")[0] + "\n".join(tables()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

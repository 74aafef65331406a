"""Typed collections: whatever a class can say comes back equal, or is refused with the field
named: when the collection is opened, or at the latest when the value is written."""

from __future__ import annotations

import collections
import dataclasses
import enum
import ipaddress
import pathlib
import re
import typing
import uuid
import zoneinfo
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import attrs
import msgspec
import numpy
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entidb.db import Database
from entidb.errors import CborEncodeError, EntiDBError, ValueTypeError
from tests.support import FakeClock, uid

LIBRARIES = ("dataclass", "attrs", "msgspec", "pydantic")
#: These leave it to the class and its annotations what a value may be.
UNCHECKED = ("dataclass", "attrs", "msgspec")


def class_with(library: str, kind: Any) -> Any:
    """A class of ``library`` with one field ``value`` of ``kind``."""
    if library == "dataclass":
        return dataclasses.make_dataclass("Holder", [("value", kind)])
    if library == "attrs":
        return attrs.make_class("Holder", {"value": attrs.field(type=kind)})
    if library == "msgspec":
        return msgspec.defstruct("Holder", [("value", kind)])
    config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    return pydantic.create_model("Holder", __config__=config, value=(kind, ...))


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(clock=FakeClock()) as opened:
        yield opened


class Colour(enum.Enum):
    RED = "red"


class Size(enum.Enum):
    LARGE = 2


class Level(enum.IntEnum):
    HIGH = 3


class Point(typing.NamedTuple):
    x: int
    y: int = 0


@dataclasses.dataclass(frozen=True)
class Inner:
    number: int
    parts: tuple[int, ...] = ()


BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
HALF_HOUR = timezone(timedelta(hours=5, minutes=30))

HELD: list[tuple[Any, Any]] = [
    (int, -(2**64)),
    (float, 1.5),
    (float, 3),
    (float, -0.0),
    (str, "ä\x00"),
    (bool, True),
    (bytes, b"\xff\x00"),
    (datetime, datetime(2026, 1, 1)),
    (datetime, datetime(2026, 1, 1, tzinfo=UTC)),
    (datetime, datetime(2026, 7, 1, tzinfo=BERLIN)),
    (datetime, datetime.max.replace(tzinfo=HALF_HOUR)),
    (date, date(1, 1, 1)),
    (time, time(1, 2, 3, 4)),
    (timedelta, timedelta(days=-3, microseconds=1)),
    (uuid.UUID, uid(7)),
    (Decimal, Decimal("1.10")),
    (Colour, Colour.RED),
    (Level, Level.HIGH),
    (typing.Literal["a", 1, None], 1),
    (int | None, None),
    (typing.Optional[date], date(2026, 1, 1)),  # noqa: UP045 -- both spellings are tried
    (list[int], [1, 2]),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], (1, 2, 3)),
    (set[int], {3, 1, 2}),
    (set[bytes], {b"\xff", b"a"}),
    (set[tuple[int, int]], {(2, 1), (1, 2)}),
    (frozenset[date], frozenset({date(2026, 1, 1)})),
    (dict[str, int], {"a": 1}),
    (dict[int, str], {1: "a"}),
    (dict[uuid.UUID, int], {uid(3): 1}),
    (dict[Colour, int], {Colour.RED: 1}),
    (int | str, "5"),
    (int | float, 1.0),
    (bool | int, True),
    (list[int] | int, [1]),
    (Colour | int, Colour.RED),
    (Any, {"a": [1, b"\xff", None]}),
    (Inner, Inner(1, (2,))),
    (list[Inner], [Inner(1)]),
    (dict[str, Inner], {"a": Inner(1)}),
    (Inner | None, Inner(2)),
    (Point, Point(1)),
    (pathlib.Path, pathlib.Path("/a/b")),
    (ipaddress.IPv6Address, ipaddress.IPv6Address("::1")),
    (typing.Annotated[int, "x"], 3),
]


def label(value: Any) -> str:
    if isinstance(value, set | frozenset):
        # The order of a set is another one in each process, and the processes compare these.
        return f"{type(value).__name__} of {sorted(map(str, value))}"[:40]
    # Nor may an address be in a name.
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:40]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("kind", "value"), HELD, ids=label)
def test_a_field_comes_back_equal_from_an_add_a_write_and_a_patch(
    db: Database, library: str, kind: Any, value: Any
) -> None:
    holder = class_with(library, kind)
    made = holder(value=value)
    holders = db.collection("holders", holder)
    key = holders.add(made)
    assert holders[key].value == value and type(holders[key]) is holder
    holders[key] = made
    holders.patch(key, value=value)
    assert holders[key].value == made.value
    assert db.verify() == []


REFUSED: list[Any] = [
    datetime | str,
    date | datetime,
    uuid.UUID | str,
    Colour | str,
    Decimal | float,
    list[int] | set[int],
    list[int] | tuple[int, ...],
    Any | date,
    dict[tuple[int, int], int],
    dict[bytes, int],
    dict[int | str, int],
    set[Inner],
    collections.OrderedDict[str, int],
    collections.abc.Iterator[int],
    typing.Callable[[], int],
    type[int],
    numpy.ndarray,
    memoryview,
    range,
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", REFUSED, ids=label)
def test_a_field_that_could_not_come_back_is_refused_when_the_collection_is_opened(
    db: Database, library: str, kind: Any
) -> None:
    holder = class_with(library, kind)
    with db.transaction() as tx, db.snapshot() as snapshot:
        for opened in (db.collection, tx.collection, snapshot.collection):
            with pytest.raises(ValueTypeError, match=r"value") as caught:
                opened("holders", holder)
            assert "Traceback" not in str(caught.value) and "`" not in str(caught.value)
    assert db.collections() == []


@pytest.mark.parametrize(
    "kind", ["Note", 5, uid(1), print, len, object(), typing, Inner(1), type(None), ValueError]
)
def test_what_is_no_class_of_values_is_refused(db: Database, kind: Any) -> None:
    with pytest.raises(ValueTypeError):
        db.collection("notes", kind)


@pytest.mark.parametrize("library", UNCHECKED)
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, "poison"),
        (str, datetime(2026, 1, 1)),
        (list[int], (1, 2)),
        (Any, date(2026, 1, 1)),
        (Any, (1, 2)),
        (float, float("inf")),
        (str, "\ud800"),
        (int, 2**70),
        (int, object()),
    ],
    ids=label,
)
def test_a_value_that_would_not_come_back_is_refused_when_it_is_written(
    db: Database, library: str, kind: Any, value: Any
) -> None:
    holder = class_with(library, kind)
    holders = db.collection("holders", holder)
    key = holders.add(holder(value=None)) if kind is Any else uid(1)
    before = db.sequence
    with pytest.raises((ValueTypeError, CborEncodeError), match=r"value|Holder"):
        holders.add(holder(value=value))
    with pytest.raises(EntiDBError):
        holders[key] = holder(value=value)
    assert db.sequence == before


def test_a_field_that_a_model_got_by_force_is_checked_too(db: Database) -> None:
    class Note(pydantic.BaseModel):
        count: int

    note = Note(count=1)
    note.count = "many"  # type: ignore[assignment]
    with pytest.raises(ValueTypeError, match="count") as caught:
        db.collection("notes", Note).add(note)
    assert caught.value.field == "count"


def _once(value: Any) -> Any:
    return value.replace(fold=0)


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**64), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.datetimes(timezones=st.none() | st.sampled_from([UTC, HALF_HOUR])).map(_once),
    st.dates(),
    st.times().map(_once),
    st.timedeltas(),
    st.uuids(),
    st.decimals(allow_nan=False, allow_infinity=False),
)


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_field_of_its_type_holds_comes_back(library: str, data: st.DataObject) -> None:
    value = data.draw(SCALARS)
    # Dates are no keys of msgspec's sets in every version; the scalar's own type is the subject.
    kind = type(value)
    shape: Any = data.draw(st.sampled_from([kind, list[kind], dict[str, kind], kind | None]))  # type: ignore[valid-type]
    if typing.get_origin(shape) is list:
        value = [value]
    elif typing.get_origin(shape) is dict:
        value = {"key": value}
    holder = class_with(library, shape)
    with Database.in_memory(clock=FakeClock()) as db:
        holders = db.collection("holders", holder)
        assert holders[holders.add(holder(value=value))].value == value


_BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
#: In the hour that comes twice when summer ends.
_TWICE = datetime(2026, 10, 25, 2, 30)
_PLACES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "itself": (datetime, lambda value: value),
    "optional": (datetime | None, lambda value: value),
    "in a list": (list[datetime], lambda value: [value]),
    "in a map": (dict[str, datetime], lambda value: {"at": value}),
}


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_second_of_two_equal_hours_is_refused_without_a_zone_and_kept_with_one(
    db: Database, library: str, place: str
) -> None:
    kind, put = _PLACES[place]
    cls = class_with(library, kind)
    collection = db.collection("c", cls)
    with pytest.raises(ValueTypeError, match="has fold=1, which is not stored; a time zone"):
        collection[uid(1)] = cls(value=put(_TWICE.replace(fold=1)))
    for fold, hours in ((0, 2), (1, 1)):
        collection[uid(1)] = cls(value=put(_TWICE.replace(tzinfo=_BERLIN, fold=fold)))
        zone = timezone(timedelta(hours=hours))
        assert collection[uid(1)].value == put(_TWICE.replace(tzinfo=zone))
    if place == "itself":
        with pytest.raises(ValueTypeError, match="fold=1"):
            collection.patch(uid(1), value=_TWICE.replace(fold=1))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_time_of_day_loses_neither_fold_nor_zone(db: Database, library: str) -> None:
    cls = class_with(library, time)
    collection = db.collection("c", cls)
    for value in (time(2, 30, fold=1), time(2, 30, tzinfo=_BERLIN)):
        with pytest.raises(ValueTypeError, match="value"):
            collection[uid(1)] = cls(value=value)
    for value in (time(2, 30), time(2, 30, tzinfo=UTC)):
        collection[uid(1)] = cls(value=value)
        assert collection[uid(1)].value.tzinfo == value.tzinfo


@pytest.mark.parametrize("library", LIBRARIES)
def test_equal_sets_are_equal_bytes(db: Database, library: str) -> None:
    holder = class_with(library, set[str])
    names = [f"name {n}" for n in range(50)]
    holders = db.collection("holders", holder)
    for order in (names, names[::-1]):
        made: set[str] = set()
        made.update(order)
        holders.add(holder(value=made))
    first, second = (payload for _, payload in holders.payloads())
    assert first == second


class Name(str):
    pass


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("kind", "value", "plain"),
    [
        (str, Name("a"), "a"),
        (float, numpy.float64(1.5), 1.5),
        (float, numpy.float64(-0.0), 0.0),
        (int, numpy.int64(4), 4),
        (bool, numpy.bool_(True), True),
        (str, numpy.str_("a"), "a"),
        (list[float], [numpy.float32(0.5)], [0.5]),
    ],
    ids=label,
)
def test_numpy_scalars_and_subclasses_become_the_plain_values_they_are(
    db: Database, library: str, kind: Any, value: Any, plain: Any
) -> None:
    holder = class_with(library, kind)
    made = holder(value=value) if library != "pydantic" else holder.model_construct(value=value)
    key = db.collection("holders", holder).add(made)
    stored = db.collection("holders")[key]["value"]
    assert stored == plain and type(stored) is type(plain)


def test_a_collection_without_a_type_takes_minus_zero_and_numpy_scalars_too(db: Database) -> None:
    notes = db.collection("notes")
    key = notes.add({"zero": [-0.0, 1.0], "count": numpy.int64(3), "yes": numpy.bool_(True)})
    assert notes[key] == {"zero": [0.0, 1.0], "count": 3, "yes": True}
    assert str(notes[key]["zero"][0]) == "0.0"
    endless: dict[str, Any] = {}
    endless["self"] = endless
    for wrong in ({"a": numpy.zeros(2)}, {"a": (1, 2)}, {"a": {1}}, endless):
        with pytest.raises(CborEncodeError):
            notes.add(wrong)


# ---------------------------------------------------------------- pydantic's own


def model(config: Any = None, **fields: Any) -> Any:
    return pydantic.create_model("Model", __config__=config, **fields)


def doubled(extra: str) -> Any:
    class Doubled(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra=extra)  # type: ignore[typeddict-item]
        number: int

        @pydantic.computed_field  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            return self.number * 2

    return Doubled


T = typing.TypeVar("T")


class Box(pydantic.BaseModel, typing.Generic[T]):
    content: T


class Cat(pydantic.BaseModel):
    kind: typing.Literal["cat"] = "cat"
    lives: int = 9


class Dog(pydantic.BaseModel):
    kind: typing.Literal["dog"] = "dog"
    bones: int = 1


class HasA(pydantic.BaseModel):
    a: int


class HasB(pydantic.BaseModel):
    b: int


class Plain(pydantic.BaseModel):
    x: int = 0


class PlainToo(pydantic.BaseModel):
    x: int = 0
    y: int = 0


@pydantic.dataclasses.dataclass
class Record:
    number: int
    raw: bytes = b"\xff"
    names: set[str] = dataclasses.field(default_factory=lambda: {"b", "a"})
    other: int = pydantic.Field(default=3, alias="another")


class Forest(pydantic.RootModel[dict[str, "Forest"]]):
    pass


FIELD = pydantic.Field
ALLOW, FORBID = pydantic.ConfigDict(extra="allow"), pydantic.ConfigDict(extra="forbid")
STRICT = pydantic.ConfigDict(strict=True)
CAMEL = pydantic.ConfigDict(alias_generator=str.title, serialize_by_alias=True)

MODELS: dict[str, Callable[[], Any]] = {
    "alias": lambda: model(price=(int, FIELD(alias="Price")))(Price=1),
    "validation alias": lambda: model(price=(int, FIELD(validation_alias="Price")))(Price=1),
    "serialization alias": lambda: model(price=(int, FIELD(serialization_alias="P")))(price=1),
    "alias path": lambda: model(
        price=(int, FIELD(validation_alias=pydantic.AliasPath("prices", 0)))
    )(prices=[1]),
    "alias choices": lambda: model(
        price=(int, FIELD(validation_alias=pydantic.AliasChoices("p", "q")))
    )(q=1),
    "alias generator": lambda: model(CAMEL, price=(int, ...))(Price=1),
    "secret": lambda: model(word=(pydantic.SecretStr, ...), raw=(pydantic.SecretBytes, ...))(
        word="open sesame", raw=b"\xff"
    ),
    "secret of another type": lambda: model(pin=(pydantic.Secret[int], ...))(pin=1234),
    "list of secrets": lambda: model(words=(list[pydantic.SecretStr], ...))(words=["a", "b"]),
    "extra allowed": lambda: model(ALLOW, a=(int, 1))(b=b"\xff", c=-0.0),
    "extra forbidden": lambda: model(FORBID, a=(int, 1))(a=2),
    "computed field": lambda: doubled("ignore")(number=1),
    "computed field, extra allowed": lambda: doubled("allow")(number=1, more=2),
    "computed field, extra forbidden": lambda: doubled("forbid")(number=1),
    "strict": lambda: model(STRICT, when=(datetime, ...), who=(uuid.UUID, ...))(
        when=datetime(2026, 1, 1), who=uid(1)
    ),
    "strict field": lambda: model(when=(date, FIELD(strict=True)))(when=date(2026, 1, 1)),
    "generic": lambda: Box[date](content=date(2026, 1, 1)),
    "generic without argument": lambda: Box(content=5),
    "root": lambda: pydantic.RootModel[list[int]]([1, 2]),
    "json": lambda: model(numbers=(pydantic.Json[list[int]], ...))(numbers="[1]"),
    "url": lambda: model(at=(pydantic.HttpUrl, ...))(at="https://example.org"),
    "discriminated union": lambda: model(
        pet=(typing.Annotated[Cat | Dog, FIELD(discriminator="kind")], ...)
    )(pet=Dog()),
    "union with a tag": lambda: model(pets=(list[Cat | Dog], ...))(pets=[Dog(), Cat()]),
    "union told apart by fields": lambda: model(it=(HasA | HasB, ...))(it=HasB(b=1)),
    "any json": lambda: model(it=(pydantic.JsonValue, ...))(it={"a": [1, None, "b"]}),
    "root that contains itself": lambda: Forest({"a": Forest({"b": Forest({})})}),
    "base64": lambda: model(it=(pydantic.Base64Bytes, ...))(it=b"YQ=="),
    "callable discriminator": lambda: model(
        pet=(
            typing.Annotated[
                typing.Annotated[Cat, pydantic.Tag("cat")]
                | typing.Annotated[Dog, pydantic.Tag("dog")],
                pydantic.Discriminator(lambda v: v["kind"] if isinstance(v, dict) else v.kind),
            ],
            ...,
        )
    )(pet=Dog()),
    "dataclass": lambda: Record(1),
    "bytes or text": lambda: model(it=(bytes | str, ...))(it=b"a"),
    "default dict": lambda: model(counts=(collections.Counter[str], ...))(counts={"a": 1}),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_a_model_can_be_told_comes_back_equal(db: Database, make: Callable[[], Any]) -> None:
    value = make()
    models = db.collection("models", type(value))
    key = models.add(value)
    models[key] = value
    assert models[key] == value and type(models[key]) is type(value)
    with db.transaction() as tx:
        assert tx[models][key] == value


def test_a_secret_is_stored_and_not_its_stars(db: Database) -> None:
    kind = model(word=(pydantic.SecretStr, ...))
    key = db.collection("words", kind).add(kind(word="open sesame"))
    assert db.collection("words")[key] == {"word": "open sesame"}
    with pytest.raises(ValueTypeError) as caught:
        db.collection("words", model(word=(int, ...)))[key]
    assert "sesame" not in str(caught.value)


EXCLUDED: Any = model(seen=(int, FIELD(exclude=True)))


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (EXCLUDED, "seen"),
        (model(deep=(list[EXCLUDED], ...)), r"deep\[\]\.seen"),
        (model(seen=(int, FIELD(exclude_if=bool))), "seen"),
        (model(a=(int, FIELD(alias="b")), b=(int, FIELD(alias="a"))), "a"),
        (model(it=(Plain | PlainToo, ...)), "it"),
        (model(it=(Plain | dict[str, int], ...)), "it"),
        (model(it=(pydantic.SecretStr | str, ...)), "it"),
    ],
)
def test_a_model_that_could_not_come_back_is_refused_with_its_field(
    db: Database, kind: Any, field: str
) -> None:
    with pytest.raises(ValueTypeError, match=rf"Model\.{field}: "):
        db.collection("models", kind)


def test_serializers_and_validators_are_believed_when_they_fit_each_other(db: Database) -> None:
    class Year(pydantic.BaseModel):
        when: date

        @pydantic.field_serializer("when")
        def short(self, when: date) -> Any:
            return when.year if when.year < 2000 else when.isoformat()

    years = db.collection("years", Year)
    key = years.add(Year(when=date(2026, 5, 1)))
    assert years[key] == Year(when=date(2026, 5, 1))
    with pytest.raises(ValueTypeError, match="when"):
        years.add(Year(when=date(1999, 5, 1)))


def test_private_attributes_are_no_data(db: Database) -> None:
    class Note(pydantic.BaseModel):
        text: str
        _cache: int = 0

    note = Note(text="a")
    note._cache = 7
    notes = db.collection("notes", Note)
    assert notes[notes.add(note)].text == "a"


def test_a_subclass_would_lose_its_fields_and_is_refused(db: Database) -> None:
    class Base(pydantic.BaseModel):
        a: int = 1

    class Derived(Base):
        b: int = 2

    Holder = model(it=(Base, ...))
    for kind, value in ((Base, Derived()), (Holder, Holder(it=Derived()))):
        with pytest.raises(ValueTypeError, match="Derived and comes back as Base"):
            db.collection("bases", kind).add(value)


# ---------------------------------------------------------------- the other libraries' own


@dataclasses.dataclass
class Unequal:
    a: int
    b: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass
class Counting:
    a: int

    def __post_init__(self) -> None:
        self.a += 1


@dataclasses.dataclass
class OwnEquality:
    a: int
    b: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnEquality) and self.a == other.a


@attrs.define
class Converting:
    a: int = attrs.field(converter=lambda text: int(text) + 1)


@attrs.define
class Private:
    _a: int


@dataclasses.dataclass
class WithInit:
    a: int
    b: dataclasses.InitVar[int] = 0


class Row(msgspec.Struct, array_like=True, tag="row"):
    a: int
    b: int = 0


class Renamed(msgspec.Struct, rename="camel", omit_defaults=True, forbid_unknown_fields=True):
    some_name: int = 3
    other_name: str | msgspec.UnsetType = msgspec.UNSET


class Left(msgspec.Struct, tag="left"):
    a: int


class Right(msgspec.Struct, tag="right"):
    a: int


class Movie(typing.TypedDict):
    title: str
    year: typing.NotRequired[int]


@dataclasses.dataclass
class Tree:
    name: str
    children: list[Tree] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class WithModel:
    pet: Cat
    pets: list[Dog]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Unequal, Unequal(1, b=[5])),
        (Converting, Converting("1")),
        (Row, Row(1, 2)),
        (Renamed, Renamed(4)),
        (Renamed, Renamed(other_name="a")),
        (Left | Right, Right(1)),
        (Movie, {"title": "Up"}),
        (Tree, Tree("a", [Tree("b")])),
        (WithModel, WithModel(Cat(lives=1), [Dog()])),
        (Point, Point(1)),
        (int, 5),
        (list[Left], [Left(1)]),
        (dict[str, Cat], {"tom": Cat()}),
        (date, date(2026, 1, 1)),
        (int | str, "a"),
        (typing.Optional[int], 5),  # noqa: UP045
        (Any, {"a": 1}),
    ],
    ids=label,
)
def test_what_the_other_libraries_can_be_told_comes_back_equal(
    db: Database, kind: Any, value: Any
) -> None:
    values = db.collection("values", kind)
    assert values[values.add(value)] == value
    if isinstance(value, Unequal):
        assert next(iter(values.values())).b == [5]


@pytest.mark.parametrize(
    ("kind", "value", "field"),
    [
        (Counting, Counting(1), "a"),
        (OwnEquality, OwnEquality(1, date(2026, 1, 1)), "b"),
        (Unequal, Unequal(1, b=(1,)), "b"),
        (Movie, {"title": "Up", "stars": 5}, "stars"),
        (Tree, Tree("a", [Tree("b", [Tree(5)])]), r"children\[0\]\.children\[0\]\.name"),  # type: ignore[arg-type]
    ],
    ids=label,
)
def test_what_only_a_value_shows_is_refused_at_the_write_with_its_field(
    db: Database, kind: Any, value: Any, field: str
) -> None:
    values = db.collection("values", kind)
    with pytest.raises(ValueTypeError, match=field):
        values.add(value)
    assert len(values) == 0


@pytest.mark.parametrize(("kind", "field"), [(Private, "_a"), (WithInit, "b")])
def test_fields_that_a_library_does_not_give_out_are_refused(
    db: Database, kind: Any, field: str
) -> None:
    with pytest.raises(ValueTypeError, match=rf"\.{field}: "):
        db.collection("values", kind)


# ---------------------------------------------------------------- rows that do not fit


class Item(pydantic.BaseModel):
    title: str
    price: int


class ItemStruct(msgspec.Struct):
    title: str
    price: int


@pytest.mark.parametrize("kind", [Item, ItemStruct])
@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"title": "tea"}, "price", "missing"),
        ({"title": "tea", "price": "much"}, "price", "int"),
        ("no map", None, ""),
    ],
)
def test_a_row_that_does_not_fit_names_collection_id_field_and_reason(
    db: Database, kind: Any, row: Any, field: str | None, reason: str
) -> None:
    db.collection("items")[uid(3)] = row
    items = db.collection("items", kind)
    with db.transaction() as tx, db.snapshot() as snapshot:
        reads: list[Callable[[], Any]] = [
            lambda: items[uid(3)],
            lambda: items.get(uid(3)),
            lambda: items.get_many([uid(3)]),
            lambda: list(items.values()),
            lambda: list(items.items()),
            lambda: list(items.range()),
            lambda: tx.collection("items", kind)[uid(3)],
            lambda: snapshot.collection("items", kind)[uid(3)],
        ]
        for read in reads:
            with pytest.raises(ValueTypeError) as caught:
                read()
            error = caught.value
            assert (error.collection, error.entity_id, error.field) == ("items", uid(3), field)
            assert reason in (error.reason or "")
            assert str(uid(3)) in str(error) and "'items'" in str(error)
            assert "$." not in str(error) and "`" not in str(error)


class NoMembers(enum.Enum):
    pass


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (datetime | str, "ambiguous"),
        (bytes | str, "ambiguous"),
        (NoMembers, "no members"),
        (dict[Mixed, int], "neither all text nor all whole numbers"),
    ],
    ids=repr,
)
def test_what_cannot_make_a_collection_by_itself_is_refused_in_our_words(
    kind: Any, said: str
) -> None:
    with Database.in_memory() as db, pytest.raises(ValueTypeError, match=said) as caught:
        db.collection("c", kind)
    assert "str-like" not in str(caught.value) and "{}" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, int, dict[str, int], date])
def test_a_value_that_does_not_fit_is_a_map_or_a_list_in_messages(kind: Any) -> None:
    with Database.in_memory() as db:
        made = db["c"].add({"a": [1]}), db["c"].add("yesterday")
        for entity_id in made:
            with pytest.raises(ValueTypeError) as caught:
                db.collection("c", kind)[entity_id]
            assert not re.search("array|object|RFC", str(caught.value))

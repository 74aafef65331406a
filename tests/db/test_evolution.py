"""Two versions of a program and one database: what the older one does not know, it does not
erase; and ``patch`` changes what it names and nothing else."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

from entidb.db import Database
from entidb.db.rows import SnapshotRows
from entidb.errors import EntiDBError, ValueTypeError
from tests.support import FakeClock, uid


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(clock=FakeClock()) as opened:
        yield opened


@dataclasses.dataclass
class LineD:
    name: str
    count: int = 1


@dataclasses.dataclass
class PlaceD:
    city: str


@dataclasses.dataclass
class OrderD:
    title: str
    lines: list[LineD] = dataclasses.field(default_factory=list)
    place: PlaceD | None = None
    named: dict[str, LineD] = dataclasses.field(default_factory=dict)
    pair: tuple[LineD, int] | None = None


@attrs.define
class LineA:
    name: str
    count: int = 1


@attrs.define
class PlaceA:
    city: str


@attrs.define
class OrderA:
    title: str
    lines: list[LineA] = attrs.field(factory=list)
    place: PlaceA | None = None
    named: dict[str, LineA] = attrs.field(factory=dict)
    pair: tuple[LineA, int] | None = None


class LineM(msgspec.Struct):
    name: str
    count: int = 1


class PlaceM(msgspec.Struct):
    city: str


class OrderM(msgspec.Struct, omit_defaults=True):
    title: str
    lines: list[LineM] = []
    place: PlaceM | None = None
    named: dict[str, LineM] = {}
    pair: tuple[LineM, int] | None = None


class LineP(pydantic.BaseModel):
    name: str
    count: int = 1


class PlaceP(pydantic.BaseModel):
    city: str


class OrderP(pydantic.BaseModel):
    title: str
    lines: list[LineP] = []
    place: PlaceP | None = None
    named: dict[str, LineP] = {}
    pair: tuple[LineP, int] | None = None


class LineT(typing.TypedDict):
    name: str
    count: int


class PlaceT(typing.TypedDict):
    city: str


class OrderT(typing.TypedDict):
    title: str
    lines: list[LineT]
    place: PlaceT | None
    named: dict[str, LineT]
    pair: tuple[LineT, int] | None


CLASSES = [OrderD, OrderA, OrderM, OrderP, OrderT]
OF_OBJECTS = CLASSES[:-1]


def line(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "count": 1, **more}


def stored() -> dict[str, Any]:
    """An entity as a newer program wrote it."""
    return {
        "title": "first",
        "lines": [line("tea", unit="g"), line("salt", unit="kg")],
        "place": {"city": "Ulm", "zip": "89073"},
        "named": {"gift": line("cup", wrapped=True), "rest": line("pot", wrapped=False)},
        "pair": [line("pan", lid=True), 3],
        "photos": ["p1", b"\xff"],
    }


def set_field(value: Any, name: str, to: Any) -> None:
    if isinstance(value, dict):
        value[name] = to
    else:
        setattr(value, name, to)


def get_field(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, dict) else getattr(value, name)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("way", ["collection", "transaction", "update", "put_many"])
def test_fields_a_class_does_not_know_survive_its_write(db: Database, kind: Any, way: str) -> None:
    db.collection("orders")[uid(1)] = stored()
    orders = db.collection("orders", kind)
    value = orders[uid(1)]
    set_field(value, "title", "second")
    if way == "collection":
        orders[uid(1)] = value
    elif way == "transaction":
        with db.transaction() as tx:
            tx[orders][uid(1)] = value
    elif way == "update":
        orders.update({uid(1): value})
    else:
        orders.put_many([(uid(1), value)])
    assert db.collection("orders")[uid(1)] == {**stored(), "title": "second"}
    assert orders[uid(1)] == value


@pytest.mark.parametrize("kind", CLASSES)
def test_with_exact_they_are_erased(db: Database, kind: Any) -> None:
    db.collection("orders")[uid(1)] = stored()
    orders = db.collection("orders", kind, exact=True)
    orders[uid(1)] = orders[uid(1)]
    assert "photos" not in db.collection("orders")[uid(1)]
    db.collection("orders")[uid(1)] = stored()
    with db.transaction() as tx:
        inside = tx.collection("orders", kind, exact=True)
        inside[uid(1)] = inside[uid(1)]
    assert "photos" not in db.collection("orders")[uid(1)]
    assert "zip" not in db.collection("orders")[uid(1)]["place"]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_field_the_class_knows_can_be_taken_away(db: Database, kind: Any) -> None:
    db.collection("orders")[uid(1)] = stored()
    orders = db.collection("orders", kind)
    value = orders[uid(1)]
    set_field(value, "lines", [])
    set_field(value, "place", None)
    del get_field(value, "named")["gift"]
    orders[uid(1)] = value
    now = db.collection("orders")[uid(1)]
    assert not now.get("lines") and now.get("place") is None and "gift" not in now["named"]
    assert now["named"]["rest"]["wrapped"] is False and now["photos"] == ["p1", b"\xff"]
    assert orders[uid(1)] == value


@pytest.mark.parametrize("kind", CLASSES)
def test_the_write_of_a_transaction_before_counts_as_stored(db: Database, kind: Any) -> None:
    with db.transaction() as tx:
        tx["orders"][uid(1)] = stored()
        orders = tx.collection("orders", kind)
        orders[uid(1)] = orders[uid(1)]
        assert tx["orders"][uid(1)] == stored()
        del orders[uid(1)]
        orders[uid(1)] = kind("new") if kind not in (OrderP, OrderT) else new_of(kind)
        assert "photos" not in tx["orders"][uid(1)]


def new_of(kind: Any) -> Any:
    if kind is OrderT:
        return {"title": "new", "lines": [], "place": None, "named": {}, "pair": None}
    return kind(title="new")


def lines_after(db: Database, kind: Any, change: Any) -> list[dict[str, Any]]:
    """What is stored when a program that knows no units changes a list of three lines."""
    before = [line("tea", unit="g"), line("salt", unit="kg"), line("oil", unit="l")]
    db.collection("orders")[uid(1)] = {**stored(), "lines": before}
    orders = db.collection("orders", kind)
    value = orders[uid(1)]
    set_field(value, "lines", change(list(get_field(value, "lines"))))
    orders[uid(1)] = value
    assert orders[uid(1)] == value
    found: list[dict[str, Any]] = db.collection("orders")[uid(1)]["lines"]
    return found


@pytest.mark.parametrize("kind", CLASSES)
def test_members_of_a_list_keep_what_is_theirs_through_changes(db: Database, kind: Any) -> None:
    def renamed(lines: list[Any]) -> list[Any]:
        set_field(lines[1], "name", "pepper")
        return lines

    def one_more(lines: list[Any]) -> list[Any]:
        set_field(lines[1], "count", 5)
        return [new_line(lines[0]), *lines]

    def new_line(like: Any) -> Any:
        return line("new") if isinstance(like, dict) else type(like)(name="new", count=7)

    def units(change: Any) -> list[Any]:
        return [(each["name"], each.get("unit")) for each in lines_after(db, kind, change)]

    tea, salt, oil = ("tea", "g"), ("salt", "kg"), ("oil", "l")
    assert units(lambda lines: lines) == [tea, salt, oil]
    assert units(lambda lines: lines[::-1]) == [oil, salt, tea]
    assert units(lambda lines: lines[1:]) == [salt, oil]
    assert units(lambda lines: [*lines, new_line(lines[0])]) == [tea, salt, oil, ("new", None)]
    assert units(renamed) == [tea, ("pepper", "kg"), oil]
    assert units(one_more) == [("new", None), tea, salt, oil]


def test_members_with_an_id_are_told_apart_by_it(db: Database) -> None:
    class Part(pydantic.BaseModel):
        id: int
        name: str

    class Whole(pydantic.BaseModel):
        parts: list[Part]

    db.collection("wholes")[uid(1)] = {
        "parts": [{"id": n, "name": f"part {n}", "weight": n * 10} for n in (1, 2, 3)]
    }
    wholes = db.collection("wholes", Whole)
    wholes[uid(1)] = Whole(parts=[Part(id=3, name="c"), Part(id=4, name="d"), Part(id=1, name="a")])
    assert db.collection("wholes")[uid(1)]["parts"] == [
        {"id": 3, "name": "c", "weight": 30},
        {"id": 4, "name": "d"},
        {"id": 1, "name": "a", "weight": 10},
    ]


def test_in_a_union_only_the_same_member_keeps_its_fields(db: Database) -> None:
    class Cat(pydantic.BaseModel):
        kind: typing.Literal["cat"] = "cat"

    class Dog(pydantic.BaseModel):
        kind: typing.Literal["dog"] = "dog"

    class Home(pydantic.BaseModel):
        pet: Cat | Dog

    homes = db.collection("homes", Home)
    for pet, kept in ((Cat(), {"kind": "cat", "lives": 9}), (Dog(), {"kind": "dog"})):
        db.collection("homes")[uid(1)] = {"pet": {"kind": "cat", "lives": 9}}
        homes[uid(1)] = Home(pet=pet)
        assert db.collection("homes")[uid(1)] == {"pet": kept}


def test_a_struct_that_is_stored_as_a_list_keeps_what_stands_behind(db: Database) -> None:
    class Row(msgspec.Struct, array_like=True):
        a: int
        b: int = 0

    db.collection("rows")[uid(1)] = [1, 2, "newer", {"x": 1}]
    rows = db.collection("rows", Row)
    rows[uid(1)] = Row(5, 6)
    assert db.collection("rows")[uid(1)] == [5, 6, "newer", {"x": 1}]


def test_a_model_that_carries_unknown_fields_itself_decides_about_them(db: Database) -> None:
    class Open(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        title: str

    db.collection("notes")[uid(1)] = {"title": "a", "more": 1}
    notes = db.collection("notes", Open)
    value = notes[uid(1)]
    value.title = "b"
    notes[uid(1)] = value
    assert db.collection("notes")[uid(1)] == {"title": "b", "more": 1}
    notes[uid(1)] = Open(title="c")
    assert db.collection("notes")[uid(1)] == {"title": "c"}


class ClosedP(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    title: str


class ClosedM(msgspec.Struct, forbid_unknown_fields=True):
    title: str


@pytest.mark.parametrize("kind", [ClosedP, ClosedM])
def test_a_class_that_forbids_unknown_fields_may_not_write_over_them(
    db: Database, kind: Any
) -> None:
    db.collection("notes")[uid(1)] = {"title": "a", "photos": ["p1"]}
    notes = db.collection("notes", kind)
    for write in (
        lambda: notes.__setitem__(uid(1), kind(title="b")),
        lambda: notes.update({uid(1): kind(title="b")}),
        lambda: notes.patch(uid(1), title="b"),
        lambda: notes[uid(1)],
    ):
        with pytest.raises(ValueTypeError, match="photos") as caught:
            write()
        assert (caught.value.collection, caught.value.entity_id) == ("notes", uid(1))
    assert db.collection("notes")[uid(1)] == {"title": "a", "photos": ["p1"]}
    db.collection("notes", kind, exact=True)[uid(1)] = kind(title="b")
    assert notes[uid(1)] == kind(title="b")


def test_a_name_a_model_is_read_from_is_not_left_beside_its_field(db: Database) -> None:
    class Aliased(pydantic.BaseModel):
        price: int = pydantic.Field(alias="Price")

    db.collection("items")[uid(1)] = {"Price": 1, "other": 2}
    items = db.collection("items", Aliased)
    assert items[uid(1)].price == 1
    items.patch(uid(1), price=5)
    assert db.collection("items")[uid(1)] == {"price": 5, "other": 2}
    db.collection("items")[uid(1)] = {"Price": 1, "other": 2}
    items[uid(1)] = Aliased(Price=7)
    assert db.collection("items")[uid(1)] == {"price": 7, "other": 2}


def test_a_write_that_needs_nothing_of_what_is_stored_does_not_read_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.collection("orders")[uid(1)] = stored()
    read: list[str] = []
    before = SnapshotRows.get

    def get(rows: SnapshotRows, name: str, entity_id: bytes) -> bytes | None:
        read.append(name)
        return before(rows, name, entity_id)

    monkeypatch.setattr(SnapshotRows, "get", get)
    value = OrderD("new")
    db.collection("orders", OrderD).add(value)
    db.collection("orders", OrderD, exact=True)[uid(1)] = value
    db.collection("orders")[uid(1)] = {"title": "plain"}
    db.collection("numbers", dict[str, int])[uid(1)] = {"a": 1}
    with db.transaction() as tx:
        tx.collection("orders", OrderD).add(value)
        tx.collection("orders")[uid(1)] = {"title": "plain"}
    assert read == []
    db.collection("orders", OrderD)[uid(1)] = value
    assert read == ["orders"]


# ---------------------------------------------------------------- patch


@pytest.mark.parametrize("kind", [None, *CLASSES])
def test_a_patch_changes_the_named_field_and_nothing_else(db: Database, kind: Any) -> None:
    db.collection("orders")[uid(1)] = stored()
    orders = db.collection("orders", kind) if kind else db.collection("orders")
    orders.patch(uid(1), title="second")
    assert db.collection("orders")[uid(1)] == {**stored(), "title": "second"}
    with db.transaction() as tx:
        tx[orders].patch(uid(1), {"title": "third"})
    assert db.collection("orders")[uid(1)] == {**stored(), "title": "third"}


@pytest.mark.parametrize("kind", OF_OBJECTS)
def test_a_patch_converts_and_keeps_as_a_write_does(db: Database, kind: Any) -> None:
    db.collection("orders")[uid(1)] = stored()
    orders = db.collection("orders", kind)
    place = type(orders[uid(1)].place)(city="Bonn")
    orders.patch(uid(1), place=place)
    assert db.collection("orders")[uid(1)]["place"] == {"city": "Bonn", "zip": "89073"}
    orders.patch(uid(1), place=None, lines=[])
    assert orders[uid(1)].place is None and orders[uid(1)].lines == []
    assert db.collection("orders")[uid(1)]["photos"] == ["p1", b"\xff"]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_patch_that_does_not_fit_the_class_changes_nothing(db: Database, kind: Any) -> None:
    db.collection("orders")[uid(1)] = stored()
    orders, before = db.collection("orders", kind), db.sequence
    wrongs: list[dict[str, Any]] = [
        {"title": 5},
        {"titel": "x"},
        {"photos": []},
        {"lines": [{"name": 7}]},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueTypeError, match=next(iter(wrong))) as caught:
            orders.patch(uid(1), wrong)
        assert caught.value.entity_id == uid(1)
    with pytest.raises(EntiDBError):
        orders.patch(uid(1), title="\ud800")
    with pytest.raises(KeyError):
        orders.patch(uid(9), title="x")
    with pytest.raises(ValueTypeError):
        orders.patch("x", title="x")  # type: ignore[arg-type]
    assert db.sequence == before


def test_a_patch_that_changes_nothing_writes_nothing(db: Database) -> None:
    db.collection("orders")[uid(1)] = stored()
    before = db.sequence
    db.collection("orders", OrderD).patch(uid(1), title="first")
    db.collection("orders").patch(uid(1), title="first")
    db.collection("orders", OrderD).patch(uid(1))
    assert db.sequence == before


def test_a_patch_mends_the_field_that_made_an_entity_unreadable(db: Database) -> None:
    for kind in (LineP, LineD, LineM):
        db.collection("lines")[uid(1)] = {"name": "a", "count": "many", "new": 1}
        lines: Any = db.collection("lines", kind)
        lines.patch(uid(1), count=3)
        assert db.collection("lines")[uid(1)] == {"name": "a", "count": 3, "new": 1}


def test_what_a_model_computes_follows_a_patch(db: Database) -> None:
    class Sum(pydantic.BaseModel):
        price: int
        count: int = 2

        @pydantic.computed_field  # type: ignore[prop-decorator]
        @property
        def total(self) -> int:
            return self.price * self.count

    sums = db.collection("sums", Sum)
    key = sums.add(Sum(price=3))
    sums.patch(key, price=4)
    assert db.collection("sums")[key] == {"price": 4, "count": 2, "total": 8}


def test_an_untyped_patch_needs_a_map(db: Database) -> None:
    db.collection("values")[uid(1)] = [1]
    with pytest.raises(ValueTypeError, match="no map"):
        db.collection("values").patch(uid(1), a=1)

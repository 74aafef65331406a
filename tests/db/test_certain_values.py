"""Values that are not read back before they are stored: reading them would prove nothing."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb.db.certain import certain
from entidb.db.typed import MsgspecCodec
from entidb.errors import EntiDBError


@dataclasses.dataclass
class Note:
    title: str
    stars: int
    done: bool
    price: float
    tags: list[str]
    owner: str | None = None
    raw: bytes = b""
    counts: list[int | None] | None = None


class Row(msgspec.Struct, rename="camel", omit_defaults=True, tag=True):
    first_name: str
    age: int = 0
    marks: list[float] = []


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int


class Loud(str):
    pass


class Level(int):
    pass


NOTE: dict[str, Any] = {"title": "a", "stars": 1, "done": True, "price": 0.5, "tags": ["b"]}


@pytest.mark.parametrize(
    "value", [Note(**NOTE), Note(**NOTE, owner="c", counts=[1, None]), Row("a", 2, [0.5]), Point(3)]
)
def test_an_ordinary_value_is_stored_without_reading_it_back(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec: MsgspecCodec[Any] = MsgspecCodec(type(value))
    payload = codec.encode(value)
    assert codec.decode(payload) == value
    monkeypatch.setattr(codec, "_value", lambda plain: pytest.fail("it was read back"))
    assert codec.encode(value) == payload


@pytest.mark.parametrize(
    "change",
    [
        {"title": Loud("a")},
        {"title": 1},
        {"stars": Level(1)},
        {"stars": True},
        {"price": 1},
        {"tags": ("b",)},
        {"tags": ["b", Loud("c")]},
        {"tags": None},
        {"owner": 5},
        {"counts": ["x"]},
        {"counts": [[1]]},
    ],
)
def test_a_value_of_another_class_than_annotated_is_not_certain(change: dict[str, Any]) -> None:
    comes_back = certain(Note)
    assert comes_back is not None and comes_back(Note(**NOTE))
    assert not comes_back(Note(**{**NOTE, **change}))


def test_a_subclass_and_a_value_without_a_field_are_not_certain() -> None:
    class More(Note):
        pass

    comes_back = certain(Note)
    assert comes_back is not None and not comes_back(More(**NOTE))
    without = Note(**NOTE)
    del without.title
    assert not comes_back(without)


def with_hook(**members: Any) -> type:
    return dataclasses.dataclass(type("Hooked", (), {"__annotations__": {"x": int}, **members}))


@dataclasses.dataclass
class Half:
    x: int
    y: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass
class Uncompared:
    x: int
    y: int = dataclasses.field(compare=False, default=0)


@dataclasses.dataclass
class Limited:
    x: typing.Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass
class Nested:
    x: list[list[int]]


@dataclasses.dataclass
class Several:
    x: dict[str, int]


class Listed(msgspec.Struct, array_like=True):
    x: int


class Prepared(msgspec.Struct):
    x: int

    def __post_init__(self) -> None:
        self.x = abs(self.x)


@attrs.define
class Converted:
    x: int = attrs.field(converter=abs)


@pytest.mark.parametrize(
    "kind",
    [
        Half,
        Uncompared,
        Limited,
        Nested,
        Several,
        Listed,
        Prepared,
        Converted,
        int,
        list[Note],
        Note | Row,
        with_hook(__post_init__=lambda self: None),
        with_hook(__eq__=lambda self, other: True),
        with_hook(__setattr__=lambda self, name, value: None),
        with_hook(__getattribute__=lambda self, name: 1),
        with_hook(__new__=lambda cls, *given: object.__new__(cls)),
        with_hook(x=property(lambda self: 1, lambda self, value: None)),
    ],
)
def test_nothing_is_certain_of_a_class_that_does_something_itself(kind: Any) -> None:
    assert certain(kind) is None


@given(
    st.builds(
        Note,
        title=st.text(max_size=3) | st.just(Loud("x")) | st.none(),
        stars=st.integers(-(2**64), 2**64 - 1) | st.booleans() | st.just(Level(2)),
        done=st.booleans() | st.integers(0, 1),
        price=st.floats() | st.integers(0, 3),
        tags=st.lists(st.text(max_size=2) | st.none(), max_size=3),
        owner=st.none() | st.text(max_size=2) | st.binary(max_size=2),
        raw=st.binary(max_size=3),
        counts=st.none() | st.lists(st.none() | st.integers(0, 5) | st.floats(0, 1), max_size=3),
    )
)
def test_what_is_certain_is_what_reading_back_would_accept(value: Note) -> None:
    codec: MsgspecCodec[Note] = MsgspecCodec(Note)
    careful: MsgspecCodec[Note] = MsgspecCodec(Note)
    careful._certain = None
    assert result(codec, value) == result(careful, value)


def result(codec: MsgspecCodec[Note], value: Note) -> bytes | str:
    try:
        return codec.encode(value)
    except EntiDBError as error:
        return str(error)

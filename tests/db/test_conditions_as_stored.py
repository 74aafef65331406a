"""A value in a condition is compared as collections of every kind of class store it."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

from entidb import Database, F, Index, QueryError


def _classes(kind: Any) -> list[Any]:
    return [
        dataclasses.make_dataclass("OfDataclass", [("x", kind)]),
        attrs.make_class("OfAttrs", {"x": attrs.field(type=kind)}),
        msgspec.defstruct("OfMsgspec", [("x", kind)]),
        pydantic.create_model("OfPydantic", x=(kind, ...)),
    ]


SPANS = [
    timedelta(0),
    timedelta(minutes=5),
    timedelta(days=1),
    timedelta(days=-1, seconds=3),
    timedelta(days=400, hours=2, seconds=1, microseconds=100),
    timedelta.max,
    timedelta.min,
]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_span_of_time_is_found_in_collections_of_every_library(indexed: bool) -> None:
    for kind in _classes(timedelta):
        with Database.in_memory() as db:
            spans = db.collection("spans", kind, indexes=[Index("x")] if indexed else [])
            ids = [spans.add(kind(x=span)) for span in SPANS]
            assert db.wait_for_indexes(timeout_s=10)
            for entity_id, span in zip(ids, SPANS, strict=True):
                assert list(spans.where(F.x == span).ids()) == [entity_id], (kind, span)
                assert list(spans.where(x=span).ids()) == [entity_id]
                assert list(spans.where(F.x.in_([span, None])).ids()) == [entity_id]
                assert spans.where(F.x != span).count() == len(SPANS) - 1
                assert spans.where.from_dict({"x": span}).count() == 1
            used = str(spans.where(F.x == SPANS[1]).explain())
            assert used.startswith("index(x)" if indexed else "scan")


def test_a_span_inside_a_list_or_a_map_is_found_too() -> None:
    five = timedelta(minutes=5)
    for value, kind in (([five], list[timedelta]), ({"a": five}, dict[str, timedelta])):
        for each in _classes(kind):
            with Database.in_memory() as db:
                spans: Any = db.collection("spans", each)
                spans.add(each(x=value))
                assert spans.where(F.x == value).count() == 1, each
                if isinstance(value, list):
                    assert spans.where(F.x.contains(five)).count() == 1, each
                    assert spans.where(~F.x.contains(five)).count() == 0, each


def test_equal_sets_are_found_in_whatever_order_python_has_them() -> None:
    members = {f"member {n}" for n in range(20)}
    for kind in _classes(set[str]):
        with Database.in_memory() as db:
            tags: Any = db.collection("tags", kind)
            tags.add(kind(x=members))
            assert tags.where(F.x == set(members)).count() == 1, kind
            assert tags.where(F.x == members | {"another"}).count() == 0, kind


class Address(pydantic.BaseModel):
    city: str
    since: timedelta | None = None


class Person(pydantic.BaseModel):
    home: Address


def test_a_model_of_pydantic_in_a_condition_is_refused_with_what_to_write() -> None:
    with Database.in_memory() as db:
        people = db.collection("people", Person)
        home = Address(city="Bern", since=timedelta(minutes=5))
        ada = people.add(Person(home=home))
        people.add(Person(home=Address(city="Basel")))
        with pytest.raises(QueryError, match=r"compare its fields, such as F\.home\.city"):
            people.where(F.home == home)
        assert list(people.where(F.home.city == "Bern").ids()) == [ada]
        stored = {"city": "Bern", "since": timedelta(minutes=5)}
        assert list(people.where(F.home == stored).ids()) == [ada]

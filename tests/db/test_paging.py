"""Bookmarks: the end of a page as text, which leads to what the entity itself would lead to."""

from __future__ import annotations

import uuid
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb import Database, F, QueryError, cbor
from entidb.storage import MemoryStorage
from tests.support import uid

FIELDS = ("a", "b.c")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 2.0, 1e300, 2**64 - 1, "", "é", b"\x00", [1, "x"], {"k": [None]}]),
)
ENTITIES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"a": VALUES, "b": st.fixed_dictionaries({}, optional={"c": VALUES})}
    ),
    min_size=1,
    max_size=12,
)
ORDERS = st.lists(
    st.builds(
        lambda minus, field: minus + field, st.sampled_from(["", "-"]), st.sampled_from(FIELDS)
    ),
    max_size=2,
    unique_by=lambda order: order.removeprefix("-"),
)


@given(ENTITIES, ORDERS)
def test_a_bookmark_leads_where_the_entity_leads(entities: list[Any], order: list[str]) -> None:
    with Database(MemoryStorage()) as db:
        for number, entity in enumerate(entities):
            db["stock"][uid(number)] = entity
        query = db["stock"].order_by(*order) if order else db["stock"].where()
        for last in query:
            mark = query.bookmark(last)
            assert mark.replace("-", "").replace("_", "").isalnum() and mark.isascii()
            assert list(query.after(mark).ids()) == list(query.after(last).ids())


def test_pages_turned_by_bookmarks_are_the_whole_and_each_entity_once() -> None:
    with Database.in_memory() as db:
        stock = db["stock"]
        stock.put_many({uuid.uuid4(): {"price": n % 3, "name": f"n{n}"} for n in range(25)})
        query, mark, seen = stock.where(F.price >= 0).order_by("-price").limit(4), None, []
        while page := list(query.after(mark)):
            seen += page
            mark = query.bookmark(page[-1])
        assert seen == list(stock.order_by("-price"))


@dataclass
class Tea:
    name: str
    price: int = 0


def test_a_typed_page_goes_on_without_a_value_of_the_class() -> None:
    with Database.in_memory() as db:
        teas = db.collection("teas", Tea)
        for price in (3, 1, 2):
            teas.add(Tea("tea", price))
        query = teas.order_by("price").limit(1)
        mark = query.bookmark(next(iter(query)))
        assert [tea.price for tea in query.after(mark).values()] == [2]
        with db.snapshot() as now:
            assert [tea.price for tea in now[teas].order_by("price").after(mark).values()] == [2, 3]


def packed(value: Any) -> str:
    return urlsafe_b64encode(cbor.encode_message(value)).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "é",
        "=" * 9,
        packed(3),
        packed([b"x" * 16, ["F.price"]]),
        packed([b"x" * 15, ["F.price"], [[1]]]),
        packed(["x" * 16, ["F.price"], [[1]]]),
        packed([b"x" * 16, ["F.price"], [1]]),
        packed([b"x" * 16, ["F.price"], 1]),
        packed([b"x" * 16, ["F.price"], [{}, 1]]),
        urlsafe_b64encode(b"\x81" * 5000).decode(),
    ],
)
def test_what_is_no_bookmark_is_said_to_be_none(text: str) -> None:
    with Database.in_memory() as db, pytest.raises(QueryError, match="is no bookmark: give after"):
        db["stock"].order_by("price").after(text)


def test_a_bookmark_of_another_order_is_refused() -> None:
    with Database.in_memory() as db:
        last = (uid(1), {"price": 3, "name": "tea"})
        mark = db["stock"].order_by("-price").bookmark(last)
        for other in (
            db["stock"].order_by("price"),
            db["stock"].order_by("-price", "name"),
            db["stock"].where(),
        ):
            with pytest.raises(QueryError, match="of a query in another order"):
                other.after(mark)
        assert list(db["stock"].order_by("-price").after(mark)) == []
        with pytest.raises(QueryError, match=r"bookmark\(\) takes the last \(id, value\)"):
            db["stock"].order_by("-price").bookmark(mark)  # type: ignore[arg-type]

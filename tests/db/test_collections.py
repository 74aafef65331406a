"""Collections as mappings, and what they hold."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

from entidb import cbor
from entidb.db import Database
from entidb.errors import (
    CborDecodeError,
    CborEncodeError,
    EntiDBError,
    InvalidNameError,
    ValueTypeError,
)
from tests.support import FakeClock, uid


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(clock=FakeClock()) as opened:
        yield opened


# ---------------------------------------------------------------- as a mapping


def test_a_collection_behaves_like_a_dict(db: Database) -> None:
    notes = db.collection("notes")
    notes[uid(1)] = {"text": "one"}
    notes[uid(2)] = [1, 2.5, b"raw", None, True]
    assert notes[uid(1)] == {"text": "one"}
    assert (uid(1) in notes, uid(9) in notes, len(notes)) == (True, False, 2)
    assert dict(notes) == {uid(1): {"text": "one"}, uid(2): [1, 2.5, b"raw", None, True]}
    assert list(notes.keys()) == [uid(1), uid(2)]
    assert list(notes.values()) == [{"text": "one"}, [1, 2.5, b"raw", None, True]]
    assert len(notes.items()) == len(notes.values()) == 2
    del notes[uid(1)]
    assert list(notes) == [uid(2)]


def test_what_is_missing_is_a_key_error_and_changes_nothing(db: Database) -> None:
    notes = db.collection("notes")
    with pytest.raises(KeyError):
        notes[uid(1)]
    with pytest.raises(KeyError):
        del notes[uid(1)]
    with pytest.raises(KeyError):
        notes.pop(uid(1))
    with pytest.raises(KeyError):
        notes.popitem()
    assert (notes.get(uid(1)), notes.get(uid(1), 7), notes.pop(uid(1), 8)) == (None, 7, 8)
    assert notes.discard(uid(1)) is False
    assert (db.sequence, db.collections()) == (0, [])


def test_the_other_dict_methods_are_one_transaction_each(db: Database) -> None:
    notes = db.collection("notes")
    notes.put_many({uid(n): n for n in range(5)})
    assert db.sequence == 1
    notes.update({uid(5): 5, uid(6): 6})
    assert db.sequence == 2
    assert notes.setdefault(uid(5), "other") == 5
    assert notes.setdefault(uid(7), 7) == 7
    assert (db.sequence, notes.pop(uid(7)), db.sequence) == (3, 7, 4)
    assert notes.popitem() == (uid(0), 0)
    assert notes.discard(uid(1))
    notes.clear()
    assert (len(notes), db.sequence) == (0, 7)
    assert db.verify() == []


def test_add_gives_growing_version_7_ids(db: Database) -> None:
    notes = db.collection("notes")
    ids = [notes.add(n) for n in range(100)]
    assert ids == sorted(ids) == list(notes)
    assert {i.version for i in ids} == {7}
    assert {i.variant for i in ids} == {uuid.RFC_4122}


def test_a_value_that_was_read_is_the_readers_own(db: Database) -> None:
    notes = db.collection("notes")
    notes[uid(1)] = {"list": [1]}
    notes[uid(1)]["list"].append(2)
    assert notes[uid(1)] == {"list": [1]}


def test_get_many_reads_what_there_is_from_one_snapshot(db: Database) -> None:
    notes = db.collection("notes")
    notes.put_many({uid(n): n for n in range(4)})
    assert notes.get_many([uid(3), uid(9), uid(1), uid(3)]) == {uid(3): 3, uid(1): 1}
    assert notes.get_many([]) == {}
    assert db.collection("none").get_many([uid(1)]) == {}


@pytest.mark.parametrize("wrong", ["text", 7, None, b"x" * 16])
def test_an_id_is_a_uuid_and_the_error_says_so(db: Database, wrong: Any) -> None:
    notes = db.collection("notes")
    uses: list[Any] = [
        lambda: notes[wrong],
        lambda: notes.__setitem__(wrong, 1),
        lambda: notes.__delitem__(wrong),
        lambda: notes.get(wrong),
        lambda: wrong in notes,
        lambda: notes.get_many([wrong]),
        lambda: list(notes.range(wrong or 1)),  # type: ignore[arg-type]
    ]
    for use in uses:
        with pytest.raises(ValueTypeError, match="UUID"):
            use()
    assert db.sequence == 0


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256, "\ud800", 7, None])
def test_impossible_names_are_refused_everywhere(db: Database, name: Any) -> None:
    with db.transaction() as tx, db.snapshot() as snapshot:
        for make in (db.collection, tx.collection, snapshot.collection):
            with pytest.raises(InvalidNameError):
                make(name)
        with pytest.raises(InvalidNameError):
            db.declare_local(name)
        with pytest.raises(InvalidNameError):
            db.set_scope([name])


def test_names_are_compared_byte_by_byte(db: Database) -> None:
    for name in ("é", "e\u0301", "É", "a/b", " ", "x" * 255):
        db.collection(name)[uid(1)] = name
    assert {name: db.collection(name)[uid(1)] for name in db.collections()} == {
        name: name for name in ("é", "e\u0301", "É", "a/b", " ", "x" * 255)
    }


# ---------------------------------------------------------------- order and bounds


def test_iteration_is_in_id_order_across_many_pages(db: Database) -> None:
    notes = db.collection("notes")
    numbers = [(n * 7919) % 3001 for n in range(3001)]
    notes.put_many({uid(n): n for n in numbers})
    assert [i.int for i in notes] == sorted(numbers)
    assert [v for _, v in notes.range(reverse=True)] == sorted(numbers, reverse=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("limit", [None, 0, 1, 5, 512, 513, 2000])
@pytest.mark.parametrize(
    ("start", "stop"), [(None, None), (3, None), (None, 1500), (10, 1200), (5, 5), (9, 3)]
)
def test_a_range_is_bounded_like_a_slice(
    db: Database, start: int | None, stop: int | None, limit: int | None, reverse: bool
) -> None:
    notes = db.collection("notes")
    numbers = list(range(0, 3000, 2))
    notes.put_many({uid(n): n for n in numbers})
    db.collection("neighbour")[uid(0)] = "not mine"
    expected = [n for n in numbers if (start is None or n >= start) and (stop is None or n < stop)]
    expected = (expected[::-1] if reverse else expected)[:limit]
    got = notes.range(
        None if start is None else uid(start),
        None if stop is None else uid(stop),
        reverse=reverse,
        limit=limit,
    )
    assert [value for _, value in got] == expected


def test_the_largest_id_is_inside_every_open_range(db: Database) -> None:
    notes = db.collection("notes")
    top = uuid.UUID(int=2**128 - 1)
    notes[top] = "top"
    notes[uid(0)] = "bottom"
    assert list(notes) == [uid(0), top]
    assert [v for _, v in notes.range(reverse=True)] == ["top", "bottom"]
    assert list(notes.range(stop=top)) == [(uid(0), "bottom")]


def test_an_iteration_does_not_see_what_is_committed_during_it(db: Database) -> None:
    notes = db.collection("notes")
    notes.put_many({uid(n): n for n in range(1200)})
    seen = []
    for entity_id, value in notes.items():
        if value == 3:
            notes.clear()
            notes[uid(5000)] = 5000
        seen.append(entity_id.int)
    assert seen == list(range(1200))
    assert list(notes) == [uid(5000)]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {"b": object()}}, "$.a.b"),
        ({"a": [1, {2, 3}]}, "$.a[1]"),
        ({"lines": [{"price": float("nan")}]}, "$.lines[0].price"),
        ({"when": datetime(2026, 1, 1, tzinfo=UTC)}, "$.when"),
        ({1: "x"}, "$"),
        ([2**64], "$[0]"),
        (None, "$"),
    ],
)
def test_a_value_that_cannot_be_stored_is_an_error_with_its_place(
    db: Database, value: Any, path: str
) -> None:
    notes = db.collection("notes")
    with pytest.raises(CborEncodeError) as caught:
        notes[uid(1)] = value
    assert caught.value.path == path
    assert path in str(caught.value)
    assert (db.sequence, len(notes)) == (0, 0)


class Colour(Enum):
    RED = "red"


@dataclass
class Order:
    title: str
    when: datetime
    day: date
    total: Decimal
    customer: uuid.UUID
    blob: bytes
    colour: Colour = Colour.RED
    lines: list[int] = field(default_factory=list)


@attrs.define
class AttrsOrder:
    title: str
    when: datetime
    total: Decimal
    customer: uuid.UUID


class StructOrder(msgspec.Struct):
    title: str
    when: datetime
    total: Decimal
    customer: uuid.UUID
    blob: bytes = b""


class ModelOrder(pydantic.BaseModel):
    title: str
    when: datetime
    total: Decimal
    customer: uuid.UUID


WHEN = datetime(2026, 2, 28, 23, 59, 59, 123456, tzinfo=UTC)
COMMON: dict[str, Any] = {
    "title": "ä",
    "when": WHEN,
    "total": Decimal("10.10"),
    "customer": uid(77),
}


@pytest.mark.parametrize(
    "value",
    [
        Order(**COMMON, day=date(2026, 1, 2), blob=b"\x00\xff", lines=[1, 2]),
        AttrsOrder(**COMMON),
        StructOrder(**COMMON, blob=b"\xff"),
        ModelOrder(**COMMON),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_typed_collection_gives_back_what_was_put_in(db: Database, value: Any) -> None:
    orders: Any = db.collection("orders", type(value))
    orders[uid(1)] = value
    other = orders.add(value)
    assert orders[uid(1)] == value == orders[other]
    assert type(orders[uid(1)]) is type(value)
    assert list(orders.values()) == [value, value]
    with db.transaction() as tx:
        assert tx.collection("orders", type(value))[uid(1)] == value
    with db.snapshot() as snapshot:
        assert snapshot.collection("orders", type(value))[uid(1)] == value
    plain = db.collection("orders")[uid(1)]
    assert plain["total"] == "10.10" and plain["customer"] == str(uid(77))


@pytest.mark.parametrize("kind", [Order, AttrsOrder, StructOrder, ModelOrder])
def test_a_value_of_another_type_is_refused_and_named(db: Database, kind: type) -> None:
    orders: Any = db.collection("orders", kind)
    for wrong in ({"title": "x"}, None, "x", object()):
        with pytest.raises(ValueTypeError, match=kind.__name__):
            orders[uid(1)] = wrong
    assert db.sequence == 0


@pytest.mark.parametrize("kind", [Order, AttrsOrder, StructOrder, ModelOrder])
def test_an_entity_that_does_not_fit_the_type_says_so_when_read(db: Database, kind: type) -> None:
    db.collection("orders")[uid(1)] = {"title": 7}
    orders: Any = db.collection("orders", kind)
    with pytest.raises(ValueTypeError, match=kind.__name__):
        orders[uid(1)]
    assert db.collection("orders")[uid(1)] == {"title": 7}


def test_a_field_that_cannot_be_stored_is_one_of_our_errors(db: Database) -> None:
    @dataclass
    class Holder:
        content: Any

    holders = db.collection("holders", Holder)
    for content in (object(), float("nan"), 2**70):
        with pytest.raises(EntiDBError):
            holders[uid(1)] = Holder(content)
    assert db.sequence == 0


def test_stored_bytes_are_canonical(db: Database) -> None:
    notes = db.collection("notes")
    notes[uid(1)] = {"bb": 1, "a": 2, "c": {"z": 1.0, "y": -1}}
    [(raw_id, payload)] = notes.payloads()
    assert raw_id == uid(1).bytes
    assert cbor.check(payload) == {"a": 2, "c": {"y": -1, "z": 1.0}, "bb": 1}


def test_iterating_goes_on_behind_a_payload_that_cannot_be_decoded(db: Database) -> None:
    notes = db.collection("notes")
    with db.transaction() as tx:
        # Of three pages, of which the first is the smallest.
        tx[notes].put_many({uid(n): n for n in range(800)})
        tx._stage("notes", uid(40).bytes, b"\xff")
    items, values, ids = iter(notes.items()), iter(notes.values()), [uid(n) for n in range(800)]
    assert [next(items) for _ in range(40)] == [(uid(n), n) for n in range(40)]
    assert [next(values) for _ in range(40)] == list(range(40))
    for broken in (items, values):
        with pytest.raises(CborDecodeError):
            next(broken)
    assert list(items) == [(uid(n), n) for n in range(41, 800)]
    assert list(values) == list(range(41, 800))
    assert list(notes) == ids and [one for one, _ in notes.range(limit=40)] == ids[:40]
    with pytest.raises(CborDecodeError, match="not canonical"):
        notes.get_many(ids)


def test_a_transaction_iterates_over_its_own_writes_among_many(db: Database) -> None:
    notes = db.collection("notes")
    notes.put_many({uid(n): n for n in range(800)})
    with db.transaction() as tx:
        inside = tx[notes]
        inside[uid(900)] = 900
        del inside[uid(33)]
        expected = {uid(n): n for n in (*range(33), *range(34, 800), 900)}
        assert dict(inside.items()) == expected and list(inside) == list(expected)
        assert dict(inside.range(reverse=True)) == expected
        assert inside.get_many([uid(33), uid(34), uid(900)]) == {uid(34): 34, uid(900): 900}

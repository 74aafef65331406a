"""What another version of the program wrote is read: by ``upgrade`` in its newest shape, and by
``on_invalid`` as somebody chose where it fits nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pydantic
import pytest

from entidb.db import Database, F
from entidb.errors import ConfigError, ValueTypeError
from tests.support import FakeClock, uid


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(clock=FakeClock()) as opened:
        yield opened


@dataclasses.dataclass
class Tea:
    name: str
    price: int = 0


class TeaStruct(msgspec.Struct):
    name: str
    price: int = 0


class TeaModel(pydantic.BaseModel):
    name: str
    price: int = 0


CLASSES = [Tea, TeaStruct, TeaModel]


def some_that_do_not_fit(db: Database) -> None:
    rows = db.collection("teas")
    rows[uid(1)] = {"name": "Assam", "price": 3}
    rows[uid(2)] = {"name": "Bancha", "price": "dear"}
    rows[uid(3)] = ["no map"]
    rows[uid(4)] = {"name": "Ceylon", "price": 4}


# ---------------------------------------------------------------- what does not fit

Read = Callable[[Any], Iterator[Any]]
READS: dict[str, Read] = {
    "items": lambda teas: iter(teas.items()),
    "values": lambda teas: iter(teas.values()),
    "range": lambda teas: teas.range(),
    "backwards": lambda teas: teas.range(reverse=True),
    "limited": lambda teas: teas.range(limit=9),
    "query": lambda teas: iter(teas.where()),
    "query with a limit": lambda teas: iter(teas.where().limit(9)),
    "values of a query": lambda teas: teas.where().values(),
    "sorted": lambda teas: iter(teas.order_by("name")),
}


def names_of(found: list[Any]) -> list[str]:
    return sorted(one[1].name if isinstance(one, tuple) else one.name for one in found)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", CLASSES)
def test_an_entity_that_does_not_fit_raises_and_the_iteration_goes_on(
    db: Database, kind: Any, read: str
) -> None:
    some_that_do_not_fit(db)
    left, found, errors = READS[read](db.collection("teas", kind)), [], []
    while True:
        try:
            found.append(next(left))
        except ValueTypeError as error:
            errors.append(error)
        except StopIteration:
            break
    assert names_of(found) == ["Assam", "Ceylon"]
    assert {error.entity_id for error in errors} == {uid(2), uid(3)}
    assert {error.collection for error in errors} == {"teas"}
    assert all(error.reason for error in errors)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", CLASSES)
def test_skipping_leaves_out_what_does_not_fit(db: Database, kind: Any, read: str) -> None:
    some_that_do_not_fit(db)
    teas = db.collection("teas", kind, on_invalid="skip")
    assert names_of(list(READS[read](teas))) == ["Assam", "Ceylon"]
    assert list(teas.get_many([uid(1), uid(2), uid(4)])) == [uid(1), uid(4)]
    with pytest.raises(ValueTypeError):
        teas[uid(2)]
    with pytest.raises(ValueTypeError):
        teas.get(uid(2))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_function_says_what_stands_in_its_place(db: Database, kind: Any, read: str) -> None:
    some_that_do_not_fit(db)
    seen = []

    def instead(error: ValueTypeError, stored: Any) -> Any:
        seen.append((error.entity_id, stored))
        return kind(name=stored["name"], price=-1) if isinstance(stored, dict) else None

    teas = db.collection("teas", kind, on_invalid=instead)
    assert names_of(list(READS[read](teas))) == ["Assam", "Bancha", "Ceylon"]
    assert sorted(seen) == [(uid(2), {"name": "Bancha", "price": "dear"}), (uid(3), ["no map"])]
    assert teas[uid(2)].price == -1
    with pytest.raises(ValueTypeError):
        teas[uid(3)]


def test_a_page_is_full_although_some_are_skipped(db: Database) -> None:
    some_that_do_not_fit(db)
    teas = db.collection("teas", Tea, on_invalid="skip")
    assert [tea.name for _, tea in teas.range(limit=2)] == ["Assam", "Ceylon"]
    assert [tea.name for tea in teas.order_by("-name").limit(2).values()] == ["Ceylon", "Assam"]
    found = teas.where(~(F.name == "Assam")).first()
    assert found is not None and found[1].name == "Ceylon"
    # What counts and deletes does not convert.
    assert (len(teas), teas.where().count()) == (4, 4)


def test_transactions_and_snapshots_take_the_choice_over(db: Database) -> None:
    some_that_do_not_fit(db)
    teas = db.collection("teas", Tea, on_invalid="skip")
    with db.transaction() as tx:
        assert names_of(list(tx[teas].values())) == ["Assam", "Ceylon"]
        assert names_of(list(tx.collection("teas", Tea, on_invalid="skip").values())) == [
            "Assam",
            "Ceylon",
        ]
    with db.snapshot() as snapshot:
        assert names_of(list(snapshot[teas].values())) == ["Assam", "Ceylon"]
        again = snapshot.collection("teas", Tea, on_invalid="skip")
        assert names_of(list(again.values())) == ["Assam", "Ceylon"]


def test_raw_reads_what_fits_nothing(db: Database) -> None:
    some_that_do_not_fit(db)
    assert list(db.collection("teas", Tea).raw.values())[2] == ["no map"]


async def waits(value: Any) -> Any:
    return value


@pytest.mark.parametrize("given", ["ignore", None, 3, waits])
def test_what_is_no_choice_is_refused(db: Database, given: Any) -> None:
    with pytest.raises(ConfigError, match="on_invalid"):
        db.collection("teas", Tea, on_invalid=given)


@pytest.mark.parametrize("given", ["upgrade", 3, waits])
def test_what_is_no_upgrade_is_refused(db: Database, given: Any) -> None:
    with pytest.raises(ConfigError, match="upgrade"):
        db.collection("teas", Tea, upgrade=given)


# ---------------------------------------------------------------- upgrade


def to_cents(stored: Any) -> Any:
    """Version 1 had ``title`` and francs; version 2 has ``name`` and cents."""
    if "title" in stored:
        stored["name"] = stored.pop("title")
        stored["price"] = round(stored.pop("francs") * 100)
    return stored


def old_and_new(db: Database) -> None:
    rows = db.collection("teas")
    rows[uid(1)] = {"title": "Assam", "francs": 3.5, "origin": "IN"}
    rows[uid(2)] = {"name": "Bancha", "price": 280}
    rows[uid(3)] = {"title": "Ceylon", "francs": 2.0}


@pytest.mark.parametrize("kind", [*CLASSES, None])
def test_every_read_gives_the_newest_shape(db: Database, kind: Any) -> None:
    old_and_new(db)
    teas = db.collection("teas", kind, upgrade=to_cents)
    whole = (lambda tea: tea) if kind is None else (lambda tea: {"price": tea.price})
    with db.transaction() as tx, db.snapshot() as snapshot:
        for view in (teas, tx[teas], snapshot[teas]):
            assert [whole(tea)["price"] for tea in view.values()] == [350, 280, 200]
            assert [whole(tea)["price"] for _, tea in view.items()] == [350, 280, 200]
            assert whole(view[uid(1)])["price"] == 350
            assert whole(view.get(uid(3)))["price"] == 200
            assert whole(view.get_many([uid(3)])[uid(3)])["price"] == 200
    assert db.collection("teas")[uid(3)] == {"title": "Ceylon", "francs": 2.0}
    assert teas.raw[uid(3)] == {"title": "Ceylon", "francs": 2.0}


@pytest.mark.parametrize("kind", [*CLASSES, None])
def test_queries_look_at_the_newest_shape(db: Database, kind: Any) -> None:
    old_and_new(db)
    teas = db.collection("teas", kind, upgrade=to_cents)
    assert list(teas.where(F.price < 300).ids()) == [uid(2), uid(3)]
    assert list(teas.where(name="Ceylon").ids()) == [uid(3)]
    assert teas.where(name="Bancha").count() == 1
    assert list(teas.order_by("-price").ids()) == [uid(1), uid(2), uid(3)]
    page = list(teas.order_by("price").limit(2))
    assert [one for one, _ in teas.order_by("price").after(page[-1])] == [uid(1)]
    assert teas.where(F.price > 300).delete() == 1
    assert list(teas) == [uid(2), uid(3)]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_write_stores_the_newest_shape_and_what_upgrade_took_out_is_gone(
    db: Database, kind: Any
) -> None:
    old_and_new(db)
    teas = db.collection("teas", kind, upgrade=to_cents)
    teas[uid(1)] = kind(name="Assam", price=400)
    # ``origin`` is unknown to both versions, and survives; ``title`` was renamed.
    assert teas.raw[uid(1)] == {"name": "Assam", "price": 400, "origin": "IN"}
    with db.transaction() as tx:
        tx[teas][uid(3)] = kind(name="Ceylon", price=1)
    assert teas.raw[uid(3)] == {"name": "Ceylon", "price": 1}


@pytest.mark.parametrize("kind", [*CLASSES, None])
def test_a_patch_changes_the_newest_shape(db: Database, kind: Any) -> None:
    old_and_new(db)
    db.collection("teas", kind, upgrade=to_cents).patch(uid(1), price=1)
    assert db.collection("teas")[uid(1)] == {"name": "Assam", "price": 1, "origin": "IN"}


def failing(stored: Any) -> Any:
    return {"name": stored["title"].upper()} if stored.get("title") != "Assam" else 1 / 0


@pytest.mark.parametrize(
    ("upgrade", "reason"),
    [
        (failing, "ZeroDivisionError"),
        (lambda stored: None, "returned None"),
        (lambda stored: {"when": {1, 2}}, "cannot be stored"),
    ],
)
def test_an_upgrade_that_cannot_is_an_entity_that_does_not_fit(
    db: Database, upgrade: Any, reason: str
) -> None:
    db.collection("teas")[uid(1)] = {"title": "Assam"}
    teas = db.collection("teas", Tea, upgrade=upgrade)
    for read in (lambda: teas[uid(1)], lambda: list(teas.values()), lambda: teas.where().first()):
        with pytest.raises(ValueTypeError, match=reason) as caught:
            read()
        assert (caught.value.collection, caught.value.entity_id) == ("teas", uid(1))
    with pytest.raises(ValueTypeError, match=reason):
        teas.patch(uid(1), price=3)
    with pytest.raises(ValueTypeError, match=reason):
        teas[uid(1)] = Tea("Assam")
    assert list(db.collection("teas", Tea, upgrade=upgrade, on_invalid="skip").values()) == []


def test_a_query_does_not_end_at_what_cannot_be_upgraded(db: Database) -> None:
    rows = db.collection("teas")
    rows[uid(1)], rows[uid(2)] = {"title": "Assam"}, {"title": "Bancha"}
    teas = db.collection("teas", Tea, upgrade=failing, on_invalid="skip")
    assert [tea.name for tea in teas.where(name="BANCHA").values()] == ["BANCHA"]
    assert [tea.name for tea in teas.order_by("name").values()] == ["BANCHA"]


def test_what_reads_as_it_is_stored_costs_no_layer(db: Database) -> None:
    plain = db.collection("teas", Tea)
    assert plain._codec is db.collection("teas", Tea)._codec
    assert (
        plain._codec is not db.collection("teas", Tea, upgrade=functools.partial(to_cents))._codec
    )

"""Queries: any of them gives what a loop in Python gives, and says what it took."""

from __future__ import annotations

import datetime
import enum
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entidb import F
from entidb.db import Condition, Database, Query, Role
from entidb.db.conditions import Field
from entidb.db.filters import from_dict
from entidb.db.looking import MISSING, field_of, order_key
from entidb.errors import QueryError, ValueTypeError
from entidb.storage import MemoryStorage
from tests.support import uid

TEAS: list[dict[str, Any]] = [
    {"kind": "tea", "name": "Assam", "price": 3, "sold": True, "from": {"land": "India"}},
    {"kind": "tea", "name": "Sencha", "price": 4.5, "sold": False, "from": {"land": "Japan"}},
    {"kind": "tea", "name": "Lapsang", "price": None, "tags": ["smoked", 7]},
    {"kind": "cup", "name": "Sencha cup", "price": 9, "sold": True, "odd name": 1},
    {"kind": "cup", "name": "plain", "price": "ask", "tags": []},
]


@pytest.fixture
def db() -> Iterator[Database]:
    with Database(MemoryStorage()) as made:
        for number, value in enumerate(TEAS):
            made.collection("stock")[uid(number)] = value
        yield made


def names(query: Query[Any]) -> list[str]:
    return [value["name"] for value in query.values()]


# ---------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        (F.kind == "tea", "Assam Sencha Lapsang"),
        (F.kind != "tea", "Sencha cup plain"),
        (F.nothing != 1, "Assam Sencha Lapsang Sencha cup plain"),
        (F.price == 3.0, "Assam"),
        (F.price == True, ""),  # noqa: E712
        (F.price > 3, "Sencha Sencha cup"),
        (F.price >= 3, "Assam Sencha Sencha cup"),
        (F.price < 4.5, "Assam"),
        (F.price <= 4.5, "Assam Sencha"),
        (F.price > "a", "plain"),
        (F.price.between(3, 4.5), "Assam Sencha"),
        (F.price.in_([3, 9, "ask"]), "Assam Sencha cup plain"),
        (F.price.in_([]), ""),
        (F.price.is_null(), "Lapsang"),
        (F.sold, "Assam Sencha cup"),
        (~F.sold, "Sencha Lapsang plain"),
        (F.sold == False, "Sencha"),  # noqa: E712
        (F.sold.exists(), "Assam Sencha Sencha cup"),
        (F.tags, "Lapsang"),
        (F.tags.exists(), "Lapsang plain"),
        (F.tags.contains("smoked"), "Lapsang"),
        (F.tags.contains(7.0), "Lapsang"),
        (F.tags == ["smoked", 7], "Lapsang"),
        (F.tags < ["t"], "Lapsang plain"),
        (F.name.contains("ench"), "Sencha Sencha cup"),
        (F.name.startswith("Sencha"), "Sencha Sencha cup"),
        (F["odd name"] == 1, "Sencha cup"),
        (F["from"].land == "India", "Assam"),
        (F["from"]["land"].startswith("J"), "Sencha"),
        (F["from"] == {"land": "Japan"}, "Sencha"),
        ((F.kind == "tea") & (F.price > 3), "Sencha"),
        ((F.kind == "cup") | (F.price == 3), "Assam Sencha cup plain"),
        (~((F.kind == "cup") | (F.price == 3)), "Sencha Lapsang"),
        (~~(F.kind == "cup"), "Sencha cup plain"),
        ((F.kind == "tea") & ~F.sold & F.price.is_null(), "Lapsang"),
    ],
    ids=repr,
)
def test_a_condition_finds_what_it_says(db: Database, condition: Condition, found: str) -> None:
    query = db.collection("stock").where(condition)
    assert " ".join(names(query)) == found
    assert query.count() == len(list(query.ids()))
    assert query.exists() is bool(found)


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ({"kind": "tea"}, F.kind == "tea"),
        ({"kind": "tea", "price": {">": 3}}, (F.kind == "tea") & (F.price > 3)),
        ({"price": {">=": 3, "<": 9}}, (F.price >= 3) & (F.price < 9)),
        ({"price": {"between": [3, 4.5]}}, F.price.between(3, 4.5)),
        ({"price": {"in": [3, 9]}}, F.price.in_([3, 9])),
        ({"price": {"!=": 3}}, F.price != 3),
        ({"price": {"<=": 3}}, F.price <= 3),
        ({"price": {"is_null": True}}, F.price.is_null()),
        ({"sold": {"exists": False}}, ~F.sold.exists()),
        ({"name": {"startswith": "S"}}, F.name.startswith("S")),
        ({"tags": {"contains": 7}}, F.tags.contains(7)),
        ({"from.land": "Japan"}, F["from"].land == "Japan"),
        ({"from": {"==": {"land": "Japan"}}}, F["from"] == {"land": "Japan"}),
        ({"|": [{"kind": "cup"}, {"price": 3}]}, (F.kind == "cup") | (F.price == 3)),
        ({"&": [{"kind": "cup"}, {"price": 9}]}, (F.kind == "cup") & (F.price == 9)),
        ({"~": {"kind": "cup"}}, ~(F.kind == "cup")),
        ({}, F.kind.exists()),
    ],
    ids=repr,
)
def test_a_condition_that_comes_as_data_is_the_written_one(
    db: Database, written: dict[str, Any], same: Condition
) -> None:
    stock = db.collection("stock")
    assert list(stock.where.from_dict(written)) == list(stock.where(same))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def within(depth: int) -> Any:
    """Conditions as data, one inside the other."""
    given: Any = {"a": 1}
    for _ in range(depth):
        given = {"~": {"&": [given, {"b": 1}]}}
    return given


FIELDS: Any = F
DATA: Any = from_dict


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: bool(F.price > 3), "& | ~"),
        (lambda: 2 < F.price < 5, "between"),
        (lambda: F.price > 3 and F.sold, "& | ~"),
        (lambda: F.price < None, "no order"),
        (lambda: F.price >= True, "no order"),
        (lambda: F.price == float("nan"), "no entity can hold nan"),
        (lambda: F.price == object(), "no entity can hold"),
        (lambda: F.price == 2**65, "no entity can hold"),
        (lambda: F.name.in_("tea"), r"in_\(\['tea'\]\)"),
        (lambda: FIELDS.name.in_(3), "list of values, not 3"),
        (lambda: FIELDS.name.in_(None), "list of values"),
        (lambda: FIELDS.name.in_({"a": 1}), "list of values"),
        (lambda: F.price == F.other, "not with another field"),
        (lambda: F.tags.contains(F.other), r"not the field F\.other"),
        (lambda: FIELDS.name.lower(), r"F\.name\.lower is a field and no method"),
        (lambda: FIELDS("name"), "F is not called"),
        (lambda: -FIELDS.price, r'order_by\("-price"\)'),
        (lambda: "tea" in FIELDS.tags, r"F\.tags\.contains\('tea'\)"),
        (lambda: FIELDS.kind in ["tea", "cup"], "in_"),
        (lambda: list(FIELDS.tags), "nothing to iterate over"),
        (lambda: F.name.by(str.lower).length, "has no field 'length'"),
        (lambda: F.name.by(str.lower).by(str.upper), "one function"),
        (lambda: F.tags == nested(100), "inside each other"),
        (lambda: F.tags == nested(20_000), "nested so deep"),
        (lambda: from_dict({"kind": {"in": "tea"}}), "in takes a list"),
        (lambda: from_dict({"kind": {"in": None}}), "in takes a list"),
        (lambda: from_dict({"kind": {"in": {"a": 1}}}), "in takes a list"),
        (lambda: from_dict({"kind": {"exists": "false"}}), "take true or false, not 'false'"),
        (lambda: from_dict({"kind": {"is_null": 0}}), "take true or false"),
        (lambda: from_dict(within(1000)), "at most 30 inside each other"),
        (lambda: from_dict({"~": [{"a": 1}]}), "map of fields"),
        (lambda: FIELDS.name.startswith(3), "takes text"),
        (lambda: FIELDS[3], "field's name is text"),
        (lambda: from_dict({"price": {"$gt": 3}}), "==, !="),
        (lambda: from_dict({"price": {}}), "==, !="),
        (lambda: from_dict({"price": {"between": 3}}), "low, high"),
        (lambda: from_dict({"|": {"a": 1}}), "list of conditions"),
        (lambda: DATA([("a", 1)]), "map of fields"),
        (lambda: DATA({3: 1}), "field's name is text"),
        (lambda: (FIELDS.price > 3) & True, r'with the name of a method is F\["test"\]'),
        (lambda: (FIELDS.price > 3) & nested(20_000), "<list> is no condition"),
        (lambda: FIELDS[nested(20_000)], "is text, not <list>"),
        (lambda: FIELDS.name.startswith(nested(20_000)), "takes text, not <list>"),
        (lambda: from_dict({"~": nested(20_000)}), "map of fields"),
        (lambda: from_dict({"|": {"a": nested(20_000)}}), "list of conditions, not <dict>"),
    ],
)
def test_a_condition_that_cannot_be_says_what_to_write(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(QueryError, match=says) as caught:
        wrong()
    assert caught.value.code == "invalid_query"


class Grade(enum.Enum):
    FINE = "fine"


def test_values_in_conditions_are_converted_as_a_class_stores_them(db: Database) -> None:
    when, key = datetime.date(2026, 11, 28), uuid.UUID(int=7)
    entity = db.collection("stock").add({"on": "2026-11-28", "key": str(key), "grade": "fine"})
    for condition in (F.on == when, F.key == key, F.grade == Grade.FINE, F.on.between(when, when)):
        assert list(db.collection("stock").where(condition).ids()) == [entity]


# ---------------------------------------------------------------- order and pages


def test_order_by_sorts_by_kind_and_then_by_value(db: Database) -> None:
    stock = db.collection("stock")
    assert names(stock.order_by("price")) == ["Lapsang", "Assam", "Sencha", "Sencha cup", "plain"]
    assert names(stock.order_by("-price")) == ["plain", "Sencha cup", "Sencha", "Assam", "Lapsang"]
    assert names(stock.order_by("kind", "-name"))[:2] == ["plain", "Sencha cup"]
    assert names(stock.order_by(F["from"].land, "name"))[-2:] == ["Assam", "Sencha"]
    assert names(stock.where(kind="tea").order_by("name").limit(2)) == ["Assam", "Lapsang"]


def test_first_one_and_limit(db: Database) -> None:
    stock = db.collection("stock")
    assert stock.where(kind="cup").first() == (uid(3), TEAS[3])
    assert stock.where(kind="none").first() is None
    assert stock.where(name="Assam").one() == (uid(0), TEAS[0])
    assert list(stock.where(kind="tea").limit(0)) == []
    assert stock.where(kind="tea").limit(2).count() == 2
    assert stock.where().limit(3).count() == 3
    for wrong in ("none", "tea"):
        with pytest.raises(QueryError, match=r"entity of 'stock' meets F\.kind == "):
            stock.where(kind=wrong).one()


def test_pages_by_the_last_of_the_page_before_stay_right_while_others_write(db: Database) -> None:
    stock = db.collection("stock")
    page = list(stock.order_by("name").limit(2))
    assert [value["name"] for _, value in page] == ["Assam", "Lapsang"]
    del stock[page[-1][0]]
    stock.add({"name": "Aaa"})
    assert names(stock.order_by("name").after(page[-1]).limit(2)) == ["Sencha", "Sencha cup"]
    assert names(stock.order_by("name").after(None).limit(1)) == ["Aaa"]
    assert next(stock.where().after((uid(3), None)).ids()) == uid(4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda stock: stock.order_by(),
        lambda stock: stock.order_by(""),
        lambda stock: stock.order_by("-"),
        lambda stock: stock.order_by(3),
        lambda stock: stock.where().limit(-1),
        lambda stock: stock.where().limit(True),
        lambda stock: stock.where().after(uid(1)),
        lambda stock: stock.where().after((uid(1),)),
        lambda stock: stock.where().after((uid(1), {}, 3)),
        lambda stock: stock.order_by("name").after((uid(1), {"name": float("nan")})),
        lambda stock: stock.order_by("name").after((uid(1), None)),
        lambda stock: stock.where(F["\ud800"] == 1),
        lambda stock: stock.where(F.kind["\ud800"].exists()),
        lambda stock: stock.where(**{"\ud800": 1}),
        lambda stock: stock.order_by("-\ud800"),
        lambda stock: stock.where([F.kind == "tea"]),
        lambda stock: stock.where().after((uid(1), {})).order_by("name"),
        lambda stock: stock.where(True),
    ],
)
def test_a_query_that_cannot_be_is_refused(db: Database, wrong: Callable[[Any], Any]) -> None:
    with pytest.raises(QueryError):
        wrong(db.collection("stock"))


def test_fields_may_have_any_name(db: Database) -> None:
    stock = db.collection("stock")
    stock.add({"self": 1, "conditions": 2, "": 3})
    assert stock.where(self=1, conditions=2).where(F[""] == 3).count() == 1


def test_what_nothing_or_everything_meets_says_so(db: Database) -> None:
    stock = db.collection("stock")
    nothing = stock.where(F.kind.in_([]))
    assert repr(nothing) == "<Query of 'stock' where nothing>" and not nothing.exists()
    assert stock.where(~F.kind.in_([])).count() == len(TEAS)
    with pytest.raises(QueryError, match="meets nothing"):
        nothing.one()
    assert repr(stock.where.from_dict({"&": []})) == "<Query of 'stock' where everything>"
    assert repr(stock.where.from_dict({})) == "<Query of 'stock'>"
    with pytest.raises(QueryError, match="more than one entity of 'stock' meets everything"):
        stock.where().one()


def test_what_an_entity_holds_in_other_words_is_found_by_them(db: Database) -> None:
    stock = db.collection("stock")
    entity = stock.add({"zero": -0.0, "size": [1, 2], "n": 4})
    for condition in (
        F.zero == -0.0,
        F.zero.between(-0.0, 0),
        F.size == (1, 2),
        F.n == numpy.int64(4),
        F.n > numpy.float64(3.5),
        F.size.contains(numpy.int32(2)),
    ):
        assert list(stock.where(condition).ids()) == [entity]


def test_one_of_many_values_is_looked_up(db: Database) -> None:
    stock = db.collection("stock")
    many: list[Any] = [*range(5, 40), 3.0, "ask", True]
    for others in (many, [*many, ["smoked", 7]]):
        assert names(stock.where(F.price.in_(others))) == ["Assam", "Sencha cup", "plain"]
        assert names(stock.where(F.sold.in_([*others, 1]))) == ["Assam", "Sencha cup"]
        assert names(stock.where(F.tags.in_(others))) == ["Lapsang"] * (others is not many)


# ---------------------------------------------------------------- where it reads and writes


def test_a_transaction_finds_and_deletes_what_it_has_written(db: Database) -> None:
    with db.transaction() as tx:
        stock = tx.collection("stock")
        stock[uid(9)] = {"kind": "tea", "name": "new"}
        del stock[uid(0)]
        assert names(stock.where(kind="tea")) == ["Sencha", "Lapsang", "new"]
        assert stock.where(F.price > 4).delete() == 2
        assert db.collection("stock").where(kind="tea").count() == 3
    assert names(db.collection("stock").where()) == ["Lapsang", "plain", "new"]


def test_delete_is_one_transaction(db: Database) -> None:
    before = db.sequence
    assert db.collection("stock").where(kind="tea").order_by("-name").limit(2).delete() == 2
    assert db.sequence == before + 1
    assert names(db.collection("stock").where(kind="tea")) == ["Assam"]
    assert db.collection("stock").where(kind="none").delete() == 0


def test_a_snapshot_answers_several_queries_from_one_state_and_deletes_nothing(
    db: Database,
) -> None:
    with db.snapshot() as snapshot:
        db.collection("stock").clear()
        assert snapshot.collection("stock").where(kind="tea").count() == 3
        assert names(snapshot.collection("stock").order_by("name"))[0] == "Assam"
        with pytest.raises(QueryError, match="snapshot"):
            snapshot.collection("stock").where(kind="tea").delete()


def test_a_query_reads_when_it_is_asked_and_each_time_anew(db: Database) -> None:
    query = db.collection("stock").where(kind="cup")
    assert query.count() == 2
    db.collection("stock").add({"kind": "cup"})
    assert query.count() == 3
    assert repr(query.order_by("-name").limit(3)) == (
        "<Query of 'stock' where F.kind == 'cup' by F.name descending limit 3>"
    )


def test_a_collection_that_is_not_there_has_nothing(db: Database) -> None:
    assert list(db.collection("none").where(kind="tea")) == []
    assert db.collection("none").where().count() == 0


def test_programs_on_the_server_find_things_too() -> None:
    with Database(MemoryStorage(), role=Role.SERVER) as server:
        server.collection("stock")[uid(1)] = TEAS[0]
        assert server.collection("stock").where(kind="tea").exists()


@dataclass
class Tea:
    name: str
    price: float
    until: datetime.date | None = None


def test_a_typed_collection_gives_objects_and_knows_its_fields() -> None:
    with Database(MemoryStorage()) as db:
        teas = db.collection("teas", Tea)
        for n in range(30):
            teas[uid(n)] = Tea(f"tea {n:02}", n / 2, datetime.date(2026, 1, 1 + n))
        found = teas.where(F.until > datetime.date(2026, 1, 28)).order_by("-price")
        assert [tea.price for tea in found.values()] == [14.5, 14.0]
        page = list(teas.order_by("-name").limit(3))
        assert [tea.name for _, tea in page] == ["tea 29", "tea 28", "tea 27"]
        assert next(iter(teas.order_by("-name").after(page[-1]).values())).name == "tea 26"
        assert teas.where(name="tea 03").one()[1] == Tea("tea 03", 1.5, datetime.date(2026, 1, 4))


@pytest.mark.parametrize("exact", [False, True])
def test_a_field_that_the_class_does_not_have_is_an_error_at_once(exact: bool) -> None:
    with Database(MemoryStorage()) as db:
        teas = db.collection("teas", Tea, exact=exact)
        asks: list[Callable[[], object]] = [
            lambda: teas.where(prize=3),
            lambda: teas.where((F.name == "x") | (F.prize > 3)),
            lambda: teas.where.from_dict({"prize": 3}),
            lambda: teas.order_by("-prize"),
        ]
        for ask in asks:
            with pytest.raises(QueryError, match=r"'teas' has no field 'prize'; .* name, price"):
                ask()


def cents(text: str) -> int:
    return round(Decimal(text) * 100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: F.price < Decimal(5),
        lambda: F.price.between(Decimal(1), Decimal(5)),
        lambda: F.took >= datetime.timedelta(seconds=30),
        lambda: F.host > IPv4Address("10.0.0.9"),
    ],
)
def test_no_range_of_what_is_stored_as_text_in_another_order(make: Callable[[], Condition]) -> None:
    with pytest.raises(QueryError, match=r"is stored as text, .* F\.field\.by\(function\)"):
        make()


def test_decimals_are_found_by_equality_and_by_what_a_function_makes_of_them() -> None:
    @dataclass
    class Priced:
        name: str
        price: Decimal

    stock = Database.in_memory().collection("stock", Priced)
    tea, cup = Priced("tea", Decimal("3.50")), Priced("cup", Decimal("12.00"))
    stock.add(tea)
    stock.add(cup)
    assert list(stock.where(F.price == Decimal("12.00")).values()) == [cup]
    assert list(stock.where(F.price.by(cents) < 500).values()) == [tea]
    assert list(stock.where().order_by(F.price.by(cents)).values()) == [tea, cup]


def test_a_number_in_a_field_for_a_decimal_is_stored_and_found_as_a_decimal() -> None:
    @dataclass
    class Sum:
        total: Decimal
        parts: list[Decimal]

    sums = Database.in_memory().collection("sums", Sum)
    made = sums.add(Sum(0, [1, Decimal("2.50")]))  # type: ignore[arg-type, list-item]
    assert sums.raw[made] == {"total": "0", "parts": ["1", "2.50"]}
    assert sums[made] == Sum(Decimal(0), [Decimal(1), Decimal("2.50")])
    assert sums.where(total=Decimal(0)).count() == 1
    with pytest.raises(ValueTypeError, match="total is float and comes back as Decimal"):
        sums.add(Sum(0.1, []))  # type: ignore[arg-type]


def test_paths_and_addresses_are_found_as_a_typed_collection_stores_them() -> None:
    @dataclass
    class Host:
        at: IPv4Address
        log: Path

    hosts = Database.in_memory().collection("hosts", Host)
    one = Host(IPv4Address("10.0.0.1"), Path("/var/log/one"))
    hosts.add(one)
    hosts.add(Host(IPv4Address("10.0.0.2"), Path("/var/log/two")))
    assert list(hosts.where(F.at == IPv4Address("10.0.0.1")).values()) == [one]
    assert list(hosts.where(log=Path("/var/log/one")).values()) == [one]


def test_an_entity_that_does_not_fit_is_named_and_can_be_passed_over() -> None:
    with Database(MemoryStorage()) as db:
        db.collection("teas")[uid(1)] = {"name": 7, "price": "x"}
        db.collection("teas")[uid(2)] = {"name": "Assam", "price": 3.0}
        teas = db.collection("teas", Tea)
        with pytest.raises(ValueTypeError, match=f"entity {uid(1)} of 'teas'"):
            list(teas.where(F.price.exists()))
        assert list(teas.where(F.price < 9)) == [(uid(2), Tea("Assam", 3.0))]


# ---------------------------------------------------------------- what it takes


def test_explain_says_how_much_was_looked_at_and_decoded(db: Database) -> None:
    plan = db.collection("stock").where(F.kind == "cup", F.price > 3).order_by("-price").explain()
    assert (plan.way, plan.entities, plan.decoded, plan.found) == ("scan", 5, 2, 1)
    assert str(plan) == (
        "scan of 'stock' for F.kind == 'cup' & F.price > 3, sorted by F.price descending: "
        "5 entities looked at, 2 decoded, 1 found"
    )
    assert str(db.collection("stock").where().explain()) == (
        "scan of 'stock' for everything: 5 entities looked at, 0 decoded, 5 found"
    )


@pytest.mark.parametrize(
    ("condition", "decoded"),
    [
        (F.kind == "tea", 3),
        (F["from"].land == "India", 1),
        (F.price == 9, 1),
        (F.price == 9.0, 1),
        (F.name.startswith("Sencha"), 2),
        (F.tags.contains("smoked"), 1),
        (F.kind.in_(["cup", "pot"]), 2),
        ((F.kind == "cup") & (F.price > 3), 2),
        ((F.kind == "cup") | (F.price == 3), 3),
        ((F.kind == "cup") | (F.price > 3), 4),
        (F.price > 3, 3),
        (F.price.between(4, 5), 1),
        (F.price < -1.5, 0),
        (F.kind.in_(["cup", "pot", "a", "b", "c"]), 2),
        (~(F.kind == "tea"), 5),
        (F.tags == ["smoked", 7], 5),
    ],
    ids=repr,
)
def test_what_cannot_match_is_not_decoded(db: Database, condition: Condition, decoded: int) -> None:
    assert db.collection("stock").where(condition).explain().decoded == decoded


# ---------------------------------------------------------------- a loop in Python

FEW_NUMBERS = [0, 1, 1.0, 1.5, -1, 2, 2**53, 2**53 + 1, float(2**53), 2**64 - 1, 1e300]
EDGES = [23, 24, 255.5, 256, -25, 2**32, 2**63, float(2**63), -(2**63) - 1, -(2**64), 5e-324, -1e-9]
NUMBERS = st.sampled_from(FEW_NUMBERS) | st.sampled_from(EDGES)
TEXTS = st.sampled_from(["", "a", "ab", "b", "é", "😀"]) | st.sampled_from(
    ["\0", "a\0", "a\0b", "\uffff", "aa\x05"]
)
SIMPLE = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = (
    SIMPLE
    | st.binary(max_size=2)
    | st.lists(SIMPLE, max_size=2)
    | st.dictionaries(st.sampled_from(["a", "b"]), SIMPLE, max_size=2)
)
ENTITIES = st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES, max_size=3) | SIMPLE.filter(
    lambda value: value is not None
)
PATHS = st.sampled_from([("a",), ("b",), ("c", "a"), ("none",)])


def same(one: Any, other: Any) -> bool:
    return one is not MISSING and order_key(one) == order_key(other)


def beside(one: Any, other: Any) -> bool:
    return one is not MISSING and order_key(one)[0] == order_key(other)[0]


def by_hand(path: tuple[str, ...], sign: str, other: Any) -> Callable[[Any], bool]:
    """A comparison as one would write it in a loop, by other means than the code's own."""
    key = order_key(other)

    def judge(value: Any) -> bool:
        got = field_of(value, path)
        if sign == "==":
            return same(got, other)
        if not beside(got, other):
            return False
        here = order_key(got)
        return {"<": here < key, "<=": here <= key, ">": here > key, ">=": here >= key}[sign]

    return judge


@st.composite
def compared(draw: Any) -> tuple[Condition, Callable[[Any], bool]]:
    path, other = draw(PATHS), draw(VALUES)
    ordered = order_key(other)[0] >= 3
    sign = draw(st.sampled_from(["==", "<", "<=", ">", ">="] if ordered else ["=="]))
    field: Any = Field(path)
    made = {
        "==": lambda: field == other,
        "<": lambda: field < other,
        "<=": lambda: field <= other,
        ">": lambda: field > other,
        ">=": lambda: field >= other,
    }[sign]()
    return made, by_hand(path, sign, other)


Both = tuple[Condition, Callable[[Any], bool]]


def joined(parts: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
    def both(one: Both, other: Both) -> Both:
        return one[0] & other[0], lambda value: one[1](value) and other[1](value)

    def either(one: Both, other: Both) -> Both:
        return one[0] | other[0], lambda value: one[1](value) or other[1](value)

    def negated(one: Both) -> Both:
        return ~one[0], lambda value: not one[1](value)

    return (
        st.builds(both, parts, parts) | st.builds(either, parts, parts) | st.builds(negated, parts)
    )


CONDITIONS = st.recursive(compared(), joined, max_leaves=5)
ORDERS = st.lists(st.tuples(PATHS, st.booleans()), max_size=2)


@settings(max_examples=300)
@given(
    entities=st.dictionaries(st.integers(0, 40), ENTITIES, max_size=12),
    both=CONDITIONS,
    orders=ORDERS,
    limit=st.none() | st.integers(0, 5),
    page=st.integers(1, 4),
)
def test_any_query_gives_what_a_loop_gives(
    entities: dict[int, Any],
    both: Both,
    orders: list[tuple[tuple[str, ...], bool]],
    limit: int | None,
    page: int,
) -> None:
    condition, judge = both
    expected = [(n, entities[n]) for n in sorted(entities) if judge(entities[n])]
    if orders:
        expected.sort(key=lambda row: row[0], reverse=orders[-1][1])
        for path, descending in reversed(orders):
            expected.sort(
                key=lambda row, path=path: order_key(field_of(row[1], path)),  # type: ignore[misc]
                reverse=descending,
            )
    with Database(MemoryStorage()) as db:
        collection = db.collection("things")
        with db.transaction() as tx:
            for number, value in entities.items():
                tx.collection("things")[uid(number)] = value
        query = collection.where(condition)
        if orders:
            query = query.order_by(
                *["-" * descending + ".".join(path) for path, descending in orders]
            )
        assert [i.int for i in query.ids()] == [n for n, _ in expected]
        assert query.count() == len(expected)
        if limit is not None:
            assert [i.int for i in query.limit(limit).ids()] == [n for n, _ in expected[:limit]]
        turned: list[int] = []
        last: tuple[uuid.UUID, Any] | None = None
        while rows := list(query.after(last).limit(page)):
            turned += [i.int for i, _ in rows]
            last = rows[-1]
            assert len(turned) <= len(expected)
        assert turned == [n for n, _ in expected]

"""Indexes: any query gives what a loop gives, whichever there are; they are in step with the
entities after every commit, whoever makes it."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from entidb import F, Index
from entidb.db import Condition, Database, purge_tombstones, scans
from entidb.db import index_care as care
from entidb.db.conditions import Field
from entidb.db.core import Core
from entidb.db.index_care import build_step, declare
from entidb.db.index_keys import INDEXED_BYTES_MAX, index_prefix
from entidb.db.index_pace import Pace
from entidb.db.indexing import maker_of
from entidb.db.looking import MISSING, field_of, order_key
from entidb.db.maintenance import sweep_garbage
from entidb.db.records import INDEX, INDEX_COUNT, META_CATALOGUE, META_FORMAT, end_of, format_of
from entidb.db.sort_keys import sort_key
from entidb.errors import ConfigError, QueryError, ScanWarning, ScopeError, TransactionError
from entidb.storage import MemoryStorage
from tests.db.test_query import CONDITIONS, ENTITIES, NUMBERS, PATHS, Both, by_hand
from tests.support import Crash, FakeClock, WatchedStorage, World, uid


def first_letter(value: Any) -> Any:
    """A function of a module, as an index takes."""
    return value[0]


def words(value: str) -> list[str]:
    return value.split()


async def soon(value: str) -> str:
    return value


def one_by_one(value: str) -> Iterator[str]:
    yield from value


# ---------------------------------------------------------------- a loop in Python

LONG = "x" * INDEXED_BYTES_MAX
#: Text that has no room in a key, alone or behind another.
TEXTS = st.sampled_from(["", "a", "ab", LONG, LONG + "a", LONG + "b", "y" * 470, "y" * 470 + "a"])
WITH_TEXTS = st.one_of(
    ENTITIES,
    st.fixed_dictionaries(
        {"a": TEXTS | NUMBERS}, optional={"b": TEXTS | NUMBERS | st.lists(TEXTS, max_size=2)}
    ),
)
INDEXES = st.lists(
    st.sampled_from(
        [
            Index("a"),
            Index("b"),
            Index("a", "b"),
            Index("b", "a"),
            Index("c.a"),
            Index("a", "c.a", "b"),
            Index("a", each=True),
            Index("b", each=True),
            Index("a", key=first_letter),
        ]
    ),
    max_size=5,
    unique=True,
)


@st.composite
def asked(draw: Any) -> Both:
    """What else can be asked of a field, and what a loop would ask."""
    path = draw(st.sampled_from([("a",), ("b",)]))
    field: Any = Field(path)
    text = draw(TEXTS)
    number = draw(NUMBERS)

    def got(value: Any) -> Any:
        return field_of(value, path)

    one, other = text[:480], draw(st.sampled_from([0, 1, "a", LONG]))

    def has(value: Any) -> bool:
        found = got(value)
        if isinstance(found, list):
            return any(order_key(item) == order_key(other) for item in found)
        return isinstance(other, str) and isinstance(found, str) and other in found

    def begins(value: Any) -> bool:
        found = got(value)
        return isinstance(found, str) and found.startswith(one)

    def made(value: Any) -> bool:
        found = got(value)
        try:
            return isinstance(found[0], str) and found[0] == "a"
        except Exception:
            return False

    found: Both = draw(
        st.sampled_from(
            [
                (field.startswith(one), begins),
                (field.contains(other), has),
                (field.exists(), lambda value: got(value) is not MISSING),
                (
                    field.in_([text, other]),
                    lambda value: (
                        by_hand(path, "==", text)(value) or by_hand(path, "==", other)(value)
                    ),
                ),
                (field.by(first_letter) == "a", made),
                (field == text, by_hand(path, "==", text)),
                *[
                    (compared(bound), by_hand(path, sign, bound))
                    for bound in (text, number)
                    for sign, compared in {
                        "<": field.__lt__,
                        "<=": field.__le__,
                        ">": field.__gt__,
                        ">=": field.__ge__,
                    }.items()
                ],
            ]
        )
    )
    return found


def all_of(parts: list[Both]) -> Both:
    condition: Condition = parts[0][0]
    for part in parts[1:]:
        condition = condition & part[0]
    return condition, lambda value: all(judge(value) for _, judge in parts)


QUESTIONS = st.lists(asked() | CONDITIONS, min_size=1, max_size=3).map(all_of)
ORDERS = st.lists(st.tuples(PATHS, st.booleans()), max_size=2)
Orders = list[tuple[tuple[str, ...], bool]]


def by_loop(entities: dict[int, Any], judge: Callable[[Any], bool], orders: Orders) -> list[int]:
    expected = [(n, entities[n]) for n in sorted(entities) if judge(entities[n])]
    if orders:
        expected.sort(key=lambda row: row[0], reverse=orders[-1][1])
        for path, descending in reversed(orders):
            expected.sort(
                key=lambda row, path=path: order_key(field_of(row[1], path)),  # type: ignore[misc]
                reverse=descending,
            )
    return [n for n, _ in expected]


def ask_everything(collection: Any, both: Both, orders: Orders, entities: dict[int, Any]) -> None:
    """Every way to ask a question, against the loop."""
    condition, judge = both
    expected = by_loop(entities, judge, orders)
    query = collection.where(condition)
    if orders:
        query = query.order_by(*["-" * down + ".".join(path) for path, down in orders])
    assert [i.int for i in query.ids()] == expected
    assert query.count() == len(expected)
    for limit in (1, 3):
        assert [i.int for i in query.limit(limit).ids()] == expected[:limit]
    turned: list[int] = []
    last: tuple[uuid.UUID, Any] | None = None
    while rows := list(query.after(last).limit(2)):
        turned += [i.int for i, _ in rows]
        last = rows[-1]
        assert len(turned) <= len(expected)
    assert turned == expected
    fields = [field_of(entities[n], ("a",)) for n in expected]
    found = sorted([value for value in fields if value is not MISSING], key=order_key)
    least, largest = query.min("a"), query.max("a")
    assert order_key(least) == order_key(found[0] if found else None)
    assert order_key(largest) == order_key(found[-1] if found else None)


@settings(max_examples=400)
@given(
    entities=st.dictionaries(st.integers(0, 40), WITH_TEXTS, max_size=12),
    indexes=INDEXES,
    both=QUESTIONS,
    orders=ORDERS,
    before=st.booleans(),
    mine=st.dictionaries(st.integers(0, 40), st.none() | WITH_TEXTS, max_size=4),
)
def test_any_query_gives_what_a_loop_gives_with_any_indexes(
    entities: dict[int, Any],
    indexes: list[Index],
    both: Both,
    orders: Orders,
    before: bool,
    mine: dict[int, Any],
) -> None:
    with Database(MemoryStorage()) as db:
        if before:
            declare(db, "things", indexes)
        with db.transaction() as tx:
            for number, value in entities.items():
                tx.collection("things")[uid(number)] = value
        declare(db, "things", indexes)
        db.wait_for_indexes()
        assert db.verify() == []
        ask_everything(db.collection("things"), both, orders, entities)
        with db.transaction() as tx:
            things, inside = tx.collection("things"), dict(entities)
            for number, value in mine.items():
                if value is None:
                    things.pop(uid(number), None)
                    inside.pop(number, None)
                else:
                    things[uid(number)] = inside[number] = value
            ask_everything(things, both, orders, inside)
        assert db.verify() == []
        ask_everything(db.collection("things"), both, orders, inside)


#: Few values, so that many are equal and many bounds are met.
FEW = st.sampled_from([None, 0, 1, 1.5, 2, "a", "b", LONG + "a", LONG + "b"])
PAIRS = st.fixed_dictionaries({}, optional={"a": FEW, "b": FEW})
A, B = ("a",), ("b",)


@st.composite
def narrow(draw: Any) -> Both:
    """Fields that are equal, and one range: what an index is made for."""
    parts: list[Both] = []
    if draw(st.booleans()):
        value = draw(FEW)
        parts.append((F.a == value, by_hand(A, "==", value)))
    path = draw(st.sampled_from([A, B]))
    bound = draw(FEW.filter(lambda value: value is not None))
    field: Any = Field(path)
    compared = {"<": field < bound, "<=": field <= bound, ">": field > bound, ">=": field >= bound}
    for sign in draw(st.lists(st.sampled_from(sorted(compared)), max_size=2)):
        parts.append((compared[sign], by_hand(path, sign, bound)))
    if not parts:
        parts.append((F.b.exists(), lambda value: "b" in value))
    return all_of(parts)


@settings(max_examples=400)
@given(
    entities=st.dictionaries(st.integers(0, 40), PAIRS, min_size=3, max_size=15),
    indexes=st.lists(
        st.sampled_from([Index("a"), Index("b"), Index("a", "b"), Index("b", "a")]),
        min_size=1,
        max_size=2,
        unique=True,
    ),
    both=narrow(),
    orders=st.sampled_from(
        [
            [],
            [(A, False)],
            [(B, False)],
            [(B, True)],
            [(A, True), (B, True)],
            [(A, False), (B, True)],
        ]
    ),
)
def test_what_an_index_is_made_for_is_what_a_loop_gives(
    entities: dict[int, Any], indexes: list[Index], both: Both, orders: Orders
) -> None:
    with Database(MemoryStorage()) as db:
        things = db.collection("things")
        with db.transaction() as tx:
            for number, value in entities.items():
                tx.collection("things")[uid(number)] = value
        declare(db, "things", indexes)
        db.wait_for_indexes()
        ask_everything(things, both, orders, entities)


# ---------------------------------------------------------------- in step, whatever happens


class Life(RuleBasedStateMachine):
    """A server and two devices with indexes that come and go, while all goes on."""

    names = st.sampled_from(["things", "others"])
    who = st.integers(0, 2)
    values = WITH_TEXTS

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.devices = [self.world.device(pull_operations_max=3) for _ in range(2)]
        self.saved = self.world.backup_server()

    def databases(self) -> list[Database]:
        return [self.world.server, *[device.db for device in self.devices]]

    @rule(who=who, name=names, rows=st.dictionaries(st.integers(0, 6), st.none() | values))
    def commit(self, who: int, name: str, rows: dict[int, Any]) -> None:
        with self.databases()[who].transaction() as tx:
            for number, value in rows.items():
                if value is None:
                    tx.collection(name).pop(uid(number), None)
                else:
                    tx.collection(name)[uid(number)] = value

    @rule(who=st.integers(0, 1))
    def sync(self, who: int) -> None:
        self.devices[who].sync()

    @rule(who=st.integers(0, 1), value=values)
    def write_many_and_sync(self, who: int, value: Any) -> None:
        for number in range(5):
            self.devices[who].put(("things", number, value))
        self.devices[who].settle()

    @rule(who=who, name=names, indexes=INDEXES)
    def declare(self, who: int, name: str, indexes: list[Index]) -> None:
        declare(self.databases()[who], name, indexes)

    @rule(who=who, rows=st.integers(1, 4))
    def build(self, who: int, rows: int) -> None:
        build_step(self.databases()[who], rows)

    @rule(who=who, places=st.integers(1, 4))
    def build_from_a_run(self, who: int, places: int) -> None:
        build_step(self.databases()[who], places=places)

    @rule(who=who)
    def rebuild(self, who: int) -> None:
        care.rebuild(self.databases()[who])

    @rule(who=who)
    def sweep(self, who: int) -> None:
        sweep_garbage(self.databases()[who])

    @rule(who=st.integers(0, 1))
    def restart(self, who: int) -> None:
        self.devices[who].restart()

    @rule(who=st.integers(0, 1), wide=st.booleans())
    def change_scope(self, who: int, wide: bool) -> None:
        with contextlib.suppress(ScopeError):  # what is pending keeps its collection
            self.devices[who].db.set_scope(None if wide else ["things"])

    @rule(keep=st.sampled_from(["server", "device"]))
    def go_back(self, keep: str) -> None:
        self.world.open_server(self.saved.copy())
        for device in self.devices:
            device.engine.reset(keep=keep)

    @rule()
    def purge(self) -> None:
        purge_tombstones(self.world.server, self.world.server.sequence)

    @invariant()
    def in_step(self) -> None:
        for database in self.databases():
            assert database.verify() == []

    @rule(who=who, name=names, both=QUESTIONS, orders=ORDERS)
    def ask(self, who: int, name: str, both: Both, orders: Orders) -> None:
        collection = self.databases()[who].collection(name)
        ask_everything(collection, both, orders, {i.int: v for i, v in collection.items()})


Life.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestLife = Life.TestCase


# ---------------------------------------------------------------- declared, built, dropped

TEAS = [{"kind": ["tea", "cup"][n % 2], "price": n, "tags": ["new"] * (n % 3)} for n in range(20)]


def stored(db: Database, *indexes: Index) -> Any:
    """A collection of twenty, with ``indexes`` that are not built yet."""
    stock = db.collection("stock")
    with db.transaction() as tx:
        for number, value in enumerate(TEAS):
            tx.collection("stock")[uid(number)] = value
    declare(db, "stock", list(indexes))
    return stock


def places(db: Database) -> list[bytes]:
    with db.storage.snapshot() as snapshot:
        return snapshot.scan_keys(INDEX, end_of(INDEX_COUNT))


def format_now(db: Database) -> int:
    with db.storage.snapshot() as snapshot:
        return format_of(snapshot.get(META_FORMAT) or b"")


@pytest.fixture
def db() -> Iterator[Database]:
    with Database(MemoryStorage(), clock=FakeClock(), entropy=random.Random(1).randbytes) as made:
        yield made


def test_an_index_is_declared_where_a_collection_is_opened_and_built_in_the_background(
    db: Database,
) -> None:
    stored(db)
    stock = db.collection("stock", indexes=[Index("kind", "price"), Index("tags", each=True)])
    db.wait_for_indexes()
    found = [(status.index, status.ready, status.done) for status in db.indexes()]
    assert found == [("kind, price", True, 20), ("tags each", True, 13)]
    assert [value["price"] for value in stock.where(kind="cup").order_by("-price").values()] == [
        *range(19, 0, -2)
    ]
    assert db.verify() == []


def test_what_an_index_answers_is_explained_with_what_was_read(db: Database) -> None:
    stock = stored(db, Index("kind", "price"))
    query = stock.where(F.price >= 15, kind="cup").order_by("price")
    assert (query.explain().way, query.explain().entities) == ("scan", 20)
    db.wait_for_indexes()
    assert str(query.explain()) == (
        "index(kind, price) of 'stock' for F.price >= 15 & F.kind == 'cup', sorted by F.price: "
        "3 entities looked at, 3 decoded, 3 found"
    )
    assert query.limit(1).explain().entities == 1


def test_the_longest_run_of_equal_fields_wins_and_then_a_range_or_the_order(db: Database) -> None:
    stock = stored(db, Index("kind"), Index("price"), Index("kind", "price"))
    db.wait_for_indexes()
    ways = {
        stock.where(kind="tea"): "index(kind)",
        stock.where(F.price > 3): "index(price)",
        stock.where(F.price > 3, kind="tea"): "index(kind, price)",
        stock.where(kind="tea").order_by("price"): "index(kind, price)",
        stock.order_by("-price").limit(3): "index(price)",
        stock.order_by("price"): "scan",
        stock.where(F.name == "x"): "scan",
        stock.where(~(F.kind == "tea")): "scan",
    }
    for query, way in ways.items():
        assert query.explain().way == way, query


def test_the_least_and_the_largest_value_come_from_the_ends_of_an_index(db: Database) -> None:
    stock = stored(db, Index("price"), Index("kind", "price"))
    assert (stock.where().min("price"), stock.where(kind="tea").max("price")) == (0, 18)
    db.wait_for_indexes()
    assert (stock.where().min("price"), stock.where(kind="tea").max("price")) == (0, 18)
    assert (stock.where().min("none"), stock.where(F.price > 99).max("price")) == (None, None)
    assert stock.where(kind="tea").limit(2).max("price") == 2


def test_a_page_that_begins_at_an_entity_of_another_kind_is_right(db: Database) -> None:
    stock = stored(db, Index("kind", "price"))
    db.wait_for_indexes()
    query = stock.where(kind="cup").order_by("kind", "price")
    tea = (uid(6), TEAS[6])
    assert [value["price"] for value in query.after(tea).values()] == []
    cup = (uid(5), TEAS[5])
    tea_query = stock.where(kind="tea").order_by("kind", "price")
    assert [value["price"] for value in tea_query.after(cup).limit(2).values()] == [0, 2]


def test_scan_false_is_an_error_where_no_index_is_ready(db: Database) -> None:
    stock = stored(db, Index("price"))
    for query in (stock.where(F.price > 3), stock.where(kind="tea")):
        with pytest.raises(QueryError, match="no index that is ready answers") as caught:
            list(query.scan(False))
        assert caught.value.code == "no_index"
    db.wait_for_indexes()
    assert stock.where(F.price > 3).scan(False).count() == 16
    with pytest.raises(QueryError, match=r'declare Index\("kind"\)'):
        stock.where(kind="tea").scan(False).first()


def test_a_query_that_looks_at_very_many_says_once_which_index_would_help(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "SCANNED_MAX", 10)
    monkeypatch.setattr(scans, "_told", set())
    stock = stored(db)
    asks: list[tuple[Callable[[], int], str]] = [
        (lambda: stock.where(F.price > 3, kind="tea").count(), 'Index("kind", "price")'),
        (lambda: stock.where(F.tags.contains("new")).count(), 'Index("tags", each=True)'),
        (
            lambda: stock.where(F.kind.by(str.upper) == "TEA").count(),
            'Index("kind", key=str.upper)',
        ),
    ]
    for ask, index in asks:
        with pytest.warns(ScanWarning, match="looks at all 20 entities of 'stock'") as w:
            ask()
        assert f"indexes=[{index}]" in str(w[0].message)
        ask()  # a second time without a word: warnings are errors here
    stock.where().count()


def test_a_build_goes_on_where_it_was_after_a_kill() -> None:
    storage = MemoryStorage()
    db = Database(storage, clock=FakeClock(), entropy=random.Random(1).randbytes)
    stored(db, Index("kind", "price"))
    for _ in range(2):
        assert build_step(db, 5)
    assert [(status.ready, status.done) for status in db.indexes()] == [(False, 10)]
    assert db.verify() == []
    # What is written meanwhile is in it, on both sides of where it stands.
    db.collection("stock")[uid(2)] = {"kind": "pot", "price": 1}
    db.collection("stock")[uid(15)] = {"kind": "pot", "price": 2}
    db.collection("stock")[uid(30)] = {"kind": "pot", "price": 3}
    del db.collection("stock")[uid(3)]
    del db.collection("stock")[uid(16)]
    assert db.verify() == []
    again = Database(storage.copy(), clock=FakeClock())
    looked = [again.indexes()[0].done]
    while build_step(again, 5):
        looked.append(again.indexes()[0].done)
    assert looked == [9, 14, 18, 19]
    assert again.verify() == []
    assert again.collection("stock").where(kind="pot").explain().way == "index(kind, price)"
    assert again.collection("stock").where(kind="pot").count() == 3


@pytest.mark.parametrize("after", [False, True])
def test_a_build_that_dies_at_any_commit_leaves_a_sound_database(after: bool) -> None:
    for nth in range(1, 9):
        storage = WatchedStorage(MemoryStorage())
        db = Database(storage, clock=FakeClock(), entropy=random.Random(1).randbytes)
        stock = stored(db)
        storage.fail(nth, after=after)
        with contextlib.suppress(Crash):
            declare(db, "stock", [Index("price")])
            while build_step(db, 6):
                pass
            declare(db, "stock", [])
            while build_step(db, 6):
                pass
        again = Database(storage.inner, clock=FakeClock())
        assert again.verify() == []
        declare(again, "stock", [Index("price")])
        again.wait_for_indexes()
        assert again.verify() == []
        assert again.collection("stock").where(F.price < 3).explain().way == "index(price)"
        assert stock is not None


def test_an_index_that_is_not_declared_any_more_is_emptied_in_bounded_commits(
    db: Database,
) -> None:
    stock = stored(db, Index("price"), Index("kind"))
    db.wait_for_indexes()
    assert db.collection("stock") is not None
    assert len(db.indexes()) == 2, "opening without a word about indexes leaves them"
    db.index_paces.dropped = Pace(6)
    declare(db, "stock", [Index("kind")])
    assert stock.where(F.price < 3).explain().way == "scan"
    left = [len(places(db))]
    while build_step(db):
        left.append(len(places(db)))
        assert db.verify() == []
    assert left == [42, 36, 30, 24, 21]
    assert stock.where(kind="tea").explain().way == "index(kind)"


def test_a_database_with_an_index_is_of_a_newer_format_until_the_last_is_gone(
    db: Database,
) -> None:
    """An older EntiDB would let an index drift, so it must not open the database."""
    stored(db)
    assert format_now(db) == 2
    declare(db, "stock", [Index("kind")])
    assert format_now(db) == 3
    db.wait_for_indexes()
    for _ in range(3):  # commits that leave stale feed rows say what format it is, too
        with db.transaction() as tx:
            for number in range(10):
                tx.collection("stock")[uid(number)] = {"kind": "x"}
    assert format_now(db) == 3
    declare(db, "stock", [])
    assert format_now(db) == 3
    db.wait_for_indexes()
    assert (format_now(db), places(db)) == (2, [])
    with db.storage.snapshot() as snapshot:
        assert b"indexes" not in (snapshot.get(META_CATALOGUE) or b"")


def test_a_backup_says_the_format_of_what_it_copies(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        stored(db, Index("kind"))
        db.wait_for_indexes()
        db.backup(tmp_path / "copy")
    with Database.open(tmp_path / "copy", read_only=True) as copy:
        assert format_now(copy) == 3
        assert copy.collection("stock").where(kind="tea").explain().way == "index(kind)"
    with Database.open(tmp_path / "copy") as copy:
        assert format_now(copy) == 3
        assert copy.verify() == []


def test_while_the_files_are_copied_no_index_changes_their_format(db: Database) -> None:
    stored(db)
    db._busy_timeout_s = 0.01
    with db._format_lock, pytest.raises(TransactionError, match="is being copied") as caught:
        db.collection("stock", indexes=[Index("kind")])
    assert caught.value.code == "busy"
    assert (db.indexes(), format_now(db)) == ([], 2)


def test_a_database_opened_to_read_uses_the_indexes_it_has(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        stored(db, Index("kind"))
        db.wait_for_indexes()
    with Database.open(tmp_path / "db", read_only=True) as db:
        stock = db.collection("stock", indexes=[Index("kind"), Index("price")])
        assert stock.where(kind="tea").explain().way == "index(kind)"
        assert stock.where(price=3).explain().way == "scan"
        assert len(db.indexes()) == 1


def test_a_first_sync_has_its_indexes_when_readers_see_it() -> None:
    world = World()
    for number, value in enumerate(TEAS):
        world.put(("stock", number, value))
    device = world.device(pull_operations_max=3)
    stock = device.db.collection("stock", indexes=[Index("kind", "price")])
    device.settle()
    assert stock.where(kind="tea").explain().way == "index(kind, price)"
    assert stock.where(kind="tea").count() == 10
    assert device.db.verify() == []
    # And so does what a reset brings, in another table.
    device.engine.reset(keep="server")
    device.settle()
    assert stock.where(kind="tea").explain().way == "index(kind, price)"
    while sweep_garbage(device.db):
        pass
    assert device.db.verify() == []


def test_a_program_without_the_function_of_an_index_has_it_built_again(db: Database) -> None:
    stock = stored(db, Index("kind", key=first_letter))
    db.wait_for_indexes()
    query = stock.where(F.kind.by(first_letter) == "t")
    assert (query.explain().way, query.count()) == (f"index(kind by {__name__}.first_letter)", 10)
    del db.index_functions[f"{__name__}.first_letter"]  # as another program
    stock[uid(50)] = {"kind": "toast"}
    assert [(status.ready, status.paused) for status in db.indexes()] == [(False, True)]
    assert (query.explain().way, query.count()) == ("scan", 11)
    db.wait_for_indexes()
    assert db.verify() == []
    assert query.explain().way == "scan"
    declare(db, "stock", [Index("kind", key=first_letter)])
    db.wait_for_indexes()
    assert (query.explain().way != "scan", query.count()) == (True, 11)
    assert db.verify() == []


def test_an_index_of_words_finds_text_by_one_of_them(db: Database) -> None:
    notes = db.collection("notes", indexes=[Index("text", each=True, key=words)])
    for number, text in enumerate(["green tea", "a cup of tea", "teapot", 7]):
        notes[uid(number)] = {"text": text}
    db.wait_for_indexes()
    query = notes.where(F.text.by(words).contains("tea"))
    assert [i.int for i in query.ids()] == [0, 1]
    assert query.explain().way.startswith("index(text each by ")
    assert db.verify() == []


def test_verify_names_what_differs_between_an_index_and_the_entities(db: Database) -> None:
    stored(db, Index("price"))
    db.wait_for_indexes()
    (index,) = [index for info in _infos(db) for index in info.indexes]
    (info,) = _infos(db)
    prefix = index_prefix(index.number, info.table)
    right = prefix + sort_key(4) + uid(4).bytes
    wrong = prefix + sort_key(5) + uid(4).bytes
    db.storage.commit({right: None, wrong: b""})
    name = uid(4).bytes.hex()
    assert db.verify() == [
        f"index price of stock: entity {name} is not in its place",
        f"index price of stock: entity {name} stands where it does not belong",
    ]
    db.storage.commit({right: b"", wrong: None, index_prefix(9, info.table) + right[9:]: b""})
    assert db.verify() == ["there are places in index number 9, which nobody knows"]
    db.storage.commit({index_prefix(9, info.table) + right[9:]: None})
    db.storage.commit({INDEX_COUNT + prefix[1:]: bytes(7) + b"\x13"})
    assert db.verify() == ["index price of stock counts 19 entities, 20 belong into it"]
    db.rebuild_indexes("stock")
    db.wait_for_indexes()
    assert db.verify() == []


def _infos(db: Database) -> list[Any]:
    with db.view() as view:
        return list(view.catalogue.by_number.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("kind", "are a list like"),
        (["kind"], "are a list like"),
        ([Index()], "takes 1 to 8 fields"),
        ([Index(*"abcdefghi")], "takes 1 to 8 fields"),
        ([Index("a.")], "is its name"),
        ([Index("a", "a")], "names a field twice"),
        ([Index("a"), Index("a")], "the same index twice"),
        ([Index("a", "b", each=True)], "for an index of one field"),
        ([Index("a", "b", key=str.upper)], "for an index of one field"),
        ([Index("a", key=lambda value: value)], "not known by a name"),
        ([Index("a", key=3)], "not known by a name"),  # type: ignore[arg-type]
        ([Index("a", key=soon)], "soon gives a coroutine or a generator"),
        ([Index("a", key=one_by_one)], "one_by_one gives a coroutine or a generator"),
    ],
)
def test_what_cannot_be_an_index_is_refused_and_nothing_is_changed(
    db: Database, given: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        db.collection("stock", indexes=given)
    assert db.indexes() == []


def test_a_collection_that_upgrades_what_it_reads_is_asked_without_an_index(db: Database) -> None:
    """Conditions are about the newest shape, and an index knows what is stored."""
    stored(db, Index("kind"))
    db.wait_for_indexes()
    upgrade = lambda value: {**value, "kind": value["kind"].upper()}  # noqa: E731
    stock = db.collection("stock", upgrade=upgrade)
    assert stock.where(kind="TEA").count() == 10
    plan = stock.where(kind="TEA").explain()
    assert plan.way == "scan" and "upgrade=" in plan.because and plan.because in str(plan)
    with pytest.raises(QueryError, match="read with upgrade="):
        stock.where(kind="TEA").scan(False).count()
    assert (stock.where().min("kind"), stock.where().max("kind")) == ("CUP", "TEA")


def test_the_least_value_is_told_also_where_an_entity_cannot_be_upgraded(db: Database) -> None:
    stock = db.collection("stock", upgrade=lambda value: {"price": 1 / value["price"]})
    db.collection("stock")[uid(1)] = {"price": 0}
    db.collection("stock")[uid(2)] = {"price": 2}
    assert (stock.where().min("price"), stock.where().max("price")) == (0, 0.5)


# ---------------------------------------------------------------- while an index is built


def test_a_query_says_that_the_index_it_would_use_is_not_built_yet(db: Database) -> None:
    stock = stored(db, Index("kind"), Index("price"))
    plan = stock.where(kind="tea").explain()
    assert (plan.way, plan.found) == ("scan", 10)
    assert plan.because == (
        "index(kind) is not built yet; db.wait_for_indexes() returns when it is"
    )
    assert str(plan).endswith(f"10 found ({plan.because})")
    assert stock.where(tags=[]).explain().because == ""
    with pytest.raises(QueryError, match=r"index\(kind\) is not built yet") as caught:
        stock.where(kind="tea").scan(False).first()
    assert caught.value.code == "no_index"
    with db.transaction() as tx:
        assert tx.collection("stock").where(kind="tea").explain().because == plan.because
    db.wait_for_indexes()
    assert stock.where(kind="tea").explain().because == ""
    care.rebuild(db)
    assert stock.where(kind="tea").explain().because == plan.because


def test_one_waits_for_indexes_as_long_as_one_likes(db: Database) -> None:
    stock = stored(db, Index("kind"))
    assert db.wait_for_indexes(timeout_s=0) is False
    assert db.wait_for_indexes(timeout_s=600) is True
    assert stock.where(kind="tea").scan(False).count() == 10
    assert db.wait_for_indexes(timeout_s=0) is True
    for wrong in (-1, float("nan"), "1"):
        with pytest.raises(ConfigError, match="timeout_s"):
            db.wait_for_indexes(timeout_s=wrong)  # type: ignore[arg-type]


def test_two_that_build_take_turns_and_end_no_run_of_each_other(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(db, Index("kind"))
    with db.index_lock:
        # Another thread is at it: who has no time left does nothing.
        assert build_step(db, is_ended=lambda: True)
    assert not db.indexes()[0].ready
    monkeypatch.setattr(care, "_build", lambda *given: pytest.fail("a run was ended"))
    db.build_indexes()
    db.wait_for_indexes()
    assert db.indexes()[0].ready and db.verify() == []


def test_of_an_index_that_is_being_built_no_warning_asks_for_it(
    db: Database, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(scans, "SCANNED_MAX", 5)
    monkeypatch.setattr(scans, "_told", set())
    stock = stored(db, Index("kind"))
    assert stock.where(kind="tea").count() == 10
    assert [str(one.message) for one in recwarn if one.category is ScanWarning] == []
    upgraded = db.collection("stock", upgrade=dict)
    with pytest.warns(ScanWarning, match="entidb migrate"):
        assert upgraded.where(kind="tea").count() == 10


# ---------------------------------------------------------------- one place


def test_equal_fields_are_found_at_one_place_without_decoding(db: Database) -> None:
    stock = stored(db, Index("kind", "price"), Index("kind"))
    db.wait_for_indexes()
    plan = stock.where(kind="cup").explain()
    assert (plan.way, plan.decoded, plan.found) == ("index(kind)", 0, plan.entities)
    assert list(stock.where(kind="cup")) == [
        pair for pair in stock.items() if pair[1].get("kind") == "cup"
    ]
    both = stock.where(F.price == 3.0, kind="cup")
    assert both.explain().way == "index(kind, price)"
    assert [value["price"] for value in both.values()] == [3]
    assert stock.where(kind="cup").limit(2).count() == 2
    assert len(list(stock.where(kind="cup").limit(2))) == 2
    assert stock.where(kind="none").first() is None
    with db.transaction() as tx:
        tx.collection("stock")[uid(99)] = {"kind": "cup", "price": 3}
        inside = tx.collection("stock").where(F.price == 3, kind="cup")
        assert uid(99) in list(inside.ids())


def test_what_a_function_makes_of_a_field_is_no_field_inside_it(db: Database) -> None:
    stock = db.collection("stock", indexes=[Index("name.str.lower"), Index("name")])
    stock[uid(1)] = {"name": "TEA"}
    db.wait_for_indexes()
    assert [i.int for i in stock.where(F.name.by(str.lower) == "tea").ids()] == [1]


def test_a_value_that_has_no_room_in_a_key_is_compared_whole(db: Database) -> None:
    stock = db.collection("stock", indexes=[Index("name")])
    stock[uid(1)] = {"name": LONG + "a"}
    stock[uid(2)] = {"name": LONG + "b"}
    assert [i.int for i in stock.where(name=LONG + "b").ids()] == [2]


def test_who_waits_for_nothing_makes_no_file(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a") as db:
        db.collection("notes").add({"text": "x"})
        before = sorted(os.listdir(tmp_path / "a"))
        assert db.wait_for_indexes()
        assert sorted(os.listdir(tmp_path / "a")) == before


# ---------------------------------------------------------------- what is written down


@pytest.mark.parametrize("given", [1, 0, None, "yes", 1.5, float("nan"), [], b""])
@pytest.mark.parametrize("setting", ["each", "unique"])
def test_a_setting_that_is_no_yes_or_no_is_refused(tmp_path: Path, setting: str, given: Any):
    """What is written into the catalogue is read again by every program."""
    options: dict[str, Any] = {setting: given}
    said = f"{setting} of an index of 'notes' is True or False"
    with Database.open(tmp_path / "db") as database, pytest.raises(ConfigError, match=said):
        database.collection("notes", indexes=[Index("a", **options)])
    with Database.open(tmp_path / "db") as database:
        database.collection("notes").add({"a": 1})
        assert database.verify() == []


@pytest.mark.parametrize("written", [{"each": 1}, {"each": 1, "unique": 0}])
def test_what_older_programs_have_written_for_yes_and_no_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, int]
):
    options: dict[str, Any] = {**written}
    monkeypatch.setattr("entidb.db.index_definition._check", lambda name, index: None)
    with Database.open(tmp_path / "db") as database:
        database.collection("notes", indexes=[Index("a", **options)]).add({"a": ["x", "y"]})
    monkeypatch.undo()
    with Database.open(tmp_path / "db") as database:
        notes = database.collection("notes", indexes=[Index("a", each=True)])
        assert notes.where(F.a.contains("y")).count() == 1
        assert database.verify() == []


def test_a_name_that_no_field_has_is_refused(tmp_path: Path):
    half = Index("\ud800")
    with Database.open(tmp_path / "db") as database, pytest.raises(ConfigError, match="its name"):
        database.collection("notes", indexes=[half])


def test_the_places_of_an_entity_are_made_once_to_verify_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = 0
    real = maker_of

    def counted(index: Any, functions: Any) -> Any:
        make = real(index, functions)
        assert make is not None

        def places(value: Any) -> Any:
            nonlocal made
            made += 1
            return make(value)

        return places

    monkeypatch.setattr("entidb.db.index_verify.maker_of", counted)
    with Database.open(tmp_path / "db") as database:
        notes = database.collection("notes", indexes=[Index("a", each=True)])
        first = notes.add({"a": list(range(5000))})
        notes.add({"a": list(range(2500, 7500))})
        assert database.verify() == []
        assert made == 4, "for the missing, and for the wrong"
        notes.patch(first, a=list(range(1, 5001)))
        assert database.verify() == []
        assert notes.where(F.a.contains(0)).count() == 0
        assert notes.where(F.a.contains(5000)).count() == 2


# ---------------------------------------------------------------- what nobody needs any more


def test_a_commit_is_let_go_when_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a circle with what keeps the indexes, each would stay in memory until a collection."""
    make, there = Core._writer, []

    def writer(database: Core, *rest: Any) -> Any:
        made = make(database, *rest)
        there.append(weakref.ref(made.watcher))
        return made

    with Database.open(tmp_path / "db") as database:
        notes = database.collection("notes", indexes=[Index("a")])
        database.wait_for_indexes()
        monkeypatch.setattr(Core, "_writer", writer)
        gc.disable()
        try:
            notes.add({"a": 1})
            with database.transaction() as tx:
                tx.collection("notes").add({"a": 2})
                tx.collection("notes").add({"a": 3})
        finally:
            gc.enable()
        assert len(there) >= 2 and [each() for each in there] == [None] * len(there)
        assert [value["a"] for _, value in notes.where(F.a > 0).order_by("a")] == [1, 2, 3]

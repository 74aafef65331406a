"""What a person sees who explores: the names that tab offers, one readable line for everything,
tables in a notebook; and the small things people reach for."""

from __future__ import annotations

import dataclasses
import html.parser
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest

from entidb import ConfigError, Database, F, SyncConfig, SyncCycleResult, SyncEngine
from entidb.db import Role
from entidb.errors import (
    DatabaseClosedError,
    DatabaseLockedError,
    ScopeError,
    TransactionError,
    ValueTypeError,
)
from entidb.sync import MockTransport
from tests.support import FakeClock, World, uid


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(clock=FakeClock()) as opened:
        yield opened


@dataclasses.dataclass
class Item:
    name: str
    price: int = 0


class ItemStruct(msgspec.Struct):
    name: str
    price: int = 0


class ItemModel(pydantic.BaseModel):
    name: str
    price: int = 0


# ---------------------------------------------------------------- names


def offered(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("__")}


def test_tab_offers_what_is_for_programs_and_no_plumbing(db: Database) -> None:
    stock = db.collection("stock", Item)
    engine = SyncEngine(SyncConfig(db_id="x"), MockTransport(lambda request: None), db)  # type: ignore[arg-type,return-value]
    with db.transaction() as tx, db.snapshot() as snapshot:
        things = [db, stock, stock.where(), tx, tx[stock], snapshot, engine, db.aio]
        for thing in things:
            names = offered(thing)
            assert names and not any(name.startswith("_") for name in names)
            assert all(hasattr(thing, name) for name in names - {"sequence"})
        assert {"collection", "transaction", "observe", "destroy", "aio"} <= offered(db)
        assert not {"storage", "write", "commit_one", "plumbing"} & offered(db)
        assert {"add", "patch", "upsert", "where"} <= offered(stock)
        assert {"sync", "conflicts", "status"} <= offered(engine)
        assert not {"run_cycle", "note_bug"} & offered(engine)
        assert "writes" not in offered(tx)
    engine.close()


def test_what_is_called_plumbing_is_there(db: Database) -> None:
    engine = SyncEngine(SyncConfig(db_id="x"), MockTransport(lambda request: None), db)  # type: ignore[arg-type,return-value]
    with db.transaction() as tx:
        for thing in (db, engine, tx):
            assert all(hasattr(thing, name) for name in type(thing).plumbing)
    engine.close()


# ---------------------------------------------------------------- lines and tables


class _Balanced(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in ("div", "p", "table", "thead", "tbody", "tr", "th", "td")
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows_of(text: str) -> int:
    """How many rows of a table; its HTML is whole, and has no tags but ours."""
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    return parser.rows - 1


NASTY = "<script>alert(1)</script>\x1b[31m‮"


def test_collections_and_queries_are_tables(db: Database) -> None:
    stock = db.collection("stock", Item)
    stock.put_many((uid(n), Item(f"tea {n}", n)) for n in range(1, 31))
    assert repr(stock) == "<Collection 'stock' of Item>"
    assert repr(db["stock"]) == "<Collection 'stock'>"
    query = stock.where(F.price > 3).order_by("-price").limit(5)
    assert repr(query) == "<Query of 'stock' where F.price > 3 by F.price descending limit 5>"
    assert rows_of(query._repr_html_()) == 5
    text = stock._repr_html_()
    assert rows_of(text) == 20 and "there are more" in text and str(uid(1)) in text
    with db.snapshot() as snapshot:
        assert rows_of(snapshot[stock]._repr_html_()) == 20


def test_what_is_stored_steers_no_notebook_and_no_terminal(db: Database) -> None:
    db["x<y"][uid(1)] = {"<b>": NASTY, **{f"f{n}": n for n in range(30)}}
    db["x<y"][uid(2)] = [NASTY * 100]
    text = db["x<y"]._repr_html_()
    assert rows_of(text) == 2 and "more fields" in text
    assert "<script>" not in text and "\x1b" not in text and "‮" not in text


def test_a_cycle_a_conflict_and_what_was_discarded_are_readable() -> None:
    world = World()
    one, other = world.device(), world.device()
    one.put(("notes", 1, {"title": "base"}))
    one.settle()
    other.settle()
    one.put(("notes", 1, {"title": NASTY}))
    one.settle()
    other.put(("notes", 1, {"title": "mine"}))
    assert "withdrawn 1" in repr(other.sync())
    (found,) = other.engine.discarded()
    assert repr(found).startswith(f"<DiscardedTransaction {found.id}, conflict: ")
    assert "'notes' {'title': 'mine'}" in repr(found)
    assert rows_of(found._repr_html_()) == 1


def test_a_conflict_and_what_a_person_overruled_are_readable() -> None:
    world = World()
    one, other = world.device(), world.device(default_policy="manual")
    one.put(("notes", 1, {"title": "base"}))
    one.settle()
    other.settle()
    one.put(("notes", 1, {"title": NASTY}))
    one.settle()
    other.put(("notes", 1, {"title": "mine"}))
    other.sync()
    (conflict,) = other.engine.conflicts()
    assert "base {'title': 'base'}, local {'title': 'mine'}, remote {" in repr(conflict)
    assert "\x1b" not in repr(conflict) and "\u202e" not in repr(conflict)
    assert rows_of(conflict._repr_html_()) == 3 and "<script>" not in conflict._repr_html_()
    other.engine.resolve(conflict, "mine")
    (lost,) = other.engine.overruled()
    assert repr(lost).startswith(f"<OverruledValue {lost.number} in 'notes', {uid(1)}")
    assert rows_of(lost._repr_html_()) == 2


def test_a_result_says_what_happened_and_nothing_of_what_did_not() -> None:
    result = SyncCycleResult(pulled=3, pushed=1, requests=2, duration_s=0.25)
    assert repr(result) == "<SyncCycleResult pulled 3, pushed 1, requests 2, duration_s 0.250>"
    assert rows_of(result._repr_html_()) == 4
    assert repr(SyncCycleResult()) == "<SyncCycleResult nothing to do>"
    assert rows_of(SyncCycleResult()._repr_html_()) == 0


# ---------------------------------------------------------------- upsert


@pytest.mark.parametrize("kind", [Item, ItemStruct, ItemModel])
def test_upsert_changes_fields_or_makes_an_entity_with_its_defaults(
    db: Database, kind: Any
) -> None:
    stock = db.collection("stock", kind)
    assert stock.upsert(uid(1), name="tea") is True
    assert stock.raw[uid(1)] == {"name": "tea", "price": 0}
    assert stock.upsert(uid(1), price=4) is False
    assert stock[uid(1)] == kind(name="tea", price=4)
    with db.transaction() as tx:
        assert tx[stock].upsert(uid(2), {"name": "cup"}, price=9)
        assert not tx[stock].upsert(uid(2), price=8)
    assert stock[uid(2)] == kind(name="cup", price=8)
    before = db.sequence
    for fields in ({"price": 1}, {"name": "x", "colour": 1}, {"name": "x", "price": "dear"}):
        with pytest.raises(ValueTypeError) as caught:
            stock.upsert(uid(3), fields)
        assert caught.value.entity_id == uid(3)
    assert db.sequence == before and uid(3) not in stock


def test_upsert_of_plain_values(db: Database) -> None:
    notes = db["notes"]
    assert notes.upsert(uid(1), a=1) and not notes.upsert(uid(1), b=2)
    assert notes[uid(1)] == {"a": 1, "b": 2}
    notes[uid(2)] = ["no map"]
    with pytest.raises(ValueTypeError):
        notes.upsert(uid(2), a=1)


# ---------------------------------------------------------------- destroy


def test_destroying_removes_the_database_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "db"
    db = Database.open(path)
    db.collection("drafts", local=True).add(1)
    (path / "entidb.txt").write_text("somebody's", encoding="utf-8")
    db.destroy()
    assert os.listdir(path) == ["entidb.txt"]
    with pytest.raises(DatabaseClosedError):
        db["drafts"].add(2)
    with pytest.raises(DatabaseClosedError):
        db.destroy()
    (path / "entidb.txt").unlink()
    with Database.open(path) as again:
        assert again.collections() == []
        again.destroy()
    assert not path.exists()


def test_what_no_server_has_is_not_lost_unasked(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "db")
    db["notes"].add(1)
    with pytest.raises(ScopeError, match="1 transactions") as caught:
        db.destroy()
    assert caught.value.code == "scope_pending"
    assert list(db["notes"].values()) == [1]
    with pytest.raises(ConfigError):
        db.destroy(discard_pending=1)  # type: ignore[arg-type]
    db.destroy(discard_pending=True)
    assert not (tmp_path / "db").exists()


def test_a_database_with_an_engine_is_not_destroyed(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "db")
    engine = SyncEngine(SyncConfig(db_id="x"), MockTransport(lambda request: None), db)  # type: ignore[arg-type,return-value]
    with pytest.raises(TransactionError, match="engine"):
        db.destroy()
    engine.close()
    db.destroy()


def test_what_another_process_has_open_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "db"
    db = Database.open(path)
    code = (
        "import sys; from entidb import Database; db = Database.open(sys.argv[1]); "
        "print('open', flush=True); sys.stdin.read(); db.close()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(DatabaseLockedError):
        db.destroy()
    assert (path / "data.mdb").exists()
    other.communicate("")
    with Database.open(path) as again:
        again.destroy()
    assert not path.exists()


def test_a_database_in_memory_or_of_a_server_is_destroyed_as_well(tmp_path: Path) -> None:
    with Database.in_memory() as db:
        db.destroy()
    server = Database.open(tmp_path / "db", role=Role.SERVER)
    server["notes"].add(1)
    server.destroy()
    assert not (tmp_path / "db").exists()


def test_what_was_opened_to_read_is_not_destroyed(tmp_path: Path) -> None:
    Database.open(tmp_path / "db").close()
    with Database.open(tmp_path / "db", read_only=True) as db, pytest.raises(TransactionError):
        db.destroy()
    assert (tmp_path / "db" / "data.mdb").exists()

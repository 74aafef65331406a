"""Small things that people reach for: natural keys, info, raw values, subscripts."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cbor2
import pytest

from entidb.db import Database
from entidb.errors import ValueTypeError
from entidb.storage import MemoryStorage
from tests.support import START_MS, FakeClock, World, uid


@dataclass
class Item:
    name: str


@pytest.fixture
def db() -> Any:
    with Database(MemoryStorage(), clock=FakeClock()) as made:
        yield made


def test_a_natural_key_always_has_the_same_id(db: Database) -> None:
    stock = db.collection("stock")
    made = stock.id_for("sku-123")
    assert made == db.collection("stock", Item).id_for("sku-123")
    assert (made.version, made.variant) == (8, uuid.RFC_4122)
    others = [
        db.collection("other").id_for("sku-123"),
        stock.id_for("sku-124"),
        stock.id_for(b"sku-123"),
        stock.id_for("sku", 123),
        stock.id_for(123),
        stock.id_for(uid(123)),
    ]
    assert len({made, *others}) == 7


def test_a_natural_id_can_be_made_in_any_language(db: Database) -> None:
    digest = bytearray(hashlib.sha256(cbor2.dumps(["stock", "sku", 7, uid(1).bytes])).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    assert db["stock"].id_for("sku", 7, uid(1)).bytes == bytes(digest)


@pytest.mark.parametrize(
    "key", [(), (None,), (1.5,), (True,), (["a"],), (2**64,), ("\ud800",), ("sku", -(2**65))]
)
def test_a_key_that_is_no_name_of_a_thing_is_refused(db: Database, key: tuple[Any, ...]) -> None:
    with pytest.raises(ValueTypeError, match="key"):
        db["stock"].id_for(*key)


def test_two_devices_that_make_the_same_thing_have_one(db: Database) -> None:
    world = World()
    a, b = world.device(), world.device()
    for device, name in ((a, "from a"), (b, "from b")):
        stock = device.db.collection("stock")
        stock[stock.id_for("sku-123")] = {"name": name}
    for device in (a, b, a):
        device.sync()
    assert list(a.db["stock"].values()) == list(b.db["stock"].values()) == [{"name": "from a"}]


def test_get_or_add_makes_a_thing_once(db: Database) -> None:
    items = db.collection("items", Item)
    key = items.id_for("one")
    assert items.get_or_add(key, Item("first")) == Item("first")
    assert items.get_or_add(key, Item("second")) == Item("first")
    with db.transaction() as tx:
        assert tx[items].get_or_add(key, Item("third")) == Item("first")
        assert tx[items].get_or_add(uid(9), Item("new")) == Item("new")
    assert dict(items.items()) == {key: Item("first"), uid(9): Item("new")}


def test_raw_reads_what_does_not_fit_the_class(db: Database) -> None:
    db["items"][uid(1)] = {"title": "from another version"}
    items = db.collection("items", Item)
    with pytest.raises(ValueTypeError):
        items[uid(1)]
    assert dict(items.raw.items()) == {uid(1): {"title": "from another version"}}
    with db.snapshot() as snapshot, db.transaction() as tx:
        tx[items][uid(2)] = Item("new")
        assert list(tx[items].raw.values())[1] == {"name": "new"}
        assert len(snapshot.collection("items", Item).raw) == len(snapshot["items"]) == 1


def test_info_says_who_when_which_version_and_whether_it_is_decided() -> None:
    world = World()
    a, b = world.device(), world.device()
    a.put(("notes", 1, {"n": 1}))
    made = a.notes.info(uid(1))
    assert (made.version, made.pending, made.payload_bytes) == (0, True, 4)
    assert made.device_id == a.db.device_id
    assert made.changed_at == datetime.fromtimestamp(START_MS / 1000, UTC)
    a.sync()
    b.sync()
    for device in (a, b):
        info = device.notes.info(uid(1))
        assert (info.version, info.pending, info.device_id) == (1, False, a.db.device_id)
    b.put(("notes", 1, {"n": 2}))
    assert (b.notes.info(uid(1)).version, b.notes.info(uid(1)).pending) == (1, True)
    b.put(("notes", 1, None))
    with pytest.raises(KeyError):
        b.notes.info(uid(1))
    with pytest.raises(KeyError):
        b.notes.info(uid(7))


def test_info_in_a_transaction_is_about_what_was_committed(db: Database) -> None:
    notes = db.collection("notes")
    notes[uid(1)] = {"n": 1}
    with db.transaction() as tx:
        mine = tx["notes"]
        mine[uid(1)] = {"n": 2, "more": "text"}
        assert mine.info(uid(1)).payload_bytes == 4
        del mine[uid(1)]
        with pytest.raises(KeyError):
            mine.info(uid(1))
        added = mine.add({"n": 3})
        with pytest.raises(KeyError):
            mine.info(added)
    assert notes.info(added).pending

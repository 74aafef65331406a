"""A collection is rewritten in its newest shape once, in ordinary transactions, and a run that was
cut off goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from entidb.db import Database, Role
from entidb.db.migrating import Migrated, migrate
from entidb.errors import ConfigError, InvalidNameError, ScopeError, ValueTypeError
from entidb.sync import SyncConfig, SyncEngine
from entidb.sync.http import HttpTransport
from entidb.sync.transport import LoopbackClient
from tests.support import FakeClock, uid


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory(role=Role.SERVER, clock=FakeClock()) as opened:
        rows = opened.collection("teas")
        rows.put_many({uid(n): {"francs": n} for n in range(1, 31)})
        rows.put_many({uid(n): {"price": n} for n in range(31, 41)})
        yield opened


def to_price(stored: Any) -> Any:
    return {"price": stored["francs"] * 100} if "francs" in stored else stored


def prices(db: Database) -> list[int]:
    return [value["price"] for value in db.collection("teas").values()]


def test_every_entity_of_an_older_shape_is_rewritten_in_transactions_of_a_batch(
    db: Database,
) -> None:
    told: list[int] = []
    before = db.sequence
    done = migrate(db, "teas", to_price, batch=8, progress=told.append)
    assert done == Migrated(entities=40, rewritten=30, transactions=4)
    assert prices(db) == [n * 100 for n in range(1, 31)] + list(range(31, 41))
    assert db.sequence == before + 4
    assert told == [8, 16, 24, 40]
    assert not db.verify()


def test_devices_are_told_of_what_was_rewritten_and_of_nothing_else(db: Database) -> None:
    before = db.sequence
    migrate(db, "teas", to_price)
    assert {event.entity_id for event in db.changes(before)} == {uid(n) for n in range(1, 31)}


def test_a_second_run_writes_nothing(db: Database) -> None:
    migrate(db, "teas", to_price)
    before = db.sequence
    assert migrate(db, "teas", to_price) == Migrated(40, 0, 0)
    assert db.sequence == before


def test_a_run_that_was_cut_off_goes_on(db: Database) -> None:
    def stop(looked: int) -> None:
        if looked >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate(db, "teas", to_price, batch=8, progress=stop)
    assert sum("francs" in value for value in db.collection("teas").values()) == 14
    assert migrate(db, "teas", to_price, batch=8).rewritten == 14


def test_a_dry_run_counts_and_writes_nothing(db: Database) -> None:
    before = db.sequence
    assert migrate(db, "teas", to_price, dry_run=True) == Migrated(40, 30, 0)
    assert db.sequence == before


def test_what_was_written_meanwhile_is_rewritten_as_it_is_by_then(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, begin = db.collection("teas"), db.transaction

    def meanwhile() -> Any:
        # Another thread writes between the look and the transaction.
        monkeypatch.setattr(db, "transaction", begin)
        rows[uid(1)] = {"francs": 7}
        del rows[uid(2)]
        rows[uid(3)] = {"price": 5}
        return begin()

    monkeypatch.setattr(db, "transaction", meanwhile)
    assert migrate(db, "teas", to_price).rewritten == 28
    assert (rows[uid(1)], rows.get(uid(2)), rows[uid(3)]) == ({"price": 700}, None, {"price": 5})


def test_an_upgrade_that_changes_its_own_work_is_refused_before_it_is_written(
    db: Database,
) -> None:
    before = db.sequence
    with pytest.raises(ValueTypeError, match="a second time") as caught:
        migrate(db, "teas", lambda stored: {"n": stored.get("n", 0) + 1})
    assert caught.value.entity_id == uid(1)
    assert db.sequence == before


def test_an_entity_that_cannot_be_upgraded_is_named_and_those_before_stay(db: Database) -> None:
    db.collection("teas")[uid(20)] = {"francs": None}
    with pytest.raises(ValueTypeError, match="TypeError") as caught:
        migrate(db, "teas", to_price, batch=8)
    assert (caught.value.collection, caught.value.entity_id) == ("teas", uid(20))
    assert sum("price" in value for value in db.collection("teas").values()) == 10 + 16


def test_many_large_entities_go_in_transactions_that_fit(db: Database) -> None:
    rows = db.collection("large")
    for n in range(1, 9):
        rows[uid(n)] = {"old": "x" * 3_000_000}
    done = migrate(db, "large", lambda stored: {"new": stored.get("old") or stored["new"]})
    assert done.rewritten == 8 and done.transactions > 1


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "8", 10**9])
def test_a_batch_that_cannot_be_is_refused(db: Database, batch: Any) -> None:
    with pytest.raises(ConfigError, match="batch"):
        migrate(db, "teas", to_price, batch=batch)


def test_what_are_no_names_and_no_functions_is_refused(db: Database) -> None:
    with pytest.raises(InvalidNameError):
        migrate(db, "", to_price)
    with pytest.raises(ConfigError, match="upgrade"):
        migrate(db, "teas", "to_price")  # type: ignore[arg-type]


def test_a_collection_that_nobody_wrote_to_has_nothing_to_rewrite(db: Database) -> None:
    assert migrate(db, "nothing", to_price) == Migrated(0, 0, 0)


# ---------------------------------------------------------------- where


def test_a_device_that_synchronises_rewrites_only_what_stays_there() -> None:
    from entidb.server import ServerConfig, SyncServer

    with (
        SyncServer(ServerConfig(data_dir=None, insecure_no_auth=True)) as server,
        Database.in_memory(clock=FakeClock()) as db,
    ):
        db.collection("teas")[uid(1)] = {"francs": 1}
        db.collection("drafts", local=True)[uid(1)] = {"francs": 1}
        # It has met no server yet: nobody else has this.
        assert migrate(db, "teas", to_price).rewritten == 1
        transport = HttpTransport("http://localhost", client=LoopbackClient(server))
        with SyncEngine(SyncConfig(db_id="shop"), transport, db) as engine:
            engine.sync()
        before = db.sequence
        with pytest.raises(ScopeError, match="in conflict with the others"):
            migrate(db, "teas", to_price)
        assert db.sequence == before
        assert migrate(db, "drafts", to_price).rewritten == 1

"""What is unique in a collection: what a program is refused here, and what it is not asked."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from entidb import ConfigError, Database, Index, NotUniqueError
from entidb.db import Role
from entidb.db.index_care import build_step, declare
from entidb.db.index_keys import INDEXED_BYTES_MAX
from entidb.db.verifying import verify
from entidb.errors import TransactionError
from entidb.storage import MemoryStorage
from tests.support import uid

EMAIL = [Index("email", unique=True)]


def device(indexes: list[Index] | None = None) -> Any:
    db = Database.in_memory()
    return db, db.collection("users", indexes=EMAIL if indexes is None else indexes)


def test_a_second_entity_with_the_same_field_is_refused_and_nothing_is_written() -> None:
    db, users = device()
    ada = users.add({"email": "ada@x"})
    users.add({"email": "bob@x"})
    before = db.sequence
    with pytest.raises(NotUniqueError, match=r"'email' has to be unique, and entity .* has the"):
        users[uid(7)] = {"email": "ada@x"}
    tx = db.transaction()
    tx.collection("other").add(1)
    tx.collection("users")[uid(8)] = {"email": "ada@x"}
    with pytest.raises(NotUniqueError) as caught:
        tx.commit()
    error = caught.value
    assert (error.code, error.collection, error.fields) == ("not_unique", "users", ("email",))
    assert (error.entity_id, error.holder) == (uid(8), ada)
    assert db.sequence == before
    assert len(users) == 2
    assert len(db.collection("other")) == 0


def test_a_transaction_is_looked_at_as_it_would_be_when_it_is_through() -> None:
    db, users = device()
    users[uid(1)] = {"email": "a"}
    users[uid(2)] = {"email": "b"}
    with db.transaction() as tx:  # two change places
        tx.collection("users")[uid(1)] = {"email": "b"}
        tx.collection("users")[uid(2)] = {"email": "a"}
    with db.transaction() as tx:  # one is freed, and taken
        del tx.collection("users")[uid(2)]
        tx.collection("users")[uid(3)] = {"email": "a"}
    tx = db.transaction()
    tx.collection("users")[uid(4)] = {"email": "new"}
    tx.collection("users")[uid(5)] = {"email": "new"}
    with pytest.raises(NotUniqueError):
        tx.commit()
    with pytest.raises(NotUniqueError), db.transaction() as tx:
        tx.collection("users")[uid(3)] = {"email": "b"}
    assert {i.int: value["email"] for i, value in users.items()} == {1: "b", 3: "a"}


@pytest.mark.parametrize("value", [{}, {"email": None}, "no map"])
def test_a_field_that_is_missing_or_none_is_no_value(value: Any) -> None:
    _, users = device()
    users.add(value)
    users.add(value)
    assert len(users) == 2


def test_several_fields_are_unique_together() -> None:
    _, users = device([Index("team", "name", unique=True)])
    users.add({"team": 1, "name": "ada"})
    users.add({"team": 2, "name": "ada"})
    users.add({"team": 1})
    users.add({"team": 1})
    with pytest.raises(NotUniqueError, match="'team' and 'name' together have to be unique"):
        users.add({"team": 1.0, "name": "ada"})


def test_a_function_says_what_is_the_same() -> None:
    _, users = device([Index("email", key=str.casefold, unique=True)])
    users.add({"email": "Ada@X"})
    with pytest.raises(NotUniqueError):
        users.add({"email": "ada@x"})
    users.add({"email": 7})
    users.add({"email": 7})


def test_what_has_no_room_in_a_key_is_compared_whole() -> None:
    _, users = device()
    long = "x" * INDEXED_BYTES_MAX
    users.add({"email": long + "a"})
    users.add({"email": long + "b"})
    with pytest.raises(NotUniqueError):
        users.add({"email": long + "a"})


def test_what_was_there_twice_before_may_change_in_other_fields() -> None:
    db, users = device([])
    users[uid(1)] = users[uid(2)] = {"email": "same"}
    db.collection("users", indexes=EMAIL)
    db.wait_for_indexes()
    users.patch(uid(1), name="ada")
    users.patch(uid(2), name="eve")
    with db.transaction() as tx:
        tx.collection("users").patch(uid(1), name="a")
        tx.collection("users").patch(uid(2), name="e")
    with pytest.raises(NotUniqueError):
        users.add({"email": "same"})


def test_a_unique_index_is_kept_with_its_database_and_ends_where_it_is_declared_otherwise() -> None:
    storage = MemoryStorage()
    db = Database(storage)
    users = db.collection("users", indexes=EMAIL)
    users.add({"email": "a"})
    assert db.indexes()[0].index == "email unique"
    again = Database(storage.copy()).collection("users")
    with pytest.raises(NotUniqueError):
        again.add({"email": "a"})
    db.collection("users", indexes=[Index("email")])
    users.add({"email": "a"})
    assert users.where(email="a").count() == 2
    db.collection("users", indexes=EMAIL)  # built already
    assert db.indexes()[0].ready
    with pytest.raises(NotUniqueError):
        users.add({"email": "a"})


def test_a_device_does_not_ask_an_index_that_is_being_built() -> None:
    db, users = device([])
    users[uid(1)] = {"email": "a"}
    declare(db, "users", EMAIL)
    users[uid(2)] = {"email": "a"}
    while build_step(db):
        pass
    with pytest.raises(NotUniqueError):
        users[uid(3)] = {"email": "a"}


def test_a_program_on_a_server_waits_for_an_index_that_is_being_built() -> None:
    db = Database(MemoryStorage(), role=Role.SERVER)
    users = db.collection("users")
    users[uid(1)] = {"email": "a"}
    declare(db, "users", EMAIL)
    with pytest.raises(TransactionError) as caught:
        users[uid(2)] = {"email": "b"}
    assert caught.value.code == "busy"
    db.collection("other").add(1)
    db.wait_for_indexes()
    users[uid(2)] = {"email": "b"}
    with pytest.raises(NotUniqueError):
        users[uid(3)] = {"email": "a"}


def test_a_program_on_a_server_does_not_end_what_is_unique_by_leaving_it_out() -> None:
    db = Database(MemoryStorage(), role=Role.SERVER)
    declare(db, "users", None, EMAIL)
    users = db.collection("users", indexes=[Index("name"), Index("email")])
    assert [status.index for status in db.indexes()] == ["name", "email unique"]
    db.collection("users", indexes=[])
    assert [status.index for status in db.indexes()] == ["email unique"]
    users.add({"email": "a"})
    with pytest.raises(NotUniqueError):
        users.add({"email": "a"})
    declare(db, "users", None, [])
    users.add({"email": "a"})
    assert db.indexes() == []


def test_tasks_that_commit_together_are_refused_one_by_one() -> None:
    async def run() -> list[Any]:
        db = Database.in_memory().aio
        await db.declare_indexes("users", EMAIL)
        await db.wait_for_indexes()
        users = db.collection("users")
        adding = [users.add({"email": n % 3}) for n in range(9)]
        return await asyncio.gather(*adding, return_exceptions=True)

    answers = asyncio.run(run())
    assert sum(isinstance(each, uuid.UUID) for each in answers) == 3
    assert sum(isinstance(each, NotUniqueError) for each in answers) == 6


def test_threads_that_share_a_commit_are_refused_one_by_one(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        users = db.collection("users", indexes=EMAIL)

        def add(n: int) -> bool:
            try:
                if n % 2:
                    users.add({"email": n // 8})
                else:
                    with db.transaction() as tx:
                        tx.collection("users").add({"email": n // 8})
            except NotUniqueError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            added = list(pool.map(add, range(160)))
        assert sum(added) == 20
        assert sorted(value["email"] for value in users.values()) == list(range(20))
        assert verify(db) == []


def test_each_member_cannot_be_unique() -> None:
    with pytest.raises(ConfigError, match="cannot be unique"):
        device([Index("tags", each=True, unique=True)])
    with pytest.raises(ConfigError, match="twice"):
        device([Index("a"), Index("a", unique=True)])


def test_verify_finds_an_index_that_is_unique_in_step(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        users = db.collection("users", indexes=EMAIL)
        for n in range(20):
            users[uid(n + 1)] = {"email": n}
        for n in range(0, 20, 3):
            del users[uid(n + 1)]
        assert verify(db) == []
        users.add({"email": 3})

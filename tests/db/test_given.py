"""What programs give that cannot be meant: errors of ours, which name the call and the way out, and
nothing half changed."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb import (
    ConfigError,
    Database,
    Merge,
    MockTransport,
    QueryError,
    ServerConfig,
    SyncConfig,
    SyncEngine,
    ValueTypeError,
    migrate,
)
from entidb.db import Collection
from entidb.errors import InvalidNameError
from entidb.server import mint_token

ONE = uuid.UUID(int=1)


@pytest.fixture
def notes() -> Iterator[Collection[Any]]:
    with Database.in_memory() as database:
        notes = database.collection("notes")
        notes[ONE] = {"a": 1}
        yield notes
        assert dict(notes.items()) == {ONE: {"a": 1}}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda notes: notes.get_many(None), "get_many"),
        (lambda notes: notes.get_many(5), "get_many"),
        (lambda notes: notes.put_many(None), "put_many"),
        (lambda notes: notes.put_many(5), "put_many"),
        (lambda notes: notes.update(None), "put_many"),
        (lambda notes: notes.patch(ONE, "a"), "patch"),
        (lambda notes: notes.patch(ONE, [("a", 2)]), "patch"),
        (lambda notes: notes.upsert(ONE, 5), "patch"),
        (lambda notes: notes.upsert(uuid.UUID(int=2), "a"), "upsert"),
    ],
)
def test_what_is_no_several_is_refused_in_our_words(
    notes: Collection[Any], call: Callable[[Any], Any], name: str
) -> None:
    with pytest.raises(ValueTypeError, match=f"{name} takes"):
        call(notes)


@pytest.mark.parametrize("named", [{"limit": "5"}, {"limit": 1.5}, {"limit": True},
                                   {"reverse": None}, {"reverse": 2**70}])  # fmt: skip
def test_a_range_is_asked_for_in_numbers(notes: Collection[Any], named: dict[str, Any]) -> None:
    with pytest.raises(QueryError, match=next(iter(named))):
        notes.range(**named)


def test_a_limit_above_all_numbers_is_no_limit(notes: Collection[Any]) -> None:
    assert list(notes.range(limit=2**70)) == list(notes.range()) == [(ONE, {"a": 1})]
    assert list(notes.range(limit=sys.maxsize)) == list(notes.range())
    assert list(notes.range(limit=0)) == list(notes.range(limit=-5)) == []


@pytest.mark.parametrize("path", [None, 5, ["a"], object()])
def test_what_is_no_path_is_refused_in_our_words(path: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueTypeError, match="a path is text or a Path"):
        Database.open(path)
    with Database.in_memory() as database, pytest.raises(ValueTypeError, match="a path is text"):
        database.backup(path)


def test_a_role_that_is_none_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"role is Role\.DEVICE or Role\.SERVER, not 'server'"):
        Database.open(tmp_path / "db", role="server")  # type: ignore[arg-type]
    with Database.open(tmp_path / "db") as database:
        assert database.role.value == "device"


@pytest.mark.parametrize(
    "call",
    [
        lambda: ServerConfig(insecure_no_auth=True, data_dir=b"a"),  # type: ignore[arg-type]
        lambda: ServerConfig(insecure_no_auth=True, data_dir=5),  # type: ignore[arg-type]
        lambda: ServerConfig(insecure_no_auth=True, data_dir="a", backup_dir=b"b"),  # type: ignore[arg-type]
        lambda: Merge(counters=None),  # type: ignore[arg-type]
        lambda: Merge(sets=5),  # type: ignore[arg-type]
        lambda: migrate(None, "notes", lambda value: value),  # type: ignore[arg-type]
        lambda: mint_token(None, subject="a", databases=["x"]),  # type: ignore[arg-type]
        lambda: mint_token("x" * 40, subject=5, databases=["x"]),  # type: ignore[arg-type]
        lambda: mint_token("x" * 40, subject="\udcff", databases=["x"]),
        lambda: mint_token("x" * 40, subject="a", databases=5),  # type: ignore[arg-type]
        lambda: mint_token("x" * 40, subject="a", databases="shop"),
        lambda: mint_token("x" * 40, subject="a", databases={"x": "\udcff"}),
        lambda: mint_token("x" * 40, subject="a", databases={"x": range(3)}),
        lambda: mint_token("x" * 40, subject="a", databases=["x"], claims="a"),  # type: ignore[arg-type]
        lambda: mint_token("x" * 40, subject="a", databases=["x"], claims={"a": object()}),
        lambda: mint_token("x" * 40, subject="a", databases=["x"], claims={"nbf": "1"}),
        lambda: mint_token("x" * 40, subject="a", databases=["x"], expires_s="60"),  # type: ignore[arg-type]
        lambda: mint_token("x" * 40, subject="a", databases=["x"], expires_s=10**400),
        lambda: mint_token("x" * 40, subject="a", databases=["x"], expires_s=True),
        lambda: mint_token("x" * 40, subject="a", databases=["x"], audience=""),
    ],
)  # fmt: skip
def test_a_setting_of_the_wrong_kind_is_refused_in_our_words(call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "object has no attribute" not in str(caught.value)


def test_a_key_that_is_no_text_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        mint_token("secret\udcff" * 10, subject="a", databases=["x"])
    assert "secret" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize("collection", [bytearray(b"a"), None, 5, "\udcff"])
def test_an_entity_is_asked_about_by_name(collection: Any) -> None:
    with Database.in_memory() as database:
        transport = MockTransport(lambda request: None)  # type: ignore[arg-type,return-value]
        with SyncEngine(SyncConfig(db_id="x"), transport, database) as engine:
            for ask in (engine.explain, engine.entity_status):
                with pytest.raises(InvalidNameError):
                    ask(collection, ONE)

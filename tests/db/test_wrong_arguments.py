"""What a person gives a database by mistake is refused by name, before anything is made."""

from __future__ import annotations

import datetime
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb import ConfigError, Database, F, InvalidNameError, QueryError, ValueTypeError
from entidb.server import SyncServer
from entidb.sync import HttpTransport
from entidb.types import SEQUENCE_MAX, SystemClock


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory() as opened:
        yield opened


WRONG_NUMBERS: list[Any] = ["64", None, -1, 2**80, True, float("nan"), [1]]


@pytest.mark.parametrize(
    "name", ["map_bytes", "transaction_bytes_max", "busy_timeout_s", "stale_rows_max"]
)
@pytest.mark.parametrize("wrong", WRONG_NUMBERS, ids=repr)
def test_a_setting_that_cannot_be_is_named_and_no_database_is_made(
    tmp_path: Path, name: str, wrong: Any
) -> None:
    if (name, wrong) == ("map_bytes", None):
        return  # its default
    with pytest.raises(ConfigError, match=name):
        Database.open(tmp_path / "new", **{name: wrong})
    assert not (tmp_path / "new").exists()
    if name != "map_bytes":
        with pytest.raises(ConfigError, match=name):
            Database.in_memory(**{name: wrong})


@pytest.mark.parametrize("name", ["salvage", "read_only"])
def test_a_switch_is_true_or_false(tmp_path: Path, name: str) -> None:
    wrong: dict[str, Any] = {name: "no"}  # which Python takes for True
    with pytest.raises(ConfigError, match=name):
        Database.open(tmp_path / "new", **wrong)


@pytest.mark.parametrize("path", ["a\0b", ""], ids=repr)
def test_what_cannot_be_a_path_is_refused_by_open_and_backup(db: Database, path: str) -> None:
    with pytest.raises(ConfigError, match="path"):
        Database.open(path)
    with pytest.raises(ConfigError, match="path"):
        db.backup(path)


@pytest.mark.skipif(sys.platform == "win32", reason="its paths may hold lone surrogates")
def test_a_path_that_the_system_cannot_spell_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="path"):
        Database.open("a\ud800")


@pytest.mark.skipif(sys.platform == "win32", reason="its paths are text")
def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    path: Any = bytes(tmp_path / "b\xf6d")
    with Database.open(path) as made:
        made["c"].add(1)
    with Database.open(tmp_path / "b\xf6d", create=False) as opened:
        assert len(opened["c"]) == 1


@pytest.mark.parametrize("after", [1.5, None, "1", True])
def test_a_cursor_is_a_whole_number(db: Database, after: Any) -> None:
    with pytest.raises(ConfigError, match="after"):
        db.changes(after)


def test_a_cursor_beyond_all_commits_has_no_changes_behind_it(db: Database) -> None:
    db["c"].add(1)
    assert list(db.changes(2**80)) == []
    assert list(db.changes(SEQUENCE_MAX)) == []


@pytest.mark.parametrize("names", ["notes", b"notes", 5, datetime.date(2030, 1, 1)], ids=repr)
def test_one_name_is_not_taken_for_the_names_of_its_letters(db: Database, names: Any) -> None:
    with pytest.raises(ConfigError, match="collections"):
        db.set_scope(names)
    with pytest.raises(ConfigError, match="collections"):
        db.changes(collections=names)
    assert db.scope is None


def test_names_that_cannot_be_are_refused_in_a_list_too(db: Database) -> None:
    with pytest.raises(InvalidNameError):
        db.changes(collections=[""])
    with pytest.raises(InvalidNameError):
        db.set_scope([uuid.uuid4()])  # type: ignore[list-item]


@pytest.mark.parametrize("wrong", ["x", [None], [1], [(1, 2, 3)], [("id", 1)], [[]]], ids=repr)
def test_many_values_are_pairs_with_ids(db: Database, wrong: Any) -> None:
    notes = db["notes"]
    for write in (notes.put_many, notes.update):
        with pytest.raises(ValueTypeError, match="id"):
            write(wrong)
    with db.transaction() as tx:
        for write in (tx.collection("notes").put_many, tx.collection("notes").update):
            with pytest.raises(ValueTypeError, match="id"):
                write(wrong)
    with pytest.raises(ValueTypeError, match="id"):
        notes.update(title="x")
    assert len(notes) == 0


def test_update_takes_what_a_dict_takes(db: Database) -> None:
    notes, one, two = db["notes"], uuid.UUID(int=1), uuid.UUID(int=2)
    notes.update({one: 1})
    notes.update([(two, 2)])
    notes.update()
    assert dict(notes.items()) == {one: 1, two: 2}


def test_a_text_that_cannot_be_stored_cannot_be_found_and_the_query_says_so(db: Database) -> None:
    with pytest.raises(QueryError):
        db["c"].where(F.a.startswith("\ud800"))
    with pytest.raises(QueryError):
        db["c"].where.from_dict({"a": {"startswith": "\ud800"}})


def test_a_limit_beyond_all_entities_is_no_limit(db: Database) -> None:
    db["c"].add({"a": 1})
    assert len(list(db["c"].where(a=1).limit(2**80))) == 1


def test_a_function_that_cannot_be_called_as_it_will_be_is_refused(db: Database) -> None:
    """Found at its first call, an observer's mistake goes to a hook that nobody looks at."""
    nothing: Any = lambda: None  # noqa: E731
    two: Any = lambda one, two: None  # noqa: E731
    for wrong in (nothing, two):
        with pytest.raises(ConfigError, match=r"observe is called with the event"):
            db.observe(wrong)
        with pytest.raises(ConfigError, match=r"upgrade is called with the stored value"):
            db.collection("notes", dict[str, Any], upgrade=wrong)
    with pytest.raises(ConfigError, match=r"on_invalid is called with the error and the stored"):
        db.collection("notes", dict[str, Any], on_invalid=nothing)
    events: list[Any] = []
    db.observe(events.append)


class Wrong(SystemClock):
    def __init__(self, now: Any) -> None:
        self.now = now

    def now_ms(self) -> Any:
        return self.now


@pytest.mark.parametrize("now", [1.7e12, 1_700_000_000 * 10**9, "now", None, True])
def test_a_clock_that_gives_no_milliseconds_is_refused(tmp_path: Path, now: Any) -> None:
    with pytest.raises(ConfigError, match="whole milliseconds since 1970"):
        Database.in_memory(clock=Wrong(now))
    with pytest.raises(ConfigError, match="whole milliseconds since 1970"):
        Database.open(tmp_path / "new", clock=Wrong(now))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "clock", [time.time, object(), SystemClock, 0], ids=["function", "object", "class", "number"]
)
def test_what_is_no_clock_is_refused(clock: Any) -> None:
    makes: list[Callable[[], object]] = [
        lambda: Database.in_memory(clock=clock),
        lambda: SyncServer.in_memory(insecure_no_auth=True, clock=clock),
        lambda: HttpTransport("http://localhost", clock=clock),
    ]
    for make in makes:
        with pytest.raises(ConfigError, match="clock must be an object with now_ms"):
            make()

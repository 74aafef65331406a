"""Whatever stands in a database or became of its files: what EntiDB raises is its own.

A record whose checksum is right can still be none of its kind, where a damaged page led to another
or a bug wrote it. Files can be deleted, moved and replaced while they are open.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb import cbor
from entidb.db import Database, Role, dump, inspect
from entidb.db.outbox import read_discarded, read_pending
from entidb.errors import CorruptionError, EntiDBError
from entidb.storage import LmdbStorage, MemoryStorage
from entidb.testing.contracts import read_all
from tests.bitrot.content import build

#: Words of libraries and of the system, which help nobody.
FOREIGN = re.compile(r"mdb_|MDB_|lmdb\.|Errno|struct|unpack|\$\.")
Change = Callable[[bytes, bytes, random.Random], dict[bytes, bytes | None]]

CHANGES: dict[str, Change] = {
    "empty": lambda key, value, source: {key: b""},
    "cut in half": lambda key, value, source: {key: value[: len(value) // 2]},
    "one byte": lambda key, value, source: {key: value[:1]},
    "random": lambda key, value, source: {key: source.randbytes(len(value) or 5)},
    "too long": lambda key, value, source: {key: value + b"xyz"},
    "gone": lambda key, value, source: {key: None},
    "a list": lambda key, value, source: {key: cbor.encode([1, 2, [3]])},
    "a map": lambda key, value, source: {key: cbor.encode({"a": None})},
    "a key cut in half": lambda key, value, source: {key[: max(1, len(key) // 2)]: value},
    "a key too long": lambda key, value, source: {key + b"\1\2": value},
    "a key of its kind and nothing more": lambda key, value, source: {key[:1] + b"\xff": b""},
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[Role, dict[bytes, bytes]]:
    """All records of a server and of a device with everything in them."""
    found = {}
    paths = build(tmp_path_factory.mktemp("records"), 20)
    for role, path in zip((Role.SERVER, Role.DEVICE), paths, strict=True):
        with contextlib.closing(LmdbStorage.open(path)) as store:
            found[role] = read_all(store)
    return found


@contextlib.contextmanager
def only_ours(what: str) -> Iterator[None]:
    said = ""
    try:
        yield
    except EntiDBError as error:
        said = str(error)
    assert not FOREIGN.search(said), f"{what}: {said}"


def use_everything(database: Database, name: str) -> None:
    def read_rows() -> None:
        with database.storage.snapshot() as snapshot:
            list(read_pending(snapshot))
            read_discarded(snapshot)

    def delete_some() -> None:
        for each in database.collections():
            collection = database.collection(each)
            for entity_id in list(collection)[:1]:
                collection.discard(entity_id)

    uses: dict[str, Callable[[], Any]] = {
        "verify": database.verify,
        "dump": lambda: list(dump(database)),
        "inspect": lambda: inspect(database),
        "walking": lambda: [list(database.collection(n).items()) for n in database.collections()],
        "counting": lambda: [len(database.collection(n)) for n in database.collections()],
        "changes": lambda: list(database.changes()),
        "the outbox": read_rows,
        "a commit": lambda: database.collection("n").add({"a": 1}),
        "deleting": delete_some,
        "compacting": database.compact,
    }
    for use, function in uses.items():
        with only_ours(f"{name}: {use}"):
            function()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", [Role.SERVER, Role.DEVICE])
def test_a_record_that_is_none_of_its_kind_is_an_error_of_ours(
    records: dict[Role, dict[bytes, bytes]], role: Role, change: str
) -> None:
    source = random.Random(f"{role.value} {change}")
    kinds: dict[bytes, list[bytes]] = {}
    for key in records[role]:
        kinds.setdefault(key if key[:1] == b"m" else key[:1], []).append(key)
    for keys in kinds.values():
        key = source.choice(keys)
        store = MemoryStorage()
        store.commit(records[role])
        store.commit(CHANGES[change](key, records[role][key], source))
        name = f"{key.hex()}, {change}"
        with only_ours(f"{name}: opening"):
            use_everything(Database(store, role=role, create=False), name)


def test_clearing_what_is_found_only_by_walking_says_that_it_is_damage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(collection: object, entity_id: uuid.UUID) -> None:
        raise KeyError(entity_id)

    with Database.in_memory() as db:
        kept = db.collection("notes").add({"a": 1})
        with db.transaction() as tx:
            notes = tx.collection("notes")
            monkeypatch.setattr(type(notes), "__delitem__", missing)
            with pytest.raises(CorruptionError, match=str(kept)):
                notes.clear()


# ---------------------------------------------------------------- files


def _delete(path: Path) -> None:
    (path / "data.mdb").unlink()


def _replace_by_directory(path: Path) -> None:
    (path / "data.mdb").unlink()
    (path / "data.mdb").mkdir()


def _replace_by_another(path: Path) -> None:
    (path / "data.mdb").rename(path / "old")
    shutil.copy(path / "old", path / "data.mdb")


def _lock_directories(path: Path) -> None:
    for name in ("entidb.lock", "lock.mdb"):
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()


def _foreign_file(path: Path) -> None:
    (path / "data.mdb").unlink()
    (path / "data.mdb").write_bytes(b"something else" * 1000)


HARMS: list[Callable[[Path], None]] = [
    _delete,
    _replace_by_directory,
    _replace_by_another,
    _lock_directories,
    _foreign_file,
    shutil.rmtree,
]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__.strip("_"))
@pytest.mark.parametrize("when", ["closed", "open"])
def test_files_that_are_taken_away_are_an_error_of_ours(
    tmp_path: Path, harm: Callable[[Path], None], when: str
) -> None:
    path = tmp_path / "db"
    with Database.open(path) as db:
        for n in range(50):
            db.collection("notes").add({"n": n, "text": "x" * 100})
    if when == "closed":
        harm(path)
    with only_ours("checking"):
        LmdbStorage.closed_faults(path)
    with only_ours("opening"), Database.open(path, create=False) as db:
        if when == "open":
            harm(path)
        use_everything(db, harm.__name__)
        with only_ours("a backup"):
            db.backup(tmp_path / "backup")
        with only_ours("sizes"):
            db.storage.info()

"""Opening, closing, checking, backing up, compacting: a database as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entidb import F, cbor
from entidb.db import Database, Role, dump, inspect
from entidb.db.records import (
    FORMAT_VERSION,
    META_FORMAT,
    META_HEAD,
    META_IDENTITY,
    accepted_key,
    base_key,
    conflict_key,
    count_key,
    encode_format,
    feed_key,
    pack_accepted,
    pack_u64,
    sequence_key,
    table_prefix,
)
from entidb.errors import (
    ConfigError,
    CorruptionError,
    DatabaseClosedError,
    DatabaseForkedError,
    DatabaseLockedError,
    FormatError,
    LocalError,
    StorageError,
)
from entidb.storage import LmdbStorage, MemoryStorage
from tests.support import FakeClock, World, uid

# ---------------------------------------------------------------- opening and closing


def test_a_database_is_there_again_when_it_is_opened_again(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        db.collection("notes")[uid(1)] = {"text": "x"}
        identity = (db.device_id, db.created_ms)
    with Database.open(tmp_path / "db", create=False) as db:
        assert db.collection("notes")[uid(1)] == {"text": "x"}
        assert (db.device_id, db.created_ms) == identity
        assert (db.sequence, db.verify()) == (1, [])


def test_what_is_not_there_is_not_made_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        Database.open(tmp_path / "db", create=False)
    assert not (tmp_path / "db" / "data.mdb").exists()


def test_a_closed_database_says_so(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "db")
    notes = db.collection("notes")
    notes[uid(1)] = "x"
    snapshot = db.snapshot()
    db.close()
    db.close()
    uses: list[Any] = [
        lambda: notes[uid(1)],
        lambda: notes.__setitem__(uid(1), "y"),
        lambda: list(notes),
        lambda: db.transaction(),
        lambda: db.snapshot(),
        lambda: db.sequence,
        lambda: list(db.changes()),
        lambda: db.verify(),
        lambda: snapshot.collection("notes")[uid(1)],
    ]
    for use in uses:
        with pytest.raises(DatabaseClosedError):
            use()


def test_opening_twice_in_one_process_is_refused(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        with pytest.raises(DatabaseLockedError):
            Database.open(tmp_path / "db")
        db.collection("notes")[uid(1)] = "still works"
    Database.open(tmp_path / "db").close()


def run_python(code: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, os.fspath(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OPEN_ELSEWHERE = """
import sys
from entidb.db import Database
from entidb.errors import EntiDBError
try:
    db = Database.open(sys.argv[1])
    print(sorted(db.collection("notes").values()))
except EntiDBError as error:
    print(error.code)
"""


@pytest.mark.process
def test_a_second_process_finds_everything_that_was_committed(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        db.collection("notes")[uid(1)] = "x"
        found = "['x']" if sys.platform.startswith("linux") else "database_locked"
        assert run_python(OPEN_ELSEWHERE, tmp_path / "db") == found
        db.collection("notes")[uid(2)] = "y"
    assert run_python(OPEN_ELSEWHERE, tmp_path / "db") == "['x', 'y']"


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_cannot_use_the_database(tmp_path: Path) -> None:
    code = f"""
import os, sys
from entidb.db import Database
from entidb.errors import {DatabaseForkedError.__name__} as Forked
db = Database.open(sys.argv[1])
db.collection("notes").add("x")
child = os.fork()
if child == 0:
    found = 0
    for use in (lambda: list(db.collection("notes")), lambda: db.collection("notes").add("y")):
        try:
            use()
        except Forked:
            found += 1
    os._exit(0 if found == 2 else 1)
print(os.waitpid(child, 0)[1], len(db.collection("notes")))
"""
    assert run_python(code, tmp_path / "db") == "0 1"


def test_the_role_is_for_life(tmp_path: Path) -> None:
    with Database.open(tmp_path / "server", role=Role.SERVER) as db:
        assert db.history is not None
    with Database.open(tmp_path / "server") as db:
        assert db.role is Role.SERVER
    with pytest.raises(ConfigError, match="server"):
        Database.open(tmp_path / "server", role=Role.DEVICE)
    Database.open(tmp_path / "device").close()
    with pytest.raises(ConfigError, match="device"):
        Database.open(tmp_path / "device", role=Role.SERVER)
    Database.open(tmp_path / "device", role=Role.DEVICE).close()


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    Database.open(tmp_path / "db").close()
    storage = LmdbStorage.open(tmp_path / "db")
    newer = encode_format()[:8] + (FORMAT_VERSION + 1).to_bytes(2, "big") + encode_format()[10:]
    storage.commit({META_FORMAT: newer})
    storage.close()
    for _ in range(2):
        with pytest.raises(FormatError, match="newer") as caught:
            Database.open(tmp_path / "db")
        assert caught.value.code == "newer_format"


@pytest.mark.parametrize(
    "records",
    [{b"theirs": b"data"}, {META_FORMAT: b"theirs"}, {META_FORMAT: b"SQLite format 3\0"}],
)
def test_data_of_another_program_is_refused_and_left_alone(records: dict[bytes, bytes]) -> None:
    storage = MemoryStorage()
    storage.commit(records)
    with pytest.raises(FormatError) as caught:
        Database(storage)
    assert caught.value.code == "not_a_database"
    with storage.snapshot() as snapshot:
        assert dict(snapshot.scan(b"\0", b"\xff")) == records


def test_an_identity_that_is_lost_is_an_error() -> None:
    storage = MemoryStorage()
    Database(storage)
    storage.commit({META_IDENTITY: None})
    with pytest.raises(FormatError, match="identity"):
        Database(storage)


# ---------------------------------------------------------------- backup and compaction


def test_a_backup_is_the_database_at_one_moment(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        db.collection("notes").put_many({uid(n): n for n in range(100)})
        db.backup(tmp_path / "backup")
        db.collection("notes").clear()
        with Database.open(tmp_path / "backup") as restored:
            assert len(restored.collection("notes")) == 100
            assert (restored.device_id, restored.verify()) == (db.device_id, [])
            restored.collection("notes")[uid(1)] = "mine"
        assert len(db.collection("notes")) == 0
        with pytest.raises(StorageError):
            db.backup(tmp_path / "backup")


def test_a_server_opened_from_a_backup_begins_a_new_history_once(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db", role=Role.SERVER) as db:
        db.collection("notes")[uid(1)] = "x"
        history = db.history
        for name in ("one", "two"):
            db.backup(tmp_path / name)
    histories = {history}
    for name in ("one", "two"):
        with Database.open(tmp_path / name) as restored:
            histories.add(restored.history)
            assert restored.collection("notes")[uid(1)] == "x"
            first = restored.history
        with Database.open(tmp_path / name) as again:
            assert again.history == first
    assert len(histories) == 3
    with Database.open(tmp_path / "db") as db:
        assert db.history == history


def test_a_database_in_memory_has_no_files_to_back_up(tmp_path: Path) -> None:
    with Database.in_memory() as db, pytest.raises(StorageError):
        db.backup(tmp_path / "backup")


def test_compacting_gives_room_back_and_keeps_everything(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db", role=Role.SERVER) as db:
        notes = db.collection("notes")
        notes.put_many({uid(n): "x" * 1000 for n in range(2000)})
        for _ in range(3):
            notes.put_many({uid(n): "y" * 900 for n in range(2000)})
        notes.put_many({uid(n): "small" for n in range(2000)})
        before = db.storage.info().file_bytes
        db.compact()
        assert db.storage.info().file_bytes < before / 2
        assert list(notes.values()) == ["small"] * 2000
        notes[uid(1)] = "after"
        assert db.verify() == []
    with Database.open(tmp_path / "db") as db:
        assert db.collection("notes")[uid(1)] == "after"


# ---------------------------------------------------------------- inspect and dump


def test_inspect_says_what_is_in_a_database() -> None:
    world = World()
    a = world.device(default_policy="manual")
    world.put(("notes", 1, "theirs"), ("notes", 2, "x"))
    a.put(("notes", 1, "mine"))
    a.db.collection("drafts", local=True)[uid(1)] = "private"
    a.sync()
    a.put(("notes", 2, "pending"))
    seen = inspect(a.db)
    assert seen["collections"] == {
        "drafts": {"entities": 1, "synced": False},
        "notes": {"entities": 2, "synced": True},
    }
    assert (seen["pending"], seen["held"], seen["conflicts"], seen["discarded"]) == (1, 1, 1, 0)
    assert (seen["role"], seen["cursor"], seen["db_id"]) == ("device", 1, "shop")
    assert world.server.history is not None
    assert seen["history"] == inspect(world.server)["history"] == world.server.history.hex()
    assert seen["storage"]["kind"] == "memory"


def test_a_dump_is_the_synchronised_entities_in_order() -> None:
    with Database.in_memory(role=Role.SERVER) as db:
        for name, number in (("b", 2), ("a", 3), ("b", 1)):
            db.collection(name)[uid(number)] = number
        del db.collection("b")[uid(2)]
        db.declare_local("private")
        db.collection("private")[uid(1)] = "x"
        assert list(dump(db)) == [
            ("a", uid(3).bytes, 2, cbor.encode(3)),
            ("b", uid(1).bytes, 3, cbor.encode(1)),
        ]


# ---------------------------------------------------------------- verify


def lively() -> tuple[Database, MemoryStorage]:
    """A device with something of everything."""
    world = World()
    a = world.device(policies={"notes": "manual"})
    world.put(("notes", 1, "base"), ("other", 1, "base"))
    a.sync()
    world.put(("notes", 1, "theirs"), ("other", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.put(("other", 1, "lost"))
    a.sync()
    a.put(("other", 1, "pending"))
    a.put(("other", 2, "made"))
    inner = a.storage.inner
    assert isinstance(inner, MemoryStorage)
    return a.db, inner


def test_a_lively_database_is_sound() -> None:
    db, _ = lively()
    assert db.verify() == []
    head = db.read_head()
    assert (head.ready, head.held, head.conflicts, head.discarded) == (2, 1, 1, 1)


NUMBER = 1  # of the collection "notes"
KEY = table_prefix(NUMBER) + uid(1).bytes


def rows_of(storage: MemoryStorage, kind: bytes) -> list[tuple[bytes, bytes]]:
    with storage.snapshot() as snapshot:
        return snapshot.scan(kind, bytes([kind[0] + 1]))


def drop_first(kind: bytes) -> Any:
    return lambda storage: {rows_of(storage, kind)[0][0]: None}


def flip_last(kind: bytes) -> Any:
    def change(storage: MemoryStorage) -> dict[bytes, bytes]:
        key, raw = rows_of(storage, kind)[0]
        return {key: raw[:-1] + b"\xff"}

    return change


def cut_first(kind: bytes) -> Any:
    def change(storage: MemoryStorage) -> dict[bytes, bytes]:
        key, raw = rows_of(storage, kind)[0]
        return {key: raw[:5]}

    return change


@pytest.mark.parametrize(
    "tamper",
    [
        drop_first(b"e"),
        drop_first(b"b"),
        drop_first(b"f"),
        drop_first(b"o"),
        drop_first(b"h"),
        drop_first(b"c"),
        drop_first(b"d"),
        drop_first(b"n"),
        flip_last(b"e"),
        flip_last(b"b"),
        cut_first(b"e"),
        cut_first(b"b"),
        cut_first(b"o"),
        cut_first(b"h"),
        cut_first(b"n"),
        lambda storage: {count_key(NUMBER): pack_u64(77)},
        lambda storage: {feed_key(999, NUMBER, uid(5).bytes): b""},
        lambda storage: {feed_key(1, 77, uid(5).bytes): b""},
        lambda storage: {table_prefix(88) + uid(1).bytes: rows_of(storage, b"e")[0][1]},
        lambda storage: {base_key(NUMBER, uid(5).bytes): rows_of(storage, b"b")[0][1]},
        lambda storage: {conflict_key(NUMBER, uid(5).bytes): rows_of(storage, b"c")[0][1]},
        lambda storage: {conflict_key(77, uid(5).bytes): rows_of(storage, b"c")[0][1]},
        lambda storage: {sequence_key(b"o", 500): rows_of(storage, b"o")[0][1]},
        lambda storage: {accepted_key(bytes(16)): pack_accepted(5000, bytes(32))},
        lambda storage: {accepted_key(bytes(16)): b"short"},
        lambda storage: {META_HEAD: rows_of(storage, META_HEAD)[0][1][:-4] + b"\0\0\0\x09"},
    ],
)
def test_verify_finds_what_was_tampered_with(tamper: Any) -> None:
    db, storage = lively()
    storage.commit(tamper(storage))
    faults = db.verify()
    assert faults
    assert all(faults)


def test_verify_finds_a_flipped_bit_on_disk(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as db:
        db.collection("notes").put_many({uid(n): f"find me {n}" for n in range(50)})
    path = tmp_path / "db" / "data.mdb"
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"find me 7")] ^= 1
    path.write_bytes(raw)
    with Database.open(tmp_path / "db") as db:
        assert len(db.verify()) >= 1


def test_a_question_that_looks_at_all_never_passes_over_a_flipped_bit(tmp_path: Path) -> None:
    """It might have made of an entity that is asked for one that is not."""
    with Database.open(tmp_path / "db") as db:
        notes = {uid(n): {"n": n, "text": f"find me {n}"} for n in range(50)}
        db.collection("notes").put_many(notes)
    path = tmp_path / "db" / "data.mdb"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"find me 7", b"find me 8"))
    with Database.open(tmp_path / "db", salvage=True) as db:
        for text in ("find me 7", "find me 8", "find me 9"):
            with pytest.raises(CorruptionError, match="fails its checksum"):
                list(db.collection("notes").where(F.text == text))


# ---------------------------------------------------------------- local collections


def test_declaring_local_is_stored_and_can_be_taken_back() -> None:
    storage = MemoryStorage()
    db = Database(storage, clock=FakeClock())
    db.collection("drafts", local=True)[uid(1)] = "x"
    db.declare_local("drafts")
    assert db.read_head().ready == 0
    again = Database(storage)
    again.collection("drafts")[uid(2)] = "y"
    assert again.read_head().ready == 0
    again.declare_local("drafts", False)
    again.collection("drafts")[uid(3)] = "z"
    assert again.read_head().ready == 1
    assert again.verify() == []


def test_a_local_collection_cannot_be_named_in_the_scope() -> None:
    db = Database.in_memory()
    db.declare_local("drafts")
    with pytest.raises(LocalError, match="drafts"):
        db.set_scope(["drafts"])
    assert db.scope is None

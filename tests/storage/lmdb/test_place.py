"""A path can come to mean another thing than what is open: then nothing is written to either."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from entidb.db import Database
from entidb.db.copying import copy_database
from entidb.errors import (
    CommitUnknownError,
    DatabaseClosedError,
    DatabaseLockedError,
    DatabaseMovedError,
    StorageError,
)
from entidb.server import ServerConfig, SyncServer
from entidb.storage import LmdbStorage, directories
from entidb.storage.lmdb import place
from entidb.storage.lmdb.company import SHARING, take_door
from entidb.testing.contracts import read_all
from tests.storage.lmdb.test_lmdb_traps import FailingCommit, run_python

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="what is open cannot be moved or deleted on Windows"
)

OPEN_AND_SAY = """
    import sys
    from entidb.errors import DatabaseLockedError
    from entidb.storage import LmdbStorage
    try:
        LmdbStorage.open(sys.argv[1]).commit({b"other": b"1"})
        print("opened")
    except DatabaseLockedError as error:
        print(error)
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.is_file()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A store, and another that could be put in its place; both closed."""
    for name in ("db", "other"):
        with contextlib.closing(LmdbStorage.open(tmp_path / name)) as store:
            store.commit({b"name": name.encode()})
    return tmp_path / "db", tmp_path / "other"


def put_in_place(directory: Path, other: Path) -> None:
    directory.rename(directory.with_name("aside"))
    other.rename(directory)


@pytest.mark.skipif(not SHARING, reason="one process has a database here")
def test_who_is_not_let_in_is_told_that_others_may_only_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LmdbStorage.open(tmp_path / "db").close()
    folder = os.open(tmp_path / "db", os.O_RDONLY)
    monkeypatch.setattr(place, "take_door", partial(take_door, timeout_s=0.05))
    door = take_door(folder)
    try:
        with pytest.raises(DatabaseLockedError, match="or try again if it is only being opened"):
            LmdbStorage.open(tmp_path / "db")
    finally:
        door.release()
        os.close(folder)
    LmdbStorage.open(tmp_path / "db").close()


# ---------------------------------------------------------------- lock files that are deleted


@pytest.mark.parametrize("names", [["entidb.lock"], ["lock.mdb"], ["entidb.lock", "lock.mdb"]])
def test_deleted_lock_files_let_no_second_process_in(tmp_path: Path, names: list[str]) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.commit({b"a": b"1"})
        for name in names:
            (tmp_path / "db" / name).unlink()
        said = run_python(OPEN_AND_SAY, store.path)
        assert f"is open in process {os.getpid()}; close it there" in said
        store.commit({b"b": b"2"})
        assert read_all(store) == {b"a": b"1", b"b": b"2"}
        assert list(store.verify()) == []
    assert run_python(OPEN_AND_SAY, str(tmp_path / "db")) == "opened"


def test_a_deleted_lock_file_lets_no_second_object_of_this_process_in(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        (tmp_path / "db" / "entidb.lock").unlink()
        with pytest.raises(DatabaseLockedError, match="already open in this process"):
            LmdbStorage.open(store.path)


def test_compacting_leaves_no_moment_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.commit({b"a": b"1"})
        (tmp_path / "db" / "entidb.lock").unlink()
        real, said = os.replace, list[str]()

        def replace(*arguments: object, **options: object) -> None:
            said.append(run_python(OPEN_AND_SAY, store.path))
            real(*arguments, **options)  # type: ignore[arg-type]
            said.append(run_python(OPEN_AND_SAY, store.path))

        monkeypatch.setattr(os, "replace", replace)
        store.compact()
        said.append(run_python(OPEN_AND_SAY, store.path))
        assert len(said) == 3
        assert all("is open in process" in each for each in said)


# ---------------------------------------------------------------- directories that are moved


def commit(store: LmdbStorage) -> None:
    store.commit({b"lost": b"1"})


@pytest.mark.parametrize("write", [commit, LmdbStorage.compact], ids=["commit", "compact"])
def test_what_was_put_in_the_place_of_an_open_database_is_not_touched(
    pair: tuple[Path, Path], write: Callable[[LmdbStorage], None]
) -> None:
    path, other = pair
    with contextlib.closing(LmdbStorage.open(path)) as store:
        put_in_place(path, other)
        before = files_of(path), files_of(path.with_name("aside"))
        with pytest.raises(DatabaseMovedError, match="another database stands there") as raised:
            write(store)
        assert raised.value.code == "database_moved"
        assert (files_of(path), files_of(path.with_name("aside"))) == before
        assert read_all(store) == {b"name": b"db"}
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store) == {b"name": b"other"}


@pytest.mark.parametrize("write", [commit, LmdbStorage.compact], ids=["commit", "compact"])
def test_a_database_that_is_put_back_goes_on(
    pair: tuple[Path, Path], write: Callable[[LmdbStorage], None]
) -> None:
    path, _ = pair
    with contextlib.closing(LmdbStorage.open(path)) as store:
        path.rename(path.with_name("aside"))
        with pytest.raises(DatabaseMovedError, match="nothing stands there"):
            write(store)
        path.with_name("aside").rename(path)
        write(store)
        store.commit({b"after": b"1"})
        assert read_all(store).keys() >= {b"name", b"after"}


def test_a_commit_to_a_deleted_database_is_refused(pair: tuple[Path, Path]) -> None:
    path, _ = pair
    with contextlib.closing(LmdbStorage.open(path)) as store:
        shutil.rmtree(path)
        with pytest.raises(DatabaseMovedError, match="nothing stands there"):
            store.commit({b"a": b"1"})


def test_a_data_file_that_was_replaced_is_noticed_at_the_next_commit(
    pair: tuple[Path, Path],
) -> None:
    path, other = pair
    for _ in range(20):  # the directory changes within one tick of the file system's clock
        shutil.rmtree(path)
        with contextlib.closing(LmdbStorage.open(path)) as store:
            store.commit({b"a": b"1"})
            shutil.copy(other / "data.mdb", path / "new")
            os.replace(path / "new", path / "data.mdb")
            before = (path / "data.mdb").read_bytes()
            with pytest.raises(DatabaseMovedError):
                store.commit({b"b": b"1"})
            assert (path / "data.mdb").read_bytes() == before


def test_a_data_file_that_is_replaced_later_is_noticed_too(pair: tuple[Path, Path]) -> None:
    path, other = pair
    with contextlib.closing(LmdbStorage.open(path)) as store:
        while store._place._standing._settled is None:
            store.commit({b"a": b"1"})
        os.replace(other / "data.mdb", path / "data.mdb")
        with pytest.raises(DatabaseMovedError):
            store.commit({b"b": b"1"})


def test_a_directory_that_is_moved_while_it_is_compacted_stays_whole(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = pair
    store = LmdbStorage.open(path)
    real = store._copy_to

    def copy_then_move(directory: str) -> None:
        real(directory)
        put_in_place(path, other)

    before = files_of(other)["data.mdb"]
    monkeypatch.setattr(store, "_copy_to", copy_then_move)
    with pytest.raises(DatabaseMovedError):
        store.compact()
    store.close()
    assert files_of(path)["data.mdb"] == before
    assert sorted(os.listdir(path)) == ["data.mdb", "entidb.lock", "entidb.turn", "lock.mdb"]
    with contextlib.closing(LmdbStorage.open(path.with_name("aside"))) as store:
        assert read_all(store) == {b"name": b"db"}


def test_a_directory_that_is_moved_at_the_swap_is_swapped_where_it_is_now(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = pair
    store = LmdbStorage.open(path)
    before = files_of(other)["data.mdb"]
    real = os.replace

    def move_then_replace(*arguments: object, **options: object) -> None:
        put_in_place(path, other)
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", move_then_replace)
    with pytest.raises(DatabaseMovedError):
        store.compact()
    with pytest.raises(DatabaseClosedError):
        store.snapshot()
    assert files_of(path)["data.mdb"] == before
    for where, content in ((path, b"other"), (path.with_name("aside"), b"db")):
        with contextlib.closing(LmdbStorage.open(where)) as store:
            assert read_all(store) == {b"name": content}


def test_looking_for_the_outcome_of_a_commit_opens_no_other_database(
    pair: tuple[Path, Path],
) -> None:
    path, other = pair
    store = LmdbStorage.open(path)
    failing = FailingCommit(store._file.env, commits=True)
    real = failing.begin

    def begin(write: bool = False) -> object:
        put_in_place(path, other)
        return real(write)

    failing.begin = begin  # type: ignore[method-assign]
    store._file.env = failing
    with pytest.raises(CommitUnknownError, match="moved"):
        store.commit({b"a": b"1"})
    store.close()
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store) == {b"name": b"other"}


def test_verifying_a_database_that_was_moved_reads_no_other(pair: tuple[Path, Path]) -> None:
    path, other = pair
    with contextlib.closing(LmdbStorage.open(path)) as store:
        put_in_place(path, other)
        with pytest.raises(DatabaseMovedError):
            list(store.verify())


def test_closing_a_database_that_was_moved_leaves_the_other_alone(
    pair: tuple[Path, Path],
) -> None:
    path, other = pair
    store = LmdbStorage.open(path)
    store.commit({b"a": b"1"})
    put_in_place(path, other)
    before = files_of(path)
    store.close()
    assert files_of(path) == before
    for where, content in ((path, b"other"), (path.with_name("aside"), b"db")):
        with contextlib.closing(LmdbStorage.open(where)) as store:
            assert read_all(store)[b"name"] == content


def test_a_process_that_may_not_look_any_more_goes_on_writing(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = pair
    with contextlib.closing(LmdbStorage.open(path)) as store:
        real = os.stat

        def stat(where: object, **options: object) -> os.stat_result:
            if os.fspath(where) == str(path):  # type: ignore[call-overload]
                raise PermissionError(13, "Permission denied")
            return real(where, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "stat", stat)
        store.commit({b"a": b"1"})
        monkeypatch.undo()
        assert read_all(store)[b"a"] == b"1"


def test_a_link_to_the_directory_may_be_put_in_its_place(pair: tuple[Path, Path]) -> None:
    path, _ = pair
    with contextlib.closing(LmdbStorage.open(path)) as store:
        path.rename(path.with_name("aside"))
        path.symlink_to("aside")
        store.commit({b"a": b"1"})
        store.compact()
        store.commit({b"b": b"1"})
        assert read_all(store).keys() == {b"name", b"a", b"b"}


def test_a_lock_file_that_is_a_link_is_not_followed(pair: tuple[Path, Path]) -> None:
    path, _ = pair
    victim = path.with_name("victim")
    victim.write_bytes(b"precious")
    (path / "entidb.lock").unlink()
    (path / "entidb.lock").symlink_to(victim)
    with pytest.raises(StorageError):
        LmdbStorage.open(path)
    assert victim.read_bytes() == b"precious"


def test_a_database_says_so_and_reads_on(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as database:
        key = database.collection("notes").add({"n": 1})
        (tmp_path / "db").rename(tmp_path / "aside")
        with pytest.raises(DatabaseMovedError, match="Put it back"):
            database.collection("notes").add({"n": 2})
        assert database.collection("notes")[key] == {"n": 1}
        (tmp_path / "aside").rename(tmp_path / "db")
        database.collection("notes").add({"n": 2})
        assert len(database.collection("notes")) == 2


# ---------------------------------------------------------------- new directories are durable


class Names:
    """The directories that were made, and those that were not synced since in the one above."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.waiting: set[str] = set()
        self._mkdir, self._replace, self._sync = os.mkdir, os.replace, directories.sync_directory
        monkeypatch.setattr(os, "mkdir", self.mkdir)
        monkeypatch.setattr(os, "replace", self.replace)
        for module in ("directories", "lmdb.folder"):
            monkeypatch.setattr(f"entidb.storage.{module}.sync_directory", self.sync)

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._mkdir(path, mode, dir_fd=dir_fd)
        if dir_fd is None:
            self.made.append(os.path.realpath(path))
            self.waiting.add(os.path.realpath(path))

    def replace(self, old: str, new: str, **options: int) -> None:
        self._replace(old, new, **options)
        if os.path.realpath(old) in self.waiting:
            self.waiting.discard(os.path.realpath(old))
            self.waiting.add(os.path.realpath(new))

    def sync(self, descriptor: int) -> None:
        self._sync(descriptor)
        synced = os.readlink(f"/proc/self/fd/{descriptor}")
        self.waiting = {each for each in self.waiting if os.path.dirname(each) != synced}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("only Linux tells which directory a descriptor is")
    return Names(monkeypatch)


def test_every_new_directory_on_the_way_to_a_database_is_durable(
    tmp_path: Path, names: Names
) -> None:
    Database.open(tmp_path / "a" / "b" / "c" / "db").close()
    assert [Path(each).name for each in names.made] == ["a", "b", "c", "db"]
    assert names.waiting == set()


def test_directories_that_a_dead_process_made_are_durable_with_the_database(
    tmp_path: Path, names: Names
) -> None:
    for path in ("a", "a/b", "a/b/db"):
        os.mkdir(tmp_path / path)
    assert len(names.waiting) == 3
    Database.open(tmp_path / "a" / "b" / "db").close()
    assert names.waiting == set()


def test_a_servers_directories_are_durable(
    tmp_path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ServerConfig(data_dir="srv/data", insecure_no_auth=True)
    with SyncServer(config) as server:
        assert [Path(each).name for each in names.made] == ["srv", "data"]
        assert names.waiting == set()
        server.database("shop")
        assert [Path(each).name for each in names.made] == ["srv", "data", "shop.entidb"]
        assert names.waiting == set()


def test_a_backup_is_durable_in_its_directory(tmp_path: Path, names: Names) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.backup(str(tmp_path / "copy"))
    assert names.waiting == set()


def test_a_store_that_is_closed_keeps_no_right_from_the_next_one(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    first = LmdbStorage.open(path)
    assert first.claim("engine").take(0)
    first.close()
    second = LmdbStorage.open(path)
    assert second.claim("engine").take(0)
    second.close()


# ---- files that are written over, and links


@pytest.mark.parametrize("newer", [False, True], ids=["older", "newer"])
def test_a_data_file_that_was_written_over_is_not_written_to(
    pair: tuple[Path, Path], newer: bool
) -> None:
    """``cp backup/data.mdb db/`` while it is open: the same file, with another content."""
    path, other = pair
    with contextlib.closing(LmdbStorage.open(other)) as store:
        for number in range(40 if newer else 1):
            store.commit({b"name": b"other", b"n": b"%d" % number})
    restored = (other / "data.mdb").read_bytes()
    with contextlib.closing(LmdbStorage.open(path)) as store:
        for number in range(20):
            store.commit({b"n": b"%d" % number})
        with (path / "data.mdb").open("r+b") as file:
            file.write(restored)
        for _ in range(2):
            with pytest.raises(DatabaseMovedError, match="written over it since it was opened"):
                store.commit({b"lost": b"1"})
        assert (path / "data.mdb").read_bytes()[: len(restored)] == restored
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store) == {b"name": b"other", b"n": b"39" if newer else b"0"}
        store.commit({b"after": b"1"})
        assert list(store.verify()) == []


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard", "symbolic"])
def test_a_data_file_that_is_linked_into_another_directory_is_opened_once_in_a_process(
    pair: tuple[Path, Path], link: Callable[[Path, Path], None]
) -> None:
    path, _ = pair
    linked = path.with_name("linked")
    linked.mkdir()
    with contextlib.closing(LmdbStorage.open(path)) as store:
        for file in path.iterdir():
            if link is os.link or file.name == "data.mdb":
                link(file, linked / file.name)
        with pytest.raises(DatabaseLockedError, match=r"already open.* as .*/db, whose data file"):
            LmdbStorage.open(linked)
        store.commit({b"after": b"1"})
        assert list(store.verify()) == []


def test_a_data_file_that_is_a_link_is_not_compacted_into_a_file_of_its_own(
    pair: tuple[Path, Path],
) -> None:
    path, _ = pair
    linked = path.with_name("linked")
    linked.mkdir()
    (linked / "data.mdb").symlink_to(path / "data.mdb")
    with contextlib.closing(LmdbStorage.open(linked)) as store:
        store.commit({b"after": b"1"})
        with pytest.raises(StorageError, match=r"is a link to .*nothing was changed"):
            store.compact()
        store.commit({b"again": b"1"})
    assert (linked / "data.mdb").is_symlink()
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store).keys() >= {b"after", b"again"}


def test_a_current_directory_that_is_gone_is_said_in_words(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = pair
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    with Database.open(path.with_name("there")) as database:
        (tmp_path / "gone").rmdir()
        for refused in (
            lambda: Database.open("db"),
            lambda: database.backup("copy"),
            lambda: copy_database(path, "copy"),
        ):
            with pytest.raises(StorageError, match="directory in which this process runs is gone"):
                refused()
        with pytest.raises(StorageError, match="directory in which this process runs is gone"):
            SyncServer(ServerConfig(data_dir="data", insecure_no_auth=True))
    monkeypatch.chdir(tmp_path)

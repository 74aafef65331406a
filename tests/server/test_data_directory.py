"""One server for a directory: a second one is refused when it starts, whoever starts it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.db import Database, Role
from entidb.errors import (
    ConfigError,
    DatabaseLockedError,
    DatabaseMovedError,
    StorageError,
    StorageFullError,
)
from entidb.protocol import ErrorResponse, HandshakeResponse, PushResponse
from entidb.server import ServerConfig, SyncServer, create_app, serving
from entidb.server.admin import databases
from entidb.server.admin.callers import Caller
from entidb.server.admin.local import open_door
from entidb.server.admin.opening import office_of
from entidb.server.directory import list_databases
from entidb.testing.contracts import STUCK_SECONDS
from tests.cli.support import command, environment
from tests.server.support import handshake, push
from tests.storage.lmdb.test_lmdb_traps import ENVIRONMENT


def config(path: Path) -> ServerConfig:
    return ServerConfig(data_dir=path, insecure_no_auth=True)


@contextlib.contextmanager
def served_elsewhere(path: Path) -> Iterator[int]:
    """The number of a process that serves the directory."""
    code = """
        import sys
        from entidb.server import ServerConfig, SyncServer
        with SyncServer(ServerConfig(data_dir=sys.argv[1], insecure_no_auth=True)):
            print("serving", flush=True)
            sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"serving"
        yield other.pid
    finally:
        other.kill()
        other.communicate(timeout=STUCK_SECONDS)


def test_a_second_serve_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    with served_elsewhere(tmp_path / "data") as process:
        # Both would listen on one port, too; the directory is the better reason.
        with serving(ServerConfig(data_dir=None, insecure_no_auth=True)) as url:
            port = url.rpartition(":")[2]
            second = subprocess.run(
                command("serve", tmp_path / "data", "--insecure-no-auth", "--port", port),
                env=environment(), capture_output=True, text=True, timeout=STUCK_SECONDS,
                check=False,
            )  # fmt: skip
        assert second.returncode == 8, second.stderr
        assert second.stderr.startswith("error[database_locked]: ")
        assert f"is served by process {process} already; stop that server" in second.stderr
    SyncServer(config(tmp_path / "data")).close()


def test_a_directory_that_is_itself_a_database_is_no_place_for_a_server(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as database:
        database["notes"].add("here")
    with pytest.raises(ConfigError, match="is itself a database"):
        SyncServer(config(tmp_path / "db"))
    assert list_databases(tmp_path / "db") == []


def test_a_second_server_is_refused_though_the_lock_file_was_deleted(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("a file that is open cannot be deleted")
    with served_elsewhere(tmp_path / "data") as process:
        (tmp_path / "data" / "entidb-server.lock").unlink()
        with pytest.raises(DatabaseLockedError, match="is served by") as raised:
            SyncServer(config(tmp_path / "data"))
        if os.path.exists("/proc/locks"):
            assert f"process {process} " in str(raised.value)


@pytest.mark.parametrize("make", [SyncServer, create_app])
def test_servers_that_programs_make_are_refused_too(tmp_path: Path, make: type) -> None:
    with SyncServer(config(tmp_path)) as first:
        with pytest.raises(DatabaseLockedError, match="another server in this process"):
            make(config(tmp_path))
        first.database("shop").collection("notes").add({"n": 1})
    made = make(config(tmp_path))
    with contextlib.closing(getattr(made, "server", made)):
        assert list_databases(tmp_path) == ["shop"]


def test_a_server_that_was_refused_an_address_lets_the_directory_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loopback"), serving(config(tmp_path), host="0.0.0.0"):
        pass
    with serving(config(tmp_path)) as url:
        assert url
    SyncServer(config(tmp_path)).close()


def test_a_server_that_ended_leaves_nothing_but_databases(tmp_path: Path) -> None:
    with SyncServer(config(tmp_path)) as server:
        server.database("shop")
        assert sorted(os.listdir(tmp_path)) == ["entidb-server.lock", "shop.entidb"]
    assert os.listdir(tmp_path) == ["shop.entidb"]


def test_a_server_that_was_lost_does_not_keep_its_directory(tmp_path: Path) -> None:
    lost: list[object] = [SyncServer(config(tmp_path))]
    lost.append(lost)
    del lost
    SyncServer(config(tmp_path)).close()


def test_closing_twice_does_not_take_the_directory_from_the_next(tmp_path: Path) -> None:
    first = SyncServer(config(tmp_path))
    first.close()
    with SyncServer(config(tmp_path)):
        first.close()
        with pytest.raises(DatabaseLockedError):
            SyncServer(config(tmp_path))


def test_the_databases_of_a_served_directory_can_still_be_looked_after(tmp_path: Path) -> None:
    with SyncServer(config(tmp_path)) as server:
        server.database("open")
        Database.open(tmp_path / "idle.entidb").close()
        assert list_databases(tmp_path) == ["idle", "open"]


def test_a_forked_child_does_not_keep_the_directory(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    code = """
        import os, sys
        from entidb.server import ServerConfig, SyncServer
        config = ServerConfig(data_dir=sys.argv[1], insecure_no_auth=True)
        server = SyncServer(config)
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(writing)
            server.close()
            os.read(reading, 1)  # until the parent closes its end
            os._exit(0)
        try:
            SyncServer(config)
        except Exception as error:
            print(type(error).__name__)
        server.close()
        SyncServer(config).close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=STUCK_SECONDS, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("DatabaseLockedError", "")


# ---------------------------------------------------------------- places that cannot be served


def test_a_data_dir_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(ConfigError, match=r"data_dir cannot be made: .*file"):
            SyncServer(config(path))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_data_dir_that_cannot_be_written_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: str, flags: int, *rest: object, **options: object) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        raise FileNotFoundError(errno.ENOENT, "No such file", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"data_dir cannot be used: .* may write to"):
        SyncServer(config(tmp_path))


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.EIO, "storage_error", "input/output error; look into the system's log"),
        (errno.ENOSPC, "storage_full", "the disk is full; free space"),
        (errno.EDQUOT, "storage_full", "quota"),
        (errno.EMFILE, "storage_error", "too many files open; raise its limit"),
    ],
)
def test_what_a_disk_says_of_a_data_dir_is_no_matter_of_rights_nor_of_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str, says: str
) -> None:
    def refuse(path: str, flags: int, *rest: object, **options: object) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        raise FileNotFoundError(errno.ENOENT, "No such file", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=r"data_dir cannot be used: ") as raised:
        SyncServer(config(tmp_path))
    assert raised.value.code == code
    assert says in str(raised.value) and "may write to" not in str(raised.value)


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root becomes somebody else"
)
def test_serve_says_at_start_that_it_may_not_write(open_path: Path) -> None:
    code = """
        import os, sys
        from entidb.cli.app import run
        os.setgroups([])
        os.setgid(4711)
        os.setuid(4711)
        sys.exit(run(["serve", sys.argv[1], "--insecure-no-auth", "--port", "0"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", "import entidb.server.run, entidb.cli.serving, entidb.storage.lmdb\n"
         + textwrap.dedent(code), str(open_path)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=STUCK_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error[invalid_config]: DIR cannot be used" in done.stderr
    assert os.listdir(open_path) == []


# ---------------------------------------------------------------- databases that are replaced


@pytest.mark.skipif(sys.platform == "win32", reason="what is open cannot be moved on Windows")
def test_a_database_that_is_replaced_under_a_server_is_not_written_and_then_served_as_it_is(
    tmp_path: Path,
) -> None:
    for name, n in (("data/shop.entidb", 1), ("restored", 2)):
        with Database.open(tmp_path / name, role=Role.SERVER) as database:
            database.collection("notes").add({"n": n})
    with SyncServer(config(tmp_path / "data")) as server:
        before = server.handle("/v1/handshake", None, handshake())
        assert isinstance(before, HandshakeResponse)
        (tmp_path / "data" / "shop.entidb").rename(tmp_path / "aside")
        (tmp_path / "restored").rename(tmp_path / "data" / "shop.entidb")
        refused = server.handle("/v1/push", None, push(before.history, 7))
        assert isinstance(refused, ErrorResponse)
        assert refused.code == "storage_error"
        after = server.handle("/v1/handshake", None, handshake())
        assert isinstance(after, HandshakeResponse)
        assert after.history != before.history
        moved = server.handle("/v1/push", None, push(before.history, 7))
        assert isinstance(moved, ErrorResponse)
        assert moved.code == "history_changed"
        assert isinstance(server.handle("/v1/push", None, push(after.history, 7)), PushResponse)
    for path, numbers in ((tmp_path / "aside", [1]), (tmp_path / "data" / "shop.entidb", [2])):
        with Database.open(path) as database:
            stored = list(database.collection("notes").values())
            assert [each["n"] for each in stored if isinstance(each, dict)] == numbers
            assert database.verify() == []


@pytest.mark.skipif(sys.platform == "win32", reason="what is open cannot be moved on Windows")
@pytest.mark.parametrize("put_there", [True, False])
def test_a_server_whose_directory_was_moved_makes_and_notes_nothing_in_its_place(
    tmp_path: Path, put_there: bool
) -> None:
    data, moved = tmp_path / "data", tmp_path / "moved"
    with SyncServer(config(data)) as server:
        office, root = office_of(server), Caller("root", "local")
        server.database("shop")
        data.rename(moved)
        if put_there:
            data.mkdir()  # as what is below a disk that was unmounted
        for refused in (
            lambda: server.database("new"),
            lambda: databases.create(office, root, "new"),
            lambda: databases.freeze(office, root, "shop"),
            lambda: databases.delete(office, root, "shop", "shop"),
        ):
            with pytest.raises(DatabaseMovedError, match="was moved, replaced or unmounted"):
                refused()
        answer = server.handle("/v1/handshake", None, handshake("new"))
        assert isinstance(answer, ErrorResponse)
        assert answer.code == "storage_error"
        assert list(data.iterdir() if put_there else ()) == []
        assert data.exists() == put_there
        if put_there:
            data.rmdir()
        moved.rename(data)
        assert server.database("new").sequence == 0
        assert databases.freeze(office, root, "shop").frozen is not None
    with SyncServer(config(data)) as server:
        assert office_of(server).place.names() == ["new", "shop"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such sockets on Windows")
def test_a_server_that_ends_leaves_the_socket_of_the_one_that_took_its_place(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    with SyncServer(config(data)) as first, SyncServer(config(tmp_path / "other")) as second:
        one = open_door(office_of(first))
        two = open_door(office_of(second))
        assert one is not None and two is not None
        data.rename(tmp_path / "moved")
        (tmp_path / "other").rename(data)
        one.close()
        assert (data / "entidb-admin.sock").is_socket()
        two.close()


def test_a_relative_data_dir_is_the_same_wherever_the_program_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SyncServer(config(Path("data"))) as server:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        server.database("shop")
        office = office_of(server)
        databases.freeze(office, Caller("root", "local"), "shop")
        assert office.place.names() == ["shop"]
    assert (tmp_path / "data" / "entidb-control.json").is_file()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_data_directory_on_a_full_disk_is_not_said_to_be_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("entidb.server.directory.make_directory", full)
    with pytest.raises(StorageFullError, match="the disk is full; free space"):
        SyncServer(config(tmp_path / "srv"))

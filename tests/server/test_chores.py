"""What a server does now and then goes on for all others when it fails for one."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import ConfigError, CorruptionError, StorageError
from entidb.server import ServerConfig, SyncServer
from entidb.server.admin.opening import office_of
from entidb.server.stores import Store
from entidb.server.watched import LOOK_S, Watched, mark_of
from tests.server.support import ManualClock


@pytest.mark.parametrize("error", [CorruptionError("damaged"), OSError(5, "i/o"), ValueError()])
def test_what_is_behind_a_part_that_fails_is_done(error: Exception) -> None:
    done: list[str] = []

    def fails() -> None:
        raise error

    with SyncServer.in_memory() as server:
        server.chores[:0] = [fails, lambda: done.append("of the server")]
        office_of(server).chores[:0] = [fails, lambda: done.append("of the office")]
        server.housekeep()
        assert done == ["of the server", "of the office"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/srv/x"), "(/srv/x): no permission;"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), ": the file system is read-only;"),
        (StorageError("/srv/shop: the disk"), ": /srv/shop: the disk"),
    ],
)
def test_what_the_disk_does_to_a_part_is_one_line_that_says_what_to_do(
    error: Exception, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise error

    with SyncServer.in_memory() as server, caplog.at_level(logging.ERROR, "entidb.server"):
        server.chores[:0] = [fails]
        server.housekeep()
    (line,) = caplog.records
    assert says in line.getMessage() and "Errno" not in line.getMessage()
    assert line.exc_info is None


def test_a_mistake_of_ours_in_a_part_is_logged_with_where_it_came_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with SyncServer.in_memory() as server, caplog.at_level(logging.ERROR, "entidb.server"):
        server.chores[:0] = [fails]
        server.housekeep()
    assert "ZeroDivisionError" in caplog.text and "test_chores" in caplog.text


@pytest.mark.parametrize("part", ["_purge", "_keep_declared"])
def test_a_database_that_cannot_be_looked_after_keeps_no_other_from_it(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SyncServer.in_memory() as server:
        for name in ("bad", "good"):
            server.database(name).collection("notes").add(1)
        seen: list[str] = []

        def look(store: Store) -> None:
            seen.append(store.db_id)
            if store.db_id == "bad":
                raise ValueError("not of ours")

        monkeypatch.setattr(server.stores, part, look)
        server.housekeep()
        assert seen == ["bad", "good"]


def test_a_damaged_database_keeps_no_other_from_having_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with SyncServer.in_memory(segments_min_entities=1) as server:
        for name in ("bad", "good"):
            server.database(name).collection("notes").add(1)
        seen: list[str] = []

        def look(store: Store) -> None:
            seen.append(store.db_id)
            if store.db_id == "bad":
                raise CorruptionError("damaged")

        monkeypatch.setattr(server.images, "_look_at", look)
        server.housekeep()
        assert seen == ["bad", "good"]


def test_backups_that_cannot_be_looked_at_keep_no_other_database_from_having_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entidb.server.admin import backups

    config = ServerConfig(
        data_dir=tmp_path / "data",
        insecure_no_auth=True,
        backup_dir=str(tmp_path / "backups"),
        backup_every_s=3600,
    )
    real = backups.rows_in

    def rows_in(folder: Path, db_id: str) -> Any:
        if db_id == "a":
            raise OSError(errno.EIO, "i/o")
        return real(folder, db_id)

    monkeypatch.setattr(backups, "rows_in", rows_in)
    with SyncServer(config) as server:
        for name in ("a", "b"):
            server.database(name).collection("notes").add(1)
        office = office_of(server)
        server.housekeep()
        assert office.tasks.is_due("backup", "b") or real(tmp_path / "backups" / "b", "b")
        assert office.late_backups == ["a"]


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "too many"), ConfigError("cannot be read: too many open files")]
)
def test_a_changed_file_that_could_not_be_read_for_a_moment_is_read_by_the_next_look(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "decided", ManualClock()
    file.write_text("old")
    fails: list[Exception] = []

    def read() -> str:
        if fails:
            raise fails.pop()
        return file.read_text()

    watched = Watched("the file", read, lambda: mark_of(file), clock)
    assert watched.current() == "old"
    file.write_text("a newer one")
    fails += [error, error]
    for expected in ("old", "old", "a newer one"):
        clock.advance(LOOK_S + 0.1)
        assert watched.current() == expected
    said = [each for each in caplog.records if "cannot be read" in each.getMessage()]
    assert len(said) == 1, "the same trouble is said once"

"""Real files put back from a backup or carried to another machine, of devices and of the server."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.errors import HistoryChangedError
from entidb.server import ServerConfig, SyncServer
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncCycleResult, SyncEngine
from tests.hostile.support import accepted
from tests.support import assert_sound, uid


class Site:
    """A server on disk, devices on disk, and what was done to their files."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._open = contextlib.ExitStack()
        self.start_server()

    def start_server(self) -> None:
        config = ServerConfig(data_dir=self.place / "server", insecure_no_auth=True)
        self.server = self._open.enter_context(SyncServer(config))

    @property
    def truth(self) -> Database:
        return self.server.database("shop")

    def put_server_back(self, backup: Path) -> None:
        """Stop it, replace its database by the backup, and start it again."""
        self._open.close()
        [directory] = (self.place / "server").glob("*.entidb")
        shutil.rmtree(directory)
        shutil.copytree(backup, directory)
        self.start_server()

    @contextlib.contextmanager
    def device(self, name: str, **config: Any) -> Iterator[tuple[Database, SyncEngine]]:
        transport = HttpTransport("http://localhost", client=LoopbackClient(self.server))
        settings = SyncConfig(db_id="shop", **config)
        with (
            Database.open(self.place / name) as db,
            SyncEngine(settings, transport, db) as engine,
        ):
            yield db, engine

    def put(self, name: str, *numbers: int, value: object = None) -> None:
        with Database.open(self.place / name) as db:
            for number in numbers:
                db.collection("notes")[uid(number)] = value or name

    def sync(self, name: str, cycles: int = 1, **config: Any) -> SyncCycleResult:
        with self.device(name, **config) as (_, engine):
            results = [engine.sync() for _ in range(cycles)]
        return results[-1]

    def values(self, name: str) -> dict[int, Any]:
        with Database.open(self.place / name) as db:
            assert_sound(db)
            return {i.int: value for i, value in db.collection("notes").items()}

    def true_values(self) -> dict[int, Any]:
        assert_sound(self.truth)
        return {i.int: value for i, value in self.truth.collection("notes").items()}

    def backup(self, name: str) -> Path:
        target = self.place / f"{name}-backup"
        with Database.open(self.place / name) as db:
            db.backup(target)
        return target

    def copy(self, source: Path | str, name: str) -> None:
        shutil.rmtree(self.place / name, ignore_errors=True)
        shutil.copytree(self.place / source, self.place / name)

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as made:
        yield made


def assert_same_everywhere(site: Site, *names: str, **config: Any) -> None:
    for name in names * 2:
        site.sync(name, cycles=2, **config)
    for name in names:
        assert site.values(name) == site.true_values(), name


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("how", ["backup", "files"])
def test_a_device_put_back_from_a_backup_pushes_nothing_twice_and_loses_nothing_since(
    site: Site, how: str
):
    site.put("a", 1, 2)
    site.sync("a")
    site.put("a", 3, 4, value="pending in the backup")
    if how == "backup":
        old = site.backup("a")
    else:
        site.copy("a", "a-files")
        old = site.place / "a-files"
    site.sync("a")
    site.put("a", 1, 5, value="since")
    site.sync("a")
    before, known = site.truth.sequence, accepted(site.truth)
    site.copy(old, "a")
    assert site.values("a")[1] == "a"
    result = site.sync("a")
    # Notes 3 and 4 were pending in the backup: they are recognised, and not written again (R14).
    assert (site.truth.sequence, accepted(site.truth)) == (before, known)
    assert (result.conflicts, result.withdrawn) == ([], [])
    site.put("a", 6)
    assert_same_everywhere(site, "a", "b")
    assert site.true_values()[1] == "since"
    assert set(site.true_values()) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("policy", ["server_wins", "client_wins"])
def test_a_device_copied_to_a_second_machine_is_two_devices_that_both_go_on(
    site: Site, policy: str
):
    site.put("a", 1)
    site.sync("a")
    site.put("a", 2, value="pending when it was copied")
    site.copy("a", "twin")
    site.put("a", 3, 10)
    site.put("twin", 4, 10)
    before = site.truth.sequence
    for name in ("a", "twin"):
        site.sync(name, default_policy=policy)
    # Note 2 once; 3, 4 and 10 by themselves, and 10 again where the second one's policy says so.
    assert site.truth.sequence == before + 4 + (policy == "client_wins")
    assert site.true_values() == {
        1: "a", 2: "pending when it was copied", 3: "a", 4: "twin",
        10: "twin" if policy == "client_wins" else "a",
    }  # fmt: skip
    with site.device("twin") as (_, engine):
        assert len(engine.discarded()) == (policy == "server_wins")
    assert_same_everywhere(site, "a", "twin", default_policy=policy)


# ---------------------------------------------------------------- the server


def three_lives(site: Site) -> Path:
    """A server whose backup was made between two transactions of device a."""
    site.put("a", 1)
    for name in ("a", "b", "a"):
        site.sync(name)
    backup = site.place / "server-backup"
    site.truth.backup(backup)
    site.put("a", 2, value="after the backup")
    site.sync("a", cycles=2)
    site.sync("b")
    return backup


def test_a_server_restored_twice_from_one_backup_is_another_server_each_time(site: Site):
    backup = three_lives(site)
    histories = [site.truth.history]
    for _ in range(2):
        site.put_server_back(backup)
        histories.append(site.truth.history)
    assert len(set(histories)) == 3
    assert site.true_values() == {1: "a"}


@pytest.mark.parametrize("keep", ["server", "device"])
def test_devices_notice_each_of_two_restores_from_one_backup_and_lose_nothing(
    site: Site, keep: str
):
    backup = three_lives(site)
    for life in (1, 2):
        site.put_server_back(backup)
        number = 10 * life
        site.put("a", number, value=f"pending in life {life}")
        # Somebody writes on the restored server, as far as the old one had come and further.
        for n in range(4):
            site.truth.collection("notes")[uid(number + 5 + n)] = f"server, life {life}"
        for name in ("a", "b"):
            with site.device(name) as (db, engine):
                before = dict(db.collection("notes").items())
                for _ in range(2):
                    with pytest.raises(HistoryChangedError):
                        engine.sync()
                assert dict(db.collection("notes").items()) == before
                engine.reset(keep)
                engine.sync()
        assert_same_everywhere(site, "a", "b")
        assert site.true_values()[number] == f"pending in life {life}"
        assert (site.true_values().get(2) == "after the backup") == (keep == "device")
    # What only the first restored server ever had comes back with those who had pulled it.
    assert (10 in site.true_values()) == (15 in site.true_values()) == (keep == "device")


def test_a_device_that_slept_through_the_first_restore_notices_the_second(site: Site):
    backup = three_lives(site)
    site.put_server_back(backup)
    with site.device("a") as (_, engine):
        engine.reset("device")
        engine.sync()
    site.put_server_back(backup)
    for name in ("a", "b"):
        with site.device(name) as (_, engine):
            with pytest.raises(HistoryChangedError):
                engine.sync()
            engine.reset("device")
            engine.sync()
    assert_same_everywhere(site, "a", "b")
    assert site.true_values() == {1: "a", 2: "after the backup"}

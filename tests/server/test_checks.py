"""A large database that was not closed is read before it is opened; nobody else waits for it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.db import Database, Role
from entidb.errors import CorruptionError, ServerBusyError
from entidb.server import ServerConfig
from entidb.server.checks import CheckingError
from entidb.server.directory import OpenDatabase, on_disk
from entidb.server.stores import Store, Stores
from entidb.storage import opening
from entidb.testing.contracts import STUCK_SECONDS
from entidb.types import SystemClock
from tests.storage.lmdb.test_doubtful_files import misdirect


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets the reading of files that are not known to be well come to its end."""
    go_on = threading.Event()
    real = opening.look

    def look(path: str) -> None:
        assert go_on.wait(STUCK_SECONDS)
        real(path)

    monkeypatch.setattr("entidb.server.checks.AT_ONCE_BYTES", 0)
    monkeypatch.setattr(opening, "look", look)
    yield go_on
    go_on.set()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Two databases, of which one was not closed."""
    for name in ("large", "other"):
        with Database.open(tmp_path / f"{name}.entidb", role=Role.SERVER) as db:
            for n in range(200):
                db.collection("notes").add({"n": n, "text": "x" * 300})
    (tmp_path / "large.entidb" / "entidb.lock").unlink()
    return tmp_path


@pytest.fixture
def stores(data_dir: Path) -> Iterator[Stores]:
    config = ServerConfig(data_dir=str(data_dir), insecure_no_auth=True)
    made = Stores(config, clock=SystemClock(), open_database=on_disk(config))
    yield made
    made.close()


def use_when_read(stores: Stores, name: str) -> Store:
    while True:
        try:
            return stores.use(name, create=False)
        except CheckingError as checking:
            checking.done.wait(STUCK_SECONDS)


def test_who_asks_meanwhile_is_told_to_come_again_and_others_are_served(
    stores: Stores, reading: threading.Event
) -> None:
    for _ in range(3):
        with pytest.raises(ServerBusyError, match="being checked") as raised:
            stores.use("large", create=False)
        assert raised.value.code == "busy" and raised.value.retry_after
    stores.release(stores.use("other", create=False))
    assert len([t for t in threading.enumerate() if t.name == "entidb-checker"]) == 1
    reading.set()
    store = use_when_read(stores, "large")
    assert len(store.database.collection("notes")) == 200
    stores.release(store)


def test_a_damaged_one_is_an_error_each_time_and_others_are_served(
    stores: Stores, data_dir: Path, reading: threading.Event
) -> None:
    misdirect(data_dir / "large.entidb")
    reading.set()
    for _ in range(3):
        with pytest.raises(CorruptionError, match="damaged"):
            use_when_read(stores, "large")
    stores.release(stores.use("other", create=False))


def test_a_program_on_the_server_waits_for_it(stores: Stores, reading: threading.Event) -> None:
    threading.Timer(0.05, reading.set).start()
    assert len(stores.pin("large", create=False).collection("notes")) == 200


def test_a_database_that_is_in_use_elsewhere_is_not_waited_for(
    stores: Stores, data_dir: Path, reading: threading.Event
) -> None:
    """It is never closed while somebody looks, so looking again would not end."""
    reading.set()
    with Database.open(data_dir / "large.entidb"), pytest.raises(Exception, match="open in"):
        use_when_read(stores, "large")


def test_one_that_is_replaced_meanwhile_is_opened_as_it_is_then(
    stores: Stores, data_dir: Path, reading: threading.Event
) -> None:
    opened: OpenDatabase = on_disk(ServerConfig(data_dir=str(data_dir), insecure_no_auth=True))
    with pytest.raises(CheckingError) as raised:
        opened("large", False)
    shutil.rmtree(data_dir / "large.entidb")
    shutil.copytree(data_dir / "other.entidb", data_dir / "large.entidb")
    misdirect(data_dir / "large.entidb")
    reading.set()
    assert raised.value.done.wait(STUCK_SECONDS)
    with pytest.raises(CorruptionError):
        opened("large", False)

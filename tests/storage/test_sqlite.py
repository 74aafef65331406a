"""The store on ``sqlite3``, which the tests have to keep the seam honest."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.errors import CorruptionError
from entidb.storage import Storage
from entidb.testing.openers import LocalOpener, Opener, ProcessOpener, SeveralOpeners
from tests.storage.sqlite_store import SqliteStorage
from tests.storage.storage_model import StorageMachine


class TestSqlite(SeveralOpeners):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_storage(self) -> Storage:
        return SqliteStorage(tempfile.mkdtemp(dir=self.folder))

    def reopen(self, storage: Storage) -> Storage:
        storage.close()
        assert isinstance(storage, SqliteStorage)
        return SqliteStorage(storage.path)

    def open_path(self, path: str) -> Storage:
        return SqliteStorage(path)

    @contextlib.contextmanager
    def another(self, storage: Storage) -> Iterator[Opener]:
        assert isinstance(storage, SqliteStorage)
        with contextlib.closing(LocalOpener(SqliteStorage(storage.path))) as opener:
            yield opener


class TestSqliteAcrossProcesses(TestSqlite):
    @contextlib.contextmanager
    def another(self, storage: Storage) -> Iterator[Opener]:
        assert isinstance(storage, SqliteStorage)
        opens = "tests.storage.sqlite_store:SqliteStorage"
        with contextlib.closing(ProcessOpener(opens, str(storage.path))) as opener:
            yield opener


def test_a_value_that_was_changed_on_the_disk_is_never_returned(tmp_path: Path) -> None:
    storage = SqliteStorage(tmp_path)
    storage.commit({b"a": b"1", b"b": b"2"})
    storage._writer.execute("UPDATE kv SET v = x'33' WHERE k = x'61'")
    with storage.snapshot() as snapshot:
        assert snapshot.get(b"b") == b"2"
        with pytest.raises(CorruptionError, match="61"):
            snapshot.get(b"a")
    assert len(list(storage.verify())) == 1
    storage.close()


class SqliteMachine(StorageMachine):
    def make_storage(self) -> Storage:
        self.folder = tempfile.mkdtemp()
        return SqliteStorage(self.folder)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestSqliteAgainstADict = SqliteMachine.TestCase

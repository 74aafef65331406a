"""The store on disk: the contract, and a dict beside it."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

from entidb.storage import LmdbStorage, Storage
from entidb.testing.contracts import StorageContract
from entidb.testing.openers import Opener, ProcessOpener, SeveralOpeners
from tests.storage.storage_model import StorageMachine


class TestLmdb(StorageContract):
    supports_files = LmdbStorage.supports_files

    @pytest.fixture(autouse=True)
    def _folder(self) -> Iterator[None]:
        self.folder = tempfile.mkdtemp()
        yield
        shutil.rmtree(self.folder)

    def make_storage(self) -> Storage:
        return self.open_path(tempfile.mkdtemp(dir=self.folder))

    def reopen(self, storage: Storage) -> Storage:
        path = storage.info().path
        storage.close()
        assert path is not None
        return self.open_path(path)

    def open_path(self, path: str) -> Storage:
        return LmdbStorage.open(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one process at a time there")
class TestLmdbAcrossProcesses(TestLmdb, SeveralOpeners):
    @contextlib.contextmanager
    def another(self, storage: Storage) -> Iterator[Opener]:
        path = storage.info().path
        assert path is not None
        with contextlib.closing(ProcessOpener("entidb.storage:open_storage", path)) as opener:
            yield opener


class LmdbMachine(StorageMachine):
    def make_storage(self) -> Storage:
        self.folder = tempfile.mkdtemp()
        # Starts tiny, so that the map grows in the middle of many runs.
        return LmdbStorage.open(self.folder, map_bytes=1 << 20)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestLmdbAgainstADict = LmdbMachine.TestCase

"""The store on disk: the contract, and a dict beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest

from entidb.storage import LmdbStorage, Storage
from entidb.testing.contracts import StorageContract
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


class LmdbMachine(StorageMachine):
    def make_storage(self) -> Storage:
        self.folder = tempfile.mkdtemp()
        # Starts tiny, so that the map grows in the middle of many runs.
        return LmdbStorage.open(self.folder, map_bytes=1 << 20)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestLmdbAgainstADict = LmdbMachine.TestCase

"""The applier contract, walked by each applier there is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest

from entidb.db import Database
from entidb.sync import DatabaseApplier, MemorySyncApplier
from entidb.testing.applier_contract import SyncApplierContract


class TestDatabaseApplierInMemory(SyncApplierContract):
    def make_applier(self) -> DatabaseApplier:
        return DatabaseApplier(Database.in_memory())


class TestDatabaseApplierOnDisk(SyncApplierContract):
    @pytest.fixture(autouse=True)
    def _folder(self) -> Iterator[None]:
        self.folder = tempfile.mkdtemp()
        yield
        shutil.rmtree(self.folder)

    def make_applier(self) -> DatabaseApplier:
        return DatabaseApplier(Database.open(tempfile.mkdtemp(dir=self.folder)))


class TestMemorySyncApplier(SyncApplierContract):
    def make_applier(self) -> DatabaseApplier:
        return MemorySyncApplier()

"""The store in memory: the contract, and copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from entidb.storage import MemoryStorage, Storage
from entidb.testing.contracts import read_all
from entidb.testing.openers import LocalOpener, Opener, SeveralOpeners
from tests.storage.storage_model import StorageMachine


class TestMemory(SeveralOpeners):
    supports_files = MemoryStorage.supports_files

    def make_storage(self) -> Storage:
        return MemoryStorage()

    @contextlib.contextmanager
    def another(self, storage: Storage) -> Iterator[Opener]:
        assert isinstance(storage, MemoryStorage)
        with contextlib.closing(LocalOpener(storage.another())) as opener:
            yield opener


class MemoryMachine(StorageMachine):
    def make_storage(self) -> Storage:
        return MemoryStorage()


TestMemoryAgainstADict = MemoryMachine.TestCase


def test_a_copy_and_its_original_go_separate_ways() -> None:
    storage = MemoryStorage()
    storage.commit({b"a": b"1", b"b": b"1"})
    copy = storage.copy([(b"b", None), (b"c", b"3")])
    storage.commit({b"a": b"2"})
    copy.commit({b"d": b"4"})
    assert read_all(storage) == {b"a": b"2", b"b": b"1"}
    assert read_all(copy) == {b"a": b"1", b"c": b"3", b"d": b"4"}


def test_keys_and_values_that_are_not_bytes_are_refused() -> None:
    storage = MemoryStorage()
    for batch in ({"a": b"1"}, {b"a": "1"}):
        with pytest.raises(TypeError):
            storage.commit(batch)  # type: ignore[arg-type]
    assert read_all(storage) == {}


def test_verify_reports_keys_out_of_step() -> None:
    storage = MemoryStorage()
    storage.commit({b"a": b"1", b"b": b"1"})
    storage._state.keys.reverse()
    del storage._state.values[b"a"]
    assert len(list(storage.verify())) == 2

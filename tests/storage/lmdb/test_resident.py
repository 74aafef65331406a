"""Mapped pages are given back; what is read afterwards is the same."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.storage import LmdbStorage
from entidb.storage.lmdb import resident
from entidb.storage.lmdb.resident import mapped_bytes, shed

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux says what is resident"
)

ROWS = 8000
VALUE = b"v" * 3000


@pytest.fixture
def store(tmp_path: Path):
    made = LmdbStorage.open(tmp_path / "store")
    for at in range(0, ROWS, 1000):
        made.commit({b"k%06d" % n: b"%06d" % n + VALUE for n in range(at, at + 1000)})
    yield made
    made.close()


def read_everything(store: LmdbStorage) -> int:
    with store.snapshot() as snapshot:
        return sum(len(value) for _, value in snapshot.scan(b"k", b"l"))


def test_what_was_read_is_let_go_and_can_be_read_again(store: LmdbStorage):
    expected = ROWS * (6 + len(VALUE))
    assert read_everything(store) == expected
    before = mapped_bytes()
    assert shed(f"{store.path}/data.mdb", limit=0)
    assert mapped_bytes() < before - ROWS * len(VALUE) // 2
    assert read_everything(store) == expected


def test_an_open_snapshot_does_not_notice(store: LmdbStorage):
    with store.snapshot() as snapshot:
        assert snapshot.get(b"k000007") == b"000007" + VALUE
        store.commit({b"k000007": b"new"})
        shed(f"{store.path}/data.mdb", limit=0)
        assert snapshot.get(b"k000007") == b"000007" + VALUE


def test_below_the_limit_nothing_is_let_go(store: LmdbStorage):
    read_everything(store)
    assert not shed(f"{store.path}/data.mdb", limit=2**60)


def test_a_store_lets_go_by_itself_after_many_rows(
    store: LmdbStorage, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr("entidb.storage.lmdb.gate.shed", asked.append)
    for _ in range(3):
        read_everything(store)
    assert asked and asked[0].endswith("data.mdb")


def test_a_file_that_is_not_mapped_is_no_error(tmp_path: Path):
    assert not shed(str(tmp_path / "nothing"), limit=0)


def test_one_snapshot_that_reads_for_long_lets_go_while_it_reads(
    store: LmdbStorage, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr("entidb.storage.lmdb.gate.shed", asked.append)
    with store.snapshot() as snapshot:
        for _ in range(3):
            # The first small parts of a scan count too.
            assert len(snapshot.scan(b"k", b"l")) == ROWS
        assert asked and asked[0].endswith("data.mdb")


def test_verifying_lets_go_while_it_walks(store: LmdbStorage, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("entidb.storage.lmdb.gate.shed", asked.append)
    monkeypatch.setattr("entidb.storage.lmdb.snapshot.SHED_EVERY_ROWS", 1000)
    # Of a snapshot that ends it is known already.
    monkeypatch.setattr("entidb.storage.lmdb.gate.SHED_EVERY_ROWS", 10**9)
    assert list(store.verify()) == []
    assert asked


@pytest.mark.parametrize("copies", ["backup", "compact"])
def test_copying_lets_go_while_it_reads_and_leaves_no_thread(
    store: LmdbStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copies: str
):
    looked = threading.Event()
    limits: list[int] = []

    def noted(path: str, limit: int) -> bool:
        limits.append(limit)
        done = shed(path, limit)
        looked.set()
        return done

    copy = resident.shedding

    @contextlib.contextmanager
    def shedding(path: str) -> Iterator[None]:
        with copy(path, 1):
            yield
            # However fast the disk is.
            assert looked.wait(60)

    monkeypatch.setattr("entidb.storage.lmdb.resident.shed", noted)
    monkeypatch.setattr("entidb.storage.lmdb.store.shedding", shedding)
    if copies == "backup":
        store.backup(str(tmp_path / "copy"))
    else:
        store.compact()
    assert limits and set(limits) == {1}
    assert not [t for t in threading.enumerate() if t.name == "entidb-shedder"]
    assert read_everything(store) == ROWS * (6 + len(VALUE))


def test_a_small_file_is_copied_without_another_thread(
    store: LmdbStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def none(*given: object, **named: object) -> None:
        raise AssertionError("a thread was made")

    monkeypatch.setattr("entidb.storage.lmdb.resident.Thread", none)
    store.backup(str(tmp_path / "copy"))

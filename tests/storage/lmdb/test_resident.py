"""Mapped pages are given back; what is read afterwards is the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from entidb.storage import LmdbStorage
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

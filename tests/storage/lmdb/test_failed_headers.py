"""A header that could not be written is no damage: LMDB does not read it, and the data is sound.

Each case is the file as such a write leaves it: some bytes of the new header, and over them some
of what LMDB puts back, which is the new roots under the old commit number.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from entidb.db import Database, Role
from entidb.errors import CorruptionError
from entidb.storage import LmdbStorage
from entidb.storage.lmdb.pages import closed_file_faults
from entidb.testing.contracts import read_all

PAGE = 4096
#: What LMDB writes of a header, and the last page and the commit number at its end.
BEGINS_AT, BYTES, PUT_BACK_BYTES = 32, 120, 16


@dataclass
class Failed:
    """A commit whose header could not be written: the file before and after it, had it worked."""

    number: int
    before: bytes
    after: bytes
    content: dict[bytes, bytes]

    def image(self, written: int, put_back: int) -> bytes:
        at = self.number % 2 * PAGE + BEGINS_AT
        old, new = (file[at : at + BYTES] for file in (self.before, self.after))
        restored = new[:-PUT_BACK_BYTES] + old[-PUT_BACK_BYTES:]
        left = restored[:put_back] + (new[:written] + old[written:])[put_back:]
        return self.after[:at] + left + self.after[at + BYTES :]


def commits(path: Path, count: int, keep: range) -> Iterator[Failed]:
    data = path / "data.mdb"
    with contextlib.closing(LmdbStorage.open(path)) as store:
        for number in range(1, count + 1):
            before, content = data.read_bytes(), read_all(store)
            store.commit({b"%d" % (number % 9): os.urandom(100 * number % 9000), b"all": b"x"})
            if number in keep:
                yield Failed(number, before, data.read_bytes(), content)


def check_opens(path: Path, image: bytes, content: dict[bytes, bytes]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "data.mdb").write_bytes(image)
    assert closed_file_faults(str(path / "data.mdb")) == []
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store) == content
        store.commit({b"after": b"1"})
        assert list(store.verify()) == []
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store) == content | {b"after": b"1"}


@pytest.mark.parametrize("put_back", [8, 60, BYTES])
@pytest.mark.parametrize("written", [0, 8, 60, 103])
def test_a_failed_header_write_leaves_a_store_that_opens(
    tmp_path: Path, written: int, put_back: int
) -> None:
    for failed in commits(tmp_path / "db", 12, range(1, 13)):
        check_opens(tmp_path / "copy", failed.image(written, put_back), failed.content)


def test_a_header_write_that_stopped_between_its_bytes_leaves_a_store_that_opens(
    tmp_path: Path,
) -> None:
    # Of the second commit, and of one whose number carries: 255 became 257, or a part of it.
    for failed in commits(tmp_path / "db", 257, range(2, 258, 255)):
        for written in range(BYTES - PUT_BACK_BYTES):
            check_opens(tmp_path / "copy", failed.image(written, 0), failed.content)
        if failed.number == 257:
            at = PAGE + BEGINS_AT + BYTES - 8
            torn = bytearray(failed.image(BYTES - PUT_BACK_BYTES, 0))
            torn[at] = failed.after[at]
            assert torn[at] != failed.before[at]
            check_opens(tmp_path / "copy", bytes(torn), failed.content)


def test_a_number_that_went_back_without_a_failed_write_is_damage(tmp_path: Path) -> None:
    """As after a failed write, but the last page was not put back: a bit of the number fell."""
    grew = [
        failed
        for failed in commits(tmp_path / "db", 12, range(3, 13))
        if len(failed.after) > len(failed.before)
    ]
    assert grew
    for failed in grew:
        image = bytearray(failed.after)
        at = failed.number % 2 * PAGE + BEGINS_AT + BYTES - 8
        image[at : at + 8] = (failed.number - 2).to_bytes(8, "little")
        path = tmp_path / "data.mdb"
        path.write_bytes(image)
        with pytest.raises(CorruptionError, match="list of free pages"):
            LmdbStorage.open(tmp_path)


@pytest.mark.parametrize("role", [Role.DEVICE, Role.SERVER])
def test_a_database_whose_first_commit_failed_is_made_by_opening_it_again(
    tmp_path: Path, role: Role
) -> None:
    (failed,) = commits(tmp_path / "whole", 1, range(1, 2))
    path = tmp_path / "db"
    path.mkdir()
    (path / "data.mdb").write_bytes(failed.image(BYTES, BYTES))
    with Database.open(path, role=role) as db:
        db.collection("n").add({"a": 1})
    with Database.open(path, role=role, create=False) as db:
        assert len(db.collection("n")) == 1
        assert db.verify() == []

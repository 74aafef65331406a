"""Checksums are the same numbers whoever computes them."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb import Database
from entidb.storage.crc import crc32

#: A process in which the fast one is not installed.
_WITHOUT = """
import sys, zlib
sys.modules["isal"] = None
from entidb import Database
from entidb.storage import crc
assert crc.crc32 is zlib.crc32
with Database.open(sys.argv[1], create=len(sys.argv) > 2) as db:
    notes = db.collection("notes")
    assert [note["n"] for note in notes.values()] == list(range(len(notes)))
    for number in range(len(notes), len(notes) + 40):
        notes.add({"n": number, "text": "x" * number})
    assert db.verify() == []
"""


@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1))
def test_it_is_the_crc_of_zlib(data: bytes, start: int) -> None:
    assert crc32(data) == zlib.crc32(data)
    assert crc32(data, start) == zlib.crc32(data, start)


@pytest.mark.parametrize("there", [False, True])
def test_files_do_not_depend_on_which_one_is_installed(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "db"
    if there:
        with Database.open(path) as database:
            notes = database.collection("notes")
            for number in range(40):
                notes.add({"n": number, "text": "x" * number})
    made = [] if there else ["make"]
    subprocess.run([sys.executable, "-c", _WITHOUT, str(path), *made], check=True, timeout=60)
    with Database.open(path) as database:
        assert database.verify() == []
        notes = database.collection("notes")
        assert [note["n"] for note in notes.values()] == list(range(40 + 40 * there))

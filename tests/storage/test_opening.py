"""The factory for stores on disk: what it opens, and that nothing loads a backend before."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

import entidb.storage
from entidb.storage import LmdbStorage, open_storage


def test_it_opens_the_store_that_is_there(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.commit({b"key": b"value"})
    with (
        contextlib.closing(open_storage(tmp_path / "db", create=False)) as again,
        again.snapshot() as snapshot,
    ):
        assert snapshot.get(b"key") == b"value"


def test_no_backend_on_disk_is_loaded_before_a_store_is_opened() -> None:
    code = (
        "import sys, entidb.db, entidb.sync, entidb.server\n"
        "entidb.db.Database.in_memory().close()\n"
        "print(*(m for m in sys.modules if m == 'lmdb' or m.startswith('entidb.storage.lmdb')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def test_a_name_that_does_not_exist_is_no_backend() -> None:
    with pytest.raises(AttributeError, match="NoStorage"):
        entidb.storage.NoStorage  # noqa: B018

"""``entidb logout`` and what ``entidb status`` says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from entidb.db import Database
from tests.cli.support import document, done, entidb, failed


@pytest.fixture
def where(tmp_path: Path) -> str:
    path = str(tmp_path / "till")
    with Database.open(path) as database:
        database.collection("notes").add({"text": "hers"})
    return path


def test_logout_names_what_is_missing_before_anything_happens(where: str) -> None:
    assert "--pending" in entidb("logout", where).stderr
    failed(entidb("logout", where, "--pending", "export"), 2, "invalid_config")
    nobody = entidb("logout", where, "--pending", "keep")
    assert nobody.exit_code != 0
    assert "subject" in nobody.stderr
    assert document(done("status", where, "--json"))["pending"] == 1


def test_kept_work_is_named_by_status(where: str) -> None:
    said = done("logout", where, "--pending", "keep", "--subject", "ann").strip()
    assert said == (
        "ann is signed out; 1 transaction kept for ann: a sync with their token pushes it"
    )
    assert "1 transaction until ann syncs here" in done("status", where)
    found = document(done("status", where, "--json"))
    assert (found["subject"], found["others"]) == (None, {"ann": 1})


def test_exported_work_is_in_the_file_and_not_in_the_database(where: str, tmp_path: Path) -> None:
    file = tmp_path / "hers.ndjson"
    assert document(done("logout", where, "--pending", "export", "--file", file, "--json")) == {
        "pending": "export",
        "subject": None,
        "transactions": 1,
        "file": str(file),
    }
    assert document(file.read_text("utf-8"))["writes"][0]["value"] == {"text": "hers"}
    assert document(done("status", where, "--json"))["pending"] == 0
    again = done("logout", where, "--pending", "discard").strip()
    assert again == "nobody is signed out; nothing was pending"

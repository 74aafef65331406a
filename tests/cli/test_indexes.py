"""``index``: what an operator gets to read of indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entidb import F, Index
from entidb.db import Database
from tests.cli.support import documents, done, put


def own(value: Any) -> Any:
    """A function that the command line does not have."""
    return value


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop"
    with Database.open(path) as db:
        stock = db.collection("stock", indexes=[Index("kind"), Index("kind", key=own)])
        for number in range(3):
            stock.add({"kind": ["tea", "cup"][number % 2], "n": number})
        db.wait_for_indexes()
    return path


def test_a_database_without_an_index_says_so(tmp_path: Path) -> None:
    put(tmp_path / "d", "notes", 1, {"n": 1})
    assert done("index", tmp_path / "d") == f"{tmp_path / 'd'} has no index\n"
    assert done("index", tmp_path / "d", "--json") == ""


def test_indexes_are_listed_with_how_far_they_are(shop: Path) -> None:
    assert done("index", shop) == (
        "stock: kind, ready, 3 entities\n"
        "stock: kind by tests.cli.test_indexes.own, ready, 3 entities\n"
    )
    assert documents(done("index", shop, "--json"))[0] == {
        "collection": "stock",
        "index": "kind",
        "ready": True,
        "done": 3,
        "entities": 3,
        "paused": False,
    }


def test_the_command_line_keeps_an_index_in_step_and_stops_one_that_it_cannot(shop: Path) -> None:
    done("put", shop, "stock", '{"kind": "tea"}')
    assert done("index", shop).splitlines() == [
        "stock: kind, ready, 4 entities",
        "stock: kind by tests.cli.test_indexes.own, waits for a program that has its function",
    ]
    assert "has no faults" in done("verify", shop)
    with Database.open(shop) as db:
        stock = db.collection("stock", indexes=[Index("kind"), Index("kind", key=own)])
        db.wait_for_indexes()
        assert stock.where(F.kind.by(own) == "tea").scan(False).count() == 3


def test_rebuild_builds_all_that_it_can(shop: Path) -> None:
    assert done("index", shop, "--rebuild").splitlines() == [
        "stock: kind, ready, 3 entities",
        "stock: kind by tests.cli.test_indexes.own, being built, 0 entities of 3",
    ]
    assert "has no faults" in done("verify", shop)

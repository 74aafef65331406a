"""``migrate``: what a person who rewrites a collection gets to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from entidb.cli.exits import Exit
from tests.cli.support import document, done, dumped, entidb, failed, put

SHAPES = """
def upgrade(stored):
    return {"price": stored["francs"] * 100} if "francs" in stored else stored

def twice(stored):
    return {"n": stored.get("n", 0) + 1}

number = 3
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "shapes_of_shop.py").write_text(SHAPES, encoding="utf-8")
    for number in range(3):
        put(tmp_path / "shop", "teas", number, {"francs": number})
    return tmp_path / "shop"


def test_a_collection_is_rewritten_once(shop: Path):
    line = ("migrate", shop, "teas", "shapes_of_shop:upgrade")
    assert done(*line, "--dry-run") == "3 of 3 entities would be rewritten\n"
    assert done(*line) == "3 of 3 entities were rewritten\n"
    assert done(*line) == "0 of 3 entities were rewritten\n"
    assert sorted(dumped(shop, "teas").values()) == [b"\xa1eprice\x00", b"\xa1eprice\x18d",
                                                     b"\xa1eprice\x18\xc8"]  # fmt: skip


def test_as_json(shop: Path):
    line = ("migrate", shop, "teas", "shapes_of_shop:upgrade", "--batch", "2", "--json")
    assert document(done(*line)) == {
        "collection": "teas",
        "entities": 3,
        "rewritten": 3,
        "transactions": 2,
        "dry_run": False,
    }


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("upgrade", "MODULE:FUNCTION"),
        (":upgrade", "MODULE:FUNCTION"),
        ("no_such_module:upgrade", "cannot be loaded"),
        ("shapes_of_shop:missing", "cannot be loaded"),
        ("shapes_of_shop:number", "no function"),
    ],
)
def test_a_function_that_is_none_is_refused(shop: Path, function: str, said: str):
    assert said in failed(entidb("migrate", shop, "teas", function), Exit.USAGE, "usage")


def test_an_upgrade_that_cannot_be_run_twice_writes_nothing(shop: Path):
    before = dumped(shop, "teas")
    result = entidb("migrate", shop, "teas", "shapes_of_shop:twice")
    assert "a second time" in failed(result, Exit.VALUE, "value_type")
    assert dumped(shop, "teas") == before


def test_a_collection_and_a_batch_that_are_none_are_refused(shop: Path):
    line = ("migrate", shop, "cups", "shapes_of_shop:upgrade")
    failed(entidb(*line), Exit.NOT_FOUND, "no_collection")
    result = entidb("migrate", shop, "teas", "shapes_of_shop:upgrade", "--batch", "0")
    failed(result, Exit.USAGE, "invalid_config")

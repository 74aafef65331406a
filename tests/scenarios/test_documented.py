"""``docs/testing.md`` names, for each scenario, tests that exist; and every test that is here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.testing.test_regressions import FOUND

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## Scenarios\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| ([^|`]+?) \| ([^|]*`[^|]+) \|$", SECTION, re.MULTILINE)
#: A scenario may end up under another heading, and not nowhere.
SCENARIOS_MIN = 22


def named(cell: str) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", cell)


def collected_from(path: Path) -> set[str]:
    """Tests as pytest collects them: functions of the module, sentences that start with test."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        f"{path.relative_to(ROOT).as_posix()}::{node.name}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_scenario_names_at_least_one_test():
    assert len(ROWS) >= SCENARIOS_MIN
    assert len({scenario for scenario, _ in ROWS}) == len(ROWS)
    for scenario, cell in ROWS:
        assert named(cell), scenario
        assert re.sub(r"`tests/[\w/]+\.py::\w+`", "", cell).strip() == "", scenario


def test_every_test_that_the_page_names_exists():
    """Those of bugs that were found, too."""
    tests = re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)
    assert len(tests) > SCENARIOS_MIN
    for test in tests:
        path = ROOT / test.partition("::")[0]
        assert path.exists() and test in collected_from(path), test


def test_every_seed_that_once_failed_is_on_the_page():
    assert {seed for seed, _ in FOUND.values()} == {
        int(seed) for seed in re.findall(r"`FOUND`, seed (\d+)", PAGE)
    }


def test_every_test_of_a_scenario_is_in_the_table():
    listed = {test for _, cell in ROWS for test in named(cell)}
    here = {
        test
        for path in Path(__file__).parent.glob("test_*.py")
        if path != Path(__file__)
        for test in collected_from(path)
    }
    assert here <= listed

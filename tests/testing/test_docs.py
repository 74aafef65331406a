"""``docs/testing.md`` names every invariant, knob and planted bug there is, and no others."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from entidb.testing.invariants import INVARIANTS
from entidb.testing.knobs import Knobs
from tests.planted import BUGS
from tests.planted.remembered import remembered

TEXT = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"### {title}\n", 1)[1].split("\n### ", 1)[0]


def test_every_invariant_is_explained():
    assert re.findall(r"^\| ([A-Z-]+) \|", section("Invariants"), re.M) == list(INVARIANTS)


def test_every_knob_is_listed():
    listed = set(re.findall(r"`([a-z_]+)`", section("Knobs"))) - {"server_"}
    on_server = {name for name in (field.name for field in fields(Knobs)) if "server_" in name[:7]}
    named = {field.name for field in fields(Knobs)} - (on_server - listed)
    assert listed == named
    assert on_server - listed == {
        "server_crash_before",
        "server_crash_after",
        "server_commit_unknown",
        "server_disk_full",
    }


def test_every_planted_bug_is_in_the_table():
    assert re.findall(r"^\| `([a-z-]+)` \|", section("Planted bugs"), re.M) == list(BUGS)


def test_the_table_of_planted_bugs_says_at_which_seeds_they_are_remembered():
    rows = re.findall(r"^\| `([a-z-]+)` \|[^|]*\| (\d+) \|$", section("Planted bugs"), re.M)
    known = {name: seed + 1 for name, seed in remembered().items()}
    assert {name: int(seeds) for name, seeds in rows if name in known} == known

"""Every checker can fail: each planted bug is caught, and by an invariant that fits it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from entidb.testing.invariants import INVARIANTS
from entidb.testing.simulator import Options, simulate
from tests.planted import BUGS, SEEDS_MAX, Bug, find
from tests.planted import __main__ as program
from tests.planted.garden import Finding, find_at
from tests.planted.remembered import find_again, remember, remembered
from tests.tools import SEARCHED


@pytest.fixture
def seeds_tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which seeds run; with the bug, an invariant notices seed 3."""
    seeds: list[int] = []

    def find_at(bug: Bug, seed: int) -> Finding:
        seeds.append(seed)
        return Finding(bug.name, bug.expected[0] if seed == 3 else None, seed + 1, "")

    monkeypatch.setattr("tests.planted.garden.find_at", find_at)
    monkeypatch.setattr("tests.planted.remembered.find_at", find_at)
    return seeds


@pytest.mark.parametrize(
    ("seed", "tried"),
    [(3, [3]), (None, [0, 1, 2, 3]), (7, [7, 0, 1, 2, 3]), (SEEDS_MAX, [0, 1, 2, 3])],
)
def test_the_seed_that_is_remembered_is_tried_first_and_searched_for_when_it_shows_nothing(
    seeds_tried: list[int], seed: int | None, tried: list[int]
):
    finding, again = find_again(BUGS["cursor-one-short"], seed)
    assert (finding.seeds, again, seeds_tried) == (4, seed == 3, tried)


def test_the_command_writes_the_seeds_that_have_moved_and_with_check_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    one, two = list(BUGS)[:2]
    monkeypatch.setattr("tests.planted.remembered.FILE", tmp_path / "remembered.json")
    remember({one: 3, two: 9})
    found = [
        (Finding(one, BUGS[one].expected[0], 4, ""), True),
        (Finding(two, BUGS[two].expected[0], 6, ""), False),
    ]
    monkeypatch.setattr(program, "find_all_again", lambda jobs: iter(found))
    assert program.main(["--check"]) == 1
    assert remembered() == {one: 3, two: 9}
    assert program.main([]) == 0
    assert remembered() == {one: 3, two: 5}
    assert f"{two}: seed 9 before, 5 now" in capsys.readouterr().out
    found[1] = Finding(two, None, SEEDS_MAX, ""), False
    assert program.main([]) == 1
    assert remembered() == {one: 3}


def test_seeds_are_remembered_of_planted_bugs_and_of_no_others():
    assert list(remembered()) == [name for name in BUGS if name in remembered()]
    assert len(remembered()) > len(BUGS) * 8 // 10


def test_a_bug_is_planted_anew_for_each_seed_so_that_one_alone_gives_the_same():
    searched = find(BUGS["deletions-not-applied"])
    assert searched.seeds > 1
    assert find_at(BUGS["deletions-not-applied"], searched.seeds - 1) == searched


def test_at_least_twenty_five_bugs_are_planted_and_described():
    assert len(BUGS) >= 25
    assert all(bug.says.endswith(".") for bug in BUGS.values())


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_caught_by_an_invariant_that_fits(
    name: str, record_property: Callable[[str, object], None]
):
    finding, again = find_again(BUGS[name], remembered().get(name))
    if not again:
        record_property(SEARCHED, name)
    assert finding.invariant in BUGS[name].expected, finding
    # A place that is looked for where it is not any more fails as well, and plants nothing.
    assert "does not have the attribute" not in finding.message
    assert finding.seeds <= SEEDS_MAX


@pytest.mark.parametrize("name", sorted(BUGS))
def test_nothing_of_a_planted_bug_stays_behind(name: str):
    if "SAME-SEED" not in BUGS[name].expected:
        run = simulate(1, Options(dict(BUGS[name].knobs) | {"events": 80}))
        assert run.invariant is None, run.message


def test_every_invariant_that_a_bug_names_exists():
    named = {invariant for bug in BUGS.values() for invariant in bug.expected}
    # UNEXPECTED: the code under test noticed by itself, with an exception.
    assert named <= {*INVARIANTS, "UNEXPECTED"}


def test_every_invariant_has_a_bug_that_can_show_its_checker():
    first = {bug.expected[0] for bug in BUGS.values()}
    assert {*INVARIANTS} <= first | {name for bug in BUGS.values() for name in bug.expected[:3]}


def test_outside_of_a_checkout_there_are_no_planted_bugs_and_one_line_says_so(tmp_path: Path):
    command = [sys.executable, "-m", "entidb.testing", "--planted"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert "run this in a checkout" in found.stderr
    assert len(found.stderr.splitlines()) == 1

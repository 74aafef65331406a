"""Every checker can fail: each planted bug is caught, and by an invariant that fits it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from entidb.testing.invariants import INVARIANTS
from entidb.testing.simulator import Options, simulate
from tests.planted import BUGS, SEEDS_MAX, find


def test_at_least_twenty_five_bugs_are_planted_and_described():
    assert len(BUGS) >= 25
    assert all(bug.says.endswith(".") for bug in BUGS.values())


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_caught_by_an_invariant_that_fits(name: str):
    finding = find(BUGS[name])
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

"""Processes on one database, killed and stopped in mid-commit: nothing acknowledged is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from entidb.db import Database
from entidb.testing import torture_openers
from entidb.testing.torture_openers import Report, torture
from entidb.testing.torture_waits import Struck

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one process at a time there"),
]


@pytest.mark.slow
def test_eight_processes_of_which_two_die_each_second_lose_nothing(tmp_path: Path) -> None:
    report = torture(tmp_path, processes=8, commits=1000, seconds=25, seed=20261128)
    assert report.faults == [], str(report)
    assert report.kills and report.stops
    assert report.acknowledged > 8 * 20


def test_the_ledger_shows_what_is_lost_torn_or_not_counted(tmp_path: Path) -> None:
    """The check itself can fail."""
    with Database.open(tmp_path / "db") as database:
        database["notes"].add({"mark": "torn", "n": 0})
    (tmp_path / "ledger-1").write_text("lost 0.1\ntorn 0.5\n")
    report = Report()
    torture_openers._check(tmp_path, report, Struck())
    assert report.longest_s == 0.5
    assert [fault.split(" ", 1)[1][:12] for fault in report.faults] == [
        "transactions",
        "acknowledged",
        "transactions",
    ]

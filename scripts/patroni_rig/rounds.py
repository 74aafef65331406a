"""Rounds of faults, and the ledger of all of them.

    scripts/failover --rounds 20 --faults machine,zombie --seed 7

Ends with 1 if anything that was acknowledged was lost, or was there twice.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from entidb.testing.failover import Comparison, Fleet, open_in_postgres
from scripts.patroni_rig.cluster import PatroniCluster
from scripts.patroni_rig.demo import show
from scripts.patroni_rig.faults import FAILED, FAULTS, Fault, Rig
from scripts.patroni_rig.programs import find_programs, make_folder, versions

#: Seconds that devices write before each fault, and after it.
_BEFORE_S: Final = (1.0, 3.0)
_AFTER_S: Final = 1.0


@dataclass
class Line:
    """What the rounds of one fault have shown."""

    fault: Fault
    rounds: int = 0
    #: The ledgers of the devices go on from round to round: that of the last one counts.
    last: Comparison = field(default_factory=Comparison)
    lost: int = 0
    doubled: int = 0
    gaps: int = 0
    unequal: int = 0
    #: Seconds until PostgreSQL takes writes again, one device's, and those of all.
    postgres_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    all_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def enter(self, found: Comparison, postgres_s: float, resumed: tuple[float, float]) -> None:
        self.rounds += 1
        self.last = found
        self.lost = max(self.lost, found.lost)
        self.doubled = max(self.doubled, found.doubled)
        self.gaps = max(self.gaps, found.gaps)
        self.unequal = max(self.unequal, found.unequal)
        self.postgres_s.append(postgres_s)
        self.first_s.append(resumed[0])
        self.all_s.append(resumed[1])
        self.faults += found.faults


HEAD: Final = (
    f"{'fault':<22}{'rounds':>7}{'acknowledged':>14}{'lost':>6}{'doubled':>9}{'gaps':>6}"
    f"{'dumps':>9}   writes resume (median, worst): PostgreSQL       all devices"
)


def row(line: Line) -> str:
    dumps = "equal" if not line.unequal else f"{line.unequal} differ"
    resumed = f"{_times(line.postgres_s):>41}{_times(line.all_s):>18}"
    return (
        f"{line.fault.words:<22}{line.rounds:>7}{line.last.acknowledged:>14}{line.lost:>6}"
        f"{line.doubled:>9}{line.gaps:>6}{dumps:>9}   {resumed}"
    )


def _times(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} {max(seconds):.1f} s" if seconds else "-"


def one_round(rig: Rig, fault: Fault, line: Line) -> None:
    """Raises ``RigFailure``, ``TortureFailure``."""
    rig.cluster.wait_until_well()
    time.sleep(rig.source.uniform(*_BEFORE_S))
    since, mend = fault.strike(rig)
    with ThreadPoolExecutor(1) as thread:
        probe = thread.submit(rig.cluster.writes_since, since)
        resumed = rig.fleet.pause(since) if fault.pauses else rig.fleet.resumed(since)
        postgres_s = probe.result() - since
    mend()
    rig.cluster.wait_until_well()
    time.sleep(_AFTER_S)
    rig.fleet.quiet()
    found = rig.fleet.compare()
    rig.fleet.go_on()
    line.enter(found, postgres_s, resumed)


def run(names: Sequence[str], rounds: int, seed: int, folder: Path, output: IO[str]) -> list[Line]:
    """``rounds`` rounds of each fault. What goes wrong is in the lines."""
    found = find_programs()
    assert not isinstance(found, str)
    lines: list[Line] = []
    servers = folder / "postgres"
    servers.mkdir()
    with PatroniCluster(found, servers) as cluster:
        opens = open_in_postgres(cluster.address)
        with Fleet(cluster.address, folder / "fleet", opens, seed=seed) as fleet:
            rig = Rig(cluster, fleet, random.Random(seed))
            for name in names:
                line = Line(FAULTS[name])
                lines.append(line)
                try:
                    fleet.begin(name)
                    for number in range(rounds):
                        one_round(rig, FAULTS[name], line)
                        print(_said(name, number, line), file=output, flush=True)
                    fleet.quiet()
                except FAILED as failure:
                    line.faults.append(f"{type(failure).__name__}: {failure}")
                    break  # what is left behind is not what the next fault begins with
    return lines


def _said(name: str, number: int, line: Line) -> str:
    found = line.last
    return (
        f"{name} {number + 1}: {found.acknowledged} acknowledged, {found.lost} lost, "
        f"{found.doubled} doubled; PostgreSQL takes writes after {line.postgres_s[-1]:.2f} s, the "
        f"first device writes after {line.first_s[-1]:.2f} s, all after {line.all_s[-1]:.2f} s"
    )


def main(arguments: Sequence[str] | None = None, output: IO[str] = sys.stdout) -> int:
    parser = argparse.ArgumentParser(prog="scripts/failover", description="failover, tried")
    parser.add_argument("--rounds", type=int, default=20, help="of each fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, help="random unless given")
    parser.add_argument("--keep", action="store_true", help="leave all files and logs")
    parser.add_argument("--demo", action="store_true", help="one round, for a person to watch")
    given = parser.parse_args(arguments)
    names = given.faults.split(",")
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"no fault is called {', '.join(unknown)}")
    programs = find_programs()
    if isinstance(programs, str):
        print(f"error[not_installed]: {programs}", file=sys.stderr)
        return 2
    if given.demo:
        return show(programs, output)
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    print(f"{versions(programs)}; seed {seed}", file=output, flush=True)
    folder = make_folder()
    lines: list[Line] = []
    try:
        lines = run(names, given.rounds, seed, folder, output)
    finally:
        faults = [f"{line.fault.words}: {each}" for line in lines for each in line.faults]
        if given.keep or faults or not lines:
            print(f"files: {folder}", file=output)
        else:
            shutil.rmtree(folder)
    print(HEAD, *map(row, lines), *faults, sep="\n", file=output)
    for line in lines:
        limit = line.fault.limit_s
        if limit is not None and line.all_s and max(line.all_s) > limit:
            late = sum(seconds > limit for seconds in line.all_s)
            print(f"{line.fault.words}: later than {limit:g} s in {late} rounds", file=output)
    return 1 if faults else 0

"""Processes that commit to one database while some of them are killed and stopped at random, with a
ledger of every transaction that was acknowledged.

``python -m entidb.testing.torture_openers --seconds 3600`` runs for an hour.

Not here: devices and a server under torture (``torture``), and what a long wait was made of
(``torture_waits``).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from entidb.db import Database
from entidb.testing.torture_waits import (
    Commit,
    Span,
    Stopwatch,
    Struck,
    after_a_death,
    explain,
    read_commit,
)

#: Entities of one transaction: all of them are there, or none.
ENTITIES: Final = 3
#: Deaths in a second.
_KILLS: Final = 2
_STOP_SECONDS: Final = 0.2
#: Commits that are taken apart.
_EXPLAINED: Final = 3


@dataclass
class Report:
    """What a run has shown; ``faults`` is empty when all is well."""

    acknowledged: int = 0
    committed: int = 0
    kills: int = 0
    stops: int = 0
    longest_s: float = 0.0
    #: Until another process had the turn of one that was killed.
    after_death_s: float = 0.0
    #: What the longest commits were made of.
    waits: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} transactions acknowledged, {self.committed} there; "
            f"{self.kills} killed, {self.stops} stopped; the longest commit took "
            f"{self.longest_s * 1000:.0f} ms; the turn of a dead one was taken within "
            f"{self.after_death_s * 1000:.0f} ms; {len(self.faults)} faults"
        )


def work(path: str, ledger: str, commits: int) -> None:
    """One process: commit, and only then write it into the ledger."""
    out = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with Database.open(path) as database:
        watch = Stopwatch()
        for _ in range(commits):
            mark = uuid.uuid4().hex
            watch.start()
            with database.transaction() as tx:
                watch.lap()
                # Reads what others have committed, so that a state that is not the newest shows.
                row = tx["counter"].get(_COUNTER, 0)
                tx["counter"][_COUNTER] = row + 1
                for n in range(ENTITIES):
                    tx["notes"].add({"mark": mark, "n": n})
                watch.lap()
            watch.lap()
            os.write(out, watch.line(mark).encode())


_COUNTER: Final = uuid.UUID("0197a000-0000-7000-8000-000000000001")


def torture(path: Path, *, processes: int, commits: int, seconds: float, seed: int) -> Report:
    """``processes`` processes with ``commits`` commits each, and again as long as there is time;
    two of them are killed each second, and one is stopped for a moment."""
    rng, report = random.Random(seed), Report()
    Database.open(path / "db").close()
    running: list[subprocess.Popen[bytes]] = []
    numbers: dict[int, int] = {}
    stopped: dict[int, Span] = {}
    struck = Struck()
    deadline, next_fault = time.monotonic() + seconds, time.monotonic() + 0.5
    number = 0
    try:
        while time.monotonic() < deadline or any(each.poll() is None for each in running):
            now = time.monotonic()
            for each in [each for each in running if each.poll() is not None]:
                running.remove(each)
                if each.returncode not in (0, -signal.SIGKILL):
                    report.faults.append(f"a process ended with {each.returncode}")
            while now < deadline and len(running) < processes:
                number += 1
                running.append(_start(path, number, commits))
                numbers[running[-1].pid] = number
            for pid, stop in list(stopped.items()):
                if now > stop.ended:
                    del stopped[pid]
                    _signal(pid, signal.SIGCONT)
                    struck.stops.append((numbers[pid], Span(stop.began, time.monotonic())))
            if running and now < deadline and now > next_fault:
                next_fault = now + 1 / (_KILLS + 1)
                victim = rng.choice(running)
                if rng.random() < _KILLS / (_KILLS + 1):
                    struck.kills.append((numbers[victim.pid], time.monotonic()))
                    victim.kill()
                    report.kills += 1
                elif _signal(victim.pid, signal.SIGSTOP):
                    stopped[victim.pid] = Span(now, now + _STOP_SECONDS)
                    report.stops += 1
            time.sleep(0.01)
    finally:
        for each in running:
            _signal(each.pid, signal.SIGCONT)
            each.kill()
            each.wait()
    _check(path, report, struck)
    return report


def _start(path: Path, number: int, commits: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "entidb.testing.torture_openers", "--work", str(path / "db"),
            str(path / f"ledger-{number}"), str(commits),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _check(path: Path, report: Report, struck: Struck) -> None:
    acknowledged: list[str] = []
    commits: list[Commit] = []
    for ledger in path.glob("ledger-*"):
        for line in ledger.read_text().splitlines():
            mark, took = line.split()[:2]
            acknowledged.append(mark)
            report.longest_s = max(report.longest_s, float(took))
            if commit := read_commit(int(ledger.name.partition("-")[2]), line):
                commits.append(commit)
    report.after_death_s = after_a_death(commits, struck)
    for each in sorted(commits, key=lambda each: -each.took_s)[:_EXPLAINED]:
        report.waits.append(f"{each.took_s * 1000:.0f} ms:")
        report.waits += [f"  {line}" for line in explain(each, commits, struck)]
    with Database.open(path / "db") as database:
        found = Counter(value["mark"] for value in database["notes"].values())
        report.faults += database.verify()
        report.acknowledged, report.committed = len(acknowledged), len(found)
        counted = database["counter"].get(_COUNTER, 0)
        if counted != len(found):
            report.faults.append(f"{len(found)} transactions are there, and counted to {counted}")
        if database.sequence != len(found):
            report.faults.append(f"{len(found)} transactions took {database.sequence} sequences")
    lost = [mark for mark in acknowledged if not found[mark]]
    if lost:
        report.faults.append(f"{len(lost)} acknowledged transactions are lost")
    torn = [mark for mark, count in found.items() if count != ENTITIES]
    if torn:
        report.faults.append(f"{len(torn)} transactions are there in part, or twice")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m entidb.testing.torture_openers")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--commits", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--work", nargs=3, metavar=("DIR", "LEDGER", "COMMITS"))
    given = parser.parse_args()
    if given.work:
        work(given.work[0], given.work[1], int(given.work[2]))
        return 0
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = torture(
            Path(folder),
            processes=given.processes,
            commits=given.commits,
            seconds=given.seconds,
            seed=given.seed,
        )
    print(report)
    for line in [*report.waits, *report.faults]:
        print(line)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["ENTITIES", "Report", "torture", "work"]

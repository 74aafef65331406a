"""``python -m entidb.testing``: run the simulator, replay a seed, make it small, plant bugs.

Only arguments and printing are here. The exit code is 1 when an invariant failed or a planted
bug was not caught, 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from types import ModuleType
from typing import Any

from entidb.errors import ConfigError
from entidb.testing import knobs as knob
from entidb.testing.batch import Summary, parse_range, run_seeds, shrink
from entidb.testing.simulator import Options, Run, simulate


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        settings = knob.parse(given.knob)
        knob.override(knob.Knobs(), settings)
        if given.planted:
            return _planted(given.jobs, given.only)
        if given.seeds is not None:
            return _many(parse_range(given.seeds), given.jobs, settings)
        if given.shrink is not None:
            return _shrink(given.shrink, settings)
        if given.seed is not None:
            return _one(given.seed, settings, trace=given.trace)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    parser.print_help()
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m entidb.testing", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seed", type=int, metavar="N", help="replay one run and tell its story")
    what.add_argument("--seeds", metavar="A:B", help="run the seeds from A up to, not with, B")
    what.add_argument("--shrink", type=int, metavar="N", help="make a failing run small")
    what.add_argument("--planted", action="store_true", help="plant known bugs and catch them")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default 1)")
    parser.add_argument("--knob", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--trace", action="store_true", help="print every event of --seed")
    parser.add_argument("--only", metavar="NAME", help="one bug of --planted")
    return parser


def _one(seed: int, settings: dict[str, int], *, trace: bool) -> int:
    print(f"seed {seed}", flush=True)
    run = simulate(seed, Options(settings, trace=print if trace else None))
    print(f"knobs: {knob.shown(run.knobs)}")
    for line in run.story:
        print(line)
    print(f"events={run.events} digest={run.digest[:16]} faults={dict(sorted(run.faults.items()))}")
    _tell_failure(run)
    return 1 if run.invariant else 0


def _many(seeds: range, jobs: int, settings: dict[str, int]) -> int:
    began = time.perf_counter()
    print(f"seeds {seeds.start}:{seeds.stop}", flush=True)
    summary = run_seeds(seeds, jobs=jobs, settings=settings, tell=_tell_failure)
    seconds = time.perf_counter() - began
    for name in sorted(summary.checks):
        print(f"  {name:<20} {summary.checks[name]:>12,} checks")
    print("faults: " + " ".join(f"{name}={summary.faults[name]}" for name in knob.FAULTS))
    print(f"{summary.line()} ({summary.events / seconds:,.0f} events a second)")
    never = summary.never_fired()
    if never and not settings:
        print(f"never fired: {', '.join(never)}")
    return 1 if summary.failures or (never and not settings and len(seeds) >= 1000) else 0


def _shrink(seed: int, settings: dict[str, int]) -> int:
    small = shrink(seed, settings)
    if small is None:
        print(f"seed {seed} does not fail with these knobs")
        return 0
    given, run = small
    chosen = " ".join(f"--knob {name}={value}" for name, value in sorted(given.items()))
    print(f"python -m entidb.testing --seed {seed} {chosen}")
    _tell_failure(run)
    return 1


def _planted(jobs: int, only: str | None) -> int:
    bugs = _bugs()
    if bugs is None:
        print(
            "the planted bugs are no part of the package: run this in a checkout", file=sys.stderr
        )
        return 2
    print(f"{'bug':<34} {'caught':<7} {'by':<20} {'seeds':>5}")
    findings = bugs.try_all(jobs=jobs, only=only, tell=_tell_finding)
    missed = [finding for finding in findings if finding.invariant is None]
    caught = len(findings) - len(missed)
    print(f"planted={len(findings)} caught={caught} (within {bugs.SEEDS_MAX} seeds)")
    return 1 if missed or not findings else 0


def _bugs() -> ModuleType | None:
    """The bugs, which are among the tests of a checkout; None outside of one."""
    try:
        return importlib.import_module("tests.planted")
    except ModuleNotFoundError as error:
        if error.name not in ("tests", "tests.planted"):
            raise
        return None


def _tell_finding(finding: Any) -> None:
    caught = "yes" if finding.invariant else "NO"
    by = finding.invariant or "-"
    print(f"{finding.name:<34} {caught:<7} {by:<20} {finding.seeds:>5}", flush=True)


def _tell_failure(run: Run) -> None:
    if run.invariant is None:
        return
    print(f"FAILED seed={run.seed} {run.invariant}: {run.message}")
    print(f"  replay: python -m entidb.testing --seed {run.seed} --trace", flush=True)


__all__ = ["Summary", "main"]

if __name__ == "__main__":
    sys.exit(main())

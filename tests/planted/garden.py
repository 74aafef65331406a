"""Where bugs are planted, and the search for the seed that notices one.

A bug is one place of the real code, replaced from here while its seeds run; there is no trace of
it in the code itself. The bugs live in rooms by subject, beside this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final
from unittest import mock

from entidb.testing.batch import begin_worker
from entidb.testing.simulator import Options, Run, simulate

#: A bug must be caught within so many seeds.
SEEDS_MAX: Final = 300

#: Replaces attributes of the code under test; undone when the seeds are through.
Plant = Callable[["Garden"], None]


class Garden:
    """Where bugs are planted: ``replace(owner, name, make)`` puts ``make(original)`` there."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def replace(self, owner: object, name: str, make: Callable[[Any], Any]) -> None:
        # An attribute that is gone means the registry is out of step: that has to be loud.
        value = make(getattr(owner, name))
        self._stack.enter_context(mock.patch.object(owner, name, value))


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The code under test has ``bug`` inside this block."""
    with contextlib.ExitStack() as stack:
        bug.plant(Garden(stack))
        yield


@dataclass(frozen=True)
class Bug:
    """``knobs`` make the seeds fit the bug; ``expected`` are the invariants that may notice."""

    name: str
    says: str
    plant: Plant
    expected: tuple[str, ...]
    knobs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What became of a planted bug: the invariant that noticed, after how many seeds."""

    name: str
    invariant: str | None
    seeds: int
    message: str


BUGS: dict[str, Bug] = {}
CALM: Final[dict[str, int]] = {
    "events": 700,
    "devices": 3,
    "keys": 5,
    "lmdb": 0,
    "stale_rows": 0,
    "nodes": 0,
    "live": 0,
    "quota_entities": 0,
    "quota_bytes": 0,
    "quota_devices": 0,
}
WILD: Final = CALM | {"lost": 100, "repeated": 100}


def bug(name: str, *expected: str, knobs: Mapping[str, int] = CALM) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        BUGS[name] = Bug(name, (plant.__doc__ or "").strip(), plant, expected, knobs)
        return plant

    return register


def find(bug: Bug, seeds_max: int = SEEDS_MAX) -> Finding:
    """Plant ``bug`` and run seeds until an invariant notices."""
    for seed in range(seeds_max):
        finding = find_at(bug, seed)
        if finding.invariant is not None:
            return finding
    return Finding(bug.name, None, seeds_max, "")


def find_at(bug: Bug, seed: int) -> Finding:
    """Plant ``bug`` and run this seed alone."""
    with planted(bug):
        run = simulate(seed, Options(bug.knobs))
        noticed = run.invariant or _other_trace(bug, run)
    return Finding(bug.name, noticed, seed + 1, run.message)


def _other_trace(bug: Bug, run: Run) -> str | None:
    """SAME-SEED needs a second run."""
    if "SAME-SEED" not in bug.expected:
        return None
    again = simulate(run.seed, Options(bug.knobs))
    return None if again.digest == run.digest else "SAME-SEED"


def try_all(
    *, jobs: int = 1, only: str | None = None, tell: Callable[[Finding], None] = lambda f: None
) -> list[Finding]:
    """Every bug, or ``only`` one; ``tell`` is called with each finding."""
    names = [name for name in BUGS if only in (None, name)]
    findings = []
    if jobs <= 1:
        for name in names:
            findings.append(find(BUGS[name]))
            tell(findings[-1])
        return findings
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=begin_worker) as pool:
        for finding in pool.map(_find_named, names):
            findings.append(finding)
            tell(finding)
    return findings


def _find_named(name: str) -> Finding:
    return find(BUGS[name])

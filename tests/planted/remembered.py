"""At which seed each planted bug was caught: tried first, so that the suite need not search.

``python -m tests.planted`` keeps ``remembered.json``. A bug that its seed does not show any more is
searched for from seed 0, by the tests and by that command; the command then writes what it found.
That a seed below ``SEEDS_MAX`` shows the bug proves what the search proves: so many are enough.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from entidb.testing.batch import begin_worker
from tests.planted.garden import BUGS, SEEDS_MAX, Bug, Finding, find, find_at

FILE: Final = Path(__file__).with_name("remembered.json")


def remembered() -> dict[str, int]:
    """The seed of each bug by name; those that no seed fits stand nowhere."""
    found: dict[str, int] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def remember(seeds: Mapping[str, int]) -> None:
    """Keep ``seeds``, of the bugs there are, in the order of the bugs."""
    kept = {name: seeds[name] for name in BUGS if name in seeds}
    FILE.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")


def find_again(bug: Bug, seed: int | None) -> tuple[Finding, bool]:
    """What notices ``bug``, and whether it was at ``seed``, where it was caught before."""
    if seed is not None and seed < SEEDS_MAX:
        finding = find_at(bug, seed)
        if finding.invariant in bug.expected:
            return finding, True
    return find(bug), False


def find_all_again(jobs: int) -> Iterator[tuple[Finding, bool]]:
    """``find_again`` of every bug, in order, in ``jobs`` processes."""
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=begin_worker) as pool:
        seeds = remembered()  # the file is written meanwhile
        yield from pool.map(_find_named, BUGS, map(seeds.get, BUGS))


def _find_named(name: str, seed: int | None) -> tuple[Finding, bool]:
    return find_again(BUGS[name], seed)

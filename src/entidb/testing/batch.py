"""Many runs: in several processes, summed up; and one failing run made small."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from entidb.errors import ConfigError
from entidb.testing import knobs as knob
from entidb.testing.simulator import Options, Run, simulate

#: Attempts of ``shrink`` at most; each runs the seed once more.
SHRINK_RUNS_MAX: Final = 300
_CHUNK: Final = 10


@dataclass
class Summary:
    """What many runs came to."""

    seeds: int = 0
    events: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    failures: list[Run] = field(default_factory=list)

    def add(self, run: Run) -> None:
        self.seeds += 1
        self.events += run.events
        self.faults += run.faults
        self.checks += run.checks
        if run.invariant is not None:
            self.failures.append(run)

    def line(self) -> str:
        return (
            f"seeds={self.seeds} events={self.events} faults={self.faults.total()} "
            f"checks={self.checks.total()} failures={len(self.failures)}"
        )

    def never_fired(self) -> list[str]:
        """Faults that no run has had: in 1,000 seeds that is an error of the simulator."""
        return [name for name in knob.FAULTS if not self.faults[name]]


def parse_range(text: str) -> range:
    """``"0:1000"`` as a range. Raises ``ConfigError``."""
    first, colon, last = text.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise ConfigError(f"--seeds {text!r}: write first:end, such as 0:1000")
    return range(int(first), int(last))


def run_seeds(
    seeds: Iterable[int],
    *,
    jobs: int = 1,
    settings: Mapping[str, int] | None = None,
    tell: Callable[[Run], None] = lambda run: None,
) -> Summary:
    """Run all ``seeds``, in ``jobs`` processes, with the knobs of ``settings`` fixed. It calls
    ``tell`` with every run, in order of the seeds."""
    summary = Summary()
    for run in _runs(list(seeds), jobs, dict(settings or {})):
        summary.add(run)
        tell(run)
    return summary


def _runs(seeds: list[int], jobs: int, settings: dict[str, int]) -> Iterator[Run]:
    if jobs <= 1:
        for seed in seeds:
            yield simulate(seed, Options(settings))
        return
    chunks = [seeds[at : at + _CHUNK] for at in range(0, len(seeds), _CHUNK)]
    # Spawned, not forked: an LMDB environment must not cross a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=begin_worker) as pool:
        for runs in pool.map(_chunk, chunks, [settings] * len(chunks)):
            yield from runs


def begin_worker() -> None:
    """A worker leaves interrupts to its parent, and ends when the parent is gone, whatever ended
    it: otherwise it would wait for work without end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _chunk(seeds: list[int], settings: dict[str, int]) -> list[Run]:
    return [simulate(seed, Options(settings)) for seed in seeds]


def shrink(seed: int, settings: Mapping[str, int]) -> tuple[dict[str, int], Run] | None:
    """Knobs that make ``seed`` fail in the same invariant with fewer events, devices and faults;
    with the run they give. None if it does not fail at all."""
    best = dict(settings)
    run = simulate(seed, Options(best))
    if run.invariant is None:
        return None
    left = SHRINK_RUNS_MAX
    progress = True
    while progress and left:
        progress = False
        for name, value in _smaller(run):
            if not left:
                break
            left -= 1
            candidate = best | {name: value}
            tried = simulate(seed, Options(candidate))
            if tried.invariant == run.invariant:
                best, run, progress = candidate, tried, True
                break
    return best, run


def _smaller(run: Run) -> list[tuple[str, int]]:
    """What could be less, the coarsest first."""
    knobs = run.knobs
    tries = [("events", value) for value in (knobs.events // 4, knobs.events // 2) if value > 4]
    tries += [("devices", value) for value in range(1, knobs.devices)]
    tries += [("tenants", 1)] if knobs.tenants > 1 else []
    names = [*knob.LEVELS, *knob.NODE_LEVELS, "operations", "deletes", "group_ms"]
    tries += [(name, 0) for name in names if getattr(knobs, name)]
    tries += [("keys", value) for value in (2, 5, knobs.keys // 2) if 2 <= value < knobs.keys]
    tries += [("events", value) for value in (knobs.events * 9 // 10,) if value > 4]
    return tries

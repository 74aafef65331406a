"""``scripts/prove``: very many seeds, in chunks, with a file that says what is done already.

Each finished chunk adds one line of JSON to the file of ``--out``; a run that was interrupted goes
on with the seeds that the file does not have. The exit code is 1 when an invariant failed or a
fault never fired, 2 for arguments that make no sense, 130 when interrupted. The simulator runs and
checks them.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, ValidationError, convert, to_builtins

from entidb.errors import ConfigError
from entidb.testing import batch
from entidb.testing import knobs as knob
from entidb.testing.invariants import INVARIANTS
from entidb.testing.simulator import Run, simulate

SEEDS: Final = "0:100000"
CHUNK: Final = 1000
#: From so many seeds on, a fault that never fired is an error of the simulator.
FAULTS_DUE: Final = 1000


class Failure(Struct, frozen=True):
    """A seed that failed, and in what."""

    seed: int
    invariant: str
    message: str


class Chunk(Struct, frozen=True):
    """One line of the file: the results of the seeds from ``first`` up to, not with, ``end``."""

    commit: str
    first: int
    end: int
    events: int
    seconds: float
    faults: dict[str, int]
    checks: dict[str, int]
    failures: list[Failure]


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _prove(given)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what {given.out} does not hold yet")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/prove", description=__doc__)
    parser.add_argument("--seeds", default=SEEDS, metavar="A:B", help=f"default {SEEDS}")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default 1)")
    parser.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help="seeds per line")
    parser.add_argument("--out", type=Path, default=Path("prove.jsonl"), metavar="FILE")
    parser.add_argument("--go-on", action="store_true", help="do not stop at a chunk that failed")
    return parser


def _prove(given: argparse.Namespace) -> int:
    seeds = batch.parse_range(given.seeds)
    if given.chunk < 1 or given.jobs < 1:
        raise ConfigError("--chunk and --jobs have to be at least 1")
    commit = commit_id()
    done = [chunk for chunk in read_chunks(given.out) if _inside(chunk, seeds)]
    others = sorted({chunk.commit for chunk in done} - {commit})
    if others:
        raise ConfigError(
            f"{given.out} holds seeds of commit {', '.join(others)}, and this is {commit}; a proof "
            "is about one commit: give another --out"
        )
    left = list(missing(done, seeds, given.chunk))
    print(f"seeds {given.seeds} of commit {commit}: {len(done)} chunks done, {len(left)} to do")
    for part in left:
        if any(chunk.failures for chunk in done) and not given.go_on:
            break
        done.append(_run_chunk(commit, part, given.jobs))
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_builtins(done[-1]), sort_keys=True) + "\n")
        print(_progress(done, seeds), flush=True)
    print(table(done))
    failed = any(chunk.failures for chunk in done)
    unfired = sum(c.end - c.first for c in done) >= FAULTS_DUE and never_fired(done)
    return 1 if failed or unfired else 0


def commit_id() -> str:
    """Of the code that runs, with ``+`` if it was changed since; ``unknown`` outside of git."""
    here = Path(__file__).parent
    try:
        made = _git(here, "rev-parse", "--short=12", "HEAD")
        return made + ("+" if _git(here, "status", "--porcelain", "--", here.parent) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(where: Path, *command: str | Path) -> str:
    run = subprocess.run(["git", *command], cwd=where, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def read_chunks(path: Path) -> list[Chunk]:
    """What the file holds. A last line that was cut off is taken out of it: its seeds run again.
    Raises ``ConfigError`` for anything else that is not a chunk."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    chunks = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            chunks.append(convert(json.loads(line), Chunk))
        except (ValueError, ValidationError) as error:
            raise ConfigError(f"{path}, line {number} is no chunk of a proof: {error}") from error
    return chunks


def _inside(chunk: Chunk, seeds: range) -> bool:
    return seeds.start <= chunk.first and chunk.end <= seeds.stop


def missing(done: list[Chunk], seeds: range, size: int) -> Iterator[range]:
    """The seeds that no chunk has, in parts of at most ``size``."""
    at = seeds.start
    for first, end in [*sorted((chunk.first, chunk.end) for chunk in done), (seeds.stop, 0)]:
        while at < first:
            part = range(at, min(at + size, first))
            yield part
            at = part.stop
        at = max(at, end)


def _run_chunk(commit: str, part: range, jobs: int) -> Chunk:
    began = time.perf_counter()
    runs: list[Run] = []

    def tell(run: Run) -> None:
        if not runs:
            runs.append(run)
        _tell_failure(run)

    summary = batch.run_seeds(part, jobs=jobs, tell=tell)
    failures = [
        Failure(run.seed, run.invariant or "", run.message[:2000]) for run in summary.failures
    ]
    # Another process, and so another hash seed, where there are several jobs.
    again = simulate(part.start)
    summary.checks["SAME-SEED"] += 1
    if again.digest != runs[0].digest:
        failures.append(Failure(part.start, "SAME-SEED", "it has another trace when run again"))
    return Chunk(
        commit,
        part.start,
        part.stop,
        summary.events,
        round(time.perf_counter() - began, 1),
        dict(summary.faults),
        dict(summary.checks),
        failures,
    )


def _tell_failure(run: Run) -> None:
    if run.invariant is not None:
        print(f"FAILED seed={run.seed} {run.invariant}: {run.message}")
        print(f"  replay: python -m entidb.testing --seed {run.seed} --trace", flush=True)


def _progress(done: list[Chunk], seeds: range) -> str:
    last = done[-1]
    through = sum(chunk.end - chunk.first for chunk in done)
    speed = last.events / last.seconds if last.seconds else 0
    failures = sum(len(chunk.failures) for chunk in done)
    return (
        f"{last.first}:{last.end} in {last.seconds:.0f} s, {speed:,.0f} events a second; "
        f"{through:,} of {len(seeds):,} seeds, {failures} failures"
    )


# ---------------------------------------------------------------- totals


def never_fired(done: list[Chunk]) -> list[str]:
    faults = _sum(done, lambda chunk: chunk.faults)
    return [name for name in knob.FAULTS if not faults[name]]


def table(done: list[Chunk]) -> str:
    """All of it as Markdown, for ``docs/testing.md``."""
    if not done:
        return ""
    faults = _sum(done, lambda chunk: chunk.faults)
    checks = _sum(done, lambda chunk: chunk.checks)
    failures = [failure for chunk in done for failure in chunk.failures]
    seeds = sum(chunk.end - chunk.first for chunk in done)
    head = [
        done[0].commit,
        f"{seeds:,}",
        f"{sum(chunk.events for chunk in done):,}",
        f"{faults.total():,}",
        f"{checks.total():,}",
        str(len(failures)),
        f"{sum(chunk.seconds for chunk in done):,.0f}",
    ]
    lines = [
        "",
        "| commit | seeds | events | faults | checks | failures | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| {' | '.join(head)} |",
        "",
        "| invariant | checks |",
        "|---|---|",
        *(f"| {name} | {checks[name]:,} |" for name in INVARIANTS),
        "",
        "| fault | fired |",
        "|---|---|",
        *(f"| `{name}` | {faults[name]:,} |" for name in knob.FAULTS),
    ]
    if failures:
        lines += ["", "| failed seed | invariant |", "|---|---|"]
        lines += [f"| {failure.seed} | {failure.invariant} |" for failure in failures]
    return "\n".join(lines)


def _sum(done: list[Chunk], part: Callable[[Chunk], Any]) -> Counter[str]:
    total: Counter[str] = Counter()
    for chunk in done:
        total.update(part(chunk))
    return total


if __name__ == "__main__":
    sys.exit(main())

"""Two versions beside each other: ``python -m benchmarks.compare OLD [NAME[:N] …]``.

OLD is a revision of this repository (``v0.3.1``, a commit), or a directory with a checkout. The
benchmarks of this tree measure the sources of both, in processes that take turns, because a machine
that slows down for a minute then slows down both. What is printed for each figure is the median of
the ratios of the pairs, and how far they lie apart: a difference smaller than that is none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.__main__ import DIRECTORY, NAMES
from benchmarks.figures import short

#: What a device and a server do most.
USUAL = ("push", "pull", "incremental", "conflicts")
_ROOT = Path(__file__).parent.parent
#: Benchmark, figure and size.
Key = tuple[str, str, int]


class Pair(NamedTuple):
    """One figure of both versions, measured one right after the other."""

    old: float
    new: float
    unit: str

    @property
    def times(self) -> float:
        """What the new version takes, times what the old one takes: of a rate the inverse."""
        is_rate = self.unit.endswith(("/s", "/CPU s"))
        return self.old / self.new if is_rate else self.new / self.old


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    options.dir.mkdir(parents=True, exist_ok=True)
    with sources_of(options.old, options.dir) as old:
        pairs: dict[Key, list[Pair]] = {}
        for number in range(options.rounds):
            for name, size in options.names:
                # What comes second may find the machine warmer, so they take turns in that too.
                sides = {}
                for source in (old, _ROOT / "src") if number % 2 else (_ROOT / "src", old):
                    sides[source] = measured(source, name, size, options.dir)
                before, after = sides[old], sides[_ROOT / "src"]
                for key in before.keys() & after.keys():
                    (was, unit), (value, _) = before[key], after[key]
                    if was and value:
                        pairs.setdefault(key, []).append(Pair(was, value, unit))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    print(table(pairs))


@contextlib.contextmanager
def sources_of(old: str, directory: Path) -> Iterator[Path]:
    """The ``src`` of a checkout or a revision, which is unpacked below ``directory`` meanwhile."""
    if (Path(old) / "src" / "entidb").is_dir():
        yield (Path(old) / "src").resolve()
        return
    archive = subprocess.run(
        ["git", "archive", "--format=zip", old, "src"], cwd=_ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(f"{old} is no revision and no checkout: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="compare-", dir=directory) as where:
        # Not tar: Python 3.11.0 to 3.11.3 have no filter for it, and later ones warn without one.
        with zipfile.ZipFile(io.BytesIO(archive.stdout)) as tree:
            tree.extractall(where)
        yield (Path(where) / "src").resolve()


def measured(
    source: Path, name: str, size: int | None, directory: Path
) -> dict[Key, tuple[float, str]]:
    """The figures of one benchmark, run on the sources in ``source``, and their units."""
    command = [sys.executable, "-m", "benchmarks", name, "--json", "--rounds", "1"]
    command += ["--dir", str(directory), *([] if size is None else ["--n", str(size)])]
    paths = os.pathsep.join(map(str, (source, _ROOT)))
    run = subprocess.run(
        command,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"{name} failed on {source}: {last}", file=sys.stderr)
        return {}
    figures: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    return {
        (each["benchmark"], each["figure"], each["n"]): (each["value"], each["unit"])
        for each in figures
    }


def table(pairs: dict[Key, list[Pair]]) -> str:
    """Rows as the documents want them; ``times`` above 1 is slower, or more memory."""
    rows = [
        "| figure | N | old | new | new takes, times old | pairs |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for (benchmark, figure, size), found in sorted(pairs.items()):
        old, new = (
            short(statistics.median(each)) for each in zip(*[p[:2] for p in found], strict=True)
        )
        times = sorted(each.times for each in found)
        spread = f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"
        unit = found[0].unit
        rows.append(
            f"| `{benchmark}` {figure} | {size:,} | {old} {unit} | {new} {unit} | {spread} "
            f"| {len(found)} |"
        )
    return "\n".join(rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="Two versions beside each other."
    )
    parser.add_argument("old", help="a revision, or a directory with a checkout")
    parser.add_argument("names", nargs="*", metavar="NAME[:N]", help=f"{' '.join(USUAL)} if none")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each figure")
    parser.add_argument("--dir", type=Path, default=DIRECTORY, help="a directory on a disk")
    options = parser.parse_args(arguments)
    named = []
    for each in options.names or [f"{name}:10000" for name in USUAL]:
        name, _, size = each.partition(":")
        if name not in NAMES or (size and not size.isdigit()):
            parser.error(f"{each} is none of {', '.join(NAMES)}, with or without :N")
        named.append((name, int(size) if size else None))
    options.names = named
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    options.dir = options.dir.resolve()
    return options


if __name__ == "__main__":
    main()

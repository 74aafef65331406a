"""``python -m benchmarks [NAME …] [--json] [--n N] [--rounds R] [--dir DIR]``: see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from benchmarks.figures import ROUNDS_DEFAULT, Figure
from benchmarks.world import World

#: In the order in which they run.
NAMES = (
    "local",
    "threads",
    "push",
    "pull",
    "incremental",
    "idle",
    "latency",
    "many",
    "workers",
    "noisy",
    "conflicts",
    "size",
    "stalled",
)
DIRECTORY = Path(".bench")


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    world = World(options.dir)
    try:
        for name in options.names or NAMES:
            for figure in run(name, world, options.n, options.rounds):
                print(figure.to_json(), flush=True)
                if not options.json:
                    print(figure, file=sys.stderr, flush=True)
    finally:
        world.close()


def run(name: str, world: World, n: list[int] | None, rounds: int) -> Iterator[Figure]:
    """The figures of one benchmark, of its usual sizes unless ``n`` names others."""
    module = import_module(f"benchmarks.{name}")
    yield from module.run(world, tuple(n) if n else module.SIZES, rounds)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="One JSON line per figure on standard output, a table on standard error.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="all if none")
    parser.add_argument("--json", action="store_true", help="JSON only, no table")
    parser.add_argument("--n", type=int, action="append", help="size; may be given several times")
    parser.add_argument("--rounds", type=int, default=ROUNDS_DEFAULT)
    parser.add_argument("--dir", type=Path, default=DIRECTORY, help="a directory on a disk")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"{name} is none of {', '.join(NAMES)}")
    if options.rounds < 1 or any(n < 1 for n in options.n or ()):
        parser.error("--n and --rounds are at least 1")
    return options


if __name__ == "__main__":
    main()

"""``python -m benchmarks [NAME …] [--json] [--n N] [--rounds R] [--store S] [--dir D]``: see the
package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.figures import ROUNDS_DEFAULT
from benchmarks.single import run
from benchmarks.world import World

#: In the order in which they run.
NAMES = (
    "local",
    "threads",
    "queries",
    "indexes",
    "push",
    "pull",
    "first",
    "incremental",
    "idle",
    "latency",
    "live",
    "many",
    "workers",
    "nodes",
    "beside",
    "noisy",
    "operations",
    "console",
    "conflicts",
    "size",
    "standing",
    "stalled",
)
#: Those that compare stores.
STORE_NAMES = ("push", "pull", "incremental", "latency", "many")
DIRECTORY = Path(".bench")


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    world = World(options.dir)
    figures = run
    try:
        if options.store == "postgres":
            from benchmarks import stores

            world.closing(stores.begin(world))
            figures = stores.run
        for name in options.names or (NAMES if options.store == "files" else STORE_NAMES):
            for figure in figures(name, world, options.n, options.rounds):
                print(figure.to_json(), flush=True)
                if not options.json:
                    print(figure, file=sys.stderr, flush=True)
    finally:
        world.close()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="One JSON line per figure on standard output, a table on standard error.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="all if none")
    parser.add_argument("--json", action="store_true", help="JSON only, no table")
    parser.add_argument("--n", type=int, action="append", help="size; may be given several times")
    parser.add_argument("--rounds", type=int, default=ROUNDS_DEFAULT)
    parser.add_argument(
        "--store",
        choices=("files", "postgres"),
        default="files",
        help="postgres: databases in a PostgreSQL of its own, beside files and beside raw "
        "PostgreSQL, in turns",
    )
    parser.add_argument("--dir", type=Path, default=DIRECTORY, help="a directory on a disk")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"{name} is none of {', '.join(NAMES)}")
        if options.store == "postgres" and name not in STORE_NAMES:
            parser.error(f"--store postgres is for {', '.join(STORE_NAMES)}")
    if options.rounds < 1 or any(n < 1 for n in options.n or ()):
        parser.error("--n and --rounds are at least 1")
    return options


if __name__ == "__main__":
    main()

"""``python -m tests.planted``: are the planted bugs still caught at the seeds that are remembered?

Those that are not are searched for from seed 0, and the seeds found are written. The exit code is 1
when a bug was not caught at all; with ``--check`` nothing is written, and it is 1 when a seed would
have been.
"""

from __future__ import annotations

import argparse
import sys

from tests.planted import BUGS
from tests.planted.remembered import FILE, find_all_again, remember, remembered


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default 1)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    seeds, moved, missed = remembered(), 0, 0
    gone = seeds.keys() - BUGS.keys()
    for finding, again in find_all_again(given.jobs):
        if again:
            continue
        if finding.invariant not in BUGS[finding.name].expected:
            missed += 1
            seeds.pop(finding.name, None)
            print(f"{finding.name}: not caught ({finding.invariant or 'nothing noticed'})")
            continue
        moved += 1
        before = seeds.get(finding.name, "none")
        seeds[finding.name] = finding.seeds - 1
        print(f"{finding.name}: seed {before} before, {finding.seeds - 1} now", flush=True)
        if not given.check:
            remember(seeds)  # at once, for a search that is interrupted
    print(f"planted={len(BUGS)} moved={moved} gone={len(gone)} missed={missed}")
    if given.check:
        return 1 if moved or gone or missed else 0
    remember(seeds)
    if moved or gone:
        print(f"written: {FILE.name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

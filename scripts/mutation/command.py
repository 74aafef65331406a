"""Arguments and printing of ``scripts/mutate``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .operators import Mutant
from .report import is_current, is_explained, score, tell
from .running import QUICK, SURVIVED, Result, read_results, run
from .settings import Settings, read_settings


def main(root: Path, arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    root = Path(given.root or root).resolve()
    settings = read_settings(Path(given.settings or root / "scripts" / "mutants.toml"), root)
    targets = settings.chosen(given.targets)
    everything = [mutant for target in targets for mutant in settings.mutants(target)]
    if given.list:
        for mutant in everything:
            print(f"{mutant.id} (line {mutant.line})\n    {mutant.change}")
        return 0
    out = Path(given.out).resolve()
    if not given.report:
        results = read_results(out)
        todo = [
            mutant
            for mutant in everything
            if given.only in mutant.id and _is_wanted(settings, mutant, results, given)
        ]
        if given.quick:
            settings = settings.quick()
        code = run(settings, todo, out, given.jobs, _Progress(len(todo))) if todo else 0
        if code:
            return code
    results = read_results(out)
    return tell(settings, [score(settings, target, results) for target in targets])


def _is_wanted(
    settings: Settings, mutant: Mutant, results: dict[str, Result], given: argparse.Namespace
) -> bool:
    result = results.get(mutant.id)
    if result is None or not is_current(mutant, result):
        return True
    if given.quick and is_explained(settings, mutant):
        return False
    half_tried = result.by == QUICK and not given.quick
    return result.outcome == SURVIVED and (given.again or half_tried)


class _Progress:
    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._survived = 0
        self._began = time.monotonic()

    def __call__(self, result: Result) -> None:
        self._done += 1
        if result.outcome == SURVIVED:
            self._survived += 1
            print(f"survived: {result.id} (line {result.line})\n    {result.change}", flush=True)
        if self._done % 50 == 0 or self._done == self._total:
            each = (time.monotonic() - self._began) / self._done
            print(
                f"{self._done} of {self._total}, {self._survived} survived, {each:.2f} s each",
                flush=True,
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=__doc__)
    parser.add_argument("targets", nargs="*", help="names from the settings (all if none)")
    parser.add_argument("--out", default="mutants.jsonl", help="file of results; resumed if there")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--quick", action="store_true", help="only the quick tests, no seeds")
    parser.add_argument("--again", action="store_true", help="try survivors again (new tests)")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants with TEXT in the id")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default 1)")
    parser.add_argument("--settings", metavar="FILE", help="default scripts/mutants.toml")
    parser.add_argument("--root", metavar="DIR", help="the checkout; default this one")
    return parser

"""Counting: which mutants were noticed, which were not, and which of those are explained."""

from __future__ import annotations

from dataclasses import dataclass, field

from .operators import Mutant
from .running import SURVIVED, Result
from .settings import Settings, Target


@dataclass
class Score:
    """What is known of the mutants of one target."""

    name: str
    mutants: int = 0
    killed: int = 0
    explained: int = 0
    seconds: float = 0.0
    survivors: list[Mutant] = field(default_factory=list)
    untried: list[Mutant] = field(default_factory=list)
    #: Explanations of mutants that a test notices all the same.
    needless: list[Mutant] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Killed, of all that a test could notice."""
        counted = self.mutants - self.explained
        return 100.0 * self.killed / counted if counted else 100.0


def is_current(mutant: Mutant, result: Result | None) -> bool:
    return result is not None and result.digest == mutant.digest and result.change == mutant.change


def is_explained(settings: Settings, mutant: Mutant) -> bool:
    explained = settings.explained.get(mutant.id)
    return explained is not None and explained.change == mutant.change


def score(settings: Settings, target: Target, results: dict[str, Result]) -> Score:
    found = Score(target.name)
    for mutant in settings.mutants(target):
        found.mutants += 1
        result = results.get(mutant.id)
        explained = is_explained(settings, mutant)
        if result is None or not is_current(mutant, result):
            found.untried.append(mutant)
            continue
        found.seconds += result.seconds
        if result.outcome != SURVIVED:
            found.killed += 1
            if explained:
                found.needless.append(mutant)
        elif explained:
            found.explained += 1
        else:
            found.survivors.append(mutant)
    return found


def stale(settings: Settings) -> list[str]:
    """Explanations that explain no mutant of today's code."""
    today = {
        mutant.id: mutant.change
        for target in settings.targets
        for mutant in settings.mutants(target)
    }
    return [name for name, given in settings.explained.items() if today.get(name) != given.change]


def tell(settings: Settings, scores: list[Score]) -> int:
    """Print the scores and what is left; the exit code is 1 if a survivor is not explained, an
    explanation fits nothing, or a mutant was not tried."""
    print("| target | mutants | killed | explained | left | score | seconds |")
    print("|---|---|---|---|---|---|---|")
    for found in scores:
        left = len(found.survivors) + len(found.untried)
        print(
            f"| {found.name} | {found.mutants} | {found.killed} | {found.explained} | {left} "
            f"| {found.percent:.1f} % | {found.seconds:.0f} |"
        )
    bad = False
    for found in scores:
        for mutant in found.survivors:
            bad = True
            print(f"survived: {_told(mutant)}")
        for mutant in found.needless:
            bad = True
            print(f"explained, but a test notices it: {_told(mutant)}")
        if found.untried:
            bad = True
            print(f"{found.name}: {len(found.untried)} mutants were not tried yet")
    for name in stale(settings):
        bad = True
        print(f"explains nothing any more: {name}")
    return 1 if bad else 0


def _told(mutant: Mutant) -> str:
    return f"{mutant.id} (line {mutant.line})\n    {mutant.change}"

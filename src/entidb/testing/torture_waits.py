"""What the longest commit of a torture of processes was made of.

Each process writes four times of each transaction into its ledger: when it asked for the turn, when
it had it, when its block was over, and when ``commit()`` returned. Beside the times of the others,
and beside what was stopped and killed meanwhile, they say for whom it waited.

Not here: the processes, and what must not be lost (``torture_openers``).
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

#: Nanoseconds that this thread was ready to run and had no core, if the system counts them.
_WAITED_FOR_A_CORE = Path("/proc/thread-self/schedstat")


def without_a_core() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_WAITED_FOR_A_CORE.read_text().split()[1])
    return 0


@dataclass(frozen=True)
class Span:
    """From when to when, on the clock of all processes."""

    began: float
    ended: float

    def within(self, other: Span) -> float:
        """Seconds of it that lie in ``other``."""
        return max(0.0, min(self.ended, other.ended) - max(self.began, other.began))


@dataclass(frozen=True)
class Commit:
    """One transaction, as its own process saw it."""

    process: int
    asked: float
    had_turn: float
    decided: float
    returned: float
    without_a_core_s: float

    @property
    def took_s(self) -> float:
        return self.returned - self.asked

    @property
    def waiting(self) -> Span:
        return Span(self.asked, self.had_turn)

    @property
    def holding(self) -> Span:
        return Span(self.had_turn, self.returned)


@dataclass
class Struck:
    """What was done to processes: each by its number."""

    stops: list[tuple[int, Span]] = field(default_factory=list)
    kills: list[tuple[int, float]] = field(default_factory=list)

    def stopped(self, process: int, span: Span) -> float:
        return sum(stop.within(span) for who, stop in self.stops if who == process)


class Stopwatch:
    """In a process: notes the times of one transaction after another."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._core = 0

    def start(self) -> None:
        self._core = without_a_core()
        self._times = [time.monotonic()]

    def lap(self) -> None:
        self._times.append(time.monotonic())

    def line(self, mark: str) -> str:
        """For the ledger: how long it took, and what it was made of."""
        times = " ".join(f"{each:.6f}" for each in self._times)
        core = (without_a_core() - self._core) / 1e9
        return f"{mark} {self._times[-1] - self._times[0]:.6f} {times} {core:.6f}\n"


def read_commit(process: int, line: str) -> Commit | None:
    """None of a line that says no times."""
    fields = line.split()[2:]
    return Commit(process, *map(float, fields)) if len(fields) == 5 else None


def explain(longest: Commit, commits: Iterable[Commit], struck: Struck) -> list[str]:
    """In lines, what ``longest`` was made of."""
    waiting = longest.waiting
    others = sorted(
        (each for each in commits if each is not longest and each.holding.within(waiting) > 0),
        key=lambda each: each.had_turn,
    )
    stopped_in_turn = sum(
        struck.stopped(each.process, Span(*_part(each.holding, waiting))) for each in others
    )
    held = sum(each.holding.within(waiting) for each in others) - stopped_in_turn
    dead, free = _gaps(waiting, others, struck)
    whole = Span(longest.asked, longest.returned)
    turns = {each.process: 0 for each in others}
    for each in others:
        turns[each.process] += 1
    return [
        f"process {longest.process} waited {_ms(waiting.ended - waiting.began)} for its turn, "
        f"decided for {_ms(longest.decided - longest.had_turn)}, and committed for "
        f"{_ms(longest.returned - longest.decided)}",
        f"while it waited: {len(others)} turns of {len(turns)} other processes, {_ms(held)}; of "
        f"one process at most {max(turns.values(), default=0)}",
        f"others were stopped in their turn for {_ms(stopped_in_turn)}, it itself for "
        f"{_ms(struck.stopped(longest.process, whole))}",
        f"the turn of one that was killed, until the next had it: {_ms(sum(dead))}, at most "
        f"{_ms(max(dead, default=0.0))}",
        f"nobody is known to have had the turn for {_ms(sum(free))}, in {len(free)} pauses",
        f"it was ready to run and had no core for {_ms(longest.without_a_core_s)}",
    ]


def after_a_death(commits: Sequence[Commit], struck: Struck) -> float:
    """The longest time from the death of a process until another one had the turn that waited
    already, or asked meanwhile, if nobody else had it in between; less what those that waited were
    stopped for."""
    longest = 0.0
    began = sorted(commits, key=lambda each: each.had_turn)
    turns = [each.had_turn for each in began]
    returned = list(accumulate((each.returned for each in began), max))
    for _, at in struck.kills:
        after = bisect_right(turns, at)
        if after and returned[after - 1] > at:
            continue  # another one had the turn
        if after < len(began):
            following = began[after]
            span = Span(max(at, following.asked), following.had_turn)
            stopped = struck.stopped(following.process, span)
            longest = max(longest, span.ended - span.began - stopped)
    return longest


def _gaps(
    waiting: Span, others: Sequence[Commit], struck: Struck
) -> tuple[list[float], list[float]]:
    """The times when none of those that live on had the turn: where somebody was killed in
    them, and the rest."""
    dead: list[float] = []
    free: list[float] = []
    at = waiting.began
    for until, following in [*((e.had_turn, e.returned) for e in others), (waiting.ended, at)]:
        if until > at:
            killed = any(at <= death <= until for _, death in struck.kills)
            (dead if killed else free).append(until - at)
        at = max(at, following)
    return dead, free


def _part(span: Span, of: Span) -> tuple[float, float]:
    return max(span.began, of.began), min(span.ended, of.ended)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


__all__ = ["Commit", "Span", "Stopwatch", "Struck", "after_a_death", "explain", "read_commit"]

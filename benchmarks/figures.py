"""Figures: rounds of measurements, their medians, and what they are compared with."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Medians of fewer rounds than this are not worth printing; the tests, which look at no timing,
#: ask for one.
ROUNDS_DEFAULT = 5


@dataclass(frozen=True)
class Target:
    """``of`` is ``"ratio"`` or ``"value"``; the bound is inclusive."""

    of: str
    least: float | None = None
    most: float | None = None

    def met(self, value: float, ratio: float | None) -> bool:
        measured = ratio if self.of == "ratio" else value
        assert measured is not None, "a target on a ratio needs a floor"
        return (self.least is None or measured >= self.least) and (
            self.most is None or measured <= self.most
        )

    def __str__(self) -> str:
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        return f"{bound} x floor" if self.of == "ratio" else bound


@dataclass(frozen=True)
class Figure:
    """One line of output. ``value`` is the median of ``rounds`` measurements, all of them in
    ``values``; ``floor`` the median of the floor's, measured in turn with them; ``ratio`` the
    median of the ratios of each round, which a machine that slows down for a while moves less
    than either. ``target`` and ``met`` are null where nothing is promised."""

    benchmark: str
    figure: str
    n: int
    unit: str
    value: float
    floor: float | None
    floor_is: str | None
    ratio: float | None
    target: str | None
    met: bool | None
    rounds: int
    values: list[float]
    floors: list[float]
    note: str

    def to_json(self) -> str:
        fields = {name: _rounded(value) for name, value in asdict(self).items()}
        return json.dumps(fields, ensure_ascii=False)

    def __str__(self) -> str:
        text = f"{self.benchmark:<12} {self.figure:<42} {self.n:>8}  {short(self.value):>9} "
        text += f"{self.unit:<15}"
        if self.ratio is not None and self.floor is not None:
            text += f" {self.ratio:>8.3f} x {short(self.floor):>9} ({self.floor_is})"
        if self.target is not None:
            text += f"  [{self.target}: {'met' if self.met else 'NOT met'}]"
        return text


def figure(
    benchmark: str,
    name: str,
    n: int,
    unit: str,
    values: Sequence[float],
    *,
    floors: Sequence[float] = (),
    floor_is: str | None = None,
    target: Target | None = None,
    note: str = "",
) -> Figure:
    """Medians of ``values`` and ``floors``, which belong together round by round."""
    assert values and (not floors or len(floors) == len(values))
    value = statistics.median(values)
    ratio = None
    if floors:
        ratio = statistics.median(v / f for v, f in zip(values, floors, strict=True))
    return Figure(
        benchmark=benchmark,
        figure=name,
        n=n,
        unit=unit,
        value=value,
        floor=statistics.median(floors) if floors else None,
        floor_is=floor_is,
        ratio=ratio,
        target=None if target is None else str(target),
        met=None if target is None else target.met(value, ratio),
        rounds=len(values),
        values=list(values),
        floors=list(floors),
        note=note,
    )


def timed(call: Callable[[], Any]) -> float:
    """Seconds that ``call`` takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that ``share`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value

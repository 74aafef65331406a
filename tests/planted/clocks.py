"""Planted bugs: the logical clock, on both sides."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from entidb.protocol import PushResult
from entidb.server import decide
from entidb.sync.apply import applier, clock, settle
from entidb.sync.apply.rebase import Rebase
from tests.planted.garden import CALM, Garden, bug

_TIMES: Final = CALM | {"clock_offset_ms": 315_576_000_000}


@bug("clamp-forgotten-on-the-server", "CLOCK", knobs=_TIMES)
def _clamp_forgotten_on_server(garden: Garden) -> None:
    """A timestamp ten years ahead is stored as it came, and wins for ever."""

    def make(original: Any) -> Any:
        def accept(self: Any, *rest: Any) -> PushResult:
            self._timestamp_max = 2**63
            result: PushResult = original(self, *rest)
            return result

        return accept

    garden.replace(decide.Deciding, "_accept", make)


@bug("clamp-forgotten-on-the-device", "CLOCK", knobs=_TIMES)
def _clamp_forgotten_on_device(garden: Garden) -> None:
    """Policies see the time of a clock that is ahead."""
    garden.replace(Rebase, "_clamp", lambda original: lambda self, timestamp: timestamp)


@bug("clamped-time-not-taken-over", "CLOCK", knobs=_TIMES)
def _clamped_not_taken(garden: Garden) -> None:
    """A device keeps its own time for what the server stored with another."""

    def make(original: Any) -> Any:
        def accepted(self: Any, *rest: Any) -> None:
            original(self, *rest[:-1], replace(rest[-1], timestamp=0))

        return accepted

    garden.replace(settle.Settling, "_accepted", make)


@bug("clock-stays-ahead", "CLOCK", knobs=_TIMES)
def _clock_stays_ahead(garden: Garden) -> None:
    """A device that was in the future once writes from there until that has come."""
    for module in (applier, clock):
        garden.replace(module, "lower_idle_clock", lambda original: lambda writer, latest: None)


@bug("clock-not-heard", "CLOCK", knobs=_TIMES)
def _clock_not_heard(garden: Garden) -> None:
    """A slow device writes with times before those it has seen, and loses to its own past."""
    garden.replace(applier, "hear_clock", lambda original: lambda *rest: None)

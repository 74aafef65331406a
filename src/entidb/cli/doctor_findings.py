"""What the doctor says of one thing that it has looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check came out. The words are stable."""

    OK = "ok"
    #: It works, and will not for ever, or not for everybody.
    WARNING = "warning"
    #: Devices are stopped by it, or what is secret is not.
    PROBLEM = "problem"
    #: It was not tried; the finding says what would be needed.
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """``change`` says what to change, where there is something to change."""

    check: str
    state: State
    says: str
    change: str | None = None


def ok(check: str, says: str) -> Finding:
    return Finding(check, State.OK, says)


def warning(check: str, says: str, change: str) -> Finding:
    return Finding(check, State.WARNING, says, change)


def problem(check: str, says: str, change: str) -> Finding:
    return Finding(check, State.PROBLEM, says, change)


def skipped(check: str, says: str) -> Finding:
    return Finding(check, State.SKIPPED, says)

"""Devices of all databases in a few numbers, believed for some seconds: reading them takes a file
for each database, and every page that watches asks for them every two seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct, field

_BELIEVED_S: Final = 5.0


#: Commits by which devices may be behind, for each number of ``ServerSummary.lag`` but the last.
LAGS: Final = (0, 10, 1000)


def _nobody() -> list[int]:
    return [0] * (len(LAGS) + 1)


class ServerSummary(Struct):
    """Of some databases; ``behind``: devices that were not given all commits; ``lag``: devices
    that are behind by nothing, by up to 10 commits, by up to 1,000, and by more."""

    databases: int = 0
    devices: int = 0
    behind: int = 0
    revoked: int = 0
    lag: list[int] = field(default_factory=_nobody)


class Summaries:
    """By database. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: Mapping[str, ServerSummary] = {}
        self._at: float | None = None

    def total(
        self,
        now: float,
        read: Callable[[], Mapping[str, ServerSummary]],
        sees: Callable[[str], bool],
    ) -> ServerSummary:
        """Of the databases that ``sees`` says yes to, as ``read`` found them; ``now`` in seconds of
        a clock that only goes forward."""
        with self._lock:
            if self._at is None or now - self._at >= _BELIEVED_S:
                self._known, self._at = read(), now
            known = self._known
        total = ServerSummary()
        for name, each in known.items():
            if sees(name):
                total.databases += 1
                total.devices += each.devices
                total.behind += each.behind
                total.revoked += each.revoked
                total.lag = [one + more for one, more in zip(total.lag, each.lag, strict=True)]
        return total

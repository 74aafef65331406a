"""How many requests one subject may send, and one database may be sent, in a second.

Each has a bucket that fills evenly and holds two seconds' worth: who syncs now and then never
notices, and who floods is told when to come again. Buckets that are full say nothing and are
forgotten. In one process: several processes of a server each count for themselves.
"""

from __future__ import annotations

import threading
from typing import Final

from entidb.errors import ServerBusyError
from entidb.server.config import ServerConfig
from entidb.types import Clock

#: Seconds for which a bucket that is full lasts.
BURST_S: Final = 2.0
#: What a bucket holds at least: a sync is a few requests at once.
BURST_MIN: Final = 10.0
#: Buckets at once; when there are more, those that have been filling for longest go.
_BUCKETS_MAX: Final = 10_000


class Bucket:
    """Requests that may still be sent, as of ``at``."""

    __slots__ = ("at", "left")

    def __init__(self, left: float, at: float) -> None:
        self.left = left
        self.at = at


class Rate:
    """Buckets by name, for ``per_s`` requests in a second."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._most = max(BURST_MIN, per_s * BURST_S)
        #: Those used last are last.
        self._buckets: dict[str, Bucket] = {}

    def missing_s(self, name: str, now: float) -> float:
        """Seconds until ``name`` may send a request; 0: now, and it is counted."""
        bucket = self._buckets.pop(name, None) or Bucket(self._most, now)
        self._buckets[name] = bucket
        bucket.left = min(self._most, bucket.left + (now - bucket.at) * self._per_s)
        bucket.at = now
        if len(self._buckets) > _BUCKETS_MAX:
            del self._buckets[next(iter(self._buckets))]
        if bucket.left < 1:
            return (1 - bucket.left) / self._per_s
        bucket.left -= 1
        return 0.0


class Quotas:
    """Thread-safe."""

    def __init__(self, config: ServerConfig, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        rates = (
            ("subject", config.subject_requests_per_s),
            ("database", config.database_requests_per_s),
        )
        self._rates = [(what, Rate(per_s)) for what, per_s in rates if per_s]

    def take(self, subject: str, db_id: str) -> None:
        """Count one request. Raises ``ServerBusyError`` (rate_limited), with the time to wait."""
        names = {"subject": subject, "database": db_id}
        with self._lock:
            now = self._clock.monotonic()
            for what, rate in self._rates:
                seconds = rate.missing_s(names[what], now)
                if seconds:
                    raise ServerBusyError(
                        f"too many requests of this {what}: come again later",
                        code="rate_limited",
                        retry_after=seconds,
                    )


def quotas_of(config: ServerConfig, clock: Clock) -> Quotas | None:
    """None where there is nothing to count, which then costs nothing."""
    if config.subject_requests_per_s or config.database_requests_per_s:
        return Quotas(config, clock)
    return None

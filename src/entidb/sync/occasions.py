"""What asks for the next sync of a background engine, and when that is due.

Knows neither threads nor a network: ``background`` waits by it, and the simulator does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from entidb.errors import (
    CommitUnknownError,
    DatabaseLockedError,
    EntiDBError,
    StorageError,
    StorageFullError,
    StorageUnreachableError,
    TlsError,
)
from entidb.sync.config import RetryConfig

_PASSING: Final = (
    *(CommitUnknownError, DatabaseLockedError, StorageFullError, StorageUnreachableError),
    TlsError,
)
#: Seconds. What fails at once is not tried again at once, whatever the settings and chance say.
_LEAST_S: Final = 0.05
#: The login page of a network redirects, with a status that means "for good"; a database is busy
#: while another thread writes; a token is about to be written where it is read from.
_PASSING_CODES: Final = ("redirected", "busy", "unauthorized")


def may_pass(error: EntiDBError) -> bool:
    """Whether the same sync may work in a minute, with nothing changed here but time. The login
    page of a network shows a certificate of its own, and so does a clock that starts in 1970 make
    every certificate "not yet valid"; disks get room again, and fail for once."""
    if error.retryable or isinstance(error, _PASSING) or type(error) is StorageError:
        return True  # other subclasses of it say what is wrong for good
    return error.code in _PASSING_CODES


class Occasions:
    """Of one engine. ``now`` is a monotonic clock's. ``call``, ``commit`` and ``hear`` may be
    called from any thread, and from a signal handler."""

    def __init__(self, retry: RetryConfig, draw: Callable[[], float]) -> None:
        self._retry = retry
        self._draw = draw
        #: A sync was asked for, or the run is to end.
        self.called = False
        #: Something was committed; the newest commit that the server has named, and whether a pull
        #: is due whatever that is.
        self._committed = self._unheard = False
        self._named = 0
        #: The newest sync was due, and failed by what passes.
        self._missed = False
        #: The same three, of what the sync under way was begun for.
        self._begun_for = (False, False, 0)
        #: Syncs that failed, one after the other, and when what was committed or named may start
        #: the next.
        self._failures = 0
        self._held_until = -math.inf
        #: When the next is due by itself.
        self._until = -math.inf

    def call(self) -> None:
        """A sync is due now."""
        self.called = True

    def commit(self) -> None:
        """Something waits to be pushed."""
        self._committed = True

    def hear(self, head: int, first: bool) -> None:
        """The server has commit ``head``. After a silence (``first``) a pull is due anyway: what
        was said meanwhile was not heard."""
        # A name that comes late takes nothing back.
        self._named = max(self._named, head)
        self._unheard |= first

    def begin(self) -> None:
        """A sync begins. What comes from here on is for the next one: the pull may be over by
        then."""
        self._begun_for = self._committed, self._unheard, self._named
        self.called = self._committed = self._unheard = self._missed = False
        self._named = 0

    def worked(self, *, more: bool) -> None:
        """The sync worked; ``more``: there is something to push again."""
        self._committed |= more
        self._failures, self._held_until = 0, -math.inf

    def failed(
        self, now: float, *, passes: bool, patient: bool = True, retry_after: float | None = None
    ) -> None:
        """The sync failed. For a while nothing that is committed or named starts another; where the
        trouble ``passes``, the next is due then, whatever this one was for, and not before the
        ``retry_after`` seconds for which the server has asked. One that was not ``patient`` has
        tried once only, and the next one follows like its second attempt."""
        self._failures += patient
        tried = self._retry.attempts_max + self._failures if patient else 1
        drawn = self._retry.delay_s(tried, self._draw(), retry_after=retry_after)
        delay = max(drawn, _LEAST_S)
        self._held_until = now + delay if passes else math.inf
        self._missed = passes
        if passes:
            committed, unheard, named = self._begun_for
            self._committed |= committed
            self.hear(named, unheard)

    @property
    def failing(self) -> bool:
        """Whether the newest sync failed."""
        return self._failures > 0

    def wait(self, now: float, pause_s: float) -> None:
        """Where nothing else asks for one, the next is due ``pause_s`` from now."""
        self._until = now + pause_s

    def left_s(self, now: float, reached: Callable[[], int]) -> tuple[float, bool]:
        """Seconds until the next sync is due, none of them positive if it is due now; and whether
        a commit is why, which may be one of a burst. ``reached`` is asked up to which server commit
        this device has everything."""
        if self.called:
            return 0.0, False
        news = self._unheard or (self._named > 0 and self._named > reached())
        asked = self._committed or news or self._missed
        sooner = asked and self._held_until < self._until
        due = self._held_until if sooner else self._until
        return due - now, sooner and self._committed


__all__ = ["Occasions", "may_pass"]

"""The listeners of a cycle's states and progress, and whether the cycle is inside one of them
now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from entidb.db.listeners import add_listener, report_bug
from entidb.errors import EntiDBError
from entidb.sync.apply.report import Withdrawn
from entidb.sync.attempts import Attempts
from entidb.sync.conflict import Conflict
from entidb.sync.state import SyncCycleResult, SyncProgress, SyncState

StateListener = Callable[[SyncState, SyncState], None]
ProgressListener = Callable[[SyncProgress], None]
ResultListener = Callable[[SyncCycleResult], None]
ConflictListener = Callable[[Conflict], None]
RejectedListener = Callable[[Withdrawn], None]


class Listeners:
    """The listeners of one engine."""

    def __init__(self) -> None:
        self.state: list[StateListener] = []
        self.progress: list[ProgressListener] = []
        self.result: list[ResultListener] = []
        self.conflict: list[ConflictListener] = []
        self.rejected: list[RejectedListener] = []
        #: Not 0 while the cycle's thread is inside a listener of the program: another number for
        #: each call.
        self.inside = 0
        self._told = 0

    def tell(self, listeners: Sequence[Callable[..., None]], *what: Any) -> None:
        """Call them one after the other. What one raises reaches the caller."""
        try:
            for listener in list(listeners):
                self._told += 1
                self.inside = self._told
                listener(*what)
        finally:
            self.inside = 0

    def tell_ended(
        self, result: SyncCycleResult | None, attempts: Sequence[SyncCycleResult]
    ) -> None:
        """Report one sync that has ended: what every attempt has left to a person or had refused,
        and of its result, if it worked. Call it outside all locks."""
        for attempt in attempts:
            for conflict in attempt.unresolved:
                self._tell_each(self.conflict, conflict)
            for withdrawn in attempt.withdrawn:
                self._tell_each(self.rejected, withdrawn)
        if result is not None:
            self._tell_each(self.result, result)

    def _tell_each(self, listeners: Sequence[Callable[..., None]], what: Any) -> None:
        """As ``tell``, but what one raises is reported, and the next is called."""
        for listener in list(listeners):
            try:
                self.tell([listener], what)
            except Exception as error:
                report_bug(error, listener)


class Listening:
    """The part of an engine that reports its cycles to the program."""

    _listeners: Listeners
    _attempts: Attempts

    @property
    def newest_error(self) -> EntiDBError | None:
        """What ``status()`` tells of it; None where the newest sync worked."""
        return self._attempts.last_error

    def on_state(self, listener: StateListener) -> Callable[[], None]:
        """Call ``listener(old, new)`` at every state change, in the thread that syncs; returns a
        function that ends it. What a listener raises ends the cycle.

        A listener may call ``cancel``, ``stop``, ``close`` and ``wake``; they return at once, and
        the cycle ends at its next step. Raises ``ConfigError`` for what cannot be called, and for
        an ``async def``, which would only be called and never awaited."""
        return add_listener(self._listeners.state, listener, "on_state", "the old", "the new state")

    def on_progress(self, listener: ProgressListener) -> Callable[[], None]:
        """Call ``listener(SyncProgress)`` after every page and batch; as ``on_state``."""
        return add_listener(self._listeners.progress, listener, "on_progress", "the progress")

    def on_result(self, listener: ResultListener) -> Callable[[], None]:
        """Call ``listener(SyncCycleResult)`` after every sync that worked; returns a function that
        ends it.

        As ``on_conflict`` and ``on_rejected`` it is called in the thread that synced, when the
        cycle is over and holds no lock: a listener may sync, resolve, stop and close. What one
        raises goes to ``sys.unraisablehook``, ends nothing, and the others are called."""
        return add_listener(self._listeners.result, listener, "on_result", "the result")

    def on_conflict(self, listener: ConflictListener) -> Callable[[], None]:
        """Call ``listener(Conflict)`` for every conflict that a sync has left to a person, also
        one that failed in the end; as ``on_result``."""
        return add_listener(self._listeners.conflict, listener, "on_conflict", "the conflict")

    def on_rejected(self, listener: RejectedListener) -> Callable[[], None]:
        """Call ``listener(Withdrawn)`` for every transaction that a sync has withdrawn (R4), also
        one that failed in the end; as ``on_result``."""
        return add_listener(self._listeners.rejected, listener, "on_rejected", "what was withdrawn")

"""What one ``sync()`` does: a cycle, and another one after each failure that may pass.

Like the cycle it is a generator without I/O, so that the engines and the simulator run the same
one. How long to wait is ``RetryConfig``'s to say, and what is worth another try ``retryable``'s.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Final

from entidb.errors import EntiDBError, SyncCancelledError, SyncError
from entidb.protocol import PushResult
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.config import SyncConfig
from entidb.sync.cycle import Cycle
from entidb.sync.drive import Courier, Course, Pause
from entidb.sync.exchange import Connection, Then
from entidb.sync.refusal import kept_back_error
from entidb.sync.state import SyncCycleResult, SyncProgress, SyncState, SyncStats
from entidb.types import Clock

#: Bounded parts of replaced tables removed after a cycle; the rest waits for the next one.
TIDY_STEPS: Final = 50
#: Batches whose verdicts are remembered.
ANSWERS_MAX: Final = 64
#: After these the next cycle shakes hands again.
_FORGETTING: Final = (
    "history_changed",
    "version_mismatch",
    "invalid_message",
    "subject_changed",
)


class Attempts:
    """The attempts of one engine, one ``sync()`` after the other. ``enter``, ``progress`` and
    ``check`` are as a cycle's; ``cancelled`` says whether the present ``sync()`` was."""

    def __init__(
        self,
        applier: DatabaseApplier,
        config: SyncConfig,
        courier: Courier,
        clock: Clock,
        random_source: random.Random,
        *,
        enter: Callable[[SyncState], None],
        progress: Callable[[SyncProgress], None],
        check: Callable[[], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.connection = Connection(fetches=courier.fetches)
        self.stats = SyncStats()
        self.last_success_ms: int | None = None
        self.last_error: EntiDBError | None = None
        self.tidy_steps = TIDY_STEPS
        #: Whether there may be room that the outbox held: an engine before this one may have
        #: pushed. A cycle that pushes nothing gives it back.
        self._has_room = True
        #: What each attempt of the newest ``sync()`` did, the last one included.
        self.results: list[SyncCycleResult] = []
        #: The newest verdicts.
        self.answers: deque[tuple[list[int], list[PushResult]]] = deque(maxlen=ANSWERS_MAX)
        #: The newest cycle: in progress, or over.
        self.cycle: Cycle | None = None
        self._applier = applier
        self._config = config
        self._courier = courier
        self._clock = clock
        self._random = random_source
        self._enter = enter
        self._progress = progress
        self._check = check
        self._cancelled = cancelled

    def run(self, then: Then | None = None, *, patient: bool = True) -> Course:
        """One ``sync()``; ``then`` belongs to each cycle that worked; not ``patient``: it has one
        attempt. Returns the result of the
        attempt that worked; raises the error of the last one, or ``SyncCancelledError``."""
        began = self._clock.monotonic()
        attempt = 1
        self.results = []
        while True:
            try:
                cycle = self._begin()
                try:
                    result = yield from cycle.run()
                    if then is not None:
                        yield from then.run(cycle.exchange)
                except BaseException as error:
                    self._forget(error)
                    raise
                for _ in range(self.tidy_steps):
                    if not self._applier.tidy():
                        break
                if result.pushed:
                    self._has_room = True
                elif self._has_room:
                    self._has_room = self._applier.give_back()
            except SyncCancelledError:
                self._enter(SyncState.IDLE)
                raise
            except EntiDBError as error:
                if isinstance(error, SyncError) and self._cancelled():
                    # Whatever a request that was cut off says of it.
                    self._enter(SyncState.IDLE)
                    raise SyncCancelledError("cancelled; sync again to go on from here") from error
                self.stats.failures += 1
                self.last_error = error
                most = self._config.retry.attempts_max if patient else 1
                if not error.retryable or attempt >= most:
                    self._enter(SyncState.ERROR)
                    raise
                yield self._pause(attempt, error)
                if self._cancelled():
                    self._enter(SyncState.IDLE)
                    raise SyncCancelledError("cancelled while waiting to try again") from None
                attempt += 1
                continue
            result.attempts = attempt
            result.duration_s = self._clock.monotonic() - began
            self.stats.add(result)
            self.last_success_ms = self._clock.now_ms()
            kept = result.kept_back
            # The cycle has done all it could, and the application learns what it could not.
            self.last_error = kept_back_error(kept) if kept else None
            return result

    def _pause(self, attempt: int, error: EntiDBError) -> Pause:
        self._enter(SyncState.RETRY_WAIT)
        self.stats.retries += 1
        retry, drawn = self._config.retry, self._random.random()
        retry_after = error.retry_after if isinstance(error, SyncError) else None
        delay = retry.delay_s(attempt, drawn, retry_after=retry_after)
        return Pause(delay, min(retry_after or 0.0, retry.retry_after_max_s))

    def _begin(self) -> Cycle:
        if not self._courier.begin():
            self.connection.forget()
        self.cycle = Cycle(
            self._applier,
            self._config,
            self.connection,
            enter=self._enter,
            progress=self._progress,
            check=self._check,
            answers=self.answers,
        )
        self.results.append(self.cycle.result)
        return self.cycle

    def _forget(self, error: BaseException) -> None:
        """What a cycle that failed had begun, or believed."""
        self._courier.forget_ahead()
        if isinstance(error, SyncError) and error.code in _FORGETTING:
            self.connection.forget()


__all__ = ["TIDY_STEPS", "Attempts"]

"""The blocking engine: drives cycles over a transport, retries, tells listeners, runs in the
background. What a cycle does is ``cycle``'s; when to try again is ``RetryConfig``'s.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from entidb.db import Database, DiscardedTransaction, OverruledValue
from entidb.errors import (
    ConfigError,
    DatabaseClosedError,
    EntiDBError,
    SyncCancelledError,
    SyncError,
    SyncStateError,
)
from entidb.protocol import SyncResponse
from entidb.sync.applier import DatabaseApplier
from entidb.sync.config import SyncConfig
from entidb.sync.cycle import Ahead, Connection, Cycle
from entidb.sync.http import HttpTransport
from entidb.sync.policies import Conflict, ConflictResolution
from entidb.sync.rebase import RebaseReport
from entidb.sync.refusal import kept_back_error
from entidb.sync.state import (
    SyncCycleResult,
    SyncProgress,
    SyncState,
    SyncStats,
    SyncStatus,
    check_move,
)
from entidb.sync.transport import SyncTransport
from entidb.types import Clock, SystemClock

#: Bounded parts of replaced tables removed after a cycle; the rest waits for the next one.
TIDY_STEPS = 50

StateListener = Callable[[SyncState, SyncState], None]
ProgressListener = Callable[[SyncProgress], None]


class SyncEngine:
    """Keeps one device database in step with a server.

    ``applier`` is a ``DatabaseApplier``, or a ``Database`` to have one made from ``config``.
    ``transport`` is a ``SyncTransport``, or a URL to have an ``HttpTransport`` made, with
    ``token`` being the token or what provides one. The engine owns the transport.

    ``sync()`` runs one cycle and returns what it did; ``start()`` keeps doing that in the
    background. All methods may be called from any thread; one cycle runs at a time.

    Raises ``DatabaseLockedError`` if the database has another engine, ``ConfigError``.
    """

    def __init__(
        self,
        config: SyncConfig,
        transport: SyncTransport | str,
        applier: DatabaseApplier | Database,
        *,
        token: str | Callable[[bool], str] | None = None,
        clock: Clock | None = None,
        random_source: random.Random | None = None,
    ) -> None:
        if isinstance(applier, Database):
            applier = DatabaseApplier(
                applier,
                default_policy=config.default_policy,
                policies=config.policies,
                overruled_max=config.overruled_max,
                overruled_days=config.overruled_days,
            )
        self.config = config
        self.applier = applier
        self.database = applier.database
        self.database.attach_engine(self)
        try:
            if config.collections is not None:
                self.database.set_scope(config.collections)
            self.transport: SyncTransport = (
                HttpTransport(transport, token=token, config=config)
                if isinstance(transport, str)
                else transport
            )
        except BaseException:
            self.database.detach_engine(self)
            raise
        self.stats = SyncStats()
        self._clock: Clock = clock or SystemClock()
        self._random = random_source or random.Random()
        self._connection = Connection()
        self._state = SyncState.IDLE
        self._cycle_lock = threading.Lock()
        self._cancel = threading.Event()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._state_listeners: list[StateListener] = []
        self._progress_listeners: list[ProgressListener] = []
        self._last_success_ms: int | None = None
        self._last_error: EntiDBError | None = None
        self._next_try_at: float | None = None
        self._closed = False

    # ------------------------------------------------------------ cycles

    def sync(self) -> SyncCycleResult:
        """Run one cycle: settle, pull, push; try again on errors that may pass, as the retry
        settings say. Returns what was done.

        Raises ``SyncError`` subclasses, ``SyncCancelledError`` after ``cancel()``, and
        ``SyncStateError`` if a cycle is running in another thread. Whatever it raises, nothing
        pending is lost and the next call goes on from there (R9).
        """
        if self._closed:
            raise DatabaseClosedError("this sync engine is closed; make another one")
        if not self._cycle_lock.acquire(blocking=False):
            raise SyncStateError("a sync cycle is running already; wait for it or cancel() it")
        try:
            self._cancel.clear()
            return self._sync_with_retries()
        finally:
            self._next_try_at = None
            self._cycle_lock.release()

    def cancel(self) -> None:
        """Make a running cycle end at its next step with ``SyncCancelledError``; if none runs,
        nothing happens."""
        self._cancel.set()

    def _sync_with_retries(self) -> SyncCycleResult:
        began = self._clock.monotonic()
        attempt = 1
        while True:
            try:
                result = self._one_cycle()
            except SyncCancelledError:
                self._enter(SyncState.IDLE)
                raise
            except EntiDBError as error:
                self._failed(error)
                if not error.retryable or attempt >= self.config.retry.attempts_max:
                    self._enter(SyncState.ERROR)
                    raise
                self._wait(attempt, error)
                attempt += 1
                continue
            except BaseException:
                # Not ours, such as a listener's own bug; the listeners are not asked about it.
                self._state = SyncState.ERROR
                raise
            result.attempts = attempt
            result.duration_s = self._clock.monotonic() - began
            self.stats.add(result)
            self._last_success_ms = self._clock.now_ms()
            kept = result.kept_back
            # The cycle has done all it could, and somebody has to hear of what it could not.
            self._last_error = kept_back_error(kept) if kept else None
            return result

    def _one_cycle(self) -> SyncCycleResult:
        self.transport.forget_ahead()
        if not self.transport.connected:
            self._connection.forget()
        cycle = Cycle(
            self.applier,
            self.config,
            self._connection,
            enter=self._enter,
            progress=self._tell_progress,
            check=self._check_cancelled,
        )
        try:
            result = self._drive(cycle)
        except SyncError as error:
            self.transport.forget_ahead()
            if error.code in ("history_changed", "version_mismatch", "invalid_message"):
                self._connection.forget()
            raise
        except BaseException:
            self.transport.forget_ahead()
            raise
        for _ in range(TIDY_STEPS):
            if not self.applier.tidy():
                break
        return result

    def _drive(self, cycle: Cycle) -> SyncCycleResult:
        """Do the I/O a cycle asks for: the whole of what a driver is."""
        flow = cycle.run()
        response: SyncResponse | None = None
        error: SyncError | None = None
        while True:
            try:
                step = flow.throw(error) if error is not None else flow.send(response)
            except StopIteration as end:
                result: SyncCycleResult = end.value
                return result
            response, error = None, None
            try:
                if isinstance(step, Ahead):
                    self.transport.send_ahead(step.request)
                else:
                    response = self.transport.send(step)
            except SyncError as failed:
                error = failed

    def _wait(self, attempt: int, error: EntiDBError) -> None:
        self._enter(SyncState.RETRY_WAIT)
        self.stats.retries += 1
        retry_after = error.retry_after if isinstance(error, SyncError) else None
        delay = self.config.retry.delay_s(attempt, self._random.random(), retry_after=retry_after)
        self._next_try_at = self._clock.monotonic() + delay
        cancelled = self._clock.wait(self._cancel, delay)
        self._next_try_at = None
        if cancelled:
            self._enter(SyncState.IDLE)
            raise SyncCancelledError("cancelled while waiting to try again")

    def _failed(self, error: EntiDBError) -> None:
        self.stats.failures += 1
        self._last_error = error

    def note_error(self, error: EntiDBError) -> None:
        """Show ``error`` in ``status()``: for whoever runs cycles in the background."""
        self._last_error = error

    def _check_cancelled(self) -> None:
        if self._cancel.is_set():
            raise SyncCancelledError("cancelled; sync again to go on from here")

    # ------------------------------------------------------------ state and listeners

    @property
    def state(self) -> SyncState:
        return self._state

    def _enter(self, state: SyncState) -> None:
        old = self._state
        if state is old:
            return
        check_move(old, state)
        self._state = state
        for listener in list(self._state_listeners):
            listener(old, state)

    def _tell_progress(self, progress: SyncProgress) -> None:
        for listener in list(self._progress_listeners):
            listener(progress)

    def on_state(self, listener: StateListener) -> Callable[[], None]:
        """Call ``listener(old, new)`` at every state change, in the thread that syncs; returns a
        function that ends it. What a listener raises ends the cycle."""
        self._state_listeners.append(listener)
        return lambda: self._state_listeners.remove(listener)

    def on_progress(self, listener: ProgressListener) -> Callable[[], None]:
        """Call ``listener(SyncProgress)`` after every page and batch; as ``on_state``."""
        self._progress_listeners.append(listener)
        return lambda: self._progress_listeners.remove(listener)

    def status(self) -> SyncStatus:
        """What is waiting, what went wrong, what comes next."""
        head = self.database.read_head()
        state = self.applier.state()
        error, at = self._last_error, self._next_try_at
        return SyncStatus(
            state=self._state,
            pending=head.ready,
            held=head.held,
            conflicts=head.conflicts,
            discarded=head.discarded,
            cursor=state.reached,
            db_id=state.db_id,
            history=None if state.history is None else state.history.hex(),
            last_success_ms=self._last_success_ms,
            last_error=None if error is None else str(error),
            last_error_code=None if error is None else error.code,
            next_retry_s=None if at is None else max(0.0, at - self._clock.monotonic()),
            overruled=self.applier.overruled_count(),
        )

    # ------------------------------------------------------------ conflicts, discarded, reset

    def conflicts(self) -> list[Conflict]:
        """Conflicts that wait for a person (R25, R26)."""
        return self.applier.conflicts()

    def resolve(
        self, conflict: Conflict, choice: str | ConflictResolution | None = None, **value: Any
    ) -> RebaseReport:
        """Decide an open conflict: ``"mine"``, ``"theirs"``, ``value=…`` (None deletes), or a
        ``ConflictResolution``. The next cycle pushes what waited. Raises ``ConflictError``."""
        return self.applier.resolve(conflict, resolution_of(choice, **value))

    def discarded(self) -> list[DiscardedTransaction]:
        """Withdrawn transactions (R4), oldest first."""
        return self.applier.discarded()

    def overruled(self) -> list[OverruledValue]:
        """Values that a policy or a person decided against, field by field, whoever wrote them
        (R4), oldest first. Kept as ``overruled_max`` and ``overruled_days`` say."""
        return self.applier.overruled()

    def recommit(self, discarded: DiscardedTransaction | OverruledValue) -> int:
        """Commit a discarded transaction again on the present state, or write an overruled value
        back to its field; returns the commit's sequence. Raises ``ConflictError``."""
        return self.applier.recommit(discarded)

    def prune(self, discarded: DiscardedTransaction | OverruledValue) -> bool:
        """Forget a discarded transaction, or an overruled value, for good."""
        return self.applier.prune(discarded)

    def reset(self, keep: str) -> None:
        """After ``HistoryChangedError``: choose ``"server"`` or ``"device"`` (R29), then sync."""
        with self._cycle_lock:
            self.applier.reset(keep)
            self._connection.forget()

    # ------------------------------------------------------------ background

    def start(self) -> None:
        """Sync now, and then every ``interval_s`` seconds, in a background thread, until
        ``stop()``. Errors do not end it: they show in ``status()`` and are tried again at the
        next turn."""
        if self._thread is not None:
            raise SyncStateError("this engine runs in the background already")
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="entidb-sync", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let the background thread sync now instead of at its next turn."""
        self._wake.set()

    def stop(self) -> None:
        """End background running, cancelling a cycle in progress; returns when it has ended."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        self._cancel.set()
        self._wake.set()
        thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self.sync()
            except EntiDBError as error:
                # Kept for status(); a background engine goes on at its next turn (R9).
                if not isinstance(error, SyncCancelledError):
                    self.note_error(error)
            except Exception as error:
                # A listener's bug, or ours: syncing goes on, and somebody has to hear of it.
                self.note_error(SyncError(f"the cycle failed: {error!r}"))
                told = (type(error), error, error.__traceback__, threading.current_thread())
                threading.excepthook(threading.ExceptHookArgs(told))
            if self._stop.is_set():
                return
            self._clock.wait(self._wake, self.config.interval_s)

    def close(self) -> None:
        """Stop, close the transport, and let another engine have the database. Idempotent."""
        if self._closed:
            return
        # Closing the transport first ends a request that is under way.
        self.cancel()
        self.transport.close()
        self.stop()
        with self._cycle_lock:
            self._closed = True
            self.database.detach_engine(self)

    def __enter__(self) -> SyncEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def resolution_of(
    choice: str | ConflictResolution | None = None, **value: Any
) -> ConflictResolution:
    """What ``resolve`` accepts, as a ``ConflictResolution``. Raises ``ConfigError``."""
    if isinstance(choice, ConflictResolution):
        return choice
    if choice is None and set(value) == {"value"}:
        return ConflictResolution.merge(value["value"])
    if not value and choice in ("mine", "keep_local"):
        return ConflictResolution.keep_local()
    if not value and choice in ("theirs", "accept_remote"):
        return ConflictResolution.accept_remote()
    raise ConfigError('resolve with "mine", "theirs", or value=…; see docs/conflicts.md')


__all__ = ["SyncEngine", "resolution_of"]

"""The blocking engine: drives cycles over a transport, calls listeners, runs in the background.
What a cycle does is ``cycle``'s, the I/O it asks for ``drive``'s, when it is tried again
``attempts``'.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections import deque
from collections.abc import Callable

from entidb.db import Database
from entidb.errors import (
    LOCKED_OUT,
    DatabaseClosedError,
    EntiDBError,
    SyncCancelledError,
    SyncError,
    SyncStateError,
)
from entidb.events import SafeEvent, Thread
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.attempts import Attempts
from entidb.sync.background import Background, joined
from entidb.sync.comparing import Verifying
from entidb.sync.config import SyncConfig
from entidb.sync.decisions import Decisions
from entidb.sync.drive import Courier, Course, Drive, Driver, Pause
from entidb.sync.exchange import Then
from entidb.sync.fates import Waiting, trim
from entidb.sync.hearing import HearsNews
from entidb.sync.http import HttpTransport
from entidb.sync.listening import Listeners, Listening
from entidb.sync.live import LiveState
from entidb.sync.others import Others
from entidb.sync.parts import applier_of, check_parts
from entidb.sync.standing import EntityStatus, entity_status
from entidb.sync.state import SyncCycleResult, SyncProgress, SyncState, SyncStatus, check_move
from entidb.sync.transport import SyncTransport
from entidb.sync.turnover import Turnover
from entidb.types import Clock, Uncopied, check_clock

#: Seconds until a background engine whose device was revoked asks again by itself (R32).
REVOKED_PAUSE_S = 3600.0

#: How long ``stop`` waits for a cycle, in turns. What takes longer is a commit of minutes, or a
#: cycle that waits for the caller in a way that nothing can detect.
_END_TURN_S = 0.02
_END_TURNS_MAX = 1500
#: For how many of them the same listener has to be seen until it is not waited for any more.
_INSIDE_TURNS = 3


class SyncEngine(Uncopied, Decisions, Verifying, Listening, HearsNews, Turnover, Waiting):
    """Keeps one device database in step with a server.

    ``applier`` is a ``DatabaseApplier``, or a ``Database`` to have one made from ``config``.
    ``transport`` is a ``SyncTransport``, or a URL to have an ``HttpTransport`` made, with
    ``token`` being the token or what provides one. The engine owns the transport. ``clock`` and
    ``random_source`` are for tests.

    ``sync()`` runs one cycle and returns what it did; ``start()`` keeps doing that in the
    background. All methods may be called from any thread; one cycle runs at a time.

    Raises ``DatabaseLockedError`` if the database has another engine, ``ConfigError``.
    """

    plumbing = frozenset(
        (
            *("applier", "asks_pages", "cancel_cycle", "course", "cycle_thread", "has_page"),
            *("newest_error", "news_source", "note_bug", "note_error", "page_came", "pause_s"),
            *("reached", "run_cycle", "run_until", "transport", "wait_accepted", "wait_synced"),
        )
    )

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
        check_parts(config, transport, applier)
        if isinstance(applier, Database):
            applier = applier_of(applier, config)
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
        self._clock: Clock = check_clock(clock)
        self._others = Others(self.database, self._clock)
        self._state = SyncState.IDLE
        self._cycle_lock = threading.Lock()
        #: Of the cycle in progress; both under ``_running_lock``, re-entrant for signal handlers.
        self._cancel: threading.Event = SafeEvent()
        self._cycle_thread: int | None = None
        self._running_lock = threading.RLock()
        self._background = Background(self, self._clock)
        #: Syncs that have ended and were not reported yet.
        self._ended: deque[tuple[SyncCycleResult | None, list[SyncCycleResult]]] = deque()
        #: Set at the end of each sync, for those who wait for one.
        self._waiting: list[threading.Event] = []
        #: Ends a wait between two attempts: set by ``cancel`` and ``wake``.
        self._nudge = SafeEvent()
        #: The run in the background, which one thread begins at a time, and what ends it.
        self._run_of: dict[None, tuple[threading.Thread, threading.Event]] = {}
        self._ending: threading.Thread | None = None
        self._listeners = Listeners()
        self._courier = self._make_courier()
        self._attempts = Attempts(
            applier,
            config,
            self._courier,
            self._clock,
            random_source or random.Random(),
            enter=self._enter,
            progress=self._tell_progress,
            check=self._check_cancelled,
            cancelled=lambda: self._cancel.is_set(),
        )
        self.stats = self._attempts.stats
        self._answers = self._attempts.answers
        self._next_try_at: float | None = None
        self._closed = False
        self._detached = False

    def _make_courier(self) -> Courier:
        return Driver(self.transport, self._check_cancelled, self._pause)

    # ------------------------------------------------------------ cycles

    def sync(self) -> SyncCycleResult:
        """Run one cycle: settle, pull, push; try again on errors that may pass, as the retry
        settings say. Returns what was done.

        Raises ``SyncError`` subclasses, ``SyncCancelledError`` after ``cancel()``, and
        ``SyncStateError`` if a cycle is running in another thread. Whatever it raises, nothing
        pending is lost and the next call goes on from there (R9).
        """
        return self.run_cycle(SafeEvent())

    def run_cycle(
        self,
        cancelled: threading.Event,
        stopped: threading.Event | None = None,
        then: Then | None = None,
        *,
        patient: bool = True,
    ) -> SyncCycleResult:
        """As ``sync``, with the event that ``cancel_cycle`` takes: one that is set already, or
        ``stopped``, ends the cycle before it begins; ``then`` is done at its end; not ``patient``:
        what fails is not tried again."""
        result: SyncCycleResult | None = None
        course = self.course(cancelled, stopped, then, patient=patient)
        try:
            result = Drive(course, self._courier).go_on()
        finally:
            # Ctrl-C between two steps leaves it half-way, and a traceback would keep it so.
            course.close()
            if self._ended:
                self._tell_ended()
        assert result is not None, "what waits for a transport has the answer when it returns"
        return result

    def course(
        self,
        cancelled: threading.Event,
        stopped: threading.Event | None = None,
        then: Then | None = None,
        *,
        patient: bool = True,
    ) -> Course:
        """What ``run_cycle`` drives, for a driver that is no transport. No other begins before
        its end, or before it is closed."""
        self._check_not_closed()
        if self._cycle_lock.locked():
            raise SyncStateError("a sync cycle is running already; wait for it or cancel() it")
        result: SyncCycleResult | None = None
        try:
            with self._cycle_lock:  # acquire() and release() leave gaps for Ctrl-C
                try:
                    with self._running_lock:
                        if stopped is not None and stopped.is_set():
                            cancelled.set()
                        self._cancel = cancelled
                        self._cycle_thread = threading.get_ident()
                    yield from self._others.enter(self._check_cancelled, self._nudge)
                    result = yield from self._attempts.run(then, patient=patient)
                    return result
                except EntiDBError:
                    raise  # the state says what became of it
                except BaseException:
                    # Not ours, such as a listener's own bug; the listeners are not asked about it.
                    self._state = SyncState.ERROR
                    raise
                finally:
                    try:
                        self._put_away(result)
                    except BaseException:
                        self._put_away(None)  # Ctrl-C; what is given back twice does no harm
                        raise
        finally:
            if result is not None and result.pushed:
                trim(self._answers)
            self._tell_waiting()
            if self._closed:  # from a listener or an observer of this cycle
                self._detach()

    def _put_away(self, result: SyncCycleResult | None) -> None:
        self._next_try_at = None
        with self._running_lock:
            self._cycle_thread = None
        self._others.leave()
        listeners = self._listeners
        if listeners.result or listeners.conflict or listeners.rejected:
            self._ended.append((result, self._attempts.results))

    def _tell_waiting(self) -> None:
        for event in list(self._waiting):
            event.set()

    def _tell_ended(self) -> None:
        """Outside of all locks: a listener may sync, stop and close."""
        while self._ended:
            try:
                result, attempts = self._ended.popleft()
            except IndexError:  # another thread, whose sync has ended at the same time
                return
            self._listeners.tell_ended(result, attempts)

    def cancel(self) -> None:
        """Make a running cycle end at its next step with ``SyncCancelledError``; if none runs,
        nothing happens. Returns at once. A request that is under way ends within 100 ms, however
        silent the network is, and its connection is closed. From any thread, a listener, an
        observer or a signal handler."""
        with self._running_lock:
            if self._cycle_thread is not None:
                self.cancel_cycle(self._cancel)

    def cancel_cycle(self, cancelled: threading.Event) -> None:
        """Cancel the one cycle that ``run_cycle`` was given ``cancelled`` for, also before it
        begins."""
        with self._running_lock:
            cancelled.set()
            if self._cycle_thread is None or self._cancel is not cancelled:
                return
            self._nudge.set()
            self._courier.interrupt()

    def _check_not_closed(self) -> None:
        if self._closed:
            raise DatabaseClosedError("this sync engine is closed; make another one")

    def _pause(self, pause: Pause) -> None:
        """Until woken or cancelled; what the server asked for is waited for also when woken."""
        began = self._clock.monotonic()
        self._next_try_at = began + pause.seconds
        if not self._cancel.is_set():
            self._clock.wait(self._nudge, pause.seconds)
            left = began + pause.asked_for_s - self._clock.monotonic()
            if left > 0 and self._nudge.is_set() and not self._cancel.is_set():
                self._next_try_at = began + pause.asked_for_s
                self._clock.wait(self._cancel, left)
        self._next_try_at = None
        if not self._cancel.is_set():
            self._background.begun()

    def note_error(self, error: EntiDBError) -> None:
        """Show ``error`` in ``status()``: for code that runs cycles in the background."""
        self._attempts.last_error = error

    def _check_cancelled(self) -> None:
        if self._cancel.is_set():
            raise SyncCancelledError("cancelled; sync again to go on from here")

    # ------------------------------------------------------------ state and listeners

    @property
    def state(self) -> SyncState:
        """Where it is in a cycle; or that it stands by for another process."""
        waits = self._background.standing_by and self._cycle_thread is None
        return SyncState.STANDBY if waits else self._state

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def cycle_thread(self) -> int | None:
        """The thread whose cycle is in progress."""
        return self._cycle_thread

    def _enter(self, state: SyncState) -> None:
        old = self._state
        if state is old:
            return
        check_move(old, state)
        if state is SyncState.RETRY_WAIT:
            self._nudge.clear()  # before listeners hear of the wait, who may wake it
        self._state = state
        if self._listeners.state:
            self._listeners.tell(self._listeners.state, old, state)

    def _tell_progress(self, progress: SyncProgress) -> None:
        if self._listeners.progress:
            self._listeners.tell(self._listeners.progress, progress)

    def status(self) -> SyncStatus:
        """What is waiting, what went wrong, what comes next."""
        head = self.database.read_head()
        state = self.applier.state()
        error, at = self._attempts.last_error, self._next_try_at or self._background.next_at
        channel = self._background.channel
        return SyncStatus(
            state=self.state,
            pending=head.ready,
            held=head.held,
            conflicts=head.conflicts,
            discarded=head.discarded,
            cursor=state.reached,
            db_id=state.db_id,
            history=None if state.history is None else state.history.hex(),
            last_success_ms=self._attempts.last_success_ms,
            last_error=None if error is None else str(error),
            last_error_code=None if error is None else error.code,
            next_retry_s=None if at is None else max(0.0, at - self._clock.monotonic()),
            overruled=self.applier.overruled_count(),
            live=LiveState.OFFLINE.value if channel is None else channel.state.value,
            live_since_ms=None if channel is None else channel.since_ms,
            heard_ms=self._background.heard_ms,
            subject=state.subject,
            others=self.applier.others() if state.others else {},
        )

    def entity_status(self, collection: str, entity_id: uuid.UUID) -> EntityStatus:
        """How an entity stands with the server, and why: reads the outbox, so it is for a person
        who asks, and not for every row of a list."""
        return entity_status(self.applier, self.status(), collection, entity_id)

    def explain(self, collection: str, entity_id: uuid.UUID) -> str:
        """``entity_status`` in words."""
        return self.entity_status(collection, entity_id).explain()

    # ------------------------------------------------------------ background

    def start(self) -> None:
        """Sync in a background thread until ``stop()``: now, at every local commit (those of a
        burst after its first go together), on news, when woken, and every ``interval_s`` seconds.

        Errors do not end it: they show in ``status()``. What may pass is tried again when the
        backoff allows, and so are bugs of listeners, observers and policies, which also go to
        ``threading.excepthook``. What trying again does not help waits for the next turn, an hour
        where this device was revoked (R32); commits start no cycle until then.
        Raises ``DatabaseClosedError`` on a closed engine."""
        self._check_not_closed()
        stop = SafeEvent()
        run = Thread(None, self._run, "entidb-sync", (stop, self._ending), daemon=True), stop
        try:
            if self._run_of.setdefault(None, run) is not run:
                raise SyncStateError("this engine runs in the background already")
            self._background.starting = stop  # before it begins: a listener may stop it
            run[0].start()
        except BaseException as error:
            stop.set()  # where an interrupt came, it may begin yet
            self._leave(run)
            if not isinstance(error, RuntimeError):
                raise
            raise SyncStateError(f"no thread could be started to sync: {error}") from error

    def wake(self) -> None:
        """Let the background thread sync now, or try again now where it waits to try again, but
        never before the time a server asked for (``Retry-After``)."""
        self._background.wake()
        self._nudge.set()

    def stop(self) -> None:
        """End background running, cancelling a cycle in progress; returns when it has ended, which
        takes no longer than a commit that is under way, however silent the network is.

        What would have to wait for itself does not wait: called by the cycle's own thread (a
        listener, an observer) or inside a transaction it returns at once, and where the cycle is
        inside a listener or an observer, within 100 ms. The cycle ends at its next step, without
        another request. From any thread, and from a signal handler."""
        if (run := self._run_of.get(None)) is None:
            return
        here = threading.get_ident()
        inside = here == self._cycle_thread or self._background.syncs_on(here)
        self._end_run()  # first: interrupted, it is to be stopped yet
        self._leave(run)
        if not inside:
            self._wait_for(lambda seconds: joined(run[0], seconds), run[0].ident)

    def _leave(self, run: tuple[threading.Thread, threading.Event]) -> None:
        if self._run_of.get(None) is run:
            self._ending, self._background.starting = run[0], None
            self._run_of.clear()

    def _end_run(self) -> None:
        for _, stop in list(self._run_of.values()):
            stop.set()
        self.cancel()
        self._background.wake()

    def _wait_for(self, ended: Callable[[float], bool], cycle_thread: int | None) -> bool:
        """Wait for the cycle's thread; whether it has ended."""
        if self.database.in_transaction:
            return ended(0)  # it may be what the cycle waits for
        before, alike = 0, 0
        for _ in range(_END_TURNS_MAX):
            if ended(_END_TURN_S):
                return True
            syncs = self._cycle_thread or cycle_thread
            inside = self._listeners.inside or -self.database.tells_observers(syncs)
            alike = alike + 1 if inside and inside == before else 0
            before = inside
            if alike == _INSIDE_TURNS:
                return False
        return False

    def _run(self, stopped: threading.Event, before: threading.Thread | None) -> None:
        while before is not None and before.is_alive() and not stopped.is_set():
            before.join(_END_TURN_S)  # started again by a listener of its own last cycle
        self._background.run(stopped)
        self._tell_waiting()

    def run_until(self, stopped: threading.Event) -> None:
        """What ``start`` does, on this thread, until ``stopped`` is set, and ``cancel`` and
        ``wake`` are called after it. Raises ``SyncStateError`` if it runs already."""
        self._check_not_closed()
        if self._background.is_running:
            raise SyncStateError("this engine runs in the background already")
        self._background.run(stopped)
        self._tell_waiting()

    def pause_s(self) -> float:
        """Seconds between this turn in the background and the next."""
        error = self._attempts.last_error
        locked_out = error is not None and error.code in LOCKED_OUT
        return max(self.config.interval_s, REVOKED_PAUSE_S if locked_out else 0.0)

    def note_bug(self, error: BaseException) -> None:
        """Show what is not an error of ours in ``status()``, and pass it to
        ``threading.excepthook``: a listener's bug, or ours. Syncing goes on, and the bug must not
        stay unseen."""
        self.note_error(SyncError(f"the cycle failed: {error!r}"))
        told = (type(error), error, error.__traceback__, threading.current_thread())
        threading.excepthook(threading.ExceptHookArgs(told))

    def close(self) -> None:
        """Stop, close the transport, and let another engine have the database. Idempotent.

        Waits as ``stop`` does. Where it does not wait for a cycle in progress, that cycle lets go
        of the database when it has ended."""
        if self._detached:
            return
        self._closed = True
        thread = self._cycle_thread
        self._end_run()
        self.transport.close()
        self.stop()
        if thread != threading.get_ident() and self._wait_for(self._is_idle, thread):
            self._detach()

    def _is_idle(self, seconds: float) -> bool:
        idle = self._cycle_lock.acquire(timeout=seconds)
        if idle:
            self._cycle_lock.release()
        return idle

    def _detach(self) -> None:
        with self._running_lock:
            if not self._detached:
                self._detached = True
                self.database.detach_engine(self)

    def __enter__(self) -> SyncEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


__all__ = ["SyncEngine"]

"""When a background engine syncs: at once, after every local commit, when the server has something
new, when it is woken, and every ``interval_s`` as a safety net.

One loop for both engines; it runs on a thread of its own. A page that comes with news while the
loop rests is taken by the thread that hears of it, which saves a hand-over. A burst of commits is
two pushes, of the first and of the others. While the server cannot be reached, the next cycle comes
when a backoff allows it, and after an error that trying again does not help, on the interval, or
after ``wake``.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from entidb.db import Database
from entidb.errors import EntiDBError, SyncCancelledError, SyncStateError
from entidb.events import SafeEvent
from entidb.protocol import PullRequest
from entidb.storage.base import StoreTurn
from entidb.sync.carried import CarriedPage
from entidb.sync.config import SyncConfig
from entidb.sync.live import Channel, NewsSource
from entidb.sync.occasions import Occasions, may_pass
from entidb.sync.state import SyncCycleResult
from entidb.types import Clock

_log = logging.getLogger("entidb.sync")

#: Seconds that a burst of commits may pause and still be one. An engine that has rested for so long
#: lets the next commit leave at once: whoever writes one thing waits for nothing, and the others of
#: a burst are gathered while the first is on its way.
BURST_S: Final = 0.005
#: Between two looks at whether the engine of another process has ended.
STANDBY_S: Final = 0.25
#: How many times that is waited for: a program that writes without a pause is pushed meanwhile.
_BURST_TURNS: Final = 10


class BackgroundEngine(Protocol):
    """What the loop needs of an engine."""

    database: Database
    config: SyncConfig

    @property
    def closed(self) -> bool: ...

    @property
    def cycle_thread(self) -> int | None: ...

    def run_cycle(
        self,
        cancelled: threading.Event,
        stopped: threading.Event | None = None,
        *,
        patient: bool = True,
    ) -> SyncCycleResult: ...

    def pause_s(self) -> float: ...

    def note_error(self, error: EntiDBError) -> None: ...

    def note_bug(self, error: BaseException) -> None: ...

    def news_source(self) -> NewsSource | None: ...

    def asks_pages(self) -> PullRequest | None: ...

    def page_came(self, page: CarriedPage | None) -> None: ...

    @property
    def has_page(self) -> bool: ...

    @property
    def reached(self) -> int: ...


class Background:
    """The turns of one engine. ``run`` takes them, on one thread at a time; the other methods may
    be called from any thread, and from a signal handler."""

    def __init__(
        self, engine: BackgroundEngine, clock: Clock, draw: Callable[[], float] = random.random
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._draw = draw
        self._event = SafeEvent()
        self._occasions = Occasions(engine.config.retry, draw)
        #: Learns what the server has, while this runs and the server offers news.
        self.channel: Channel | None = None
        #: When the server last named a commit, in milliseconds since 1970; None: it did not yet.
        self.heard_ms: int | None = None
        #: Held while one of the threads syncs; and what ends the run, while there is one.
        self._busy = threading.Lock()
        self._stopped: threading.Event | None = None
        #: The thread that ``run`` is on; None while it is not. And what ends the run of the thread
        #: that is about to call it: one that is ending must not take that away.
        self.thread: int | None = None
        self.starting: threading.Event | None = None
        #: Whether another process does what this is there for.
        self.standing_by = False
        #: After a failure: when the next turn is due, by the monotonic clock.
        self.next_at: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether cycles come by themselves: from the start of the thread on, not only from its
        first step."""
        return self.starting is not None or self.thread is not None

    def syncs_on(self, thread: int) -> bool:
        """Whether cycles come by themselves on ``thread``."""
        channel = self.channel
        return thread == self.thread or (channel is not None and channel.thread == thread)

    def wake(self) -> None:
        """A cycle is due now, and so is the next try to hear of news."""
        self._occasions.call()
        self._event.set()
        if self.channel is not None:
            self.channel.nudge()

    def begun(self) -> None:
        """What was asked for until now begins."""
        self._occasions.called = False

    def committed(self, sequence: int) -> None:
        """Something else than a cycle has committed: the database calls it after each commit."""
        if threading.get_ident() != self._engine.cycle_thread:
            self._occasions.commit()
            self._event.set()

    def heard(self, head: int, first: bool) -> None:
        """The server has commit ``head``; see ``Occasions.hear``."""
        self.heard_ms = self._clock.now_ms()
        self._occasions.hear(head, first)
        if first or not self._engine.has_page or not self._take_page():
            self._event.set()

    def _take_page(self) -> bool:
        """Sync on this thread, if the loop rests and nothing but news asks for it; whether that
        was done, and has left nothing to the loop."""
        stopped = self._stopped
        if stopped is None or not self._busy.acquire(blocking=False):
            return False
        try:
            left, commits = self._left_s()
            if left > 0 or commits or self._occasions.called or stopped.is_set():
                return False
            return self._sync(stopped, patient=False) and self._left_s()[0] > 0
        except EntiDBError:
            return False  # as of a database that was closed; the loop finds it, too
        finally:
            self._busy.release()

    def run(self, stopped: threading.Event) -> None:
        """Sync again and again, until ``stopped``, which has to be followed by ``wake``. Raises
        nothing."""
        if stopped.is_set():
            return
        database = self._engine.database
        right = database.right("background")
        self.thread = threading.get_ident()
        if self.starting is stopped:
            self.starting = None
        self._stopped = stopped
        try:
            if not self._stand_by(right, stopped):
                return
            database.on_commit = self.committed
            while not stopped.is_set():
                with self._busy:
                    self._sync(stopped)
                if stopped.is_set() or self._engine.closed:
                    return
                self._hear()
                self._wait(stopped)
        finally:
            self._stopped = None
            self.thread = None
            self.standing_by = False
            database.marks_commits = False
            database.on_commit = None
            right.give_back()
            channel, self.channel = self.channel, None
            if channel is not None:
                channel.stop()
            with self._busy:
                pass  # nothing syncs any more

    def _stand_by(self, right: StoreTurn, stopped: threading.Event) -> bool:
        """Wait while the engine of another process runs in the background; whether to run now."""
        while not stopped.is_set() and not self._engine.closed:
            try:
                if right.take(0):
                    self.standing_by = False
                    return True
            except EntiDBError as error:  # as of a disk; the next look may work
                self._engine.note_error(error)
            self.standing_by = True
            self._event.clear()
            if not stopped.is_set():
                self._clock.wait(self._event, STANDBY_S)
        return False

    def _hear(self) -> None:
        """Hear of what other processes commit, and of news. What fails is tried again at the next
        turn, and until then the interval does."""
        try:
            self._engine.database.start_hearing()
            self._listen()
        except EntiDBError as error:
            self._engine.note_error(error)
        except RuntimeError as error:
            _log.warning("there is no thread to hear of other processes or of news: %s", error)
        except Exception as error:
            self._engine.note_bug(error)

    def _listen(self) -> None:
        """Begin to listen for news, as soon as the server has said that it offers them."""
        if self.channel is not None and self.channel.ended:
            channel, self.channel = self.channel, None
            channel.stop()
        if self.channel is None:
            source = self._engine.news_source()
            if source is not None:
                engine = self._engine
                channel = Channel(
                    source,
                    self._clock,
                    self._draw,
                    news=self.heard,
                    asks=engine.asks_pages,
                    page=engine.page_came,
                )
                try:
                    channel.start()
                except BaseException:
                    channel.stop()
                    raise
                self.channel = channel

    def _sync(self, stopped: threading.Event, *, patient: bool = True) -> bool:
        """Whether it worked. ``patient``: what fails may be tried again here, after a pause."""
        engine = self._engine
        self._occasions.begin()
        try:
            result = engine.run_cycle(SafeEvent(), stopped, patient=patient)
            done = not (result.incomplete or result.kept_back)
            # Of an observer or a listener, which the cycle's own thread has called.
            more = result.changed and done and engine.database.read_head().ready > 0
            self._occasions.worked(more=more)
            # What is committed from here on leaves at once.
            engine.database.marks_commits = True
            if self.channel is not None:
                self.channel.nudge(worked=True)
            return True
        except SyncCancelledError:
            pass  # asked for; the state shows it
        except SyncStateError as error:
            # Another thread syncs by hand; what is committed meanwhile waits for no interval.
            engine.note_error(error)
            self._hold(True, patient=False)
        except EntiDBError as error:
            # Kept for status(); a background engine goes on at its next turn (R9).
            engine.note_error(error)
            self._hold(may_pass(error), patient, getattr(error, "retry_after", None))
        except BaseException as error:
            # Of a listener or a policy that asks something which was away, for one.
            engine.note_bug(error)
            self._hold(True)
        return False

    def _hold(self, passes: bool, patient: bool = True, retry_after: float | None = None) -> None:
        """After a failure, commits start no cycle for a while."""
        self._engine.database.marks_commits = False
        self._occasions.failed(
            self._clock.monotonic(), passes=passes, patient=patient, retry_after=retry_after
        )

    def _wait(self, stopped: threading.Event) -> None:
        """Until the next turn."""
        began = self._clock.monotonic()
        self._occasions.wait(began, self._engine.pause_s())
        while True:
            self._event.clear()
            left, burst = self._left_s()
            if self._occasions.failing:
                self.next_at = self._clock.monotonic() + max(left, 0.0)
            if left <= 0 or not self._clock.wait(self._event, left):
                break
        self.next_at = None
        if burst and self._clock.monotonic() - began < BURST_S:
            self._wait_for_burst(stopped)

    def _left_s(self) -> tuple[float, bool]:
        """See ``Occasions``."""
        return self._occasions.left_s(self._clock.monotonic(), self._reached)

    def _reached(self) -> int:
        try:
            return self._engine.reached
        except EntiDBError:
            return -1  # the sync that is due then meets the same, and says so

    def _wait_for_burst(self, stopped: threading.Event) -> None:
        database = self._engine.database
        for _ in range(_BURST_TURNS):
            mark = database.commit_mark
            if self._clock.wait(stopped, BURST_S) or database.commit_mark == mark:
                return


def joined(thread: threading.Thread, seconds: float) -> bool:
    """Whether ``thread`` has ended, or ends within ``seconds``. One that is about to be started,
    by another thread or below a signal handler, does nothing when it begins: it was told to end."""
    with suppress(RuntimeError):  # it has not begun
        thread.join(seconds)
    return not thread.is_alive()


__all__ = ["BURST_S", "Background", "joined"]

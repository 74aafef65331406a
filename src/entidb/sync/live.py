"""The channel of hints, from the device's side: a stream where that works, a poll that waits where
it does not, and nothing at all where neither does; then the interval of the engine is what is left.

    Policy ──▶ ChannelCourse ── step ────────────▶ Channel: a thread and a NewsSource
                             ◀─ outcome or error ─

``Policy`` decides what to do next; ``ChannelCourse`` makes of what comes what is told, and asks for
the next step. Neither knows a network or a thread, so that the simulator runs the same two. A hint
says that there is something to pull; a page that comes with it is taken by the next cycle, or not
at all (``carried``). Everything that is lost here is found by the next cycle.
"""

from __future__ import annotations

import contextvars
import logging
import re
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Protocol

from entidb.errors import LOCKED_OUT, SyncCancelledError, SyncError
from entidb.events import SafeEvent, Thread
from entidb.protocol import PullRequest
from entidb.sync.carried import CarriedPage, page_in
from entidb.types import SEQUENCE_MAX, Clock

_log = logging.getLogger("entidb.sync")

#: Seconds to the first event of a stream. A server sends it at once, so what is late is held up
#: by something on the way that gathers answers.
FIRST_EVENT_S: Final = 5.0
#: Seconds without a sign of life after which a stream is given up; a server shows one every 15.
SILENCE_S: Final = 40.0
#: Seconds for which polls take the place of streams that are held up.
POLL_INSTEAD_S: Final = 600.0
#: Seconds until the next try after the first failure, twice as many after each further one.
_WAIT_S: Final = 1.0
_WAIT_MAX_S: Final = 60.0
#: Seconds until a server is asked again that has refused to say anything.
_REFUSED_S: Final = 300.0
#: And one that has locked this device out (R32).
_REVOKED_S: Final = 3600.0
#: Seconds. A longer time that a server names counts as this, as everywhere (``RetryConfig``).
_ASKED_MAX_S: Final = 3600.0
#: Seconds between two polls; and one without news that was answered sooner did not wait for them.
_BETWEEN_POLLS_S: Final = 0.05
_WAITED_S: Final = 2.0
#: A stream that lived for so long has worked.
_WORKED_S: Final = 10.0
#: ``str.isdigit`` is true of more than what ``int`` takes.
_NUMBER: Final = re.compile("[0-9]{1,20}")
#: Seconds that ``stop`` waits for the thread; where it looks up a name, it is left to itself.
_JOIN_S: Final = 0.1


class LiveState(StrEnum):
    """How a device learns that there is something new."""

    #: A stream is open: at once.
    LIVE = "live"
    #: A request waits for news: at once, or with the next one.
    POLLING = "polling"
    #: Not at all: with the next cycle of the interval.
    OFFLINE = "offline"


@dataclass(frozen=True)
class Event:
    """One event of a stream: ``name`` is ``head``, ``page`` or ``bye``, or one of a newer
    server."""

    name: str
    data: str
    #: Milliseconds before which not to come again, if it says so.
    retry_ms: int | None = None


class HeldUpError(Exception):
    """The server has the question, and the first event did not come in time."""


class Events(Protocol):
    """An open stream."""

    def next(self) -> Event | None:
        """The next event, or None for a sign of life; waits for it. Raises ``EOFError`` at the
        end, a ``SyncError`` where the connection is lost or silent, and ``HeldUpError``."""

    def close(self) -> None: ...


class NewsSource(Protocol):
    """What a transport has that can wait for news."""

    def open(
        self,
        *,
        first_event_s: float,
        silence_s: float,
        refresh: bool,
        asks: PullRequest | None = None,
    ) -> Events:
        """A stream. ``refresh`` asks for a fresh token; ``asks`` for pages, and is given only
        where there is something to ask for. Raises ``SyncError`` and ``HeldUpError``."""

    def poll(self, known: int | None, *, refresh: bool) -> int:
        """The newest commit, as soon as it is beyond ``known`` (None: at once), or after a while.
        Raises ``SyncError``."""

    def interrupt(self) -> None:
        """End what is under way, and what begins after this, with ``SyncCancelledError``."""

    def close(self) -> None: ...


# ---------------------------------------------------------------- what to do next


@dataclass(frozen=True)
class OpenStream:
    """Open a stream; ``asks`` is what its pages are to answer, if it is to bring any."""

    refresh: bool
    asks: PullRequest | None = None


@dataclass(frozen=True)
class Ask:
    """Send a request that waits for what is beyond commit ``known`` (None: for nothing)."""

    refresh: bool
    known: int | None = None


@dataclass(frozen=True)
class Wait:
    """Do nothing for so many seconds."""

    seconds: float


class Policy:
    """What to do next, from what has happened. Times are those of a monotonic clock; ``draw`` is
    a random number from 0 to 1, so that a fleet does not come back at once."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw
        self.state = LiveState.OFFLINE
        self._failures = 0
        self._not_before = 0.0
        #: Before which a server has asked not to be asked again.
        self._asked_until = 0.0
        #: It has said that this device may not listen, which its next cycle may find otherwise.
        self._shut_out = False
        self._poll_until = 0.0
        self._refresh = False
        self._refreshed = False

    def next(self, now: float) -> OpenStream | Ask | Wait:
        if now < self._not_before:
            return Wait(self._not_before - now)
        refresh, self._refresh = self._refresh, False
        return Ask(refresh) if now < self._poll_until else OpenStream(refresh)

    # ---- what has happened

    def nudged(self, *, worked: bool) -> None:
        """Somebody wants it tried now; or a cycle has ``worked``, which counts where this was
        refused for who asks. A server is not asked before the time that it named."""
        if not worked or self._shut_out:
            self._not_before = min(self._not_before, self._asked_until)
            self._shut_out = False

    def opened(self) -> None:
        """The first event of a stream is here."""
        self.state = LiveState.LIVE
        self._refreshed = self._shut_out = False

    def answered(self, now: float, *, idle: bool = False) -> None:
        """A request that waited was answered; ``idle``: at once, and with no news, as by something
        on the way that answers for the server, or drops what was asked."""
        self.state = LiveState.POLLING
        self._shut_out = False
        self._refreshed = False
        pause_s = min(_WAIT_S * 2.0**self._failures, _WAIT_MAX_S) if idle else _BETWEEN_POLLS_S
        self._not_before = now + pause_s
        self._failures = min(self._failures + 1, 30) if idle else 0

    def held_up(self, now: float) -> None:
        """A stream was begun, and its first event did not come: something gathers answers."""
        self._poll_until = now + POLL_INSTEAD_S
        self.state = LiveState.OFFLINE

    def said_goodbye(self, now: float, event: Event, lived_s: float) -> None:
        """A stream ended as it should."""
        self.state = LiveState.OFFLINE
        self._refresh = event.data == "token"
        if lived_s >= _WORKED_S:
            self._failures = 0
        if event.retry_ms:
            # The server has spread these; a little more for those it cut in the middle.
            asked_s = min(event.retry_ms / 1000, _ASKED_MAX_S) + self._draw()
            self._asked_until = self._not_before = now + asked_s
        elif lived_s < _WORKED_S:
            self._again(now)

    def failed(self, now: float, error: Exception, lived_s: float = 0.0) -> None:
        """A stream or a request ended otherwise, or never began."""
        self.state = LiveState.OFFLINE
        if lived_s >= _WORKED_S:
            self._failures = 0
        retry_after = getattr(error, "retry_after", None)
        code = getattr(error, "code", "")
        if code == "unauthorized" and not self._refreshed:
            # Once: a token provider that has nothing better is not asked in a loop.
            self._refresh = self._refreshed = True
            return
        refused = isinstance(error, SyncError) and not error.retryable
        if refused and not isinstance(error, SyncCancelledError):
            # Not there, not allowed, not understood: it may be another server in some minutes.
            self._shut_out = code == "unauthorized" or code in LOCKED_OUT
            pause = _REVOKED_S if code in LOCKED_OUT else _REFUSED_S * (0.5 + self._draw())
            self._not_before = now + pause
            return
        self._again(now, retry_after or 0.0)

    def _again(self, now: float, at_least_s: float = 0.0) -> None:
        longest = min(_WAIT_S * 2.0**self._failures, _WAIT_MAX_S)
        self._failures = min(self._failures + 1, 30)
        self._asked_until = now + min(at_least_s, _ASKED_MAX_S)
        self._not_before = self._asked_until + longest * self._draw()


# ---------------------------------------------------------------- what is made of what comes


@dataclass(frozen=True)
class Next:
    """Wait for the next event of the stream that is open."""


Course = Generator[OpenStream | Next | Ask | Wait, Event | int | None, None]


class ChannelCourse:
    """What a channel does, step by step. ``now`` is a monotonic clock; ``news`` and ``changed`` are
    those of ``Channel``, called between two steps.

    The outcome of ``Next`` is an event, or None for a sign of life; that of ``Ask`` the newest
    commit; the others have none. What goes wrong in a step is thrown in. A step that is no ``Next``
    ends the stream that was open before it.
    """

    def __init__(
        self,
        now: Callable[[], float],
        draw: Callable[[], float],
        *,
        news: Callable[[int, bool], None],
        changed: Callable[[LiveState], None],
        asks: Callable[[], PullRequest | None] = lambda: None,
        page: Callable[[CarriedPage | None], None] = lambda page: None,
    ) -> None:
        """``asks`` says what a stream that is opened now is to bring pages of; each hint is told to
        ``page`` first: with its page, or None where it has none that can count."""
        self._now = now
        self._asks = asks
        self._page = page
        self._policy = Policy(draw)
        self._news = news
        self._changed = changed
        #: The newest commit that was named since nothing was heard.
        self._known = 0
        #: Those that have come in the present wait.
        self._nudges: set[bool] = set()
        self.state = LiveState.OFFLINE

    def nudge(self, *, worked: bool = False) -> None:
        """See ``Policy.nudged``; counts in a wait. From any thread."""
        self._nudges.add(worked)

    def run(self) -> Course:
        """It has no end of its own, whatever goes wrong; closing it leaves it ``OFFLINE``."""
        try:
            while True:
                step = self._policy.next(self._now())
                try:
                    if isinstance(step, Wait):
                        # What came while nothing waited must not take the first wait away.
                        self._nudges.clear()
                        yield step
                        for worked in list(self._nudges):
                            self._policy.nudged(worked=worked)
                    elif isinstance(step, OpenStream):
                        yield from self._listen(step)
                    else:
                        yield from self._ask(step)
                except SyncCancelledError as error:
                    # The transport was stopped, and not this.
                    self._policy.failed(self._now(), error)
                except Exception as error:
                    # As of a disk, or a bug: the next try may work; the interval does until then.
                    self._policy.failed(self._now(), error)
                    _log.warning("listening for news failed: %r", error)
                self._tell()
        finally:
            self._policy.state = LiveState.OFFLINE
            self._tell()

    def _listen(self, step: OpenStream) -> Course:
        began = self._now()
        first = True
        asked = self._asks()
        try:
            yield step if asked is None else replace(step, asks=asked)
            while True:
                event = yield Next()
                if not isinstance(event, Event):
                    continue
                if event.name == "bye":
                    self._policy.said_goodbye(self._now(), event, self._now() - began)
                    return
                head, page = _said_in(event, asked)
                if head is not None:
                    self._policy.opened()
                    self._tell()
                    # What the first word leads to is a pull, whatever it brings.
                    self._page(None if first else page)
                    self._news(head, first)
                    first = False
        except HeldUpError:
            self._policy.held_up(self._now())
            _log.info("something on the way to the server gathers answers; asking now and then")
        except (SyncError, EOFError) as error:
            self._policy.failed(self._now(), error, self._now() - began)
            _log.debug("the stream of news ended: %s", error)

    def _ask(self, step: Ask) -> Course:
        silent, began = self._policy.state is not LiveState.POLLING, self._now()
        asked = Ask(step.refresh, None if silent else self._known)
        try:
            head = yield asked
        except SyncError as error:
            self._policy.failed(self._now(), error)
            _log.debug("asking for news failed: %s", error)
            return
        assert isinstance(head, int), "the outcome of a question is a commit"
        now = self._now()
        self._policy.answered(now, idle=now - began < _WAITED_S and head == asked.known)
        # A database that ends earlier than before is another one: nothing was heard of that.
        first, self._known = silent or head < self._known, head
        self._tell()
        self._news(head, first)

    def _tell(self) -> None:
        state = self._policy.state
        if state is not self.state:
            self.state = state
            self._changed(state)


def _said_in(event: Event, asked: PullRequest | None) -> tuple[int | None, CarriedPage | None]:
    """The commit that an event names, if it names one, and the page that it brings."""
    if event.name == "page":
        return page_in(asked, event.data) or (None, None)
    return (_commit_in(event.data) if event.name == "head" else None), None


def _commit_in(text: str) -> int | None:
    """The number of a commit; None for what is none."""
    head = int(text) if _NUMBER.fullmatch(text) else -1
    return head if 0 <= head <= SEQUENCE_MAX else None


# ---------------------------------------------------------------- doing it


class Channel:
    """Listens for news of one server on a thread of its own, from ``start`` to ``stop``.

    ``news`` is called with the newest commit that was named, and whether this is the first word
    since nothing was heard: a pull is due then, whatever the number. ``changed`` is called when
    the state is another one; ``asks`` and ``page`` are as a ``ChannelCourse``'s. All from the
    thread, and none may raise. What comes while one of them works waits in the connection.
    """

    def __init__(
        self,
        source: NewsSource,
        clock: Clock,
        draw: Callable[[], float],
        *,
        news: Callable[[int, bool], None],
        changed: Callable[[LiveState], None] = lambda state: None,
        asks: Callable[[], PullRequest | None] = lambda: None,
        page: Callable[[CarriedPage | None], None] = lambda page: None,
    ) -> None:
        self._source = source
        self._clock = clock
        self._changed = changed
        self._course = ChannelCourse(
            clock.monotonic, draw, news=news, changed=self._is_now, asks=asks, page=page
        )
        self._events: Events | None = None
        self._stopping = SafeEvent()
        #: Ends a wait before the next try.
        self._nudged = SafeEvent()
        self._thread: threading.Thread | None = None
        self.state = LiveState.OFFLINE
        #: Since when it is so, in milliseconds since 1970.
        self.since_ms = clock.now_ms()

    @property
    def thread(self) -> int | None:
        """That it is on; None where there is none."""
        return None if self._thread is None else self._thread.ident

    @property
    def ended(self) -> bool:
        """Whether its thread has ended, although nothing has stopped it."""
        thread = self._thread
        return thread is not None and not thread.is_alive()

    def nudge(self, *, worked: bool = False) -> None:
        """Try now, if it waits to; ``worked``: because a cycle has, and only where that may mean
        something. Not before a time that the server asked for. From any thread."""
        self._course.nudge(worked=worked)
        self._nudged.set()

    def start(self) -> None:
        """Idempotent while it runs. Raises ``RuntimeError`` where there is no thread."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stopping.clear()
        # What is called with news finds the context variables of who began this.
        run = contextvars.copy_context().run
        thread = Thread(target=run, args=(self._run,), name="entidb-live", daemon=True)
        thread.start()
        self._thread = thread

    def stop(self) -> None:
        """End what is under way; idempotent. Returns within 100 ms or so, from anywhere."""
        self._stopping.set()
        self._nudged.set()
        self._source.interrupt()
        self._source.close()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _run(self) -> None:
        course = self._course.run()
        outcome: Event | int | None = None
        failed: BaseException | None = None
        try:
            while True:
                step = course.send(outcome) if failed is None else course.throw(failed)
                if self._stopping.is_set():
                    return
                outcome = failed = None
                try:
                    outcome = self._do(step)
                except Exception as error:  # the course knows what to do next
                    failed = error
        finally:
            self._close_events()
            course.close()

    def _do(self, step: OpenStream | Next | Ask | Wait) -> Event | int | None:
        if isinstance(step, Next):
            assert self._events is not None
            return self._events.next()
        self._close_events()
        if isinstance(step, Wait):
            self._clock.wait(self._nudged, step.seconds)
            if not self._stopping.is_set():
                self._nudged.clear()
        elif isinstance(step, Ask):
            return self._source.poll(step.known, refresh=step.refresh)
        else:
            more = {} if step.asks is None else {"asks": step.asks}
            self._events = self._source.open(
                first_event_s=FIRST_EVENT_S, silence_s=SILENCE_S, refresh=step.refresh, **more
            )
        return None

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            events.close()

    def _is_now(self, state: LiveState) -> None:
        self.state, self.since_ms = state, self._clock.now_ms()
        self._changed(state)


__all__ = ["Channel", "ChannelCourse", "Event", "Events", "LiveState", "NewsSource", "Policy"]

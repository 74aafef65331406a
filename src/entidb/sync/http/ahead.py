"""Requests that leave before the engine asks for their answers, on a thread of their own.

What such a request holds, and what its answer says, is for ``transport``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from entidb.events import SafeEvent, Thread
from entidb.protocol import SyncRequest
from entidb.sync.interrupt import Interrupts, act_for, acting_thread
from entidb.sync.transport import HttpResponse
from entidb.types import Clock

_JOIN_S: Final = 5.0
#: Requests known ahead of time: the one under way and the one after it.
_AHEAD_MAX: Final = 2
#: Seconds that the thread which sends ahead waits until the request has left, before it goes on
#: with other work: enough for a local network, little for one on which sending itself takes long.
_SENDING_S: Final = 0.05


class Ahead:
    """A request on its way, and what came of it. ``sent`` and ``done`` are set in any case."""

    def __init__(self, request: SyncRequest, send: Callable[..., HttpResponse]) -> None:
        self.request = request
        self.good = False
        self.sent = SafeEvent()
        self.done = SafeEvent()
        self._send = send
        self._response: HttpResponse | None = None
        self._error: BaseException | None = None

    def carry(self, on_sent: Callable[[], None] | None) -> bool:
        """Whether the answer is one after which the next request may go out."""
        try:
            self._response = self._send(on_sent)
        except BaseException as error:  # raised where it is picked up
            self._error = error
        self.good = self._response is not None and self._response.status == 200
        return self.good

    def result(self, interrupts: Interrupts) -> HttpResponse:
        # Bounded by the request's own timeout.
        interrupts.wait(self.done)
        if self._error is not None:
            raise self._error
        assert self._response is not None
        return self._response


class Carrier:
    """The thread that carries requests ahead of time, one after the other and in order: the next
    one leaves when the one before it is answered, and only if that answer is a good one."""

    def __init__(self, clock: Clock, tells_when_sent: bool) -> None:
        self._clock = clock
        self._tells_when_sent = tells_when_sent
        self._lock = threading.Lock()
        #: What was asked for and not taken yet, in order; the first ``_started`` are under way
        #: or answered.
        self._queue: list[Ahead] = []
        self._started = 0
        self._thread: threading.Thread | None = None
        #: Moves when everything is dropped: a thread of an older age carries nothing more.
        self._age = 0
        self._thread_age = 0
        #: A hint was ignored. Those after it must not leave before it, so they are ignored too,
        #: until the engine asks for the next request.
        self._ignoring = False

    def add(self, ahead: Ahead) -> None:
        with self._lock:
            busy = self._thread is not None
            refused = not busy and self._queue and not self._queue[-1].good
            full = len(self._queue) >= _AHEAD_MAX
            if refused or full or (busy and self._thread_age != self._age):
                self._ignoring = True
            if self._ignoring:
                return
            if busy:
                self._queue.append(ahead)
                return
            thread = Thread(
                target=self._run,
                args=(ahead, self._age, acting_thread()),
                name="entidb-send-ahead",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError:
                return  # it is sent when it is asked for
            self._queue.append(ahead)
            self._started = len(self._queue)
            self._thread_age = self._age
            self._thread = thread
        if self._tells_when_sent:
            # Two threads that both have work to do hand the interpreter over every few
            # milliseconds, and sending takes several turns: the server would wait for them.
            self._clock.wait(ahead.sent, _SENDING_S)

    def take(self, request: SyncRequest) -> Ahead | None:
        """What was started for ``request``; for any other request, everything is dropped."""
        with self._lock:
            self._ignoring = False
            if self._started:
                ahead = self._queue[0]
                if ahead.request is request or ahead.request == request:
                    self._started -= 1
                    return self._queue.pop(0)
            self._forget()
            return None

    def drop(self) -> None:
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._queue.clear()
        self._started = 0
        self._age += 1
        self._ignoring = False

    def join(self) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            # A client that is not ours may not let go of its socket at once; the thread is a
            # daemon, and its answer goes nowhere.
            thread.join(_JOIN_S)

    def _run(self, ahead: Ahead | None, age: int, ident: int) -> None:
        act_for(ident)
        answered: Ahead | None = None
        while ahead is not None:
            good = self._carry(ahead, answered)
            answered = ahead
            with self._lock:
                ahead = None
                if good and age == self._age and self._started < len(self._queue):
                    ahead = self._queue[self._started]
                    self._started += 1
                else:
                    self._thread = None
        if answered is not None:
            answered.done.set()

    def _carry(self, ahead: Ahead, before: Ahead | None) -> bool:
        def on_sent() -> None:
            # The thread that waits for the answer before this request has work to do with it, and
            # gets it when this request has left.
            ahead.sent.set()
            if before is not None:
                before.done.set()

        if self._tells_when_sent:
            good = ahead.carry(on_sent)
        else:
            on_sent()
            good = ahead.carry(None)
        on_sent()
        return good

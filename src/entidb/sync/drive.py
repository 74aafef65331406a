"""The loop that does the I/O a ``sync()`` asks for, and what does it over a transport that waits.

    Attempts ── request, hint, pause ──▶ Drive ──▶ Courier ──┬── Driver: waits for a SyncTransport
             ◀─ answer or error ───────                      └── the way of a simulated device

There is one such loop: of the blocking engine, of the asyncio engine, whose cycles run on a thread
of their own, and of the simulator, whose answers come later. It knows nothing of retries, states or
threads of its own; those are ``attempts``' and ``engine``'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Protocol

from msgspec import Struct

from entidb.events import SafeEvent
from entidb.protocol import SyncRequest, SyncResponse
from entidb.sync.exchange import SendAhead, Step
from entidb.sync.interrupt import Interrupts, Watch
from entidb.sync.segment_files import Fetch
from entidb.sync.state import SyncCycleResult
from entidb.sync.transport import SyncTransport


class Pause(Struct, frozen=True):
    """Nothing is to be done for so many ``seconds``, or until the program asks for a cycle; never
    before ``asked_for_s``, which the server asked for."""

    seconds: float
    asked_for_s: float


#: One ``sync()`` from its beginning to its end: what it asks for, and what it is answered.
Course = Generator[Step | Pause, SyncResponse | None, SyncCycleResult]


class Courier(Protocol):
    """Does what a course asks for. ``send``, ``fetch`` and ``pause`` are done when they return, or
    will be: then they return None and False, and the driver goes on with the outcome later."""

    @property
    def fetches(self) -> bool:
        """Whether ``fetch`` works: where it does not, no course asks for it."""
        ...

    def begin(self) -> bool:
        """A cycle begins: what was interrupted or sent ahead before it does not count. Whether the
        connection of before still is one; if not, a handshake is due (R10)."""
        ...

    def send(self, request: SyncRequest) -> SyncResponse | None: ...

    def send_ahead(self, request: SyncRequest) -> None: ...

    def forget_ahead(self) -> None: ...

    def fetch(self, fetch: Fetch) -> bool: ...

    def pause(self, pause: Pause) -> bool: ...

    def interrupt(self) -> None:
        """End what is under way; from any thread, also in a signal handler."""
        ...


class Drive(Struct):
    """One course under way."""

    course: Course
    courier: Courier

    def go_on(self, outcome: SyncResponse | BaseException | None = None) -> SyncCycleResult | None:
        """Do what the course asks for, beginning with the ``outcome`` of what it asked for last.
        Returns its result, or None while an outcome is awaited; raises what the course raises."""
        course, courier = self.course, self.courier
        while True:
            try:
                if isinstance(outcome, BaseException):
                    step = course.throw(outcome)
                else:
                    step = course.send(outcome)
            except StopIteration as end:
                result: SyncCycleResult = end.value
                return result
            outcome = None
            try:
                if isinstance(step, SendAhead):
                    courier.send_ahead(step.request)
                elif isinstance(step, Pause):
                    if not courier.pause(step):
                        return None
                elif isinstance(step, Fetch):
                    if not courier.fetch(step):
                        return None
                else:
                    outcome = courier.send(step)
                    if outcome is None:
                        return None
            except BaseException as failed:  # the course puts away what it holds, and raises it
                outcome = failed


class Driver:
    """The ``Courier`` over a transport: what it is asked for is done when it returns. ``check``
    raises to cancel, ``pause`` waits."""

    def __init__(
        self,
        transport: SyncTransport,
        check: Callable[[], None],
        pause: Callable[[Pause], None],
    ) -> None:
        self._transport = transport
        self._check = check
        self._pause = pause
        self._interrupts = Interrupts()
        self._interrupt_transport = getattr(transport, "interrupt", None)
        self._fetch: Callable[[Fetch], None] | None = getattr(transport, "fetch", None)
        self._begin_cycle = getattr(transport, "begin_cycle", None)
        #: A ``send`` that was left to itself, of a transport that cannot be interrupted.
        self._left_alone: threading.Event | None = None

    def begin(self) -> bool:
        # An interrupt counts until here. What is cancelled after it is interrupted after it, and
        # what was cancelled before it ends at the first look at the flag, before any request.
        self._interrupts.clear()
        if self._left_alone is not None:
            # A transport carries one request at a time.
            self._check()
            self._interrupts.wait(self._left_alone)
            self._left_alone = None
        self._transport.forget_ahead()
        begin_cycle = self._begin_cycle
        return self._transport.connected if begin_cycle is None else begin_cycle()

    def send_ahead(self, request: SyncRequest) -> None:
        self._transport.send_ahead(request)

    def forget_ahead(self) -> None:
        self._transport.forget_ahead()

    @property
    def fetches(self) -> bool:
        able = self._fetch is not None and self._interrupt_transport is not None
        return able and bool(getattr(self._transport, "fetches", True))

    def fetch(self, fetch: Fetch) -> bool:
        assert self._fetch is not None, "nothing is fetched over a transport that cannot"
        self._fetch(fetch)
        return True

    def pause(self, pause: Pause) -> bool:
        self._pause(pause)
        return True

    def interrupt(self) -> None:
        if self._interrupt_transport is not None:
            self._interrupt_transport()
        self._interrupts.interrupt()

    def send(self, request: SyncRequest) -> SyncResponse:
        if self._interrupt_transport is not None:
            return self._transport.send(request)
        over = SafeEvent()

        def work(watch: Watch) -> SyncResponse:
            # Not before this thread runs: Ctrl-C may come before it does, or before it sends.
            self._left_alone = over
            try:
                watch.check()
                return self._transport.send(request)
            finally:
                over.set()

        response = self._interrupts.call(work, "entidb-transport")
        self._left_alone = None
        return response


__all__ = ["Courier", "Course", "Drive", "Driver", "Pause"]

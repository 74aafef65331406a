"""The loop that does a cycle's I/O over a transport, and how it is interrupted.

It knows nothing of retries, states or threads of its own; those are ``engine``'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from entidb.errors import SyncError
from entidb.protocol import SyncRequest, SyncResponse
from entidb.sync.cycle import Cycle
from entidb.sync.exchange import Ahead
from entidb.sync.interrupt import Interrupts, Watch
from entidb.sync.state import SyncCycleResult
from entidb.sync.transport import SyncTransport


class Driver:
    """Drives cycles over ``transport``, one at a time. ``check`` raises to cancel."""

    def __init__(self, transport: SyncTransport, check: Callable[[], None]) -> None:
        self._transport = transport
        self._check = check
        self._interrupts = Interrupts()
        self._interrupt_transport = getattr(transport, "interrupt", None)
        #: A ``send`` that was left to itself, of a transport that cannot be interrupted.
        self._left_alone: threading.Event | None = None

    def begin(self) -> None:
        """Forget what was interrupted or sent ahead before. Call it before each cycle."""
        # An interrupt counts until here. What is cancelled after it is interrupted after it, and
        # what was cancelled before it ends at the first look at the flag, before any request.
        self._interrupts.clear()
        if self._left_alone is not None:
            # A transport carries one request at a time.
            self._check()
            self._interrupts.wait(self._left_alone)
            self._left_alone = None
        self._transport.forget_ahead()

    def drive(self, cycle: Cycle) -> SyncCycleResult:
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
                    self._transport.send_ahead(step.request)
                else:
                    response = self._send(step)
            except SyncError as failed:
                error = failed

    def interrupt(self) -> None:
        """End a request that is under way; from any thread, also in a signal handler."""
        if self._interrupt_transport is not None:
            self._interrupt_transport()
        self._interrupts.interrupt()

    def _send(self, request: SyncRequest) -> SyncResponse:
        if self._interrupt_transport is not None:
            return self._transport.send(request)
        self._left_alone = over = threading.Event()

        def work(watch: Watch) -> SyncResponse:
            try:
                return self._transport.send(request)
            finally:
                over.set()

        response = self._interrupts.call(work, "entidb-transport")
        self._left_alone = None
        return response

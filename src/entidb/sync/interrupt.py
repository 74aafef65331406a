"""Ending a wait from another thread: what makes ``stop()`` prompt whatever the network does.

Nothing can interrupt some waits: looking up a name, connecting, a TLS handshake, a transport or a
token function of the program. They run on a thread of their own, and an interrupt lets the thread
that waits for it go on without it; the code that started it throws its result away. ``http`` ends
waits for a known socket by shutting it down.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from entidb.errors import SyncCancelledError, TransportError
from entidb.events import SafeEvent, Thread

T = TypeVar("T")
_acting = threading.local()


def acting_thread() -> int:
    """The thread that waits for what this one does, through all helpers in between; this one if it
    is no helper. Code that asks whether it runs inside a cycle compares this."""
    return getattr(_acting, "ident", None) or threading.get_ident()


def act_for(ident: int) -> None:
    """From here to its end, this thread works for the thread ``ident``."""
    _acting.ident = ident


class Watch:
    """One wait that can be interrupted."""

    __slots__ = ("event", "interrupted")

    def __init__(self, event: threading.Event | None) -> None:
        self.event = event
        self.interrupted = False

    def check(self) -> None:
        """Raises ``SyncCancelledError`` if it was interrupted."""
        if self.interrupted:
            raise SyncCancelledError("cancelled; sync again to go on from here")


class Interrupts:
    """All waits of one transport, client or engine. Once interrupted, new ones end at once too,
    until ``clear``: no interrupt gets lost between a look at a flag and the start of a wait.
    Thread-safe; ``interrupt`` may come from a signal handler."""

    def __init__(self) -> None:
        # Re-entrant for signal handlers, which run between any two steps of the main thread.
        self._lock = threading.RLock()
        self._watches: list[Watch] = []
        self._raised = False

    def interrupt(self) -> None:
        with self._lock:
            self._raised = True
            watches = list(self._watches)
            for watch in watches:
                watch.interrupted = True
        for watch in watches:
            if watch.event is not None:
                watch.event.set()

    def clear(self) -> None:
        """Waits that begin from now on go on; those that were interrupted stay interrupted."""
        with self._lock:
            self._raised = False

    def begin(self, event: threading.Event | None = None) -> Watch:
        """From here until ``end`` an interrupt reaches this watch, and sets ``event``."""
        watch = Watch(event)
        with self._lock:
            watch.interrupted = self._raised
            self._watches.append(watch)
        return watch

    def end(self, watch: Watch) -> None:
        with self._lock:
            self._watches.remove(watch)

    def wait(self, event: threading.Event) -> None:
        """Wait until ``event`` is set. Raises ``SyncCancelledError`` when interrupted."""
        watch = self.begin(event)
        try:
            watch.check()
            event.wait()
        finally:
            self.end(watch)
        watch.check()

    def call(self, work: Callable[[Watch], T], name: str) -> T:
        """``work()`` on a thread called ``name``, and what it returns or raises.

        Raises ``SyncCancelledError`` at once when interrupted, and leaves the thread to itself:
        ``work`` gets a watch that shows it."""
        job = InterruptibleJob(work, name)
        watch = self.begin(job.done)
        job.watch = watch
        try:
            watch.check()
            job.start()
            job.done.wait()
            watch.check()
        except BaseException:
            # Also Ctrl-C: this thread waits for the other one no more.
            watch.interrupted = True
            raise
        finally:
            self.end(watch)
        return job.result()


class InterruptibleJob(Generic[T]):
    """Work on a thread of its own."""

    def __init__(self, work: Callable[[Watch], T], name: str) -> None:
        self.done = SafeEvent()
        self.watch = Watch(None)
        self._work = work
        self._name = name
        self._for = acting_thread()
        self._tell: Callable[[], None] | None = None
        self._results: list[T] = []
        self._error: BaseException | None = None

    def start(self, tell: Callable[[], None] | None = None) -> None:
        """Begin; the thread calls ``tell`` when it is done. Raises ``TransportError``."""
        self._tell = tell
        context = contextvars.copy_context()
        thread = Thread(target=context.run, args=(self._run,), name=self._name)
        thread.daemon = True
        try:
            thread.start()
        except RuntimeError as error:  # out of threads, or the interpreter is ending
            raise TransportError(f"no thread could be started for the network: {error}") from error

    def _run(self) -> None:
        act_for(self._for)
        try:
            self._results.append(self._work(self.watch))
        except BaseException as error:  # goes on in the thread that waits
            self._error = error
        finally:
            self.done.set()
            if self._tell is not None:
                self._tell()

    def result(self) -> T:
        error, self._error = self._error, None
        if error is None:
            return self._results[0]
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame


__all__ = ["Interrupts", "InterruptibleJob", "Watch", "act_for", "acting_thread"]

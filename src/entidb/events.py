"""Events that an interrupt cannot leave locked, and threads that begin in spite of one.

``threading.Event`` has a lock, which it takes in steps: Ctrl-C between two of them leaves it taken,
and whoever sets, clears or awaits that event then waits for ever. So does a signal handler that
sets one which its own thread is just setting. Here setting is one assignment, and then one bell
after the other is rung; a bell that is rung twice, or that nobody waits for any more, does no harm.

Not here: whose turn it is (``entidb.storage.turns``).
"""

from __future__ import annotations

import contextlib
import threading


class SafeEvent(threading.Event):
    """See the module. What it does is what ``threading.Event`` does."""

    def __init__(self) -> None:
        # Not that of the base, which makes its lock.
        self._flag = False
        self._bells: list[threading.Lock] = []

    def is_set(self) -> bool:
        return self._flag

    def set(self) -> None:
        self._flag = True
        for bell in self._bells[:]:
            with contextlib.suppress(RuntimeError):  # it rings already
                bell.release()

    def clear(self) -> None:
        self._flag = False

    def wait(self, timeout: float | None = None) -> bool:
        if self._flag:
            return True
        bell = threading.Lock()
        bell.acquire()
        self._bells.append(bell)
        try:
            if self.is_set():  # before there was a bell
                return True
            if timeout is None:
                return bell.acquire()
            return bell.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))
        finally:
            self._bells.remove(bell)

    def _at_fork_reinit(self) -> None:
        """Called by ``threading`` in a forked child, where nobody waits any more."""
        self._bells.clear()


class Thread(threading.Thread):
    """A thread whose start may be interrupted: it runs then, or was never begun."""

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(*args, **named)  # type: ignore[arg-type]
        # The event by which the new thread tells the one that waits in ``start``.
        if hasattr(self, "_started"):
            self._started = SafeEvent()


__all__ = ["SafeEvent", "Thread"]

"""What takes long: one task at a time, on a thread of its own, with progress, to be cancelled.

Tasks are not durable: a server that ends ends them, and each of them is made so that it can be
begun again. Not here: what they do.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from entidb.errors import EntiDBError, ServerBusyError
from entidb.events import SafeEvent, Thread
from entidb.server.cores import run_anywhere
from entidb.storage.disk_errors import said_of
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

#: Tasks that wait, and those that are over and are still shown.
WAITING_MAX: Final = 1000
SHOWN_MAX: Final = 100

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Task(Struct, omit_defaults=True):
    """Times are milliseconds since 1970; ``done`` of ``total`` steps, where they are known."""

    id: int
    kind: str
    by: str
    asked_ms: int
    database: str | None = None
    state: State = "waiting"
    step: str = ""
    done: int = 0
    total: int | None = None
    began_ms: int | None = None
    ended_ms: int | None = None
    result: dict[str, Any] = {}
    error: str | None = None


class _CancelledError(Exception):
    """Ends a task from inside; never leaves this room."""


class Progress:
    """How a running task reports, and learns that it has to end."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.cancelled = SafeEvent()

    def at(self, step: str, done: int = 0, total: int | None = None) -> None:
        """Say how far it is. Ends the task here if it was cancelled."""
        self._task.step, self._task.done, self._task.total = step, done, total
        if self.cancelled.is_set():
            raise _CancelledError


Body = Callable[[Progress], dict[str, Any]]


class Tasks:
    """Thread-safe. The thread begins with the first task."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ids = itertools.count(1)
        #: Entered itself, and not by way of the condition, whose own lines an interrupt could leave
        #: with the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[tuple[Task, Progress, Body]] = deque()
        self._running: tuple[Task, Progress] | None = None
        self._over: deque[Task] = deque(maxlen=SHOWN_MAX)
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, kind: str, by: str, database: str | None, body: Body) -> Task:
        """Have ``body`` run when those before it are over. Raises ``ServerBusyError``."""
        with self._lock:
            if self._closed or len(self._queue) >= WAITING_MAX:
                raise ServerBusyError("no more tasks are taken at the moment", retry_after=10.0)
            self._begin()
            task = Task(next(self._ids), kind, by, self._clock.now_ms(), database)
            self._queue.append((task, Progress(task), body))
            self._changed.notify_all()
            return replace(task)

    def _begin(self) -> None:
        if self._thread is not None:
            return
        thread = Thread(target=self._run, name="entidb-tasks", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives none; the next task tries again
            raise ServerBusyError(
                "the server has no thread for tasks at the moment", retry_after=10.0
            ) from error
        self._thread = thread

    def all(self) -> list[Task]:
        """Copies, newest first."""
        with self._lock:
            running = [] if self._running is None else [self._running[0]]
            waiting = [task for task, _, _ in self._queue]
            return [replace(each) for each in reversed([*self._over, *running, *waiting])]

    def find(self, number: int) -> Task | None:
        return next((each for each in self.all() if each.id == number), None)

    def is_due(self, kind: str, database: str) -> bool:
        """Whether such a task waits or runs."""
        return any(
            each.kind == kind and each.database == database and each.ended_ms is None
            for each in self.all()
        )

    def cancel(self, number: int) -> bool:
        """Whether there was such a task to cancel. A running one ends at its next step."""
        with self._lock:
            for entry in self._queue:
                if entry[0].id == number:
                    self._queue.remove(entry)
                    self._end(entry[0], "cancelled")
                    return True
            if self._running is not None and self._running[0].id == number:
                self._running[1].cancelled.set()
                return True
            return False

    def wait(self, number: int, seconds: float) -> Task | None:
        """The task when it is over, or after ``seconds`` as it is then."""
        with self._lock:
            self._changed.wait_for(lambda: self._is_over(number), seconds)
        return self.find(number)

    def _is_over(self, number: int) -> bool:
        running = self._running is not None and self._running[0].id == number
        return not running and all(task.id != number for task, _, _ in self._queue)

    def close(self) -> None:
        """Cancel everything, and wait for the running task to end. Idempotent."""
        with self._lock:
            self._closed = True
            while self._queue:
                self._end(self._queue.popleft()[0], "cancelled")
            if self._running is not None:
                self._running[1].cancelled.set()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        run_anywhere()
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                task, progress, body = self._queue.popleft()
                self._running = task, progress
                task.state, task.began_ms = "running", self._clock.now_ms()
            state, error = self._try(task, progress, body)
            with self._lock:
                self._running = None
                task.error = error
                self._end(task, state)

    def _try(self, task: Task, progress: Progress, body: Body) -> tuple[State, str | None]:
        try:
            task.result = body(progress)
            return "done", None
        except _CancelledError:
            return "cancelled", None
        except (EntiDBError, OSError) as error:
            said = str(error)
            if isinstance(error, OSError):  # which names neither what was done nor what to do
                said = said_of(error, f"{task.kind} of {task.database or 'all'}")
            logger.error("task %d (%s %s) failed: %s", task.id, task.kind, task.database, said)
            return "failed", said
        except BaseException as error:
            # Our own mistake, or a hook that calls sys.exit(), must not end the thread: no task
            # would run any more.
            logger.exception("task %d (%s %s) failed", task.id, task.kind, task.database)
            return "failed", f"internal error: {type(error).__name__}"

    def _end(self, task: Task, state: State) -> None:
        task.state, task.ended_ms = state, self._clock.now_ms()
        self._over.append(task)
        self._changed.notify_all()

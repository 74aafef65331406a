"""An event loop in virtual time: what the server does with asyncio runs in a simulated run as it
is, one callback for each event of the world.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, TypeVar, TypeVarTuple, cast

from entidb.testing.world import World

_NOT_BEGUN = inspect.CORO_CREATED
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
#: Do something so many milliseconds from now.
Later = Callable[[int, Callable[[], None]], None]


class LoopHandle(asyncio.TimerHandle):
    """One callback."""

    def __init__(
        self,
        when: float,
        call: Callable[[], object],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None,
    ) -> None:
        super().__init__(when, call, (), loop, context)
        self._call = call
        self._within = context or contextvars.copy_context()

    def run(self) -> None:
        """Unlike a real loop's, what it raises reaches the world."""
        if not self.cancelled():
            self._within.run(self._call)


class WorldLoop:
    """The loop of one process: as much of one as tasks, futures and timers need. ``later`` ends
    with that process: what it was given then is dropped."""

    def __init__(self, world: World, later: Later) -> None:
        self._world = world
        self._later = later
        self._tasks: dict[asyncio.Task[Any], None] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """For what asks for a whole one."""
        return cast(asyncio.AbstractEventLoop, self)

    def time(self) -> float:
        return self._world.now / 1000

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> LoopHandle:
        return self.call_later(0, callback, *args, context=context)

    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> LoopHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> LoopHandle:
        handle = LoopHandle(when, partial(callback, *args), self.loop, context)
        left = when - self.time()
        # What waits for a time must find it there, however little is left.
        delay_ms = max(1, math.ceil(round(left * 1000, 3))) if left > 0 else 0
        self._later(delay_ms, lambda: self._run(handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self.loop)

    def create_task(
        self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], **options: Any
    ) -> asyncio.Task[T]:
        task: asyncio.Task[T] = asyncio.Task(cast(Coroutine[Any, Any, T], coro), loop=self.loop)
        self._tasks[task] = None
        return task

    def end(self) -> None:
        """Its process has ended. What had not begun will not begin; what had is left as it is, as a
        killed process leaves it."""
        for task in self._tasks:
            work = task.get_coro()
            if inspect.iscoroutine(work) and inspect.getcoroutinestate(work) == _NOT_BEGUN:
                work.close()

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What a task raises is raised by ``_run``; what is left here are tasks that end with the
        process they are of."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A handle that was cancelled is passed over when its time comes."""

    def _run(self, handle: LoopHandle) -> None:
        # A node that is paused has others run inside it; never one of their tasks inside its own.
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self.loop)
        try:
            handle.run()
        finally:
            asyncio._set_running_loop(before)
        for task in [task for task in self._tasks if task.done()]:
            del self._tasks[task]
            error = None if task.cancelled() else task.exception()
            if error is not None:
                raise error


__all__ = ["WorldLoop"]

"""Time limits that nearly always turn out not to be needed, and cost next to nothing then.

A timer of the event loop costs as much as reading a small request. So a limit on what happens again
and again on one connection keeps its timer from one time to the next, and a limit on a wait makes
none unless there is something to wait for.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class Deadline:
    """A limit that starts and stops again and again, on one timer: that one is left to run when
    the limit stops, and looks when it is due whether the limit that is running by then is."""

    __slots__ = ("_call", "_due", "_loop", "_seconds", "_timer")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._seconds = seconds
        self._call = call
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._due is not None

    def start(self) -> None:
        """From now on, unless it is running."""
        if self._due is None:
            self._due = self._loop.time() + self._seconds
            if self._timer is None:
                self._timer = self._loop.call_at(self._due, self._look)

    def stop(self) -> None:
        self._due = None

    def end(self) -> None:
        """Stop for good: nothing is left in the loop."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer, due = None, self._due
        if due is None:
            return
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._look)
            return
        self._due = None
        self._call()


@types.coroutine
def within(seconds: float, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """``await within(seconds, work)``: what ``work`` returns. Raises ``TimeoutError`` as
    ``asyncio.timeout`` does, which is only made when ``work`` waits."""
    try:
        waits_for = work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    return (yield from _limited(seconds, work, waits_for).__await__())


async def _limited(seconds: float, work: Coroutine[Any, Any, T], waits_for: Any) -> T:
    async with asyncio.timeout(seconds):
        return await _rest(work, waits_for)


@types.coroutine
def _rest(work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """What is left of ``work``, which has come to ``waits_for``."""
    step: Callable[[Any], Any]
    while True:
        try:
            answer = yield waits_for
            step = work.send
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:
            answer, step = error, work.throw
        try:
            waits_for = step(answer)
        except StopIteration as end:
            result: T = end.value
            return result

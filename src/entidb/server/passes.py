"""What the event loop does for each database before it looks at its sockets again.

A group commit has answers for everybody who waited, and each of them asks again at once: one pass
of the loop would be as long as all of that takes, and who asks another database meanwhile would
wait for it. So in one pass few requests go on, in turns between the databases that they are for;
those of a flooded database wait for each other, and for nobody else. Clients that wait for their
answers are slowed down by that, and the loop is not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

#: Requests that go on in one pass, and each of them is a tenth of a millisecond or two; but one of
#: each database in any case. Fewer make the groups of pushes small.
AT_ONCE: Final = 8


class Passes:
    """Of one event loop; used from there only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        #: In this pass: how many went on, and of which databases.
        self._count = 0
        self._served: set[str] = set()
        #: What waits, by database; whose turn it is next is first.
        self._waiting: dict[str, deque[Callable[[], object]]] = {}

    async def turn(self, db_id: str) -> None:
        """Wait until a request for ``db_id`` may go on: mostly not at all."""
        if not self._goes_on(db_id):
            turn: asyncio.Future[None] = self._loop.create_future()
            self._wait(db_id, partial(settle, turn, None))
            await turn

    def put(self, db_id: str, call: Callable[[], object]) -> None:
        """Call ``call`` when it is its turn: in this pass, or in a later one."""
        if self._goes_on(db_id):
            call()
        else:
            self._wait(db_id, call)

    def _goes_on(self, db_id: str) -> bool:
        if db_id in self._waiting or (self._count >= AT_ONCE and db_id in self._served):
            return False
        self._note(db_id)
        return True

    def _note(self, db_id: str) -> None:
        if not self._count:
            self._loop.call_soon(self._next)
        self._count += 1
        self._served.add(db_id)

    def _wait(self, db_id: str, call: Callable[[], object]) -> None:
        self._waiting.setdefault(db_id, deque()).append(call)

    def _next(self) -> None:
        """Another pass begins."""
        self._count = 0
        self._served.clear()
        while self._waiting and self._count < AT_ONCE:
            db_id = next(iter(self._waiting))
            calls = self._waiting.pop(db_id)
            call = calls.popleft()
            if calls:
                self._waiting[db_id] = calls  # behind the others
            self._note(db_id)
            call()


def settle(future: asyncio.Future[Any], result: object) -> None:
    """Unless nobody waits for it any more."""
    if not future.done():
        future.set_result(result)


__all__ = ["AT_ONCE", "Passes", "settle"]

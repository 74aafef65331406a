"""What the event loop does for each database before it looks at its sockets again.

A group commit has answers for everybody who waited, and each of them asks again at once: one pass
of the loop would be as long as all of that takes, and who asks another database meanwhile would
wait for it. So in one pass few requests go on, in turns between the databases that they are for;
those of a flooded database wait for each other. Clients that wait for their answers are slowed down
by that, and the loop is not.

That is not enough for who asks another database: a push is decided on a thread, and whenever that
one needs the interpreter, or a core, it would wait until the loop rests. So a crowd also waits
while somebody who is none is under way, for a few milliseconds at most; the loop rests meanwhile.
So does the thread that decides what a crowd pushes, before its next group.

Who has not been read yet is not known to be under way: it waits for the end of the pass, and for
the interpreter. So for a moment after somebody who is no crowd, less of a crowd goes on in one
pass, and the thread that decides its pushes lets the interpreter go between two of them.

Where all have asked one database for a while, there is nobody to let pass. Then many go on at once,
and next to none waits for a turn. Who is the first to ask another one waits for the end of one such
pass.
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
#: As many of the only database that anybody has asked, and for so many seconds.
SOLE_AT_ONCE: Final = 64
SOLE_S: Final = 1.0
#: More requests for one database at once are a crowd.
CROWD: Final = AT_ONCE
#: Seconds after which some of a crowd go on in any case.
PATIENCE_S: Final = 0.004
#: Who is under way for longer waits for something else than the loop and its threads.
YOUNG_S: Final = 0.01
#: Of a crowd in one pass, while others come now and then; and for how many seconds they do.
FEW: Final = 2
LATELY_S: Final = 0.05


class UnderWay:
    """The requests for one database that have had their turn, and are not answered; a context
    manager that one of them leaves at its end."""

    __slots__ = ("_passes", "began", "count", "db_id")

    def __init__(self, passes: Passes, db_id: str) -> None:
        self._passes = passes
        self.db_id = db_id
        self.count = 0
        #: When the newest had its turn.
        self.began = 0.0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        self.count -= 1
        self._passes.left(self)


class Passes:
    """Of one event loop; used from there only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        #: In this pass: how many went on, and of which databases.
        self._count = 0
        self._served: dict[str, int] = {}
        #: What waits, by database; whose turn it is next is first.
        self._waiting: dict[str, deque[Callable[[], object]]] = {}
        #: By database.
        self._under_way: dict[str, UnderWay] = {}
        #: Whether a pass is about to begin, and whether one will because a crowd waits.
        self._due = False
        self._holds = False
        #: Whether crowds wait in this pass, None until there is one; and when one went on last.
        self._crowds_wait: bool | None = None
        self._crowd_at = 0.0
        #: The database that was asked last, since when no other was, and whether that is long ago.
        self._latest = ""
        self._since = loop.time()
        self._sole = False
        #: The two databases whose requests were no crowd lately, and when the last of each came.
        self._calm = [("", -LATELY_S), ("", -LATELY_S)]

    async def turn(self, db_id: str) -> UnderWay:
        """Wait until a request for ``db_id`` may go on: mostly not at all. What this returns is to
        be left when it is answered."""
        if db_id != self._latest:
            self._latest, self._sole, self._since = db_id, False, self._loop.time()
        if not self._goes_on(db_id):
            turn: asyncio.Future[None] = self._loop.create_future()
            self._wait(db_id, partial(settle, turn, None))
            await turn
        there = self._under_way.get(db_id)
        if there is None:
            there = self._under_way[db_id] = UnderWay(self, db_id)
        there.count += 1
        there.began = now = self._loop.time()
        if there.count <= CROWD:
            calm = self._calm
            if calm[0][0] != db_id:
                calm[1] = calm[0]
            calm[0] = (db_id, now)
        return there

    def left(self, there: UnderWay) -> None:
        """One of these has its answer."""
        if not there.count:
            del self._under_way[there.db_id]
        if self._holds:
            self._begin_soon()

    def put(self, db_id: str, call: Callable[[], object]) -> None:
        """Call ``call`` when it is its turn: in this pass, or in a later one."""
        if self._goes_on(db_id):
            call()
        else:
            self._wait(db_id, call)

    def _goes_on(self, db_id: str) -> bool:
        if db_id in self._waiting:
            return False
        if self._sole and self._count < SOLE_AT_ONCE:
            self._note(db_id)
            return True
        served = self._served.get(db_id, 0)
        if self._count >= AT_ONCE and served:
            return False
        if served >= FEW and self._is_shy(db_id, 1):
            return False
        if self._is_held(db_id, 1):
            self._hold()
            return False
        self._note(db_id)
        return True

    def _is_held(self, db_id: str, waiting: int) -> bool:
        """Whether requests for ``db_id``, so many of which wait, are a crowd that lets others
        pass."""
        there = self._under_way.get(db_id)
        if waiting <= CROWD and (there is None or there.count <= CROWD):
            return False
        if self._crowds_wait is None:
            self._crowds_wait = self._somebody_comes_first()
        return self._crowds_wait

    def _is_shy(self, db_id: str, waiting: int) -> bool:
        """Whether requests for ``db_id`` are a crowd, and others came lately."""
        there = self._under_way.get(db_id)
        if waiting <= CROWD and (there is None or there.count <= CROWD):
            return False
        since = self._loop.time() - LATELY_S
        return any(at > since and name != db_id for name, at in list(self._calm))

    def gives_way(self, db_id: str) -> bool:
        """Whether what is decided for ``db_id`` can wait a moment: it is for a crowd, and somebody
        who is none is under way. From any thread."""
        there = self._under_way.get(db_id)
        if there is None or there.count <= CROWD:
            return False
        since = self._loop.time() - YOUNG_S
        others = list(self._under_way.values())
        return any(other.count <= CROWD and other.began > since for other in others)

    def lets_go(self, db_id: str) -> bool:
        """Whether who works for ``db_id`` lets others have the interpreter now and then. From any
        thread."""
        return self._is_shy(db_id, 0)

    def _somebody_comes_first(self) -> bool:
        """Whether somebody who is no crowd is under way, and came lately."""
        now = self._loop.time()
        if now - self._crowd_at < PATIENCE_S:
            for there in self._under_way.values():
                if there.count <= CROWD and now - there.began < YOUNG_S:
                    return True
        self._crowd_at = now
        return False

    def _hold(self) -> None:
        if not self._holds:
            self._holds = True
            self._loop.call_later(PATIENCE_S, self._let_go)

    def _note(self, db_id: str) -> None:
        self._begin_soon()
        self._count += 1
        self._served[db_id] = self._served.get(db_id, 0) + 1

    def _begin_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._next)

    def _wait(self, db_id: str, call: Callable[[], object]) -> None:
        self._waiting.setdefault(db_id, deque()).append(call)

    def _next(self) -> None:
        """Another pass begins."""
        self._due = False
        self._count = 0
        self._served.clear()
        self._crowds_wait = None
        if not self._sole:
            self._sole = self._loop.time() - self._since > SOLE_S
        at_once = SOLE_AT_ONCE if self._sole else AT_ONCE
        free = len(self._waiting)
        while free and self._waiting and self._count < at_once:
            db_id, calls = next(iter(self._waiting.items()))
            del self._waiting[db_id]
            if self._is_held(db_id, len(calls)):
                self._waiting[db_id] = calls
                self._hold()
                free -= 1
                continue
            if self._served.get(db_id, 0) >= FEW and self._is_shy(db_id, len(calls)):
                self._waiting[db_id] = calls
                free -= 1
                continue
            call = calls.popleft()
            if calls:
                self._waiting[db_id] = calls  # behind the others
            else:
                free -= 1
            self._note(db_id)
            call()

    def _let_go(self) -> None:
        self._holds = False
        self._begin_soon()


def settle(future: asyncio.Future[Any], result: object) -> None:
    """Unless nobody waits for it any more."""
    if not future.done():
        future.set_result(result)


__all__ = [
    *("AT_ONCE", "CROWD", "FEW", "LATELY_S", "PATIENCE_S", "YOUNG_S"),
    *("SOLE_AT_ONCE", "SOLE_S"),
    *("Passes", "UnderWay", "settle"),
]

"""Bytes in memory for all requests together, shared fairly between those who want them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from entidb.errors import ServerBusyError

#: Seconds that a pull waits for room in the budget before it gets the answer to come again.
ROOM_WAIT_S: Final = 5.0
RETRY_S: Final = 1.0
#: How many times what is free one subject or one database may hold: three quarters of everything
#: if it is alone, and the more of them hold much, the less each, so that some is always free.
_SHARE: Final = 3
#: What a request may always hold, as most of them do: there are no more of these than connections,
#: and the system keeps more than that for each. Who waits for a page has not been refused, so
#: nobody who would wait for one is.
SMALL_BYTES: Final = 4096
# ---------------------------------------------------------------- memory

#: To whom bytes are charged: a subject or a database, by name.
_Account = tuple[str, str]


class Budget:
    """Bytes in memory for all requests together, shared between those they are charged to. Used
    from the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._used_by: dict[_Account, int] = {}
        self._waiting: deque[tuple[int, _Account | None, asyncio.Future[None]]] = deque()

    def hold(self) -> Held:
        return Held(self)

    def take(self, size: int, account: _Account | None = None) -> bool:
        if self.used + size > self.limit or not self._is_fair(size, account):
            return False
        self.charge(size, account)
        return True

    def charge(self, size: int, account: _Account | None) -> None:
        """As ``take``, whether or not there is room: it is in memory already."""
        self.used += size
        if account is not None and size:
            self._used_by[account] = self._used_by.get(account, 0) + size

    def _is_fair(self, size: int, account: _Account | None) -> bool:
        # A request whose subject holds nothing yet gets what it wants, if it is there.
        held = 0 if account is None else self._used_by.get(account, 0)
        return not held or held + size <= _SHARE * (self.limit - self.used)

    def give(self, size: int, account: _Account | None = None) -> None:
        self.used -= size
        if account is not None and size:
            left = self._used_by[account] - size
            if left:
                self._used_by[account] = left
            else:
                del self._used_by[account]
        if self._waiting:
            self._serve()

    def _serve(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        while waiting:
            entry = waiting.popleft()
            size, account, future = entry
            if future.done():
                continue
            if self.take(size, account):
                future.set_result(None)
                continue
            self._waiting.append(entry)
            if self._is_fair(size, account):
                # In order, so that small pages do not overtake a large one without end. Only who
                # holds more than its share lets others pass.
                break
        self._waiting.extend(waiting)

    async def wait(self, size: int, account: _Account | None = None) -> None:
        """Take ``size``, as soon as there is room. Raises ``TimeoutError``."""
        if not self._waiting and self.take(size, account):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, account, future))
        self._serve()
        try:
            async with asyncio.timeout(ROOM_WAIT_S):
                await future
        except BaseException:
            if future.done() and not future.cancelled():
                self.give(size, account)
            else:
                # What waited behind it may fit.
                future.cancel()
                self._serve()
            raise


class Held:
    """What one request holds of the budget, given back at the end of the block."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = 0
        self._account: _Account | None = None

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def charge(self, account: _Account) -> None:
        """To whom it counts from now on, with what is held already."""
        size = self._size
        self.clear()
        self._account = account
        self._budget.charge(size, account)
        self._size = size

    def take(self, size: int) -> None:
        """Raises ``ServerBusyError``: who is sending would not be read while it waits."""
        if self._size + size <= SMALL_BYTES:
            self._budget.charge(size, self._account)
        elif not self._budget.take(size, self._account):
            raise no_room()
        self._size += size

    def try_reserve(self, size: int) -> bool:
        """As ``reserve``, if there is room at once."""
        self.clear()
        if not self._budget.take(size, self._account):
            return False
        self._size = size
        return True

    async def reserve(self, size: int) -> None:
        """Room for an answer; what its request held is done with. Raises ``ServerBusyError``."""
        self.clear()
        try:
            await self._budget.wait(size, self._account)
        except TimeoutError as error:
            raise no_room() from error
        self._size = size

    def resize(self, size: int) -> None:
        """What was reserved turned out to be ``size``. A page over it, one large transaction, is
        in memory by now, so that is not asked any more."""
        change = self._size - size
        self._size = size
        if change >= 0:
            self._budget.give(change, self._account)
        else:
            self._budget.charge(-change, self._account)

    def clear(self) -> None:
        size, self._size = self._size, 0
        if size:
            self._budget.give(size, self._account)


def no_room() -> ServerBusyError:
    return ServerBusyError("too much is under way on this server", retry_after=RETRY_S)

"""The threads of a running app, and what is bound to one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

from entidb.errors import SyncError
from entidb.events import SafeEvent, Thread
from entidb.protocol import PullRequest, PushResponse
from entidb.server.admin.local import open_door
from entidb.server.admin.opening import office_of
from entidb.server.away import come_again
from entidb.server.chores import log_failure
from entidb.server.cores import run_anywhere
from entidb.server.deadlines import within
from entidb.server.live import LiveChannels
from entidb.server.news import News
from entidb.server.passes import Passes, settle
from entidb.server.room import no_room
from entidb.server.server import SyncServer
from entidb.server.stores import Store

T = TypeVar("T")
_UNPACKERS: Final = 2
#: Threads that read, and that ask, where that waits for a network. Fewer than connections.
_READERS: Final = 4
#: Seconds that a request waits there for a database to be opened, or a push to be decided.
_ANSWER_S: Final = 15.0
_ASKERS: Final = 4
#: Seconds that a pull waits for the pages in front of it before it gets the answer to come again.
LINE_WAIT_S: Final = 15.0
#: Pages of one database being read or waiting in front of the reader; the rest wait and hold no
#: room. With one more the reader would not idle between two of them, and with many a database
#: would be served before all others.
PAGES_AHEAD: Final = 2
_HOUSEKEEP_S: Final = 30.0


# ---------------------------------------------------------------- threads


class AppThreads:
    """Threads, and what is bound to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: SyncServer) -> None:
        self.loop = loop
        # Readers of files must not pile up; those of a network wait, and others read meanwhile.
        waits = server.place.waits
        self.reader = ThreadPoolExecutor(
            _READERS if waits else 1, "entidb-reader", initializer=run_anywhere
        )
        #: For questions that are answered in a moment, where even those wait for a network; else
        #: they are asked on the event loop.
        self.asker = ThreadPoolExecutor(_ASKERS, "entidb-asker") if waits else None
        self.opener = ThreadPoolExecutor(1, "entidb-opener")
        self.unpackers = ThreadPoolExecutor(_UNPACKERS, "entidb-unpacker", initializer=run_anywhere)
        #: Who reads and who waits to read, by database; there as long as somebody does.
        self._lines: dict[str, _Line] = {}
        #: Answers of the writers' threads on their way to the loop, with their databases.
        self.ready: deque[
            tuple[str, asyncio.Future[PushResponse | SyncError], PushResponse | SyncError]
        ] = deque()
        self.passes = Passes(loop)
        # Half of the connections at most: those who wait must leave room for those who ask.
        most = min(server.config.live_max, server.config.connections_max // 2)
        self.live = LiveChannels(loop, most, server.config.live_subject_max)
        self._server = server
        self._stop = SafeEvent()
        server.stores.on_group = self._wake
        if server.stores.gate is not None:
            server.stores.gate.manners = self.passes
        source = server.place.news()
        self._news = None if source is None else News(source, self.live)
        server.stores.hears = self._news is None
        server.stores.on_commit = self.live.told if self._news is None else self._news.committed
        server.stores.on_open = self.live.opened
        server.stores.tell_pages(server.registry.pulled)
        self._housekeeper = Thread(target=self._housekeep, name="entidb-housekeeper", daemon=True)
        self._housekeeper.start()
        # Of several processes only one has it (``workers.team``).
        self._door = None if server.family is not None else open_door(office_of(server))

    async def ask(self, call: Callable[..., T], *arguments: Any) -> T:
        """What ``call`` answers in a moment: at once, or on a thread where it waits for a
        network."""
        if self.asker is None:
            return call(*arguments)
        return await self.loop.run_in_executor(self.asker, partial(call, *arguments))

    async def bounded(self, answer: Awaitable[T]) -> T:
        """``answer``, which may take for ever where it comes over a network: a commit waits for
        its standby, for one. Raises ``ServerBusyError`` then; what became of it the device hears
        when it asks again."""
        if self.asker is None:
            return await answer
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError as error:
            raise come_again() from error

    def is_near(self, store: Store, request: PullRequest) -> bool:
        """Whether a page is read on the event loop: it waits for no disk, and for no network."""
        return self.asker is None and store.has_in_memory(request)

    @asynccontextmanager
    async def line(
        self, db_id: str, *, small: bool = False, brought: object = None
    ) -> AsyncIterator[bool]:
        """A turn among those who read pages of ``db_id``; False for who wants a ``small`` page and
        need not wait for one any more, as ``hurry`` says, or was taken along: ``brought`` is what
        ``take_along`` gives to who does. Raises ``ServerBusyError``."""
        line = self._lines.get(db_id)
        if line is None:
            line = self._lines[db_id] = _Line()
        line.members += 1
        try:
            try:
                has_turn = line.take() or await within(LINE_WAIT_S, line.wait(small, brought))
            except TimeoutError as error:
                # Those in front may be clients that have stopped reading: a pull that waits behind
                # them gets an answer, instead of finding out by a timeout of its own.
                raise no_room() from error
            try:
                yield has_turn
            finally:
                if has_turn:
                    line.give()
        finally:
            line.members -= 1
            if not line.members:
                del self._lines[db_id]

    def take_along(
        self, db_id: str, most: int, suits: Callable[[object], bool]
    ) -> list[tuple[asyncio.Future[bool], Any]]:
        """For who has a turn: up to ``most`` of those that wait for one, in their order, whose
        ``brought`` suits; each waits for the future that comes with it."""
        return self._lines[db_id].take_along(most, suits)

    def hurry(self, db_id: str) -> None:
        """Small pages of ``db_id`` are read at once from now on: those who wait for one must not
        be behind all that come after them."""
        self._lines[db_id].hurry()

    def _wake(self) -> None:
        """One wakeup of the loop for all answers of a group."""
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The loop is closed: nothing waits for these answers any more, and the devices ask
            # again (R5).
            self.ready.clear()

    def _deliver(self) -> None:
        while self.ready:
            db_id, future, answer = self.ready.popleft()
            self.passes.put(db_id, partial(settle, future, answer))

    def _housekeep(self) -> None:
        config = self._server.config
        pause = min(_HOUSEKEEP_S, config.purge_interval_s, (config.idle_close_s or 60.0) / 2)
        while not self._server.clock.wait(self._stop, max(pause, 0.1)):
            try:
                self._server.housekeep()
            except Exception as error:
                # The next round may work, and without housekeeping nothing is ever closed.
                log_failure(error, "housekeeping failed")

    def close(self) -> None:
        self._stop.set()
        if self._door is not None:
            self._door.close()
        self._housekeeper.join()
        if self._news is not None:
            self._server.stores.on_commit = self.live.told
            self._news.close()
        self.reader.shutdown()
        if self.asker is not None:
            self.asker.shutdown()
        self.opener.shutdown()
        self.unpackers.shutdown()


class _Line:
    """Who reads pages of a database, and who waits to: ``members`` in all."""

    def __init__(self) -> None:
        self.members = 0
        self._free = PAGES_AHEAD
        self._waiting: deque[tuple[asyncio.Future[bool], bool, object]] = deque()

    def take(self) -> bool:
        """A turn, if one is free."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self, small: bool, brought: object = None) -> bool:
        """Until it is a turn's time (True), or none is needed (False)."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, small, brought))
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.result():
                self.give()  # it came too late
            turn.cancel()
            raise

    def give(self) -> None:
        """Give a turn back: it is that of the next who waits."""
        while self._waiting:
            turn, _, _ = self._waiting.popleft()
            if not turn.done():
                turn.set_result(True)
                return
        self._free += 1

    def take_along(
        self, most: int, suits: Callable[[object], bool]
    ) -> list[tuple[asyncio.Future[bool], Any]]:
        taken: list[tuple[asyncio.Future[bool], Any]] = []
        left: deque[tuple[asyncio.Future[bool], bool, object]] = deque()
        while self._waiting and len(taken) < most:
            turn, small, brought = self._waiting.popleft()
            if turn.done():
                continue
            if brought is not None and suits(brought):
                taken.append((turn, brought))
            else:
                left.append((turn, small, brought))
        left.extend(self._waiting)
        self._waiting = left
        return taken

    def hurry(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, deque()
        for turn, small, brought in waiting:
            if not small:
                self._waiting.append((turn, small, brought))
            elif not turn.done():
                turn.set_result(False)

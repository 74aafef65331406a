"""The threads of a running app, and what is bound to one event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from entidb.errors import SyncError
from entidb.protocol import PushResponse
from entidb.server.admin.local import open_door
from entidb.server.admin.opening import office_of
from entidb.server.live import LiveChannels
from entidb.server.room import no_room
from entidb.server.server import SyncServer

logger = logging.getLogger("entidb.server")
_UNPACKERS: Final = 2
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
        self.reader = ThreadPoolExecutor(1, "entidb-reader")
        self.opener = ThreadPoolExecutor(1, "entidb-opener")
        self.unpackers = ThreadPoolExecutor(_UNPACKERS, "entidb-unpacker")
        #: Who reads and who waits to read, by database; there as long as somebody does.
        self._lines: dict[str, _Line] = {}
        #: Answers of the writers' threads on their way to the loop.
        self.ready: deque[
            tuple[asyncio.Future[PushResponse | SyncError], PushResponse | SyncError]
        ] = deque()
        # Half of the connections at most: those who wait must leave room for those who ask.
        most = min(server.config.live_max, server.config.connections_max // 2)
        self.live = LiveChannels(loop, most, server.config.live_subject_max)
        self._server = server
        self._stop = threading.Event()
        server.stores.on_group = self._wake
        server.stores.on_commit = self.live.told
        server.stores.on_open = self.live.opened
        server.stores.tell_pages(server.registry.pulled)
        self._housekeeper = threading.Thread(
            target=self._housekeep, name="entidb-housekeeper", daemon=True
        )
        self._housekeeper.start()
        # Of several processes only one has it (``workers.team``).
        self._door = None if server.family is not None else open_door(office_of(server))

    @asynccontextmanager
    async def line(self, db_id: str) -> AsyncIterator[None]:
        """A turn among those who read pages of ``db_id``. Raises ``ServerBusyError``."""
        line = self._lines.get(db_id)
        if line is None:
            line = self._lines[db_id] = _Line(asyncio.Semaphore(PAGES_AHEAD))
        line.members += 1
        try:
            try:
                async with asyncio.timeout(LINE_WAIT_S):
                    await line.turns.acquire()
            except TimeoutError as error:
                # Those in front may be clients that have stopped reading: a pull that waits behind
                # them gets an answer, instead of finding out by a timeout of its own.
                raise no_room() from error
            try:
                yield
            finally:
                line.turns.release()
        finally:
            line.members -= 1
            if not line.members:
                del self._lines[db_id]

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
            future, answer = self.ready.popleft()
            if not future.done():
                future.set_result(answer)

    def _housekeep(self) -> None:
        config = self._server.config
        pause = min(_HOUSEKEEP_S, config.purge_interval_s, (config.idle_close_s or 60.0) / 2)
        while not self._server.clock.wait(self._stop, max(pause, 0.1)):
            try:
                self._server.housekeep()
            except Exception:
                # The next round may work, and without housekeeping nothing is ever closed.
                logger.exception("housekeeping failed")

    def close(self) -> None:
        self._stop.set()
        if self._door is not None:
            self._door.close()
        self._housekeeper.join()
        self.reader.shutdown()
        self.opener.shutdown()
        self.unpackers.shutdown()


@dataclass
class _Line:
    turns: asyncio.Semaphore
    members: int = 0

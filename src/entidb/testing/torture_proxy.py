"""A TCP proxy in bad weather: it delays, stalls, cuts, resets, and closes one direction.

One ``Link`` is one listening port in front of the server; each client of a torture run has its own.
Another thread sets what happens on it with ``weather``, until the next call. The proxy does not
understand HTTP: it cuts bytes anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

_CHUNK_BYTES: Final = 4096
#: Seconds. Closing a socket with this option set to zero sends RST instead of FIN.
_RESET_AT_ONCE: Final = struct.pack("ii", 1, 0)
_START_SECONDS: Final = 30.0
_STOP_ROUNDS: Final = 5


@dataclass(frozen=True)
class Weather:
    """What a link does to its connections, old and new.

    ``delay_s`` holds every chunk back. ``stall`` lets nothing through. ``refuse`` resets what
    connects. ``after_bytes`` more bytes pass, in both directions together, and then ``ending``
    happens once: ``"cut"`` closes the connection, ``"reset"`` resets it, ``"half"`` closes the
    direction the last byte went.
    """

    delay_s: float = 0.0
    stall: bool = False
    refuse: bool = False
    ending: str | None = None
    after_bytes: int = 0


FAIR: Final = Weather()


class Link:
    """One listening port on loopback, and the connections through it."""

    def __init__(self, seen: Counter[str]) -> None:
        #: (host, port) of the server, which has a new one after every restart; of several, the
        #: first that takes a connection. None are there while all are down.
        self.upstreams: tuple[tuple[str, int], ...] = ()
        self.port = 0
        self._seen = seen
        self._weather = FAIR
        self._left = 0
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        #: The loop itself refers to tasks weakly, and would lose one that waits long.
        self._serving: set[asyncio.Task[None]] = set()
        # Weak, for a loop holds each connection that is not down yet.
        self._open: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def set_weather(self, weather: Weather) -> None:
        """On the proxy's own thread."""
        self._weather = weather
        self._left = weather.after_bytes
        self._changed.set()
        self._changed = asyncio.Event()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A plain function, so that no connection is without its entry: a task that is cancelled
        # before its first step never runs a line.
        self._open.add(writer.transport)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._connect(reader, writer)
        except OSError:
            # The server is down or one side has gone: for the client it is all the same.
            _reset(writer)
        finally:
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._weather.refuse:
            self._seen["connections refused"] += 1
            _reset(writer)
            return
        far = await self._reach()
        if far is None:
            _reset(writer)
            return
        far_reader, far_writer = far
        self._open.add(far_writer.transport)
        ends = (writer, far_writer)
        pumps = (
            asyncio.create_task(self._pump(reader, far_writer, ends)),
            asyncio.create_task(self._pump(far_reader, writer, ends)),
        )
        try:
            await asyncio.gather(*pumps)
        finally:
            far_writer.close()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for place in self.upstreams:
            with contextlib.suppress(OSError):  # it is down, maybe another one is not
                return await asyncio.open_connection(*place)
        return None

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            await self._hold_back()
            ending = self._weather.ending
            if ending is not None and self._left < len(chunk):
                writer.write(chunk[: self._left])
                self._weather = FAIR  # once
                self._end(ending, writer, ends)
                return
            self._left -= len(chunk)
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def _hold_back(self) -> None:
        if self._weather.delay_s:
            self._seen["chunks delayed"] += 1
            await asyncio.sleep(self._weather.delay_s)
        if self._weather.stall:
            self._seen["chunks stalled"] += 1
        while self._weather.stall:
            await self._changed.wait()

    def _end(
        self,
        ending: str,
        writer: asyncio.StreamWriter,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        if ending == "half":
            self._seen["directions closed"] += 1
            writer.write_eof()
            return
        self._seen["connections reset" if ending == "reset" else "connections cut"] += 1
        for end in ends:
            if ending == "reset":
                _reset(end)
            else:
                end.close()

    def stop(self) -> None:
        """Accepts no more."""
        if self._server is not None:
            self._server.close()

    def break_all(self) -> None:
        """Also those that still have bytes to send: a loop that is closed under a connection
        leaves its socket open."""
        for transport in list(self._open):
            transport.abort()


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):  # it is gone already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_ONCE)
    writer.transport.abort()


class Proxy:
    """``count`` links, run by one thread. A context manager; every method may be called from any
    thread. ``seen`` counts what really happened to connections."""

    def __init__(self, count: int) -> None:
        self.seen: Counter[str] = Counter()
        self._count = count
        self._loop = asyncio.new_event_loop()
        self._links: list[Link] = []
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="torture-proxy", daemon=True)

    @property
    def ports(self) -> list[int]:
        return [link.port for link in self._links]

    def point_at(self, upstream: tuple[str, int] | None) -> None:
        """Where new connections go; None: nowhere, as when a server is down."""
        for link in self._links:
            link.upstreams = () if upstream is None else (upstream,)

    def balance(self, upstreams: tuple[tuple[str, int], ...]) -> None:
        """New connections go to any of these that takes them; each link has its own favourite."""
        for number, link in enumerate(self._links):
            first = number % max(1, len(upstreams))
            link.upstreams = upstreams[first:] + upstreams[:first]

    def weather(self, link: int, weather: Weather) -> None:
        self._loop.call_soon_threadsafe(self._links[link].set_weather, weather)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        self._links = [Link(self.seen) for _ in range(self._count)]
        for link in self._links:
            await link.start()
        self._started.set()
        await self._stop.wait()
        for link in self._links:
            link.stop()
        mine = asyncio.current_task()
        for _ in range(_STOP_ROUNDS):  # one accepted a moment ago has no task yet
            others = [task for task in asyncio.all_tasks() if task is not mine]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for link in self._links:
                link.break_all()
            await asyncio.sleep(0)  # the loop's turn: accepts, and takes down what is broken

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(_START_SECONDS):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

"""A line of so many bytes a second, and so much time from one end to the other, between a device
and its server: a TCP proxy in this process, which also counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

_CHUNK_BYTES: Final = 16 * 1024
#: What waits before the line at most, as in a router of a real one: without it the line would
#: stand still whenever this process is late.
_QUEUE_S: Final = 0.03
_START_S: Final = 30.0


class Line:
    """One line to the server at ``url``; both directions are as fast. ``down`` counts the bytes
    that came from the server; ``on_bytes`` is called with that number whenever it grows."""

    def __init__(self, url: str, *, bytes_per_s: float | None = None, delay_s: float = 0.0) -> None:
        target = urlsplit(url)
        self._host, self._port = target.hostname or "localhost", target.port or 80
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self.down = 0
        self.on_bytes: Callable[[int], None] | None = None
        self.url = ""
        #: When each direction has sent what it was given.
        self._free_at = {True: 0.0, False: 0.0}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_START_S):
            raise RuntimeError("the line did not begin")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0)
        )
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            self._pump(reader, back, down=False), self._pump(there, writer, down=True)
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool
    ) -> None:
        # What is on its way: bounded, so that a fast server is held back as by a real line.
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        delivery = asyncio.create_task(self._deliver(on_its_way, writer, down=down))
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                now = self._loop.time()
                begin = max(now, self._free_at[down])
                took = len(chunk) / self._bytes_per_s if self._bytes_per_s else 0.0
                self._free_at[down] = begin + took
                await on_its_way.put((begin + took + self._delay_s, chunk))
                await asyncio.sleep(max(0.0, begin - now - _QUEUE_S))
        await on_its_way.put((0.0, b""))
        await delivery

    async def _deliver(
        self,
        on_its_way: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        *,
        down: bool,
    ) -> None:
        gone = False
        while True:
            due, chunk = await on_its_way.get()
            if not chunk:
                break
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            if down:
                self.down += len(chunk)
                if self.on_bytes is not None:
                    self.on_bytes(self.down)
            if gone:
                continue
            try:
                writer.write(chunk)
                await writer.drain()
            except OSError:
                gone = True
        with contextlib.suppress(OSError):
            writer.close()

"""TLS handshakes that are under way: how many there may be at once, of one address and of all.

Until its handshake is over a connection is none that the server could answer, or close for another
one (``connections``): it has an open file and an address, no more. The time of each is bounded, and
here their number is: who is one too many takes the place of the one of the same address that has
been at it for longest, unless that has just begun; then the new one is closed.

So connections are accepted here, and are the server's when their handshake is over. Belongs to one
event loop.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any, Final, cast

#: One part in so many of all connections may be such, and one in so many of those from one address.
ALL_PART: Final = 2
ADDRESS_PART: Final = 2
#: At least, of all and from one address.
_LEAST: Final = 16
#: Seconds that a handshake gets before another one may take its place.
_FIRST_S: Final = 1.0

ProtocolFactory = Callable[[], asyncio.Protocol]


def _nothing(code: str) -> None:
    return None


class Handshakes:
    """Those of one server. ``most`` connections are taken in all; ``told`` hears ``busy`` for each
    that is closed because there are too many."""

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[str], None] = _nothing,
    ) -> None:
        self.most: Final = max(_LEAST, most // ALL_PART)
        self.most_of_address: Final = max(_LEAST, self.most // ADDRESS_PART)
        self._clock, self._told = clock, told
        #: In the order in which they began, with the time.
        self._under_way: dict[ShakingHands, float] = {}
        self._of_address: dict[str, dict[ShakingHands, None]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, arriving: ShakingHands) -> bool:
        """Count it; False where there is no room for it."""
        of_address = self._of_address.get(arriving.host, {})
        if len(of_address) >= self.most_of_address:
            has_room = self._end_first(of_address)
        else:
            has_room = len(self._under_way) < self.most or self._end_first(self._under_way)
        if not has_room:
            self._told("busy")
            return False
        self._under_way[arriving] = self._clock()
        self._of_address.setdefault(arriving.host, {})[arriving] = None
        return True

    def _end_first(self, several: dict[ShakingHands, Any]) -> bool:
        first = next(iter(several))
        if self._clock() - self._under_way[first] < _FIRST_S:
            return False
        self.end(first)
        first.hang_up()
        self._told("busy")
        return True

    def end(self, arriving: ShakingHands) -> None:
        """It is over, in whatever way. Idempotent."""
        if self._under_way.pop(arriving, None) is None:
            return
        of_address = self._of_address[arriving.host]
        del of_address[arriving]
        if not of_address:
            del self._of_address[arriving.host]


class ShakingHands(asyncio.Protocol):
    """A connection from when it is accepted until its handshake is over. Then it is that of the
    protocol that ``make`` makes, with whatever came in before that was there."""

    def __init__(
        self,
        make: ProtocolFactory,
        context: ssl.SSLContext,
        limit_s: float,
        handshakes: Handshakes,
    ) -> None:
        self.host = ""
        self._make, self._context, self._limit_s = make, context, limit_s
        self._handshakes = handshakes
        self._transport: asyncio.Transport | None = None
        self._shaking: asyncio.Task[None] | None = None
        self._came: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = plain = cast("asyncio.Transport", transport)
        peer = plain.get_extra_info("peername")
        self.host = str(peer[0]) if peer else ""
        if not self._handshakes.begin(self):
            plain.abort()
            return
        self._shaking = asyncio.get_running_loop().create_task(self._shake(plain))

    async def _shake(self, plain: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        shaking = loop.create_task(
            loop.start_tls(
                plain,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._limit_s,
            )
        )
        loop.call_soon(self._pass_on, plain)
        try:
            shaken = await shaking
        except (OSError, RuntimeError, asyncio.CancelledError):
            # What is wrong with it is the business of who connects: it is told by TLS. The second
            # where the connection has gone before the handshake began.
            plain.abort()
            return
        finally:
            self._handshakes.end(self)
        if shaken is None or shaken.is_closing():
            plain.abort()
            return
        protocol = self._make()
        shaken.set_protocol(protocol)
        protocol.connection_made(shaken)
        for data in self._came:
            protocol.data_received(data)

    def _pass_on(self, plain: asyncio.Transport) -> None:
        """The handshake has taken the connection. What came in before is for it, when it has
        begun, and before what comes next: nothing is read meanwhile."""
        early, self._came = b"".join(self._came), []
        taker = plain.get_protocol()
        if early and taker is not self:
            # Of every event loop it is one with a buffer, though not by its class.
            buffered = cast("asyncio.BufferedProtocol", taker)
            asyncio.get_running_loop().call_soon(_feed, buffered, early)

    def hang_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._came.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._handshakes.end(self)


def _feed(taker: asyncio.BufferedProtocol, data: bytes) -> None:
    while data:
        room = memoryview(taker.get_buffer(len(data)))
        taken = min(len(room), len(data))
        room[:taken] = data[:taken]
        taker.buffer_updated(taken)
        data = data[taken:]


__all__ = ["ShakingHands", "Handshakes", "ProtocolFactory"]

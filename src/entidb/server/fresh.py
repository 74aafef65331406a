"""Who is revoked, known anew before a request is answered: for the event loop, where that is asked
over a network. One look serves all requests that wait for it.
"""

from __future__ import annotations

import asyncio
from typing import Final

from entidb.server.control import Control, unread_error

#: Seconds that a request waits for the look.
_WAIT_S: Final = 2.0


class Freshness:
    """Of one app; used from its event loop."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._looking: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Raises ``ServerBusyError`` where it cannot be known in time."""
        if not self._control.far or not self._control.is_stale():
            return
        looking = self._looking
        if looking is None or looking.done():
            looking = self._looking = asyncio.ensure_future(
                asyncio.to_thread(self._control.freshen)
            )
            looking.add_done_callback(_heard)
        try:
            async with asyncio.timeout(_WAIT_S):
                await asyncio.shield(looking)
        except TimeoutError as error:
            raise unread_error() from error


def _heard(looking: asyncio.Future[None]) -> None:
    """Nobody may wait for it any more."""
    if not looking.cancelled():
        looking.exception()


__all__ = ["Freshness"]

"""One exchange in the place of a pull and a push (R6): what a device has goes together with what it
would push then, and the server decides the push only if a pull would have brought nothing.

For a device that is up to date, a push is one exchange then. One that is behind gets the first page
of its pull as the answer, nothing of its push was decided, and it goes on as if it had asked for
that page alone.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from entidb.errors import (
    ResetRequiredError,
    SyncCancelledError,
    SyncError,
    UpgradeRequiredError,
)
from entidb.protocol import PullRequest, PullResponse, RoundRequest, RoundResponse, SyncResponse
from entidb.sync.apply.seam import Look, PushBatch
from entidb.sync.exchange import Exchange, Step
from entidb.sync.grants import is_plain
from entidb.sync.pulling import Pulling
from entidb.sync.pushing import Pushing
from entidb.sync.refusal import TRY_AGAIN_CYCLES
from entidb.sync.state import SyncState

#: What is pushed together with a pull at most. A device that is behind sends it twice.
ROUND_OPERATIONS_MAX = 200
ROUND_BYTES_MAX = 64 * 1024
FEATURE = "sync"
#: After so many failures in a row, each of which left the outcome open, while pushes by themselves
#: went through, something on the way stops rounds and nothing else.
FAILURES_MAX = 3


@dataclass
class Rounds:
    """``ask`` is what a cycle calls, once, in the place of its first request for a page."""

    _exchange: Exchange
    _pulling: Pulling
    _pushing: Pushing

    def ask(
        self, look: Look
    ) -> Generator[Step, SyncResponse | None, tuple[PullRequest, PullResponse] | None]:
        """The first page of the pull, with the request that it answers; what was pushed with it is
        settled. None where nothing was asked: then a pull is asked for as ever."""
        exchange = self._exchange
        if FEATURE not in exchange.connection.features:
            return None
        if not look.ready or not is_plain(look) or self._is_stopped():
            return None
        batch = exchange.applier.prepare(
            self._pushing.limits(look.sequence, ROUND_OPERATIONS_MAX, ROUND_BYTES_MAX)
        )
        if batch is None:
            return None
        exchange.enter(SyncState.PUSHING)
        now = exchange.applier.look()
        asked = RoundRequest(
            pull=self._pulling.request(now), push=self._pushing.request(batch, now.state)
        )
        response = yield from self._exchanged(asked, batch)
        exchange.enter(SyncState.PULLING)
        if response is None:
            return None
        if response.push is None:
            # Nothing else may touch what is in flight, and a page is about to (R5).
            exchange.applier.unsend()
        else:
            self._pushing.settle_alone(batch, response.push, look.ready)
        return asked.pull, response.pull

    def _is_stopped(self) -> bool:
        """Whether rounds failed too often; now and then one is tried again."""
        connection = self._exchange.connection
        if connection.round_failures < FAILURES_MAX:
            return False
        connection.rounds_left_out += 1
        if connection.rounds_left_out > TRY_AGAIN_CYCLES:
            connection.rounds_left_out = 0
            return False
        return True

    def _exchanged(
        self, request: RoundRequest, batch: PushBatch
    ) -> Generator[Step, SyncResponse | None, RoundResponse | None]:
        """The answer; None where it was refused, and proves that nothing was decided."""
        connection = self._exchange.connection
        path = connection.path
        try:
            response = yield from self._exchange.ask(request, RoundResponse)
        except SyncError as error:
            refused = error.refused_by is not None and not path.is_chance(error, batch.bytes)
            if not refused and not isinstance(error, ResetRequiredError | UpgradeRequiredError):
                # The push that settles it (R5) shows whether the way lets that through.
                connection.round_failures += not isinstance(error, SyncCancelledError)
                raise
            # The pull or the push will get the reason, each by itself.
            self._exchange.applier.unsend()
            connection.features = [name for name in connection.features if name != FEATURE]
            return None
        connection.round_failures = 0
        path.passed(batch.bytes)
        return response


__all__ = ["Rounds"]

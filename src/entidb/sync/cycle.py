"""One sync cycle, written once and straight down, without I/O.

``cycle()`` is a generator of requests that is sent responses; its driver does the I/O, and throws a
``SyncError`` in where that failed. Dropping the generator is a crash: everything that matters is
durable before each ``yield``. The order of things is here; what is asked for in each of its halves
is in ``pulling`` and ``pushing``.

    connect? ─▶ settle what is in flight (R5) ─▶ pull to the head (R6) ─▶ push batches ─▶ synced
                                                  ▲                          │ conflicts (R7)
                                                  └──────────────────────────┘ rounds_max times
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator

from entidb.errors import HistoryChangedError, UpgradeRequiredError, VersionMismatchError
from entidb.protocol import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    HandshakeRequest,
    HandshakeResponse,
    PushResult,
    SyncResponse,
)
from entidb.sync.apply.position import check_replica_of, gone_back
from entidb.sync.apply.seam import Look, SyncApplier
from entidb.sync.apply.signing import sent_by_others
from entidb.sync.config import SyncConfig
from entidb.sync.exchange import Connection, Exchange, Flow, SendAhead, Step
from entidb.sync.pulling import Pulling
from entidb.sync.pushing import Pushing
from entidb.sync.refusal import closed
from entidb.sync.rounds import Rounds
from entidb.sync.state import SyncProgress, SyncState


class Cycle:
    """One cycle. ``enter`` is called with every state, ``progress`` with what was done, ``check``
    is called between steps and raises to cancel (R9). ``is_connected`` says that the handshake
    holds."""

    def __init__(
        self,
        applier: SyncApplier,
        config: SyncConfig,
        connection: Connection,
        *,
        enter: Callable[[SyncState], None] = lambda state: None,
        progress: Callable[[SyncProgress], None] = lambda progress: None,
        check: Callable[[], None] = lambda: None,
        answers: deque[tuple[list[int], list[PushResult]]] | None = None,
    ) -> None:
        self.exchange = Exchange(applier, config, connection, enter, progress, check)
        if answers is not None:
            self.exchange.answers = answers
        self._pulling = Pulling(self.exchange)
        self._pushing = Pushing(self.exchange)
        self._rounds = Rounds(self.exchange, self._pulling, self._pushing)
        self.result = self.exchange.result

    def run(self) -> Flow:
        """The cycle. Returns its result; raises ``SyncError`` subclasses, with everything that
        was settled or applied until then kept."""
        self.exchange.connection.path.begin_cycle()
        fresh = not self.exchange.connection.made
        if fresh:
            # It may have come from another server, or to somebody else.
            self.exchange.connection.carried.put(None)
            yield from self._connect()
        applier = self.exchange.applier
        look, subject = applier.look(), self.exchange.connection.subject
        if subject is not None and look.state.subject != subject:
            # Another process may have synced as somebody else since (R36).
            applier.sign_in(subject)
            look = applier.look()
        if look.inflight is not None:
            applier.doubt()
            if sent_by_others(look.state, [*look.inflight.ranges, *look.inflight.after]):
                # Not under another subject, not even again (R36): the pull shows what became of it.
                applier.unsend()
            elif inflight := applier.inflight():
                self.exchange.enter(SyncState.PUSHING)
                yield from self._pushing.push_again(inflight)
            look = applier.look()
        too_old: UpgradeRequiredError | None = None
        for _ in range(self.exchange.config.rounds_max):
            self.result.rounds += 1
            self.exchange.enter(SyncState.PULLING)
            if look.adopting:
                look = self._adopted()
            if fresh:
                # Not before what is in flight was settled: nothing else may touch that (R5).
                self._pulling.heed_grant(self.exchange.connection.granted)
                look, fresh = applier.look(), False
            first, pulled = None, False
            try:
                if self.result.rounds == 1:
                    waiting = self.exchange.connection.carried.waiting
                    came = self._pulling.carried(look) if waiting else None
                    if came is not None:
                        yield from self._pulling.pull(look, came)
                        look, pulled = applier.look(), True
                    if look.ready:
                        first = yield from self._rounds.ask(look)
                        look, pulled = applier.look(), False
                if not pulled:
                    yield from self._pulling.pull(look, first)
            except UpgradeRequiredError as error:
                too_old = error
                self._check_may_push(error)
            look = applier.look()
            if look.adopting:
                look = self._adopted()
            again = yield from self._pushing.push_ready(look)
            if too_old is not None:
                self._pushing.tell_kept_back()
                raise too_old
            if not again:
                break
            look = applier.look()
        else:
            self.result.incomplete = True
        self._pushing.tell_kept_back()
        if self._pushing.closed_by is not None:
            raise closed(self._pushing.closed_by)
        self.exchange.enter(SyncState.SYNCED)
        return self.result

    def _connect(self) -> Generator[Step, SyncResponse | None, None]:
        self.exchange.enter(SyncState.CONNECTING)
        state = self.exchange.applier.look().state
        check_replica_of(state, self.exchange.config.db_id)
        request = HandshakeRequest(
            major=PROTOCOL_MAJOR,
            minor=PROTOCOL_MINOR,
            db_id=self.exchange.config.db_id,
            device_id=self.exchange.applier.device_id,
            history=state.history,
            cursor=state.cursor,
            client=self.exchange.config.client,
            schema=self.exchange.config.schema,
        )
        response = yield from self.exchange.ask(request, HandshakeResponse)
        if response.major != PROTOCOL_MAJOR:
            raise VersionMismatchError(
                f"the server speaks protocol {response.major}.{response.minor}, this client "
                f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}: update the older side"
            )
        if state.history is not None and state.history != response.history:
            if state.db_id is None:  # begun with a snapshot, and not synchronised since
                raise HistoryChangedError(
                    "this device began with a snapshot of another database than "
                    f"{self.exchange.config.db_id!r} at this address: check both. If it is the "
                    "right one, and was restored or made anew since, begin with a newer snapshot "
                    "in another directory",
                    code="other_snapshot",
                )
            raise HistoryChangedError(
                "the server's database has another history than the one this device knows: it was "
                'restored from a backup or made anew. Choose reset(keep="server") to take its '
                'state, or reset(keep="device") to commit again what it no longer has'
            )
        if response.head < state.cursor:
            raise gone_back(state.cursor, response.head)  # R29
        self.exchange.connection.history = response.history
        self.exchange.connection.features = response.features
        looks = "schema" in response.features
        self.exchange.connection.schema = self.exchange.config.schema if looks else 0
        if state.history is None:
            # The server has time for a page while this device stores whose replica it is.
            beginning = self._pulling.beginning(response)
            if beginning is not None:
                yield SendAhead(beginning)
        self.exchange.applier.bind(self.exchange.config.db_id, response.history, response.subject)
        self.exchange.connection.limits = response.limits
        self.exchange.connection.asked = None  # with the limits of before
        self.exchange.connection.granted = response.granted
        self.exchange.connection.subject = response.subject

    def _check_may_push(self, error: UpgradeRequiredError) -> None:
        """This program is too old to pull. What is pending is pushed all the same (R33), but not
        where versions are of another history: raises ``error`` there."""
        state = self.exchange.applier.look().state
        if state.foreign or state.foreign_names:
            raise error

    def _adopted(self) -> Look:
        """The device when nothing is left to be made pending (R29, R31)."""
        while self.exchange.applier.adopt():
            self.exchange.check()
        return self.exchange.applier.look()

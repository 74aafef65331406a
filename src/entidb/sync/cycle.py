"""One sync cycle, written once and straight down, without I/O.

``cycle()`` is a generator of requests that is sent responses; whoever drives it does the I/O, and
throws a ``SyncError`` in where that failed. Dropping the generator is a crash: everything that
matters is durable before each ``yield``.

    connect? ─▶ settle what is in flight (R5) ─▶ pull to the head (R6) ─▶ push batches ─▶ synced
                                                  ▲                          │ conflicts (R7)
                                                  └──────────────────────────┘ rounds_max times
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from entidb.db.replica import ReplicaState, Stage
from entidb.errors import (
    HistoryChangedError,
    ProtocolError,
    ResetRequiredError,
    ServerError,
    SyncError,
    VersionMismatchError,
)
from entidb.protocol import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    HandshakeRequest,
    HandshakeResponse,
    Limits,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    SyncRequest,
    SyncResponse,
    expanded,
    operations_count,
    payload_bytes,
)
from entidb.sync.apply.position import check_replica_of
from entidb.sync.apply.report import RebaseReport
from entidb.sync.apply.seam import BatchLimits, PushBatch, Settled, SyncApplier
from entidb.sync.config import SyncConfig
from entidb.sync.grants import needs_grant
from entidb.sync.refusal import KeptBack, Path, Search, closed, is_for_good, is_forbidden
from entidb.sync.state import SyncCycleResult, SyncProgress, SyncState

#: A reset that has to start over more often than this in one cycle ends it; the next goes on.
RESETS_MAX = 3
#: The first page of a full pull at most.
FIRST_PAGE_OPERATIONS = 2000
#: Pages of one pull. What came until then is staged, and the next cycle goes on from there.
PAGES_MAX = 10_000


class Ahead(Struct, frozen=True):
    """A hint to the driver: this request will be asked for next, or after the one that is under
    way. It may be sent as soon as that one has its answer, while what came before is being staged
    or settled. Answered with None at once; ignoring it is fine."""

    request: SyncRequest


R = TypeVar("R", HandshakeResponse, PullResponse, PushResponse)
Step = SyncRequest | Ahead
Flow = Generator[Step, SyncResponse | None, SyncCycleResult]


@dataclass
class Connection:
    """What a handshake brought; kept between cycles until the transport reconnects (R10)."""

    history: bytes = b""
    limits: Limits | None = None
    features: list[str] = field(default_factory=list)
    path: Path = field(default_factory=Path)
    #: What the handshake said is granted; pulls say it again, and may say something else.
    granted: list[str] | None = None

    @property
    def made(self) -> bool:
        return self.limits is not None

    def forget(self) -> None:
        self.limits = None
        self.path.try_again()


class Cycle:
    """One cycle. ``enter`` is told every state, ``progress`` what was done, ``check`` is called
    between steps and raises to cancel (R9). ``is_connected`` says that the handshake holds."""

    def __init__(
        self,
        applier: SyncApplier,
        config: SyncConfig,
        connection: Connection,
        *,
        enter: Callable[[SyncState], None] = lambda state: None,
        progress: Callable[[SyncProgress], None] = lambda progress: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._applier = applier
        self._config = config
        self._connection = connection
        self._enter = enter
        self._progress = progress
        self._check = check
        self._pushed = self._pushed_bytes = 0
        #: The server's clock, as the newest pull said it.
        self._server_ms = 0
        self._search = Search()
        #: A verdict of this round asks for a pull before anything more is pushed.
        self._pull_due = False
        #: How a push with nothing in it is answered; asked when it has to be known.
        self._empty: SyncError | None = None
        self._asked_empty = False
        #: Why nothing can be pushed at all.
        self._closed: SyncError | None = None
        self.result = SyncCycleResult()

    def run(self) -> Flow:
        """The cycle. Returns its result; raises ``SyncError`` subclasses, with everything that
        was settled or applied until then kept."""
        self._connection.path.begin_cycle()
        fresh = not self._connection.made
        if fresh:
            yield from self._connect()
        inflight = self._applier.inflight()
        if inflight:
            self._applier.doubt()
            self._enter(SyncState.PUSHING)
            yield from self._push_again(inflight)
        for _ in range(self._config.rounds_max):
            self.result.rounds += 1
            self._enter(SyncState.PULLING)
            self._adopt()
            if fresh:
                # Not before what is in flight was settled: nothing else may touch that (R5).
                self._heed_grant(self._connection.granted)
                fresh = False
            yield from self._pull()
            self._adopt()
            again = yield from self._push_ready()
            if not again:
                break
        else:
            self.result.incomplete = True
        self._tell_kept_back()
        if self._closed is not None:
            raise closed(self._closed)
        self._enter(SyncState.SYNCED)
        return self.result

    # ------------------------------------------------------------ connecting

    def _connect(self) -> Generator[Step, SyncResponse | None, None]:
        self._enter(SyncState.CONNECTING)
        state = self._applier.state()
        check_replica_of(state, self._config.db_id)
        request = HandshakeRequest(
            major=PROTOCOL_MAJOR,
            minor=PROTOCOL_MINOR,
            db_id=self._config.db_id,
            device_id=self._applier.device_id,
            history=state.history,
            cursor=state.cursor,
            client=self._config.client,
        )
        response = yield from self._ask(request, HandshakeResponse)
        if response.major != PROTOCOL_MAJOR:
            raise VersionMismatchError(
                f"the server speaks protocol {response.major}.{response.minor}, this client "
                f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}: update the older side"
            )
        if state.history is not None and state.history != response.history:
            raise HistoryChangedError(
                "the server's database has another history than the one this device knows: it was "
                'restored from a backup or made anew. Choose reset(keep="server") to take its '
                'state, or reset(keep="device") to commit again what it no longer has'
            )
        _check_not_back(state, response)
        self._applier.bind(self._config.db_id, response.history)
        self._connection.history = response.history
        self._connection.limits = response.limits
        self._connection.features = response.features
        self._connection.granted = response.granted

    def _limits(self) -> BatchLimits:
        server, config = self._connection.limits, self._config
        assert server is not None, "a push comes after the handshake"
        # Half of the server's message leaves room for names, ids and heads around payloads.
        bytes_max = min(config.push_bytes_max, server.message_bytes_max // 2)
        return BatchLimits(
            operations_max=min(config.push_operations_max, server.push_operations_max),
            bytes_max=min(bytes_max, self._connection.path.bytes_max),
            transactions_max=self._search.transactions_max,
            collections_max=server.collections_max,
            without=frozenset(self._connection.path.kept),
            server_ms=self._server_ms,
        )

    # ------------------------------------------------------------ pushing

    def _push_again(self, batches: list[PushBatch]) -> Generator[Step, SyncResponse | None, None]:
        """Settle what was sent before (R5). Nothing new goes with it: what is built next is built
        on a fresh pull (R6)."""
        state, total = self._applier.state(), sum(len(batch.keys) for batch in batches)
        batch: PushBatch | None
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            try:
                response = yield from self._ask_push(batch, state)
            except _RefusedError as refused:
                # Whether it arrived when it was sent before is for the pull to say, and for the
                # server, which knows every transaction it has accepted (R14).
                self._applier.unsend()
                if refused.error.code == "too_large" and len(batch.keys) > 1:
                    self._connection.path.refused(batch.bytes)
                return
            self._settle(batch, response, None, following, total)

    def _push_ready(self) -> Generator[Step, SyncResponse | None, bool]:
        """Push what is ready, in batches that get through; whether a pull has to come before
        more. Ends: each turn settles, withdraws or keeps back transactions, or halves a limit."""
        limits = self._limits()
        while (batch := self._applier.prepare(limits)) is not None:
            self._enter(SyncState.PUSHING)
            self._pull_due = False
            try:
                if not self._search.active:
                    return (yield from self._push(batch))
                yield from self._push_alone(batch)
            except _RefusedError as refused:
                yield from self._take_refusal(refused.batch, refused.error)
            if self._pull_due or self._closed is not None:
                return self._pull_due
            # What is committed from now on waits for the next cycle.
            until = min(limits.sequence_max, self._applier.sequence())
            limits = replace(self._limits(), sequence_max=until)
        return False

    def _push_alone(self, batch: PushBatch) -> Generator[Step, SyncResponse | None, None]:
        """Push ``batch`` and none after it, while those are looked for that are refused."""
        self._pushed = self._pushed_bytes = 0
        response = yield from self._ask_push(batch, self._applier.state())
        self._pull_due = self._settle(batch, response, None, None, self._applier.ready()).pull
        self._search.passed(len(batch.keys))

    def _take_refusal(
        self, batch: PushBatch, error: SyncError
    ) -> Generator[Step, SyncResponse | None, None]:
        """A new batch was refused as a whole, and nothing of it was decided (R5). It counts as
        not sent; what it was refused for is cut smaller, looked for, withdrawn or kept back."""
        applier, path, count = self._applier, self._connection.path, len(batch.keys)
        if error.code == "too_large" and count > 1:
            applier.unsend()
            path.refused(batch.bytes)
            return
        if is_forbidden(error):
            yield from self._take_no_right(batch, error)
            return
        if not self._asked_empty:
            self._empty = yield from self._ask_empty()
            self._asked_empty = True
        if self._empty is not None:
            # It is not about any transaction, so none is withdrawn.
            applier.unsend()
            self._closed = error
            return
        if count == 1 and is_for_good(error):
            self._report(applier.refuse(batch, error.code, error.message))
        else:
            applier.unsend()
        if count == 1 and not is_for_good(error):
            sequence, identity = batch.sequences[0], batch.transactions[0].transaction_id
            path.kept[sequence] = KeptBack(sequence, identity, error.code, error.message)
        self._search.refused(count)

    def _take_no_right(
        self, batch: PushBatch, error: SyncError
    ) -> Generator[Step, SyncResponse | None, None]:
        """A server before 0.4 says with this that the token may not write; any server, that it
        grants nothing on this database, and then nothing is withdrawn. So what is pending is
        withdrawn only if a pull between two such answers was allowed, and a push is refused even
        with nothing in it."""
        path, seen = self._connection.path, self._connection.path.forbidden
        path.forbidden = True
        if seen and (yield from self._ask_empty()) is not None:
            self._report(self._applier.refuse(batch, error.code, error.message))
            return
        self._applier.unsend()
        self._pull_due = True

    def _ask_empty(self) -> Generator[Step, SyncResponse | None, SyncError | None]:
        """Whether a push is refused that has nothing in it: then it is not for what is in it."""
        state = self._applier.state()
        request = PushRequest(
            db_id=self._config.db_id,
            device_id=self._applier.device_id,
            history=_history(state),
            cursor=state.cursor,
            collections=[],
            transactions=[],
        )
        try:
            yield from self._ask(request, PushResponse)
        except SyncError as error:
            if error.refused_by is None:
                raise
            return error
        return None

    def _ask_push(
        self, batch: PushBatch, state: ReplicaState, request: PushRequest | None = None
    ) -> Generator[Step, SyncResponse | None, PushResponse]:
        """The verdicts on ``batch``. Raises ``_RefusedError`` where an answer proves that there
        are none; any other error leaves it open, and the batch in flight (R5)."""
        try:
            asked = self._push_request(batch, state) if request is None else request
            response = yield from self._ask(asked, PushResponse)
        except SyncError as error:
            if error.refused_by is None:
                raise
            raise _RefusedError(batch, error) from error
        self._connection.path.forbidden = False
        return response

    def _tell_kept_back(self) -> None:
        path = self._connection.path
        if path.kept:
            pending = self._applier.still_pending(path.kept)
            self.result.kept_back = path.forget_all_but(pending)

    def _push(self, batch: PushBatch) -> Generator[Step, SyncResponse | None, bool]:
        """Push ``batch`` and those after it; whether a pull has to come before more.

        While the server works on a batch, the answer to the one before it is settled and the next
        one is prepared, in one commit:

            server   │ batch 1   │ batch 2              │ batch 3              │ …
            device   │ prepare 2 │ settle 1, prepare 3  │ settle 2, prepare 4  │ …

        Each is durable as in flight before it can be sent (R5), goes out when the one before it
        is answered, and touches no entity of that one: so it is right whatever the answer was,
        and the server still gets everything in the order in which it was committed."""
        state, self._pushed, self._pushed_bytes = self._applier.state(), 0, 0
        limits = replace(self._limits(), sequence_max=self._applier.sequence())
        total = self._applier.ready()
        request = self._push_request(batch, state)
        following: PushBatch | None = None
        pull = False
        while True:
            if following is None and not pull and total > self._pushed + len(batch.keys):
                yield Ahead(request)
                following = self._applier.prepare_after(batch, limits)
            after = None if following is None else self._push_request(following, state)
            if after is not None:
                yield Ahead(after)
            response = yield from self._ask_push(batch, state, request)
            settled = self._settle(batch, response, None if pull else limits, following, total)
            pull = self._pull_due = pull or settled.pull
            if following is not None and after is not None:
                batch, request, following = following, after, settled.next_batch
            elif settled.next_batch is not None:
                batch = settled.next_batch
                request = self._push_request(batch, state)
            else:
                return pull

    def _settle(
        self,
        batch: PushBatch,
        response: PushResponse,
        limits: BatchLimits | None,
        following: PushBatch | None,
        total: int,
    ) -> Settled:
        settled = self._applier.settle(batch, response, limits, following)
        self._pushed += len(batch.keys)
        self._pushed_bytes += batch.bytes
        self.result.pushed += settled.accepted
        self.result.pushed_operations += settled.accepted_operations
        self.result.superseded += settled.superseded
        self.result.bytes_pushed += batch.bytes
        self._report(settled.report)
        done = self._pushed
        self._progress(SyncProgress(SyncState.PUSHING, done, self._pushed_bytes, max(total, done)))
        return settled

    def _push_request(self, batch: PushBatch, state: ReplicaState) -> PushRequest:
        return PushRequest(
            db_id=self._config.db_id,
            device_id=self._applier.device_id,
            history=_history(state),
            cursor=batch.cursor,
            collections=batch.collections,
            transactions=batch.transactions,
        )

    # ------------------------------------------------------------ pulling

    def _pull(self) -> Generator[Step, SyncResponse | None, None]:
        """Bring the database to the server's head, in one step for its readers (R20)."""
        reason = "moving its floor while everything is being pulled"
        for _ in range(RESETS_MAX):
            try:
                complete = yield from self._pull_once()
            except ResetRequiredError:
                # R28: below the floor; everything is pulled again, the outbox stays.
                self._applier.restart_stage(full=True)
                continue
            except _GrantChanged as change:
                # R31: nothing of that page counts, it was made under another grant.
                reason = "changing what it grants while that is being pulled"
                self._heed_grant(change.granted)
                continue
            if complete:
                return
        raise ServerError(f"the server keeps {reason}; sync again later")

    def _heed_grant(self, granted: list[str] | None) -> None:
        """Make what the server grants this device's own (R31)."""
        now = None if granted is None else sorted(granted)
        state = self._applier.state()
        if now != state.granted or needs_grant(state):
            self._check()
            self._report(self._applier.grant(now))

    def _ask_page(
        self, request: PullRequest, state: ReplicaState
    ) -> Generator[Step, SyncResponse | None, PullResponse]:
        """A page made under the grant that the device knows."""
        response = yield from self._ask(request, PullResponse)
        _check_not_back(state, response)
        self._server_ms = response.time
        granted = response.granted
        if granted != state.granted and (granted is None or sorted(granted) != state.granted):
            raise _GrantChanged(granted)
        return response

    def _pull_once(self) -> Generator[Step, SyncResponse | None, bool]:
        """One try; False if the floor moved under a full pull, which then starts over."""
        state, stage = self._applier.state(), self._applier.stage()
        if needs_grant(state):
            self._heed_grant(state.granted)
            state, stage = self._applier.state(), self._applier.stage()
        if stage is not None and (stage.history != state.history or stage.cursor != state.cursor):
            self._applier.restart_stage(full=False)
            stage = None
        full: list[str] | None = [] if stage is None else stage.full
        if stage is None and (state.full or state.uncovered):
            full = None if state.full else state.uncovered
        self.result.reset |= full is None and (state.cursor > 0 or state.foreign)
        if full != [] and (stage is None or not stage.full_done):
            # A cursor of 0 is no proof: the server may have been empty, and this device may have
            # pushed since. Then what the server no longer has must go, so it is staged.
            known = state.cursor > 0 or bool(state.have) or state.foreign or bool(state.outdated)
            known = known or bool(state.unsettled)
            first_sync = full is None and not known
            outcome = yield from self._pull_full(state, stage, full, first_sync)
            if outcome is not FullPull.STAGED:
                return outcome is FullPull.APPLIED
            stage = self._applier.stage()
        if full is not None:
            applied = yield from self._pull_delta(state, stage, full)
            if applied:
                return True
        self._check()
        self._report(self._applier.publish())
        return True

    def _pull_full(
        self, state: ReplicaState, stage: Stage | None, full: list[str] | None, first_sync: bool
    ) -> Generator[Step, SyncResponse | None, FullPull]:
        request = self._pull_request(state, 0 if stage is None else stage.full_cursor)
        columns = "columns" in self._connection.features
        request = replace(request, have=[], full=True, columns=columns)
        if full is not None:
            request = replace(request, collections=full)
        floor = None if stage is None else stage.floor
        done = size = 0
        usual = request.limit
        if stage is None:
            # Nothing can be done here before the first page is in, and it comes sooner.
            request = replace(request, limit=min(usual, FIRST_PAGE_OPERATIONS))
        for _ in range(PAGES_MAX):
            response = yield from self._ask_page(request, state)
            if floor is not None and response.floor != floor:
                self._applier.restart_stage(full=state.full)
                return FullPull.RESTARTED
            if first_sync and floor is None and not response.has_more:
                self._report(self._applier.apply(request, response))
                self._count(response, 0, 0)
                return FullPull.APPLIED
            floor = response.floor
            following = replace(request, cursor=response.cursor, limit=usual)
            if response.has_more:
                yield Ahead(following)
            self._check()
            self._applier.stage_page(request, response, full)
            done, size = self._count(response, done, size)
            if not response.has_more:
                return FullPull.STAGED
            request = following
        raise _endless()

    def _pull_delta(
        self, state: ReplicaState, stage: Stage | None, full: list[str]
    ) -> Generator[Step, SyncResponse | None, bool]:
        """What changed after the cursor. One page is applied at once (True); several, or what
        completes a widening, are staged."""
        cursor = state.cursor if stage is None else stage.delta_cursor
        request = self._pull_request(state, cursor)
        done = size = 0
        for _ in range(PAGES_MAX):
            response = expanded((yield from self._ask_page(request, state)))
            if stage is None and not full and not response.has_more:
                if not response.commits and state.cursor < response.cursor <= state.reached:
                    # R10: only own commits are new, so nothing needs to be stored now.
                    self._applier.confirm(response.cursor)
                elif response.commits or response.cursor != state.cursor:
                    self._check()
                    self._report(self._applier.apply(request, response))
                    self._count(response, done, size)
                return True
            following = replace(request, cursor=response.cursor)
            if response.has_more:
                yield Ahead(following)
            self._check()
            stage = self._applier.stage_page(request, response, full)
            done, size = self._count(response, done, size)
            if not response.has_more:
                return False
            request = following
        raise _endless()

    def _pull_request(self, state: ReplicaState, cursor: int) -> PullRequest:
        config, server = self._config, self._connection.limits
        assert server is not None
        return PullRequest(
            db_id=config.db_id,
            device_id=self._applier.device_id,
            history=_history(state),
            cursor=cursor,
            have=[(first, last) for first, last in state.have if last > cursor],
            limit=max(1, min(config.pull_operations_max, server.pull_operations_max)),
            bytes_max=config.pull_bytes_max,
            collections=self._applier.scope(),
        )

    # ------------------------------------------------------------ shared

    def _ask(self, request: SyncRequest, kind: type[R]) -> Generator[Step, SyncResponse | None, R]:
        self._check()
        self.result.requests += 1
        response = yield request
        if not isinstance(response, kind):
            raise ProtocolError(
                f"expected {kind.__name__}, the server answered {type(response).__name__}"
            )
        return response

    def _adopt(self) -> None:
        while self._applier.adopt():
            self._check()

    def _count(self, response: PullResponse, done: int, size: int) -> tuple[int, int]:
        operations, weight = operations_count(response), payload_bytes(response)
        self.result.bytes_pulled += weight
        if operations:
            total = done + operations if not response.has_more else None
            progress = SyncProgress(SyncState.PULLING, done + operations, size + weight, total)
            self._progress(progress)
        return done + operations, size + weight

    def _report(self, report: RebaseReport) -> None:
        self.result.pulled += report.pulled
        self.result.conflicts += report.resolved
        self.result.unresolved += report.unresolved
        self.result.withdrawn += report.withdrawn
        self.result.done += report.done
        self.result.overruled += report.overruled


class _RefusedError(Exception):
    """A push was refused as a whole, with an answer that proves that nothing was decided."""

    def __init__(self, batch: PushBatch, error: SyncError) -> None:
        super().__init__(str(error))
        self.batch = batch
        self.error = error


class _GrantChanged(Exception):
    """A page was made under another grant than the one this device knows."""

    def __init__(self, granted: list[str] | None) -> None:
        super().__init__(granted)
        self.granted = granted


class FullPull(Enum):
    """How pulling everything ended."""

    #: The head is reached; what came waits to be published.
    STAGED = "staged"
    #: A small first sync: one page, applied at once.
    APPLIED = "applied"
    #: The floor moved meanwhile; it starts over (R28).
    RESTARTED = "restarted"


def _endless() -> ServerError:
    return ServerError(
        f"the server has still more after {PAGES_MAX} pages; they are kept, so sync again to go "
        "on from there"
    )


def _check_not_back(state: ReplicaState, response: HandshakeResponse | PullResponse) -> None:
    """A full pull says nothing of the cursor, so it is the device that has to notice there that the
    server has gone back (R29)."""
    if response.head < state.cursor:
        raise HistoryChangedError(
            f"this device has seen commit {state.cursor}, and the server's database ends at "
            f"{response.head}: its files were replaced by older ones. Choose "
            'reset(keep="server") to take its state, or reset(keep="device") to commit again what '
            "it no longer has"
        )


def _history(state: ReplicaState) -> bytes:
    assert state.history is not None, "the handshake bound the history"
    return state.history

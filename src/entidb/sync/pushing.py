"""The half of a cycle that pushes: what is in flight first (R5), then what is ready, in batches.

What the answers do to the database is the applier's. A batch that is refused as a whole is cut
smaller, looked through, withdrawn or kept back here; ``refusal`` says which errors mean what.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from entidb.db.replica import ReplicaState
from entidb.errors import LOCKED_OUT, SyncError, TransportError
from entidb.protocol import PushRequest, PushResponse, SyncResponse
from entidb.sync.apply.position import is_unasked, seen_after
from entidb.sync.apply.seam import BatchLimits, Look, PushBatch, Settled
from entidb.sync.exchange import Exchange, SendAhead, Step, history_of
from entidb.sync.refusal import (
    KeptBack,
    Search,
    is_about_size,
    is_for_good,
    is_forbidden,
    still_open,
)
from entidb.sync.state import SyncProgress, SyncState
from entidb.types import SEQUENCE_MAX, SeenCommit


@dataclass
class Pushing:
    """``push_again`` and ``push_ready`` are what a cycle calls, in this order."""

    _exchange: Exchange
    #: Why nothing can be pushed at all.
    closed_by: SyncError | None = None
    _pushed: int = 0
    _pushed_bytes: int = 0
    _search: Search = field(default_factory=Search)
    #: A verdict of this round asks for a pull before anything more is pushed.
    _pull_due: bool = False
    #: How a push with nothing in it is answered; asked when it has to be known.
    _empty: SyncError | None = None
    _asked_empty: bool = False

    def push_again(self, batches: list[PushBatch]) -> Generator[Step, SyncResponse | None, None]:
        """Settle what was sent before (R5). Nothing new goes with it: what is built next is built
        on a fresh pull (R6)."""
        state, total = self._exchange.applier.look().state, sum(len(b.keys) for b in batches)
        batch: PushBatch | None
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            try:
                response = yield from self._ask_push(batch, state)
            except _RefusedError as refused:
                # Whether it arrived when it was sent before is for the pull to say, and for the
                # server, which knows every transaction it has accepted (R14).
                self._exchange.applier.unsend()
                if is_about_size(refused.error) and len(batch.keys) > 1:
                    self._exchange.connection.path.refused(batch.bytes)
                return
            except SyncError as error:
                said = still_open(error)
                if said is error:
                    raise
                raise said from error
            self._settle(batch, response, None, following, total)

    def push_ready(self, look: Look) -> Generator[Step, SyncResponse | None, bool]:
        """Push what is ready, in batches that get through; whether a pull has to come before
        more. Ends: each turn settles, withdraws or keeps back transactions, or halves a limit."""
        applier = self._exchange.applier
        # What is committed from now on waits for the next cycle.
        until = look.sequence
        while look.ready:
            limits = self.limits(until)
            batch = applier.prepare(limits)
            if batch is None:
                return False
            self._exchange.enter(SyncState.PUSHING)
            self._pull_due = False
            try:
                if not self._search.active:
                    return (yield from self._push(batch, limits, look))
                yield from self._push_alone(batch, look)
            except _RefusedError as refused:
                yield from self._take_refusal(refused.batch, refused.error)
            if self._pull_due or self.closed_by is not None:
                return self._pull_due
            look = applier.look()
        return False

    def limits(
        self, sequence_max: int, operations_max: int = SEQUENCE_MAX, bytes_max: int = SEQUENCE_MAX
    ) -> BatchLimits:
        """What the next batch may have; at most what the caller allows."""
        server, config = self._exchange.connection.limits, self._exchange.config
        assert server is not None, "a push comes after the handshake"
        # Half of the server's message leaves room for names, ids and heads around payloads.
        bytes_max = min(bytes_max, config.push_bytes_max, server.message_bytes_max // 2)
        most = min(operations_max, config.push_operations_max, server.push_operations_max)
        return BatchLimits(
            operations_max=most,
            bytes_max=min(bytes_max, self._exchange.connection.path.bytes_max),
            sequence_max=sequence_max,
            transactions_max=self._search.transactions_max,
            collections_max=server.collections_max,
            without=frozenset(self._exchange.connection.path.kept),
            server_ms=self._exchange.server_ms,
        )

    def _push(
        self, batch: PushBatch, limits: BatchLimits, look: Look
    ) -> Generator[Step, SyncResponse | None, bool]:
        """Push ``batch`` and those after it; whether a pull has to come before more. ``look`` is
        of a moment before ``batch`` was prepared.

        While the server works on a batch, the answer to the one before it is settled and the next
        one is prepared, in one commit:

            server   │ batch 1   │ batch 2              │ batch 3              │ …
            device   │ prepare 2 │ settle 1, prepare 3  │ settle 2, prepare 4  │ …

        Each is durable as in flight before it can be sent (R5), goes out when the one before it
        is answered, and touches no entity of that one: so it is right whatever the answer was,
        and the server still gets everything in the order in which it was committed."""
        self._pushed = self._pushed_bytes = 0
        state, total = look.state, look.ready
        request = self.request(batch, state, state.seen)
        seen = state.seen
        following: PushBatch | None = None
        pull = False
        while True:
            if following is None and not pull and total > self._pushed + len(batch.keys):
                yield SendAhead(request)
                following = self._exchange.applier.prepare_after(batch, limits)
            after = None if following is None else self.request(following, state, state.seen)
            if after is not None:
                yield SendAhead(after)
            response = yield from self._ask_push(batch, state, request)
            if seen is not state.seen and is_unasked(seen, response):
                # As an answer that was lost: the next request says what was seen, and is proved.
                raise TransportError("the server was opened anew between two pushes; asking again")
            settled = self._settle(batch, response, None if pull else limits, following, total)
            pull = self._pull_due = pull or settled.pull
            if following is not None and after is not None:
                batch, request, following = following, after, settled.next_batch
                seen = seen_after(seen, response)
            elif settled.next_batch is not None:
                batch, seen = settled.next_batch, seen_after(seen, response)
                request = self.request(batch, state, state.seen)
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
        settled = self._exchange.applier.settle(batch, response, limits, following)
        self._pushed += len(batch.keys)
        self._pushed_bytes += batch.bytes
        self._exchange.result.pushed += settled.accepted
        self._exchange.result.pushed_operations += settled.accepted_operations
        self._exchange.result.superseded += settled.superseded
        self._exchange.result.bytes_pushed += batch.bytes
        self._exchange.report(settled.report)
        self._exchange.answers.append((batch.sequences, response.results))
        done = self._pushed
        self._exchange.progress(
            SyncProgress(SyncState.PUSHING, done, self._pushed_bytes, max(total, done))
        )
        return settled

    def settle_alone(self, batch: PushBatch, response: PushResponse, total: int) -> None:
        """Settle ``batch``, which was pushed together with a pull and with none after it."""
        self._pushed = self._pushed_bytes = 0
        self._settle(batch, response, None, None, total)

    def _ask_push(
        self, batch: PushBatch, state: ReplicaState, request: PushRequest | None = None
    ) -> Generator[Step, SyncResponse | None, PushResponse]:
        """The verdicts on ``batch``. Raises ``_RefusedError`` where an answer proves that there
        are none; any other error leaves it open, and the batch in flight (R5)."""
        try:
            asked = self.request(batch, state, state.seen) if request is None else request
            response = yield from self._exchange.ask(asked, PushResponse)
        except SyncError as error:
            path = self._exchange.connection.path
            if error.refused_by is None or path.is_chance(error, batch.bytes):
                raise
            raise _RefusedError(batch, error) from error
        self._exchange.connection.path.passed(batch.bytes)
        return response

    def request(
        self, batch: PushBatch, state: ReplicaState, seen: SeenCommit | None = None
    ) -> PushRequest:
        """``seen`` of a push that goes without a pull (R29)."""
        return PushRequest(
            db_id=self._exchange.config.db_id,
            device_id=self._exchange.applier.device_id,
            history=history_of(state),
            cursor=batch.cursor,
            collections=batch.collections,
            transactions=batch.transactions,
            schema=self._exchange.connection.schema,
            subject=self._exchange.connection.subject,
            seen=seen,
        )

    # ------------------------------------------------------------ refused as a whole

    def _push_alone(
        self, batch: PushBatch, look: Look
    ) -> Generator[Step, SyncResponse | None, None]:
        """Push ``batch`` and none after it, while those are looked for that are refused."""
        self._pushed = self._pushed_bytes = 0
        response = yield from self._ask_push(batch, look.state)
        self._pull_due = self._settle(batch, response, None, None, look.ready).pull
        self._search.passed(len(batch.keys))

    def _take_refusal(
        self, batch: PushBatch, error: SyncError
    ) -> Generator[Step, SyncResponse | None, None]:
        """A new batch was refused as a whole, and nothing of it was decided (R5). It counts as
        not sent; what it was refused for is cut smaller, looked for, withdrawn or kept back."""
        applier, path, count = (
            self._exchange.applier,
            self._exchange.connection.path,
            len(batch.keys),
        )
        if is_about_size(error) and count > 1:
            applier.unsend()
            path.refused(batch.bytes)
            return
        if error.code in LOCKED_OUT or error.code == "subject_changed":
            # It is about who asks, and whatever they asked would be answered so (R32, R36).
            applier.unsend()
            raise error
        if is_forbidden(error):
            yield from self._take_no_right(batch, error)
            return
        if not self._asked_empty:
            self._empty = yield from self._ask_empty()
            self._asked_empty = True
        if self._empty is not None:
            # It is not about any transaction, so none is withdrawn.
            applier.unsend()
            self.closed_by = error
            return
        if count == 1 and is_for_good(error):
            self._exchange.report(applier.refuse(batch, error.code, error.message))
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
        path, seen = self._exchange.connection.path, self._exchange.connection.path.forbidden
        path.forbidden = True
        if seen and (yield from self._ask_empty()) is not None:
            self._exchange.report(self._exchange.applier.refuse(batch, error.code, error.message))
            return
        self._exchange.applier.unsend()
        self._pull_due = True

    def _ask_empty(self) -> Generator[Step, SyncResponse | None, SyncError | None]:
        """Whether a push is refused that has nothing in it: then it is not for what is in it."""
        state = self._exchange.applier.look().state
        request = PushRequest(
            db_id=self._exchange.config.db_id,
            device_id=self._exchange.applier.device_id,
            history=history_of(state),
            cursor=state.cursor,
            collections=[],
            transactions=[],
            schema=self._exchange.connection.schema,
        )
        try:
            yield from self._exchange.ask(request, PushResponse)
        except SyncError as error:
            if error.refused_by is None:
                raise
            return error
        return None

    def tell_kept_back(self) -> None:
        path = self._exchange.connection.path
        if path.kept:
            pending = self._exchange.applier.still_pending(path.kept)
            self._exchange.result.kept_back = path.forget_all_but(pending)


class _RefusedError(Exception):
    """A push was refused as a whole, with an answer that proves that nothing was decided."""

    def __init__(self, batch: PushBatch, error: SyncError) -> None:
        super().__init__(str(error))
        self.batch = batch
        self.error = error

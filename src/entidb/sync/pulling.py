"""The half of a cycle that pulls: the database to the server's head, in one step for its readers
(R6, R20).

One page that reaches the head is applied at once; several are staged, and published together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum

from msgspec.structs import replace

from entidb.db import machine
from entidb.db.replica import ReplicaState, Stage
from entidb.errors import HistoryChangedError, ResetRequiredError, ServerError
from entidb.protocol import (
    HandshakeResponse,
    PullRequest,
    PullResponse,
    SyncResponse,
    expanded,
    operations_count,
    payload_bytes,
)
from entidb.sync.apply.position import seen_in
from entidb.sync.apply.seam import Look
from entidb.sync.exchange import (
    Exchange,
    SendAhead,
    Step,
    pull_request,
)
from entidb.sync.fetching import Fetching, may_have_image
from entidb.sync.grants import GrantChangedError, check_granted, is_plain, needs_grant
from entidb.sync.room import ROW_BYTES
from entidb.sync.state import SyncProgress, SyncState

#: A reset that has to start over more often than this in one cycle ends it; the next goes on.
RESETS_MAX = 3
#: The first page of a full pull at most.
FIRST_PAGE_OPERATIONS = 2000
#: Of two numbers, how much larger the next one may be: while a page is staged the server makes the
#: one after it, at about this many times the speed, and a larger one would be waited for.
GROWTH = (7, 4)
#: Pages of one pull. What came until then is staged, and the next cycle goes on from there.
PAGES_MAX = 10_000


@dataclass
class Pulling:
    """``pull`` is what a cycle calls; ``heed_grant`` also after a handshake (R31)."""

    _exchange: Exchange
    #: Names to ask for; None for all.
    _scope: list[str] | None = None

    def pull(
        self, look: Look, first: tuple[PullRequest, PullResponse] | None = None
    ) -> Generator[Step, SyncResponse | None, None]:
        """Bring the database to the server's head, in one step for its readers (R20). ``look`` is
        the device as it is now, ``first`` a page that came already, with what it answers; where it
        does not fit any more, another is asked for."""
        reason = "moving its floor while everything is being pulled"
        for _ in range(RESETS_MAX):
            try:
                complete = yield from self._pull_once(look, first)
            except ResetRequiredError:
                # R28: below the floor; everything is pulled again, the outbox stays.
                self._exchange.applier.restart_stage(full=True)
                look, first = self._exchange.applier.look(), None
                continue
            except GrantChangedError as change:
                # R31: nothing of that page counts, it was made under another grant.
                reason = "changing what it grants while that is being pulled"
                self.heed_grant(change.granted)
                look, first = self._exchange.applier.look(), None
                continue
            if complete:
                return
            look, first = self._exchange.applier.look(), None
        raise ServerError(f"the server keeps {reason}; sync again later")

    def heed_grant(self, granted: list[str] | None) -> None:
        """Make what the server grants this device's own (R31)."""
        now = None if granted is None else sorted(granted)
        state = self._exchange.applier.look().state
        if now != state.granted or needs_grant(state):
            self._exchange.check()
            self._exchange.report(self._exchange.applier.grant(now))

    def _ask_page(
        self, request: PullRequest, state: ReplicaState
    ) -> Generator[Step, SyncResponse | None, PullResponse]:
        """A page made under the grant that the device knows."""
        response = yield from self._exchange.ask(request, PullResponse)
        self._heed_page(response, state)
        return response

    def _heed_page(self, response: PullResponse, state: ReplicaState) -> None:
        self._exchange.server_ms = response.time
        granted = response.granted
        if granted != state.granted:
            check_granted(granted, state)

    def _pull_once(
        self, look: Look, first: tuple[PullRequest, PullResponse] | None
    ) -> Generator[Step, SyncResponse | None, bool]:
        """One try; False if the floor moved under a full pull, which then starts over."""
        if needs_grant(look.state):
            self.heed_grant(look.state.granted)
            look = self._exchange.applier.look()
        state, stage, self._scope = look.state, look.stage, look.scope
        if stage is not None and not stage.fits(state):
            self._exchange.applier.restart_stage(full=False)
            stage = None
        full = machine.from_nothing(state, stage)
        self._exchange.result.reset |= full is None and (state.cursor > 0 or state.foreign)
        if full != [] and (stage is None or stage.image is not None):
            names = self._scope if full is None else full
            fetching = Fetching(
                self._exchange, lambda head: self._pull_everything(state, head, full)
            )
            there = yield from fetching.run(state, stage, full, names)
            stage = self._exchange.applier.look().stage if there else None
        if full != [] and (stage is None or not stage.full_done):
            # A cursor of 0 is no proof: the server may have been empty, and this device may have
            # pushed since. Then what the server no longer has must go, so it is staged.
            known = (
                state.cursor > 0 or bool(state.have) or state.foreign or bool(state.foreign_names)
            )
            known = known or bool(state.unsettled)
            first_sync = full is None and not known
            outcome = yield from self._pull_full(state, stage, full, first_sync)
            if outcome is not FullPull.STAGED:
                return outcome is FullPull.APPLIED
            stage = self._exchange.applier.look().stage
        if full is not None:
            applied = yield from self._pull_delta(state, stage, full, first)
            if applied:
                return True
        self._exchange.check()
        self._exchange.report(self._exchange.applier.publish())
        return True

    def _pull_full(
        self, state: ReplicaState, stage: Stage | None, full: list[str] | None, first_sync: bool
    ) -> Generator[Step, SyncResponse | None, FullPull]:
        request = self._pull_everything(state, 0 if stage is None else stage.full_cursor, full)
        usual = request.limit
        if stage is None:
            request = _first_page(request)
        floor = None if stage is None else stage.floor
        image_head = 0 if stage is None else stage.image_head
        done = size = staged = 0
        if stage is not None and image_head:
            done, size = stage.operations, stage.size - ROW_BYTES * stage.operations
        elif stage is not None:
            staged = stage.operations  # in a cycle before this one
        for _ in range(PAGES_MAX):
            response = yield from self._ask_page(request, state)
            if floor is not None and _moved(floor, response.floor, image_head):
                self._exchange.applier.restart_stage(full=state.full)
                return FullPull.RESTARTED
            if first_sync and floor is None and not response.has_more:
                self._exchange.report(self._exchange.applier.apply(request, response))
                self._count(response, 0, 0)
                return FullPull.APPLIED
            floor = response.floor
            grown = min(usual, request.limit * GROWTH[0] // GROWTH[1] + 1)
            seen = seen_in(state, response)
            following = replace(request, cursor=response.cursor, limit=grown, seen=seen)
            if response.has_more:
                yield SendAhead(following)
            self._exchange.check()
            self._exchange.applier.stage_page(request, response, full)
            done, size = self._count(response, done, size, staged)
            if not response.has_more:
                return FullPull.STAGED
            request = following
        raise _endless()

    def _pull_delta(
        self,
        state: ReplicaState,
        stage: Stage | None,
        full: list[str],
        first: tuple[PullRequest, PullResponse] | None,
    ) -> Generator[Step, SyncResponse | None, bool]:
        """What changed after the cursor. One page is applied at once (True); several, or what
        completes a widening, are staged."""
        cursor = state.cursor if stage is None else stage.delta_cursor
        request, came = None, None
        if first is not None and stage is None and not full:
            asked, page = first
            if asked.cursor < cursor <= page.cursor and not page.commits:
                # What was settled since has moved the cursor over commits of this device's own: a
                # page that brings nothing brings nothing to there either.
                asked = replace(asked, cursor=cursor)
            if asked.cursor == cursor and asked.collections == self._scope:
                request, came = asked, page
                self._heed_page(came, state)
        if request is None:
            request = self._pull_request(state, cursor)
            if stage is not None and full:
                # A program that is too old to pull may have pushed since (R33), also to what is in
                # the new tables as of before: they have to have it.
                have = [(first, min(last, stage.full_cursor)) for first, last in request.have]
                request = replace(request, have=[each for each in have if each[0] <= each[1]])
        done = size = 0
        for _ in range(PAGES_MAX):
            response = expanded(came or (yield from self._ask_page(request, state)))
            came = None
            if stage is None and not full and not response.has_more:
                if not response.commits and state.cursor < response.cursor <= state.reached:
                    # R10: only own commits are new, so nothing needs to be stored now.
                    self._exchange.applier.confirm(response.cursor)
                elif (
                    response.commits
                    or response.cursor != state.cursor
                    or (state.seen is None and response.term is not None)
                ):
                    self._exchange.check()
                    self._exchange.report(self._exchange.applier.apply(request, response))
                    self._count(response, done, size)
                return True
            following = replace(
                request,
                cursor=response.cursor,
                seen=seen_in(state, response),
            )
            if response.has_more:
                yield SendAhead(following)
            self._exchange.check()
            stage = self._exchange.applier.stage_page(request, response, full)
            done, size = self._count(response, done, size)
            if not response.has_more:
                return False
            request = following
        raise _endless()

    def carried(self, look: Look) -> tuple[PullRequest, PullResponse] | None:
        """The page that came with a hint, with the request that it answers, if it is what a pull
        would bring that begins now (R6): the device stands where the page begins, in that history,
        asks for nothing but what changed, and was granted then what it is granted now."""
        came = self._exchange.connection.carried.take()
        if came is None or not is_plain(look):
            return None
        request = self.request(look)
        if not came.answers(request):
            return None
        page = came.opened()
        if page is None or page.granted != look.state.granted:
            return None
        try:
            seen_in(look.state, page)
        except HistoryChangedError:
            return None  # the pull that follows proves it to the server (R29)
        return request, page

    def request(self, look: Look) -> PullRequest:
        """The request for what changed since a device was as in ``look``."""
        self._scope = look.scope
        return self._pull_request(look.state, look.state.cursor)

    def _pull_request(self, state: ReplicaState, cursor: int) -> PullRequest:
        connection, scope = self._exchange.connection, self._scope
        asked = connection.asked
        if asked is not None and asked[0] is state and asked[1] == cursor and asked[2] is scope:
            return asked[3]
        exchange = self._exchange
        request = pull_request(
            exchange.config, connection, exchange.applier.device_id, state, scope, cursor
        )
        connection.asked = (state, cursor, scope, request)
        return request

    def beginning(self, shaken: HandshakeResponse) -> PullRequest | None:
        """What a device that was never synchronised asks for first, when it has the answer to its
        handshake; None where that is not a page."""
        exchange = self._exchange
        look = exchange.applier.look()
        if look.stage is not None or look.inflight is not None or may_have_image(exchange):
            return None
        state = replace(look.state, history=shaken.history)
        connection = dataclasses.replace(exchange.connection, limits=shaken.limits)
        request = pull_request(
            exchange.config, connection, exchange.applier.device_id, state, look.scope, 0
        )
        return _first_page(self._of_everything(request, None))

    def _pull_everything(
        self, state: ReplicaState, cursor: int, full: list[str] | None
    ) -> PullRequest:
        return self._of_everything(self._pull_request(state, cursor), full)

    def _of_everything(self, request: PullRequest, full: list[str] | None) -> PullRequest:
        columns = "columns" in self._exchange.connection.features
        collections = request.collections if full is None else full
        return replace(request, have=[], full=True, columns=columns, collections=collections)

    def _count(
        self, response: PullResponse, done: int, size: int, staged: int = 0
    ) -> tuple[int, int]:
        operations, weight = operations_count(response), payload_bytes(response)
        self._exchange.result.bytes_pulled += weight
        if operations:
            total: int | None = done + operations
            if response.has_more:
                # What the server counts, deletions are beside it, and others write meanwhile.
                live = response.live
                total = None if live is None else max(live - staged, done + operations)
            progress = SyncProgress(SyncState.PULLING, done + operations, size + weight, total)
            self._exchange.progress(progress)
        return done + operations, size + weight


def _first_page(request: PullRequest) -> PullRequest:
    """Nothing can be done here before the first page is in, and a small one comes sooner."""
    return replace(request, limit=min(request.limit, FIRST_PAGE_OPERATIONS))


def _moved(before: int, floor: int, image_head: int) -> bool:
    """Whether the floor has moved in a way that a full pull has to begin again (R28). After an
    image it may move, up to there: until then the server knows all that was deleted since (R35)."""
    return floor != before and not 0 < floor <= image_head


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

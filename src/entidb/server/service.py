"""Message in, message out, for one database: what the server decides (R11 to R17).

No authentication, no HTTP, no threads: a caller says what the token grants, and many pushes can be
decided in one storage commit (``push_many``). The pull is the database's change feed, the cursor
its commit sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from msgspec.structs import replace

from entidb import cbor, protocol
from entidb.collector import paused
from entidb.db import Database
from entidb.db.maintenance import CLOCK_MARK_MS, mark_clock, read_floor
from entidb.db.moment import Moment
from entidb.db.records import META_FLOOR, META_HEAD, decode_head, unpack_u64
from entidb.db.writer import Writer
from entidb.errors import (
    HistoryChangedError,
    PermissionDeniedError,
    ProtocolError,
    ResetRequiredError,
    SyncError,
    UpgradeRequiredError,
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
    RoundRequest,
)
from entidb.server.control import frozen_error
from entidb.server.decide import NOTHING_CHECKED, Checked, Deciding, Rules, value_of
from entidb.server.fullness import Fullness
from entidb.server.hooks import NO_SCHEMA, Grant, Schema, ValidateHook
from entidb.server.pages import (
    SCAN_ROWS_MAX,
    ColumnPage,
    Page,
    View,
    known_up_to,
    live_entities,
    seen_by,
    wanted_collections,
)
from entidb.server.proofs import Proofs
from entidb.server.unique import waits_for
from entidb.server.upcasting import upcast_all
from entidb.server.work import too_much
from entidb.types import Term

#: Commits that are the newest few.
RECENT_COMMITS = 128
#: What a device may use only where it is announced.
FEATURES: Final = ("columns", "digest")


#: Seconds that the interpreter is let go for.
LET_GO_S = 0.00005

#: Commits that a round may lie behind what it would pull, if none of them concerns it.
ROUND_ROWS_MAX = 64


class BehindError(SyncError):
    """Nothing of a round's push was decided: a pull comes first (R6). No client is told this; it
    is answered with what it has not seen."""


class DatabaseService:
    """The server's side of one database. Not thread-safe for pushes: one writer calls
    ``push_many``; the rest may be called from any thread."""

    def __init__(
        self,
        database: Database,
        *,
        db_id: str,
        limits: Limits,
        validate: ValidateHook | None = None,
        schema: Schema = NO_SCHEMA,
        clock_mark_ms: int = CLOCK_MARK_MS,
        fullness: Fullness | None = None,
    ) -> None:
        """Every ``clock_mark_ms`` the database remembers the time of its newest commit (R28)."""
        self._clock_mark_ms = clock_mark_ms
        self.features = [*FEATURES, *(["schema"] if schema.number else [])]
        self.database = database
        self.db_id = db_id
        self.limits = limits
        self._validate = validate
        self._schema = schema
        self._rules = Rules(db_id, limits.transaction_bytes_max, validate, fullness)
        #: (when, head, floor, history, newest term) of the newest read; None when unknown.
        self._known: tuple[Moment, int, int, bytes | None, Term | None] | None = None
        #: Called with a pull and the cursor that its page leads to, on the thread that read it.
        self.on_page: Callable[[PullRequest, int], None] | None = None
        #: Asked before each group: whether nothing is to be pushed at the moment (R32).
        self.is_frozen: Callable[[], bool] = _no
        #: Whether the interpreter is let go between two pushes of a group, for others.
        self.lets_go: Callable[[], bool] = _no
        #: The newest clock mark that this service has seen in the database.
        self._marked_ms: int | None = None
        #: The newest head that this service has seen; a hint.
        self._head = 0
        self._limit_max = min(limits.pull_operations_max, SCAN_ROWS_MAX)
        self._proofs = Proofs(database, db_id)

    # ------------------------------------------------------------ handshake

    def handshake(self, request: HandshakeRequest, grant: Grant | None = None) -> HandshakeResponse:
        """Raises ``VersionMismatchError``. Without a ``grant`` nothing is believed of what the
        device says it has seen."""
        if request.major != PROTOCOL_MAJOR:
            raise VersionMismatchError(
                f"this server speaks protocol {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}, the client "
                f"{request.major}.{request.minor}: update the older side"
            )
        head, floor = self._read_head_and_floor()
        if grant is not None and request.history == self._history and request.cursor > head:
            # The device learns it from this very answer, which names the history that began.
            self._proofs.put_back(grant, request.cursor, head, request.history)
        return HandshakeResponse(
            major=PROTOCOL_MAJOR,
            minor=PROTOCOL_MINOR,
            history=self._history,
            head=head,
            floor=floor,
            limits=self.limits,
            features=self.features,
            time=self.database.clock.now_ms(),
            granted=None if grant is None else grant.named,
        )

    # ------------------------------------------------------------ pull

    def may_be_idle(self, request: PullRequest) -> bool:
        """Whether ``idle_pull`` may have an answer, as far as anybody knows without asking."""
        known = self._known
        return known is not None and not request.full and known_up_to(request) == known[1]

    def idle_pull(self, request: PullRequest, grant: Grant) -> PullResponse | None:
        """The answer to a pull with nothing new, without touching the store; None if it has to be
        looked up. What was read counts until the next try to commit (R17)."""
        known = self._known
        if known is None or request.full:
            return None
        moment, head, floor, history, term = known
        # First what costs nothing: the moment may be a question over a network.
        if known_up_to(request) != head or not moment.is_current():
            return None
        seen = seen_by(request)
        if seen > head:
            return None  # what follows takes a commit
        known_seen = request.seen
        if known_seen is not None and (
            term is None or known_seen.term != term.name or known_seen.version < term.first
        ):
            return None  # older terms have to be looked up
        self.check_pull(request, grant, seen, head, floor, history)
        return PullResponse(
            collections=[],
            commits=[],
            cursor=head,
            has_more=False,
            head=head,
            floor=floor,
            time=self.database.clock.now_ms(),
            granted=grant.named,
            term=term,
        )

    def is_recent(self, request: PullRequest) -> bool:
        """Whether a pull asks for the newest few commits only. They were written a moment ago, so
        reading them waits for no disk."""
        behind = self._head - known_up_to(request)
        return not request.full and 0 <= behind <= RECENT_COMMITS and seen_by(request) <= self._head

    def pull(self, request: PullRequest, grant: Grant) -> PullResponse:
        """One page of the change feed (R19). Raises ``HistoryChangedError``,
        ``ResetRequiredError``, ``PermissionDeniedError``."""
        return protocol.decode(PullResponse, self.pull_bytes(request, grant))

    def pull_bytes(self, request: PullRequest, grant: Grant, view: View | None = None) -> bytes:
        """As ``pull``, encoded: the values go from the store into the message as they are. Of the
        state that ``view`` shows, if it is given."""
        try:
            if view is not None:
                return self._pull_bytes(request, grant, view)
            with paused(), self.database.view() as newest:
                return self._pull_bytes(request, grant, newest)
        except HistoryChangedError as error:
            changed = error
        raise self.proven(changed, request, grant)

    def proven(
        self, error: HistoryChangedError, request: PullRequest, grant: Grant
    ) -> HistoryChangedError:
        """What a device is told whose ``request`` was refused so. Where it shows that the files are
        older ones, a history begins (R29), so the caller has no view open any more."""
        head = error.details.get("head")
        if head is None:
            return error
        return self._proofs.put_back(grant, seen_by(request), head, request.history)

    def _pull_bytes(self, request: PullRequest, grant: Grant, view: View) -> bytes:
        head = view.head.sequence
        floor = read_floor(view)
        history = self.database.history_at(view.snapshot)
        term, seen, parted = self._proofs.newest(view), request.seen, None
        if seen is not None and (
            term is None or seen.term != term.name or seen.version < term.first
        ):
            parted = view  # not of the newest term, as next to all
        self.check_pull(request, grant, seen_by(request), head, floor, history, parted)
        kind = ColumnPage if request.columns else Page
        wanted = wanted_collections(view.catalogue, request.collections, grant.collections)
        page = kind(view, request, wanted)
        cursor, more = page.fill(max(1, min(request.limit, self._limit_max)), head)
        self._known = (view.moment, head, floor, history, term)
        self._head = head
        if self.on_page is not None:
            self.on_page(request, cursor)
        return page.encode(
            PullResponse(
                collections=page.names,
                commits=[],
                cursor=cursor,
                has_more=more,
                head=head,
                floor=floor,
                time=self.database.clock.now_ms(),
                granted=grant.named,
                term=term,
                live=live_entities(view, wanted) if more and request.full else None,
            )
        )

    def check_full(self, request: PullRequest, grant: Grant, view: View) -> None:
        """The conditions of a pull of everything, in the state of ``view``."""
        history = self.database.history_at(view.snapshot)
        parted = None if request.seen is None else view
        head, floor = view.head.sequence, read_floor(view)
        self.check_pull(request, grant, seen_by(request), head, floor, history, parted)

    def check_pull(
        self,
        request: PullRequest,
        grant: Grant,
        seen: int,
        head: int,
        floor: int,
        history: bytes | None,
        view: View | None = None,
    ) -> None:
        """``view`` where what the device has seen may be of another past (R29)."""
        if not grant.read:
            raise PermissionDeniedError(f"this token may not read database {self.db_id!r}")
        self._check_history(request.history, seen, head, history)
        if view is not None:
            self._proofs.check(request, view, head)
        if 0 < request.schema < self._schema.least:
            raise UpgradeRequiredError(
                f"this program works with schema {request.schema} of database {self.db_id!r}, and "
                f"what others wrote there needs {self._schema.least}: update the program. What is "
                "pending is taken all the same",
                details={"schema": self._schema.least},
            )
        if not request.full and request.cursor < floor:
            raise ResetRequiredError(
                f"cursor {request.cursor} is below the floor {floor}: deletions in between are "
                "forgotten, so everything has to be pulled again",
                details={"floor": floor},
            )

    # ------------------------------------------------------------ push

    def push_many(
        self, members: Sequence[tuple[PushRequest | RoundRequest, Grant]]
    ) -> list[PushResponse | SyncError]:
        """Decide pushes in order and commit everything accepted at once (R12, R16).

        The answers are true only because this returns after the commit is on disk. A member that
        cannot be decided gets its ``SyncError``, and a ``BehindError`` if it is a round and the
        device has not seen what it would have pulled (R6); the others are not touched by it.
        Raises storage errors: then nothing was accepted and nothing is known any more (R17).
        """
        with paused():
            return self._push_many(members)

    def _push_many(
        self, members: Sequence[tuple[PushRequest | RoundRequest, Grant]]
    ) -> list[PushResponse | SyncError]:
        # What can fail or take long is done before the writer lock is taken.
        pushed = [
            request.push if isinstance(request, RoundRequest) else request for request, _ in members
        ]
        checked = [
            self._precheck(push, grant) for push, (_, grant) in zip(pushed, members, strict=True)
        ]
        seen = [seen_by(request) for request, _ in members]
        answers: list[PushResponse | SyncError] = []
        with self.database.write() as writer:
            frozen = self.is_frozen()
            floor, known_head = read_floor(writer), writer.head.sequence
            indexed = writer.catalogue.indexes.each
            # Nobody else begins another while this one has the turn.
            history = self.database.history_at(writer.snapshot)
            suspects = self._proofs.suspects(members, seen, writer, history)
            proof = self._proofs.first(suspects) if suspects else None
            lets_go = len(members) > 1 and self.lets_go()
            each = zip(members, pushed, checked, seen, strict=True)
            for (request, grant), push, found, newest in each:
                if proof is not None:
                    break  # nothing is decided in the history that ends here
                if lets_go and answers:
                    # To let it go and take it again at once would be quicker than whoever waits.
                    time.sleep(LET_GO_S)
                if isinstance(found, SyncError):
                    answers.append(found)
                    continue
                try:
                    # No device can have built on a commit that no answer has named yet: such a base
                    # would let a write pass over what others are about to commit (R13).
                    busy = waits_for(writer, push) if indexed else None
                    if isinstance(request, RoundRequest):
                        pull = request.pull
                        parted = writer if suspects else None
                        self.check_pull(pull, grant, newest, known_head, floor, history, parted)
                        waits = frozen or busy is not None
                        if waits or self._is_behind(writer, pull, grant, known_head):
                            raise BehindError("the device has not seen everything")
                    else:
                        self._check_history(push.history, newest, known_head, history)
                        if suspects:
                            self._proofs.check(push, writer, known_head)
                        if frozen:
                            raise frozen_error(self.db_id)
                        if busy is not None:
                            raise busy
                    answers.append(self._decide(writer, push, grant, floor, found))
                except SyncError as error:
                    answers.append(error)
            if not writer.is_empty:
                marked = self._marked_ms
                if marked is None or not 0 <= writer.now_ms - marked < self._clock_mark_ms:
                    self._marked_ms = mark_clock(writer, self._clock_mark_ms)
            if self._rules.fullness is not None:
                self._rules.fullness.note(writer)
            head = writer.head.sequence
        if proof is not None:
            self._proofs.put_back(*proof, history)
            return self._push_many(members)
        # True after the commit that has just worked, and until the next.
        term = self._proofs.committed(writer)
        self._known, self._head = (writer.moment, head, floor, history, term), head
        return [
            replace(answer, head=head, term=term) if isinstance(answer, PushResponse) else answer
            for answer in answers
        ]

    def is_behind(self, request: RoundRequest) -> bool:
        """Whether a round need not wait for its turn to be told that it is behind. A hint: what
        this does not see, ``push_many`` does."""
        known = known_up_to(request.pull)
        return known + ROUND_ROWS_MAX < self._head

    def _is_behind(self, writer: Writer, pull: PullRequest, grant: Grant, head: int) -> bool:
        """Whether a pull would bring something at ``head``, where the last answers have ended. What
        others have in this very group is decided against like anything else (R13)."""
        if known_up_to(pull) >= head:
            return False
        wanted = wanted_collections(writer.catalogue, pull.collections, grant.collections)
        page = Page(writer, pull, wanted)
        _, more = page.fill(ROUND_ROWS_MAX, head)
        return more or not page.is_empty

    def _precheck(self, request: PushRequest, grant: Grant) -> Checked | SyncError:
        """Proof that every payload is canonical (its bytes are stored and forwarded untouched);
        and each payload's value, if there is a ``validate`` that will see it. What is wrong with
        a payload is wrong with its transaction, and no other (R15). The error of a push that is
        too much work is returned."""
        if not grant.write:
            return NOTHING_CHECKED
        upcasts = request.schema > 0 and self._schema.upcasts(request.schema)
        keep = self._validate is not None or upcasts
        try:
            faults = too_much(request)
        except ProtocolError as error:
            return error
        if not keep and not faults:
            payloads = [
                op.payload
                for t in request.transactions
                for op in t.operations
                if op.payload is not None
            ]
            if cbor.all_pass(payloads):
                return NOTHING_CHECKED
        checked = Checked([], faults, {})
        for transaction in request.transactions:
            identity, row = transaction.transaction_id, []
            for op in transaction.operations:
                value = None
                if op.payload is not None and identity not in faults:
                    value, fault = value_of(op.payload)
                    if fault is not None:
                        said = f"its entity {op.entity_id.hex()} {fault}"
                        faults[identity] = "codec_error", said
                row.append(value)
            if upcasts and identity not in faults:
                newest = upcast_all(self._schema, request, transaction, row)
                if newest is not None:
                    checked.upcast[identity] = newest
            if keep:
                checked.values.append(row)
        return checked

    def _decide(
        self,
        writer: Writer,
        request: PushRequest,
        grant: Grant,
        floor: int,
        checked: Checked,
    ) -> PushResponse:
        deciding = Deciding(self._rules, writer, request, grant, floor, checked)
        results = deciding.run(checked.values)
        return PushResponse(
            results=results,
            collections=request.collections,
            head=writer.head.sequence,
            time=writer.now_ms,
        )

    # ------------------------------------------------------------ shared

    @property
    def _history(self) -> bytes:
        assert self.database.history is not None, "a server database has a history"
        return self.database.history

    def _check_history(self, asked: bytes, cursor: int, head: int, history: bytes | None) -> None:
        if asked != history:
            raise HistoryChangedError(
                f"database {self.db_id!r} has another history than this device knows: it "
                'was restored or made anew. Choose reset(keep="server") or reset(keep="device")',
                details={"history": history},
            )
        if cursor > head:
            raise self._proofs.seen_more(cursor, head)

    def _read_head_and_floor(self) -> tuple[int, int]:
        with self.database.storage.snapshot() as snapshot:
            raw_head, raw_floor = snapshot.get(META_HEAD), snapshot.get(META_FLOOR)
        head = 0 if raw_head is None else decode_head(raw_head).sequence
        return head, 0 if raw_floor is None else unpack_u64(raw_floor)

    def close(self) -> None:
        self._known = None


def _no() -> bool:
    return False

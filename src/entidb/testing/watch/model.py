"""What a watch believes of its device: the model that the checkers of the other rooms compare with.

Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from entidb import cbor
from entidb.db.catalogue import Catalogue, CollectionInfo, decode_catalogue, empty_catalogue
from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import OverruledValue
from entidb.db.records import (
    DIRTY,
    HAS_BASE,
    META_CATALOGUE,
    META_SYNC,
    base_key,
    decode_base,
    payload_of,
)
from entidb.db.replica import ReplicaState, decode_record
from entidb.errors import SyncError
from entidb.protocol import (
    Manifest,
    PullResponse,
    PushResponse,
    PushResult,
    RoundResponse,
    SyncRequest,
    SyncResponse,
)
from entidb.sync import Conflict, ConflictResolution
from entidb.testing.invariants import Checks
from entidb.testing.losers import Losers
from entidb.testing.oracle import NEVER, Histories, History, Ref, State
from entidb.testing.watch.commits import Records
from entidb.types import Clock, SeenCommit

#: What a policy was asked, and what it answered.
Question = tuple[Conflict, ConflictResolution]


class Context(NamedTuple):
    """What the bases of a store belong to; a copy of the store takes it along."""

    history: History | None
    cursor: int
    have: list[list[int]]
    excluded: dict[str, None]
    unheard: bool
    due: dict[Ref, State]


#: Answers that say of which term their head is.
_NAMES_A_TERM: Final = PullResponse | PushResponse | Manifest


class DeviceModel:
    """``answers`` are the verdicts of the push answer that the device has just been given,
    ``calls`` what its policies were asked since the last commit."""

    #: Ids that a person is deciding about right now; set by the code that lets a person decide.
    by_person_ids: tuple[bytes, ...] = ()

    def __init__(
        self, checks: Checks, name: str, histories: Histories, server_clock: Clock
    ) -> None:
        self.checks = checks
        self.server_clock = server_clock
        self.name = name
        self.histories = histories
        self.history: History | None = None
        self.cursor = 0
        self.have: list[list[int]] = []
        #: The newest head that it has heard of, and remembers.
        self.seen = 0
        #: Whether the newest answer is of a past that is not its own.
        self.strange = False
        #: Collections in scope that the cursor does not cover yet (R31).
        self.excluded: dict[str, None] = {}
        #: What is to be made pending before the adoption ends: payload, and the version it has
        #: from the history before a reset (0: written outside the scope). R29, R31.
        self.due: dict[Ref, State] = {}
        self.outbox: dict[bytes, int] = {}
        self.discarded: dict[int, bytes] = {}
        self.open_conflicts: dict[Ref, None] = {}
        self.answers: dict[bytes, PushResult] = {}
        self.answered_by: History | None = None
        self.calls: dict[Ref, ConflictResolution] = {}
        #: Transactions that were sent and got no answer.
        self.unanswered: dict[bytes, None] = {}
        #: Of the database that is open (R30).
        self.device_id = b""
        self.by_person: dict[Ref, None] = {}
        #: What a person commits again right now.
        self.recommits: dict[Ref, tuple[int, bytes]] = {}
        #: What a person puts back right now.
        self.put_back: OverruledValue | None = None
        #: What was asked about an entity since the last commit, and answered.
        self.questions: dict[Ref, list[Question]] = {}
        self.losers = Losers(checks, name, server_clock)
        #: What the commits since the last report put on the lists (SURFACED-ONCE).
        self.unreported: dict[bytes, None] = {}
        self.unreported_conflicts: dict[Ref, None] = {}
        self.reported: dict[bytes, None] = {}
        #: Codes for which the server has refused transactions, with their whole push (R5).
        self.refused: Mapping[bytes, set[str]] = {}
        self.catalogue_raw: bytes | None = None
        self.catalogue: Catalogue = empty_catalogue()
        self.prefixes: dict[bytes, CollectionInfo] = {}
        self.foreign = False
        #: Collections whose rows are of the history before a reset that did not cover them.
        self.foreign_names: frozenset[str] = frozenset()
        self.full = True
        self.keep_device = False
        self.unheard = False
        #: What the device has learned that its token grants; None: all (R31).
        self.granted: frozenset[str] | None = None
        #: What the device remembers of lost answers, as it is stored (R28).
        self.unsettled: list[list[int]] = []

    def context(self) -> Context:
        """What the bases of this device belong to."""
        return Context(
            self.history, self.cursor, self.have, self.excluded, self.unheard, dict(self.due)
        )

    @property
    def resetting(self) -> bool:
        """Whether its bases belong to a history that it has given up (R29)."""
        return self.foreign

    def forget_reports(self) -> None:
        """A crash ends the cycle that would have reported; the lists still have everything."""
        self.unreported, self.unreported_conflicts = {}, {}
        self.forget_questions()
        self.losers.forget_reports()

    def forget_questions(self) -> None:
        """What was asked came to nothing: no commit followed."""
        self.calls, self.questions = {}, {}

    def grants(self, name: str) -> bool:
        return self.granted is None or name in self.granted

    def move(self, state: ReplicaState) -> None:
        if state.history is None:
            self.history = None
        elif self.history is None or self.history.identity != state.history or self.foreign:
            self.history = self.histories.past(state.history, state.seen)
        self.seen = 0 if state.seen is None else state.seen.version
        self.cursor, self.have, self.full = state.cursor, state.have, state.full

    @property
    def newest(self) -> int:
        """The newest commit of its history that it knows of."""
        return max(self.cursor, self.seen, self.have[-1][1] if self.have else 0)

    def follow(self, request: SyncRequest, outcome: SyncResponse | SyncError) -> None:
        """It is given an answer: of which past, where files were put back under the history that it
        knows (R29)."""
        answer = outcome.pull if isinstance(outcome, RoundResponse) else outcome
        known = self.history
        if known is None or self.foreign or not isinstance(answer, _NAMES_A_TERM):
            return
        seen = None if answer.term is None else SeenCommit(answer.head, answer.term.name)
        past = self.histories.past(known.identity, seen)
        self.strange = False
        history = answer.history if isinstance(answer, Manifest) else request_history(request)
        if past is known or past is None or history != known.identity:
            return
        self.strange = self.newest > known.common_with(past)
        if not self.strange:
            self.history = past

    def covers(self, head: int) -> bool:
        """Whether everything up to ``head`` is here: below the cursor, or the device's own."""
        reached = self.cursor
        for first, last in self.have:
            if first <= reached + 1:
                reached = max(reached, last)
        return reached >= head

    def expected(self, ref: Ref) -> State:
        if self.history is None:
            return NEVER
        return self.history.state_with(ref, self.cursor, self.have)

    def truth(self, ref: Ref, version: int) -> bytes | None:
        assert self.history is not None
        return self.history.state_at(ref, version)[1]


def request_history(request: SyncRequest) -> bytes | None:
    return getattr(request, "history", None)


def sync_state(records: Records) -> ReplicaState:
    raw = records.get(META_SYNC)
    return ReplicaState() if raw is None else decode_record(ReplicaState, raw)


def decode_catalogue_of(records: Records) -> Catalogue:
    raw = records.get(META_CATALOGUE)
    return empty_catalogue() if raw is None else decode_catalogue(raw)


def discarded_id(raw: bytes) -> bytes:
    record: dict[str, Any] = cbor.decode_trusted(raw)
    return DiscardedTransaction(0, **record).transaction_id


def base_payload(records: Records, info: CollectionInfo, entity_id: bytes) -> bytes | None:
    """The last server state of an entity that the device knows."""
    raw = records.get(info.prefix + entity_id)
    if raw is None or not raw[0] & DIRTY:
        return None if raw is None else payload_of(raw)
    if not raw[0] & HAS_BASE:
        return None
    return decode_base(records[base_key(info.number, entity_id)]).payload

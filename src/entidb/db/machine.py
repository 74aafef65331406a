"""The sync machine of a device: which states it can be in, and every move between them.

A device has four things that change by themselves, each kept in a record of its own: what it lacks
of the server's state, what it has sent, what it has staged, what it has still to make pending. Each
has few states. Whoever stores such a record names the move, which raises if the table does not have
it; so the table here is all there is. ``docs/machine.md`` is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, TypeVar

from msgspec import Struct

from entidb.db.replica import Adopt, Inflight, ReplicaState, Stage
from entidb.errors import SyncStateError

R = TypeVar("R", bound=ReplicaState | Inflight | Stage | Adopt | None)


class Lacks(Enum):
    """What a device lacks of the server's state up to its cursor."""

    NOTHING = "The cursor speaks of all that is in scope: what changed after it is pulled."
    SOME = "Some collections come from nothing, of the others what changed after the cursor."
    ALL = "Everything comes from nothing: a first sync, a cursor below the floor, a scope of all."
    OTHER = "As ALL, and the versions here are of another history: bytes are compared."
    KEEPING = "As OTHER, and what is newer here than there is committed again."


class Sent(Enum):
    """What a device has sent and has no answer to."""

    NOTHING = "No transaction is in flight."
    ONE = "One batch may have been sent."
    TWO = "And another goes out when the first is answered."


class Staged(Enum):
    """The pages of a pull that nobody sees yet."""

    NOTHING = "No page is kept aside."
    FULL = "Pages or segments of what comes from nothing are kept, and more come."
    REST = "All of that is kept; what changed in the other collections is coming, or there."


class Adopts(Enum):
    """Entities here that have still to be made pending."""

    NOTHING = "All that is to be pushed is in the outbox."
    INDEXING = "They are put in the order of the commits that wrote them."
    COMMITTING = "They are committed like local transactions, group after group."


State = Lacks | Sent | Staged | Adopts
PARTS: Final[tuple[type[Enum], ...]] = (Lacks, Sent, Staged, Adopts)


def lacks(state: ReplicaState) -> Lacks:
    if state.full:
        if state.foreign:
            return Lacks.KEEPING if state.keep_device else Lacks.OTHER
        return Lacks.ALL
    return Lacks.SOME if state.uncovered else Lacks.NOTHING


def sent(inflight: Inflight | None) -> Sent:
    if inflight is None:
        return Sent.NOTHING
    return Sent.TWO if inflight.after else Sent.ONE


def staged(stage: Stage | None) -> Staged:
    if stage is None:
        return Staged.NOTHING
    return Staged.REST if stage.full_done else Staged.FULL


def adopts(adopt: Adopt | None) -> Adopts:
    if adopt is None:
        return Adopts.NOTHING
    return Adopts.COMMITTING if adopt.indexed else Adopts.INDEXING


_STATE_OF: Final[Mapping[type[Enum], Any]] = {
    Lacks: lacks,
    Sent: sent,
    Staged: staged,
    Adopts: adopts,
}


class Move(Struct, frozen=True):
    """``ways`` are the states it leads from, each with those it may lead to."""

    name: str
    part: type[Enum]
    rules: str
    text: str
    ways: dict[Any, tuple[Any, ...]]

    def __call__(self, before: Any, after: R) -> R:
        """``after``, which takes the place of ``before``. Raises ``SyncStateError`` if this move
        does not lead there."""
        state_of = _STATE_OF[self.part]
        now, then = state_of(before), state_of(after)
        if then not in self.ways.get(now, ()):
            raise SyncStateError(
                f"{self.name} cannot lead from {self.part.__name__}.{now.name} to {then.name}; "
                "nothing was changed. Sync again"
            )
        return after


def _same(part: type[Enum]) -> dict[Any, tuple[Any, ...]]:
    return {state: (state,) for state in part}


def _to(part: type[Enum], *targets: State) -> dict[Any, tuple[Any, ...]]:
    return dict.fromkeys(part, targets)


#: Another scope, or another grant, which is scope too.
_RESCOPED: Final[dict[Any, tuple[Any, ...]]] = _same(Lacks) | {
    Lacks.NOTHING: (Lacks.NOTHING, Lacks.SOME, Lacks.ALL),
    Lacks.SOME: (Lacks.NOTHING, Lacks.SOME, Lacks.ALL),
}

# ---- what is lacking

STAND: Final = Move(
    "STAND",
    Lacks,
    "R10 R18 R21 R28 R29 R36",
    "Cursor, own versions, doubts, the history's name or the person move, and nothing else.",
    _same(Lacks),
)
RESCOPE: Final = Move(
    "RESCOPE",
    Lacks,
    "R31",
    "A wider scope lacks what came in, all of it where the new one is everything; a narrower one "
    "lacks less.",
    _RESCOPED,
)
REGRANT: Final = Move(
    "REGRANT",
    Lacks,
    "R31",
    "The server grants other collections: what is gained comes from nothing, what is lost does "
    "not come.",
    _RESCOPED,
)
UNCOVER: Final = Move(
    "UNCOVER",
    Lacks,
    "R18 R31",
    "A push was accepted into a collection that is not granted: that goes with the next look at "
    "the grant.",
    _same(Lacks) | {Lacks.NOTHING: (Lacks.SOME,)},
)
FALL: Final = Move(
    "FALL",
    Lacks,
    "R28",
    "The cursor is below the server's floor.",
    _same(Lacks) | {Lacks.NOTHING: (Lacks.ALL,), Lacks.SOME: (Lacks.ALL,)},
)
RESET_SERVER: Final = Move(
    "RESET_SERVER",
    Lacks,
    "R29",
    "A person takes the server's state.",
    _to(Lacks, Lacks.OTHER),
)
RESET_DEVICE: Final = Move(
    "RESET_DEVICE",
    Lacks,
    "R29",
    "A person keeps the device's state.",
    _to(Lacks, Lacks.KEEPING),
)
REACH: Final = Move(
    "REACH",
    Lacks,
    "R20 R22 R31",
    "A pull has reached the head. Collections out of scope that a reset did not cover are "
    "remembered.",
    _to(Lacks, Lacks.NOTHING),
)

# ---- what is in flight

SEND: Final = Move(
    "SEND",
    Sent,
    "R5 R6",
    "A batch, or a transaction in its own commit, is durable as such before its first byte leaves.",
    {Sent.NOTHING: (Sent.ONE,)},
)
FOLLOW: Final = Move(
    "FOLLOW",
    Sent,
    "R5",
    "The next batch is durable while the server works on the first; it touches no entity of it.",
    {Sent.ONE: (Sent.TWO,)},
)
SETTLE: Final = Move(
    "SETTLE",
    Sent,
    "R18",
    "The first batch is answered and settled; one more may be put together in the same commit.",
    {Sent.ONE: (Sent.NOTHING, Sent.ONE), Sent.TWO: (Sent.ONE, Sent.TWO)},
)
UNSEND: Final = Move(
    "UNSEND",
    Sent,
    "R5 R15",
    "An answer proves that nothing was decided: the batches count as not sent.",
    _to(Sent, Sent.NOTHING),
)
REFUSE: Final = Move(
    "REFUSE",
    Sent,
    "R4 R5",
    "The server refuses a transaction for good; it is withdrawn.",
    {Sent.ONE: (Sent.NOTHING,), Sent.TWO: (Sent.NOTHING,)},
)
DISOWN: Final = Move(
    "DISOWN",
    Sent,
    "R28 R29",
    "A reset: what was in flight is in doubt, and pending.",
    _to(Sent, Sent.NOTHING),
)

# ---- what is staged

KEEP: Final = Move(
    "KEEP",
    Staged,
    "R20 R35",
    "A page of several, or a part of an image, is kept aside.",
    {
        Staged.NOTHING: (Staged.FULL, Staged.REST),
        Staged.FULL: (Staged.FULL, Staged.REST),
        Staged.REST: (Staged.REST,),
    },
)
PUBLISH: Final = Move(
    "PUBLISH",
    Staged,
    "R20 R22",
    "All pages are there and become visible, in one commit with REACH.",
    {Staged.REST: (Staged.NOTHING,)},
)
ABANDON: Final = Move(
    "ABANDON",
    Staged,
    "R22 R28 R29 R31",
    "The cursor, the floor, the history, the scope or the grant is another: what came is garbage.",
    _to(Staged, Staged.NOTHING),
)

# ---- what is to be made pending

SCHEDULE: Final = Move(
    "SCHEDULE",
    Adopts,
    "R29 R31",
    "A scope takes in collections that have entities, or a reset keeps the device's.",
    _to(Adopts, Adopts.INDEXING),
)
INDEX: Final = Move(
    "INDEX",
    Adopts,
    "R3",
    "A bounded part is put in order.",
    {Adopts.INDEXING: (Adopts.INDEXING, Adopts.COMMITTING)},
)
ADOPTED: Final = Move(
    "ADOPTED",
    Adopts,
    "R3 R31",
    "Every group is in the outbox. Until then no page is taken in.",
    {Adopts.COMMITTING: (Adopts.NOTHING,)},
)

MOVES: Final = (
    STAND,
    RESCOPE,
    REGRANT,
    UNCOVER,
    FALL,
    RESET_SERVER,
    RESET_DEVICE,
    REACH,
    SEND,
    FOLLOW,
    SETTLE,
    UNSEND,
    REFUSE,
    DISOWN,
    KEEP,
    PUBLISH,
    ABANDON,
    SCHEDULE,
    INDEX,
    ADOPTED,
)


def from_nothing(state: ReplicaState, stage: Stage | None) -> list[str] | None:
    """Names of the collections that the next pull brings from nothing; None for all, and none
    where it brings only what changed. A pull that is staged goes on as it began."""
    if stage is not None:
        return stage.full
    found = lacks(state)
    if found is Lacks.NOTHING:
        return []
    return state.uncovered if found is Lacks.SOME else None

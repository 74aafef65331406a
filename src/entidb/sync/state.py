"""The engine's states and the one table of legal moves, and the results a cycle hands out."""

from __future__ import annotations

from enum import Enum
from typing import Any

from msgspec import Struct, field

from entidb.db.notebook import counted, line, table
from entidb.errors import SyncStateError
from entidb.sync.apply.report import Resolved, Withdrawn
from entidb.sync.conflict import Conflict
from entidb.sync.refusal import KeptBack


class SyncState(Enum):
    """Where an engine is in a cycle."""

    #: Nothing is going on; nothing has been synchronised since the engine was made or failed.
    IDLE = "idle"
    #: Shaking hands with the server.
    CONNECTING = "connecting"
    #: Bringing in what others did.
    PULLING = "pulling"
    #: Sending what this device did.
    PUSHING = "pushing"
    #: The last cycle ended well.
    SYNCED = "synced"
    #: The last cycle failed and will not be tried again by itself.
    ERROR = "error"
    #: The last attempt failed; the engine waits for the time of the next one.
    RETRY_WAIT = "retry_wait"
    #: Another process's engine runs in the background; this one takes over when that one ends.
    STANDBY = "standby"

    #: As its members are equal: by identity. An enum's own asks for the name, at every move.
    __hash__ = object.__hash__


_S = SyncState

#: Every legal move; anything else is a bug and raises ``SyncStateError``. Each state has a way
#: out (R9): cancelling leads from any of them back to IDLE.
TRANSITIONS: dict[SyncState, frozenset[SyncState]] = {
    _S.IDLE: frozenset({_S.CONNECTING, _S.PULLING, _S.PUSHING, _S.ERROR}),
    _S.CONNECTING: frozenset({_S.PULLING, _S.PUSHING, _S.ERROR, _S.RETRY_WAIT, _S.IDLE}),
    _S.PULLING: frozenset({_S.PUSHING, _S.SYNCED, _S.ERROR, _S.RETRY_WAIT, _S.IDLE}),
    _S.PUSHING: frozenset({_S.PULLING, _S.SYNCED, _S.ERROR, _S.RETRY_WAIT, _S.IDLE}),
    _S.SYNCED: frozenset({_S.CONNECTING, _S.PULLING, _S.PUSHING, _S.ERROR, _S.IDLE}),
    _S.ERROR: frozenset({_S.CONNECTING, _S.PULLING, _S.PUSHING, _S.IDLE, _S.ERROR}),
    _S.STANDBY: frozenset({_S.IDLE}),
    _S.RETRY_WAIT: frozenset({_S.CONNECTING, _S.PULLING, _S.PUSHING, _S.ERROR, _S.IDLE}),
}


def check_move(old: SyncState, new: SyncState) -> None:
    """Raises ``SyncStateError`` unless ``old`` to ``new`` is in the table (or no move at all)."""
    if new is not old and new not in TRANSITIONS[old]:
        raise SyncStateError(f"an engine cannot go from {old.value} to {new.value}")


class SyncCycleResult(Struct):
    """What one cycle did.

    Counts are operations for ``pulled`` and ``pushed_operations``, transactions for the others.
    ``conflicts`` were decided by a policy, ``unresolved`` wait for ``resolve()``, ``withdrawn``
    went to the discarded list (R4); ``done`` are ids of transactions the server had already (R24).
    ``kept_back`` are pending transactions that do not get through to the server (R5).
    ``overruled`` counts the values that a policy decided against and that are kept (R4).
    ``incomplete`` says that conflicts were still coming after ``rounds_max`` rounds (R7): the rest
    is pending, sync again. ``reset`` says everything was pulled anew.
    """

    pulled: int = 0
    pushed: int = 0
    pushed_operations: int = 0
    superseded: int = 0
    conflicts: list[Resolved] = field(default_factory=list)
    unresolved: list[Conflict] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)
    done: list[bytes] = field(default_factory=list)
    kept_back: list[KeptBack] = field(default_factory=list)
    overruled: int = 0
    rounds: int = 0
    requests: int = 0
    bytes_pulled: int = 0
    bytes_pushed: int = 0
    reset: bool = False
    incomplete: bool = False
    attempts: int = 1
    duration_s: float = 0.0

    @property
    def changed(self) -> bool:
        """Whether anything at all happened."""
        return bool(
            self.pulled or self.pushed or self.superseded or self.withdrawn or self.unresolved
        )

    def _counts(self) -> dict[str, Any]:
        """What happened, by its name."""
        found = {name: getattr(self, name) for name in self.__struct_fields__}
        found = {n: len(v) if isinstance(v, list) else v for n, v in found.items()}
        found["attempts"] = self.attempts if self.attempts > 1 else 0
        found["duration_s"] = f"{self.duration_s:.3f}" if self.duration_s else 0
        return {name: count for name, count in found.items() if count}

    def __repr__(self) -> str:
        return line("SyncCycleResult", counted(**self._counts()) or "nothing to do")

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), str(count)) for name, count in self._counts().items()]
        return table("One cycle", ("", ""), rows, "" if rows else "nothing to do")


class SyncProgress(Struct, frozen=True):
    """How far a cycle is: operations and payload bytes done in this phase, and the operations in
    all as far as known (None: unknown). While it pushes, whole transactions are counted."""

    state: SyncState
    operations: int
    bytes: int
    operations_total: int | None


class SyncStats(Struct):
    """Running totals of an engine since it was made."""

    cycles: int = 0
    failures: int = 0
    pulled: int = 0
    pushed: int = 0
    conflicts: int = 0
    withdrawn: int = 0
    requests: int = 0
    bytes_pulled: int = 0
    bytes_pushed: int = 0
    retries: int = 0
    overruled: int = 0

    def add(self, result: SyncCycleResult) -> None:
        self.cycles += 1
        self.pulled += result.pulled
        self.pushed += result.pushed
        self.conflicts += len(result.conflicts) + len(result.unresolved)
        self.withdrawn += len(result.withdrawn)
        self.overruled += result.overruled
        self.requests += result.requests
        self.bytes_pulled += result.bytes_pulled
        self.bytes_pushed += result.bytes_pushed


class SyncStatus(Struct, frozen=True):
    """What a program shows a person about a device. ``cursor`` is the server commit up to which it
    has everything, its own included. ``discarded`` counts withdrawn transactions, ``overruled``
    values that a policy decided against (R4). ``*_ms`` are wall-clock milliseconds since 1970;
    ``next_retry_s`` is how long until the next attempt, None where none is planned. ``live`` says
    how a background run learns what others write: ``live`` (at once), ``polling`` (nearly so), or
    ``offline`` (with the next cycle); since when, where there is such a run, and ``heard_ms`` when
    it last heard of a commit, None if never. ``subject`` is who
    the server last said that this device syncs as, None if nobody; ``others`` counts, of
    ``pending`` and ``held``, what waits for other subjects to sync here (R36)."""

    state: SyncState
    pending: int
    held: int
    conflicts: int
    discarded: int
    cursor: int
    db_id: str | None
    history: str | None
    last_success_ms: int | None
    last_error: str | None
    last_error_code: str | None
    next_retry_s: float | None
    overruled: int = 0
    live: str = "offline"
    live_since_ms: int | None = None
    heard_ms: int | None = None
    subject: str | None = None
    others: dict[str, int] = {}

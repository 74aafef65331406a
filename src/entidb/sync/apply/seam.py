"""What a cycle needs of a device, and the values the two exchange.

The cycle knows this alone; ``applier`` is the implementation on a database.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct, field

from entidb.db.moment import Moment
from entidb.db.pending import PendingTransaction, decode_pending
from entidb.db.records import OverruledHead
from entidb.db.replica import ImageSegment, Inflight, ReplicaState, Stage
from entidb.protocol import (
    DigestRequest,
    DigestResponse,
    Manifest,
    PullRequest,
    PullResponse,
    PushResponse,
    PushTransaction,
)
from entidb.sync.apply.report import RebaseReport
from entidb.sync.segment_files import SegmentFiles
from entidb.types import SEQUENCE_MAX


class BatchLimits(Struct, frozen=True):
    """How much one push batch may hold; a larger single transaction is sent alone. Transactions
    committed after ``sequence_max`` wait for the next cycle, so that a cycle ends even while a
    program keeps writing. Those in ``without``, by their sequence, are left out, with all that is
    built on them."""

    operations_max: int = 5000
    bytes_max: int = 4 * 1024 * 1024
    sequence_max: int = SEQUENCE_MAX
    transactions_max: int = SEQUENCE_MAX
    collections_max: int = SEQUENCE_MAX
    without: frozenset[int] = frozenset()
    #: The server's clock as the newest answer said it, in ms; 0 if none did.
    server_ms: int = 0


class PushBatch(Struct):
    """A batch that is in flight (R5): what is sent, and what it was made of.

    Of each transaction its outbox row (``keys``, ``rows``), the local commit that made it
    (``sequences``; all as ``ranges``) and how many operations it has (``counts``); ``chained`` are
    the places of those with an operation that follows another pending one on the same entity. Of
    each operation, one after another, the collection's number and the entity's row
    (``entity_rows``), which is still the entity's own while ``moment`` is current. Columns and not
    objects: a batch has thousands of each.
    """

    keys: list[bytes]
    rows: list[bytes]
    counts: list[int]
    chained: set[int]
    numbers: list[int]
    entity_keys: list[bytes]
    entity_rows: list[bytes]
    sequences: list[int]
    ranges: list[list[int]]
    collections: list[str]
    transactions: list[PushTransaction]
    cursor: int
    bytes: int
    moment: Moment

    def pending(self, index: int) -> PendingTransaction:
        """Its transaction number ``index`` as it was sent."""
        return decode_pending(self.keys[index], self.rows[index])


class Settled(Struct):
    """What settling did. ``pull`` says the cycle must pull before it pushes more than what is in
    flight; ``next_batch`` was prepared in the same commit."""

    accepted: int = 0
    accepted_operations: int = 0
    superseded: int = 0
    conflicts: int = 0
    rejected: int = 0
    pull: bool = False
    next_batch: PushBatch | None = None
    report: RebaseReport = field(default_factory=RebaseReport)


class OpenSegment(Struct):
    """A segment that was fetched and proved, to be staged: the ids of its entities, and their rows
    as they will be stored; ``used_up`` when all of it is."""

    segment: ImageSegment
    ids: list[bytes]
    rows: list[bytes]
    newest_timestamp: int
    used_up: bool = False


class Look(Struct, frozen=True):
    """What a cycle has to know of a device before a step, all of one moment.

    ``scope`` are the names to ask the server for; None for all. ``sequence`` is the newest local
    commit, ``ready`` how many transactions wait to be pushed. ``adopting`` says that entities have
    still to be made pending (R29, R31), ``garbage`` that replaced tables have still to be emptied;
    ``overruled`` counts what is kept (R4).
    """

    moment: Moment
    state: ReplicaState
    stage: Stage | None
    inflight: Inflight | None
    scope: list[str] | None
    sequence: int
    ready: int
    adopting: bool
    garbage: bool
    overruled: OverruledHead


class SyncApplier(Protocol):
    """What a cycle needs of a device. Each method is one storage commit, or none where nothing
    changes; each can be the last thing that ever happens, and the next cycle goes on from there.
    """

    @property
    def device_id(self) -> bytes: ...

    def look(self) -> Look:
        """The device as it is now. Nothing is read while nothing was committed since the last
        look."""
        ...

    def bind(self, db_id: str, history: bytes, subject: str | None = None) -> None:
        """Remember whose replica this is, and sign in as ``subject``, if the server has named one.
        Raises ``ConfigError`` if it is another database's."""
        ...

    def sign_in(self, subject: str) -> None:
        """The server says that this device syncs as ``subject``: what is pending of others is kept
        for them, and is in no batch from here on (R36)."""
        ...

    def inflight(self) -> list[PushBatch]:
        """The batches that may have been sent and have no answer (R5), exactly as they were sent,
        in order: none, one, or two."""
        ...

    def prepare(self, limits: BatchLimits) -> PushBatch | None:
        """Choose the next batch and make it durable as in flight; None if nothing is ready."""
        ...

    def prepare_after(self, batch: PushBatch, limits: BatchLimits) -> PushBatch | None:
        """Choose the batch after ``batch``, the only one in flight, and make it durable as in
        flight behind it. It touches no entity that ``batch`` touches, so it is right whatever
        becomes of ``batch``; None if there is no such batch."""
        ...

    def settle(
        self,
        batch: PushBatch,
        response: PushResponse,
        limits: BatchLimits | None,
        following: PushBatch | None = None,
    ) -> Settled:
        """Apply the verdicts (R18) on the first batch in flight; ``following`` is the other, if
        there is one. If ``limits`` are given and no pull is needed first, prepare one more, as
        ``prepare`` or ``prepare_after`` would."""
        ...

    def doubt(self) -> None:
        """What is in flight was sent, and its answer is lost: until a pull has shown what became of
        it, remember that the server may have accepted it (R28)."""
        ...

    def unsend(self) -> None:
        """The batches in flight count as not sent (R5): an answer proves that nothing of what was
        sent now was decided. A pull comes before anything of it is withdrawn, because an earlier
        sending may have arrived."""
        ...

    def refuse(self, batch: PushBatch, code: str, message: str) -> RebaseReport:
        """Withdraw the transactions of ``batch``, the first in flight, which the server refuses
        for good (R4), with those built on them. Nothing is in flight afterwards."""
        ...

    def still_pending(self, sequences: Iterable[int]) -> list[int]:
        """Those of these local commits whose transactions are in the outbox."""
        ...

    def confirm(self, cursor: int) -> None:
        """A pull has reached ``cursor`` and brought nothing but the device's own commits. Not
        worth a storage commit (R10): the next one that is made anyway takes the cursor along."""
        ...

    def apply(self, request: PullRequest, response: PullResponse) -> RebaseReport:
        """Apply one page that reaches the head: data, cursor, rebase, feed (R20, R22)."""
        ...

    def stage_page(
        self, request: PullRequest, response: PullResponse, full: list[str] | None
    ) -> Stage:
        """Keep one page of several, durable and out of sight. ``full`` are the collections
        that come from nothing (None: all)."""
        ...

    def begin_image(
        self, manifest: Manifest, full: list[str] | None, names: list[str] | None
    ) -> Stage:
        """Begin a stage with an image of the collections ``names`` (None: all in scope), which was
        asked for because they come from nothing (R35)."""
        ...

    def segment_files(self) -> SegmentFiles:
        """Where segments come before they are staged."""
        ...

    def open_segment(self, segment: ImageSegment, head: int, data: bytes) -> OpenSegment:
        """Prove that ``data`` is that segment, of an image of the commit ``head``, and as much of
        it as the settings say. Raises ``ProtocolError``; nothing is stored, and any thread may."""
        ...

    def stage_segment(self, opened: OpenSegment) -> Stage:
        """Keep a bounded part of the segment, the next of the image, durable and out of sight. With
        the last part of the last one the stage is that of an ordinary pull, at the commit of the
        image."""
        ...

    def note_failure(self) -> int:
        """Fetching failed, and nothing came: how often in a row it has now."""
        ...

    def publish(self) -> RebaseReport:
        """Make a complete stage the database's state in one commit."""
        ...

    def restart_stage(self, *, full: bool) -> None:
        """Forget what is staged; ``full`` asks for everything from 0 at the next pull (R28)."""
        ...

    def grant(self, granted: list[str] | None) -> RebaseReport:
        """Make these collections (None: all) what the token grants, as the server has said (R31).
        Nothing may be in flight. Raises ``PermissionDeniedError`` where a reset is to keep what
        is not granted; then nothing changes."""
        ...

    def repair(self, request: DigestRequest, response: DigestResponse) -> RebaseReport:
        """Make what the server has of the entities in ``response`` what the device knows of it,
        with what is pending there on top (R34). Raises ``SyncStateError`` if the device is not
        where it was when it asked."""
        ...

    def adopt(self) -> bool:
        """Make the next bounded part of entities pending that a wider scope or a reset brought
        up (R29, R31); whether there may be more."""
        ...

    def tidy(self) -> bool:
        """Remove a bounded part of what was replaced; whether there may be more."""
        ...

"""One storage commit in the making: reads fall through to a snapshot, writes stay in memory.

Everything that changes a database goes through a ``Writer``: local transactions, settling,
applying, the server's pushes. Rows of entities are ``entities``'s; here are head, outbox, accepted
transactions and the records of sync. It decides nothing about sync, and it never touches the disk:
``Database`` commits its ``changes`` in one go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from entidb.db import machine
from entidb.db.catalogue import Catalogue
from entidb.db.entities import Entities
from entidb.db.moment import Moment
from entidb.db.overlay import STALE_ROWS_MAX, Ref
from entidb.db.pending import PendingTransaction, decode_pending
from entidb.db.records import (
    ACCEPTED,
    FEED,
    HELD,
    META_HEAD,
    META_INFLIGHT,
    META_STAGE,
    META_SYNC,
    READY,
    Head,
    decode_head,
    pack_accepted,
    sequence_key,
)
from entidb.db.replica import (
    Inflight,
    ReplicaState,
    Stage,
    decode_record,
    decode_state,
    encode_record,
)
from entidb.storage import Snapshot
from entidb.types import Term

#: What a commit left: its mark, head, catalogue, and as far as they are known the state of sync and
#: counts of entities.
Left = tuple[int, bytes | None, Catalogue, ReplicaState | None, dict[int, int]]


class Writer(Entities):
    """The overlay of one commit. Only the thread that holds the database's writer lock uses it."""

    #: Whether a local transaction that finds nothing else to push is marked as in flight by its
    #: own commit (R5).
    marks = False
    #: The term that begins with this commit, once it does (``terms``).
    term: Term | None = None
    #: Such a mark, while it is known that nothing of it was sent.
    unsent: Inflight | None = None
    #: Two of the records of sync as this commit leaves them, so far: where they are known.
    known_state: ReplicaState | None = None
    _inflight: Inflight | None = None

    def __init__(
        self,
        snapshot: Snapshot,
        catalogue: Catalogue,
        head: bytes | None,
        device_id: bytes,
        moment: Moment,
        now_ms: int = 0,
        stale_rows_max: int = STALE_ROWS_MAX,
    ) -> None:
        super().__init__(snapshot, catalogue, device_id, stale_rows_max)
        self.head = Head() if head is None else decode_head(head)
        #: The first commit sequence that this may take.
        self.first_sequence = self.head.sequence + 1
        #: As it is stored: before this commit, and after it from ``finish`` on.
        self.encoded_head = self.head.encode() if head is None else head
        #: Until when what is read here is true; it passes the commit that this becomes.
        self.moment = moment
        self.now_ms = now_ms

    # ------------------------------------------------------------ raw rows

    def put(self, key: bytes, value: bytes) -> None:
        self.changes[key] = value

    def delete(self, key: bytes) -> None:
        self.changes[key] = None

    def delete_many(self, keys: Iterable[bytes]) -> None:
        self.changes.update(dict.fromkeys(keys))

    # ------------------------------------------------------------ head, catalogue, sync records

    def next_sequence(self) -> int:
        self.head.sequence += 1
        return self.head.sequence

    def know(self, state: ReplicaState, inflight: Inflight | None) -> None:
        """The records of sync at the moment at which this commit begins, from a reader that has
        them; ``inflight`` None: it has not. What this commit has changed already stays."""
        if META_SYNC not in self.changes:
            self.known_state = state
        if META_INFLIGHT not in self.changes:
            self._inflight = inflight

    @property
    def sync_state(self) -> ReplicaState:
        if self.known_state is None:
            raw = self.get(META_SYNC)
            self.known_state = ReplicaState() if raw is None else decode_state(raw)
        return self.known_state

    def set_sync_state(self, state: ReplicaState) -> None:
        self.known_state = state
        self.changes[META_SYNC] = encode_record(state)

    @property
    def inflight(self) -> Inflight | None:
        if self._inflight is None and (raw := self.get(META_INFLIGHT)) is not None:
            self._inflight = decode_record(Inflight, raw)
        return self._inflight

    def set_inflight(self, inflight: Inflight | None) -> None:
        self._inflight = inflight
        self.changes[META_INFLIGHT] = None if inflight is None else encode_record(inflight)

    def begin(self, origin: str) -> None:
        """The commit is a program's own ("local"), one that sends ("send"), or any other."""
        if origin != "local":
            self.marks = False
            if self.unsent is not None and origin != "send":
                self.unmark()

    def mark(self, sequence: int) -> None:
        """The transaction of this commit is in flight from here on, if nothing else is (R5), and
        this device lacks nothing but what is newer than its cursor: what is being pulled anew is
        complete before anything is sent (R20, R31), also after a crash that forgets what was not
        sent."""
        if self.get(META_INFLIGHT) is None and self.get(META_STAGE) is None and self._is_whole():
            self.unsent = Inflight([[sequence, sequence]])
            self.set_inflight(machine.SEND(None, self.unsent))

    def _is_whole(self) -> bool:
        state = self.sync_state
        return not (state.full or state.uncovered or state.foreign or state.foreign_names)

    def unmark(self) -> None:
        """What was marked by its own commit and was not sent is not in flight any more."""
        if self.unsent is not None:
            self.set_inflight(machine.UNSEND(self.unsent, None))
            self.unsent = None

    @property
    def stage(self) -> Stage | None:
        raw = self.get(META_STAGE)
        return None if raw is None else decode_record(Stage, raw)

    def set_stage(self, stage: Stage | None) -> None:
        self.changes[META_STAGE] = None if stage is None else encode_record(stage)

    def abandon_stage(self) -> None:
        """Forget a stage; what it has written becomes garbage."""
        stage = self.stage
        if stage is None:
            return
        catalogue = self.catalogue
        for tables in (stage.tables, stage.deltas):
            for number, table in tables.items():
                catalogue = catalogue.discarding(table, int(number))
        if stage.tables or stage.deltas:
            self.set_catalogue(catalogue)
        self.set_stage(machine.ABANDON(stage, None))

    # ------------------------------------------------------------ accepted transactions (R14)

    def accepted(self, ids: Sequence[bytes]) -> list[bytes | None]:
        """What is remembered of transactions that were accepted: an AcceptedRow, still encoded."""
        return self.get_many([ACCEPTED + transaction_id for transaction_id in ids])

    def put_accepted(self, transaction_id: bytes, version: int, digest: bytes) -> None:
        """Remember that the transaction was accepted as ``version``."""
        self.changes[ACCEPTED + transaction_id] = pack_accepted(version, digest)

    def put_all_accepted(
        self, ids: Sequence[bytes], versions: Iterable[int], digests: Iterable[bytes]
    ) -> None:
        """As ``put_accepted`` for each, in columns."""
        keys = [ACCEPTED + transaction_id for transaction_id in ids]
        self.changes.update(zip(keys, map(pack_accepted, versions, digests), strict=True))

    # ------------------------------------------------------------ outbox

    def pending(self, sequence: int) -> PendingTransaction | None:
        """The pending transaction made by local commit ``sequence``, ready or held."""
        for kind in (READY, HELD):
            key = sequence_key(kind, sequence)
            raw = self.get(key)
            if raw is not None:
                return decode_pending(key, raw)
        return None

    def put_pending(self, transaction: PendingTransaction) -> None:
        self.changes[transaction.key] = transaction.encode()

    def finish(self) -> dict[bytes, bytes | None]:
        """The whole commit, counters included; empty when nothing changes."""
        if self.watcher is not None:
            self.watcher.finish()
            # It holds on to this in turn. As a circle both would stay, with the whole commit, until
            # the collector of garbage comes by.
            self.watcher = None
        self.finish_places(self.head.sequence)
        head = self.head.encode()
        if head != self.encoded_head:
            self.encoded_head = self.changes[META_HEAD] = head
        return self.changes


def feed_bounds(after: int) -> tuple[bytes, bytes]:
    """Start and stop of a feed scan behind ``after``."""
    return sequence_key(FEED, after + 1), bytes([FEED[0] + 1])


__all__ = ["STALE_ROWS_MAX", "Left", "Ref", "Writer", "feed_bounds"]

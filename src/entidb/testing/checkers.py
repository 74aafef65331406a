"""The checkers of the server's side: its commits and its answers.

Every checker compares with the oracle, never with what the code under test says of itself. The
checkers of a device's side are in ``watch``; the simulator calls them.

Not here: what must hold, by name (``invariants``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from entidb.db.catalogue import Catalogue, decode_catalogue, empty_catalogue
from entidb.db.records import (
    ACCEPTED,
    ENTITY,
    META_CATALOGUE,
    META_FLOOR,
    META_FULLNESS,
    META_HEAD,
    TERM,
    accepted_key,
    decode_accepted,
    decode_head,
    payload_of,
    sequence_of,
    unpack_entity,
    unpack_u64,
)
from entidb.errors import HistoryChangedError, ResetRequiredError, SyncError
from entidb.protocol import (
    HandshakeResponse,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    PushTransaction,
    RoundRequest,
    Verdict,
    digest_stored_newer,
    operations_digest,
)
from entidb.server.pages import seen_by
from entidb.server.service import ROUND_ROWS_MAX
from entidb.storage.base import Batch
from entidb.testing.faults import FaultyStorage
from entidb.testing.invariants import GROUP_COLLECTION, POISON, Checks, group_is_whole
from entidb.testing.oracle import History, Mark, Ref, has_version
from entidb.testing.pages import Seen, check_fresh, check_page
from entidb.testing.quota import OVER_QUOTA, QuotaWatch
from entidb.testing.unique import NOT_UNIQUE, UniqueWatch
from entidb.types import Clock, timestamp_from_ms


class ServerWatch:
    """Checks one server database: every commit before any reader sees it, every answer before it
    leaves. ``members`` are the pushes being decided, ``program`` the writes of a transaction of a
    program on the server."""

    def __init__(self, checks: Checks, history: History, clock: Clock) -> None:
        self.checks = checks
        self._clock = clock
        self.history = history
        self.members: list[PushRequest] = []
        self.program: list[tuple[Ref, bytes | None]] | None = None
        #: The head before the group that is being decided, its history, and when that was.
        self.head_before = 0
        self.decided_in = history
        self.decided_ms = 0
        #: The hook is a user's: it may refuse what it likes.
        self.any_refusal = False
        #: Where something is unique.
        self.unique: UniqueWatch | None = None
        #: Where there is a quota of what it holds.
        self.quota: QuotaWatch | None = None
        #: What is to be stored of what a program of this schema has pushed (R33).
        self.newest: Callable[[int, bytes | None], bytes | None] = lambda schema, payload: payload
        self._catalogue: tuple[bytes | None, Catalogue] = (None, empty_catalogue())

    def now(self) -> Seen:
        return Seen(self.history, self.history.head, self.history.floor)

    def begins(self) -> None:
        """Something is decided, on what is there now."""
        self.head_before, self.decided_in = self.history.head, self.history
        self.decided_ms = self._clock.now_ms()
        if self.quota is not None:
            self.quota.begins()

    def opened(self, storage: FaultyStorage) -> None:
        """A process begins to decide on this store."""
        quota = self.quota
        if quota is not None:
            quota.opened()
            # Others look as well; while something is decided it is the quota that asks.
            storage.measured = lambda info: quota.measured(info) if self.members else None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Others decide inside the block, while what is being decided waits."""
        members, program, decided_ms = self.members, self.program, self.decided_ms
        head_before, decided_in = self.head_before, self.decided_in
        try:
            yield
        finally:
            self.members, self.program, self.decided_ms = members, program, decided_ms
            self.head_before, self.decided_in = head_before, decided_in

    # ------------------------------------------------------------ commits

    def on_commit(
        self, batch: Batch, old: Mapping[bytes, bytes | None], records: Mapping[bytes, bytes]
    ) -> None:
        if META_FLOOR in batch:
            floor = unpack_u64(records[META_FLOOR])
            self.checks.that(floor >= self.history.floor, "ORDER", "the floor went back")
            self.history.floor = floor
        if META_HEAD in batch:
            self._on_versions(batch, records)
        if self.quota is not None:
            self.quota.said(batch.get(META_FULLNESS))

    def _on_versions(self, batch: Batch, records: Mapping[bytes, bytes]) -> None:
        head = decode_head(records[META_HEAD]).sequence
        if head <= self.history.head:
            return
        self.history.terms += [
            (sequence_of(key), raw)
            for key, raw in sorted(batch.items())
            if key[:1] == TERM and raw is not None
        ]
        rows = self._rows(batch, records)
        touched: dict[Ref, None] = {}
        accepted = {
            version: (key[1:], digest)
            for key, raw in batch.items()
            if key[:1] == ACCEPTED and raw is not None
            for version, digest in (decode_accepted(raw),)
        }
        for version in range(self.history.head + 1, head + 1):
            found = accepted.pop(version, None)
            if found is None:
                writes = self._program_writes(version)
                marks = [rows[ref][2] for ref, _ in writes if ref in rows]
                self.history.append(None, b"", writes, marks[0] if marks else (b"", 0))
            else:
                writes = self._accept(*found, version, rows)
            touched.update(dict.fromkeys(ref for ref, _ in writes))
        if accepted:
            self.checks.fail("ORDER", f"versions {sorted(accepted)} were used a second time")
        self._compare(touched, rows)

    def _rows(
        self, batch: Batch, records: Mapping[bytes, bytes]
    ) -> dict[Ref, tuple[int, bytes | None, Mark]]:
        prefixes = {info.prefix: name for name, info in self.catalogue(records).by_name.items()}
        rows = {}
        groups: dict[bytes, bytes] = {}
        for key, raw in batch.items():
            if key[:1] == ENTITY and raw is not None:
                name = prefixes[key[:5]]
                _, _, version, device, timestamp = unpack_entity(raw)
                rows[name, key[5:]] = (version, payload_of(raw), (device, timestamp))
                if name == GROUP_COLLECTION:
                    groups[key[:20]] = key
        for key in groups.values():
            whole = group_is_whole(records, key[:5], key[5:])
            self.checks.that(whole, "WHOLE", f"the server shows half of {key[5:].hex()}")
        return rows

    def catalogue(self, records: Mapping[bytes, bytes]) -> Catalogue:
        raw = records.get(META_CATALOGUE)
        if raw is not self._catalogue[0]:
            self._catalogue = (raw, decode_catalogue(raw) if raw else empty_catalogue())
        return self._catalogue[1]

    def _program_writes(self, version: int) -> list[tuple[Ref, bytes | None]]:
        if self.program is None:
            self.checks.fail("EXACTLY-ONCE", f"commit {version} does not hold its transaction id")
        return self.program

    def _accept(
        self,
        transaction_id: bytes,
        digest: bytes,
        version: int,
        rows: Mapping[Ref, tuple[int, bytes | None, Mark]],
    ) -> list[tuple[Ref, bytes | None]]:
        """The oracle decides for itself whether this transaction could be accepted. Copies of a
        device can push one id with different content to the same commit: what the server remembers
        is one of those, and the rows are its (R14). A message that comes late can bring the content
        again at another time than after a clock came back (R27): the rows say which counted."""
        known = self.history.accepted.get(transaction_id)
        self.checks.that(
            known is None or known[0] <= self.history.floor,
            "EXACTLY-ONCE",
            f"transaction {transaction_id.hex()} was accepted as {known} and as {version}",
        )
        pushed = self._candidates(transaction_id)
        if not pushed:
            self.checks.fail("WHOLE", f"no device pushed transaction {transaction_id.hex()}")
        blamed = ("EXACTLY-ONCE", f"{transaction_id.hex()} is remembered with other content")
        possible: list[tuple[Mark, list[tuple[Ref, bytes | None]]]] = []
        for request, transaction, before in pushed:
            names = request.collections
            if self._digest(request, transaction) != digest:
                continue
            lost = self._lost_update(request, transaction, before)
            if lost is None:
                writes: list[tuple[Ref, bytes | None]] = [
                    ((names[op.collection], op.entity_id), self.newest(request.schema, op.payload))
                    for op in transaction.operations
                ]
                # R27: a timestamp from the future counts as now.
                stamp = min(transaction.timestamp, _latest(self.decided_ms))
                possible.append(((request.device_id, stamp), writes))
            else:
                blamed = lost
        if not possible:
            self.checks.fail(*blamed)
        mark, writes = next(filter(partial(_is_marked, rows, version), possible), possible[0])
        self.history.append(transaction_id, digest, writes, mark)
        if self.quota is not None:
            self.quota.accepted(self.history)
        self.checks.passed("NO-LOST-UPDATE", len(writes))
        return writes

    def _digest(self, request: PushRequest, transaction: PushTransaction) -> bytes:
        """What the server remembers of what it has stored of this (R14, R33)."""
        plain = operations_digest(request.collections, transaction.operations)
        stays = all(
            self.newest(request.schema, op.payload) == op.payload for op in transaction.operations
        )
        return plain if stays else digest_stored_newer(plain)

    def latest_timestamp(self) -> int:
        """The latest timestamp that anything may have now."""
        return _latest(self._clock.now_ms())

    def _candidates(
        self, transaction_id: bytes
    ) -> list[tuple[PushRequest, PushTransaction, Sequence[PushTransaction]]]:
        found: list[tuple[PushRequest, PushTransaction, Sequence[PushTransaction]]] = []
        for request in self.members:
            for index, transaction in enumerate(request.transactions):
                if transaction.transaction_id == transaction_id:
                    found.append((request, transaction, request.transactions[:index]))
        return found

    def _lost_update(
        self, request: PushRequest, transaction: PushTransaction, before: Sequence[PushTransaction]
    ) -> tuple[str, str] | None:
        names = request.collections
        for op in transaction.operations:
            ref = (names[op.collection], op.entity_id)
            version, payload = self.history.latest(ref)
            # A tombstone at or below the floor may be gone; a device above it has seen so (R28).
            gone = payload is None and version <= self.history.floor <= request.cursor
            if version > op.base_version and not gone and not self._wrote(request, before, version):
                kind = "NO-RESURRECTION" if payload is None else "NO-LOST-UPDATE"
                return kind, (
                    f"{ref[0]}/{ref[1].hex()} is at version {version}, and was replaced by a "
                    f"transaction that was made on {op.base_version}"
                )
        if request.cursor < self.history.floor:
            return "NO-RESURRECTION", "a transaction from below the floor was accepted"
        return None

    def _wrote(self, request: PushRequest, before: Sequence[PushTransaction], version: int) -> bool:
        """Whether one of ``before``, of the same batch, is what was accepted as ``version``. With
        other content it is superseded, and what was accepted came between (R13, R14)."""
        writer, names = self.history.writers[version], request.collections
        return writer is not None and any(
            transaction.transaction_id == writer[0]
            and writer[1] in _remembered(operations_digest(names, transaction.operations))
            for transaction in before
        )

    def _compare(
        self, touched: Mapping[Ref, None], rows: Mapping[Ref, tuple[int, bytes | None, Mark]]
    ) -> None:
        latest_timestamp = self.latest_timestamp()
        for ref in touched:
            row, due = rows.get(ref), self.history.latest(ref)
            if row is None or row[:2] != due:
                self.checks.fail(
                    "WHOLE",
                    f"{ref[0]}/{ref[1].hex()} is {row} on the server, and should be {due}",
                )
            if row[2] != self.history.marks[due[0]] or row[2][1] > latest_timestamp:
                self.checks.fail(
                    "CLOCK",
                    f"{ref[0]}/{ref[1].hex()} is marked {row[2]} on the server, and should be "
                    f"{self.history.marks[due[0]]}, not after {latest_timestamp}",
                )
        self.checks.passed("WHOLE", len(touched))
        self.checks.passed("CLOCK", len(touched))
        if len(rows) != len(touched):
            self.checks.fail("WHOLE", "a commit wrote more than the transactions it accepted")

    # ------------------------------------------------------------ answers

    def on_push(
        self,
        request: PushRequest,
        response: PushResponse,
        records: Mapping[bytes, bytes],
        granted: frozenset[str] | None = None,
        *,
        may_write: bool = True,
    ) -> None:
        # While a node was paused after its commit, another may have begun a history.
        known_by = self.decided_in if request.history != self.history.identity else self.history
        self._check_history(request.history, known_by)
        names = request.collections
        refused: dict[Ref, None] = {}
        for index, transaction in enumerate(request.transactions):
            result = response.results[index]
            refs = [(names[op.collection], op.entity_id) for op in transaction.operations]
            known = self.history.accepted.get(transaction.transaction_id)
            digest = operations_digest(names, transaction.operations)
            name = transaction.transaction_id.hex()
            if result.verdict == Verdict.ACCEPTED:
                self.checks.that(
                    known is not None and known[0] == result.version,
                    "SERVER-DURABLE",
                    f"{name} was called accepted as {result.version}; the server has {known}",
                )
                assert known is not None
                same = known[1] in _remembered(digest)
                self.checks.that(same, "EXACTLY-ONCE", f"{name} has other content")
                row = records.get(accepted_key(transaction.transaction_id))
                remembered = row is not None or known[0] <= self.history.floor
                self.checks.that(remembered, "EXACTLY-ONCE", f"{name} was not remembered")
                continue
            if result.verdict == Verdict.SUPERSEDED:
                self.checks.that(
                    known is not None
                    and known[1] != digest
                    and (known[1] not in _remembered(digest) or self._replaced(refs, known[0])),
                    "EXACTLY-ONCE",
                    f"{name} was called superseded and is not",
                )
                # What follows was built on this one's content, which is not what the server has.
                refused.update(dict.fromkeys(refs))
                continue
            # A later member of the same group may be a copy that was made on something newer.
            unknown = known is None or known[0] <= self.history.floor or known[0] > self.head_before
            self.checks.that(
                unknown,
                "EXACTLY-ONCE",
                f"{name} was accepted as {known} before, and decided again",
            )
            if result.verdict == Verdict.CONFLICT:
                self._false_conflict(request, transaction, refs, refused)
            elif result.code == NOT_UNIQUE and self.unique is not None:
                self.unique.refused(names, transaction, self.history, self.head_before)
            elif result.code == OVER_QUOTA and self.quota is not None:
                self.quota.refused(request, transaction, result, known_by, self.head_before)
            else:
                outside = granted is not None and any(ref[0] not in granted for ref in refs)
                self.checks.that(
                    self.any_refusal
                    or (result.code == "forbidden" and (outside or not may_write))
                    or any(op.payload and POISON in op.payload for op in transaction.operations),
                    "NO-POISON",
                    f"{name} was refused ({result.code}: {result.message}) without a reason",
                )
            refused.update(dict.fromkeys(refs))

    def _replaced(self, refs: list[Ref], version: int) -> bool:
        """Whether something that ``version`` wrote is not the latest any more, or is a forgotten
        deletion."""
        latest = [self.history.latest(ref) for ref in refs]
        forgotten = version <= self.history.floor
        return any(each[0] != version or (forgotten and each[1] is None) for each in latest)

    def _false_conflict(
        self,
        request: PushRequest,
        transaction: PushTransaction,
        refs: list[Ref],
        refused: Mapping[Ref, None],
    ) -> None:
        before = request.transactions[: request.transactions.index(transaction)]
        real = request.cursor < self.history.floor or any(
            ref in refused or self._came_between(request, ref, op.base_version, before)
            for ref, op in zip(refs, transaction.operations, strict=True)
        )
        self.checks.that(
            real, "NO-FALSE-CONFLICT", f"nothing came between {transaction.transaction_id.hex()}"
        )

    def _came_between(
        self, request: PushRequest, ref: Ref, base_version: int, before: Sequence[PushTransaction]
    ) -> bool:
        version = self.history.latest(ref)[0]
        return version > base_version and not self._wrote(request, before, version)

    def on_refusal(self, request: PullRequest | PushRequest, error: SyncError) -> None:
        """An error that makes a device start over needs its reason (R28, R29)."""
        if isinstance(error, HistoryChangedError):
            pulls = isinstance(request, PullRequest)
            head, seen = self.history.head if pulls else self.head_before, seen_by(request)
            has = request.seen is None or self.history.has(request.seen)
            self.checks.that(
                request.history != self.history.identity or seen > head or not has,
                "ORDER",
                "a request that named this history got the answer that it has changed",
            )
        if isinstance(error, ResetRequiredError):
            self.checks.that(
                request.cursor < self.history.floor and not getattr(request, "full", False),
                "RESET-ENDS",
                f"a device at {request.cursor} has to reset; the floor is {self.history.floor}",
            )

    def _check_history(self, asked: bytes, history: History) -> None:
        self.checks.that(
            asked == history.identity,
            "ORDER",
            "a request that named another history was answered",
        )

    def on_round(
        self, request: RoundRequest, granted: frozenset[str] | None, *, decided: bool
    ) -> None:
        """A push beside a pull is decided if that pull would have brought nothing, of what was
        there before its group, and only then (R6)."""
        pull, history = request.pull, self.history
        unseen = [
            (version, ref, payload)
            for version, ref, payload in history.changes_then(
                pull.cursor, self.head_before, self.head_before
            )
            if (pull.collections is None or ref[0] in pull.collections)
            and (granted is None or ref[0] in granted)
            and not has_version(pull.have, version)
        ]
        # A tombstone at or below the floor may be gone, and need not be.
        due = [row for row in unseen if row[2] is not None or row[0] > history.floor]
        # The server does not look for what concerns the device among any number of other rows.
        rows = sum(map(len, history.commits[pull.cursor + 1 : self.head_before + 1]))
        self.checks.that(
            not (decided and due),
            "PULL-FIRST",
            f"a push was decided for a device that had not seen {due[:3]}",
        )
        self.checks.that(
            decided or bool(unseen) or rows > ROUND_ROWS_MAX,
            "PULL-FIRST",
            f"a device at {pull.cursor} got the answer that it is behind, and nothing was",
        )

    def on_pull(
        self,
        request: PullRequest,
        response: PullResponse,
        granted: frozenset[str] | None = None,
        before: Seen | None = None,
    ) -> None:
        """A page is exactly what was next at its head, which is no older than what there was when
        it was asked for."""
        before = before or self.now()
        history = self.history if request.history == self.history.identity else before.history
        self._check_history(request.history, history)
        check_page(self.checks, history, request, response, granted)
        if history is before.history:
            check_fresh(self.checks, before, response.head, response.floor)

    def on_handshake(self, response: HandshakeResponse, before: Seen) -> None:
        """It says what was true when it was asked for, or has become so since."""
        self.checks.that(
            response.history in (before.history.identity, self.history.identity),
            "FRESH",
            "a handshake names a history that had ended when it was asked for",
        )
        if response.history == before.history.identity:
            check_fresh(self.checks, before, response.head, response.floor)


def _latest(now_ms: int) -> int:
    return timestamp_from_ms(now_ms) | 0xFFFF


def _remembered(digest: bytes) -> tuple[bytes, bytes]:
    """How a server remembers a transaction of this digest: stored as pushed, or newer (R33)."""
    return digest, digest_stored_newer(digest)


def _is_marked(
    rows: Mapping[Ref, tuple[int, bytes | None, Mark]],
    version: int,
    candidate: tuple[Mark, list[tuple[Ref, bytes | None]]],
) -> bool:
    """Whether a row that is still this version's is what ``candidate`` wrote, with its mark."""
    mark, writes = candidate
    return any(ref in rows and rows[ref] == (version, payload, mark) for ref, payload in writes)

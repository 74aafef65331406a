"""Message in, message out, for one database: what the server decides (R11 to R17).

No authentication, no HTTP, no threads: a caller says what the token grants, and many pushes can be
decided in one storage commit (``push_many``). The pull is the database's change feed, the cursor
its commit sequence.
"""

from __future__ import annotations

import logging
import struct
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from operator import add
from typing import Any, Final, cast

from msgspec import Struct, field
from msgspec.structs import replace

from entidb import cbor, protocol
from entidb.collector import paused
from entidb.db import Database
from entidb.db.catalogue import Catalogue, CollectionInfo
from entidb.db.feed import feed_page, latest_of
from entidb.db.maintenance import CLOCK_MARK_MS, mark_clock, read_floor
from entidb.db.records import (
    ACCEPTED,
    ENTITY_HEAD,
    FEED,
    META_FLOOR,
    META_HEAD,
    REMOTE,
    TOMBSTONE,
    decode_accepted,
    decode_head,
    feed_key,
    pack_accepted,
    pack_entity,
    pack_feed_key,
    payload_of,
    split_feed_keys,
    unpack_entity,
    unpack_u64,
    version_of,
)
from entidb.db.writer import Writer, live_delta
from entidb.errors import (
    CborDecodeError,
    CorruptionError,
    HistoryChangedError,
    InvalidNameError,
    PermissionDeniedError,
    ResetRequiredError,
    SyncError,
    VersionMismatchError,
)
from entidb.protocol import (
    COLUMN_HEAD_BYTES,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    TOMBSTONE_SIZE,
    HandshakeRequest,
    HandshakeResponse,
    Limits,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushResponse,
    PushResult,
    PushTransaction,
    ServerState,
    Verdict,
    digest_heads,
    digest_operations,
    payload_bytes,
    transaction_bytes,
)
from entidb.server.work import Fault, too_much
from entidb.types import (
    COLLECTIONS_MAX,
    TRANSACTION_COLLECTIONS_MAX,
    check_name,
    timestamp_from_ms,
    uuid_from_bytes,
)
from entidb.types import OPERATION_OVERHEAD_BYTES as _COUNTED_OVERHEAD_BYTES

_log = logging.getLogger("entidb.server")

#: Feed rows looked at for one page at most, however many a filter or ``have`` leaves out, so that
#: a page takes bounded time.
SCAN_ROWS_MAX = 20_000
#: Entities read at a time while a page fills: as many as can be 16 MiB each without hurting.
#: A thousand at a time would be 16 GB then.
READ_ROWS = 16
#: And at most, when they turn out to be small.
READ_ROWS_MAX = 64
#: Payload bytes of a page at most, whatever a client asks for; a larger single commit is sent
#: whole (R19).
PAGE_BYTES_MAX = 8 * 1024 * 1024
#: A page ends at the first commit after it names so many collections. With the largest commit it
#: still names fewer than the 4,096 that devices take.
PAGE_NAMES_MAX = 1024
#: What a pulled operation takes on the wire beside its payload, roughly.
OPERATION_OVERHEAD_BYTES = 32
#: The plain number: looking a member up in its enum for every transaction costs more.
_ACCEPTED: Final = int(Verdict.ACCEPTED)
#: States sent along with a conflict are a courtesy; the pull that follows brings everything.
CONFLICT_STATES_MAX = 16

#: Transactions that are decided in columns if they can be; fewer are faster one by one.
_COLUMNS_FROM = 4

#: Commits that are the newest few.
RECENT_COMMITS = 64

#: Histories that devices' proofs may begin (R29), in so long a time. What is proved by files that
#: were put back is proved once for each time; more is a client that makes it up.
HISTORIES_MAX = 4
HISTORIES_WITHIN_MS = 3_600_000

#: Of what a ``validate`` hook says, as much as a device keeps.
_CODE_CHARS_MAX: Final = 64
_MESSAGE_CHARS_MAX: Final = 1000

FEATURES = ["have", "full", "columns"]


class Grant(Struct, frozen=True):
    """What a token allows on one database. ``collections`` None means all."""

    subject: str
    read: bool
    write: bool
    collections: frozenset[str] | None = None
    claims: dict[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> list[str] | None:
        """The collections as they are told to the device (R31), which would refuse an answer with
        a name that no collection can have."""
        return None if self.collections is None else sorted(filter(_is_name, self.collections))


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except InvalidNameError:
        return False
    return True


class Refusal(Struct, frozen=True):
    """A ``validate`` hook's no: ``code`` for programs, ``message`` for the person (R15)."""

    code: str
    message: str


class ValidateOperation(Struct, frozen=True):
    """One write of a transaction. ``value`` None deletes."""

    collection: str
    entity_id: uuid.UUID
    value: Any


class ValidateTransaction(Struct, frozen=True):
    """A transaction before it is accepted."""

    transaction_id: uuid.UUID
    device_id: bytes
    timestamp: int
    operations: list[ValidateOperation]


class ValidateContext:
    """What a hook may know: who sends (``subject``, ``claims``), which database, and, through
    ``get``, the state the transaction would be accepted on."""

    def __init__(
        self, db_id: str, grant: Grant, read: Callable[[str, bytes], bytes | None]
    ) -> None:
        self.db_id = db_id
        self.subject = grant.subject
        self.claims = grant.claims
        self._read = read

    def get(self, collection: str, entity_id: uuid.UUID) -> Any:
        """The entity's value now, None if there is none."""
        payload = self._read(collection, entity_id.bytes)
        return None if payload is None else cbor.decode_trusted(payload)


#: Answers None to let a transaction pass, or why not.
ValidateHook = Callable[[ValidateContext, ValidateTransaction], Refusal | None]


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
        encodings: Sequence[str] = (),
        clock_mark_ms: int = CLOCK_MARK_MS,
    ) -> None:
        """``encodings`` are the content encodings the HTTP side understands; they are told to
        devices among the features. ``clock_mark_ms`` is how often it is remembered where the clock
        stands (R28)."""
        self._clock_mark_ms = clock_mark_ms
        self.features = [*FEATURES, *encodings]
        self.database = database
        self.db_id = db_id
        self.limits = limits
        self._validate = validate
        #: (commit mark, head, floor) of the newest read; None when unknown.
        self._known: tuple[int, int, int] | None = None
        #: The newest head that this service has seen; a hint.
        self._head = 0
        self._limit_max = min(limits.pull_operations_max, SCAN_ROWS_MAX)
        #: A proof was heard since the database was opened (R29). What replaced its files did so
        #: before, so whoever shows another has made it up.
        self._heard_proof = False

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
            self._put_back(grant, request.cursor, head)
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

    def idle_pull(self, request: PullRequest, grant: Grant) -> PullResponse | None:
        """The answer to a pull with nothing new, without touching the store; None if it has to
        be looked up. What was read counts for as long as nobody tried to commit since (R17)."""
        known = self._known
        if known is None or request.full:
            return None
        mark, head, floor = known
        if mark != self.database.commit_mark or _known_up_to(request) != head:
            return None
        if _seen(request) > head:
            return None  # what follows takes a commit
        self._check_pull(request, grant, head, floor)
        return PullResponse(
            collections=[],
            commits=[],
            cursor=head,
            has_more=False,
            head=head,
            floor=floor,
            time=self.database.clock.now_ms(),
            granted=grant.named,
        )

    def is_recent(self, request: PullRequest) -> bool:
        """Whether a pull asks for the newest few commits only. They were written a moment ago, so
        reading them waits for no disk."""
        behind = self._head - _known_up_to(request)
        return not request.full and 0 <= behind <= RECENT_COMMITS and _seen(request) <= self._head

    def pull(self, request: PullRequest, grant: Grant) -> PullResponse:
        """One page of the change feed (R19). Raises ``HistoryChangedError``,
        ``ResetRequiredError``, ``PermissionDeniedError``."""
        return protocol.decode(PullResponse, self.pull_bytes(request, grant))

    def pull_bytes(self, request: PullRequest, grant: Grant) -> bytes:
        """As ``pull``, encoded: the values go from the store into the message as they are."""
        try:
            return self._pull_bytes(request, grant)
        except HistoryChangedError as error:
            head = error.details.get("head")
            if head is None:
                raise
        raise self._put_back(grant, _seen(request), head)

    def _pull_bytes(self, request: PullRequest, grant: Grant) -> bytes:
        mark = self.database.commit_mark
        with paused(), self.database.view() as view:
            head = view.head.sequence
            floor = read_floor(view)
            self._check_pull(request, grant, head, floor)
            kind = _ColumnPage if request.columns else _Page
            page = kind(view, request, self._wanted(view, request, grant))
            cursor, more = page.fill(max(1, min(request.limit, self._limit_max)), head)
            self._known = (mark, head, floor)
            self._head = head
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
                )
            )

    def _check_pull(self, request: PullRequest, grant: Grant, head: int, floor: int) -> None:
        if not grant.read:
            raise PermissionDeniedError(f"this token may not read database {self.db_id!r}")
        self._check_history(request.history, _seen(request), head)
        if not request.full and request.cursor < floor:
            raise ResetRequiredError(
                f"cursor {request.cursor} is below the floor {floor}: deletions in between are "
                "forgotten, so everything has to be pulled again",
                details={"floor": floor},
            )

    def _wanted(
        self, view: Writer, request: PullRequest, grant: Grant
    ) -> dict[int, CollectionInfo]:
        wanted = _wanted_collections(view.catalogue, request.collections, grant.collections)
        return {info.number: info for info in wanted}

    # ------------------------------------------------------------ push

    def push_many(
        self, members: Sequence[tuple[PushRequest, Grant]]
    ) -> list[PushResponse | SyncError]:
        """Decide pushes in order and commit everything accepted at once (R12, R16).

        The answers are true only because this returns after the commit is on disk. A member that
        cannot be decided gets its ``SyncError``; the others are not touched by it. Raises storage
        errors: then nothing was accepted and nothing is known any more (R17).
        """
        # What can fail or take long is done before the writer lock is taken.
        with paused():
            checked = [self._prechecked(request, grant) for request, grant in members]
        seen = [_seen(request) for request, _ in members]
        answers: list[PushResponse | SyncError] = []
        with paused(), self.database.write() as writer:
            floor, known_head = read_floor(writer), writer.head.sequence
            mark = self.database.commit_mark
            proof = None
            if max(seen, default=0) > known_head:
                proof = self._proof(members, seen, known_head)
            for (request, grant), found, newest in zip(members, checked, seen, strict=True):
                if proof is not None:
                    break  # nothing is decided in the history that ends here
                if isinstance(found, SyncError):
                    answers.append(found)
                    continue
                try:
                    # Nobody can have built on what no answer has told of yet: such a base would
                    # let a write pass over what others are about to commit (R13).
                    self._check_history(request.history, newest, known_head)
                    answers.append(self._decide(writer, request, grant, floor, found))
                except SyncError as error:
                    answers.append(error)
            changed = bool(writer.changes)
            if changed:
                mark_clock(writer, self._clock_mark_ms)
            head = writer.head.sequence
        if proof is not None:
            self._put_back(*proof)
            return self.push_many(members)
        # A commit that has worked has moved the mark by two, and where nothing was accepted there
        # was none. If another has come since, the mark is elsewhere, and this is not known.
        self._known = (mark + 2 if changed else mark, head, floor)
        self._head = head
        return [
            replace(answer, head=head) if isinstance(answer, PushResponse) else answer
            for answer in answers
        ]

    def _prechecked(self, request: PushRequest, grant: Grant) -> _Checked | SyncError:
        try:
            return self._precheck(request, grant)
        except SyncError as error:
            return error

    def _precheck(self, request: PushRequest, grant: Grant) -> _Checked:
        """Proof that every payload is canonical (its bytes are stored and forwarded untouched);
        and each payload's value, if there is a ``validate`` that will see it. What is wrong with
        a payload is wrong with its transaction, and no other (R15)."""
        if not grant.write:
            return _NOTHING_CHECKED
        keep = self._validate is not None
        faults = too_much(request)
        if not keep and not faults:
            payloads = [
                op.payload
                for t in request.transactions
                for op in t.operations
                if op.payload is not None
            ]
            if cbor.all_pass(payloads):
                return _NOTHING_CHECKED
        checked = _Checked([], faults)
        for transaction in request.transactions:
            identity, row = transaction.transaction_id, []
            for op in transaction.operations:
                value = None
                if op.payload is not None and identity not in faults:
                    value, fault = _value_of(op.payload)
                    if fault is not None:
                        said = f"its entity {op.entity_id.hex()} {fault}"
                        faults[identity] = "codec_error", said
                row.append(value)
            if keep:
                checked.values.append(row)
        return checked

    def _decide(
        self,
        writer: Writer,
        request: PushRequest,
        grant: Grant,
        floor: int,
        checked: _Checked,
    ) -> PushResponse:
        deciding = _Deciding(self, writer, request, grant, floor, checked.faults)
        results = deciding.run(checked.values)
        return PushResponse(
            results=results,
            collections=request.collections,
            head=writer.head.sequence,
            time=writer.now_ms,
        )

    def refusal(
        self, writer: Writer, grant: Grant, transaction: ValidateTransaction
    ) -> Refusal | None:
        """What the hook says; a hook that raises refuses, because a push that can never be
        answered would stop everything behind it (NO-POISON)."""
        hook = self._validate
        assert hook is not None, "asked only where there is a hook"

        def read(collection: str, entity_id: bytes) -> bytes | None:
            info = writer.catalogue.by_name.get(collection)
            raw = None if info is None else writer.get(info.prefix + entity_id)
            return None if raw is None else payload_of(raw)

        try:
            refusal = hook(ValidateContext(self.db_id, grant, read), transaction)
            return None if refusal is None else _sendable(refusal)
        except Exception:
            # The operator gets the traceback; what a hook says inside is not for devices.
            _log.exception("validate refused transaction %s by raising", transaction.transaction_id)
            return Refusal(
                "validate_failed", "the server's validate hook failed on this transaction"
            )

    @property
    def validates(self) -> bool:
        return self._validate is not None

    # ------------------------------------------------------------ shared

    @property
    def _history(self) -> bytes:
        assert self.database.history is not None, "a server database has a history"
        return self.database.history

    def _check_history(self, history: bytes, cursor: int, head: int) -> None:
        if history != self._history:
            raise HistoryChangedError(
                f"database {self.db_id!r} has another history than this device knows: it "
                'was restored or made anew. Choose reset(keep="server") or reset(keep="device")',
                details={"history": self._history},
            )
        if cursor > head:
            raise self._seen_more(cursor, head)

    def _seen_more(self, seen: int, head: int) -> HistoryChangedError:
        return HistoryChangedError(
            f"this device has seen commit {seen}, but database {self.db_id!r} ends at {head}: the "
            "server's files were replaced by older ones. Choose "
            'reset(keep="server") or reset(keep="device")',
            details={"history": self._history, "head": head},
        )

    # ------------------------------------------------------------ files put back by hand (R29)

    def _proof(
        self, members: Sequence[tuple[PushRequest, Grant]], seen: Sequence[int], head: int
    ) -> tuple[Grant, int, int] | None:
        """The first of ``members`` that is to be believed; what ``_put_back`` is called with."""
        for (request, grant), newest in zip(members, seen, strict=True):
            if newest > head and request.history == self._history and self._believes(grant):
                return grant, newest, head
        return None

    def _believes(self, grant: Grant) -> bool:
        """Who may say of a database that its files are older than what it has answered: all
        devices have to choose a side after that. So only those who could overwrite everything in
        it anyway; they also know its history, which nobody has who never synchronised. And once
        for each opening of the files, because the files change only between two."""
        whole = grant.read and grant.write and grant.collections is None
        return whole and not self._heard_proof

    def _put_back(self, grant: Grant, seen: int, head: int) -> HistoryChangedError:
        """A device has seen commit ``seen`` of this history, and its files end at ``head``: they
        were put back without `entidb backup`. The database begins a new history, durable before
        anybody hears of it, so that those who cannot prove it learn of it as well. Returns what
        this device is told."""
        error = self._seen_more(seen, head)
        if not self._believes(grant):
            _log.error(
                "database %s: %r has seen commit %d, and it ends at %d. Either its files were put "
                "back by hand, or that client makes it up. The history was kept: %s",
                self.db_id,
                grant.subject,
                seen,
                head,
                "one proof was heard since the database was opened"
                if self._heard_proof
                else "only a token that may read and write all of it is believed",
            )
            return error
        begun = self.database.begin_history(HISTORIES_MAX, HISTORIES_WITHIN_MS)
        self._heard_proof = True
        self._known = None
        _log.error(
            "database %s: %r has seen commit %d, and it ends at %d: its files were put back by "
            "hand, without `entidb backup`. %s",
            self.db_id,
            grant.subject,
            seen,
            head,
            "A new history begins, and every device will have its application choose a side"
            if begun
            else f"The history was kept: {HISTORIES_MAX} have begun like this within an hour",
        )
        return self._seen_more(seen, head)

    def _read_head_and_floor(self) -> tuple[int, int]:
        with self.database.storage.snapshot() as snapshot:
            raw_head, raw_floor = snapshot.get(META_HEAD), snapshot.get(META_FLOOR)
        head = 0 if raw_head is None else decode_head(raw_head).sequence
        return head, 0 if raw_floor is None else unpack_u64(raw_floor)

    def close(self) -> None:
        self._known = None


def _sendable(refusal: Refusal) -> Refusal:
    """A hook's words as they may cross the network and end on somebody's terminal. A device
    believes no refusal without a code, and would ask again for ever."""
    code = "".join(c for c in refusal.code[:_CODE_CHARS_MAX] if c.isprintable())
    message = "".join(
        c if c.isprintable() else " " for c in refusal.message[:_MESSAGE_CHARS_MAX]
    ).strip()
    return Refusal(code or "rejected", message)


class _Checked(Struct, frozen=True):
    """What was found in a push before it is decided: each payload's value, if somebody will look
    at them, and what is wrong with its transactions, by their ids."""

    values: list[list[Any]]
    faults: dict[bytes, Fault]


_NOTHING_CHECKED: Final = _Checked([], {})


def _value_of(payload: bytes) -> tuple[Any, str | None]:
    """The value of a payload, or what is wrong with it."""
    try:
        value = cbor.check(payload)
    except CborDecodeError as error:
        return None, f"is not canonical: {error}"
    if value is None:
        return None, "is null; a deletion has no payload"
    return value, None


class _Deciding:
    """The verdicts of one push, against a writer that has the earlier members of its group."""

    def __init__(
        self,
        service: DatabaseService,
        writer: Writer,
        request: PushRequest,
        grant: Grant,
        floor: int,
        faults: Mapping[bytes, Fault],
    ) -> None:
        self._service = service
        self._writer = writer
        self._request = request
        self._grant = grant
        self._faults = faults
        self._digest_heads = digest_heads(request.collections)
        self._below_floor = request.cursor < floor
        self._prefixes = self._collections()
        #: Versions written by earlier transactions of this batch (R13): those above what was the
        #: head when it began, and those of transactions that were accepted before.
        self._began_at = writer.head.sequence
        self._written: dict[bytes, int] = {}
        #: Entities that refused transactions of this batch touched (R13).
        self._refused: set[bytes] = set()
        self._timestamp_max = timestamp_from_ms(writer.now_ms) | 0xFFFF
        self._device_id = request.device_id
        self._validates = service.validates
        #: By how much each collection's count changes.
        self._counts = [0] * len(request.collections)
        self._bytes_max = service.limits.transaction_bytes_max
        self._many_names = len(request.collections) > TRANSACTION_COLLECTIONS_MAX

    def _collections(self) -> list[tuple[int, bytes] | None]:
        """(number, key prefix) for each name; None where nothing can be written, and then
        ``_closed`` says why."""
        present, names = self._writer.catalogue, self._request.collections
        #: What is wrong with writing to a collection, by its place in the request.
        self._closed: dict[int, Fault] = {}
        for index, name in enumerate(names):
            fault = self._closed_to(name)
            if fault is not None:
                self._closed[index] = fault
        catalogue = present
        missing = [i for i, name in enumerate(names) if name not in present.by_name]
        if missing:
            # Only what is written to: a name alone makes no collection.
            used = {op.collection for t in self._request.transactions for op in t.operations}
            wanted = [i for i in missing if i in used and i not in self._closed]
            catalogue = present.adding_all(names[i] for i in wanted)
        found: list[tuple[int, bytes] | None] = []
        for index, name in enumerate(names):
            info = None if index in self._closed else catalogue.by_name.get(name)
            if info is None and index not in self._closed:
                self._closed[index] = _no_room_for(name)
            found.append(None if info is None else (info.number, info.prefix))
        # New collections come to be with the first transaction that is accepted, not before.
        self._planned: Catalogue | None = None if catalogue is present else catalogue
        return found

    def _closed_to(self, name: str) -> Fault | None:
        grant = self._grant
        if not grant.write:
            return "forbidden", f"this token may not write database {self._service.db_id!r}"
        try:
            check_name(name)
        except InvalidNameError as error:
            return "invalid_name", str(error)
        if grant.collections is not None and name not in grant.collections:
            return "forbidden", f"this token may not write collection {name!r}"
        info = self._writer.catalogue.by_name.get(name)
        if info is not None and not info.synced:
            # A collection that is local on the server is nobody else's (R31).
            return "forbidden", f"this token may not write collection {name!r}"
        return None

    def run(self, values: list[list[Any]]) -> list[PushResult]:
        """The verdicts in order; ``values`` is empty where nobody will see them."""
        writer, transactions = self._writer, self._request.transactions
        accepted_keys = [ACCEPTED + t.transaction_id for t in transactions]
        known = writer.get_many(accepted_keys)
        prefixes = [None if place is None else place[1] for place in self._prefixes]
        keys: list[list[bytes | None]] = [
            [
                None if (prefix := prefixes[op.collection]) is None else prefix + op.entity_id
                for op in t.operations
            ]
            for t in transactions
        ]
        real = [key for each in keys for key in each if key is not None]
        rows = writer.get_many(real)
        self._states = dict(zip(real, rows, strict=True))
        # Only a batch of that size can hold a transaction that is too large.
        size = payload_bytes(self._request) + _COUNTED_OVERHEAD_BYTES * sum(map(len, keys))
        self._may_be_large = size > self._bytes_max
        results, count = None, len(keys)
        if count >= _COLUMNS_FROM and known.count(None) == count and set(map(len, keys)) == {1}:
            results = self._accept_all(accepted_keys, real, rows)
        if results is None:
            seen = values or repeat(())
            results = list(map(self._one, transactions, keys, known, seen))
        for place, by in zip(self._prefixes, self._counts, strict=True):
            if place is not None:
                writer.count(place[0], by)
        return results

    def _accept_all(
        self, accepted_keys: list[bytes], keys: list[bytes], rows: list[bytes | None]
    ) -> list[PushResult] | None:
        """What ``_one`` says to each transaction of a batch as most are, in columns: unknown
        transactions of one write, no entity twice, each built on what is here. None if it is not
        like that; then nothing has changed. ``rows`` are what is stored at ``keys``."""
        transactions = self._request.transactions
        operations = [transaction.operations[0] for transaction in transactions]
        payloads = [operation.payload for operation in operations]
        if self._validates or self._below_floor or self._may_be_large or None in payloads:
            return None
        if self._faults:
            return None
        if not len(transactions) == len(set(keys)) == len(set(accepted_keys)):
            return None
        replaced = [
            (operation, unpack_entity(row))
            for operation, row in zip(operations, rows, strict=True)
            if row is not None
        ]
        if any(operation.base_version < old[2] for operation, old in replaced):
            return None
        self._make_collections()
        head, changes, latest = self._writer.head, self._writer.changes, self._timestamp_max
        versions = range(head.sequence + 1, head.sequence + 1 + len(keys))
        head.sequence += len(keys)
        sent = [transaction.timestamp for transaction in transactions]
        stamps = [stamp if stamp <= latest else latest for stamp in sent]
        head.timestamp = max(head.timestamp, *stamps)
        indexes = [operation.collection for operation in operations]
        for index, count in Counter(indexes).items():
            self._counts[index] += count
        numbers = [0 if place is None else place[0] for place in self._prefixes]
        leave = self._writer.leave_feed
        for operation, old in replaced:
            index = operation.collection
            leave(pack_feed_key(FEED, old[1], numbers[index], operation.entity_id))
            if not old[0] & TOMBSTONE:
                self._counts[index] -= 1
        heads = map(
            pack_entity, repeat(REMOTE), versions, versions, repeat(self._device_id), stamps
        )
        stored = map(add, heads, cast("list[bytes]", payloads))
        changes.update(zip(keys, stored, strict=True))
        ids = [operation.entity_id for operation in operations]
        of = map(numbers.__getitem__, indexes)
        changes.update(zip(map(pack_feed_key, repeat(FEED), versions, of, ids), repeat(b"")))
        digests = [digest_operations(self._digest_heads, t.operations) for t in transactions]
        changes.update(zip(accepted_keys, map(pack_accepted, versions, digests), strict=True))
        clamped = [0 if a == b else a for a, b in zip(stamps, sent, strict=True)]
        return list(map(PushResult, repeat(_ACCEPTED), versions, clamped))

    def _one(
        self,
        transaction: PushTransaction,
        keys: list[bytes | None],
        known: bytes | None,
        values: Sequence[Any],
    ) -> PushResult:
        digest = digest_operations(self._digest_heads, transaction.operations)
        if known is not None:
            return self._known(transaction, known, digest, keys)
        identity = transaction.transaction_id
        if None in keys or identity in self._faults:
            place = next(
                (op.collection for op in transaction.operations if op.collection in self._closed),
                None,
            )
            fault = self._faults[identity] if place is None else self._closed[place]
            return self._refuse([key for key in keys if key is not None], *fault)
        places = cast("list[bytes]", keys)
        if self._below_floor or self._conflicts(transaction, places):
            self._refused.update(places)
            return PushResult(Verdict.CONFLICT, states=self._server_states(transaction, places))
        if (
            self._may_be_large
            and (size := transaction_bytes(transaction.operations)) > self._bytes_max
        ):
            return self._refuse(
                places,
                "too_large",
                f"it is {size} bytes, this server accepts {self._bytes_max} "
                "(transaction_bytes_max)",
            )
        if self._many_names:
            names = len({op.collection for op in transaction.operations})
            if names > TRANSACTION_COLLECTIONS_MAX:
                most = TRANSACTION_COLLECTIONS_MAX
                said = f"it writes to {names} collections, a transaction may to {most}"
                return self._refuse(places, "too_large", said)
        if self._validates:
            refusal = self._service.refusal(
                self._writer, self._grant, self._described(transaction, values)
            )
            if refusal is not None:
                return self._refuse(places, refusal.code, refusal.message)
        return self._accept(transaction, places, digest)

    def _known(
        self,
        transaction: PushTransaction,
        known: bytes,
        digest: bytes,
        keys: list[bytes | None],
    ) -> PushResult:
        """R14: decided once, for ever."""
        version, accepted_digest = decode_accepted(known)
        if digest != accepted_digest:
            # What this batch builds on it was built on content that is not on the server (R13).
            self._refused.update(key for key in keys if key is not None)
            return PushResult(Verdict.SUPERSEDED, version)
        clamped = 0
        for op, key in zip(transaction.operations, keys, strict=True):
            if key is None:
                # Accepted under another token; what was clamped is the device's own (R31).
                raw = self._ungranted(op)
            else:
                self._written[key] = version
                raw = self._states[key]
            if raw is not None and unpack_entity(raw)[2] == version:
                # The same answer as the first time, what was clamped then (R27) included.
                stamp = unpack_entity(raw)[4]
                clamped = stamp if stamp != transaction.timestamp else 0
        return PushResult(Verdict.ACCEPTED, version, clamped)

    def _ungranted(self, op: PushOperation) -> bytes | None:
        info = self._writer.catalogue.by_name.get(self._request.collections[op.collection])
        return None if info is None else self._writer.get(info.prefix + op.entity_id)

    def _conflicts(self, transaction: PushTransaction, places: list[bytes]) -> bool:
        states, refused = self._states, self._refused
        for op, key in zip(transaction.operations, places, strict=True):
            if refused and key in refused:
                return True
            raw = states[key]
            if raw is not None:
                version = version_of(raw)
                if version > op.base_version and not self._wrote(key, version):
                    return True
        return False

    def _wrote(self, key: bytes, version: int) -> bool:
        return version > self._began_at or self._written.get(key) == version

    def _refuse(self, places: list[bytes], code: str, message: str) -> PushResult:
        self._refused.update(places)
        return PushResult(Verdict.REJECTED, code=code, message=message)

    def _server_states(
        self, transaction: PushTransaction, places: list[bytes]
    ) -> list[ServerState]:
        if not self._grant.read:
            # A token that only writes learns that it is late, and not what others wrote.
            return []
        found = []
        pairs = zip(transaction.operations, places, strict=True)
        for op, key in list(pairs)[:CONFLICT_STATES_MAX]:
            raw = self._states[key]
            version = 0 if raw is None else unpack_entity(raw)[2]
            payload = None if raw is None else payload_of(raw)
            found.append(ServerState(op.collection, op.entity_id, version, payload))
        return found

    def _described(
        self, transaction: PushTransaction, values: Sequence[Any]
    ) -> ValidateTransaction:
        names = self._request.collections
        return ValidateTransaction(
            uuid_from_bytes(transaction.transaction_id),
            self._request.device_id,
            transaction.timestamp,
            [
                ValidateOperation(names[op.collection], uuid_from_bytes(op.entity_id), value)
                for op, value in zip(transaction.operations, values, strict=True)
            ],
        )

    def _make_collections(self) -> None:
        if self._planned is not None:
            self._writer.set_catalogue(self._planned)
            self._planned = None

    def _accept(
        self, transaction: PushTransaction, places: list[bytes], digest: bytes
    ) -> PushResult:
        writer = self._writer
        self._make_collections()
        changes, states = writer.changes, self._states
        version = writer.next_sequence()
        stamp = transaction.timestamp
        if stamp > self._timestamp_max:
            stamp = self._timestamp_max
        if stamp > writer.head.timestamp:
            writer.head.timestamp = stamp
        device = self._device_id
        for op, key in zip(transaction.operations, places, strict=True):
            place = self._prefixes[op.collection]
            assert place is not None
            number, payload, old = place[0], op.payload, states[key]
            if old is not None:
                writer.leave_feed(feed_key(unpack_entity(old)[1], number, op.entity_id))
                self._counts[op.collection] += live_delta(old, payload)
            elif payload is not None:
                self._counts[op.collection] += 1
            row = (
                pack_entity(REMOTE | TOMBSTONE, version, version, device, stamp)
                if payload is None
                else pack_entity(REMOTE, version, version, device, stamp) + payload
            )
            changes[key] = states[key] = row
            changes[pack_feed_key(FEED, version, number, op.entity_id)] = b""
        changes[ACCEPTED + transaction.transaction_id] = pack_accepted(version, digest)
        return PushResult(_ACCEPTED, version, stamp if stamp != transaction.timestamp else 0)


class _Page:
    """One page on its way from the feed into a message (R19)."""

    def __init__(
        self, view: Writer, request: PullRequest, wanted: Mapping[int, CollectionInfo]
    ) -> None:
        self.names: list[str] = []
        self._encoded = protocol.PullPage()
        self._view = view
        self._request = request
        self._wanted = wanted
        self._bytes_max = min(request.bytes_max, PAGE_BYTES_MAX)
        self._indexes: dict[int, int] = {}
        self._last = 0
        self._size = 0

    def fill(self, limit: int, head: int) -> tuple[int, bool]:
        """Read up to ``limit`` rows of the feed; the cursor that the page reaches, and whether
        there is more."""
        feed_keys, more = feed_page(self._view.snapshot, _known_up_to(self._request), limit)
        places = split_feed_keys(feed_keys)
        chosen = [place for place in places if place[1] in self._wanted]
        if self._request.have:
            have = _Ranges(self._request.have)
            chosen = [place for place in chosen if not have.contains(place[0])]
        prefixes = {number: info.prefix for number, info in self._wanted.items()}
        keys = [prefixes[number] + entity_id for _, number, entity_id in chosen]
        if self._view.stale_rows and len(kept := latest_of(keys)) < len(keys):
            keys, chosen = [keys[at] for at in kept], [chosen[at] for at in kept]
        at = read = 0
        rows = READ_ROWS
        while at < len(keys):
            raws = self._view.snapshot.get_many(keys[at : at + rows])
            if not self._add(chosen[at : at + rows], raws):
                return self._last, True
            at += rows
            # As many as fit, going by those that were read; stale ones are none of the page's.
            read += sum([len(raw) for raw in raws if raw is not None])
            read += (OPERATION_OVERHEAD_BYTES - ENTITY_HEAD) * len(raws)
            mean = read // at + 1
            rows = max(READ_ROWS, min((self._bytes_max - self._size) // mean, READ_ROWS_MAX))
        # A pull moves the cursor over what it leaves out as well (R31).
        return (places[-1][0] if more else head), more

    def _add(self, places: Sequence[tuple[int, int, bytes]], raws: Sequence[bytes | None]) -> bool:
        """False if the page is full: cut between commits, the rest opens the next one."""
        size, last, bytes_max = self._size, self._last, self._bytes_max
        begin, add, indexes = self._encoded.begin, self._encoded.add, self._indexes
        for (sequence, number, entity_id), raw in zip(places, raws, strict=True):
            if raw is None:
                raise _corrupt(sequence, entity_id, "names an entity that is not there")
            flags, _, version, device, timestamp = unpack_entity(raw)
            if version != sequence and self._is_stale((sequence, number, entity_id), version):
                continue
            if sequence != last:
                if size >= bytes_max or len(indexes) >= PAGE_NAMES_MAX:
                    return False
                begin(version, device, timestamp)
                last = self._last = sequence
            size += OPERATION_OVERHEAD_BYTES + len(raw) - ENTITY_HEAD
            index = indexes.get(number)
            if index is None:
                index = indexes[number] = len(self.names)
                self.names.append(self._wanted[number].name)
            add(index, entity_id, None if flags & TOMBSTONE else raw[ENTITY_HEAD:])
        self._size = size
        return True

    def _is_stale(self, place: tuple[int, int, bytes], version: int) -> bool:
        """Whether the entity of a feed row, which is at ``version``, has changed since; then it
        comes with that change. Raises ``CorruptionError`` if that cannot be."""
        sequence, _, entity_id = place
        if version < sequence or version > self._view.head.sequence:
            raise _corrupt(sequence, entity_id, f"names an entity that is at {version}")
        return version > sequence

    def encode(self, message: PullResponse) -> bytes:
        return self._encoded.encode(message)


class _ColumnPage(_Page):
    """The same page in columns: rows of the store cut into pieces, without a loop over them."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._ids: list[bytes] = []
        self._heads: list[bytes] = []
        self._sizes: list[int] = []
        self._values: list[bytes] = []
        self._columns: list[int] = []

    def _add(self, places: Sequence[tuple[int, int, bytes]], raws: Sequence[bytes | None]) -> bool:
        if None in raws:
            sequence, _, entity_id = places[list(raws).index(None)]
            raise _corrupt(sequence, entity_id, "names an entity that is not there")
        rows = cast("Sequence[bytes]", raws)
        heads = [row[ENTITY_HEAD - COLUMN_HEAD_BYTES : ENTITY_HEAD] for row in rows]
        versions = protocol.column_versions(b"".join(heads))
        if versions != [place[0] for place in places]:
            kept = [at for at, v in enumerate(versions) if not self._is_stale(places[at], v)]
            places, rows = [places[at] for at in kept], [rows[at] for at in kept]
            heads = [heads[at] for at in kept]
        count = self._fitting(places, rows)
        if count:
            self._keep(places[:count], rows[:count], b"".join(heads[:count]))
        return count == len(places)

    def _keep(
        self, places: Sequence[tuple[int, int, bytes]], rows: Sequence[bytes], heads: bytes
    ) -> None:
        sequences, numbers, entity_ids = zip(*places, strict=True)
        for number in dict.fromkeys(numbers):
            if number not in self._indexes:
                self._indexes[number] = len(self.names)
                self.names.append(self._wanted[number].name)
        self._ids += entity_ids
        self._columns += map(self._indexes.__getitem__, numbers)
        self._heads.append(heads)
        self._sizes += [
            TOMBSTONE_SIZE if row[0] & TOMBSTONE else len(row) - ENTITY_HEAD for row in rows
        ]
        self._values += [row[ENTITY_HEAD:] for row in rows]
        self._last = sequences[-1]

    def _fitting(self, places: Sequence[tuple[int, int, bytes]], rows: Sequence[bytes]) -> int:
        """How many rows of these the page takes: all, or those before the commit that finds it
        full."""
        overhead = OPERATION_OVERHEAD_BYTES - ENTITY_HEAD
        whole = self._size + sum(map(len, rows)) + overhead * len(rows)
        full_of_names = len(self._indexes) >= PAGE_NAMES_MAX
        if whole < self._bytes_max and not full_of_names:
            self._size = whole
            return len(rows)
        last = self._last
        for at, ((sequence, _, _), row) in enumerate(zip(places, rows, strict=True)):
            if sequence != last and (full_of_names or self._size >= self._bytes_max):
                return at
            last = sequence
            self._size += len(row) + overhead
        return len(rows)

    def encode(self, message: PullResponse) -> bytes:
        count = len(self._ids)
        return protocol.encode_columns(
            message,
            ids=b"".join(self._ids),
            heads=b"".join(self._heads),
            sizes=struct.pack(f">{count}I", *self._sizes),
            values=b"".join(self._values),
            indexes=struct.pack(f">{count}H", *self._columns),
        )


def _no_room_for(name: str) -> Fault:
    return (
        "too_many_collections",
        f"collection {name!r} does not fit: this database holds {COLLECTIONS_MAX} collections. "
        "Use a field of the entity instead",
    )


def _corrupt(sequence: int, entity_id: bytes, why: str) -> CorruptionError:
    return CorruptionError(
        f"the feed row of commit {sequence} for {entity_id.hex()} {why}; the page was not sent. "
        "Run verify, and restore a backup"
    )


class _Ranges:
    """Membership in the ascending inclusive ranges of ``PullRequest.have``."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._starts = [first for first, _ in ranges]
        self._ends = [last for _, last in ranges]

    def contains(self, version: int) -> bool:
        if not self._starts:
            return False
        at = bisect_right(self._starts, version) - 1
        return at >= 0 and version <= self._ends[at]


def _seen(request: PullRequest | PushRequest) -> int:
    """The newest commit that the device says it has seen. What it got for its own pushes counts
    (R21), and what it built on."""
    if isinstance(request, PullRequest):
        return max(request.cursor, request.have[-1][1] if request.have else 0)
    bases = [op.base_version for t in request.transactions for op in t.operations]
    return max(request.cursor, max(bases, default=0))


def _known_up_to(request: PullRequest) -> int:
    """Up to where the device has everything: its cursor, and what follows it of its own (R21)."""
    if request.have and request.have[0][0] == request.cursor + 1:
        return request.have[0][1]
    return request.cursor


def _wanted_collections(
    catalogue: Catalogue, asked: list[str] | None, allowed: frozenset[str] | None
) -> list[CollectionInfo]:
    """The collections to send: those asked for that the token grants."""
    names = None if asked is None else frozenset(asked)
    return [
        info
        for info in catalogue.by_name.values()
        if info.synced
        and (names is None or info.name in names)
        and (allowed is None or info.name in allowed)
    ]

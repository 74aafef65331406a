"""The shapes of the wire messages, their limits and their paths.

The normative text is ``docs/protocol.md``. Envelopes are maps with text keys, unknown keys are
ignored; inside, transactions, commits and operations are arrays with fixed positions (elements that
a newer minor version appends are ignored), and a message has each collection name once: operations
hold an index into ``collections``. The server's service and the device's cycle decide what depends
on state (history, cursor, permissions).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Annotated, Any, Final, TypeVar

from msgspec import Meta, Struct

from entidb.protocol.limits import Limits, Uint
from entidb.types import ID_BYTES, OPERATION_OVERHEAD_BYTES, SeenCommit, Term

PROTOCOL_MAJOR: Final = 1
PROTOCOL_MINOR: Final = 0
CONTENT_TYPE: Final = "application/cbor"
#: Names the database of a request to who passes it on and does not read it, percent-encoded. A
#: server goes by the message.
DATABASE_HEADER: Final = "EntiDB-Database"
#: More ranges than this in ``PullRequest.have`` are refused; a device sends fewer (R21).
HAVE_RANGES_MAX: Final = 4096
#: Segments that one ``Manifest`` names at most, and packings that ``SnapshotRequest`` does.
SEGMENTS_MAX: Final = 65_536
PACKINGS_MAX: Final = 16
#: Rows of one segment at most.
SEGMENT_ROWS_MAX: Final = 65_536
#: Entities that ``DigestRequest.ids`` names at most, and those of a block unless it says.
DIGEST_IDS_MAX: Final = 512
#: Characters of a subject. One that is longer is not named.
SUBJECT_CHARS_MAX: Final = 255
Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Sha256 = Annotated[bytes, Meta(min_length=32, max_length=32)]
#: No upper bound is named (msgspec knows none above an int64): CBOR itself ends at 2**64 - 1.
Stamp = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
#: ``entidb.types.check_name`` sees to the rest: bytes, not characters, and no control characters.
Name = Annotated[str, Meta(min_length=1, max_length=255)]
Subject = Annotated[str, Meta(min_length=1, max_length=SUBJECT_CHARS_MAX)]


class PushOperation(Struct, frozen=True, array_like=True, gc=False):
    """One entity write. ``payload`` is the entity's canonical CBOR, None deletes it.
    ``base_version`` is the version the device built on (R13)."""

    collection: Uint
    entity_id: Id
    base_version: Uint
    payload: bytes | None


class PushTransaction(Struct, frozen=True, array_like=True, gc=False):
    """One local transaction, whole (R3). ``timestamp`` is a hybrid logical clock (R27)."""

    transaction_id: Id
    timestamp: Stamp
    operations: Annotated[list[PushOperation], Meta(min_length=1)]


class PullOperation(Struct, frozen=True, array_like=True, gc=False):
    """The latest change of one entity; ``payload`` None is a tombstone."""

    collection: Uint
    entity_id: Id
    payload: bytes | None


class PullCommit(Struct, frozen=True, array_like=True, gc=False):
    """What is still the latest of one server commit. ``device_id`` wrote it at ``timestamp``."""

    version: Uint
    device_id: Id
    timestamp: Stamp
    operations: list[PullOperation]


class PullColumns(Struct, frozen=True, kw_only=True):
    """The operations of a page as columns instead of commits: nothing to build for each of them
    on either side, where a first sync brings a million. Row by row, big-endian, without gaps:

    ``ids`` the entity's id (16 bytes); ``heads`` version (8), device (16) and timestamp (8) of
    the commit, operations of one commit next to each other; ``sizes`` the length of the payload
    (4), ``TOMBSTONE_SIZE`` for a tombstone; ``indexes`` the position in ``collections`` (2);
    ``values`` the payloads.
    """

    ids: bytes
    heads: bytes
    sizes: bytes
    values: bytes
    indexes: bytes


class Verdict(IntEnum):
    """What the server decided about one transaction (R15)."""

    #: Durable on the server as the commit ``version``.
    ACCEPTED = 0
    #: Another copy of this transaction id was accepted with other content, as ``version``.
    SUPERSEDED = 1
    #: Built on something that has changed; ``states`` holds what the server has now.
    CONFLICT = 2
    #: Refused for good, with ``code`` and ``message``.
    REJECTED = 3


class ServerState(Struct, frozen=True, array_like=True, gc=False):
    """What the server has for an entity of a refused transaction. ``payload`` None with a
    ``version`` above 0 is a tombstone; version 0 means that it never had the entity."""

    collection: Uint
    entity_id: Id
    version: Uint
    payload: bytes | None


class PushResult(Struct, frozen=True, array_like=True, gc=False):
    """The verdict on one transaction of a push, in the order of the request.

    ``version`` with ACCEPTED and SUPERSEDED, else 0. ``timestamp`` is 0 unless the server
    clamped the transaction's (R27). ``states`` with CONFLICT; their payloads may be left out by
    a server that keeps answers small (the pull that follows brings them). With ACCEPTED they are
    what the server stored in the place of what an older program wrote (R33). ``code`` and
    ``message`` with REJECTED; with ``not_unique`` a state of the entity that has the value,
    for a token that may read it.
    """

    verdict: Annotated[int, Meta(ge=0, le=3)]
    version: Uint = 0
    timestamp: Stamp = 0
    states: list[ServerState] = []
    code: str = ""
    message: str = ""


class HandshakeRequest(Struct, frozen=True, kw_only=True):
    major: Uint
    minor: Uint
    db_id: Name
    device_id: Id
    history: Id | None
    cursor: Uint
    client: Annotated[str, Meta(max_length=255)] = ""
    #: Number of the application's schema (R33), here and in the other requests; 0: it says none.
    schema: Uint = 0


class HandshakeResponse(Struct, frozen=True, kw_only=True):
    """``granted`` names the collections that the token grants; None means all, or a server that
    does not name them (R31). ``subject`` is who the token is for; None: the server does not say,
    or knows nobody (R36)."""

    major: Uint
    minor: Uint
    history: Id
    head: Uint
    floor: Uint
    limits: Limits
    features: list[str]
    time: Uint  # server's clock, ms since 1970
    granted: list[Name] | None = None
    subject: Subject | None = None


class PullRequest(Struct, frozen=True, kw_only=True):
    """``cursor`` is inclusive: send what is after it. ``have`` holds inclusive ranges
    ``[first, last]`` of versions above the cursor the device already has (R21).
    ``full`` starts from nothing: the floor does not matter (R28). ``columns`` takes the page as
    ``PullColumns``; only for a server with that feature. ``seen`` is the newest head
    that an answer has named with its term, and that term (R29)."""

    db_id: Name
    device_id: Id
    history: Id
    cursor: Uint
    have: list[tuple[Uint, Uint]] = []
    limit: Positive
    bytes_max: Positive
    collections: list[Name] | None = None
    full: bool = False
    columns: bool = False
    schema: Uint = 0
    seen: SeenCommit | None = None


class PullResponse(Struct, frozen=True, kw_only=True):
    """``cursor`` is what the device has after applying this page; the last page
    (``has_more`` false) says the head it has reached (R19). ``time`` is the server's clock in
    ms since 1970. With ``columns`` there are no ``commits``; ``expanded`` makes some of them.
    ``granted`` is what the page was made under, as in the handshake. ``term`` is that of the
    commit ``head``; None: the server does not know it. ``live``: how many entities there are in all
    that a pull of everything brings, for a person who waits; None where it is not said."""

    collections: list[Name]
    commits: list[PullCommit]
    columns: PullColumns | None = None
    cursor: Uint
    has_more: bool
    head: Uint
    floor: Uint
    time: Uint
    granted: list[Name] | None = None
    term: Term | None = None
    live: Uint | None = None


class PushRequest(Struct, frozen=True, kw_only=True):
    """``collections`` may hold texts that are no names: that is the fault of the transactions that
    write there, and not of the others (R15). ``subject`` is who has committed all of this, as the
    handshake has named them; with the token of another the server decides nothing (R36). ``seen``
    as in the pull; a round has it there alone."""

    db_id: Name
    device_id: Id
    history: Id
    cursor: Uint
    collections: list[str]
    transactions: list[PushTransaction]
    schema: Uint = 0
    subject: Subject | None = None
    seen: SeenCommit | None = None


class PushResponse(Struct, frozen=True, kw_only=True):
    """``collections`` names what the indexes in ``states`` mean; ``time`` as in the pull. ``term``
    is as there."""

    results: list[PushResult]
    collections: list[Name]
    head: Uint
    time: Uint
    term: Term | None = None


class RoundRequest(Struct, frozen=True, kw_only=True):
    """What the device would pull, and what it would push then, in one request (R6). Both name
    the same database, device, history and cursor; the pull is none of everything (``full``,
    ``columns``)."""

    pull: PullRequest
    push: PushRequest

    @property
    def db_id(self) -> str:
        return self.pull.db_id

    @property
    def device_id(self) -> bytes:
        return self.pull.device_id

    @property
    def history(self) -> bytes:
        return self.pull.history

    @property
    def cursor(self) -> int:
        return self.pull.cursor

    @property
    def transactions(self) -> list[PushTransaction]:
        return self.push.transactions


class RoundResponse(Struct, frozen=True, kw_only=True):
    """``push`` is None where the device was behind: nothing of its push was decided, and ``pull``
    is the first page of what it has not seen. Else ``pull`` is what it has not seen after what
    its own push has added; those versions count as had."""

    pull: PullResponse
    push: PushResponse | None


class DigestBlock(Struct, frozen=True, array_like=True, gc=False):
    """``digest`` is over the ``count`` entities that follow the block before, up to ``last``."""

    last: Id
    count: Uint
    digest: Id


class DigestState(Struct, frozen=True, array_like=True, gc=False):
    """What the server has for an entity that was asked about. ``payload`` None: it has none, since
    ``version`` if that is known, else version 0."""

    entity_id: Id
    version: Uint
    device_id: Id
    timestamp: Stamp
    payload: bytes | None


class DigestRequest(Struct, frozen=True, kw_only=True):
    """What a device asks to learn whether it has what the server has, as of ``cursor`` (R34).

    Without ``collection``: which collections there are, of ``collections`` (None: all). With it:
    digests of its entities beyond ``after`` (None: from the first) up to ``last``, one for each
    ``block`` entities; or, with ``ids``, those entities themselves. Only for a server with the
    feature ``digest``."""

    db_id: Name
    device_id: Id
    history: Id
    cursor: Uint
    collections: list[Name] | None = None
    collection: Name | None = None
    after: Id | None = None
    last: Id = b"\xff" * ID_BYTES
    block: Positive = DIGEST_IDS_MAX
    ids: list[Id] = []
    schema: Uint = 0


class DigestResponse(Struct, frozen=True, kw_only=True):
    """``collections``, ``blocks`` or ``states``, as was asked. ``newer`` are entities that were
    written after the cursor of the request: they are in no block and no state. ``more``: the blocks
    end before ``last``, or the states before the last of ``ids``; ask again from there."""

    collections: list[Name] = []
    blocks: list[DigestBlock] = []
    states: list[DigestState] = []
    newer: list[Id] = []
    more: bool = False
    head: Uint
    granted: list[Name] | None = None


class SnapshotRequest(Struct, frozen=True, kw_only=True):
    """What a device asks that would begin with all there is (R35): an image of the database, in
    segments packed with one of ``packings`` (``zstd``, ``gzip``). ``history`` is None, or the one
    it has met, and ``seen`` the newest head that it has heard of, as in a pull. Only for a server
    with the feature ``segments``."""

    db_id: Name
    device_id: Id
    history: Id | None = None
    collections: list[Name] | None = None
    packings: list[Annotated[str, Meta(min_length=1, max_length=32)]]
    schema: Uint = 0
    seen: SeenCommit | None = None

    @property
    def cursor(self) -> int:
        """As of other requests: it begins with nothing."""
        return 0


class SegmentInfo(Struct, frozen=True, array_like=True, gc=False):
    """One segment of an image: the entities of a collection (its index in the manifest) from
    ``first`` to ``last``. ``sha256`` is over the whole file of so many ``bytes``, and its name."""

    sha256: Sha256
    collection: Uint
    bytes: Positive
    rows: Annotated[int, Meta(ge=1, le=SEGMENT_ROWS_MAX)]
    first: Id
    last: Id
    packing: Annotated[str, Meta(min_length=1, max_length=32)]


class Manifest(Struct, frozen=True, kw_only=True):
    """An image as of ``head``: every entity of ``collections`` that there was, in segments, those
    of a collection in the order of their ids. Until ``ends`` (ms of the server's clock) the
    segments are there, and the floor does not pass ``head``.

    Without ``segments`` there is no image for this device, which pulls instead; ``head`` is then
    that of the database. ``time`` and ``granted`` as in the pull, ``term`` too of an image."""

    history: Id
    head: Uint
    floor: Uint
    collections: list[Name]
    segments: list[SegmentInfo]
    entities: Uint
    ends: Uint
    time: Uint
    granted: list[Name] | None = None
    term: Term | None = None


class ErrorResponse(Struct, frozen=True, kw_only=True):
    """``code`` is a row of ``entidb.errors.ERROR_TABLE``; ``retry_after`` in seconds."""

    code: str
    message: str
    retryable: bool
    retry_after: Annotated[float, Meta(ge=0)] | None = None
    details: dict[str, Any] = {}


SyncRequest = (
    HandshakeRequest | PullRequest | PushRequest | RoundRequest | DigestRequest | SnapshotRequest
)
SyncResponse = (
    HandshakeResponse
    | PullResponse
    | PushResponse
    | RoundResponse
    | DigestResponse
    | Manifest
    | ErrorResponse
)
AnyMessage = TypeVar("AnyMessage", bound=SyncRequest | SyncResponse)
#: HTTP path of each request.
PATHS: Final[dict[str, type[SyncRequest]]] = {
    "/v1/handshake": HandshakeRequest,
    "/v1/pull": PullRequest,
    "/v1/push": PushRequest,
    "/v1/sync": RoundRequest,
    "/v1/digest": DigestRequest,
    "/v1/snapshot": SnapshotRequest,
}
_RESPONSES: Final[dict[type, type[SyncResponse]]] = {
    HandshakeRequest: HandshakeResponse,
    PullRequest: PullResponse,
    PushRequest: PushResponse,
    RoundRequest: RoundResponse,
    DigestRequest: DigestResponse,
    SnapshotRequest: Manifest,
}
_PATH_OF: Final = {kind: path for path, kind in PATHS.items()}


def push_in(request: SyncRequest) -> PushRequest | None:
    """The push that ``request`` is, or that is in it."""
    if isinstance(request, RoundRequest):
        return request.push
    return request if isinstance(request, PushRequest) else None


def path_of(request: SyncRequest) -> str:
    """The HTTP path to which ``request`` is posted."""
    return _PATH_OF[type(request)]


def response_type(request: SyncRequest) -> type[SyncResponse]:
    """What answers ``request`` if nothing goes wrong; else it is an ``ErrorResponse``."""
    return _RESPONSES[type(request)]


# --- measures ---------------------------------------------------------------------------------


def transaction_bytes(operations: Iterable[PushOperation]) -> int:
    """What counts against ``transaction_bytes_max``: payloads, and a fixed overhead for each
    operation. A transaction above it gets the verdict REJECTED, code ``too_large``, and the rest
    of its batch goes on (R15); that is why ``decode`` lets it pass."""
    size = 0
    for operation in operations:
        payload = operation.payload
        size += OPERATION_OVERHEAD_BYTES + (len(payload) if payload is not None else 0)
    return size


def operations_count(message: PushRequest | PullResponse) -> int:
    if isinstance(message, PullResponse) and message.columns is not None:
        return len(message.columns.ids) // ID_BYTES
    return sum([len(group.operations) for group in _groups(message)])


def payload_bytes(message: PushRequest | PullResponse) -> int:
    """Bytes of entity values in ``message``, without ids and framing."""
    if isinstance(message, PullResponse) and message.columns is not None:
        return len(message.columns.values)
    return sum(
        [
            len(operation.payload)
            for group in _groups(message)
            for operation in group.operations
            if operation.payload is not None
        ]
    )


def _groups(message: PushRequest | PullResponse) -> Sequence[PushTransaction | PullCommit]:
    return message.transactions if isinstance(message, PushRequest) else message.commits

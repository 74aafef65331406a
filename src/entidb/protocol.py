"""The wire messages: shapes, limits, encoding and decoding. No transport, no decisions.

The normative text is ``docs/protocol.md``. Envelopes are maps with text keys, unknown keys are
ignored; inside, transactions, commits and operations are arrays with fixed positions (elements
that a newer minor version appends are ignored), and collection names stand once per message:
operations hold an index into ``collections``.

``encode`` writes canonical CBOR. ``decode`` proves shape, limits and what two fields say of each
other; it does not look into payloads, which are checked once, where they enter a database. What
depends on state (history, cursor, permissions) is for the server's service and the device's cycle.
"""

from __future__ import annotations

import array
import hashlib
import io
import itertools
import operator
import re
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import IntEnum
from typing import Annotated, Any, Final, TypeVar, cast

from msgspec import Meta, Struct, ValidationError, convert, to_builtins
from msgspec.structs import replace

from entidb import cbor
from entidb.collector import paused
from entidb.errors import CborDecodeError, InvalidNameError, ProtocolError, SyncCodecError
from entidb.types import (
    COLLECTIONS_MAX,
    ID_BYTES,
    OPERATION_OVERHEAD_BYTES,
    TRANSACTION_BYTES_MAX,
    check_name,
    reason_of_msgspec,
)

PROTOCOL_MAJOR: Final = 1
PROTOCOL_MINOR: Final = 0
CONTENT_TYPE: Final = "application/cbor"
#: More ranges than this in ``PullRequest.have`` are refused; a device sends fewer (R21).
HAVE_RANGES_MAX: Final = 4096

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Uint = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: No upper bound is named (msgspec knows none above an int64): CBOR itself ends at 2**64 - 1.
Stamp = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
#: ``entidb.types.check_name`` sees to the rest: bytes, not characters, and no control characters.
Name = Annotated[str, Meta(min_length=1, max_length=255)]


class Limits(Struct, frozen=True, kw_only=True):
    """What the server accepts at most; in the handshake. All byte counts are uncompressed."""

    transaction_bytes_max: Uint
    message_bytes_max: Uint
    push_operations_max: Uint
    pull_operations_max: Uint
    collections_max: Uint
    #: Collections that the database holds; what goes beyond is rejected, transaction by
    #: transaction. Servers before 0.4 do not say, and hold so many.
    database_collections_max: Uint = 1024


#: What a device accepts from any server, and what a server starts from. One transaction of the
#: largest size every server must accept fits into a message, whatever the names and the framing.
LIMITS: Final = Limits(
    transaction_bytes_max=TRANSACTION_BYTES_MAX,
    message_bytes_max=4 * TRANSACTION_BYTES_MAX,
    push_operations_max=100_000,
    pull_operations_max=100_000,
    collections_max=4096,
    database_collections_max=COLLECTIONS_MAX,
)


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
    ``version`` above 0 is a tombstone; version 0 means it has never heard of it."""

    collection: Uint
    entity_id: Id
    version: Uint
    payload: bytes | None


class PushResult(Struct, frozen=True, array_like=True, gc=False):
    """The verdict on one transaction of a push, in the order of the request.

    ``version`` with ACCEPTED and SUPERSEDED, else 0. ``timestamp`` is 0 unless the server
    clamped the transaction's (R27). ``states`` with CONFLICT; their payloads may be left out by
    a server that keeps answers small (the pull that follows brings them). ``code`` and
    ``message`` with REJECTED.
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


class HandshakeResponse(Struct, frozen=True, kw_only=True):
    """``granted`` names the collections that the token grants; None means all, or a server that
    does not say (R31)."""

    major: Uint
    minor: Uint
    history: Id
    head: Uint
    floor: Uint
    limits: Limits
    features: list[str]
    time: Uint  # server's clock, ms since 1970
    granted: list[Name] | None = None


class PullRequest(Struct, frozen=True, kw_only=True):
    """``cursor`` is inclusive: send what is after it. ``have`` holds inclusive ranges
    ``[first, last]`` of versions above the cursor the device already has (R21).
    ``full`` starts from nothing: the floor does not matter (R28). ``columns`` takes the page as
    ``PullColumns``; only for a server with that feature."""

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


class PullResponse(Struct, frozen=True, kw_only=True):
    """``cursor`` is what the device has after applying this page; the last page
    (``has_more`` false) says the head it has reached (R19). ``time`` is the server's clock in
    ms since 1970. With ``columns`` there are no ``commits``; ``expanded`` makes some of them.
    ``granted`` is what the page was made under, as in the handshake."""

    collections: list[Name]
    commits: list[PullCommit]
    columns: PullColumns | None = None
    cursor: Uint
    has_more: bool
    head: Uint
    floor: Uint
    time: Uint
    granted: list[Name] | None = None


class PushRequest(Struct, frozen=True, kw_only=True):
    """``collections`` may hold what is no name: that is wrong with the transactions that write
    there, and not with the others (R15)."""

    db_id: Name
    device_id: Id
    history: Id
    cursor: Uint
    collections: list[str]
    transactions: list[PushTransaction]


class PushResponse(Struct, frozen=True, kw_only=True):
    """``collections`` names what the indexes in ``states`` mean; ``time`` as in the pull."""

    results: list[PushResult]
    collections: list[Name]
    head: Uint
    time: Uint


class ErrorResponse(Struct, frozen=True, kw_only=True):
    """``code`` is a row of ``entidb.errors.ERROR_TABLE``; ``retry_after`` in seconds."""

    code: str
    message: str
    retryable: bool
    retry_after: Annotated[float, Meta(ge=0)] | None = None
    details: dict[str, Any] = {}


SyncRequest = HandshakeRequest | PullRequest | PushRequest
SyncResponse = HandshakeResponse | PullResponse | PushResponse | ErrorResponse

_Message = TypeVar("_Message", bound=SyncRequest | SyncResponse)

#: HTTP path of each request.
PATHS: Final[dict[str, type[SyncRequest]]] = {
    "/v1/handshake": HandshakeRequest,
    "/v1/pull": PullRequest,
    "/v1/push": PushRequest,
}
_RESPONSES: Final[dict[type, type[SyncResponse]]] = {
    HandshakeRequest: HandshakeResponse,
    PullRequest: PullResponse,
    PushRequest: PushResponse,
}
_PATH_OF: Final = {kind: path for path, kind in PATHS.items()}


def path_of(request: SyncRequest) -> str:
    """The HTTP path ``request`` is posted to."""
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


# --- columns ----------------------------------------------------------------------------------

#: In ``PullColumns.sizes``: there is no payload.
TOMBSTONE_SIZE: Final = 0xFFFFFFFF
COLUMN_HEAD_BYTES: Final = 32


class ColumnRows(Struct, frozen=True):
    """``PullColumns`` cut into rows, one list for each column."""

    ids: list[bytes]
    heads: list[bytes]
    payloads: list[bytes | None]
    indexes: tuple[int, ...]
    versions: list[int]
    timestamps: list[int]


def column_rows(columns: PullColumns) -> ColumnRows:
    """The rows of columns that ``decode`` has accepted."""
    values = columns.values
    count = len(columns.ids) // ID_BYTES
    sizes = struct.unpack(f">{count}I", columns.sizes)
    payloads: list[bytes | None]
    if TOMBSTONE_SIZE in sizes:
        ends = itertools.accumulate(0 if n == TOMBSTONE_SIZE else n for n in sizes)
        payloads = [
            None if n == TOMBSTONE_SIZE else values[end - n : end]
            for n, end in zip(sizes, ends, strict=True)
        ]
    else:
        # One cut after the other, without a step of Python for each.
        payloads = list(map(io.BytesIO(values).read, sizes))
    numbers = _u64s(columns.heads)
    return ColumnRows(
        _cut(columns.ids, _IDS, ID_BYTES),
        _cut(columns.heads, _HEADS, COLUMN_HEAD_BYTES),
        payloads,
        struct.unpack(f">{count}H", columns.indexes),
        numbers[::4].tolist(),
        numbers[3::4].tolist(),
    )


_AT_ONCE: Final = 64
_IDS: Final = struct.Struct(f"{ID_BYTES}s" * _AT_ONCE)
_HEADS: Final = struct.Struct(f"{COLUMN_HEAD_BYTES}s" * _AT_ONCE)


def _cut(column: bytes, many: struct.Struct, size: int) -> list[bytes]:
    """``column`` in pieces of ``size`` bytes; ``many`` cuts 64 of them in one step."""
    whole = len(column) - len(column) % many.size
    pieces: list[bytes] = list(
        itertools.chain.from_iterable(many.iter_unpack(memoryview(column)[:whole]))
    )
    pieces += [column[at : at + size] for at in range(whole, len(column), size)]
    return pieces


def column_versions(heads: bytes) -> list[int]:
    """The version in each of ``PullColumns.heads``."""
    return _u64s(heads)[::4].tolist()


def _u64s(column: bytes) -> array.array[int]:
    """Every eight bytes of ``column``, big-endian."""
    numbers = array.array("Q", column)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def expanded(response: PullResponse) -> PullResponse:
    """The same page with commits, whichever way it came."""
    if response.columns is None:
        return response
    rows = column_rows(response.columns)
    commits: list[PullCommit] = []
    operations: list[PullOperation] = []
    last = 0
    for version, head, timestamp, index, entity_id, payload in zip(
        rows.versions,
        rows.heads,
        rows.timestamps,
        rows.indexes,
        rows.ids,
        rows.payloads,
        strict=True,
    ):
        if version != last:
            operations = []
            commits.append(PullCommit(version, head[8:24], timestamp, operations))
            last = version
        operations.append(PullOperation(index, entity_id, payload))
    return replace(response, commits=commits, columns=None)


def operations_digest(collections: Sequence[str], operations: Sequence[PushOperation]) -> bytes:
    """SHA-256 of what a transaction writes (R14): the canonical CBOR array of
    ``[collection name, entity_id, payload or null]`` in order.

    Base versions and timestamps are left out: a transaction that was rebased onto an equal state
    still writes the same, and its second coming is the same transaction.
    """
    return digest_operations(digest_heads(collections), operations)


def digest_heads(collections: Sequence[str]) -> list[bytes]:
    """What every operation on a collection begins with in a digest; once for a whole message."""
    return [b"\x83" + cbor.text(name) + _ID for name in collections]


def digest_operations(heads: Sequence[bytes], operations: Sequence[PushOperation]) -> bytes:
    """As ``operations_digest``, with the ``digest_heads`` of the message."""
    if len(operations) == 1:
        (operation,) = operations
        payload = operation.payload
        if payload is not None:
            head = b"\x81" + heads[operation.collection] + operation.entity_id
            return hashlib.sha256(head + _bytes_head(len(payload)) + payload).digest()
    parts = [_array_head(len(operations))]
    for operation in operations:
        payload = operation.payload
        parts += (heads[operation.collection], operation.entity_id)
        parts += (_NULL,) if payload is None else (_bytes_head(len(payload)), payload)
    return hashlib.sha256(b"".join(parts)).digest()


# --- encoding ---------------------------------------------------------------------------------
#
# Pushes and pulls are joined by hand: it is several times faster than building lists of lists for
# a general encoder, and an id stays a byte string whatever its bytes are (a general DAG-CBOR
# encoder takes one UUIDv7 in twenty for a content identifier and writes tag 42). Keys stand in
# canonical order: shorter first, then by bytes.

_NULL: Final = b"\xf6"
_ID: Final = b"\x50"
_UINTS: Final = tuple(cbor.uint(number) for number in range(1024))
_BYTES_HEADS: Final = tuple(cbor.bytes_head(length) for length in range(4096))
_ARRAY_HEADS: Final = tuple(cbor.array_head(length) for length in range(256))
_pack_4: Final = struct.Struct(">BI").pack
_pack_8: Final = struct.Struct(">BQ").pack


def encode(message: SyncRequest | SyncResponse) -> bytes:
    """``message`` as canonical CBOR. Its own shape is taken on trust; a message that breaks its
    type's promises raises whatever Python raises, or is refused by the other side."""
    return _ENCODERS.get(type(message), _encode_small)(message)


def _encode_small(message: SyncRequest | SyncResponse) -> bytes:
    return cbor.encode_message(to_builtins(message, builtin_types=(bytes,)))


def _encode_pull_request(message: PullRequest) -> bytes:
    envelope = to_builtins(message, builtin_types=(bytes,))
    return cbor.encode_message(envelope | {"have": [list(ends) for ends in message.have]})


def _encode_push_request(message: PushRequest) -> bytes:
    parts = [
        cbor.map_head(6),
        cbor.text("db_id") + cbor.text(message.db_id),
        cbor.text("cursor") + _uint(message.cursor),
        cbor.text("history") + _ID + message.history,
        cbor.text("device_id") + _ID + message.device_id,
        cbor.text("collections") + _names(message.collections),
        cbor.text("transactions") + _array_head(len(message.transactions)),
    ]
    heads = [b"\x84" + _uint(index) + _ID for index in range(len(message.collections))]
    for transaction in message.transactions:
        operations = transaction.operations
        parts += (
            b"\x83\x50",
            transaction.transaction_id,
            _uint(transaction.timestamp),
            _array_head(len(operations)),
        )
        for operation in operations:
            payload = operation.payload
            head = heads[operation.collection]
            base = _uint(operation.base_version)
            if payload is None:
                parts += (head, operation.entity_id, base, _NULL)
            else:
                parts += (head, operation.entity_id, base, _bytes_head(len(payload)), payload)
    return b"".join(parts)


def _encode_push_response(message: PushResponse) -> bytes:
    parts = [
        cbor.map_head(4),
        cbor.text("head") + _uint(message.head),
        cbor.text("time") + _uint(message.time),
        cbor.text("results") + _array_head(len(message.results)),
    ]
    for result in message.results:
        parts += (
            b"\x86",
            _UINTS[result.verdict],
            _uint(result.version),
            _uint(result.timestamp),
            _states(result.states) if result.states else b"\x80",
            cbor.text(result.code) + cbor.text(result.message) if result.code else b"\x60\x60",
        )
    parts.append(cbor.text("collections") + _names(message.collections))
    return b"".join(parts)


def _states(states: list[ServerState]) -> bytes:
    parts = [_array_head(len(states))]
    for state in states:
        parts += (b"\x84", _uint(state.collection), _ID, state.entity_id, _uint(state.version))
        payload = state.payload
        parts += (_NULL,) if payload is None else (_bytes_head(len(payload)), payload)
    return b"".join(parts)


def _encode_pull_response(message: PullResponse) -> bytes:
    columns = message.columns
    if columns is not None:
        return encode_columns(
            message, columns.ids, columns.heads, columns.sizes, columns.values, columns.indexes
        )
    page = PullPage()
    for commit in message.commits:
        page.begin(commit.version, commit.device_id, commit.timestamp)
        for operation in commit.operations:
            page.add(operation.collection, operation.entity_id, operation.payload)
    return page.encode(message)


def encode_columns(
    message: PullResponse, ids: bytes, heads: bytes, sizes: bytes, values: bytes, indexes: bytes
) -> bytes:
    """``message`` with these columns in the place of its own."""
    columns = {"ids": ids, "heads": heads, "sizes": sizes, "values": values, "indexes": indexes}
    parts = [
        cbor.map_head(9),
        cbor.text("head") + _uint(message.head),
        cbor.text("time") + _uint(message.time),
        cbor.text("floor") + _uint(message.floor),
        cbor.text("cursor") + _uint(message.cursor),
        cbor.text("columns") + cbor.map_head(5),
    ]
    for name, column in columns.items():
        parts += (cbor.text(name), _bytes_head(len(column)), column)
    parts += (
        cbor.text("commits") + _array_head(0),
        cbor.text("granted") + _granted(message),
        cbor.text("has_more") + (b"\xf5" if message.has_more else b"\xf4"),
        cbor.text("collections") + _names(message.collections),
    )
    return b"".join(parts)


class PullPage:
    """A ``PullResponse`` that is encoded while it is put together."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._commits = 0
        #: Where in ``_parts`` the number of the present commit's operations stands.
        self._count_at = 0
        self._operations = 0
        self._heads: dict[int, bytes] = {}

    def begin(self, version: int, device_id: bytes, timestamp: int) -> None:
        """The next commit; it must get an operation."""
        if self._operations != 1:
            self._close()
        self._commits += 1
        self._operations = 0
        parts = self._parts
        parts += (b"\x84", _uint(version), _ID, device_id, _uint(timestamp), b"\x81")
        self._count_at = len(parts) - 1

    def add(self, collection: int, entity_id: bytes, payload: bytes | None) -> None:
        """One more operation of the present commit; ``collection`` is its index in the page."""
        self._operations += 1
        head = self._heads.get(collection)
        if head is None:
            head = self._heads[collection] = b"\x83" + _uint(collection) + _ID
        if payload is None:
            self._parts += (head, entity_id, _NULL)
        else:
            self._parts += (head, entity_id, _bytes_head(len(payload)), payload)

    def _close(self) -> None:
        if self._commits:
            self._parts[self._count_at] = _array_head(self._operations)

    def encode(self, message: PullResponse) -> bytes:
        """``message`` with the commits of this page."""
        self._close()
        return b"".join(
            (
                cbor.map_head(9),
                cbor.text("head") + _uint(message.head),
                cbor.text("time") + _uint(message.time),
                cbor.text("floor") + _uint(message.floor),
                cbor.text("cursor") + _uint(message.cursor),
                cbor.text("columns") + _NULL,
                cbor.text("commits") + _array_head(self._commits),
                *self._parts,
                cbor.text("granted") + _granted(message),
                cbor.text("has_more") + (b"\xf5" if message.has_more else b"\xf4"),
                cbor.text("collections") + _names(message.collections),
            )
        )


def _granted(message: PullResponse) -> bytes:
    return _NULL if message.granted is None else _names(message.granted)


def _names(names: Sequence[str]) -> bytes:
    return _array_head(len(names)) + b"".join(map(cbor.text, names))


def _uint(number: int) -> bytes:
    # The two widths that versions and timestamps have come before the general case.
    if number < 1024:
        return _UINTS[number]
    if number > 0xFFFFFFFF:
        return _pack_8(0x1B, number)
    return _pack_4(0x1A, number) if number > 0xFFFF else cbor.uint(number)


def _bytes_head(length: int) -> bytes:
    return _BYTES_HEADS[length] if length < 4096 else cbor.bytes_head(length)


def _array_head(length: int) -> bytes:
    return _ARRAY_HEADS[length] if length < 256 else cbor.array_head(length)


_ENCODERS: Final[dict[type, Callable[[Any], bytes]]] = {
    PullRequest: _encode_pull_request,
    PushRequest: _encode_push_request,
    PushResponse: _encode_push_response,
    PullResponse: _encode_pull_response,
}


# --- decoding ---------------------------------------------------------------------------------

# libipld reads a link as if it were the byte string in it. Whatever it takes for one has this
# form: the end of a head of tag 42, then a byte string that begins with 0. Bytes inside an id or
# a payload may look the same, once in a hundred million; the strict decoder then tells which it
# is. Handing it every message would cost five times as much as all the rest of decoding, for
# integers in their shortest form, which do not matter in an envelope.
_LINK: Final = re.compile(
    rb"\x2a(?<=[\xd8\x00]\x2a)(?:[\x41-\x57]|\x58.|\x59..|\x5a.{4}|\x5b.{8})\x00", re.DOTALL
)


#: Larger messages are worth keeping the collector away.
_SMALL_BYTES_MAX: Final = 16 * 1024
#: Smaller messages are decoded without a look at how many items they hold.
_DENSE_BYTES_MAX: Final = 1024 * 1024
#: So few items are counted at once: a page in columns has not more, however large it is.
_FEW_ITEMS: Final = 256
#: What a list or a map takes in memory (a map of one pair takes most), what anything else takes
#: for each of its bytes (a text of two letters takes most), and what both may take together where
#: no more is looked at: counting lists and maps is a hundred times faster than finding all items.
_CONTAINER_MEMORY: Final = 240
_OTHER_MEMORY: Final = 20
_DECODED_BYTES_MAX: Final = 128 * 1024 * 1024


def decode_request(path: str, data: bytes, limits: Limits = LIMITS) -> SyncRequest:
    """The request posted to ``path``. Errors as in ``decode``; a path that is none of ``PATHS``
    is a ``ProtocolError`` with the code ``not_found``."""
    kind = PATHS.get(path)
    if kind is None:
        raise ProtocolError(f"no message is posted to {path!r}", code="not_found")
    return decode(cast("type[PushRequest]", kind), data, limits)


def decode_response(request: SyncRequest, data: bytes, limits: Limits = LIMITS) -> SyncResponse:
    """The answer to ``request``. Whether it is an ``ErrorResponse`` instead is said by the HTTP
    status; that one is read with ``decode(ErrorResponse, data)``. A push must be answered with
    one result for each transaction."""
    response = decode(cast("type[PushResponse]", response_type(request)), data, limits)
    if isinstance(request, PushRequest) and len(response.results) != len(request.transactions):
        raise ProtocolError(
            f"{len(response.results)} results answer {len(request.transactions)} transactions"
        )
    return response


def decode(kind: type[_Message], data: bytes, limits: Limits = LIMITS) -> _Message:
    """``data`` as a message of ``kind``; all its promises hold afterwards.

    Raises ``SyncCodecError`` for what is not CBOR of the profile, ``ProtocolError`` for a wrong
    shape (code ``invalid_message``) or a limit (code ``too_large``); the message names the place,
    ``$`` being the envelope: ``$.transactions[3].operations[0]``. Payloads are not looked into.
    """
    if len(data) > limits.message_bytes_max:
        raise _too_large("$", f"is {len(data)} bytes", limits.message_bytes_max)
    if len(data) > _SMALL_BYTES_MAX:
        with paused():
            return _decode(kind, data, limits)
    return _decode(kind, data, limits)


def _decode(kind: type[_Message], data: bytes, limits: Limits) -> _Message:
    if len(data) > _DENSE_BYTES_MAX:
        _check_density(data, limits)
    try:
        raw = cbor.decode_trusted(data)
        if _LINK.search(data) is not None:
            cbor.decode(data)
    except CborDecodeError as error:
        raise SyncCodecError(f"{kind.__name__} is not CBOR of the profile: {error}") from error
    try:
        message = convert(raw, kind, builtin_types=(bytes,), strict=True)
    except ValidationError as error:
        field, reason = reason_of_msgspec(str(error))
        where = "" if field is None else f"field {field}: "
        raise ProtocolError(f"this is no {kind.__name__}: {where}{reason}") from error
    check = _CHECKS.get(kind)
    if check is not None:
        check(message, limits)
    return message


def _check_density(data: bytes, limits: Limits) -> None:
    """Refuse what is small on the wire and huge in memory, before it is decoded: lists of nothing
    take seventy times their bytes, and seconds. An operation has five items and counts
    ``OPERATION_OVERHEAD_BYTES``; one alone in its transaction or result has at most twelve."""
    operations = max(limits.push_operations_max, limits.pull_operations_max)
    largest = limits.message_bytes_max // OPERATION_OVERHEAD_BYTES
    most = 12 * operations + limits.collections_max + 3 * HAVE_RANGES_MAX + 1024
    most += min(5 * largest, len(data) // 4)
    if not cbor.heavier(data, cbor.ITEMS, _FEW_ITEMS):
        return
    containers = cbor.containers_at_most(data)
    if _CONTAINER_MEMORY * containers + _OTHER_MEMORY * len(data) <= _DECODED_BYTES_MAX:
        return
    if cbor.heavier(data, cbor.ITEMS, most):
        raise _too_large("$", f"has more than {most} items", most)


def _check_handshake_request(message: HandshakeRequest, limits: Limits) -> None:
    _check_name("$.db_id", message.db_id)


def _check_handshake_response(message: HandshakeResponse, limits: Limits) -> None:
    _check_granted(message.granted, limits)


def _check_pull_request(message: PullRequest, limits: Limits) -> None:
    _check_name("$.db_id", message.db_id)
    if message.collections is not None:
        _check_collections(message.collections, limits)
    if len(message.have) > HAVE_RANGES_MAX:
        raise _too_large("$.have", f"has {len(message.have)} ranges", HAVE_RANGES_MAX)
    end = -1
    for index, (first, last) in enumerate(message.have):
        if not end < first <= last:
            raise _invalid(f"$.have[{index}]", "ranges ascend and do not overlap")
        end = last


def _check_push_request(message: PushRequest, limits: Limits) -> None:
    _check_name("$.db_id", message.db_id)
    _check_different(message.collections, limits)
    names = len(message.collections)
    seen: set[bytes] = set()
    count = 0
    for index, transaction in enumerate(message.transactions):
        operations = transaction.operations
        seen.add(transaction.transaction_id)
        if len(seen) <= index:
            raise _invalid(f"$.transactions[{index}]", "the transaction id came before")
        count += len(operations)
        if len(operations) == 1:
            if operations[0].collection >= names:
                raise _no_such_collection(f"$.transactions[{index}].operations[0]")
        else:
            _check_operations(f"$.transactions[{index}]", operations, names)
    # A transaction alone is bounded by its bytes: refusing it here would stop the outbox for good.
    if count > limits.push_operations_max and len(message.transactions) > 1:
        raise _too_large("$.transactions", f"have {count} operations", limits.push_operations_max)


def _check_push_response(message: PushResponse, limits: Limits) -> None:
    _check_collections(message.collections, limits)
    names = len(message.collections)
    for index, result in enumerate(message.results):
        if result.verdict <= Verdict.SUPERSEDED and result.version == 0:
            raise _invalid(f"$.results[{index}]", "an accepted transaction has a version")
        if result.verdict == Verdict.REJECTED and not result.code:
            raise _invalid(f"$.results[{index}]", "a rejected transaction has a code")
        if result.states:
            _check_operations(f"$.results[{index}]", result.states, names, "states")


def _check_pull_response(message: PullResponse, limits: Limits) -> None:
    _check_collections(message.collections, limits)
    _check_granted(message.granted, limits)
    names = len(message.collections)
    if message.columns is not None:
        _check_columns(message, message.columns, names)
        return
    version = 0
    for index, commit in enumerate(message.commits):
        if commit.version <= version:
            raise _invalid(f"$.commits[{index}]", "versions start at 1 and ascend")
        version = commit.version
        operations = commit.operations
        if len(operations) == 1:
            if operations[0].collection >= names:
                raise _no_such_collection(f"$.commits[{index}].operations[0]")
        else:
            _check_operations(f"$.commits[{index}]", operations, names)
    if not version <= message.cursor <= message.head:
        raise _invalid("$.cursor", "it lies between the last commit of the page and the head")


def _check_columns(message: PullResponse, columns: PullColumns, names: int) -> None:
    count, rest = divmod(len(columns.ids), ID_BYTES)
    lengths = (len(columns.heads), len(columns.sizes), len(columns.indexes))
    if rest or lengths != (COLUMN_HEAD_BYTES * count, 4 * count, 2 * count):
        raise _invalid("$.columns", "they are not all of one number of rows")
    if message.commits:
        raise _invalid("$.commits", "a page has commits or columns")
    sizes = struct.unpack(f">{count}I", columns.sizes)
    if sum(sizes) - sizes.count(TOMBSTONE_SIZE) * TOMBSTONE_SIZE != len(columns.values):
        raise _invalid("$.columns.values", "they are not as long as their sizes say")
    if max(struct.unpack(f">{count}H", columns.indexes), default=-1) >= names:
        raise _no_such_collection("$.columns.indexes")
    versions = column_versions(columns.heads)
    if count and (versions[0] == 0 or not all(map(operator.le, versions, versions[1:]))):
        raise _invalid("$.columns.heads", "versions start at 1 and ascend")
    if not max(versions, default=0) <= message.cursor <= message.head:
        raise _invalid("$.cursor", "it lies between the last commit of the page and the head")


def _check_operations(
    place: str,
    operations: Sequence[PushOperation | PullOperation | ServerState],
    names: int,
    field: str = "operations",
) -> None:
    """Every collection index means something, and no entity comes twice: two writes of one
    entity in one transaction would have no order that a reader could see."""
    for index, operation in enumerate(operations):
        if operation.collection >= names:
            raise _no_such_collection(f"{place}.{field}[{index}]")
    entities = {(operation.collection, operation.entity_id) for operation in operations}
    if len(entities) != len(operations):
        raise _invalid(f"{place}.{field}", "an entity comes twice")


def _check_granted(names: Collection[str] | None, limits: Limits) -> None:
    if names is not None:
        _check_collections(names, limits, "$.granted")


def _check_collections(
    names: Collection[str], limits: Limits, place: str = "$.collections"
) -> None:
    _check_different(names, limits, place)
    for index, name in enumerate(names):
        _check_name(f"{place}[{index}]", name)


def _check_different(names: Collection[str], limits: Limits, place: str = "$.collections") -> None:
    if len(names) > limits.collections_max:
        raise _too_large(place, f"has {len(names)} names", limits.collections_max)
    if len(set(names)) != len(names):
        raise _invalid(place, "a name comes twice")


def _check_name(place: str, name: str) -> None:
    try:
        check_name(name)
    except InvalidNameError as error:
        raise _invalid(place, str(error)) from error


def _no_such_collection(place: str) -> ProtocolError:
    return _invalid(place, "its collection is not in $.collections")


def _invalid(place: str, what: str) -> ProtocolError:
    return ProtocolError(f"{place}: {what}")


def _too_large(place: str, what: str, limit: int) -> ProtocolError:
    return ProtocolError(f"{place}: {what}, the limit is {limit}", code="too_large")


_CHECKS: Final[dict[type, Callable[[Any, Limits], None]]] = {
    HandshakeRequest: _check_handshake_request,
    HandshakeResponse: _check_handshake_response,
    PullRequest: _check_pull_request,
    PullResponse: _check_pull_response,
    PushRequest: _check_push_request,
    PushResponse: _check_push_response,
}

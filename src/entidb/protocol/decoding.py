"""Bytes to messages: shape, limits, and whether two fields agree.

It does not look into payloads, which are checked once, where they enter a database.
"""

from __future__ import annotations

import functools
import operator
import re
import struct
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, cast

from msgspec import ValidationError, convert

from entidb import cbor
from entidb.collector import paused
from entidb.errors import CborDecodeError, InvalidNameError, ProtocolError, SyncCodecError
from entidb.protocol.columns import COLUMN_HEAD_BYTES, TOMBSTONE_SIZE, column_versions
from entidb.protocol.limits import LIMITS, Limits
from entidb.protocol.messages import (
    DIGEST_IDS_MAX,
    HAVE_RANGES_MAX,
    PACKINGS_MAX,
    PATHS,
    SEGMENTS_MAX,
    AnyMessage,
    DigestRequest,
    DigestResponse,
    HandshakeRequest,
    HandshakeResponse,
    Manifest,
    PullColumns,
    PullOperation,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushResponse,
    PushTransaction,
    RoundRequest,
    RoundResponse,
    ServerState,
    SnapshotRequest,
    SyncRequest,
    SyncResponse,
    Verdict,
    response_type,
)
from entidb.types import ID_BYTES, OPERATION_OVERHEAD_BYTES, check_name, reason_of_msgspec

# --- decoding ---------------------------------------------------------------------------------

# libipld reads a link as if it were the byte string in it. Whatever it takes for one has this form:
# the end of a head of tag 42, then a byte string that begins with 0. Bytes inside an id or a
# payload may look the same, once in a hundred million; the strict decoder then decides which it is.
# To give it every message would cost five times as much as all the rest of decoding, for integers
# in their shortest form, which do not matter in an envelope.
_LINK: Final = re.compile(
    rb"\x2a(?<=[\xd8\x00]\x2a)(?:[\x41-\x57]|\x58.|\x59..|\x5a.{4}|\x5b.{8})\x00", re.DOTALL
)
#: Larger messages are worth keeping the collector away.
_SMALL_BYTES_MAX: Final = 16 * 1024
#: Smaller messages are decoded without a look at how many items they hold.
_DENSE_BYTES_MAX: Final = 1024 * 1024
#: So few items are counted at once: a page in columns has not more, however large it is.
_FEW_ITEMS: Final = 256
#: More transactions than so many are looked at together first; for fewer that is more work.
_MANY: Final = 8
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
    """The answer to ``request``. The HTTP status says whether it is an ``ErrorResponse`` instead;
    that one is read with ``decode(ErrorResponse, data)``. A push must be answered with one result
    for each transaction."""
    response = decode(cast("type[PushResponse]", response_type(request)), data, limits)
    if isinstance(request, PushRequest):
        _check_answers(request, response)
    elif isinstance(request, RoundRequest):
        decided = cast("RoundResponse", response).push
        if decided is not None:
            _check_answers(request.push, decided)
    return response


def _check_answers(request: PushRequest, response: PushResponse) -> None:
    if len(response.results) != len(request.transactions):
        raise ProtocolError(
            f"{len(response.results)} results answer {len(request.transactions)} transactions"
        )


def decode(kind: type[AnyMessage], data: bytes, limits: Limits = LIMITS) -> AnyMessage:
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


def _decode(kind: type[AnyMessage], data: bytes, limits: Limits) -> AnyMessage:
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
    """Refuse what is small on the wire and huge in memory, before it is decoded: empty lists take
    seventy times their bytes, and seconds. An operation has five items and counts
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
    if message.granted is not None:
        _check_collections(message.granted, limits, "$.granted")


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
    names, transactions = len(message.collections), message.transactions
    count = 0
    if transactions[_MANY:] and _are_plain(transactions, names):
        count, transactions = len(transactions), []
    seen: set[bytes] = set()
    for index, transaction in enumerate(transactions):
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


def _are_plain(transactions: Sequence[PushTransaction], names: int) -> bool:
    """Whether many are as most are: of one operation each, and nothing is wrong with any."""
    each = [transaction.operations for transaction in transactions]
    return (
        set(map(len, each)) == {1}
        and max([operations[0].collection for operations in each]) < names
        and len({transaction.transaction_id for transaction in transactions}) == len(each)
    )


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
    if message.collections:
        _check_collections(message.collections, limits)
    if message.granted is not None:
        _check_collections(message.granted, limits, "$.granted")
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


def _check_round_request(message: RoundRequest, limits: Limits) -> None:
    pull, push = message.pull, message.push
    _check_pull_request(pull, limits)
    _check_push_request(push, limits)
    for name in ("db_id", "device_id", "history", "cursor", "schema"):
        if getattr(pull, name) != getattr(push, name):
            raise _invalid(f"$.push.{name}", f"it is another one than $.pull.{name}")
    if pull.full or pull.columns:
        raise _invalid("$.pull", "everything is not pulled together with a push")
    if not push.transactions:
        raise _invalid("$.push.transactions", "there are none; a pull alone goes to /v1/pull")


def _check_round_response(message: RoundResponse, limits: Limits) -> None:
    _check_pull_response(message.pull, limits)
    if message.push is not None:
        _check_push_response(message.push, limits)


def _check_digest_request(message: DigestRequest, limits: Limits) -> None:
    _check_name("$.db_id", message.db_id)
    if message.collections is not None:
        _check_collections(message.collections, limits)
    if message.collection is not None:
        _check_name("$.collection", message.collection)
    if len(message.ids) > DIGEST_IDS_MAX:
        raise _too_large("$.ids", f"has {len(message.ids)} ids", DIGEST_IDS_MAX)
    if message.after is not None and message.after >= message.last:
        raise _invalid("$.last", "it is not beyond $.after")
    _check_ascending("$.ids", message.ids)


def _check_digest_response(message: DigestResponse, limits: Limits) -> None:
    _check_collections(message.collections, limits)
    if message.granted is not None:
        _check_collections(message.granted, limits, "$.granted")
    _check_ascending("$.blocks", [block.last for block in message.blocks])
    _check_ascending("$.states", [state.entity_id for state in message.states])
    _check_ascending("$.newer", message.newer)


def _check_snapshot_request(message: SnapshotRequest, limits: Limits) -> None:
    _check_name("$.db_id", message.db_id)
    if message.collections is not None:
        _check_collections(message.collections, limits)
    if len(message.packings) > PACKINGS_MAX:
        raise _too_large("$.packings", f"has {len(message.packings)} names", PACKINGS_MAX)


def _check_manifest(message: Manifest, limits: Limits) -> None:
    _check_collections(message.collections, limits)
    if message.granted is not None:
        _check_collections(message.granted, limits, "$.granted")
    if len(message.segments) > SEGMENTS_MAX:
        raise _too_large("$.segments", f"has {len(message.segments)} segments", SEGMENTS_MAX)
    names, before, last, rows = len(message.collections), -1, b"", 0
    for index, segment in enumerate(message.segments):
        place = f"$.segments[{index}]"
        if segment.collection >= names:
            raise _no_such_collection(place)
        if segment.collection < before:
            raise _invalid(place, "the segments of a collection follow one another")
        if segment.first > segment.last:
            raise _invalid(place, "it ends before it begins")
        if segment.collection == before and segment.first <= last:
            raise _invalid(place, "it does not lie behind the one before")
        before, last, rows = segment.collection, segment.last, rows + segment.rows
    if rows != message.entities:
        raise _invalid("$.entities", f"the segments have {rows} rows")
    if message.floor > message.head:
        raise _invalid("$.floor", "it is above the head")


def _check_ascending(place: str, ids: Sequence[bytes]) -> None:
    if not all(map(operator.lt, ids, ids[1:])):
        raise _invalid(place, "ids ascend, and none comes twice")


def _check_columns(message: PullResponse, columns: PullColumns, names: int) -> None:
    count, rest = divmod(len(columns.ids), ID_BYTES)
    lengths = (len(columns.heads), len(columns.sizes), len(columns.indexes))
    if rest or lengths != (COLUMN_HEAD_BYTES * count, 4 * count, 2 * count):
        raise _invalid("$.columns", "they are not all of one number of rows")
    if message.commits:
        raise _invalid("$.commits", "a page has commits or columns")
    sizes = struct.unpack(f">{count}I", columns.sizes)
    if sum(sizes) - sizes.count(TOMBSTONE_SIZE) * TOMBSTONE_SIZE != len(columns.values):
        raise _invalid("$.columns.values", "they are not as long as their sizes together")
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
    """Check that every collection index is a position in the names, and that no entity comes twice:
    two writes of one entity in one transaction would have no order that a reader could see."""
    for index, operation in enumerate(operations):
        if operation.collection >= names:
            raise _no_such_collection(f"{place}.{field}[{index}]")
    entities = {(operation.collection, operation.entity_id) for operation in operations}
    if len(entities) != len(operations):
        raise _invalid(f"{place}.{field}", "an entity comes twice")


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


#: The same few come with every message.
_check_known_name: Final = functools.lru_cache(maxsize=256)(check_name)


def _check_name(place: str, name: str) -> None:
    try:
        _check_known_name(name)
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
    RoundRequest: _check_round_request,
    RoundResponse: _check_round_response,
    DigestRequest: _check_digest_request,
    DigestResponse: _check_digest_response,
    SnapshotRequest: _check_snapshot_request,
    Manifest: _check_manifest,
}

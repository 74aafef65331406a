"""Messages to canonical CBOR."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import to_builtins

from entidb import cbor
from entidb.protocol.heads import _UINTS, ID, NULL, array_head, bytes_head, uint
from entidb.protocol.messages import (
    DigestRequest,
    HandshakeRequest,
    HandshakeResponse,
    Manifest,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    PushResult,
    RoundRequest,
    RoundResponse,
    ServerState,
    SnapshotRequest,
    SyncRequest,
    SyncResponse,
)
from entidb.types import Term

#: The heads of small maps, by how many pairs they have.
_MAPS: Final = tuple(cbor.map_head(pairs) for pairs in range(12))
#: What a round has before its pull, and before its push.
_PULL: Final = cbor.map_head(2) + cbor.text("pull")
_PUSH: Final = cbor.text("push")
#: No names, no commits.
_NONE: Final = cbor.array_head(0)
#: More answers than so many are looked at together first; for fewer that is more work.
_MANY: Final = 8
#: Of operations of a push, by the index of their collection.
_OPERATION_HEADS: Final = tuple(b"\x84" + cbor.uint(index) + ID for index in range(64))
#: The keys of the messages that are joined by hand.
_KEYS: Final = {
    name: cbor.text(name)
    for name in (
        "ids",
        "head",
        "live",
        "time",
        "db_id",
        "floor",
        "heads",
        "sizes",
        "cursor",
        "schema",
        "values",
        "columns",
        "commits",
        "granted",
        "history",
        "indexes",
        "results",
        "subject",
        "has_more",
        "device_id",
        "collections",
        "transactions",
    )
}
#: What stands before a term, and before a commit that was seen.
_TERM: Final = cbor.text("term") + b"\x82"
_SEEN: Final = cbor.text("seen") + b"\x82"


def encode(message: SyncRequest | SyncResponse) -> bytes:
    """``message`` as canonical CBOR. Its own shape is not checked; a message that breaks its type's
    promises raises whatever Python raises, or the other side refuses it."""
    return _ENCODERS.get(type(message), _encode_small)(message)


def _encode_small(message: SyncRequest | SyncResponse) -> bytes:
    return cbor.encode_message(to_builtins(message, builtin_types=(bytes,)))


# A program that gives no number of its schema says nothing, and so does a server that knows nobody,
# and whoever knows no term: these messages are those of before.


def _encode_asking(message: HandshakeRequest | DigestRequest | SnapshotRequest) -> bytes:
    envelope = to_builtins(message, builtin_types=(bytes,))
    if not message.schema:
        del envelope["schema"]
    if isinstance(message, SnapshotRequest) and message.seen is None:
        del envelope["seen"]
    return cbor.encode_message(envelope)


def _encode_handshake_response(message: HandshakeResponse) -> bytes:
    envelope = to_builtins(message, builtin_types=(bytes,))
    if message.subject is None:
        del envelope["subject"]
    return cbor.encode_message(envelope)


def _encode_manifest(message: Manifest) -> bytes:
    envelope = to_builtins(message, builtin_types=(bytes,))
    if message.term is None:
        del envelope["term"]
    return cbor.encode_message(envelope)


def _encode_pull_request(message: PullRequest) -> bytes:
    envelope = to_builtins(message, builtin_types=(bytes,))
    if not message.schema:
        del envelope["schema"]
    if message.seen is None:
        del envelope["seen"]
    return cbor.encode_message(envelope | {"have": list(map(list, message.have))})


def _encode_push_request(message: PushRequest) -> bytes:
    seen = message.seen
    parts = [
        _MAPS[6 + bool(message.schema) + (message.subject is not None) + (seen is not None)],
        b""
        if message.seen is None
        else _SEEN + uint(message.seen.version) + b"\x48" + message.seen.term,
        _KEYS["db_id"] + cbor.text(message.db_id),
        _KEYS["cursor"] + uint(message.cursor),
        _KEYS["schema"] + uint(message.schema) if message.schema else b"",
        _KEYS["history"] + ID + message.history,
        b"" if message.subject is None else _KEYS["subject"] + cbor.text(message.subject),
        _KEYS["device_id"] + ID + message.device_id,
        _KEYS["collections"] + _names(message.collections),
        _KEYS["transactions"] + array_head(len(message.transactions)),
    ]
    heads: Sequence[bytes] = _OPERATION_HEADS
    if len(message.collections) > len(heads):
        heads = [b"\x84" + uint(index) + ID for index in range(len(message.collections))]
    for transaction in message.transactions:
        operations = transaction.operations
        parts += (
            b"\x83\x50",
            transaction.transaction_id,
            uint(transaction.timestamp),
            array_head(len(operations)),
        )
        for operation in operations:
            payload = operation.payload
            head = heads[operation.collection]
            base = uint(operation.base_version)
            if payload is None:
                parts += (head, operation.entity_id, base, NULL)
            else:
                parts += (head, operation.entity_id, base, bytes_head(len(payload)), payload)
    return b"".join(parts)


def _encode_push_response(message: PushResponse) -> bytes:
    term = message.term
    parts = [
        _MAPS[4 + (term is not None)],
        _KEYS["head"] + uint(message.head),
        b"" if term is None else _term(term),
        _KEYS["time"] + uint(message.time),
        _KEYS["results"] + array_head(len(message.results)),
    ]
    results = message.results
    alike = _alike(results) if results[_MANY:] else ()
    parts += alike
    for result in () if alike else results:
        parts += (
            b"\x86",
            _UINTS[result.verdict],
            uint(result.version),
            uint(result.timestamp),
            _states(result.states) if result.states else b"\x80",
            cbor.text(result.code) + cbor.text(result.message) if result.code else b"\x60\x60",
        )
    parts.append(_KEYS["collections"] + _names(message.collections))
    return b"".join(parts)


def _alike(results: Sequence[PushResult]) -> tuple[bytes, ...]:
    """Answers that say the same of everything and differ in the versions alone, as most do; nothing
    if these are not like that."""
    verdicts = {result.verdict for result in results}
    if len(verdicts) > 1 or any(
        result.timestamp or result.states or result.code for result in results
    ):
        return ()
    begins, ends = b"\x86" + _UINTS[verdicts.pop()], b"\x00\x80\x60\x60"
    versions = map(uint, [result.version for result in results])
    return begins, (ends + begins).join(versions), ends


def _states(states: list[ServerState]) -> bytes:
    parts = [array_head(len(states))]
    for state in states:
        parts += (b"\x84", uint(state.collection), ID, state.entity_id, uint(state.version))
        payload = state.payload
        parts += (NULL,) if payload is None else (bytes_head(len(payload)), payload)
    return b"".join(parts)


def _encode_pull_response(message: PullResponse) -> bytes:
    columns = message.columns
    if columns is not None:
        return encode_columns(
            message, columns.ids, columns.heads, columns.sizes, columns.values, columns.indexes
        )
    if not message.commits:
        return _joined(message, (NULL,), (_NONE,))
    page = PullPage()
    for commit in message.commits:
        page.begin(commit.version, commit.device_id, commit.timestamp)
        for operation in commit.operations:
            page.add(operation.collection, operation.entity_id, operation.payload)
    return page.encode(message)


def encode_columns(
    message: PullResponse, ids: bytes, heads: bytes, sizes: bytes, values: bytes, indexes: bytes
) -> bytes:
    """``message`` with these columns instead of its own."""
    columns = {"ids": ids, "heads": heads, "sizes": sizes, "values": values, "indexes": indexes}
    parts = [_MAPS[5]]
    for name, column in columns.items():
        parts += (_KEYS[name], bytes_head(len(column)), column)
    return _joined(message, parts, (_NONE,))


def _joined(message: PullResponse, columns: Sequence[bytes], commits: Sequence[bytes]) -> bytes:
    """``message`` with these parts as its columns and commits."""
    term, live = message.term, message.live
    return b"".join(
        (
            _MAPS[9 + (term is not None) + (live is not None)],
            _KEYS["head"] + uint(message.head),
            b"" if live is None else _KEYS["live"] + uint(live),
            b"" if term is None else _term(term),
            _KEYS["time"] + uint(message.time),
            _KEYS["floor"] + uint(message.floor),
            _KEYS["cursor"] + uint(message.cursor),
            _KEYS["columns"],
            *columns,
            _KEYS["commits"],
            *commits,
            _KEYS["granted"] + (NULL if message.granted is None else _names(message.granted)),
            _KEYS["has_more"] + (b"\xf5" if message.has_more else b"\xf4"),
            _KEYS["collections"] + (_names(message.collections) if message.collections else _NONE),
        )
    )


class PullPage:
    """A ``PullResponse`` that is encoded while it is put together."""

    def __init__(self) -> None:
        #: The number of commits first, when it is known.
        self._parts: list[bytes] = [b""]
        self._commits = 0
        #: Where in ``_parts`` the number of the present commit's operations is.
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
        parts += (b"\x84", uint(version), ID, device_id, uint(timestamp), b"\x81")
        self._count_at = len(parts) - 1

    def add(self, collection: int, entity_id: bytes, payload: bytes | None) -> None:
        """One more operation of the present commit; ``collection`` is its index in the page."""
        self._operations += 1
        head = self._heads.get(collection)
        if head is None:
            head = self._heads[collection] = b"\x83" + uint(collection) + ID
        if payload is None:
            self._parts += (head, entity_id, NULL)
        else:
            self._parts += (head, entity_id, bytes_head(len(payload)), payload)

    def _close(self) -> None:
        if self._commits:
            self._parts[self._count_at] = array_head(self._operations)

    def encode(self, message: PullResponse) -> bytes:
        """``message`` with the commits of this page."""
        self._close()
        self._parts[0] = array_head(self._commits)
        return _joined(message, (NULL,), self._parts)


def _encode_round_request(message: RoundRequest) -> bytes:
    pull, push = _encode_pull_request(message.pull), _encode_push_request(message.push)
    return b"".join((_PULL, pull, _PUSH, push))


def _encode_round_response(message: RoundResponse) -> bytes:
    return encode_round(_encode_pull_response(message.pull), message.push)


def encode_round(pull: bytes, push: PushResponse | None) -> bytes:
    """A ``RoundResponse`` whose page is encoded already."""
    return b"".join((_PULL, pull, _PUSH, NULL if push is None else _encode_push_response(push)))


@functools.lru_cache(maxsize=256)
def _term(term: Term) -> bytes:
    return _TERM + uint(term.first) + b"\x48" + term.name


def _names(names: Sequence[str]) -> bytes:
    return array_head(len(names)) + b"".join(map(cbor.text, names))


_ENCODERS: Final[dict[type, Callable[[Any], bytes]]] = {
    HandshakeRequest: _encode_asking,
    HandshakeResponse: _encode_handshake_response,
    DigestRequest: _encode_asking,
    SnapshotRequest: _encode_asking,
    Manifest: _encode_manifest,
    PullRequest: _encode_pull_request,
    PushRequest: _encode_push_request,
    PushResponse: _encode_push_response,
    PullResponse: _encode_pull_response,
    RoundRequest: _encode_round_request,
    RoundResponse: _encode_round_response,
}

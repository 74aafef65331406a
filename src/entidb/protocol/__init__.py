"""The wire messages: shapes, limits, encoding and decoding. No transport, no decisions.

    messages   the shapes, and what each message may hold
    columns    a pulled page without an object for each operation
    digests    what two transactions have in common if they wrote the same (R14)
    encoding   messages to canonical CBOR
    decoding   bytes to messages: shape, limits, and whether two fields agree
    heads      the first bytes of CBOR items, made once

The normative text is ``docs/protocol.md``. The server's service and the device's cycle decide what
depends on state (history, cursor, permissions); payloads are checked once, where they enter a
database.
"""

from entidb.protocol.columns import (
    TOMBSTONE_SIZE,
    ColumnRows,
    column_heads,
    column_rows,
    expanded,
)
from entidb.protocol.decoding import decode, decode_request, decode_response
from entidb.protocol.digests import (
    digest_heads,
    digest_operations,
    digest_stored_newer,
    operations_digest,
)
from entidb.protocol.encoding import PullPage, encode, encode_columns, encode_round
from entidb.protocol.messages import (
    CONTENT_TYPE,
    DIGEST_IDS_MAX,
    HAVE_RANGES_MAX,
    LIMITS,
    PATHS,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    DigestBlock,
    DigestRequest,
    DigestResponse,
    DigestState,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    Limits,
    PullColumns,
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushResponse,
    PushResult,
    PushTransaction,
    RoundRequest,
    RoundResponse,
    ServerState,
    SyncRequest,
    SyncResponse,
    Verdict,
    operations_count,
    path_of,
    payload_bytes,
    push_in,
    response_type,
    transaction_bytes,
)

__all__ = [
    "CONTENT_TYPE",
    "DIGEST_IDS_MAX",
    "HAVE_RANGES_MAX",
    "LIMITS",
    "PATHS",
    "PROTOCOL_MAJOR",
    "PROTOCOL_MINOR",
    "TOMBSTONE_SIZE",
    "ColumnRows",
    "DigestBlock",
    "DigestRequest",
    "DigestResponse",
    "DigestState",
    "ErrorResponse",
    "HandshakeRequest",
    "HandshakeResponse",
    "Limits",
    "PullColumns",
    "PullCommit",
    "PullOperation",
    "PullPage",
    "PullRequest",
    "PullResponse",
    "PushOperation",
    "PushRequest",
    "PushResponse",
    "PushResult",
    "PushTransaction",
    "RoundRequest",
    "RoundResponse",
    "ServerState",
    "SyncRequest",
    "SyncResponse",
    "Verdict",
    "column_heads",
    "column_rows",
    "decode",
    "decode_request",
    "decode_response",
    "digest_heads",
    "digest_operations",
    "digest_stored_newer",
    "encode",
    "encode_columns",
    "encode_round",
    "expanded",
    "operations_count",
    "operations_digest",
    "path_of",
    "payload_bytes",
    "push_in",
    "response_type",
    "transaction_bytes",
]

"""EntiDB: an embedded, transactional entity database, and the engine that keeps its copies in step.

The public names, each loaded from its home when it is first used (PEP 562): importing ``entidb``
costs next to nothing, and a device never loads the server. Nothing else lives here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from entidb.lazy import lazy_names
from entidb.version import VERSION

if TYPE_CHECKING:
    from entidb.cbor import (
        CborDecode,
        CborEncode,
    )
    from entidb.db import (
        ChangeEvent,
        ChangeFeed,
        Collection,
        Database,
        F,
        Query,
        Snapshot,
        Transaction,
    )
    from entidb.errors import (
        AuthenticationError,
        CborDecodeError,
        CborEncodeError,
        CodecError,
        CommitUnknownError,
        ConfigError,
        ConflictError,
        CorruptionError,
        DatabaseClosedError,
        DatabaseForkedError,
        DatabaseLockedError,
        DatabaseMovedError,
        EntiDBError,
        FormatError,
        HistoryChangedError,
        InvalidNameError,
        LocalError,
        PermissionDeniedError,
        ProtocolError,
        QueryError,
        ResetRequiredError,
        ScopeError,
        ServerBusyError,
        ServerError,
        StorageError,
        StorageFullError,
        SyncCancelledError,
        SyncCodecError,
        SyncError,
        SyncStateError,
        SyncTimeoutError,
        TlsError,
        TransactionError,
        TransactionTooLargeError,
        TransportError,
        ValueTypeError,
        VersionMismatchError,
    )
    from entidb.protocol import (
        SyncRequest,
        SyncResponse,
    )
    from entidb.server import (
        ServerConfig,
        SyncServer,
        create_app,
    )
    from entidb.sync import (
        AsyncSyncEngine,
        Conflict,
        ConflictPolicy,
        ConflictResolution,
        DatabaseApplier,
        HttpClient,
        HttpTransport,
        LoopbackClient,
        LoopbackServer,
        MemorySyncApplier,
        MockTransport,
        RetryConfig,
        SyncApplier,
        SyncConfig,
        SyncCycleResult,
        SyncEngine,
        SyncResult,
        SyncState,
        SyncStats,
        SyncTransport,
    )

    __all__ = [
        "Database",
        "Collection",
        "Transaction",
        "Snapshot",
        "ChangeFeed",
        "ChangeEvent",
        "F",
        "Query",
        "AsyncSyncEngine",
        "SyncEngine",
        "SyncConfig",
        "RetryConfig",
        "SyncState",
        "SyncStats",
        "SyncCycleResult",
        "SyncResult",
        "SyncApplier",
        "DatabaseApplier",
        "MemorySyncApplier",
        "SyncTransport",
        "HttpTransport",
        "HttpClient",
        "LoopbackClient",
        "LoopbackServer",
        "MockTransport",
        "Conflict",
        "ConflictPolicy",
        "ConflictResolution",
        "SyncRequest",
        "SyncResponse",
        "SyncServer",
        "ServerConfig",
        "create_app",
        "CborEncode",
        "CborDecode",
        "EntiDBError",
        "LocalError",
        "DatabaseClosedError",
        "DatabaseLockedError",
        "DatabaseMovedError",
        "DatabaseForkedError",
        "TransactionError",
        "TransactionTooLargeError",
        "ValueTypeError",
        "QueryError",
        "InvalidNameError",
        "ScopeError",
        "ConfigError",
        "CodecError",
        "CborEncodeError",
        "CborDecodeError",
        "StorageError",
        "StorageFullError",
        "CorruptionError",
        "FormatError",
        "CommitUnknownError",
        "SyncError",
        "TransportError",
        "SyncTimeoutError",
        "TlsError",
        "ProtocolError",
        "SyncCodecError",
        "VersionMismatchError",
        "AuthenticationError",
        "PermissionDeniedError",
        "ServerError",
        "ServerBusyError",
        "ConflictError",
        "SyncCancelledError",
        "SyncStateError",
        "HistoryChangedError",
        "ResetRequiredError",
        "__version__",
    ]

__version__: Final = VERSION

#: Home module of each public name.
_HOMES: Final[dict[str, tuple[str, ...]]] = {
    "entidb.db": (
        "Database",
        "Collection",
        "Transaction",
        "Snapshot",
        "ChangeFeed",
        "ChangeEvent",
        "F",
        "Query",
    ),
    "entidb.sync": (
        "AsyncSyncEngine",
        "SyncEngine",
        "SyncConfig",
        "RetryConfig",
        "SyncState",
        "SyncStats",
        "SyncCycleResult",
        "SyncResult",
        "SyncApplier",
        "DatabaseApplier",
        "MemorySyncApplier",
        "SyncTransport",
        "HttpTransport",
        "HttpClient",
        "LoopbackClient",
        "LoopbackServer",
        "MockTransport",
        "Conflict",
        "ConflictPolicy",
        "ConflictResolution",
    ),
    "entidb.protocol": (
        "SyncRequest",
        "SyncResponse",
    ),
    "entidb.server": (
        "SyncServer",
        "ServerConfig",
        "create_app",
    ),
    "entidb.cbor": (
        "CborEncode",
        "CborDecode",
    ),
    "entidb.errors": (
        "EntiDBError",
        "LocalError",
        "DatabaseClosedError",
        "DatabaseLockedError",
        "DatabaseMovedError",
        "DatabaseForkedError",
        "TransactionError",
        "TransactionTooLargeError",
        "ValueTypeError",
        "QueryError",
        "InvalidNameError",
        "ScopeError",
        "ConfigError",
        "CodecError",
        "CborEncodeError",
        "CborDecodeError",
        "StorageError",
        "StorageFullError",
        "CorruptionError",
        "FormatError",
        "CommitUnknownError",
        "SyncError",
        "TransportError",
        "SyncTimeoutError",
        "TlsError",
        "ProtocolError",
        "SyncCodecError",
        "VersionMismatchError",
        "AuthenticationError",
        "PermissionDeniedError",
        "ServerError",
        "ServerBusyError",
        "ConflictError",
        "SyncCancelledError",
        "SyncStateError",
        "HistoryChangedError",
        "ResetRequiredError",
    ),
}
_HOME_OF, _load, _listed = lazy_names(__name__, _HOMES, globals())
#: Names that need more than the core, and what they cannot do without.
_NEED_EXTRA: Final = ("SyncServer", "create_app")
_SERVER_NEEDS: Final = ("jwt", "prometheus_client", "starlette", "uvicorn")


def __getattr__(name: str) -> Any:
    if name == "__all__":
        globals()[name] = value = _importable()
        return value
    return _load(name)


def _importable() -> list[str]:
    """What ``from entidb import *`` brings: all public names, and those that need the server's
    packages where they are installed."""
    from importlib.util import find_spec

    extra = all(find_spec(name) is not None for name in _SERVER_NEEDS)
    left_out = () if extra else _NEED_EXTRA
    return [name for name in (*_HOME_OF, "__version__") if name not in left_out]


def __dir__() -> list[str]:
    return sorted({*_listed(), "__version__", "__all__"})

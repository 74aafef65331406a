"""EntiDB: an embedded, transactional entity database, and the engine that keeps its copies in step.

The public names, each loaded from its home when it is first used (PEP 562): importing ``entidb``
costs next to nothing, and a device never loads the server. Nothing else lives here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from entidb.lazy import lazy_names
from entidb.version import VERSION

if TYPE_CHECKING:
    from entidb.cbor import CborDecode as CborDecode
    from entidb.cbor import CborEncode as CborEncode
    from entidb.db import AsyncDatabase as AsyncDatabase
    from entidb.db import ChangeEvent as ChangeEvent
    from entidb.db import ChangeFeed as ChangeFeed
    from entidb.db import Collection as Collection
    from entidb.db import CommitEvent as CommitEvent
    from entidb.db import Database as Database
    from entidb.db import DiscardedTransaction as DiscardedTransaction
    from entidb.db import EntityInfo as EntityInfo
    from entidb.db import F as F
    from entidb.db import Index as Index
    from entidb.db import OverruledValue as OverruledValue
    from entidb.db import Query as Query
    from entidb.db import Snapshot as Snapshot
    from entidb.db import Transaction as Transaction
    from entidb.db import migrate as migrate
    from entidb.errors import AuthenticationError as AuthenticationError
    from entidb.errors import CborDecodeError as CborDecodeError
    from entidb.errors import CborEncodeError as CborEncodeError
    from entidb.errors import CodecError as CodecError
    from entidb.errors import CommitStaleError as CommitStaleError
    from entidb.errors import CommitUnknownError as CommitUnknownError
    from entidb.errors import ConfigError as ConfigError
    from entidb.errors import ConflictError as ConflictError
    from entidb.errors import CorruptionError as CorruptionError
    from entidb.errors import DatabaseClosedError as DatabaseClosedError
    from entidb.errors import DatabaseForkedError as DatabaseForkedError
    from entidb.errors import DatabaseLockedError as DatabaseLockedError
    from entidb.errors import DatabaseMovedError as DatabaseMovedError
    from entidb.errors import EntiDBError as EntiDBError
    from entidb.errors import FormatError as FormatError
    from entidb.errors import HistoryChangedError as HistoryChangedError
    from entidb.errors import InvalidNameError as InvalidNameError
    from entidb.errors import LocalError as LocalError
    from entidb.errors import NotUniqueError as NotUniqueError
    from entidb.errors import PermissionDeniedError as PermissionDeniedError
    from entidb.errors import ProtocolError as ProtocolError
    from entidb.errors import QueryError as QueryError
    from entidb.errors import ResetRequiredError as ResetRequiredError
    from entidb.errors import ScanWarning as ScanWarning
    from entidb.errors import ScopeError as ScopeError
    from entidb.errors import ServerBusyError as ServerBusyError
    from entidb.errors import ServerError as ServerError
    from entidb.errors import StorageError as StorageError
    from entidb.errors import StorageFullError as StorageFullError
    from entidb.errors import StorageUnreachableError as StorageUnreachableError
    from entidb.errors import SyncCancelledError as SyncCancelledError
    from entidb.errors import SyncCodecError as SyncCodecError
    from entidb.errors import SyncError as SyncError
    from entidb.errors import SyncStateError as SyncStateError
    from entidb.errors import SyncTimeoutError as SyncTimeoutError
    from entidb.errors import TlsError as TlsError
    from entidb.errors import TransactionConflictError as TransactionConflictError
    from entidb.errors import TransactionError as TransactionError
    from entidb.errors import TransactionTooLargeError as TransactionTooLargeError
    from entidb.errors import TransportError as TransportError
    from entidb.errors import UpgradeRequiredError as UpgradeRequiredError
    from entidb.errors import ValueTypeError as ValueTypeError
    from entidb.errors import VersionMismatchError as VersionMismatchError
    from entidb.protocol import SyncRequest as SyncRequest
    from entidb.protocol import SyncResponse as SyncResponse
    from entidb.server import ServerConfig as ServerConfig
    from entidb.server import SyncServer as SyncServer
    from entidb.server import create_app as create_app
    from entidb.sync import AsyncSyncEngine as AsyncSyncEngine
    from entidb.sync import Conflict as Conflict
    from entidb.sync import ConflictPolicy as ConflictPolicy
    from entidb.sync import ConflictResolution as ConflictResolution
    from entidb.sync import DatabaseApplier as DatabaseApplier
    from entidb.sync import Fate as Fate
    from entidb.sync import FateState as FateState
    from entidb.sync import HttpClient as HttpClient
    from entidb.sync import HttpConfig as HttpConfig
    from entidb.sync import HttpTransport as HttpTransport
    from entidb.sync import LoopbackClient as LoopbackClient
    from entidb.sync import LoopbackServer as LoopbackServer
    from entidb.sync import MemorySyncApplier as MemorySyncApplier
    from entidb.sync import Merge as Merge
    from entidb.sync import MockTransport as MockTransport
    from entidb.sync import RetryConfig as RetryConfig
    from entidb.sync import SyncApplier as SyncApplier
    from entidb.sync import SyncConfig as SyncConfig
    from entidb.sync import SyncCycleResult as SyncCycleResult
    from entidb.sync import SyncEngine as SyncEngine
    from entidb.sync import SyncProgress as SyncProgress
    from entidb.sync import SyncResult as SyncResult
    from entidb.sync import SyncState as SyncState
    from entidb.sync import SyncStats as SyncStats
    from entidb.sync import SyncStatus as SyncStatus
    from entidb.sync import SyncTransport as SyncTransport

__version__: Final = VERSION

#: Home module of each public name.
_HOMES: Final[dict[str, tuple[str, ...]]] = {
    "entidb.db": (
        "Database",
        "AsyncDatabase",
        "Collection",
        "Transaction",
        "Snapshot",
        "ChangeFeed",
        "ChangeEvent",
        "F",
        "Index",
        "Query",
        "CommitEvent",
        "DiscardedTransaction",
        "EntityInfo",
        "OverruledValue",
        "migrate",
    ),
    "entidb.sync": (
        "AsyncSyncEngine",
        "SyncEngine",
        "SyncConfig",
        "RetryConfig",
        "SyncState",
        "Fate",
        "FateState",
        "SyncStats",
        "HttpConfig",
        "Merge",
        "SyncProgress",
        "SyncStatus",
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
        "TransactionConflictError",
        "TransactionTooLargeError",
        "ValueTypeError",
        "QueryError",
        "NotUniqueError",
        "ScanWarning",
        "InvalidNameError",
        "ScopeError",
        "ConfigError",
        "CodecError",
        "CborEncodeError",
        "CborDecodeError",
        "StorageError",
        "StorageFullError",
        "StorageUnreachableError",
        "CorruptionError",
        "FormatError",
        "CommitStaleError",
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
        "UpgradeRequiredError",
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

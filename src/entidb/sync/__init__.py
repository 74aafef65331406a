"""The device's side of synchronisation (row 3): engine, cycle, policies, transports."""

from typing import TYPE_CHECKING, Annotated, Final, TypeVar

from entidb.errors import SyncError
from entidb.lazy import lazy_names
from entidb.protocol import SyncRequest, SyncResponse
from entidb.sync.apply.applier import DatabaseApplier, MemorySyncApplier
from entidb.sync.apply.report import RebaseReport, Resolved, Withdrawn
from entidb.sync.apply.seam import BatchLimits, SyncApplier
from entidb.sync.comparing import Difference, Verification
from entidb.sync.config import HttpConfig, RetryConfig, SyncConfig
from entidb.sync.conflict import Action, Conflict, ConflictPolicy, ConflictResolution
from entidb.sync.cycle import Cycle
from entidb.sync.engine import SyncEngine
from entidb.sync.fates import Fate, FateState
from entidb.sync.http import HttpTransport, HttpxClient
from entidb.sync.merging import Merge, merge
from entidb.sync.policies import resolve_policy
from entidb.sync.refusal import KeptBack
from entidb.sync.standing import EntityState, EntityStatus
from entidb.sync.state import (
    TRANSITIONS,
    SyncCycleResult,
    SyncProgress,
    SyncState,
    SyncStats,
    SyncStatus,
)
from entidb.sync.transport import (
    HttpClient,
    HttpResponse,
    LoopbackClient,
    LoopbackServer,
    MockTransport,
    SyncTransport,
)
from entidb.sync.whole_policies import client_wins, last_write_wins, manual, server_wins

if TYPE_CHECKING:
    from entidb.sync.aio import AsyncSyncEngine

#: Loaded when it is first used: a device without asyncio does not pay for it.
_HOMES: Final = {"entidb.sync.aio": ("AsyncSyncEngine",)}
_HOME_OF, __getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())

_T = TypeVar("_T")

#: "This value, or a ``SyncError`` raised": what other languages write as a result type.
SyncResult = Annotated[_T, SyncError]

__all__ = [
    "TRANSITIONS",
    "Action",
    "AsyncSyncEngine",
    "BatchLimits",
    "Conflict",
    "ConflictPolicy",
    "ConflictResolution",
    "Cycle",
    "DatabaseApplier",
    "Difference",
    "EntityState",
    "EntityStatus",
    "Fate",
    "FateState",
    "HttpClient",
    "HttpConfig",
    "HttpResponse",
    "HttpTransport",
    "HttpxClient",
    "KeptBack",
    "LoopbackClient",
    "LoopbackServer",
    "MemorySyncApplier",
    "Merge",
    "MockTransport",
    "RebaseReport",
    "Resolved",
    "RetryConfig",
    "SyncApplier",
    "SyncConfig",
    "SyncCycleResult",
    "SyncEngine",
    "SyncProgress",
    "SyncRequest",
    "SyncResponse",
    "SyncResult",
    "SyncState",
    "SyncStats",
    "SyncStatus",
    "SyncTransport",
    "Verification",
    "Withdrawn",
    "client_wins",
    "last_write_wins",
    "manual",
    "merge",
    "resolve_policy",
    "server_wins",
]

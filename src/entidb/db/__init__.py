"""The embedded core: database, collections, transactions, outbox, change feed (row 2)."""

from typing import TYPE_CHECKING, Final

from entidb.db.collection import Collection, ReadCollection, TransactionCollection
from entidb.db.conditions import Condition, F
from entidb.db.database import Database
from entidb.db.entity_info import EntityInfo
from entidb.db.feed import ChangeEvent, ChangeFeed
from entidb.db.index_care import IndexStatus
from entidb.db.indexing import Index
from entidb.db.live import Live
from entidb.db.local import Role
from entidb.db.maintenance import dump, inspect, purge_tombstones
from entidb.db.migrating import Migrated, migrate
from entidb.db.observers import CommitEvent
from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import LostField, OverruledValue
from entidb.db.query import Plan, Query, Where
from entidb.db.snapshot import Snapshot
from entidb.db.transaction import Transaction
from entidb.lazy import lazy_names

if TYPE_CHECKING:
    from entidb.db.aio import (
        AsyncChanges,
        AsyncCollection,
        AsyncDatabase,
        AsyncQuery,
        AsyncTransaction,
        AsyncWhere,
    )
    from entidb.db.copying import Copied, copy_database

#: Loaded when one of them is first used: a program without asyncio does not pay for it.
_HOMES: Final = {
    "entidb.db.aio": (
        "AsyncChanges",
        "AsyncCollection",
        "AsyncDatabase",
        "AsyncQuery",
        "AsyncTransaction",
        "AsyncWhere",
    ),
    "entidb.db.copying": ("Copied", "copy_database"),
}
_HOME_OF, __getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())

__all__ = [
    "AsyncChanges",
    "AsyncCollection",
    "AsyncDatabase",
    "AsyncQuery",
    "AsyncTransaction",
    "AsyncWhere",
    "ChangeEvent",
    "ChangeFeed",
    "Collection",
    "CommitEvent",
    "Condition",
    "Copied",
    "Database",
    "DiscardedTransaction",
    "EntityInfo",
    "F",
    "Migrated",
    "OverruledValue",
    "Plan",
    "Index",
    "IndexStatus",
    "Live",
    "LostField",
    "Query",
    "ReadCollection",
    "Role",
    "Snapshot",
    "Transaction",
    "TransactionCollection",
    "Where",
    "copy_database",
    "dump",
    "inspect",
    "migrate",
    "purge_tombstones",
]

"""The embedded core: database, collections, transactions, outbox, change feed (row 2)."""

from typing import TYPE_CHECKING, Final

from entidb.db.collection import Collection, ReadCollection, TransactionCollection
from entidb.db.conditions import Condition, F
from entidb.db.database import Database
from entidb.db.entity_info import EntityInfo
from entidb.db.feed import ChangeEvent, ChangeFeed
from entidb.db.index_care import IndexStatus
from entidb.db.indexing import Index
from entidb.db.local import Role
from entidb.db.maintenance import dump, inspect, purge_tombstones
from entidb.db.migrating import Migrated, migrate
from entidb.db.observers import CommitEvent
from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import OverruledValue
from entidb.db.query import Plan, Query
from entidb.db.snapshot import Snapshot
from entidb.db.transaction import Transaction
from entidb.lazy import lazy_names

if TYPE_CHECKING:
    from entidb.db.aio import AsyncCollection, AsyncDatabase, AsyncTransaction
    from entidb.db.copying import Copied, copy_database

#: Loaded when one of them is first used: a program without asyncio does not pay for it.
_HOMES: Final = {
    "entidb.db.aio": ("AsyncCollection", "AsyncDatabase", "AsyncTransaction"),
    "entidb.db.copying": ("Copied", "copy_database"),
}
_HOME_OF, __getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())

__all__ = [
    "AsyncCollection",
    "AsyncDatabase",
    "AsyncTransaction",
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
    "Query",
    "ReadCollection",
    "Role",
    "Snapshot",
    "Transaction",
    "TransactionCollection",
    "copy_database",
    "dump",
    "inspect",
    "migrate",
    "purge_tombstones",
]

"""One process's connections to one PostgreSQL database, shared by all stores that it has there.

Two pools: a thread that has a turn may need a snapshot beside it, so that readers must not be able
to take the last connection of writers, nor the other way round. The rights other than the turn
(``claim``) are kept on one connection more.

Every new connection is *barred*: before anything is read on it, it commits. A commit waits for the
synchronous standby, and with it for everything that was visible before; so what a crash-restarted
primary shows, although nobody acknowledged it, is as durable as the rest before anybody sees it.

Not here: what is in the tables (``schema``), and what is done on a connection (``store``).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool

from entidb.errors import ConfigError, DatabaseForkedError
from entidb.storage.postgres.failures import as_ours, is_demoted
from entidb.storage.postgres.schema import Connection, check_server, make_tables

#: Connections of one node, unless it is told otherwise; a third of them is for turns.
CONNECTIONS_MAX: Final = 16
#: Seconds that are waited for a connection.
WAIT_S: Final = 15.0
#: Seconds between two looks at the marks that somebody waits for.
LOOK_S: Final = 0.02
#: A dead network ends a connection after some ten seconds, on both ends. No statement is ever given
#: up by a time limit: PostgreSQL reports a commit that was cancelled as one that succeeded.
_SETTINGS: Final[dict[str, Any]] = {
    "target_session_attrs": "read-write",
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "entidb",
}
_SERVER_SETTINGS: Final = (
    "-c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3"
)


def without_secret(address: str) -> str:
    """``address`` for messages and logs. Raises ``ConfigError`` for what is no address."""
    parts = _parts(address)
    hosts, ports = str(parts.get("host") or ""), str(parts.get("port") or "")
    place = hosts + (f":{ports}" if ports else "")
    return f"postgresql://{place}/{parts.get('dbname') or ''}"


def _parts(address: str) -> dict[str, Any]:
    try:
        return dict(conninfo_to_dict(address))
    except psycopg.Error as error:
        raise ConfigError(
            "this is no address of a PostgreSQL database; write it like "
            "postgresql://user@host:5432/database"
        ) from error


class Node:
    """See the module. Thread-safe. ``where`` is the address without its password."""

    def __init__(self, address: str, connections_max: int = CONNECTIONS_MAX) -> None:
        """Connects, and makes the tables. Raises ``ConfigError``, ``StorageError``,
        ``FormatError``."""
        if connections_max < 4:
            raise ConfigError(f"connections_max is at least 4, not {connections_max}")
        self.where = without_secret(address)
        given = _parts(address)
        given["options"] = " ".join(filter(None, (_SERVER_SETTINGS, given.get("options"))))
        self._address = make_conninfo(**(_SETTINGS | given))
        self._process = os.getpid()
        self._turns = max(2, connections_max // 3)
        self._readers = connections_max - self._turns - 1
        with as_ours(f"opening {self.where}"), self._connect() as first:
            check_server(first, self.where)
            make_tables(first, self.where)
        self.reading = self._pool(self._readers)
        self.committing = self._pool(self._turns)
        #: Connections of snapshots that the collector has found: given back by whoever comes next,
        #: because the collector may run inside the pool.
        self.forgotten: deque[Connection] = deque()
        self.rights = NodeRights(self)
        self.marks = Marks(self)

    def _connect(self) -> Connection:
        made = psycopg.connect(self._address, autocommit=True)
        try:
            self.bar(made)
        except BaseException:
            made.close()
            raise
        return made

    def bar(self, connection: Connection) -> None:
        """See the module. Of a database that has no tables yet there is nothing to read."""
        with contextlib.suppress(psycopg.errors.UndefinedTable):
            connection.execute("UPDATE entidb_barrier SET passed = passed + 1")

    def connect(self) -> Connection:
        """One more connection, of the caller's own."""
        self.check_process()
        return self._connect()

    def _pool(self, size: int) -> ConnectionPool[Connection]:
        return ConnectionPool(
            self._address,
            connection_class=Connection,
            kwargs={"autocommit": True},
            min_size=0,
            max_size=size,
            configure=self.bar,
            timeout=WAIT_S,
            max_idle=60.0,
            num_workers=1,
            open=True,
        )

    def check_process(self) -> None:
        if os.getpid() != self._process:
            raise DatabaseForkedError(
                f"{self.where} was opened before this process was forked; open it again here"
            )

    def lend(self, pool: ConnectionPool[Connection]) -> Connection:
        """A connection that is in no transaction; ``take_back`` is the caller's. Raises what
        psycopg raises."""
        self.check_process()
        self.reclaim()
        return pool.getconn()

    def take_back(self, pool: ConnectionPool[Connection], connection: Connection) -> None:
        """Whatever state it is in: one that is broken is replaced."""
        if os.getpid() == self._process:
            pool.putconn(connection)

    def reclaim(self) -> None:
        while self.forgotten:
            try:
                connection = self.forgotten.popleft()
            except IndexError:
                return
            self.take_back(self.reading, connection)

    def note(self, error: BaseException) -> None:
        """What became of a statement: a primary that was demoted is not asked again."""
        if is_demoted(error):
            for pool in (self.reading, self.committing):
                pool.drain()
            self.rights.drop()

    def close(self) -> None:
        if os.getpid() != self._process:
            return
        self.marks.close()
        self.rights.drop()
        self.reclaim()
        for pool in (self.reading, self.committing):
            pool.close()


class NodeRights:
    """Rights of the stores of one node, on one connection: PostgreSQL gives each of them back when
    that ends, in whatever way. Thread-safe."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        #: Who has which, on the connection of now.
        self._held: dict[tuple[int, int], object] = {}

    def take(self, key: tuple[int, int], owner: object) -> bool:
        """Whether ``owner`` has it now. Raises what psycopg raises."""
        with self._lock:
            connection = self._alive()
            if key in self._held:
                return self._held[key] is owner
            row = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", key).fetchone()
            if row is not None and row[0]:
                self._held[key] = owner
            return key in self._held

    def give_back(self, key: tuple[int, int], owner: object) -> None:
        with self._lock:
            if self._held.get(key) is not owner:
                return
            del self._held[key]
            connection = self._connection
            if connection is not None:
                try:
                    connection.execute("SELECT pg_advisory_unlock(%s, %s)", key)
                except psycopg.Error:
                    self._forget()  # it is over with the connection

    def has(self, key: tuple[int, int], owner: object) -> bool:
        return self._held.get(key) is owner

    def drop(self) -> None:
        with self._lock:
            self._forget()

    def _alive(self) -> Connection:
        """The connection, after a look at it: the rights on one that is lost are lost."""
        if self._connection is not None:
            try:
                self._connection.execute("SELECT 1")
            except psycopg.Error:
                self._forget()
        if self._connection is None:
            self._connection = self._node.connect()
        return self._connection

    def _forget(self) -> None:
        self._held.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Marks:
    """Waits for the marks of stores: one statement for all of a node, while anybody waits."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._changed = threading.Condition()
        #: What is waited for, how often, and the newest that was seen of it.
        self._waiting: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._failed = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def wait(self, store: int, mark: int, timeout_s: float) -> bool:
        """Whether it is another one before the time is over; also ends, with False, when the marks
        cannot be read: the caller asks itself then."""
        until = time.monotonic() + timeout_s
        with self._changed:
            self._waiting[store] = self._waiting.get(store, 0) + 1
            self._failed = False
            self._begin()
            try:
                while self._seen.get(store, mark) == mark:
                    left = until - time.monotonic()
                    if left <= 0 or self._failed or self._closed:
                        return False
                    self._changed.wait(left)
                return True
            finally:
                self._waiting[store] -= 1
                if not self._waiting[store]:
                    del self._waiting[store]
                    self._seen.pop(store, None)

    def tell(self, store: int, mark: int) -> None:
        """What this process has committed itself."""
        with self._changed:
            if store in self._waiting:
                self._seen[store] = mark
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="entidb-marks", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        while True:
            with self._changed:
                if self._closed or not self._waiting:
                    self._thread = None
                    return
                wanted = list(self._waiting)
            try:
                found = self._read(wanted)
            except psycopg.Error:
                found = None
            with self._changed:
                self._failed = found is None
                for store, mark in (found or {}).items():
                    if store in self._waiting:
                        self._seen[store] = max(mark, self._seen.get(store, 0))
                self._changed.notify_all()
            time.sleep(LOOK_S)

    def _read(self, stores: list[int]) -> dict[int, int]:
        node = self._node
        connection = node.lend(node.reading)
        try:
            rows = connection.execute(
                "SELECT id, mark FROM entidb_store WHERE id = ANY(%s)", (stores,)
            )
            return dict(rows.fetchall())
        finally:
            node.take_back(node.reading, connection)


class Lease:
    """The use of a node by one store, and what that has of it: the connection of its turn, and its
    rights. ``close`` gives everything back; idempotent."""

    def __init__(self, node: Node, key: tuple[str, int, int]) -> None:
        self.node = node
        self.turn: Connection | None = None
        self.rights: dict[tuple[int, int], object] = {}
        self._key = key
        self._closed = False

    def close(self) -> None:
        with _NODES_LOCK:
            if self._closed or os.getpid() != self._key[2]:
                return
            self._closed = True
            node, count = _NODES.pop(self._key)
            if count > 1:
                _NODES[self._key] = node, count - 1
        connection, self.turn = self.turn, None
        if connection is not None:
            connection.close()  # and with it the turn
            node.take_back(node.committing, connection)
        for key, owner in list(self.rights.items()):
            node.rights.give_back(key, owner)
        if count == 1:
            node.close()

    def close_later(self) -> None:
        """For the collector, which may run anywhere, also inside the pool."""
        if not self._closed:
            threading.Thread(target=self.close, name="entidb-close").start()


#: Nodes of this process, and how many stores use each. Held again by the collector.
_NODES: dict[tuple[str, int, int], tuple[Node, int]] = {}
_NODES_LOCK = threading.RLock()


def lease(address: str, connections_max: int) -> Lease:
    """Of the node of this process at ``address``. Raises as ``Node``."""
    key = (address, connections_max, os.getpid())
    with _NODES_LOCK:
        node, count = _NODES.get(key) or (Node(address, connections_max), 0)
        _NODES[key] = node, count + 1
        return Lease(node, key)


__all__ = ["CONNECTIONS_MAX", "Lease", "Node", "NodeRights", "lease", "without_secret"]

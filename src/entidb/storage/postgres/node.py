"""One process's connections to one PostgreSQL database, shared by all stores that it has there.

Two pools: a thread that has a turn may need a snapshot beside it, so that readers must not be able
to take the last connection of writers, nor the other way round. The rights other than the turn
(``claim``) are kept on one connection more.

Every new connection is *barred*: before anything is read on it, it commits. A commit waits for the
synchronous standby, and with it for everything that was visible before; so what a crash-restarted
primary shows, although nobody acknowledged it, is as durable as the rest before anybody sees it.

A server that was started again, another one that leads now, a copy of the PostgreSQL database: each
may lack what was committed last. Whoever connects to it first moves the marks of all stores into
another *opening*. So nothing is good any more that is remembered of a state that may be gone, also
where as many commits have come since; and a database learns that it may stand on another past
(R29).

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
from psycopg.pq.abc import PGresult

from entidb.errors import (
    ConfigError,
    DatabaseForkedError,
    StorageUnreachableError,
)
from entidb.events import Thread
from entidb.storage.base import OPENING_SHIFT
from entidb.storage.postgres.failures import as_ours, is_demoted, storage_error
from entidb.storage.postgres.line import Line, Question
from entidb.storage.postgres.marks import Marks
from entidb.storage.postgres.pool import Pool
from entidb.storage.postgres.pulse import Heartbeat
from entidb.storage.postgres.reaching import Hosts, Lines, Place, ask, place_of
from entidb.storage.postgres.remembered import Memory
from entidb.storage.postgres.schema import FORMAT, Tables, check_server, see_to_tables

#: Connections of one node, unless it is told otherwise; a third of them is for turns.
CONNECTIONS_MAX: Final = 16
#: Seconds that are waited for a connection.
WAIT_S: Final = 15.0
#: Seconds after a failure to connect in which nobody tries again.
_FAILED_S: Final = 0.5
#: Connections that may have died unnoticed before one that works.
_TRIES: Final = 20
#: Seconds that a new connection waits for the synchronous standby, before the server is as good as
#: away: nothing else can be acknowledged either.
BARRIER_S: Final = 10.0
_BARRIER: Final = b"UPDATE entidb_barrier SET passed = passed + 1"
#: Which server it is: how often one was promoted, when this one was started, which database.
_SERVER: Final = (
    "convert_to(left(pg_walfile_name(pg_current_wal_lsn()), 8) || ' ' || "
    "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint || ' ' || "
    "(SELECT oid FROM pg_database WHERE datname = current_database()), 'UTF8')"
)
#: What says whose commits the newest are, among the small records.
_OPENED_BY: Final = "entidb opening"
#: One value where it is the server of before.
_IS_SAME: Final = (
    f"SELECT 1 FROM entidb_page WHERE name = '{_OPENED_BY}' AND content = {_SERVER}"
).encode()
#: Two servers that both go on from one state open it by different numbers, next to always.
_OPENINGS_MAX: Final = 1024
_OPEN: Final = (
    "WITH noted AS (INSERT INTO entidb_page AS page (name, revision, content) "
    f"VALUES ('{_OPENED_BY}', 1, {_SERVER}) ON CONFLICT (name) DO UPDATE "
    "SET revision = page.revision + 1, content = excluded.content "
    "WHERE page.content <> excluded.content RETURNING 1) "
    "UPDATE entidb_store SET mark = mark + "
    f"(1 + floor(random() * {_OPENINGS_MAX}))::bigint * {1 << OPENING_SHIFT} "
    "WHERE EXISTS (SELECT FROM noted)"
).encode()
#: A dead network ends a connection after some ten seconds, on both ends. No statement is ever given
#: up by a time limit: PostgreSQL reports a commit that was cancelled as one that succeeded.
_SETTINGS: Final[dict[str, Any]] = {
    "target_session_attrs": "read-write",
    "connect_timeout": 3,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "entidb",
}
#: What a role or a database has set otherwise does not count. Every statement finds its records by
#: their key, and says so to a planner that has no statistics yet: never by reading a whole table.
_SERVER_SETTINGS: Final = " ".join(
    f"-c {setting}"
    for setting in (
        *("tcp_keepalives_idle=5", "tcp_keepalives_interval=2", "tcp_keepalives_count=3"),
        *("statement_timeout=0", "lock_timeout=0", "idle_in_transaction_session_timeout=0"),
        r"default_transaction_isolation=read\ committed",
        *("plan_cache_mode=force_generic_plan", "jit=off", "enable_seqscan=off"),
        *("enable_bitmapscan=off", "enable_hashjoin=off", "enable_mergejoin=off"),
    )
)
#: Those of newer servers, which older ones do not know, by the version that brought them.
_NEWER_SETTINGS: Final = ((140000, "idle_session_timeout"), (170000, "transaction_timeout"))


def without_secret(address: str) -> str:
    """``address`` for messages and logs. Raises ``ConfigError`` for what is no address."""
    parts = parts_of(address)
    hosts, ports = str(parts.get("host") or ""), str(parts.get("port") or "")
    place = hosts + (f":{ports}" if ports else "")
    return f"postgresql://{place}/{parts.get('dbname') or ''}"


def parts_of(address: str) -> dict[str, Any]:
    """Of an address, by their names in libpq. Raises ``ConfigError``."""
    try:
        return dict(conninfo_to_dict(address))
    except psycopg.Error as error:
        raise ConfigError(
            "this is no address of a PostgreSQL database; write it like "
            "postgresql://user@host:5432/database"
        ) from error


class Node:
    """See the module. Thread-safe. ``where`` is the address without its password."""

    def __init__(
        self, address: str, connections_max: int = CONNECTIONS_MAX, use: Tables = Tables.MAKE
    ) -> None:
        """Connects, and sees to the tables as ``use`` says. Raises ``ConfigError``,
        ``StorageError``, also where there are none to be used, and ``FormatError``."""
        if connections_max < 4:
            raise ConfigError(f"connections_max is at least 4, not {connections_max}")
        self.where = without_secret(address)
        given = parts_of(address)
        given["options"] = " ".join(filter(None, (_SERVER_SETTINGS, given.get("options"))))
        self._address = make_conninfo(**(_SETTINGS | given))
        self._hosts = _hosts_of(self._address)
        self._lines = Lines()
        #: Until when nobody tries to connect again, and what it said the last time.
        self._failed: tuple[float, str] | None = None
        self._process = os.getpid()
        turns = max(2, connections_max // 3)
        with as_ours(f"opening {self.where}"), self._connect() as first:
            check_server(first, self.where)
            #: Whether this node has made the tables, and their format.
            self.made, self.format = see_to_tables(first, self.where, use)
        self.reading = Pool(self._connect, connections_max - turns - 1, WAIT_S)
        self.committing = Pool(self._connect, turns, WAIT_S)
        #: Connections of snapshots that the collector has found: given back by whoever comes next,
        #: because the collector may run inside the pool.
        self.forgotten: deque[Line] = deque()
        self.rights = NodeRights(self)
        self.marks = Marks(self._read_marks)
        self.memory = Memory()
        self._pulse = Heartbeat(self._beside, self._is_watched, self._lost)

    def _connect(self) -> Line:
        """Where that has just failed, it is not tried: who waits in a line behind an outage hears
        of it at once, and not after a time limit for each in front of him."""
        failed = self._failed
        if failed is not None and time.monotonic() < failed[0]:
            raise StorageUnreachableError(failed[1])
        try:
            made = self._connected()
        except (psycopg.OperationalError, StorageUnreachableError) as error:
            said = storage_error(error, f"connecting to {self.where}")
            self._failed = time.monotonic() + _FAILED_S, str(said)
            raise
        self._failed = None
        return made

    def _connected(self) -> Line:
        made = Line.connect(self._hosts.address(), autocommit=True)
        try:
            self._lines.add(made)
            self.bar(made)
        except BaseException:
            made.close()
            raise
        self._hosts.prefer(place_of(made))
        return made

    def _beside(self) -> psycopg.Connection[Any]:
        """To the server that takes writes now, as libpq finds it; nothing is read there."""
        return psycopg.connect(self._hosts.address(), autocommit=True)

    def see_to(self, use: Tables) -> None:
        """As at the beginning, for one who may do more with the tables. Raises as that."""
        if self.format < FORMAT and use is not Tables.LOOK:
            with as_ours(f"opening {self.where}"), self.connect() as line:
                _, self.format = see_to_tables(line, self.where, use)

    def bar(self, connection: Line) -> None:
        """See the module. Of a database that has no tables yet there is nothing to read."""
        for version, setting in _NEWER_SETTINGS:
            if connection.info.server_version >= version:
                connection.execute(f"SET {setting} = 0".encode())
        with contextlib.suppress(psycopg.errors.UndefinedTable):
            ask(connection, _BARRIER, BARRIER_S)
            if ask(connection, _IS_SAME, BARRIER_S) is None:
                ask(connection, _OPEN, BARRIER_S)

    def connect(self) -> Line:
        """One more connection, of the caller's own."""
        self.check_process()
        return self._connect()

    def check_process(self) -> None:
        if os.getpid() != self._process:
            raise DatabaseForkedError(
                f"{self.where} was opened before this process was forked; open it again here"
            )

    def lend(self, pool: Pool) -> Line:
        """A connection that is in no transaction; ``take_back`` is the caller's. Raises what
        psycopg raises."""
        self.check_process()
        self.reclaim()
        self._pulse.begin()
        return pool.getconn()

    def ask(self, pool: Pool, questions: list[Question]) -> tuple[Line, list[PGresult]]:
        """A connection, and its answers; ``take_back`` is the caller's. One that was idle may have
        died: then the next one is asked. Raises what psycopg raises."""
        failed: psycopg.Error | None = None
        for _ in range(_TRIES):
            line = self.lend(pool)
            try:
                return line, line.ask_all(questions)
            except psycopg.Error as error:
                alive = not line.closed
                self.take_back(pool, line)
                if alive:
                    raise
                failed = error
            except BaseException:
                self.take_back(pool, line)
                raise
        assert failed is not None
        raise failed

    def take_back(self, pool: Pool, connection: Line) -> None:
        """Whatever state it is in: one that is broken is replaced."""
        if os.getpid() == self._process:
            pool.putconn(connection)

    @property
    def losses(self) -> int:
        """How often connections were lost, or given up: what was read before may be of a server
        that is another one now."""
        return self.reading.losses + self.committing.losses

    def reclaim(self) -> None:
        while self.forgotten:
            try:
                connection = self.forgotten.popleft()
            except IndexError:
                return
            self.take_back(self.reading, connection)

    def _read_marks(self, stores: list[int]) -> dict[int, int]:
        connection = self.lend(self.reading)
        try:
            rows = connection.execute(
                "SELECT id, mark FROM entidb_store WHERE id = ANY(%s)", (stores,)
            )
            return dict(rows.fetchall())
        finally:
            self.take_back(self.reading, connection)

    def note(self, error: BaseException) -> None:
        """What became of a statement: a primary that was demoted is not asked again."""
        if is_demoted(error):
            self._drain()

    def _drain(self) -> None:
        for pool in (self.reading, self.committing):
            pool.drain()
        self.rights.drop()

    def _is_watched(self) -> bool:
        """Idle ones are watched too: a server that was replaced while it was frozen has an answer
        for them when it goes on, and it is an old one."""
        for pool in (self.reading, self.committing):
            pool.tidy()
        return len(self._lines) > 0

    def _lost(self, place: Place | None) -> None:
        """The server does not answer any more, or does not lead."""
        if place is not None:
            self._hosts.avoid(place)
        self._lines.cut()
        self._drain()

    def close(self) -> None:
        if os.getpid() != self._process:
            return
        self._pulse.close()
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
        self._connection: Line | None = None
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

    def _alive(self) -> Line:
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


#: What is known of the hosts of an address outlives the node, which an outage may close.
_HOSTS: dict[str, Hosts] = {}


def _hosts_of(address: str) -> Hosts:
    return _HOSTS.setdefault(address, Hosts(dict(conninfo_to_dict(address))))


#: Which node: the address, its connections, the process.
_Key = tuple[str, int, int]


class Lease:
    """The use of a node by one store, and what that has of it: the connection of its turn, and its
    rights. ``close`` gives everything back; idempotent."""

    def __init__(self, node: Node, key: _Key) -> None:
        self.node = node
        self.turn: Line | None = None
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
            Thread(target=self.close, name="entidb-close").start()


#: Nodes of this process, and how many stores use each. Held again by the collector.
_NODES: dict[_Key, tuple[Node, int]] = {}
_NODES_LOCK = threading.RLock()


class _Opening:
    """Who wants the same node waits for the one that connects, and nobody else does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        #: When it could not be reached the last time, and what that said.
        self.failed: tuple[float, str] | None = None


_OPENING: dict[_Key, _Opening] = {}


def lease(address: str, connections_max: int, use: Tables = Tables.MAKE) -> Lease:
    """Of the node of this process at ``address``. Raises as ``Node``."""
    key = (address, connections_max, os.getpid())
    began = time.monotonic()
    with _NODES_LOCK:
        opening = _OPENING.setdefault(key, _Opening())
    with opening.lock:
        with _NODES_LOCK:
            node, count = _NODES.get(key, (None, 0))
            if node is not None:
                _NODES[key] = node, count + 1
        if node is None:
            failed = opening.failed
            if failed is not None and failed[0] > began:
                # It was tried while this thread waited, for as long as that takes.
                raise StorageUnreachableError(failed[1])
            try:
                node = Node(address, connections_max, use)
            except StorageUnreachableError as error:
                opening.failed = time.monotonic(), str(error)
                raise
            with _NODES_LOCK:
                _NODES[key] = node, 1
        made = Lease(node, key)
        try:
            node.see_to(use)
        except BaseException:
            made.close()
            raise
        return made


__all__ = ["CONNECTIONS_MAX", "Lease", "Node", "NodeRights", "lease", "parts_of", "without_secret"]

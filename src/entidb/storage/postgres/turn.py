"""Whose turn it is among the nodes that have a store open, and their other rights.

The turn is an advisory lock of PostgreSQL on the very connection that commits: whoever loses the
connection loses the turn and the commit with it, so that no commit is made by one who has lost the
turn without noticing. The fence (``store``) is compared in the commit all the same.
"""

from __future__ import annotations

import logging
import time
import zlib
from typing import Final

import psycopg
from psycopg import errors

from entidb.storage.postgres.failures import as_ours, storage_error
from entidb.storage.postgres.line import Line, Statement, int4
from entidb.storage.postgres.opened import Opened

logger = logging.getLogger("entidb.storage")

#: Seconds between two looks at whether a right is free.
_LOOK_S: Final = 0.02
_TRY: Final = Statement(b"try_turn", b"SELECT pg_try_advisory_lock($1::int, $2::int)")
_LOCK: Final = Statement(b"take_turn", b"SELECT pg_advisory_lock($1::int, $2::int)")
#: For how long the session waits for a lock, in milliseconds; 0 is for ever.
_LIMIT: Final = Statement(b"limit_lock", b"SELECT set_config('lock_timeout', $1, false)")
_UNLOCK: Final = Statement(b"end_turn", b"SELECT pg_advisory_unlock($1::int, $2::int)")
#: A value of the type ``boolean``.
_TRUE: Final = b"\1"
#: Seconds after which the turn is taken from who has it and asks nothing, while others wait.
STILL_S: Final = 30.0
#: The number of the turn among the rights of a store.
_TURN: Final = 0


class PostgresTurn:
    """The turn of one opener."""

    def __init__(self, store: Opened) -> None:
        self._store = store
        self._lease = store.lease

    @property
    def connection(self) -> Line | None:
        """That has it, and commits; None while this opener has no turn."""
        return self._lease.turn

    def take(self, timeout_s: float | None = None) -> bool:
        if self.mine:
            return True
        store = self._store
        if store.closed:
            return True  # whatever comes next says so
        node = store.node
        with as_ours(f"waiting for the turn of {store.path}"):
            line, (answer,) = node.ask(node.committing, [(_TRY, self._key())])
            try:
                if answer.get_value(0, 0) == _TRUE or self._wait(line, timeout_s):
                    store.fresh.turn_begins()
                    self._lease.turn = line
                    return True
            except BaseException:
                line.close()  # the turn may have come to it, and goes with it
                raise
            finally:
                if self._lease.turn is not line:
                    node.take_back(node.committing, line)
        return False

    def _key(self) -> tuple[bytes, bytes]:
        return int4(self._store.number), int4(_TURN)

    def _wait(self, line: Line, timeout_s: float | None) -> bool:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = STILL_S if until is None else until - time.monotonic()
            if left <= 0:
                return False
            # Ends a wait for a lock, and never a commit: no lock is waited for inside one.
            limit = b"%d" % max(1, round(min(left, STILL_S) * 1000))
            try:
                # One round trip; when it ends with an error, the limit is what it was before.
                line.ask_all(((_LIMIT, (limit,)), (_LOCK, self._key()), (_LIMIT, (b"0",))))
                return True
            except errors.LockNotAvailable:
                # It may have come in that very moment, and a lock of a session outlives an error.
                line.ask(_UNLOCK, *self._key())
                self._end_still(line)

    def _end_still(self, line: Line) -> None:
        """End the connection of who has the turn, if it has asked nothing for so long: a process
        that is stopped, or its machine, would keep the turn for ever. It finds its connection gone
        when it goes on, and commits nothing."""
        try:
            row = line.execute(_END_STILL, (self._store.number, _TURN, STILL_S)).fetchone()
        except errors.InsufficientPrivilege:
            row = None  # another user's; it has to be ended by hand
        if row is not None:
            logger.warning(
                "%s: PostgreSQL process %s had the turn and asked nothing for %g s, while others "
                "waited; its connection was ended",
                self._store.path,
                row[0],
                STILL_S,
            )

    def give_back(self) -> None:
        connection = self._lease.turn
        if connection is None:
            return
        self._store.fresh.turn_ends()
        try:
            if not connection.closed:
                connection.ask(_UNLOCK, *self._key())
        except psycopg.Error:
            connection.close()  # and with it the lock
        finally:
            if self._lease.turn is connection:
                self._lease.turn = None
                node = self._lease.node
                node.take_back(node.committing, connection)

    @property
    def mine(self) -> bool:
        connection = self.connection
        return connection is not None and not connection.closed

    def holder(self) -> str:
        """The node's name for itself, and where it is."""
        store = self._store
        with as_ours(f"looking at the turn of {store.path}"):
            connection = store.node.lend(store.node.reading)
            try:
                row = connection.execute(_HOLDER, (store.number, _TURN)).fetchone()
            finally:
                store.node.take_back(store.node.reading, connection)
        if row is None:
            return ""
        name, address, process = row
        place = f" at {address}" if address else ""
        return f"{name or 'another node'}{place} (PostgreSQL process {process})"


#: Of the connection that has the turn, and asks nothing; one that waits for its standby is active.
#: First which it is, and then its end: a planner may call a function of a condition before others.
_END_STILL: Final = (
    "WITH still AS MATERIALIZED (SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE locktype = 'advisory' "
    "AND granted AND classid::int = %s AND objid::int = %s AND objsubid = 2 "
    "AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND state IN ('idle', 'idle in transaction') "
    "AND state_change < clock_timestamp() - make_interval(secs => %s)) "
    "SELECT pid, pg_terminate_backend(pid) FROM still"
)
_HOLDER: Final = (
    "SELECT application_name, host(client_addr), pid FROM pg_locks JOIN pg_stat_activity USING "
    "(pid) WHERE locktype = 'advisory' AND granted AND classid::int = %s AND objid::int = %s "
    "AND objsubid = 2 AND pg_locks.database = (SELECT oid FROM pg_database "
    "WHERE datname = current_database())"
)


class PostgresRight:
    """Another right, by name. Thread-safe."""

    def __init__(self, store: Opened, name: str) -> None:
        self._store = store
        self._token = object()
        # Not 0, which is the turn.
        self._key = (store.number, (zlib.crc32(name.encode()) & 0x7FFFFFFF) or 1)

    def take(self, timeout_s: float | None = None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._try():
            left = _LOOK_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, _LOOK_S))
        return True

    def _try(self) -> bool:
        store = self._store
        store.check_open()
        store.node.check_process()
        try:
            taken = store.node.rights.take(self._key, self._token)
        except psycopg.Error as error:
            raise storage_error(error, f"taking a right on {store.path}") from error
        if taken:
            store.lease.rights[self._key] = self._token
        return taken

    def give_back(self) -> None:
        lease = self._store.lease
        lease.node.rights.give_back(self._key, self._token)
        if lease.rights.get(self._key) is self._token:
            del lease.rights[self._key]

    @property
    def mine(self) -> bool:
        return self._store.node.rights.has(self._key, self._token)

    def holder(self) -> str:
        return ""


__all__ = ["PostgresRight", "PostgresTurn"]

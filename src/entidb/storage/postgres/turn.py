"""Whose turn it is among the nodes that have a store open, and their other rights.

The turn is an advisory lock of PostgreSQL on the very connection that commits: whoever loses the
connection loses the turn and the commit with it, so that no commit is made by one who has lost the
turn without noticing. The fence (``store``) is compared in the commit all the same.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from typing import Final

import psycopg
from psycopg import errors

from entidb.storage.postgres.failures import as_ours, storage_error
from entidb.storage.postgres.opened import Opened
from entidb.storage.postgres.schema import Connection

#: Seconds between two looks at whether a right is free.
_LOOK_S: Final = 0.02
#: The number of the turn among the rights of a store.
_TURN: Final = 0


class PostgresTurn:
    """The turn of one opener."""

    def __init__(self, store: Opened) -> None:
        self._store = store
        self._lease = store.lease

    @property
    def connection(self) -> Connection | None:
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
            connection = node.lend(node.committing)
            try:
                if self._lock(connection, timeout_s):
                    self._lease.turn = connection
                    return True
            finally:
                if self._lease.turn is not connection:
                    node.take_back(node.committing, connection)
        return False

    def _lock(self, connection: Connection, timeout_s: float | None) -> bool:
        key = (self._store.number, _TURN)
        row = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", key).fetchone()
        if row is not None and row[0]:
            return True
        if timeout_s is not None and timeout_s <= 0:
            return False
        milliseconds = 0 if timeout_s is None else max(1, round(timeout_s * 1000))
        # Ends a wait for a lock, and never a commit: no lock is waited for inside one.
        connection.execute(f"SET lock_timeout = {milliseconds}")
        try:
            connection.execute("SELECT pg_advisory_lock(%s, %s)", key)
            return True
        except errors.LockNotAvailable:
            return False
        finally:
            with contextlib.suppress(psycopg.Error):
                connection.execute("RESET lock_timeout")

    def give_back(self) -> None:
        connection = self._lease.turn
        if connection is None:
            return
        try:
            connection.execute("SELECT pg_advisory_unlock(%s, %s)", (self._store.number, _TURN))
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

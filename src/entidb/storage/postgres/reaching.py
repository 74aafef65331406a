"""Getting to the server that takes writes: which host is asked first, and how long for what.

An address may name several hosts, and libpq asks them in their order. A host that is frozen takes a
connection and says nothing more, so that each new connection would wait for it: the host that
answered last is asked first, and one that stopped answering is asked last.

Not here: connections that are used again (``pool``).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
import weakref
from typing import Any, Final

import psycopg
from psycopg import errors, pq
from psycopg.conninfo import make_conninfo

from entidb.errors import StorageUnreachableError

#: PostgreSQL says it with a commit that it was made to stop waiting for.
CANCELLED: Final = "01000"
#: A host and a port, as they stand in an address.
Place = tuple[str, str]


class Hosts:
    """The hosts of one address, in the order in which they are asked. Thread-safe."""

    def __init__(self, parts: dict[str, Any]) -> None:
        """``parts`` of an address, by their names in libpq."""
        self._parts = parts
        hosts = str(parts.get("host") or "").split(",")
        ports = str(parts.get("port") or os.environ.get("PGPORT") or "5432").split(",")
        addresses = str(parts.get("hostaddr") or "").split(",")
        count = max(len(hosts), len(addresses))
        self._lock = threading.Lock()
        #: Host, port and address of each; empty where there is only one.
        self._places: list[tuple[str, str, str]] = []
        if count > 1:
            columns = [each * count if len(each) == 1 else each for each in (hosts, ports)]
            given = addresses if len(addresses) == count else [""] * count
            if all(len(column) == count for column in columns):
                self._places = list(zip(*columns, given, strict=True))

    def address(self) -> str:
        """What libpq connects by."""
        with self._lock:
            places = list(self._places)
        if not places:
            return make_conninfo(**self._parts)
        hosts, ports, addresses = (",".join(column) for column in zip(*places, strict=True))
        reordered = {"host": hosts, "port": ports}
        if addresses.strip(","):
            reordered["hostaddr"] = addresses
        return make_conninfo(**(self._parts | reordered))

    def prefer(self, place: Place) -> None:
        with self._lock:
            if self._places and self._places[0][:2] != place:
                self._places.sort(key=lambda each: each[:2] != place)

    def avoid(self, place: Place) -> None:
        with self._lock:
            self._places.sort(key=lambda each: each[:2] == place)


class NoAnswerError(psycopg.OperationalError):
    """A question was given up."""


def place_of(connection: psycopg.Connection[Any]) -> Place:
    return connection.info.host, str(connection.info.port)


class Lines:
    """The connections of a node, each of which can be cut while another thread waits on it: libpq
    has no other way to give up an answer. Thread-safe."""

    def __init__(self) -> None:
        self._lines: dict[int, tuple[weakref.ref[psycopg.Connection[Any]], socket.socket]] = {}

    def add(self, connection: psycopg.Connection[Any]) -> None:
        # A second name for the same line: the first one's number may be another file's by the time
        # it is cut.
        line = socket.socket(fileno=os.dup(connection.fileno()))
        self._lines[id(connection)] = weakref.ref(connection), line
        weakref.finalize(connection, self._forget, id(connection), line)

    def __len__(self) -> int:
        """How many are open."""
        for number, (known, line) in list(self._lines.items()):
            connection = known()
            if connection is not None and connection.closed:
                self._forget(number, line)
        return len(self._lines)

    def _forget(self, number: int, line: socket.socket) -> None:
        found = self._lines.get(number)
        if found is not None and found[1] is line:
            self._lines.pop(number, None)
        line.close()

    def cut(self) -> None:
        for _, line in list(self._lines.values()):
            with contextlib.suppress(OSError):  # it is down already
                line.shutdown(socket.SHUT_RDWR)


def ask(connection: psycopg.Connection[Any], statement: bytes, seconds: float) -> bytes | None:
    """The one value that ``statement`` finds, if it finds one. What is not answered in ``seconds``
    is given up, and the connection with it: so nothing is asked here whose outcome matters. Raises
    what psycopg raises, and ``StorageUnreachableError`` for a commit that did not wait for its
    standby."""
    said: list[str | None] = []

    def listen(notice: psycopg.errors.Diagnostic) -> None:
        said.append(notice.sqlstate)

    connection.add_notice_handler(listen)
    try:
        found = _answer(connection.pgconn, statement, time.monotonic() + seconds)
    except BaseException as error:
        if getattr(error, "sqlstate", None) is None:  # the server has not answered
            connection.close()
        raise
    finally:
        connection.remove_notice_handler(listen)
    if CANCELLED in said:
        connection.close()
        raise StorageUnreachableError("PostgreSQL was made to stop waiting for its standby")
    return found


def _answer(line: pq.abc.PGconn, statement: bytes, until: float) -> bytes | None:
    line.send_query(statement)
    look = select.poll()
    while True:
        waits = select.POLLIN | (select.POLLOUT if line.flush() else 0)
        if not waits & select.POLLOUT and not line.is_busy():
            break
        look.register(line.socket, waits)
        left = until - time.monotonic()
        if left <= 0 or not look.poll(left * 1000):
            raise NoAnswerError("no answer in time")
        line.consume_input()
    found, failed = None, None
    while (result := line.get_result()) is not None:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            failed = errors.error_from_result(result)
        elif result.ntuples:
            found = result.get_value(0, 0)
    if failed is not None:
        raise failed
    return found


__all__ = ["CANCELLED", "Hosts", "Lines", "NoAnswerError", "Place", "ask", "place_of"]

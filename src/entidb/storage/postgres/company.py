"""The nodes of one server: which of them live, which is on duty, which databases one of them keeps
closed, and what they ask each other.

A node lives as long as it has its *seat*, a lock of PostgreSQL that goes with its connection; so
do being on duty and keeping a database closed. A question is a row, and so is its answer. The node
that is asked is woken by a notification, and looks twice a second beside that: notifications are
never part of a commit of a store.

Not here: what is asked, and what a node on duty does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import psycopg

from entidb.errors import EntiDBError, StorageError
from entidb.events import SafeEvent, Thread
from entidb.storage.postgres.failures import as_ours
from entidb.storage.postgres.schema import HELD, SEAT, Connection
from entidb.storage.postgres.sharing import SharedTables

logger = logging.getLogger("entidb.server")

#: The first numbers of the other locks; no store has them.
_DUTY: Final = 0x656E7471
_CLOSED: Final = 0x656E7472
#: Held beside the duty: who has it.
_HAS_DUTY: Final = 0x656E7473
_CHANNEL: Final = "entidb_node"
#: Seconds between two looks for questions, and between two for an answer.
LOOK_S: Final = 0.5
_ANSWER_LOOK_S: Final = 0.02
#: Between two looks whether who is asked lives.
_ALIVE_LOOK_S: Final = 0.5
#: Seconds after which what a node has left is removed that is gone.
_LEFT_S: Final = 10.0
_RETRY_S: Final = 0.5
#: Seconds without a sign of life after which a node that has a connection counts as stopped.
QUIET_S: Final = 10.0

_NODES: Final = (
    "SELECT n.number, n.name, n.about, (extract(epoch FROM n.began) * 1000)::bigint, "
    "(extract(epoch FROM n.seen) * 1000)::bigint, "
    f"n.seen < now() - make_interval(secs => {QUIET_S}), "
    f"EXISTS (SELECT 1 {HELD} {_HAS_DUTY} AND l.objid::bigint = n.number) FROM entidb_node n "
    f"WHERE EXISTS (SELECT 1 {HELD} {SEAT} AND l.objid::bigint = n.number) ORDER BY n.number"
)

#: Answers a question; called on a thread of its own.
Hear = Callable[[bytes], bytes]


class Member(NamedTuple):
    """A node that lives. ``about`` is what it says of itself; times are milliseconds since 1970,
    by the clock of PostgreSQL. One that is ``quiet`` has a connection, and was stopped."""

    number: int
    name: str
    about: bytes
    began_ms: int
    seen_ms: int
    quiet: bool
    on_duty: bool


class Nodes:
    """The nodes, as anybody sees them who has the tables. Thread-safe."""

    def __init__(self, sharing: SharedTables) -> None:
        self._sharing = sharing

    def _run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._sharing.line.run(
            f"asking {self._sharing.where} for the nodes of this server", statement, *values
        )

    def members(self) -> list[Member]:
        """All that live, this one too, in the order in which they began."""
        return [
            Member(number, name, bytes(about), *rest)
            for number, name, about, *rest in self._run(_NODES)
        ]

    def ask(self, number: int, question: bytes, timeout_s: float) -> bytes:
        """The answer of a node. Raises ``ConnectionRefusedError`` if it is gone before it has
        been asked, ``ConnectionResetError`` if it goes while it answers, ``TimeoutError``."""
        if not self._lives(number):
            raise ConnectionRefusedError("that node is gone")
        rows = self._run(
            "INSERT INTO entidb_letter (node, question) VALUES (%s, %b) RETURNING id",
            number,
            question,
        )
        letter = int(rows[0][0])
        self._wake(number)
        try:
            return self._answer(letter, number, timeout_s)
        finally:
            self._run("DELETE FROM entidb_letter WHERE id = %s", letter)

    def _wake(self, number: int) -> None:
        self._run("SELECT pg_notify(%s, %s)", _CHANNEL, str(number))

    def _answer(self, letter: int, number: int, timeout_s: float) -> bytes:
        until = time.monotonic() + timeout_s
        look_at = time.monotonic() + _ALIVE_LOOK_S
        while True:
            rows = self._run("SELECT answer FROM entidb_letter WHERE id = %s", letter)
            if rows and rows[0][0] is not None:
                return bytes(rows[0][0])
            now = time.monotonic()
            if now >= look_at:
                look_at = now + _ALIVE_LOOK_S
                if not rows or not self._lives(number):
                    raise ConnectionResetError("that node has ended")
            if now >= until:
                raise TimeoutError("that node does not answer")
            time.sleep(_ANSWER_LOOK_S)

    def _lives(self, number: int) -> bool:
        return bool(self._run(f"SELECT 1 {HELD} {SEAT} AND l.objid::bigint = %s", number))


class PostgresCompany(Nodes):
    """The nodes, as one of them sees them. Thread-safe."""

    def __init__(self, sharing: SharedTables, name: str, about: bytes) -> None:
        """Takes a seat. Raises ``StorageError``."""
        super().__init__(sharing)
        self._rights = sharing.node.rights
        self._token = object()
        self.name: Final = name
        self._about = about
        rows = self._run(
            "INSERT INTO entidb_node (name, about) VALUES (%s, %b) RETURNING number", name, about
        )
        self.number: Final = int(rows[0][0])
        self._ear: threading.Thread | None = None
        self._ending = SafeEvent()
        self._listening: Connection | None = None
        self._take(SEAT, self.number)

    def _take(self, kind: int, number: int, owner: object = None) -> bool:
        self._sharing.node.check_process()
        with as_ours(f"taking a right in {self._sharing.where}"):
            return self._rights.take((kind, number), owner or self._token)

    # ------------------------------------------------------------ who there is

    def clear(self) -> None:
        """Remove what nodes have left that are gone."""
        self._run(
            "DELETE FROM entidb_node WHERE seen < now() - make_interval(secs => %s) "
            f"AND NOT EXISTS (SELECT 1 {HELD} {SEAT} AND l.objid::bigint = number)",
            _LEFT_S,
        )
        self._run(
            "DELETE FROM entidb_letter WHERE node NOT IN (SELECT number FROM entidb_node) "
            "OR at < now() - interval '1 hour'"
        )

    def keep_seat(self) -> None:
        """Say that this node lives; take its seat again where its connection was lost."""
        self._take(SEAT, self.number)
        self._run(
            "INSERT INTO entidb_node (number, name, about) VALUES (%s, %s, %b) "
            "ON CONFLICT (number) DO UPDATE SET seen = now()",
            self.number,
            self.name,
            self._about,
        )

    # ------------------------------------------------------------ what one has alone

    def take_duty(self) -> bool:
        """Whether this node is on duty: it is if no other one is."""
        return self._take(_DUTY, 0) and self._take(_HAS_DUTY, self.number)

    def give_duty(self) -> None:
        self._rights.give_back((_HAS_DUTY, self.number), self._token)
        self._rights.give_back((_DUTY, 0), self._token)

    def relieve(self, number: int) -> None:
        """Take what a node has from it that gives no sign of life, by ending its connection."""
        self._run(
            f"SELECT pg_terminate_backend(l.pid) {HELD} {SEAT} AND l.objid::bigint = %s "
            "AND EXISTS (SELECT 1 FROM entidb_node WHERE number = %s "
            f"AND seen < now() - make_interval(secs => {QUIET_S}))",
            number,
            number,
        )

    def keep_closed(self, db_id: str) -> object | None:
        """Keep a database closed in all nodes, until ``let_open`` with what this returns. None if
        it is kept closed already."""
        right = object()
        return right if self._take(_CLOSED, _number(db_id), right) else None

    def let_open(self, db_id: str, right: object) -> None:
        self._rights.give_back((_CLOSED, _number(db_id)), right)

    def is_kept_closed(self, db_id: str) -> bool:
        return bool(self._run(f"SELECT 1 {HELD} {_CLOSED} AND l.objid::bigint = %s",
                              _number(db_id)))  # fmt: skip

    def deafen(self) -> None:
        """Answer nothing any more. Idempotent."""
        self._ending.set()
        ear, self._ear = self._ear, None
        if ear is not None:
            with contextlib.suppress(StorageError):  # it looks by itself in half a second
                self._wake(self.number)
            ear.join()

    def leave(self) -> None:
        """Give everything back. Idempotent."""
        self.deafen()
        self.give_duty()
        self._rights.give_back((SEAT, self.number), self._token)
        try:
            self._run("DELETE FROM entidb_node WHERE number = %s", self.number)
        except StorageError as error:
            logger.info("this node is gone, and its row stays for the others to remove: %s", error)

    # ------------------------------------------------------------ being asked

    def listen(self, hear: Hear, each_look: Callable[[], None]) -> None:
        """Answer what is asked, each on a thread of its own, until ``leave``. ``each_look`` is
        called twice a second, beside that."""
        self._ear = Thread(
            target=self._listen, args=(hear, each_look), name="entidb-node", daemon=True
        )
        self._ear.start()

    def _listen(self, hear: Hear, each_look: Callable[[], None]) -> None:
        said = ""
        heard: set[int] = set()
        while not self._ending.is_set():
            try:
                each_look()
                self._hear_all(hear, heard)
                said = ""
            except (psycopg.Error, EntiDBError, OSError, RuntimeError) as error:
                # The last where the system gives no thread to answer on.
                if str(error) != said:
                    said = str(error)
                    logger.warning("this node hears nothing of the others: %s", error)
                self._stop_listening()
                self._ending.wait(_RETRY_S)
        self._stop_listening()

    def _hear_all(self, hear: Hear, heard: set[int]) -> None:
        connection = self._listening
        if connection is None:
            connection = self._listening = self._sharing.node.connect()
            connection.execute(f"LISTEN {_CHANNEL}".encode())
        rows = connection.execute(
            "SELECT id, question FROM entidb_letter WHERE node = %s AND answer IS NULL ORDER BY id",
            (self.number,),
        ).fetchall()
        for letter, question in rows:
            if letter not in heard:
                Thread(
                    target=self._hear,
                    args=(hear, letter, bytes(question)),
                    name="entidb-asked",
                    daemon=True,
                ).start()
                heard.add(letter)
        heard.intersection_update(letter for letter, _ in rows)
        for each in connection.notifies(timeout=LOOK_S):
            if each.payload == str(self.number):
                return

    def _hear(self, hear: Hear, letter: int, question: bytes) -> None:
        answer = hear(question)
        try:
            self._run("UPDATE entidb_letter SET answer = %b WHERE id = %s", answer, letter)
        except StorageError as error:
            logger.warning("another node of this server gets no answer: %s", error)

    def _stop_listening(self) -> None:
        connection, self._listening = self._listening, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()


def _number(db_id: str) -> int:
    return zlib.crc32(db_id.encode()) & 0x7FFFFFFF


__all__ = ["LOOK_S", "QUIET_S", "PostgresCompany", "Hear", "Member", "Nodes"]

"""The nodes of one server, as one of them sees the others: ``Company`` where that is in PostgreSQL.

Who is asked answers by a letter; what it is asked to close stays closed without it, because every
node looks whether a database is kept closed before it opens one.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from msgspec import Raw, Struct, ValidationError, json

from entidb.errors import ServerBusyError, StorageError
from entidb.server.admin.office import NodeRow
from entidb.server.nodes.records import LINES_KEPT
from entidb.server.workers.talk import Answers, Leases, Question, hear, said
from entidb.storage.postgres.company import Member, PostgresCompany
from entidb.storage.postgres.sharing import SharedTables
from entidb.version import VERSION

logger = logging.getLogger("entidb.server")

_RETRY_S: Final = 1.0


class AboutNode(Struct, omit_defaults=True):
    """What a node says of itself."""

    host: str
    process: int
    version: str
    address: str = ""
    #: Of the processes that one parent has started behind one address, the same name.
    family: str = ""


class NodeCompany:
    """See ``workers.company.Company``. Raises ``StorageError`` where it cannot take a seat."""

    def __init__(self, address: str, serves_at: str = "", family: str = "") -> None:
        """``serves_at`` is where this node serves, for people; ``family`` names the processes with
        which it shares that."""
        host, process = socket.gethostname(), os.getpid()
        self._host, self._family = host, family
        self.name: Final = f"{host}-{process}-{secrets.token_hex(4)}"
        about = json.encode(AboutNode(host, process, VERSION, serves_at, family))
        self._sharing = SharedTables(address)
        try:
            self._company = PostgresCompany(self._sharing, self.name, about)
            self._known: list[Member] = self._company.members()
        except BaseException:
            self._sharing.close()
            raise
        self._each_look: Callable[[], None] = _nothing

    # ------------------------------------------------------------ being asked

    def listen(self, answers: Answers, leases: Leases, each_look: Callable[[], None]) -> None:
        def answer(question: bytes) -> bytes:
            found: list[bytes] = []
            # It closes a database, and does not wait until it may be opened.
            hear(answers, leases, question, found.append, _nothing)
            return found[0]

        self._each_look = each_look
        self._company.listen(answer, self._look)

    def _look(self) -> None:
        self._company.keep_seat()
        self._each_look()
        self._known = self._company.members()
        for each in self._known:
            if each.on_duty and each.quiet:
                logger.warning("node %s gives no sign of life, and is taken off duty", each.name)
                self._company.relieve(each.number)

    def deafen(self) -> None:
        self._company.deafen()

    # ------------------------------------------------------------ the others

    def others(self) -> list[str]:
        """But for those that were stopped: they look before they serve again."""
        return [each.name for each in self._members() if each.name != self.name and not each.quiet]

    def neighbours(self) -> list[str]:
        if not self._family:
            return []
        others = [each for each in self._members() if each.name != self.name and not each.quiet]
        ours = self._host, self._family
        return [
            each.name
            for each, about in ((each, _about(each)) for each in others)
            if (about.host, about.family) == ours
        ]

    def _members(self) -> list[Member]:
        with _found():
            self._known = self._company.members()
            return self._known

    def count(self) -> int:
        return max(1, len(self._known))

    def rows(self, now_ms: int) -> list[NodeRow]:
        return [_row(each) for each in self._members()]

    def ask(self, name: str, what: str, given: Any, timeout_s: float, kind: Any = Any) -> Any:
        numbers = {each.name: each.number for each in self._members()}
        if name not in numbers:
            raise ConnectionRefusedError("that node is gone")
        question = json.encode(Question(what, given))
        with _found():
            line = self._company.ask(numbers[name], question, timeout_s)
        return json.decode(said(line), type=kind)

    @contextmanager
    def lease(self, name: str, what: str, given: Any, timeout_s: float) -> Iterator[Raw]:
        yield Raw(json.encode(self.ask(name, what, given, timeout_s)))

    # ------------------------------------------------------------ what one has alone

    def take_chair(self) -> bool:
        return self._company.take_duty()

    def give_chair(self) -> None:
        self._company.give_duty()

    def chairman(self) -> str | None:
        return next((each.name for each in self._members() if each.on_duty), None)

    @contextmanager
    def keeping_closed(self, db_id: str) -> Iterator[None]:
        with _found():
            right = self._company.keep_closed(db_id)
        if right is None:
            raise ServerBusyError(f"database {db_id!r} is being looked after")
        try:
            yield
        finally:
            self._company.let_open(db_id, right)

    def is_kept_closed(self, db_id: str) -> bool:
        with _found():
            return self._company.is_kept_closed(db_id)

    def is_first(self, db_id: str, every_s: float) -> bool:
        return self._sharing.is_first(f"purge/{db_id}", every_s)

    def clear_up(self) -> None:
        self._company.clear()
        if self._sharing.is_first("journal", 3600.0):
            self._sharing.forget_lines(LINES_KEPT)

    def leave(self) -> None:
        self._company.leave()
        self._sharing.close()


@contextmanager
def _found() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise ServerBusyError(
            f"the nodes of this server cannot be found at the moment: {error}", retry_after=_RETRY_S
        ) from error


def _about(member: Member) -> AboutNode:
    try:
        return json.decode(member.about, type=AboutNode)
    except (ValidationError, ValueError):
        return AboutNode("", 0, "")  # a newer program says it in another way


def _row(member: Member) -> NodeRow:
    about = _about(member)
    return NodeRow(
        member.name,
        about.host,
        about.process,
        about.version,
        member.began_ms,
        member.seen_ms,
        member.on_duty,
        about.address,
    )


def _nothing() -> None:
    return None


__all__ = ["NodeCompany"]

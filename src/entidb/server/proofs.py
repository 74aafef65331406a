"""Files of a server's database that were put back by hand: how a device proves it (R29).

A proof is a commit of the present history that the device has seen and the server does not have:
a number above its head, or one that belongs to another term here (``entidb.db.terms``). Whoever is
believed has a new history begin, so that every device learns of it, and not only those that can
prove it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from entidb.db import Database
from entidb.db.terms import newest_term, term_at
from entidb.db.writer import Writer
from entidb.errors import HistoryChangedError
from entidb.protocol import PullRequest, PushRequest, RoundRequest
from entidb.server.hooks import Grant
from entidb.server.pages import View
from entidb.storage.base import opening_of
from entidb.types import Term

#: Histories that begin by a proof in one database, and in how long at most.
HISTORIES_MAX: Final = 4
HISTORIES_WITHIN_MS: Final = 3_600_000
_log = logging.getLogger("entidb.server")
_CHOOSE: Final = 'Choose reset(keep="server") or reset(keep="device")'


class Proofs:
    """Of one database, since it was opened."""

    def __init__(self, database: Database, db_id: str) -> None:
        self._database = database
        self._db_id = db_id
        #: In which opening of the store a proof was believed. The files were replaced before that
        #: began, so a device that shows another proof in it has made it up.
        self._heard: int | None = None
        #: Of one state: its mark, and its newest term.
        self._newest: tuple[int, Term | None] = (-1, None)

    # ------------------------------------------------------------ terms

    def newest(self, view: View) -> Term | None:
        """The term of the head, in the state of ``view``."""
        mark, term = self._newest
        if mark != view.moment.mark:
            term = newest_term(view.snapshot)
            self._newest = view.moment.mark, term
        return term

    def committed(self, writer: Writer) -> Term | None:
        """As ``newest``, after the commit of ``writer``, which ``newest`` was asked with."""
        term = writer.term or self._newest[1]
        self._newest = writer.moment.mark, term
        return term

    def has_parted(self, request: PullRequest | PushRequest, view: View) -> bool:
        """Whether a commit that the device has seen is another one here. Its number is not above
        the head."""
        if request.seen is None:
            return False
        here = self.newest(view)
        if here is not None and request.seen.version < here.first:
            here = term_at(view.snapshot, request.seen.version)
        return here is not None and here.name != request.seen.term

    def check(self, request: PullRequest | PushRequest, view: View, head: int) -> None:
        """Raises ``HistoryChangedError`` where the device and these files have parted."""
        if self.has_parted(request, view):
            assert request.seen is not None
            raise self.seen_more(request.seen.version, head)

    # ------------------------------------------------------------ who is believed

    def suspects(
        self,
        members: Sequence[tuple[PushRequest | RoundRequest, Grant]],
        seen: Sequence[int],
        writer: Writer,
        history: bytes | None,
    ) -> list[tuple[Grant, int, int]]:
        """Who shows, among ``members`` of this ``history``, that these files are older than what
        was answered; each with what ``put_back`` takes."""
        found = []
        head, (mark, term) = writer.head.sequence, self._newest
        if mark != writer.moment.mark:
            term = self.newest(writer)
        for (request, grant), newest in zip(members, seen, strict=True):
            asked = request.pull if isinstance(request, RoundRequest) else request
            known = asked.seen
            if newest <= head and (
                known is None
                or (term is not None and known.term == term.name and known.version >= term.first)
            ):
                continue  # as next to all
            parted = newest > head or self.has_parted(asked, writer)
            if parted and request.history == history:
                found.append((grant, newest, head))
        return found

    def first(self, found: Sequence[tuple[Grant, int, int]]) -> tuple[Grant, int, int] | None:
        """Of ``suspects``, the first that is to be believed."""
        return next((each for each in found if self.believes(each[0])), None)

    def believes(self, grant: Grant) -> bool:
        """Who may say of a database that its files are older than what it has answered: all devices
        have to choose a side after that. So only those who could overwrite everything in it anyway;
        they also know its history, which a device that never synchronised does not have. And once
        for each opening of the files, because the files change only between two."""
        whole = grant.read and grant.write and grant.collections is None
        return whole and self._heard != self._opening()

    def _opening(self) -> int:
        return opening_of(self._database.storage.mark())

    def seen_more(self, seen: int, head: int) -> HistoryChangedError:
        """What the device is told."""
        if seen > head:
            text = (
                f"this device has seen commit {seen}, but database {self._db_id!r} ends at {head}: "
                "the server's files were replaced by older ones"
            )
        else:
            text = (
                f"the commit {seen} that this device has seen is another one than database "
                f"{self._db_id!r} has: the server's files were replaced by older ones, and others "
                "have gone on from there"
            )
        return HistoryChangedError(
            f"{text}. {_CHOOSE}", details={"history": self._database.history, "head": head}
        )

    def put_back(
        self, grant: Grant, seen: int, head: int, past: bytes | None
    ) -> HistoryChangedError:
        """A device has seen commit ``seen`` of this history, and these files, which end at
        ``head``, do not have it: they were put back without `entidb backup`. The database begins a
        new history in the place of ``past``, durable before anybody hears of it; where another
        process has done so already, it stays at that. Returns what this device is told."""
        error = self.seen_more(seen, head)
        what = f"and it ends at {head}" if seen > head else "and has another commit of that number"
        if not self.believes(grant):
            _log.error(
                "database %s: %r has seen commit %d, %s. Either its files were put back by hand, "
                "or that client makes it up. The history was kept: %s",
                self._db_id,
                grant.subject,
                seen,
                what,
                "one proof was heard since the database was opened"
                if self._heard is not None
                else "only a token that may read and write all of it is believed",
            )
            return error
        begun = self._database.begin_history(HISTORIES_MAX, HISTORIES_WITHIN_MS, past)
        self._heard = self._opening()
        _log.error(
            "database %s: %r has seen commit %d, %s: its files were put back by hand, without "
            "`entidb backup`. %s",
            self._db_id,
            grant.subject,
            seen,
            what,
            "A new history begins, and every device will have its application choose a side"
            if begun
            else f"The history was kept: {HISTORIES_MAX} have begun like this within an hour",
        )
        return self.seen_more(seen, head)

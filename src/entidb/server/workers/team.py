"""One process among those that are one server: what it tells the others and asks them, and what it
does if it is the one that has the *chair*.

Only the process in the chair has the socket of `entidb admin`, runs administrative tasks, makes the
backups that are due and removes what was deleted; what another process is asked of administration,
it passes on to that one. When it ends, another one takes the chair within half a second.

A thread looks after all this four times a second; nothing here is on the way of a request.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from msgspec import convert

from entidb.errors import EntiDBError, ServerBusyError
from entidb.events import SafeEvent, Thread
from entidb.server.admin.callers import Caller
from entidb.server.admin.local import LocalDoor, open_door
from entidb.server.admin.office import NodeRow, Office
from entidb.server.admin.readiness import Readiness
from entidb.server.config import directory_name
from entidb.server.live import LiveChannels
from entidb.server.server import SyncServer
from entidb.server.watched import Mark, mark_of
from entidb.server.workers.company import NOT_THERE, Company, FolderCompany
from entidb.server.workers.seats import Seats
from entidb.server.workers.talk import Answers, Leases, Passed
from entidb.storage.disk_errors import said_of

if TYPE_CHECKING:
    from entidb.server.metrics import Metrics, Series
    from entidb.server.workers.counted import Counted

logger = logging.getLogger("entidb.server")

#: Seconds between two looks; and between those at what changes less often.
_TICK_S: Final = 0.25
_SLOW_TICK_S: Final = 1.0
#: Seconds that another process gets for an answer that it has at hand.
_ASK_S: Final = 2.0
#: For one that removes files of images, and may have to end making one first.
_IMAGES_S: Final = 40.0
#: Seconds that another process gets to say what it has counted.
_COUNTS_S: Final = 1.0
#: For one that administration takes, and to find the process in the chair.
_ADMIN_S: Final = 150.0
_FIND_S: Final = 5.0
_PAUSE_S: Final = 0.05


class Team:
    """Begins with the process's event loop, and ends after it has served. ``Others`` for the
    office. Raises ``OSError`` where the folder of the seats cannot be made."""

    def __init__(
        self,
        server: SyncServer,
        office: Office,
        live: LiveChannels,
        company: Company,
        metrics: Metrics | None,
    ) -> None:
        self._server, self._office, self._live = server, office, live
        self._company: Final = company
        self._is_folder = isinstance(company, FolderCompany)
        self._readiness = Readiness(office)
        self._door: LocalDoor | None = None
        self._on_duty = False
        self._told_to_stop = False
        #: What the files of databases looked like for which somebody waits.
        self._files: dict[str, Mark] = {}
        self._stop = SafeEvent()
        self._slow_at = 0.0
        self._counted = None if metrics is None else self._count(metrics)
        answers: Answers = {
            "ready": lambda given: list(self._readiness.reasons()),
            "opened": lambda given: self._opened_here(),
            "flush": lambda given: self._flush(),
            "images": lambda given: server.images.removal.pay(),
            "decided": lambda given: self._look_again(),
            "reload": lambda given: server.reload(),
            "admin": self._administer,
            "counts": lambda given: [] if metrics is None else metrics.told(),
        }
        leases: Leases = {"close": lambda given: server.stores.closed_here(*given)}
        company.listen(answers, leases, self._office.control.look_again)
        server.stores.elsewhere = self.closed
        server.stores.is_kept_closed = company.is_kept_closed
        server.stores.is_awaited = live.is_awaited
        server.stores.may_purge = company.is_first
        office.control.on_change = self._tell_decided
        office.others = self
        self._thread = Thread(target=self._run, name="entidb-team", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give everything up, for another process to take. Idempotent."""
        self._stop.set()
        self._thread.join()
        self._company.deafen()
        self._leave_chair()
        if self._counted is not None:
            self._counted.close()
        self._company.leave()

    # ------------------------------------------------------------ now and then

    def _run(self) -> None:
        said = ""
        while True:
            try:
                self._tick()
                said = ""
            except (EntiDBError, OSError) as error:
                # As long as the store or the directory of all is away: once, and not at each look.
                now = said_of(error, "its seats") if isinstance(error, OSError) else str(error)
                if now != said:
                    logger.warning("the other processes of this server are not seen: %s", now)
                said = now
            except Exception:
                # The next one may work, and without it nobody would take the chair.
                logger.exception("looking after the other processes of this server failed")
            if self._stop.wait(_TICK_S):
                return

    def _tick(self) -> None:
        family = self._server.family
        if family is not None and os.getppid() != family.parent and not self._told_to_stop:
            self._told_to_stop = True
            logger.warning("the parent of this process has ended, and so does this one")
            os.kill(os.getpid(), signal.SIGTERM)
        self._look_at_chair()
        now = time.monotonic()
        if now >= self._slow_at:
            self._slow_at = now + _SLOW_TICK_S
            if self._office.on_files:
                self._look_at_files()
            if self._counted is not None:
                self._counted.leave()
                self._counted.add_up()
            if self._on_duty and (self._counted is None or not self._is_folder):
                self._company.clear_up()

    def _look_at_chair(self) -> None:
        """A node loses it with its connection."""
        mine = self._company.take_chair()
        if mine and not self._on_duty:
            self._door = open_door(self._office)
        elif self._on_duty and not mine:
            self._close_door()
        self._on_duty = mine

    def _close_door(self) -> None:
        door, self._door = self._door, None
        if door is not None:
            door.close()

    def _leave_chair(self) -> None:
        self._close_door()
        self._on_duty = False
        self._company.give_chair()

    def _look_at_files(self) -> None:
        """Have those who wait for a database that is closed here hear of what another process has
        committed: it is opened, and says where it ends."""
        stores = self._server.stores
        opened = stores.opened()
        awaited = self._live.awaited()
        for db_id in self._files.keys() - awaited:
            del self._files[db_id]
        for db_id in awaited:
            mark = mark_of(self._office.root / directory_name(db_id) / "data.mdb")
            known = self._files.get(db_id)
            self._files[db_id] = mark
            # One that is seen for the first time may have changed since it was closed.
            if known != mark and db_id not in opened:
                try:
                    stores.release(stores.use(db_id, create=False))
                except EntiDBError as error:
                    # Who waits asks for it by himself, and is told.
                    logger.info("database %s has changed and is not opened: %s", db_id, error)

    # ------------------------------------------------------------ asked by the others

    def _opened_here(self) -> dict[str, float]:
        """The databases that are open here, with the seconds since their last use: another machine
        has another clock."""
        now = self._office.clock.monotonic()
        return {name: now - used_at for name, used_at in self._server.stores.opened().items()}

    def _flush(self) -> None:
        self._server.registry.flush()
        self._office.audit.flush()

    def _look_again(self) -> None:
        self._office.control.look_again()
        self._live.look()

    def _administer(self, given: Any) -> list[Any]:
        from entidb.server.admin.routes import answer  # most servers are never asked this way

        passed = convert(given, Passed)
        databases = None if passed.databases is None else frozenset(passed.databases)
        status, body = answer(
            self._office,
            Caller(passed.who, passed.where, databases),
            passed.method,
            passed.path,
            passed.query,
            passed.body.encode("latin-1"),
        )
        return [status, body.decode("latin-1")]

    # ------------------------------------------------------------ for the office

    def on_duty(self) -> bool:
        return self._on_duty

    def count(self) -> int | None:
        return self._company.count()

    def rows(self) -> list[NodeRow]:
        return self._company.rows(self._office.clock.now_ms())

    def forward(
        self, caller: Caller, method: str, path: str, query: Mapping[str, str], body: bytes
    ) -> tuple[int, bytes] | None:
        databases = None if caller.databases is None else sorted(caller.databases)
        passed = Passed(
            caller.who, caller.where, databases, method, path, dict(query), body.decode("latin-1")
        )
        end = time.monotonic() + _FIND_S
        while not self._on_duty:
            name = self._company.chairman()
            if name is not None and name != self._company.name:
                try:
                    status, text = self._company.ask(
                        name, "admin", passed, _ADMIN_S, tuple[int, str]
                    )
                    return status, text.encode("latin-1")
                except NOT_THERE:
                    pass  # it ended before it was asked: another one takes the chair
                except OSError as error:
                    raise ServerBusyError(
                        "the process of this server that administers it has ended, or is slow; "
                        "look what came of this before you ask again",
                        retry_after=1.0,
                    ) from error
            if time.monotonic() >= end:
                raise ServerBusyError("no process administers this server at the moment")
            time.sleep(_PAUSE_S)
        return None

    def gather(self) -> None:
        self._ask_all("flush")

    def drop_images(self) -> None:
        self._ask("images", self._company.others(), _IMAGES_S)

    def opened(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for opened in self._ask_all("opened"):
            now = self._office.clock.monotonic()
            for name, seconds in opened.items():
                found[name] = max(now - seconds, found.get(name, now - seconds))
        return found

    def reasons(self) -> set[str]:
        # Another node is asked at its own address.
        answers = self._ask("ready", self._neighbours())
        return {reason for reasons in answers for reason in reasons}

    def _count(self, metrics: Metrics) -> Counted | None:
        """What it counts stays when a process ends, for those that share its address."""
        company, family = self._company, self._server.family
        if isinstance(company, FolderCompany):
            seats = company.seats
        elif family is not None and family.folder:
            seats = Seats(family.folder, company.name)
        else:
            metrics.others = self._counts  # those that live
            return None
        from entidb.server.metrics import Series  # only loaded where they are used
        from entidb.server.workers.counted import Counted

        def ask(name: str) -> list[Series]:
            answer: list[Series] = company.ask(name, "counts", None, _COUNTS_S, list[Series])
            return answer

        counted = Counted(seats, metrics, ask)
        metrics.others, metrics.told = counted.others, counted.leave
        return counted

    def _counts(self) -> list[list[Series]]:
        """What nodes have counted that share the address of this one, as far as they answer."""
        from entidb.server.metrics import Series

        return [convert(each, list[Series]) for each in self._ask("counts", self._neighbours())]

    def _neighbours(self) -> list[str]:
        """None where they cannot be found: then this process answers for itself, which is no better
        off."""
        try:
            return self._company.neighbours()
        except ServerBusyError:
            return []

    def reload(self) -> None:
        self._ask_all("reload")

    def _tell_decided(self) -> None:
        self._live.look()
        self._ask_all("decided")

    def _ask_all(self, what: str) -> list[Any]:
        return self._ask(what, self._company.others())

    def _ask(self, what: str, names: Iterable[str], timeout_s: float = _ASK_S) -> list[Any]:
        """The answers of those that answer."""
        found = []
        for name in names:
            try:
                found.append(self._company.ask(name, what, None, timeout_s))
            except NOT_THERE:
                logger.debug("process %s has not begun yet, or has ended", name)
            except (OSError, ServerBusyError) as error:
                logger.warning("process %s of this server, asked to %s: %s", name, what, error)
        return found

    # ------------------------------------------------------------ for the databases

    @contextmanager
    def closed(self, db_id: str, wait_s: float) -> Iterator[None]:
        """The database is closed in all other processes, also in those that begin meanwhile.
        Raises ``ServerBusyError``."""
        with self._company.keeping_closed(db_id), ExitStack() as leases:
            for name in self._company.others():
                self._close_in(leases, name, db_id, wait_s)
            yield

    def _close_in(self, leases: ExitStack, name: str, db_id: str, wait_s: float) -> None:
        try:
            given = [db_id, wait_s]
            leases.enter_context(self._company.lease(name, "close", given, wait_s + _ASK_S))
        except (*NOT_THERE, ConnectionResetError):
            return  # it has ended; or has opened nothing yet, and looks before it does
        except OSError as error:
            raise ServerBusyError(
                f"process {name.partition('-')[0]} of this server does not answer, and may have "
                f"database {db_id!r} open"
            ) from error


def company_of(server: SyncServer) -> Company | None:
    """The other processes of this server; None where it is alone. Raises ``OSError`` and
    ``StorageError``."""
    config = server.config
    if config.address is not None:
        from entidb.server.nodes.company import NodeCompany  # its package is an extra

        family = "" if server.family is None else server.family.name
        return NodeCompany(config.address, server.address, family)
    return None if server.family is None else FolderCompany(str(server.place.root))


__all__ = ["Team", "company_of"]

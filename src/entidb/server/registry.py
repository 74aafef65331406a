"""Which devices a server has met: one row for each database and device id, with what it was told.

Rows are kept in memory, and written beside the database in the background, without a commit of its
own: a server that is killed forgets the last half minute of them, and nothing else. Several
processes add up what each has counted. The rows contain what devices say of themselves, and decides
nothing. Not here: who may see it (``admin``).
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Final

from msgspec import Struct, ValidationError, json

from entidb.errors import DatabaseLockedError, StorageError
from entidb.protocol import PullRequest, PushResponse, SyncRequest, Verdict
from entidb.server.control import Asking
from entidb.server.records import Records, as_records, devices_of
from entidb.server.watched import Mark
from entidb.storage.disk_errors import said_of
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

#: Rows of one database; those that were not seen for longest go first.
DEVICES_MAX: Final = 10_000
_DAY_MS: Final = 24 * 3600 * 1000
_CLIENT_CHARS_MAX: Final = 100
_VERDICT_OF: Final = attrgetter("verdict")


class DeviceRecord(Struct, omit_defaults=True):
    """A device in one database. Times are milliseconds since 1970; ``cursor`` is the newest commit
    that it was given, or made itself right after that one; ``error`` the code of the last answer
    that refused it; bytes are of bodies as they crossed the network, ``bytes_in`` those that it
    sent."""

    device_id: str
    subject: str = ""
    #: ``jti`` of the token it came with last.
    token: str | None = None
    client: str | None = None
    #: Number of the application's schema, where it says one.
    schema: int | None = None
    first_ms: int = 0
    last_ms: int = 0
    cursor: int = 0
    error: str | None = None
    error_ms: int | None = None
    requests: int = 0
    accepted: int = 0
    superseded: int = 0
    conflicts: int = 0
    rejected: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class About(Struct, omit_defaults=True):
    """What was known of a database when it was open last."""

    used_ms: int = 0
    head: int = 0
    floor: int = 0
    entities: int = 0
    #: Of what its quotas count: entities that devices may have, and bytes of its store.
    synced: int | None = None
    used_bytes: int | None = None


class _Page(Struct, omit_defaults=True):
    """The file of a database."""

    version: int = 1
    about: About | None = None
    devices: list[DeviceRecord] = []


#: Raises for a device that must not be new among these.
Check = Callable[[Sequence[DeviceRecord]], None]


class _Book:
    """What came of one database since its file was written."""

    def __init__(self) -> None:
        self.fresh: dict[bytes, DeviceRecord] = {}
        self.about: About | None = None


_COUNTERS: Final = (
    "requests",
    "accepted",
    "superseded",
    "conflicts",
    "rejected",
    "bytes_in",
    "bytes_out",
)


class Registry:
    """Notes every request; thread-safe. Without a place it lives as long as the server."""

    def __init__(
        self,
        place: str | os.PathLike[str] | Records | None,
        clock: Clock,
        *,
        retention_days: float,
        devices_max: int = DEVICES_MAX,
    ) -> None:
        self._records = as_records(place)
        self._clock = clock
        self._retention_ms = int(max(1.0, retention_days) * _DAY_MS)
        self._devices_max = devices_max
        #: Guards the books, and the rows in them; never held during I/O.
        self._lock = threading.Lock()
        self._books: dict[str, _Book] = {}
        #: Entities of each database that was looked at, or read of, since the server began.
        self._entities: dict[str, int] = {}
        #: Whether a device may be noted for a request that was refused; not where there is a quota,
        #: and it was not let in.
        self.is_met: Callable[[SyncRequest], bool] = _always

    # ------------------------------------------------------------ noting every request

    def pulled(self, request: PullRequest, cursor: int) -> None:
        """A page or an idle answer leads this device to ``cursor``."""
        with self._lock:
            self._row(request).cursor = cursor

    def heard(
        self,
        request: SyncRequest,
        asking: Asking,
        *,
        code: str | None,
        answer: PushResponse | None = None,
        client: str | None = None,
        bytes_in: int = 0,
        bytes_out: int = 0,
    ) -> None:
        """A request of somebody whose token grants its database was answered; ``code`` where it
        was refused."""
        if code is not None and not self.is_met(request):
            return
        now = self._clock.now_ms()
        token = asking.claims.get("jti")
        with self._lock:
            row = self._row(request)
            row.subject = asking.subject
            row.token = token if isinstance(token, str) else None
            if client is not None:
                row.client = client
            row.last_ms = now
            row.requests += 1
            row.bytes_in += bytes_in
            row.bytes_out += bytes_out
            if code is not None:
                row.error, row.error_ms = code, now
            if answer is not None:
                _count(row, answer)
                _move(row, answer)

    def _row(self, request: SyncRequest) -> DeviceRecord:
        book = self._books.get(request.db_id)
        if book is None:
            book = self._books[request.db_id] = _Book()
        row = book.fresh.get(request.device_id)
        if row is None:
            if len(book.fresh) >= 2 * self._devices_max:
                # A client makes device ids up. The newest rows stay.
                newest = sorted(book.fresh, key=lambda each: -book.fresh[each].last_ms)
                book.fresh = {each: book.fresh[each] for each in newest[: self._devices_max]}
            now = self._clock.now_ms()
            cursor = request.cursor
            row = DeviceRecord(request.device_id.hex(), first_ms=now, last_ms=now, cursor=cursor)
            book.fresh[request.device_id] = row
        return row

    def meet(self, request: SyncRequest, asking: Asking, check: Check) -> set[bytes]:
        """The devices of a database, with this one among them. One that is new is written down
        first, unless ``check``, which gets the rows of all others, raises. Raises ``OSError``,
        ``StorageError`` and ``DatabaseLockedError`` too."""
        new = request.device_id.hex()
        found: set[bytes] = set()

        def make(content: bytes | None) -> bytes | None:
            page = self._decoded(request.db_id, content)
            rows = self._kept(self._merged(page.devices, self._fresh(request.db_id)))
            found.update(bytes.fromhex(row.device_id) for row in rows)
            if request.device_id in found:
                return None
            check(rows)
            now = self._clock.now_ms()
            row = DeviceRecord(new, subject=asking.subject, first_ms=now, last_ms=now)
            return json.encode(_Page(about=page.about, devices=self._kept([*page.devices, row])))

        if self._records is not None:
            self._records.change(devices_of(request.db_id), make, _nothing)
        elif make(None) is not None:
            with self._lock:
                self._row(request).subject = asking.subject
        return found | {request.device_id}

    # ------------------------------------------------------------ for administrators

    def devices(self, db_id: str) -> list[DeviceRecord]:
        """The rows of a database, those seen last first."""
        fresh = self._fresh(db_id)
        return self._kept(self._merged(self._read(db_id).devices, fresh))

    def _fresh(self, db_id: str) -> list[DeviceRecord]:
        with self._lock:
            book = self._books.get(db_id)
            return [] if book is None else [_copy(row) for row in book.fresh.values()]

    def about(self, db_id: str) -> About | None:
        with self._lock:
            book = self._books.get(db_id)
            if book is not None and book.about is not None:
                return book.about
        return self._read(db_id).about

    # ------------------------------------------------------------ written in the background

    def note(self, db_id: str, about: About) -> None:
        """What is known of an open database, for when it is closed."""
        with self._lock:
            book = self._books.setdefault(db_id, _Book())
            book.about = about
        self._entities[db_id] = about.entities

    def entities(self, db_id: str) -> int | None:
        """How many a database had when it was looked at last, half a minute ago or so if it is
        open. None: this server has not looked yet. Reads no file, so that every request may ask."""
        return self._entities.get(db_id)

    def flush(self) -> None:
        """Write what came since the last time. What cannot be written is kept and logged."""
        if self._records is None:
            return
        with self._lock:
            names = [name for name, book in self._books.items() if book.fresh or book.about]
        for db_id in names:
            self._flush(db_id)

    def _flush(self, db_id: str) -> None:
        records = self._records
        with self._lock:
            book = self._books.pop(db_id, None)
        if book is None or records is None:
            return

        def make(content: bytes | None) -> bytes:
            page = self._decoded(db_id, content)
            rows = self._kept(self._merged(page.devices, book.fresh.values()))
            return json.encode(_Page(about=book.about or page.about, devices=rows))

        try:
            if records.has_database(db_id):  # one that is not there has no devices
                records.change(devices_of(db_id), make, _nothing)
        except (OSError, DatabaseLockedError, StorageError) as error:
            doing = f"the devices of database {db_id} are not written"
            logger.warning("%s", said_of(error, doing))
            self._put_back(db_id, book)

    def _put_back(self, db_id: str, book: _Book) -> None:
        with self._lock:
            newer = self._books.get(db_id)
            if newer is not None:
                both = self._merged(book.fresh.values(), newer.fresh.values())
                newer.fresh = {bytes.fromhex(row.device_id): row for row in both}
            else:
                self._books[db_id] = book

    def rename(self, db_id: str, to: str | None) -> None:
        """The rows go with a database to its new name; None: it is gone."""
        self._flush(db_id)
        if self._records is None:
            return
        try:
            self._records.rename(devices_of(db_id), None if to is None else devices_of(to))
        except (OSError, StorageError) as error:
            logger.warning("the devices of database %s stay where they are: %s", db_id, error)

    # ------------------------------------------------------------ as they are kept

    def _read(self, db_id: str) -> _Page:
        records = self._records
        try:
            if records is None or not records.has_database(db_id):
                return _Page()
            page = self._decoded(db_id, records.read(devices_of(db_id)))
        except (OSError, StorageError) as error:
            logger.warning("the devices of database %s cannot be read: %s", db_id, error)
            return _Page()
        if page.about is not None:
            self._entities.setdefault(db_id, page.about.entities)
        return page

    def _decoded(self, db_id: str, content: bytes | None) -> _Page:
        if content is None:
            return _Page()
        try:
            return json.decode(content, type=_Page)
        except (ValidationError, ValueError, RecursionError) as error:
            # Cut short by a power cut. It decides nothing, and fills itself again.
            logger.warning("the devices of database %s are forgotten: %s", db_id, error)
            return _Page()

    def _merged(
        self, older: Iterable[DeviceRecord], newer: Iterable[DeviceRecord]
    ) -> list[DeviceRecord]:
        return _merged(older, newer, self._clock.now_ms())

    def _kept(self, rows: Iterable[DeviceRecord]) -> list[DeviceRecord]:
        now = self._clock.now_ms()
        since = now - self._retention_ms
        newest = sorted((_believed(row, now) for row in rows), key=lambda row: -row.last_ms)
        return [row for row in newest[: self._devices_max] if row.last_ms >= since]


def _nothing(mark: Mark) -> None:
    return None


def _always(request: SyncRequest) -> bool:
    return True


def _count(row: DeviceRecord, answer: PushResponse) -> None:
    if len(answer.results) == 1 and answer.results[0].verdict == Verdict.ACCEPTED:
        row.accepted += 1  # as most of them are
        return
    # Thousands of them, with the lock held.
    counts = Counter(map(_VERDICT_OF, answer.results))
    row.accepted += counts[Verdict.ACCEPTED]
    row.conflicts += counts[Verdict.CONFLICT]
    row.rejected += counts[Verdict.REJECTED]
    row.superseded += counts[Verdict.SUPERSEDED]


def _copy(row: DeviceRecord) -> DeviceRecord:
    return DeviceRecord(*(getattr(row, name) for name in DeviceRecord.__struct_fields__))


def _believed(row: DeviceRecord, now_ms: int) -> DeviceRecord:
    """A row of a clock that was ahead would be the newest until then, and nobody would forget
    it."""
    if max(row.first_ms, row.last_ms, row.error_ms or 0) <= now_ms:
        return row
    row = _copy(row)
    row.first_ms, row.last_ms = min(row.first_ms, now_ms), min(row.last_ms, now_ms)
    row.error_ms = None if row.error_ms is None else min(row.error_ms, now_ms)
    return row


def _move(row: DeviceRecord, answer: PushResponse) -> None:
    """A device that was given everything before its own commits lacks nothing up to the last of
    them."""
    for result in answer.results:
        if result.verdict == Verdict.ACCEPTED and result.version == row.cursor + 1:
            row.cursor += 1


def _merged(
    older: Iterable[DeviceRecord], newer: Iterable[DeviceRecord], now_ms: int
) -> list[DeviceRecord]:
    """Counters add up; all else is what the last request said. What is older and says that it is
    of a time to come was said by a clock that was ahead."""
    rows = {row.device_id: row for row in older}
    for new in newer:
        old = rows.get(new.device_id)
        if old is None:
            rows[new.device_id] = new
            continue
        last = _copy(new if new.last_ms >= old.last_ms or old.last_ms > now_ms else old)
        last.first_ms = min(old.first_ms, new.first_ms)
        last.client = last.client or old.client or new.client
        error_ms = old.error_ms or 0
        if (error_ms if error_ms <= now_ms else 1) > (last.error_ms or 0):
            last.error, last.error_ms = old.error, old.error_ms
        for name in _COUNTERS:
            setattr(last, name, getattr(old, name) + getattr(new, name))
        rows[new.device_id] = last
    return list(rows.values())


def client_text(user_agent: str | None) -> str | None:
    """What a client calls itself, safe for a file and a terminal."""
    if not user_agent:
        return None
    text = user_agent[:_CLIENT_CHARS_MAX]
    # As nearly always; this is asked for each request.
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


__all__ = ["DEVICES_MAX", "About", "DeviceRecord", "Registry", "client_text"]

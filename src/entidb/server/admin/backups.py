"""Backups of databases that are served: made, verified, listed, pruned, and put back.

    BACKUP_DIR/shop.entidb/20261128T191500Z           a backup, as `entidb backup` makes it
    BACKUP_DIR/shop.entidb/20261128T191500Z.json      what was found when it was verified

It gets its name when it has been verified. A backup counts from the moment its second file is
there. Only what has such a name is ever removed. When it is due is decided with the housekeeping;
making one is a task.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, ValidationError, json

from entidb.errors import (
    ConfigError,
    CorruptionError,
    EntiDBError,
    PermissionDeniedError,
    ServerBusyError,
)
from entidb.server.admin.callers import Caller
from entidb.server.admin.checking import check
from entidb.server.admin.databases import WAIT_S, check_confirmed
from entidb.server.admin.office import Office
from entidb.server.admin.tasks import Progress, Task
from entidb.server.config import check_db_id, db_id_of, directory_name
from entidb.server.place import TakesIn
from entidb.storage.directories import give_owner, make_directory, make_folder, sync_path
from entidb.storage.partial import Partial, is_being_made, remove_dead

logger = logging.getLogger("entidb.server")

_ID: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z(?:-[0-9]{1,3})?")
#: The one file of a backup that says something.
_DATA: Final = "data.mdb"
_PIECE_BYTES: Final = 4 * 2**20
#: Ends the name of what is said of a backup, until that has its own name.
_NEW: Final = ".new"
#: Left with a backup that is being removed.
_REMOVAL: Final = "removal"
#: Seconds until a scheduled backup that failed is tried again, at least.
_AGAIN_S: Final = 900.0
#: A backup that was made so much later than now was made by a clock that was ahead.
_AHEAD_MS: Final = 300_000
_SCHEDULE: Final = Caller("the schedule", "local")
#: A backup is late when it is so many times as old as it should become.
_LATE: Final = 2
#: Faulty backups that are kept to look at; a damaged database must not fill the disk.
_FAULTY_KEPT: Final = 1


class BackupRow(Struct, omit_defaults=True):
    """A backup, as it was when it was verified. ``made_ms`` is milliseconds since 1970."""

    id: str
    database: str
    made_ms: int
    bytes: int
    head: int = 0
    entities: int = 0
    faults: list[str] = []


# ---------------------------------------------------------------- made


def backup(office: Office, caller: Caller, db_id: str) -> Task:
    """Have a backup made and verified."""
    caller.check(db_id)
    check_db_id(db_id)
    folder = _folder(office, db_id)
    with office.begin(caller, "backup", db_id):
        office.require(db_id)
        return office.tasks.add(
            "backup", caller.who, db_id, lambda progress: _make(office, db_id, folder, progress)
        )


def backup_all(office: Office, caller: Caller) -> list[Task]:
    """As ``backup``, of every database that ``caller`` administers."""
    names = [name for name in office.place.names() if caller.sees(name)]
    return [backup(office, caller, name) for name in names]


def _make(office: Office, db_id: str, folder: Path, progress: Progress) -> dict[str, Any]:
    progress.at("copying")
    make_directory(str(folder))
    identity = _new_id(office, folder)
    target = folder / identity
    clear_folder(folder)
    with Partial(str(target), "backup") as partial:
        with office.stores.lasting(db_id) as store:
            made_ms = office.clock.now_ms()
            store.database.backup(partial.path)
        progress.at("checking")
        found = check(partial.path, lambda: progress.at("checking"))
        size = sum(each.stat().st_size for each in os.scandir(partial.path))
        row = BackupRow(identity, db_id, made_ms, size, found.head, found.entities, found.faults)
        _prepare(_about(target), json.format(json.encode(row), indent=1))
        partial.finish()
        _publish(_about(target))
    _prune(office, db_id, folder)
    if found.faults:
        raise CorruptionError(
            f"the backup {identity} of {db_id} has {len(found.faults)} faults, and so has the "
            f"database: {found.faults[0]}"
        )
    return {"backup": identity, "bytes": size, "head": found.head, "entities": found.entities}


def _new_id(office: Office, folder: Path) -> str:
    moment = datetime.fromtimestamp(office.clock.now_ms() / 1000, UTC)
    plain = identity = moment.strftime("%Y%m%dT%H%M%SZ")
    for number in range(2, 1000):
        if not os.path.lexists(folder / identity):
            break
        identity = f"{plain}-{number}"
    return identity


def _folder(office: Office, db_id: str) -> Path:
    """Raises ``ConfigError`` where no place for backups is configured."""
    where = office.server.config.backup_dir
    if where is None:
        raise ConfigError(
            "this server has no place for backups: start it with backup_dir (--backup-dir DIR)"
        )
    return Path(where) / directory_name(db_id)


def _about(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _new(path: Path) -> Path:
    return path.with_name(path.name + _NEW)


def _prepare(path: Path, content: bytes) -> None:
    with open(os.open(_new(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        give_owner(file.fileno(), os.stat(path.parent))
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _publish(path: Path) -> None:
    os.replace(_new(path), path)
    sync_path(str(path.parent))


def clear_folder(folder: Path) -> None:
    """What a process that was killed has left in the folder of a database: half a backup goes, and
    one that it was removing; one that had been verified counts."""
    remove_dead(str(folder), _end_removal)
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        about = path.with_name(path.name.removesuffix(_NEW))
        identity = about.name.removesuffix(".json")
        if path == about or about.suffix != ".json" or not _ID.fullmatch(identity):
            continue
        if is_being_made(str(folder / identity)):
            continue
        if (folder / identity).is_dir():
            _publish(about)
        else:
            path.unlink(missing_ok=True)


def _end_removal(where: str, note: str) -> None:
    if note == _REMOVAL and not os.path.lexists(where):
        _about(Path(where)).unlink(missing_ok=True)


# ---------------------------------------------------------------- listed and pruned


def rows(office: Office, caller: Caller) -> list[BackupRow]:
    """All backups, newest first; also of databases that are not there any more."""
    where = office.server.config.backup_dir
    found: list[BackupRow] = []
    if where is not None and os.path.isdir(where):
        for folder in Path(where).iterdir():
            name = db_id_of(folder.name)
            if name is not None and folder.is_dir() and caller.sees(name):
                found += rows_in(folder, name)
    return sorted(found, key=lambda each: (-each.made_ms, each.id))


def rows_in(folder: Path, db_id: str) -> list[BackupRow]:
    """Newest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        identity = path.name.removesuffix(".json")
        named = path.suffix == ".json" and _ID.fullmatch(identity)
        if not named or not (folder / identity).is_dir():
            continue
        try:
            row = json.decode(path.read_bytes(), type=BackupRow)
        except (OSError, ValidationError, ValueError) as error:
            logger.warning("%s does not say what is in its backup: %s", path, error)
            continue
        row.id, row.database = identity, db_id
        found.append(row)
    return sorted(found, key=lambda each: (-each.made_ms, each.id))


def _prune(office: Office, db_id: str, folder: Path) -> None:
    kept = {True: office.server.config.backup_keep, False: _FAULTY_KEPT}
    now = office.clock.now_ms()
    # Those of a clock that was ahead are not the newest, or they would outlive all that follow.
    for row in sorted(rows_in(folder, db_id), key=lambda each: _is_ahead(each, now)):
        if kept[not row.faults]:
            kept[not row.faults] -= 1
            continue
        remove(folder, row.id)


def _is_ahead(row: BackupRow, now_ms: int) -> bool:
    return row.made_ms > now_ms + _AHEAD_MS


def remove(folder: Path, identity: str) -> None:
    """Take a backup away for good."""
    with Partial(str(folder / identity), "removal") as partial:
        partial.note(_REMOVAL)
        # From here on it counts no more, and goes with what is unfinished if this is killed.
        os.rename(folder / identity, partial.path)
        _about(folder / identity).unlink()


class Schedule:
    """Makes backups when they are due; a chore. A clock that was ahead for a while, and has made a
    backup then, keeps none from being made."""

    def __init__(self, office: Office) -> None:
        self._office = office
        #: By the monotonic clock: since when, and when each was tried last.
        self._began = office.clock.monotonic()
        self._tried: dict[str, float] = {}

    def __call__(self) -> None:
        config = self._office.server.config
        if not config.backup_every_s or config.backup_dir is None:
            return
        if self._office.place.root is None and not self._office.others.on_duty():
            # Another node makes them, maybe on another disk.
            self._office.late_backups, self._office.oldest_backup_ms = [], None
            return
        every_ms, now = config.backup_every_s * 1000, self._office.clock.now_ms()
        ticks = self._office.clock.monotonic()
        begun_ms = now - round(1000 * (ticks - self._began))
        late, ages = [], []
        for name in self._office.place.names():
            try:
                rows = rows_in(_folder(self._office, name), name)
            except OSError as error:  # the others have theirs all the same
                logger.error("the backups of %s cannot be looked at: %s", name, error)
                late.append(name)
                continue
            good = next((row for row in rows if not (row.faults or _is_ahead(row, now))), None)
            # A server that has just begun gets the time to make them.
            made_ms = begun_ms if good is None else good.made_ms
            if now - max(made_ms, begun_ms) > _LATE * every_ms:
                late.append(name)
            ages.append(made_ms)
            if good is not None and now - good.made_ms < every_ms:
                continue
            tried = self._tried.get(name)
            if tried is not None and ticks - tried < min(config.backup_every_s, _AGAIN_S):
                continue
            if self._office.tasks.is_due("backup", name) or not self._office.others.on_duty():
                continue
            try:
                backup(self._office, _SCHEDULE, name)
            except ServerBusyError:
                continue  # the rest at the next housekeeping
            self._tried[name] = ticks
        self._office.late_backups = late
        self._office.oldest_backup_ms = min(ages, default=None)


# ---------------------------------------------------------------- left by killed processes


def clear_left(office: Office, done: set[str]) -> None:
    """A chore of the process on duty: copies that are not complete go, and backups that were not
    verified. The folders of backups are looked at once; ``done`` remembers it."""
    if not office.others.on_duty():
        return
    try:
        office.place.clear_left()
        if not done:
            _clear_copies(office)
            done.add("copies")
    except (EntiDBError, OSError) as error:
        logger.warning("what killed processes have left may still be there: %s", error)


def clear_all(office: Office) -> None:
    """Raises ``EntiDBError``, ``OSError``."""
    office.place.clear_left()
    _clear_copies(office)


def _clear_copies(office: Office) -> None:
    if office.place.root is None:
        remove_dead(tempfile.gettempdir())
    where = office.server.config.backup_dir
    if where is not None and Path(where).is_dir():
        for folder in Path(where).iterdir():
            if db_id_of(folder.name) is not None and folder.is_dir():
                clear_folder(folder)


# ---------------------------------------------------------------- put back


def restore(office: Office, caller: Caller, db_id: str, identity: str, confirm: str) -> Task:
    """Have a backup take the place of a database, which is put aside for a day. The database
    begins a new history, which devices notice (R29). Raises ``ConfigError`` (not_confirmed),
    ``PermissionDeniedError`` (unknown_database) if there is no such backup."""
    caller.check(db_id)
    check_db_id(db_id)
    folder = _folder(office, db_id)
    with office.begin(caller, "restore", db_id, backup=identity):
        check_confirmed(db_id, confirm)
        row = next((each for each in rows_in(folder, db_id) if each.id == identity), None)
        if row is None:
            raise PermissionDeniedError(
                f"there is no backup {identity!r} of database {db_id!r} in {folder}: `backups` "
                "lists those there are",
                code="unknown_database",
            )
        if row.faults:
            raise CorruptionError(f"the backup {identity} of {db_id} has faults: {row.faults[0]}")

        def body(progress: Progress) -> dict[str, Any]:
            done = _put_back(office, db_id, folder / identity, progress)
            office.write_done(caller, "restored", db_id, backup=identity)
            return done

        return office.tasks.add("restore", caller.who, db_id, body)


def _put_back(office: Office, db_id: str, source: Path, progress: Progress) -> dict[str, Any]:
    if isinstance(office.place, TakesIn):
        return _put_back_there(office, office.place, db_id, source, progress)
    place = office.root / directory_name(db_id)
    with Partial(str(place), "restore") as partial:
        copy_backup(source, partial.path, progress.at)
        found = check(partial.path, lambda: progress.at("checking"))
        if found.faults:
            raise CorruptionError(f"{source} was damaged since it was made: {found.faults[0]}")
        progress.at("taking the place")
        with office.changing, office.stores.closed(db_id, WAIT_S):
            partial.note(str(office.clock.now_ms()))
            with _out_of_the_way(office, db_id, os.path.lexists(place)) as aside:
                partial.finish()
    return {"aside": aside, "head": found.head, "entities": found.entities}


def _put_back_there(
    office: Office, place: TakesIn, db_id: str, source: Path, progress: Progress
) -> dict[str, Any]:
    """Record by record. Nobody opens the copy before it has its name, and then it begins its
    history."""
    found = check(str(source), lambda: progress.at("checking"))
    if found.faults:
        raise CorruptionError(f"{source} was damaged since it was made: {found.faults[0]}")
    with place.taken_in(db_id, source, partial(progress.at, "copying")) as take_the_place:
        progress.at("taking the place")
        with office.changing, office.stores.closed(db_id, WAIT_S):
            aside = take_the_place(office.clock.now_ms())
    return {
        "aside": None if aside is None else aside.id,
        "head": found.head,
        "entities": found.entities,
    }


@contextmanager
def _out_of_the_way(office: Office, db_id: str, is_there: bool) -> Iterator[str | None]:
    """The database is put aside, under the id that is given, and comes back if what is to take its
    place does not: else a device would have an empty one made."""
    if not is_there:
        yield None
        return
    aside = office.place.put_aside(db_id, office.clock.now_ms())
    try:
        yield aside.id
    except BaseException:
        try:
            office.place.take_back(aside)
        except (EntiDBError, OSError) as error:
            logger.error("database %s stays put aside as %s: %s", db_id, aside.id, error)
        raise


def copy_backup(source: Path, target: str, at: Callable[[str, int, int | None], None]) -> None:
    """Copy the backup at ``source`` to the new directory ``target``, durably. Raises
    ``ConfigError`` for what is no backup, ``OSError``."""
    data = source / _DATA
    if data.is_symlink() or not data.is_file():
        raise ConfigError(f"{source} is no backup of a database")
    above = os.path.dirname(target)
    make_folder(target, above)
    size = data.stat().st_size
    copy = os.open(os.path.join(target, _DATA), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(data, "rb") as reading, open(copy, "wb") as writing:
        give_owner(copy, os.stat(above))
        while piece := reading.read(_PIECE_BYTES):
            at("copying", writing.tell(), size)
            writing.write(piece)
        writing.flush()
        os.fsync(writing.fileno())
    sync_path(target)

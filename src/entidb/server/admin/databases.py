"""The databases of a server: list, create, freeze, rename, delete.

What is deleted is put aside for a day and can be taken back. Each change is made on a database that
is closed, and nothing can open it meanwhile.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

from msgspec import Struct

from entidb.db import Database, inspect
from entidb.errors import ConfigError, EntiDBError, PermissionDeniedError
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.config import check_db_id
from entidb.server.control import Frozen
from entidb.server.place import Aside, exists
from entidb.server.registry import About

logger = logging.getLogger("entidb.server")

#: Seconds that requests under way get before a change says that the database is in use.
WAIT_S: Final = 10.0


class DatabaseRow(Struct, omit_defaults=True):
    """A database. What is known of a closed one is as old as its last use; None: not known."""

    name: str
    open: bool
    #: Of its files.
    bytes: int
    devices: int
    entities: int | None = None
    head: int | None = None
    floor: int | None = None
    used_ms: int | None = None
    frozen: Frozen | None = None


def rows(office: Office, caller: Caller) -> list[DatabaseRow]:
    """All databases that ``caller`` may see, in order."""
    opened = office.opened()
    sizes = office.place.sizes()
    names = sorted(opened.keys() | sizes.keys())
    for name, used_at in opened.items():
        if office.registry.entities(name) is None:
            _look_at_new(office, name, used_at)
    return [_row(office, name, opened, sizes) for name in names if caller.sees(name)]


def _look_at_new(office: Office, db_id: str, used_at: float) -> None:
    """Note one that was opened since the last housekeeping. Of one that cannot be read the list
    says what it knows; whoever asks for it is told why."""
    with suppress(EntiDBError), office.stores.looking(db_id) as store:
        if store is not None:
            _note(office, db_id, store.database, _used_ms(office, used_at))


def row(office: Office, caller: Caller, db_id: str) -> DatabaseRow:
    """One database, opened for it, with its present figures. Raises ``PermissionDeniedError``."""
    caller.check(db_id)
    check_db_id(db_id)
    look(office, db_id)
    return _row(office, db_id, office.opened())


def _row_after(office: Office, db_id: str) -> DatabaseRow:
    """As ``row``, of one that was just made or taken back: that is so, also where it cannot be
    looked at, as on a disk that is full now."""
    try:
        look(office, db_id)
    except (EntiDBError, OSError) as error:
        logger.warning("database %s cannot be looked at: %s", db_id, error)
    return _row(office, db_id, office.opened())


def look(office: Office, db_id: str) -> About:
    """What there is to know of a database, which is opened for it."""
    used_at = office.stores.opened().get(db_id)
    known = office.registry.about(db_id)
    with office.stores.looking(db_id) as store:
        if store is not None:
            return _note(office, db_id, store.database, _used_ms(office, used_at))
    used_ms = office.clock.now_ms() if known is None else known.used_ms
    with office.stores.using(db_id, create=False) as store:
        return _note(office, db_id, store.database, used_ms)


def _note(office: Office, db_id: str, database: Database, used_ms: int) -> About:
    found = inspect(database)
    collections = found["collections"].values()
    about = About(
        used_ms=used_ms,
        head=found["sequence"],
        floor=found["floor"],
        entities=sum(each["entities"] for each in collections),
        synced=sum(each["entities"] for each in collections if each["synced"]),
        used_bytes=found["storage"]["used_bytes"],
    )
    office.registry.note(db_id, about)
    return about


def _used_ms(office: Office, used_at: float | None) -> int:
    now = office.clock.now_ms()
    return now if used_at is None else now - round(1000 * (office.clock.monotonic() - used_at))


def _row(
    office: Office, db_id: str, opened: dict[str, float], sizes: dict[str, int] | None = None
) -> DatabaseRow:
    about = office.registry.about(db_id)
    sizes = office.place.sizes(db_id) if sizes is None else sizes
    used = None if about is None else about.used_ms
    if db_id in opened:
        used = _used_ms(office, opened[db_id])
    return DatabaseRow(
        name=db_id,
        open=db_id in opened,
        bytes=sizes.get(db_id, 0),
        devices=len(office.registry.devices(db_id)),
        entities=None if about is None else about.entities,
        head=None if about is None else about.head,
        floor=None if about is None else about.floor,
        used_ms=used,
        frozen=office.control.decided.frozen.get(db_id),
    )


def remember(office: Office, seen: dict[str, float]) -> None:
    """Keep what is known of open databases that were used since the last time."""
    for name, used_at in office.stores.opened().items():
        if seen.get(name) != used_at:
            seen[name] = used_at
            with office.stores.looking(name) as store:
                if store is not None:
                    _remember(office, name, store.database, used_at)


def _remember(office: Office, db_id: str, database: Database, used_at: float) -> None:
    try:
        _note(office, db_id, database, _used_ms(office, used_at))
    except EntiDBError as error:
        # The next request of a device meets it too, and gets the error.
        logger.warning("database %s cannot be looked at: %s", db_id, error)


# ---------------------------------------------------------------- changes


def create(office: Office, caller: Caller, name: str) -> DatabaseRow:
    """Make a database. Raises ``ConfigError`` (exists), ``InvalidNameError``."""
    caller.check(name)
    check_db_id(name)
    with office.change(caller, "create", name), office.changing:
        if name in {each.name for each in rows(office, caller)}:
            raise exists(name)
        office.stores.make(name)
    return _row_after(office, name)


def freeze(office: Office, caller: Caller, db_id: str, reason: str = "") -> DatabaseRow:
    """Take no pushes any more; pulls go on."""
    caller.check(db_id)
    with office.change(caller, "freeze", db_id, reason=reason):
        office.require(db_id)
        frozen = Frozen(since_ms=office.clock.now_ms(), by=caller.who, reason=reason)
        office.control.freeze(db_id, frozen)
    return _row(office, db_id, office.opened())


def thaw(office: Office, caller: Caller, db_id: str) -> DatabaseRow:
    """Take pushes again."""
    caller.check(db_id)
    with office.change(caller, "thaw", db_id):
        office.require(db_id)
        office.control.freeze(db_id, None)
    return _row(office, db_id, office.opened())


def rename(office: Office, caller: Caller, db_id: str, to: str) -> DatabaseRow:
    """Give a database another name. Devices know it by the old one, and stop with
    ``history_changed`` until they are told. Raises ``ConfigError`` (exists),
    ``ServerBusyError``."""
    caller.check(db_id)
    caller.check(to)
    check_db_id(to)
    with office.change(caller, "rename", db_id, to=to), office.changing:
        office.require(db_id)
        with suppress(EntiDBError):  # a damaged one may have another name, too
            # Closed under its new name, it is known by these figures until it is used again.
            look(office, db_id)
        with office.stores.closed(db_id, WAIT_S), office.stores.closed(to, WAIT_S):
            if office.place.holds(to):
                raise exists(to)
            # First, or a server that ends here has nobody locked out of the new name.
            office.control.carry(db_id, to)
            office.server.images.renamed(db_id, to)
            office.registry.rename(db_id, to)
            try:
                office.place.rename(db_id, to)
            except BaseException:
                office.registry.rename(to, db_id)
                raise
            _forget(office, db_id)
    return _row(office, to, office.opened())


def delete(office: Office, caller: Caller, db_id: str, confirm: str) -> Aside:
    """Put a database aside, for a day. ``confirm`` is its name once more. Raises
    ``ConfigError`` (not_confirmed), ``ServerBusyError``."""
    caller.check(db_id)
    with office.change(caller, "delete", db_id), office.changing:
        check_confirmed(db_id, confirm)
        office.require(db_id)
        with office.stores.closed(db_id, WAIT_S):
            # Nobody has it open any more: what is noted of its devices now is all there is.
            office.registry.flush()
            office.others.gather()
            aside = office.place.put_aside(db_id, office.clock.now_ms())
            office.registry.rename(db_id, aside.id)
            try:
                office.control.rename(db_id, aside.id)
            except (EntiDBError, OSError) as error:
                # It holds for the name then, which is where it counts when this is taken back.
                logger.warning("what is decided about %s stays with the name: %s", db_id, error)
    return aside


def _forget(office: Office, name: str) -> None:
    """Nothing has this name any more. What was decided about it does no harm if it stays."""
    try:
        office.control.rename(name, None)
    except (EntiDBError, OSError) as error:
        logger.warning("what is decided about %s is still there: %s", name, error)


def check_confirmed(db_id: str, confirm: str) -> None:
    if confirm != db_id:
        raise ConfigError(
            f"this takes database {db_id!r} away from its devices: confirm it by its name",
            code="not_confirmed",
        )


# ---------------------------------------------------------------- aside


def all_aside(office: Office, caller: Caller) -> list[Aside]:
    """What can still be taken back, newest first."""
    found = [each for each in office.place.aside() if caller.sees(each.name)]
    return sorted(found, key=lambda each: -each.deleted_ms)


def take_back(office: Office, caller: Caller, identity: str) -> DatabaseRow:
    """Put a database that was deleted back under its name. Raises ``ConfigError`` (exists) if
    there is another one now, ``PermissionDeniedError`` (unknown_database)."""
    found = [each for each in all_aside(office, caller) if each.id == identity]
    if not found:
        raise PermissionDeniedError(
            f"no deleted database has the id {identity!r}: `deleted` lists those that can be taken "
            "back",
            code="unknown_database",
        )
    each = found[0]
    changed = office.change(caller, "undelete", each.name, id=each.id)
    with changed, office.changing, office.stores.closed(each.name, WAIT_S):
        if office.place.holds(each.name):
            raise ConfigError(
                f"there is a database {each.name!r} now: rename or delete that one first",
                code="exists",
            )
        office.control.carry(each.id, each.name)
        office.registry.rename(each.id, each.name)
        office.place.take_back(each)
        _forget(office, each.id)
    return _row_after(office, each.name)


def clear_aside(office: Office) -> None:
    """Remove for good what has waited for a day."""
    if not office.others.on_duty():
        return
    now = office.clock.now_ms()
    for each in office.place.aside():
        if now >= each.until_ms:
            office.place.remove(each)
            office.registry.rename(each.id, None)
            _forget(office, each.id)

"""Erase a person: everything that conditions find in a database, looked at first, then taken away
from the server, from its devices as far as they ask, and from the bytes of its files.

What is found is shown as counts with a token of exactly those entities; who gives the token back
erases these and no others. Neither log nor report has a value, or a condition.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from entidb.db import Database, inspect
from entidb.errors import ConfigError, EntiDBError, ProtocolError, StorageError
from entidb.server.admin import backups, care, databases
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office, OpenStore
from entidb.server.admin.tasks import Progress, Task
from entidb.server.config import check_db_id, directory_name
from entidb.storage.disk_errors import said_of

#: Entities of one erasure, and of one of its transactions.
ERASED_MAX: Final = 100_000
_BATCH: Final = 500
#: Devices that a report names.
_NAMED_MAX: Final = 1000

#: Conditions (``Where.from_dict``) by the names of collections.
Wanted = Mapping[str, dict[str, Any]]
#: Ids with the versions that were looked at, by the names of collections.
_Found = dict[str, list[tuple[uuid.UUID, int]]]


class Erasable(Struct):
    """What would be erased: so many entities of each collection. ``confirm`` stands for exactly
    these, as they are now."""

    collections: dict[str, int]
    entities: int
    confirm: str


def preview(office: Office, caller: Caller, db_id: str, wanted: Wanted) -> Erasable:
    """Look what ``erase`` would take; changes nothing. Raises ``PermissionDeniedError``,
    ``QueryError``, ``ProtocolError`` (not_found), ``ConfigError`` for more than ``ERASED_MAX``."""
    caller.check(db_id)
    check_db_id(db_id)
    office.require(db_id)
    with office.stores.lasting(db_id) as store:
        return _preview(db_id, _find(store.database, wanted))


def erase(
    office: Office,
    caller: Caller,
    db_id: str,
    wanted: Wanted,
    confirm: str,
    *,
    with_backups: bool = False,
) -> Task:
    """Have it done; ``confirm`` is from ``preview``. With ``with_backups`` the backups go that
    still have one of the entities. A task that fails, or is cancelled, is made whole by another
    erasure with the same conditions, also where that finds nothing any more.

    Raises as ``preview``, and ``ConfigError`` (not_confirmed) where other entities are found now,
    or others in their place."""
    caller.check(db_id)
    check_db_id(db_id)
    office.require(db_id)
    with office.stores.lasting(db_id) as store:
        found = _find(store.database, wanted)
    seen = _preview(db_id, found)
    names = ",".join(sorted(found))
    with office.begin(caller, "erase", db_id, entities=str(seen.entities), collections=names):
        if confirm != seen.confirm:
            raise ConfigError(
                f"this erases {seen.entities} entities of {db_id!r}, and is confirmed by what "
                "the preview of exactly these says: look at it again",
                code="not_confirmed",
            )
        return office.tasks.add(
            "erase",
            caller.who,
            db_id,
            lambda progress: _erase(office, db_id, found, with_backups, progress),
        )


# ---------------------------------------------------------------- found


def _find(database: Database, wanted: Wanted) -> _Found:
    if not wanted:
        raise ProtocolError("say in which collections, and what to erase there")
    known = inspect(database)["collections"]
    found: _Found = {}
    total = 0
    for name, given in wanted.items():
        if name not in known:
            raise ProtocolError("this database has no such collection", code="not_found")
        if not given:
            raise ProtocolError("a condition has to say something: none would mean everything")
        entities = database.collection(name)
        query = entities.where.from_dict(given).limit(ERASED_MAX + 1 - total)
        found[name] = sorted((key, entities.info(key).version) for key, _ in query)
        total += len(found[name])
        if total > ERASED_MAX:
            raise ConfigError(
                f"more than {ERASED_MAX} entities are found: erase them in several parts"
            )
    return found


def _preview(db_id: str, found: _Found) -> Erasable:
    digest = sha256(db_id.encode())
    for name in sorted(found):
        digest.update(f"\n{name}".encode())
        for key, version in found[name]:
            digest.update(b"\n" + key.bytes + b"%d" % version)
    counts = {name: len(each) for name, each in found.items()}
    return Erasable(counts, sum(counts.values()), digest.hexdigest()[:32])


# ---------------------------------------------------------------- erased


def _erase(
    office: Office, db_id: str, found: _Found, with_backups: bool, progress: Progress
) -> dict[str, Any]:
    with office.stores.using(db_id, create=False) as store:
        erased = _delete(store, found, progress)
        head = store.database.read_head().sequence
        left = getattr(store.database.storage, "left_by_compact", ())
    try:
        office.server.images.drop(db_id)
        office.others.drop_images()
        office.others.gather()
        behind = [each for each in office.registry.devices(db_id) if each.cursor < head]
        purged = care.purge_now(office, db_id, 0.0, progress)
        sizes = care.compact_now(office, db_id, progress)
    except (EntiDBError, OSError) as error:
        said = said_of(error, "cleaning up") if isinstance(error, OSError) else error
        raise StorageError(
            f"the entities are deleted, and bytes of them may still be in the files, in images and "
            f"in backups, because what follows their deletion failed: {said}; erase once more with "
            "the same conditions, which goes on from there",
            code="not_compacted",
        ) from error
    progress.at("looking through backups")
    backups.clear_all(office)
    kept = _backups_with(office, db_id, found)
    if with_backups:
        for path in kept:
            backups.remove(path.parent, path.name)
    named = [path.name for path in kept]
    return {
        "erased": erased,
        "head": head,
        "floor": purged["floor"],
        **sizes,
        "storage_may_keep_it": list(left),
        "images_may_hold_it": office.server.images.left(db_id),
        "devices_that_pull_anew": len(behind),
        "devices_that_may_hold_it": [each.device_id for each in behind[:_NAMED_MAX]],
        "backups_removed": named if with_backups else [],
        "backups_with_it": [] if with_backups else named,
        "deleted_databases_with_it": [
            each.id
            for each in databases.all_aside(office, Caller("the server", "local"))
            if each.name == db_id and _has(partial(office.place.open_aside, each), found)
        ],
    }


def _delete(store: OpenStore, found: _Found, progress: Progress) -> dict[str, int]:
    places = [(name, key) for name, each in found.items() for key, _ in each]
    erased = dict.fromkeys(found, 0)
    for at in range(0, len(places), _BATCH):
        progress.at("deleting", at, len(places))
        store.check()
        with store.database.transaction() as tx:
            for name, key in places[at : at + _BATCH]:
                entities = tx.collection(name)
                if key in entities:  # a device may have been quicker
                    del entities[key]
                    erased[name] += 1
    progress.at("deleting", len(places), len(places))
    return erased


def _backups_with(office: Office, db_id: str, found: _Found) -> list[Path]:
    where = office.server.config.backup_dir
    if where is None:
        return []
    folder = Path(where) / directory_name(db_id)
    paths = [folder / row.id for row in backups.rows_in(folder, db_id)]
    return [path for path in paths if _has(partial(Database.open, path, read_only=True), found)]


def _has(open_copy: Callable[[], Database], found: _Found) -> bool:
    """Whether the database that ``open_copy`` opens has one of the entities, or cannot say."""
    try:
        with open_copy() as copy:
            known = inspect(copy)["collections"]
            return any(
                key in copy.collection(name)
                for name, each in found.items()
                if name in known
                for key, _ in each
            )
    except EntiDBError:
        return True

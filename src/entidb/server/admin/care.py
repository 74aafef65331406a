"""Care of a database that is served, as tasks: verify, compact, purge."""

from __future__ import annotations

import os
import secrets
import tempfile
from typing import Any, Final

from entidb.db import purge_tombstones
from entidb.db.maintenance import read_floor, sequence_at
from entidb.errors import ConfigError, CorruptionError
from entidb.server.admin.callers import Caller
from entidb.server.admin.checking import check
from entidb.server.admin.databases import WAIT_S
from entidb.server.admin.office import Office
from entidb.server.admin.tasks import Progress, Task
from entidb.server.config import check_db_id
from entidb.server.directory import CHECKED
from entidb.storage.partial import Partial, remove_dead

_DAY_MS: Final = 24 * 3600 * 1000
#: Parts of a purge, after each of which it can be cancelled.
_PARTS: Final = 20


def verify(office: Office, caller: Caller, db_id: str) -> Task:
    """Have a copy of a database checked, as it is at one moment; there has to be room for it. The
    task fails if there are faults, and names the first."""
    caller.check(db_id)
    check_db_id(db_id)
    with office.begin(caller, "verify", db_id):
        office.require(db_id)
        return office.tasks.add(
            "verify", caller.who, db_id, lambda progress: _verify(office, db_id, progress)
        )


def _verify(office: Office, db_id: str, progress: Progress) -> dict[str, Any]:
    with _room_for_copy(office) as copy:
        progress.at("copying")
        with office.stores.lasting(db_id) as store:
            store.database.backup(copy.path)
        found = check(copy.path, lambda: progress.at("checking"))
    if found.faults:
        raise CorruptionError(
            f"{db_id} has {len(found.faults)} faults: {found.faults[0]}; restore a backup"
        )
    return {"head": found.head, "entities": found.entities}


def _room_for_copy(office: Office) -> Partial:
    """Room for a copy, beside the databases if those are in files; else among the temporary files
    of the system, under a name that nobody knows before."""
    if office.place.root is None:
        folder = tempfile.gettempdir()
        remove_dead(folder)
        return Partial(os.path.join(folder, f"{CHECKED}-{secrets.token_hex(8)}"), "verification")
    return Partial(str(office.place.root / CHECKED), "verification")


def compact(office: Office, caller: Caller, db_id: str) -> Task:
    """Have unused room given back to the file system. There has to be room for a copy, and
    requests to the database wait; once begun it is not cancelled."""
    caller.check(db_id)
    check_db_id(db_id)
    with office.begin(caller, "compact", db_id):
        office.require(db_id)
        return office.tasks.add(
            "compact", caller.who, db_id, lambda progress: compact_now(office, db_id, progress)
        )


def compact_now(office: Office, db_id: str, progress: Progress) -> dict[str, Any]:
    """The body of ``compact``, for tasks that end with it."""
    progress.at("compacting")
    alone, still = office.stores.elsewhere(db_id, WAIT_S), office.server.images.resting(db_id)
    with office.stores.using(db_id, create=False) as store, alone, still:
        before = store.database.storage.info().file_bytes
        store.database.compact()
        return {"before_bytes": before, "after_bytes": store.database.storage.info().file_bytes}


def purge(office: Office, caller: Caller, db_id: str, days: float | None = None) -> Task:
    """Have deletions forgotten that are older than ``days`` (None: as the server's retention says).
    Devices that were away for longer pull everything anew (R28). While a device may be on its way
    with an image, nothing behind that is forgotten (R35)."""
    caller.check(db_id)
    check_db_id(db_id)
    kept = office.server.config.tombstone_retention_days if days is None else days
    if not 0 <= kept < 100_000:
        raise ConfigError("days is a number from 0 on")
    with office.begin(caller, "purge", db_id, days=f"{kept:g}"):
        office.require(db_id)
        return office.tasks.add(
            "purge", caller.who, db_id, lambda progress: purge_now(office, db_id, kept, progress)
        )


def purge_now(office: Office, db_id: str, days: float, progress: Progress) -> dict[str, Any]:
    """The body of ``purge``, for tasks that go on after it."""
    progress.at("purging", 0, _PARTS)
    purged = 0
    with office.stores.using(db_id, create=False) as store:
        database = store.database
        up_to = database.read_head().sequence
        if days:
            up_to = sequence_at(database, office.clock.now_ms() - round(days * _DAY_MS))
        for part in range(1, _PARTS + 1):
            target = up_to * part // _PARTS
            store.check()
            if target:
                purged += purge_tombstones(database, target)
            progress.at("purging", part, _PARTS)
        with database.view() as view:
            floor = read_floor(view)
    return {"purged": purged, "floor": floor}

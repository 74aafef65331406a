"""Whether a server should be given work: its disk can be written and has room, and its backups are
young enough. What the answer to a stranger may say: one word for each reason, and what whoever
runs the server does about it, without a name of a database, a directory or a person.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable
from typing import Final

from entidb.server.admin.office import Office

logger = logging.getLogger("entidb.server")

#: Seconds for which one look counts, however many ask.
LOOK_S: Final = 5.0
#: What to do about each reason. Another process of this server may name one that this one does not
#: know, while a newer version is started.
_TO_DO: Final = {
    "stopping": "nothing: this process ends, and answers nothing new; ask the one that comes next",
    "storage": "the data directory cannot be written to: see whether its disk is there, not "
    "read-only and not full, and belongs to the user of the server (entidb doctor)",
    "disk": "less is free on the disk of the data directory than ready_disk_bytes_min: make room "
    "there, compact databases that shrank (entidb admin compact), or lower that setting",
    "backups": "the newest good backup of a database is twice as old as backup_every_s: see the "
    "log for what went wrong and the room in backup_dir, then make them now (entidb admin backup "
    "--all); entidb admin backups says which are there",
}
_STORAGE_FAR: Final = (
    "PostgreSQL does not answer, or takes no writes: see whether it runs, is no standby, and lets "
    "this server in (entidb doctor with its address); it goes on by itself when that is so"
)


class Readiness:
    """Asked from any thread; not from the event loop, because it waits for the disk."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._reasons: tuple[str, ...] = ()

    def reasons(self) -> tuple[str, ...]:
        """Why not: ``storage``, ``disk``, ``backups``; empty if it is ready."""
        with self._lock:
            now = self._office.clock.monotonic()
            if self._looked_at is None or now - self._looked_at >= LOOK_S:
                found = tuple(self._look())
                if found and found != self._reasons:
                    said = map(": ".join, zip(found, self.to_do(found), strict=True))
                    logger.warning("the server is not ready: %s", "; ".join(said))
                self._looked_at, self._reasons = now, found
            return self._reasons

    def to_do(self, reasons: Iterable[str]) -> list[str]:
        """For each of them, what whoever runs the server does about it."""
        told = _TO_DO
        if self._office.server.config.address is not None:
            told = {**told, "storage": _STORAGE_FAR}
        return [told.get(each, "see the log of the server") for each in reasons]

    def _look(self) -> list[str]:
        found = []
        config, place = self._office.server.config, self._office.place
        why = place.check()
        if why is not None:
            found.append(why)
        elif place.root is not None:
            try:
                if shutil.disk_usage(place.root).free < config.ready_disk_bytes_min:
                    found.append("disk")
            except OSError:
                found.append("storage")
        if self._office.late_backups:
            found.append("backups")
        return found

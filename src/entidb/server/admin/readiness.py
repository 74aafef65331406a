"""Whether a server should be given work: its disk can be written and has room, and its backups are
young enough. What the answer to a stranger may say, in one word for each reason.
"""

from __future__ import annotations

import logging
import shutil
import threading
from typing import Final

from entidb.server.admin.office import Office

logger = logging.getLogger("entidb.server")

#: Seconds for which one look counts, however many ask.
LOOK_S: Final = 5.0


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
                    logger.warning("the server is not ready: %s", ", ".join(found))
                self._looked_at, self._reasons = now, found
            return self._reasons

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

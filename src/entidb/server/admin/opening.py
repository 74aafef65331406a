"""The office of a server: one for each, opened when it is first asked for, with the chores of all
rooms.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Final

from entidb.server.admin import databases
from entidb.server.admin.backups import Schedule, clear_left
from entidb.server.admin.office import Office, Served

_LOCK: Final = threading.Lock()


def office_of(server: Served) -> Office:
    """The office of ``server``. From any thread."""
    with _LOCK:
        if not isinstance(server.office, Office):
            server.office = office = Office(server)
            office.chores.append(partial(clear_left, office, set()))
            office.chores.append(partial(databases.clear_aside, office))
            office.chores.append(partial(databases.remember, office, {}))
            office.chores.append(Schedule(office))
        return server.office

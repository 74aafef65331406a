"""How a server is doing, in one answer: what a page that watches it asks for every two seconds."""

from __future__ import annotations

import os
import shutil

from msgspec import Struct

from entidb.server.admin.callers import Caller
from entidb.server.admin.office import NodeRow, Office
from entidb.server.admin.summary import ServerSummary
from entidb.server.pulse import Beat
from entidb.version import VERSION


class Overview(Struct):
    """Times are milliseconds since 1970. ``memory_bytes`` is what the process has of it, None
    where the system does not say; the disk is that of the data directory. ``beats`` are the last
    minutes of this process, two seconds each; empty where the server shows no console. ``nodes``
    are the processes of the server, for who administers all of it."""

    version: str
    process: int
    now_ms: int
    since_ms: int
    memory_bytes: int | None
    disk_free_bytes: int | None
    disk_bytes: int | None
    open_databases: int
    fleet: ServerSummary
    waiting: int
    in_flight_bytes: int
    tasks: int
    tasks_failed: int
    late_backups: list[str]
    backups: bool
    everything: bool
    nodes: list[NodeRow]
    beats: list[Beat]


def overview(office: Office, caller: Caller, fleet: ServerSummary, since_ms: int = 0) -> Overview:
    """``fleet`` is what ``caller`` may see of all devices; ``beats`` are those after
    ``since_ms``. Who administers some databases sees those counted, and the figures of the whole
    process, which name nobody."""
    pulse = office.pulse
    free, size = _disk(office)
    tasks = [each for each in office.tasks.all() if caller.sees(each.database)]
    return Overview(
        version=VERSION,
        process=os.getpid(),
        now_ms=office.clock.now_ms(),
        since_ms=office.opened_ms,
        memory_bytes=_memory_bytes(),
        disk_free_bytes=free,
        disk_bytes=size,
        open_databases=sum(map(caller.sees, office.opened())),
        fleet=fleet,
        waiting=0 if pulse is None else pulse.gauges.waiting(),
        in_flight_bytes=0 if pulse is None else pulse.gauges.in_flight_bytes(),
        tasks=sum(each.ended_ms is None for each in tasks),
        tasks_failed=sum(each.state == "failed" for each in tasks),
        late_backups=[each for each in office.late_backups if caller.sees(each)],
        backups=office.server.config.backup_dir is not None,
        everything=caller.databases is None,
        nodes=office.nodes() if caller.databases is None else [],
        beats=[] if pulse is None else pulse.beats(since_ms),
    )


def _disk(office: Office) -> tuple[int | None, int | None]:
    if office.place.root is None:
        return None, None
    try:
        usage = shutil.disk_usage(office.place.root)
    except OSError:
        return None, None  # the answer is about more than the disk
    return usage.free, usage.total


def _memory_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")

"""What there is to know of a PostgreSQL server before or while nodes use it. Nothing is written,
and no table is made.

Not here: whether that is good or bad, except for what no store is opened without (``schema``).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo

from entidb.storage.postgres.failures import as_ours
from entidb.storage.postgres.node import parts_of, without_secret
from entidb.storage.postgres.schema import DURABLE, FORMAT, HELD, SEAT, format_of

_OPTIONS: Final[dict[str, Any]] = {
    "target_session_attrs": "read-write",
    "connect_timeout": 3,
    "application_name": "entidb doctor",
}
_ASKED: Final = """
SELECT current_setting('server_version'), current_setting('synchronous_standby_names'),
    (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')),
    current_setting('max_connections')::int
        - current_setting('superuser_reserved_connections')::int,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
    current_setting('autovacuum') = 'on',
    coalesce((SELECT extract(epoch FROM max(now() - xact_start)) FROM pg_stat_activity
        WHERE backend_type = 'client backend'), 0)::float8,
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint,
    coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)
"""
#: How many nodes live.
_LIVING: Final = (
    f"SELECT count(*) FROM entidb_node n WHERE EXISTS (SELECT 1 {HELD} {SEAT} "
    "AND l.objid::bigint = n.number)"
)


@dataclass(frozen=True)
class ServerFacts:
    """See the module. ``where`` is the address without its password; ``format`` is None where there
    are no tables; ``undurable`` has name, value and right value of settings with which a commit can
    be lost; ``oldest_s`` is for how long the oldest transaction has been open; ``nodes`` live."""

    where: str
    undurable: list[tuple[str, str, str]]
    format: int | None
    nodes: int
    version: str
    wants_standby: str
    standbys: int
    connections_max: int
    connections: int
    autovacuum: bool
    oldest_s: float
    now_ms: int
    may_make: bool
    newest_format: int = FORMAT


def examine(address: str) -> ServerFacts:
    """Raises ``ConfigError``, ``StorageError``."""
    where = without_secret(address)
    given = make_conninfo(**(_OPTIONS | parts_of(address)))
    with (
        as_ours(f"looking at {where}"),
        contextlib.closing(psycopg.connect(given, autocommit=True)) as connection,
    ):
        undurable = []
        for name, good in DURABLE.items():
            ((has,),) = connection.execute("SELECT current_setting(%s)", (name,)).fetchall()
            if has not in good:
                undurable.append((name, has, good[0]))
        found, nodes = format_of(connection), 0
        if found is not None and found >= 2:
            ((nodes,),) = connection.execute(_LIVING.encode()).fetchall()
        (row,) = connection.execute(_ASKED.encode()).fetchall()
    return ServerFacts(where, undurable, found, nodes, *row)


__all__ = ["ServerFacts", "examine"]

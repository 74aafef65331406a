"""What the doctor looks at where a server keeps its databases in PostgreSQL. Nothing is written
there, and no table is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from entidb.cli.doctor_directory import config_found, parsed
from entidb.cli.doctor_findings import Finding, ok, problem, skipped, warning
from entidb.cli.output import plural
from entidb.errors import EntiDBError
from entidb.storage.addresses import whole
from entidb.storage.opening import examine_server
from entidb.types import SystemClock

#: Connections of a node, and of whoever looks after PostgreSQL.
_NODE: Final = 20
_OTHERS: Final = 10
#: Seconds by which the clocks of this machine and of PostgreSQL may differ.
_APART_S: Final = 5
#: Seconds for which a transaction may be open before it keeps old rows alive.
_OPEN_S: Final = 3600


def look_at(address: str, settings: Sequence[str]) -> list[Finding]:
    """Raises ``ConfigError`` for the address of one database of a server, and what ``serve`` raises
    for settings it does not know."""
    given = parsed(whole(address), settings)
    config, found = config_found(given)
    try:
        facts = examine_server(address)
    except EntiDBError as error:
        return [*found, problem("postgresql", str(error), "mend that, and look again")]
    found.append(ok("postgresql", f"PostgreSQL {facts.version} at {facts.where} takes writes"))
    found += [
        problem("durable", f"{name} is {has}", f"set it to {good}: no node starts otherwise")
        for name, has, good in facts.undurable
    ] or [ok("durable", "what was acknowledged is on its disk")]
    found += _tables(facts.format, facts.newest_format, facts.may_make)
    found += _standby(facts.wants_standby, facts.standbys)
    found += _connections(facts.connections_max, facts.connections, facts.nodes)
    found += _care(facts.autovacuum, facts.oldest_s)
    apart = facts.now_ms - SystemClock().now_ms()
    if abs(apart) > 1000 * _APART_S:
        says = f"that of PostgreSQL is {apart / 1000:+,.0f} s from this machine's"
        found.append(warning("clock", says, "set both clocks, and keep them with NTP"))
    else:
        found.append(ok("clock", "it is that of PostgreSQL"))
    if config is not None and config.backup_dir is None:
        says = "EntiDB makes none with these settings"
        found.append(skipped("backups", f"{says}; those of PostgreSQL are not seen from here"))
    return found


def _tables(found: int | None, newest: int, may_make: bool) -> Iterator[Finding]:
    if found is None or found < newest:
        says = "they are not there yet" if found is None else f"they have format {found}"
        if may_make:
            yield ok("tables", f"{says}; the first node makes those of format {newest}")
        else:
            change = "`entidb init ADDRESS` as a user who may make tables"
            yield problem("tables", f"{says}, and this user may not make them", change)
    elif found > newest:
        says = f"they have format {found}, of a newer EntiDB"
        yield problem("tables", says, "install that one here, too")
    else:
        yield ok("tables", f"they have format {found}")


def _standby(wanted: str, there: int) -> Iterator[Finding]:
    if not wanted:
        says = "none is synchronous: what was acknowledged is gone if this server is lost for good"
        yield warning("standby", says, "set synchronous_standby_names, if you have a standby")
    elif not there:
        says = f"synchronous_standby_names is {wanted!r}, and no such standby is connected"
        yield problem("standby", says, "start it: until then every commit waits")
    else:
        yield ok("standby", f"{plural(there, 'synchronous standby')} connected")


def _connections(most: int, used: int, nodes: int) -> Iterator[Finding]:
    need = max(nodes, 1) * _NODE + _OTHERS
    says = f"{used:,} of {most:,} are in use; {plural(nodes, 'node')} of EntiDB there"
    if most < need:
        change = f"set max_connections to {need} or more, {_NODE} for each node"
        yield warning("connections", says, change)
    else:
        yield ok("connections", says)


def _care(autovacuum: bool, oldest_s: float) -> Iterator[Finding]:
    if not autovacuum:
        yield problem("autovacuum", "it is off, and tables only grow", "set autovacuum to on")
    elif oldest_s > _OPEN_S:
        says = f"a transaction has been open for {oldest_s / 3600:,.1f} h, and keeps it from work"
        yield warning("autovacuum", says, "look in pg_stat_activity, and end it")
    else:
        yield ok("autovacuum", "it is on, and nothing is in its way")


__all__ = ["look_at"]

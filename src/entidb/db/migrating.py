"""Rewriting a collection in its newest shape: once, where all devices get it from.

Devices need none of this, they read through ``upgrade`` (``reading``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from entidb.db.codec import located
from entidb.db.database import Database
from entidb.db.local import Role
from entidb.db.reading import Upgrade, check_function, upgraded
from entidb.db.rows import Pair
from entidb.errors import ConfigError, ScopeError, ValueTypeError
from entidb.types import OPERATION_OVERHEAD_BYTES, check_name, kind_name, repr_of

#: Entities of one transaction: so many devices pull together, and so long writers wait.
BATCH: Final = 500
_BATCH_MAX: Final = 100_000


@dataclass(frozen=True)
class Migrated:
    """What ``migrate`` did: entities it looked at, those it rewrote, and in how many
    transactions."""

    entities: int
    rewritten: int
    transactions: int


def migrate(
    database: Database,
    name: str,
    upgrade: Upgrade,
    *,
    batch: int = BATCH,
    dry_run: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Migrated:
    """Store what ``upgrade`` makes of each entity of collection ``name``, in ordinary transactions
    of at most ``batch`` entities; those that it leaves as they are are not written.

    For a server's database, whose devices pull the new shapes, and for data that stays where it is.
    May be cut off at any point: what was committed stays, and another run passes over it. Meanwhile
    others may write. ``progress`` is called with the number of entities looked at so far.

    Raises ``ScopeError`` on a device that synchronises this collection, where every device would
    be in conflict with every other; ``ValueTypeError`` for an entity that cannot be upgraded, or
    that ``upgrade`` changes a second time, with its id: that entity's transaction is not written,
    those before it are. ``dry_run`` finds them all without writing. ``ConfigError`` for settings.
    """
    check_name(name)
    check_function("upgrade", upgrade, "the stored value")
    given: object = batch
    if type(given) is not int or not 1 <= given <= _BATCH_MAX:
        raise ConfigError(f"batch is a number from 1 to {_BATCH_MAX}, not {repr_of(given, 60)}")
    _check_place(database, name)
    entities = rewritten = transactions = 0
    size_max = database.transaction_bytes_max // 2
    start = b""
    while True:
        found, looked, last = _next_to_write(database, name, upgrade, start, batch, size_max)
        entities += looked
        if found and not dry_run:
            written = _rewrite(database, name, upgrade, found)
            rewritten, transactions = rewritten + written, transactions + bool(written)
        elif found:
            rewritten += len(found)
        if progress is not None:
            progress(entities)
        if last is None:
            return Migrated(entities, rewritten, transactions)
        start = last + b"\0"


def _check_place(database: Database, name: str) -> None:
    given: object = database
    if not isinstance(given, Database):
        raise ConfigError(f"migrate takes a Database, not {kind_name(given)}")
    if database.role is Role.SERVER:
        return
    with database.view() as view:
        info = view.catalogue.by_name.get(name)
        met = view.sync_state.history is not None
    if met and (info is None or info.synced):
        raise ScopeError(
            f"{name!r} synchronises with a server: rewrite it there, once, and devices pull it. On "
            "every device it would be in conflict with the others; read it with upgrade instead"
        )


def _next_to_write(
    database: Database, name: str, upgrade: Upgrade, start: bytes, batch: int, size_max: int
) -> tuple[list[bytes], int, bytes | None]:
    """Ids of the next entities from ``start`` that have another shape, how many were looked at,
    and the last of these; None if it was the last of all."""
    found: list[bytes] = []
    looked = size = 0
    with database._open_rows() as rows:
        pairs: Iterator[Pair] = rows.pairs(name, start, None, False)
        for raw, payload in islice(pairs, _LOOKED_MAX):
            looked += 1
            made = _settled(name, raw, upgrade, payload)
            if made != payload:
                found.append(raw)
                size += len(made) + OPERATION_OVERHEAD_BYTES
                if len(found) >= batch or size >= size_max:
                    return found, looked, raw
        if looked < _LOOKED_MAX:
            return found, looked, None
        return found, looked, raw


#: Entities looked at between two commits, and with one snapshot.
_LOOKED_MAX: Final = 10_000


def _rewrite(database: Database, name: str, upgrade: Upgrade, ids: list[bytes]) -> int:
    """Rewrite ``ids``, as they are by now."""
    written = 0
    with database.transaction() as tx:
        for raw in ids:
            payload = tx._stored(name, raw)
            made = None if payload is None else _settled(name, raw, upgrade, payload)
            if made is not None and made != payload:
                tx._stage(name, raw, made)
                written += 1
    return written


def _settled(name: str, raw: bytes, upgrade: Upgrade, payload: bytes) -> bytes:
    try:
        made = upgraded(upgrade, payload)
        if made != payload and upgraded(upgrade, made) != made:
            reason = "upgrade changes what it has made a second time"
            raise ValueTypeError(
                f"{reason}, so it cannot be run twice: let it give the newest shape back as it is",
                reason=reason,
            )
    except ValueTypeError as error:
        raise located(error, name, raw) from error
    return made


__all__ = ["BATCH", "Migrated", "migrate"]

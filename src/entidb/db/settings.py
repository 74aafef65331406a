"""What the settings and arguments of a database may be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from entidb.db.local import Role
from entidb.db.writer import STALE_ROWS_MAX
from entidb.errors import (
    ConfigError,
)
from entidb.types import (
    SEQUENCE_MAX,
    TRANSACTION_BYTES_MAX,
    Clock,
    check_clock,
    check_int,
    check_name,
    check_number,
    repr_of,
)

#: Bounds that only keep a typo from going unnoticed; ``map_bytes``: what a process can address.
_MAP_BYTES_MAX = 1 << 46
_TRANSACTION_BYTES_LIMIT = 1 << 30
_BUSY_TIMEOUT_MAX_S = 7 * 24 * 3600.0
_STALE_ROWS_LIMIT = 10_000_000


def check_settings(
    *,
    role: object = None,
    map_bytes: int | None = None,
    transaction_bytes_max: int = TRANSACTION_BYTES_MAX,
    busy_timeout_s: float = 0.0,
    stale_rows_max: int = STALE_ROWS_MAX,
    clock: Clock | None = None,
    **others: Any,
) -> None:
    """Raises ``ConfigError``; the constructor checks ``others``."""
    if role is not None and not isinstance(role, Role):
        raise ConfigError(f"role is Role.DEVICE or Role.SERVER, not {repr_of(role, 60)}")
    if map_bytes is not None:
        check_int("map_bytes", map_bytes, 1, _MAP_BYTES_MAX)
    check_int("transaction_bytes_max", transaction_bytes_max, 1, _TRANSACTION_BYTES_LIMIT)
    check_number("busy_timeout_s", busy_timeout_s, 0.0, _BUSY_TIMEOUT_MAX_S)
    check_int("stale_rows_max", stale_rows_max, 0, _STALE_ROWS_LIMIT)
    check_clock(clock)


def cursor_of(after: int) -> int:
    """Where a feed begins that is to give what is after ``after``. Raises ``ConfigError``."""
    given: object = after
    if not isinstance(given, int) or isinstance(given, bool):
        raise ConfigError(
            f"after must be the number of a commit, as `cursor` gives it, not {repr_of(given, 60)}"
        )
    return min(max(given, 0), SEQUENCE_MAX)


def names_of(collections: Iterable[str]) -> frozenset[str]:
    """Raises ``ConfigError``, ``InvalidNameError``."""
    if isinstance(collections, str | bytes) or not isinstance(collections, Iterable):
        raise ConfigError(
            f"collections must be several names or None, not {repr_of(collections, 60)}: write "
            "('notes',)"
        )
    names = list(collections)
    for name in names:
        check_name(name)
    return frozenset(names)

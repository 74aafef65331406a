"""The policies that decide about an entity as a whole and look at no value (R26, R27)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from entidb.errors import ConfigError
from entidb.sync.conflict import (
    ACCEPT_REMOTE,
    KEEP_LOCAL,
    SKIP,
    Conflict,
    ConflictPolicy,
    ConflictResolution,
)


def server_wins(conflict: Conflict, /) -> ConflictResolution:
    """The server's value, always. What the device wrote goes to ``discarded``."""
    return ACCEPT_REMOTE


def client_wins(conflict: Conflict, /) -> ConflictResolution:
    """The device's value, always. With several such devices the last one to sync wins."""
    return KEEP_LOCAL


def last_write_wins(conflict: Conflict, /) -> ConflictResolution:
    """The later of the two by (timestamp, device id); the server's when they are equal (R27)."""
    local = (conflict.local_timestamp, conflict.local_device)
    remote = (conflict.remote_timestamp, conflict.remote_device)
    return KEEP_LOCAL if local > remote else ACCEPT_REMOTE


def manual(conflict: Conflict, /) -> ConflictResolution:
    """A person decides: the transaction is held until ``resolve()`` is called."""
    return SKIP


#: By name. A merge need not build a field's conflict for them.
WHOLE: Final[Mapping[str, ConflictPolicy]] = MappingProxyType(
    {
        "server_wins": server_wins,
        "client_wins": client_wins,
        "last_write_wins": last_write_wins,
        "manual": manual,
    }
)
#: Every name that a configuration can use, that of ``merging`` too.
POLICY_NAMES: Final = (*WHOLE, "merge")


def no_such_policy(name: str) -> ConfigError:
    """The error for a name that is none of ``POLICY_NAMES``."""
    return ConfigError(f"no policy is named {name!r}; there are {', '.join(POLICY_NAMES)}")

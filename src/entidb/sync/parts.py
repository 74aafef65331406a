"""What an engine is made of: whether the parts fit, and the applier of a database."""

from __future__ import annotations

from entidb.db import Database
from entidb.errors import ConfigError
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.config import SyncConfig
from entidb.types import kind_name


def check_parts(config: object, transport: object, applier: object) -> None:
    """Raises ``ConfigError``: what stands in the wrong place would be noticed in a cycle."""
    if not isinstance(config, SyncConfig):
        raise ConfigError(f"config must be a SyncConfig, not {kind_name(config)}")
    if not isinstance(transport, str) and not callable(getattr(transport, "send", None)):
        raise ConfigError(
            f"transport must be the URL of a server or a SyncTransport, not {kind_name(transport)}"
        )
    if not isinstance(applier, Database | DatabaseApplier):
        raise ConfigError(
            f"applier must be a Database or a DatabaseApplier, not {kind_name(applier)}"
        )


def applier_of(database: Database, config: SyncConfig) -> DatabaseApplier:
    return DatabaseApplier(
        database,
        default_policy=config.default_policy,
        policies=config.policies,
        overruled_max=config.overruled_max,
        staged_bytes_max=config.staged_bytes_max,
        overruled_days=config.overruled_days,
        prove=config.prove,
    )


__all__ = ["applier_of", "check_parts"]

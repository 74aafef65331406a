"""The server: databases behind tokens, as an object (``SyncServer``) and as an ASGI app.

Everything is loaded when it is first used; most of it needs the packages of the ``server`` extra,
and says so if they are missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from entidb.lazy import lazy_names

if TYPE_CHECKING:
    from entidb.server.app import SyncApp, create_app
    from entidb.server.auth import (
        Authenticator,
        Grants,
        JwtAuthenticator,
        Rights,
    )
    from entidb.server.config import ServerConfig
    from entidb.server.copying import copy_server
    from entidb.server.group_commit import GroupCommitter
    from entidb.server.hooks import (
        Grant,
        Refusal,
        ValidateContext,
        ValidateHook,
        ValidateOperation,
        ValidateTransaction,
    )
    from entidb.server.minting import mint_token
    from entidb.server.renewing import renew
    from entidb.server.run import Listen, serve, serving
    from entidb.server.server import SyncServer
    from entidb.server.service import DatabaseService

_HOMES: Final[dict[str, tuple[str, ...]]] = {
    "entidb.server.app": ("SyncApp", "create_app"),
    "entidb.server.auth": ("Authenticator", "Grants", "JwtAuthenticator", "Rights"),
    "entidb.server.config": ("ServerConfig",),
    "entidb.server.copying": ("copy_server",),
    "entidb.server.group_commit": ("GroupCommitter",),
    "entidb.server.hooks": (
        "Grant",
        "Refusal",
        "ValidateContext",
        "ValidateHook",
        "ValidateOperation",
        "ValidateTransaction",
    ),
    "entidb.server.minting": ("mint_token",),
    "entidb.server.renewing": ("renew",),
    "entidb.server.run": ("Listen", "serve", "serving"),
    "entidb.server.server": ("SyncServer",),
    "entidb.server.service": ("DatabaseService",),
}
_HOME_OF, __getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())

__all__ = [
    "Authenticator",
    "DatabaseService",
    "Grant",
    "Grants",
    "GroupCommitter",
    "JwtAuthenticator",
    "Listen",
    "Refusal",
    "Rights",
    "ServerConfig",
    "SyncApp",
    "SyncServer",
    "ValidateContext",
    "ValidateHook",
    "ValidateOperation",
    "ValidateTransaction",
    "copy_server",
    "create_app",
    "mint_token",
    "renew",
    "serve",
    "serving",
]

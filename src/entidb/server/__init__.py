"""The server: databases behind tokens, as an object (``SyncServer``) and as an ASGI app.

Everything is loaded when it is first used; most of it needs the packages of the ``server`` extra,
and says so if they are missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from entidb.server.app import SyncApp, create_app
    from entidb.server.auth import (
        Authenticator,
        Grants,
        JwtAuthenticator,
        Rights,
        mint_token,
    )
    from entidb.server.config import ServerConfig
    from entidb.server.group_commit import GroupCommitter
    from entidb.server.hooks import (
        Grant,
        Refusal,
        ValidateContext,
        ValidateHook,
        ValidateOperation,
        ValidateTransaction,
    )
    from entidb.server.run import Listen, serve, serving
    from entidb.server.server import SyncServer
    from entidb.server.service import DatabaseService

_HOMES: Final[dict[str, tuple[str, ...]]] = {
    "app": ("SyncApp", "create_app"),
    "auth": ("Authenticator", "Grants", "JwtAuthenticator", "Rights", "mint_token"),
    "config": ("ServerConfig",),
    "group_commit": ("GroupCommitter",),
    "hooks": (
        "Grant",
        "Refusal",
        "ValidateContext",
        "ValidateHook",
        "ValidateOperation",
        "ValidateTransaction",
    ),
    "run": ("Listen", "serve", "serving"),
    "server": ("SyncServer",),
    "service": ("DatabaseService",),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}
#: What the ``server`` extra brings.
_EXTRA: Final = frozenset(
    ("cryptography", "httptools", "jwt", "prometheus_client", "starlette", "uvicorn", "uvloop")
)


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _EXTRA:
            # pip knows the package ``jwt`` as another one than the one that is needed.
            package = {"jwt": "PyJWT"}.get(missing, missing.replace("_", "-"))
            raise ImportError(
                f"entidb.server.{name} needs packages that are not installed ({package}): "
                'pip install "entidb[server]"',
                name=error.name,
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


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
    "create_app",
    "mint_token",
    "serve",
    "serving",
]

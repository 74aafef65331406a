"""Making tokens: for `entidb token`, and for programs that hand them out.

Not here: checking them (``auth``).
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from entidb.errors import AuthenticationError, ConfigError
from entidb.server.auth import ALL_DATABASES, databases_of
from entidb.server.config import check_db_id
from entidb.server.keys import algorithm_of, check_kid, check_secret
from entidb.types import Clock, SystemClock


def mint_token(
    key: bytes | str,
    *,
    subject: str,
    databases: Mapping[str, Any] | Iterable[str],
    expires_s: float = 24 * 3600.0,
    audience: str = "entidb",
    claims: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    kid: str | None = None,
) -> str:
    """A token for ``subject``, valid for ``expires_s`` seconds from now.

    ``key`` is the server's secret, or the PEM of a private Ed25519, RSA or EC key; ``kid`` names
    it, for a server that has several. ``databases`` maps names to ``"r"``, ``"w"``, ``"rw"`` or
    ``{"rights": …, "collections": […]}``; a list of names means ``"rw"`` for each; ``"*"`` names
    all databases. ``claims`` are added for the validate hook; unless one is ``jti``, the token gets
    one of its own, by which it can be revoked. Raises ``ConfigError`` for a weak key, an empty
    subject, or rights that cannot be read.
    """
    if not subject:
        raise ConfigError("subject is empty: say who the token is for")
    if not 0 < expires_s < math.inf:
        raise ConfigError(f"expires_s is a number of seconds above 0, not {expires_s!r}")
    granted = dict(databases) if isinstance(databases, Mapping) else list(databases)
    _check_databases(granted)
    now = int((clock or SystemClock()).now_ms() // 1000)
    body = {
        "jti": uuid.uuid4().hex,
        **(claims or {}),
        "sub": subject,
        "aud": audience,
        "iat": now,
        "exp": now + math.ceil(expires_s),
        "databases": granted,
    }
    signing_key, algorithm = _signing_key(key.encode() if isinstance(key, str) else key)
    headers = None if kid is None else {"kid": check_kid(kid)}
    return jwt.encode(body, signing_key, algorithm=algorithm, headers=headers)


def _check_databases(granted: object) -> None:
    try:
        names = databases_of(granted)
    except AuthenticationError as error:
        raise ConfigError(
            'databases names rights like {"shop": "rw", "catalog": "r"}, or is a list of names'
        ) from error
    for name in names:
        if name != ALL_DATABASES:
            check_db_id(name)


def _signing_key(key: bytes) -> tuple[Any, str]:
    if not key.lstrip().startswith(b"-----BEGIN"):
        return check_secret(key), "HS256"
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("the key holds no private key in PEM form without a password") from error
    return private, algorithm_of(private)

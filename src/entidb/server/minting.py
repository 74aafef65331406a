"""Making tokens: for `entidb token`, and for programs that hand them out.

Not here: checking them (``auth``).
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeGuard

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from entidb.errors import AuthenticationError, ConfigError
from entidb.server.auth import ALL_DATABASES, TOKEN_BYTES_MAX, databases_of
from entidb.server.config import check_db_id
from entidb.server.keys import algorithm_of, check_kid, check_secret
from entidb.types import Clock, check_clock


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
    _check_text("subject", subject)
    if not audience:
        raise ConfigError("audience is empty: name the server's, like 'entidb'")
    _check_text("audience", audience)
    now = int(check_clock(clock).now_ms() // 1000)
    if not _is_number(expires_s) or not 0 < expires_s < _LAST_S - now:
        raise ConfigError(
            f"expires_s is a number of seconds above 0, up to the year 9999, not {expires_s!r}"
        )
    if claims is not None and not isinstance(claims, Mapping):
        raise ConfigError(f"claims is a mapping of names to values, not {claims!r:.100}")
    begin = (claims or {}).get("nbf", 0)
    if not _is_number(begin) or not -math.inf < begin < math.inf:
        raise ConfigError(f"the claim nbf is a number of seconds since 1970, not {begin!r}")
    granted = _granted(databases)
    body = {
        "jti": uuid.uuid4().hex,
        **(claims or {}),
        "sub": subject,
        "aud": audience,
        "iat": now,
        "exp": now + math.ceil(expires_s),
        "databases": granted,
    }
    if isinstance(key, str):
        try:
            key = key.encode()
        except UnicodeEncodeError:  # whose words would show the key
            raise ConfigError("the key is text that is not UTF-8: give bytes") from None
    if not isinstance(key, bytes):
        raise ConfigError(f"the key is bytes or text, not {type(key).__name__}")
    signing_key, algorithm = _signing_key(key)
    headers = None if kid is None else {"kid": check_kid(kid)}
    try:
        token = jwt.encode(body, signing_key, algorithm=algorithm, headers=headers)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"a claim cannot be written as JSON: {error}") from error
    if len(token) > TOKEN_BYTES_MAX:
        raise ConfigError(
            f"the token has {len(token)} characters, and no server takes more than "
            f"{TOKEN_BYTES_MAX}: name fewer databases and collections, or less in the claims"
        )
    return token


#: The first second that no calendar of ours has.
_LAST_S: Final = 253_402_300_800


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{name} is text, not {text!r:.100}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} {text!r:.100} is not UTF-8: give one that is") from error


def _granted(databases: object) -> dict[str, Any] | list[Any]:
    if isinstance(databases, Mapping):
        granted: dict[str, Any] | list[Any] = dict(databases)
    elif isinstance(databases, Iterable) and not isinstance(databases, str | bytes):
        granted = list(databases)
    else:
        raise _unreadable()
    _check_databases(granted)
    return granted


def _unreadable() -> ConfigError:
    return ConfigError(
        'databases names rights like {"shop": "rw", "catalog": "r"}, or is a list of names'
    )


def _check_databases(granted: object) -> None:
    try:
        names = databases_of(granted)
    except AuthenticationError as error:
        raise _unreadable() from error
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

"""Who may do what: bearer tokens, what they grant, and making them.

A token is a JWT (RFC 7519) with ``sub``, ``aud``, ``exp`` and ``databases``. The algorithm is
decided by the server's key and never by the token: a secret means HS256, an Ed25519 key EdDSA, an
RSA key RS256 (RFC 8725, section 3.1). Programs can bring an ``Authenticator`` of their own.
Nothing here knows of HTTP, and nobody is told whether a database exists.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from msgspec import Struct, ValidationError, convert

from entidb.credentials import read_credential
from entidb.errors import AuthenticationError, ConfigError, PermissionDeniedError
from entidb.server.config import ServerConfig, check_db_id
from entidb.server.hooks import Grant
from entidb.types import Clock, SystemClock

#: RFC 7518, section 3.2: a key at least as long as the hash.
SECRET_BYTES_MIN: Final = 32
RSA_BITS_MIN: Final = 2048
TOKEN_BYTES_MAX: Final = 8192
#: The database name that stands for all of them, where a token says so on purpose.
ALL_DATABASES: Final = "*"
_CACHE_MAX: Final = 4096

_OPTIONS: Final[Any] = {
    "require": ["exp", "aud", "sub"],
    "verify_aud": True,
    "verify_sub": True,
    # The three times are checked here, by the clock this server was given.
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
}


class Rights(Struct, frozen=True):
    """What a token allows on one database. ``collections`` None means all of them."""

    read: bool
    write: bool
    collections: frozenset[str] | None = None


class Grants(Struct, frozen=True):
    """What a token allows: ``subject`` is who, ``databases`` holds the rights by name, with
    ``"*"`` for those not named. ``claims`` is handed to the validate hook."""

    subject: str
    databases: Mapping[str, Rights]
    claims: dict[str, Any] = {}

    def on(self, db_id: str) -> Grant:
        """The grant for ``db_id``. Raises ``PermissionDeniedError`` (forbidden) if there is none,
        with the same words whether or not such a database exists."""
        rights = self.databases.get(db_id) or self.databases.get(ALL_DATABASES)
        if rights is None or not (rights.read or rights.write):
            raise PermissionDeniedError("the token does not grant this database")
        return Grant(
            subject=self.subject,
            read=rights.read,
            write=rights.write,
            collections=rights.collections,
            claims=self.claims,
        )


class Authenticator(Protocol):
    """Says what a bearer token grants. ``token`` is None where the request had none.

    Raises ``AuthenticationError`` (401) for a token that is missing or no good, with a message
    that a stranger may read. Called for every request, from any thread; keep it quick, and have
    it answer from memory.
    """

    def __call__(self, token: str | None, /) -> Grants: ...


def everything(token: str | None) -> Grants:
    """The ``Authenticator`` of a server without authentication."""
    return _EVERYTHING


_EVERYTHING: Final = Grants("anonymous", {ALL_DATABASES: Rights(read=True, write=True)})


def authenticator_for(config: ServerConfig, clock: Clock) -> Authenticator:
    """What ``config`` asks for. Raises ``ConfigError`` for a key that cannot be read or is weak."""
    if config.authenticator is not None:
        return config.authenticator
    if config.insecure_no_auth:
        return everything
    if config.jwt_public_key_file is not None:
        key, algorithm = _public_key(_read(config.jwt_public_key_file, "jwt_public_key_file"))
    else:
        key, algorithm = load_secret(config), "HS256"
    return JwtAuthenticator(
        key, algorithm, audience=config.audience, leeway_s=config.leeway_s, clock=clock
    )


class JwtAuthenticator:
    """Checks signed tokens. What it has checked is remembered until it expires, because checking
    costs as much as a small request; bounded, and by hash, so that no token lies in memory."""

    def __init__(
        self,
        key: Any,
        algorithm: str,
        *,
        audience: str,
        leeway_s: float = 0.0,
        clock: Clock | None = None,
        cache_max: int = _CACHE_MAX,
    ) -> None:
        self._key = key
        self._algorithms = [algorithm]
        self._audience = audience
        self._leeway_s = leeway_s
        self._clock = clock or SystemClock()
        self._cache_max = cache_max
        self._cache: OrderedDict[bytes, tuple[float, float, Grants]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, token: str | None) -> Grants:
        if not token:
            raise AuthenticationError("a token is needed: send `Authorization: Bearer <token>`")
        if len(token) > TOKEN_BYTES_MAX or not token.isascii():
            raise _invalid()
        digest = hashlib.sha256(token.encode()).digest()
        known = self._cache.get(digest)
        if known is None:
            known = self._verified(token)
            self._remember(digest, known)
        begin, end, grants = known
        now = self._clock.now_ms() / 1000
        if now >= end + self._leeway_s:
            raise AuthenticationError("the token has expired: get a fresh one")
        if now < begin - self._leeway_s:
            raise AuthenticationError("the token is not valid yet: check both clocks")
        return grants

    def _verified(self, token: str) -> tuple[float, float, Grants]:
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=self._algorithms,
                audience=self._audience,
                options=_OPTIONS,
            )
        except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError) as error:
            # Which check failed is for whoever made the token, and not for whoever tries one.
            raise _invalid() from error
        begin, end = _time(claims.get("nbf", 0)), _time(claims["exp"])
        if not claims["sub"]:
            raise _invalid()
        return begin, end, Grants(claims["sub"], _databases(claims.get("databases")), claims)

    def _remember(self, digest: bytes, entry: tuple[float, float, Grants]) -> None:
        with self._lock:
            self._cache[digest] = entry
            # Oldest first: an expired entry costs its room for a while and grants nothing.
            while len(self._cache) > self._cache_max:
                self._cache.popitem(last=False)


def _invalid() -> AuthenticationError:
    return AuthenticationError("the token is not valid for this server")


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid()
    try:
        seconds = float(value)
    except OverflowError as error:
        raise _invalid() from error
    if not math.isfinite(seconds):
        raise _invalid()
    return seconds


class _RightsClaim(Struct, frozen=True):
    rights: str
    collections: list[str] | None = None


def _databases(claim: object) -> dict[str, Rights]:
    """``{"shop": "rw", "catalog": "r"}``, ``["shop"]``, or the long form, which can name
    collections: ``{"shop": {"rights": "rw", "collections": ["notes"]}}``."""
    try:
        if isinstance(claim, list):
            return dict.fromkeys(convert(claim, list[str]), _RIGHTS["rw"])
        entries = convert(claim, dict[str, str | _RightsClaim])
        return {name: _rights(entry) for name, entry in entries.items()}
    except (ValidationError, KeyError) as error:
        raise AuthenticationError("the token's claim `databases` cannot be read") from error


def _rights(entry: str | _RightsClaim) -> Rights:
    if isinstance(entry, str):
        return _RIGHTS[entry]
    rights = _RIGHTS[entry.rights]
    names = None if entry.collections is None else frozenset(entry.collections)
    return Rights(rights.read, rights.write, names)


_RIGHTS: Final = {
    "r": Rights(read=True, write=False),
    "w": Rights(read=False, write=True),
    "rw": Rights(read=True, write=True),
}


# ---------------------------------------------------------------- keys


def load_secret(config: ServerConfig) -> bytes:
    """The secret ``config`` names. Raises ``ConfigError`` if it is missing or too short."""
    if config.jwt_secret_env is not None:
        where = f"the environment variable {config.jwt_secret_env}"
        text = os.environ.get(config.jwt_secret_env)
        if text is None:
            raise ConfigError(f"{where} is not set (jwt_secret_env)")
        return check_secret(text.encode(), where)
    if config.jwt_secret_file is None:
        raise ConfigError("no secret is configured: set jwt_secret_file or jwt_secret_env")
    where = f"the file {os.fspath(config.jwt_secret_file)}"
    return check_secret(_read(config.jwt_secret_file, "jwt_secret_file"), where)


def check_secret(secret: bytes, where: str = "the secret") -> bytes:
    """``secret`` without whitespace at its end. Raises ``ConfigError`` if it is too short, or is
    a PEM key: a public key as a secret would let everybody who has it make tokens."""
    secret = secret.rstrip()
    if secret.lstrip().startswith(b"-----BEGIN"):
        raise ConfigError(f"{where} holds a PEM key: a public key goes into jwt_public_key_file")
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigError(
            f"{where} holds {len(secret)} bytes, {SECRET_BYTES_MIN} are needed: make one with "
            "`entidb secret --out FILE`"
        )
    return secret


def _read(path: str | os.PathLike[str], setting: str) -> bytes:
    try:
        return read_credential(path, "file")
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error


def _public_key(pem: bytes) -> tuple[Any, str]:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError("jwt_public_key_file holds no public key in PEM form") from error
    return key, _algorithm(key)


def _algorithm(key: object) -> str:
    if isinstance(key, Ed25519PublicKey | Ed25519PrivateKey):
        return "EdDSA"
    if not isinstance(key, RSAPublicKey | RSAPrivateKey):
        raise ConfigError("tokens are signed with an Ed25519 or an RSA key; this one is neither")
    if key.key_size < RSA_BITS_MIN:
        raise ConfigError(f"the RSA key has {key.key_size} bits, {RSA_BITS_MIN} are needed")
    return "RS256"


# ---------------------------------------------------------------- making tokens


def mint_token(
    key: bytes | str,
    *,
    subject: str,
    databases: Mapping[str, Any] | Iterable[str],
    expires_s: float = 24 * 3600.0,
    audience: str = "entidb",
    claims: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
) -> str:
    """A token for ``subject``, valid for ``expires_s`` seconds from now.

    ``key`` is the server's secret, or the PEM of a private Ed25519 or RSA key. ``databases`` maps
    names to ``"r"``, ``"w"``, ``"rw"`` or ``{"rights": …, "collections": […]}``; a list of names
    means ``"rw"`` for each; ``"*"`` names all databases. ``claims`` are added for the validate
    hook. Raises ``ConfigError`` for a weak key, an empty subject, or rights nobody can read.
    """
    if not subject:
        raise ConfigError("subject is empty: say who the token is for")
    if not 0 < expires_s < math.inf:
        raise ConfigError(f"expires_s is a number of seconds above 0, not {expires_s!r}")
    granted = dict(databases) if isinstance(databases, Mapping) else list(databases)
    _check_databases(granted)
    now = int((clock or SystemClock()).now_ms() // 1000)
    body = {
        **(claims or {}),
        "sub": subject,
        "aud": audience,
        "iat": now,
        "exp": now + math.ceil(expires_s),
        "databases": granted,
    }
    signing_key, algorithm = _signing_key(key.encode() if isinstance(key, str) else key)
    return jwt.encode(body, signing_key, algorithm=algorithm)


def _check_databases(granted: object) -> None:
    try:
        names = _databases(granted)
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
    return private, _algorithm(private)

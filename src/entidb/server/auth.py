"""Who may do what: bearer tokens, and what they grant.

A token is a JWT (RFC 7519) with ``sub``, ``aud``, ``exp`` and ``databases``, and mostly a ``jti``
by which it can be revoked. Programs can bring an ``Authenticator`` of their own. Nothing here knows
of HTTP, and no answer shows whether a database exists. What tokens are signed with is in ``keys``
and ``jwks``, making them in ``minting``.
"""

from __future__ import annotations

import hashlib
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, Protocol, Self

import jwt
from msgspec import Struct, ValidationError, convert

from entidb.errors import AuthenticationError, PermissionDeniedError
from entidb.server.config import ServerConfig
from entidb.server.hooks import Grant
from entidb.server.keys import FileKeys, FixedKeys, Key, KeySet, KeySource, secret_of_environment
from entidb.types import Clock, check_clock

TOKEN_BYTES_MAX: Final = 8192
#: The database name that means all of them, where a token names it on purpose.
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
    ``"*"`` for those not named. ``claims`` is handed to the validate hook. ``until_s`` is when
    the token ends, in seconds since 1970: a stream of news ends before (None: it does not)."""

    subject: str
    databases: Mapping[str, Rights]
    claims: dict[str, Any] = {}
    until_s: float | None = None

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
    return JwtAuthenticator.over(
        _source(config, clock), audience=config.audience, leeway_s=config.leeway_s, clock=clock
    )


def _source(config: ServerConfig, clock: Clock) -> KeySource:
    if config.jwt_jwks_url is not None:
        from entidb.server.jwks import RemoteKeys  # most servers have their keys in a file

        return RemoteKeys(config.jwt_jwks_url, refresh_s=config.jwks_refresh_s, clock=clock)
    if config.jwt_secret_env is not None:
        return secret_of_environment(config.jwt_secret_env)
    return FileKeys(config, clock)


class _Checked(Struct, frozen=True):
    """A token whose signature holds: with which keys that was found, its times, what it grants."""

    keys: KeySet
    begin: float
    end: float
    key_end: float
    grants: Grants


class JwtAuthenticator:
    """Checks signed tokens. What it has checked is remembered until it expires or the keys change,
    because checking costs as much as a small request; bounded, and by hash, so that no token lies
    in memory."""

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
        self._keys: KeySource = FixedKeys(Key(None, key, algorithm))
        self._audience = audience
        self._leeway_s = leeway_s
        self._clock = check_clock(clock)
        self._cache_max = cache_max
        self._cache: OrderedDict[bytes, _Checked] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def over(
        cls, keys: KeySource, *, audience: str, leeway_s: float = 0.0, clock: Clock | None = None
    ) -> Self:
        """One whose keys may change while it is used."""
        made = cls(b"", "", audience=audience, leeway_s=leeway_s, clock=clock)
        made._keys = keys
        return made

    @property
    def keys(self) -> KeySet:
        """Those in force."""
        return self._keys.current()

    def reload(self) -> KeySet:
        """Read the keys again now, where they come from a file or an address. Raises
        ``ConfigError``; those in force stay then."""
        return self._keys.reload()

    def __call__(self, token: str | None) -> Grants:
        if not token:
            raise AuthenticationError("a token is needed: send `Authorization: Bearer <token>`")
        if len(token) > TOKEN_BYTES_MAX or not token.isascii():
            raise _invalid()
        keys = self._keys.current()
        digest = hashlib.sha256(token.encode()).digest()
        known = self._cache.get(digest)
        if known is None or known.keys is not keys:
            known = self._verified(token, keys)
            self._remember(digest, known)
        now = self._clock.now_ms() / 1000
        if now >= known.end + self._leeway_s or now >= known.key_end:
            raise AuthenticationError("the token has expired: get a fresh one")
        if now < known.begin - self._leeway_s:
            raise AuthenticationError("the token is not valid yet: check both clocks")
        return known.grants

    def _verified(self, token: str, keys: KeySet) -> _Checked:
        try:
            head = jwt.get_unverified_header(token)
            key, claims = self._signed(token, head, keys)
        except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError) as error:
            # Which check failed is for the maker of the token, and not for a stranger who tries
            # one.
            raise _invalid() from error
        # They are kept, and every token has the same names.
        claims = {sys.intern(name): claim for name, claim in claims.items()}
        begin, end = _time(claims.get("nbf", 0)), _time(claims["exp"])
        if not claims["sub"]:
            raise _invalid()
        key_end = math.inf if key.ends is None else key.ends
        databases = databases_of(claims.get("databases"))
        grants = Grants(claims["sub"], databases, claims, min(end, key_end))
        return _Checked(keys, max(begin, key.begins or 0.0), end, key_end, grants)

    def _signed(self, token: str, head: dict[str, Any], keys: KeySet) -> tuple[Key, dict[str, Any]]:
        tried = False
        for key in keys.for_token(head.get("kid"), head.get("alg")):
            tried = True
            try:
                claims: dict[str, Any] = jwt.decode(
                    token,
                    key.key,
                    algorithms=[key.algorithm],
                    audience=self._audience,
                    options=_OPTIONS,
                )
            except jwt.InvalidSignatureError:
                continue
            return key, claims
        if not tried:
            self._keys.missing(head.get("kid"))
            # One that was being fetched may have come since ``keys`` were looked at.
            if (newer := self._keys.current()) is not keys:
                return self._signed(token, head, newer)
        raise _invalid()

    def _remember(self, digest: bytes, entry: _Checked) -> None:
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


class _RightsClaim(Struct, frozen=True, forbid_unknown_fields=True):
    """A member that is not known might be ``collections``, misspelt, and grant everything."""

    rights: str
    collections: list[str] | None = None


def databases_of(claim: object) -> dict[str, Rights]:
    """``{"shop": "rw", "catalog": "r"}``, ``["shop"]``, or the long form, which can name
    collections: ``{"shop": {"rights": "rw", "collections": ["notes"]}}``. Raises
    ``AuthenticationError`` for anything else."""
    try:
        if isinstance(claim, list):
            return dict.fromkeys(convert(claim, list[str]), _RIGHTS["rw"])
        entries = convert(claim, dict[str, str | _RightsClaim])
        return {name: _rights(entry) for name, entry in entries.items()}
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        # Also text with half a surrogate pair, which no name has.
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

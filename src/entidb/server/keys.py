"""The keys that tokens are signed with: several at once by ``kid``, each with an end of its own.

They come from one file, from a directory of files, from a JWKS file (RFC 7517), or from a URL
(``jwks``). A key decides the algorithm, and never the token (RFC 8725, section 3.1). What
is in a file is read again when it changes. Not here: what a token says (``auth``), and making one
(``minting``).
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from msgspec import Struct

from entidb.credentials import read_credential, why_unreadable
from entidb.errors import ConfigError
from entidb.server.config import ServerConfig
from entidb.server.watched import Watched, mark_of
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

#: RFC 7518, section 3.2: a key at least as long as the hash.
SECRET_BYTES_MIN: Final = 32
RSA_BITS_MIN: Final = 2048
#: Keys at once. A token without ``kid`` is tried with each of them.
KEYS_MAX: Final = 32
KID_CHARS_MAX: Final = 200
#: Ending of the file that says when the key beside it ends.
ENDS_SUFFIX: Final = ".ends"
#: Members of a key that are read here, or say something else (RFC 7517, RFC 7518).
_MEMBERS: Final = frozenset(
    (
        *("kty", "use", "key_ops", "alg", "kid", "x5u", "x5c", "x5t", "x5t#S256"),
        *("crv", "x", "y", "n", "e", "k", "nbf", "exp", "iat"),
    )
)
#: What somebody may write who means one of those that limit a key, and what is read.
_LIMITING: Final = {
    "exp": "exp",
    "expires": "exp",
    "expires_at": "exp",
    "ends": "exp",
    "nbf": "nbf",
    "not_before": "nbf",
    "begins": "nbf",
    "alg": "alg",
    "algorithm": "alg",
    "kid": "kid",
}

_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_OF_RSA: Final = frozenset(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"))
#: What a JWK may say for its ``alg``; without it the kind of key decides.
_TAKEN: Final = frozenset((*_OF_RSA, *_CURVES.values(), "EdDSA", "HS256", None))


class Key(Struct, frozen=True):
    """``kid`` None fits every token. ``begins`` and ``ends`` are seconds since 1970."""

    kid: str | None
    key: Any
    algorithm: str
    begins: float | None = None
    ends: float | None = None

    def __repr__(self) -> str:
        """Without the key: this may end in a log."""
        return f"Key({self.kid!r}, {self.algorithm})"


class KeySet:
    """Keys by ``kid``. Never changed: a new state is a new object."""

    def __init__(self, keys: Iterable[Key]) -> None:
        """Raises ``ConfigError`` for a repeated ``kid``, and for too many keys."""
        self.keys: Final = tuple(keys)
        self._by_kid = {key.kid: key for key in self.keys}
        if len(self.keys) > KEYS_MAX:
            raise ConfigError(f"{len(self.keys)} keys are too many: at most {KEYS_MAX} at once")
        if len(self._by_kid) != len(self.keys):
            raise ConfigError("two keys have the same kid: each needs its own")

    def for_token(self, kid: object, algorithm: object) -> Iterator[Key]:
        """The keys that a token with this head may be signed with."""
        if kid is not None and None not in self._by_kid:
            found = self._by_kid.get(kid) if isinstance(kid, str) else None
            named: Iterable[Key] = () if found is None else (found,)
        else:
            named = self.keys
        return (key for key in named if key.algorithm == algorithm)

    def words(self) -> str:
        """For people: which keys there are, and when they end."""
        if not self.keys:
            return "no key: every token is refused"
        return ", ".join(map(_word, self.keys))


def _word(key: Key) -> str:
    name = f"{key.kid or 'the key'} ({key.algorithm})"
    return name if key.ends is None else f"{name} until {time_text(key.ends)}"


def time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


class KeySource(Protocol):
    """Where keys come from. Called for every request, from any thread."""

    def current(self) -> KeySet: ...

    def missing(self, kid: object) -> None:
        """Called when no key fits a token. Raises ``ServerBusyError`` if one may turn up."""

    def reload(self) -> KeySet:
        """Read the keys now. Raises ``ConfigError``; those in force stay then."""


class FixedKeys:
    """Keys that never change."""

    def __init__(self, *keys: Key) -> None:
        self._keys = KeySet(keys)

    def current(self) -> KeySet:
        return self._keys

    def missing(self, kid: object) -> None:
        return None

    def reload(self) -> KeySet:
        return self._keys


class FileKeys:
    """Keys on the disk, read again when they change."""

    def __init__(self, config: ServerConfig, clock: Clock) -> None:
        """Raises ``ConfigError`` for a key that cannot be read or is weak."""
        if config.jwt_public_key_file is not None:
            path, read = config.jwt_public_key_file, self._read_public
        elif config.jwt_secret_file is not None:
            path, read = config.jwt_secret_file, self._read_secret
        else:
            assert config.jwt_keys is not None
            path, read = config.jwt_keys, self._read_several
        self._path = path
        what = f"the key file or directory {os.fspath(path)}"
        self._watched = Watched(what, read, lambda: mark_of(path), clock)

    def current(self) -> KeySet:
        return self._watched.current()

    def missing(self, kid: object) -> None:
        return None

    def reload(self) -> KeySet:
        return self._watched.reread()

    def _read_public(self) -> KeySet:
        pem = _read(self._path, "jwt_public_key_file")
        key, algorithm = public_key(pem, "jwt_public_key_file")
        return KeySet([Key(None, key, algorithm)])

    def _read_secret(self) -> KeySet:
        where = f"the file {os.fspath(self._path)}"
        secret = check_secret(_read(self._path, "jwt_secret_file"), where)
        return KeySet([Key(None, secret, "HS256")])

    def _read_several(self) -> KeySet:
        if os.path.isdir(self._path):
            return _read_directory(Path(self._path))
        content = _read(self._path, "jwt_keys")
        return KeySet(keys_of_set(content, f"jwt_keys: the file {os.fspath(self._path)}"))


def secret_of_environment(name: str) -> FixedKeys:
    """Raises ``ConfigError`` if it is missing or too short."""
    where = f"the environment variable {name}"
    text = os.environ.get(name)
    if text is None:
        raise ConfigError(f"{where} is not set (jwt_secret_env)")
    return FixedKeys(Key(None, check_secret(os.fsencode(text), where), "HS256"))


# ---------------------------------------------------------------- a directory


def key_files(directory: Path) -> list[Path]:
    """The files of keys in it, in order. Others' files do not count: those with a dot in front,
    which tools leave behind, and copies that editors make."""
    return [
        path
        for path in sorted(directory.iterdir())
        if not path.name.startswith(".")
        and not path.name.endswith("~")
        and path.suffix != ENDS_SUFFIX
        and path.is_file()
    ]


def _read_directory(directory: Path) -> KeySet:
    where = f"jwt_keys: the directory {directory}"
    try:
        if os.name == "posix" and os.stat(directory).st_mode & stat.S_IWOTH:
            raise ConfigError(
                f"every user of this machine can write to {where}, so its content proves "
                f"nothing: `chmod 700 {directory}`, and look at what is in it"
            )
        paths = key_files(directory)
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {why_unreadable(error)}") from error
    _warn_of_ends(where, names, [path.stem for path in paths])
    return KeySet(_read_key(path) for path in paths)


def _warn_of_ends(where: str, names: Iterable[str], kids: list[str]) -> None:
    """Of a file that would end a key, and belongs to none: the key that is meant is good for ever.
    It is not refused, or removing a key and not its end would leave the last keys in force."""
    for name in names:
        stem, dot, _ = name.lower().rpartition(ENDS_SUFFIX)
        if name.startswith(".") or name.endswith("~") or not dot:
            continue
        if not name.endswith(ENDS_SUFFIX) or name.removesuffix(ENDS_SUFFIX) not in kids:
            near = _near(stem, kids) or kids[:1]
            meant = f", for example {near[0]}{ENDS_SUFFIX}" if near else ""
            logger.warning(
                "%s has %s, which ends no key: it has to be called as its key is, with %s%s. Mend "
                "its name, or remove it",
                where,
                name,
                ENDS_SUFFIX,
                meant,
            )


def _read_key(path: Path) -> Key:
    where = f"jwt_keys: the file {path}"
    content, kid = _read(path, "jwt_keys"), check_kid(path.stem)
    ends = _ends(path.with_suffix(ENDS_SUFFIX))
    if content.startswith(b"-----BEGIN"):
        key, algorithm = public_key(content, where)
        return Key(kid, key, algorithm, ends=ends)
    if content.startswith(b"{"):
        found = key_of_jwk(_json(content, where), where)
        limits = [each for each in (found.ends, ends) if each is not None]
        return Key(kid, found.key, found.algorithm, found.begins, min(limits, default=None))
    return Key(kid, check_secret(content, where), "HS256", ends=ends)


def _ends(path: Path) -> float | None:
    if not path.exists():
        return None
    text = _read(path, "jwt_keys").decode("utf-8", "replace")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"jwt_keys: {path} holds no time such as 2026-12-31 or 2026-12-31T18:00:00+01:00"
        ) from error
    # A day without a time begins at midnight, and the time of no place is that of UTC.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def check_kid(kid: object) -> str:
    """``kid`` itself if a key may be called so, else ``ConfigError``."""
    if not isinstance(kid, str) or not 0 < len(kid) <= KID_CHARS_MAX or not kid.isprintable():
        raise ConfigError(
            f"{str(kid)[:50]!r} is no kid: use up to {KID_CHARS_MAX} characters that can be printed"
        )
    return kid


# ---------------------------------------------------------------- JWKS (RFC 7517)


def keys_of_set(content: bytes, where: str, *, strangers: bool = False) -> Iterator[Key]:
    """The keys of a JWKS document. Of ``strangers``, such as an identity provider, what cannot be
    used is passed over, and secrets are not taken. Raises ``ConfigError``."""
    document = _json(content, where)
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise ConfigError(f'{where} holds no key set: {{"keys": […]}} is needed')
    if len(keys) > 4 * KEYS_MAX:
        raise ConfigError(f"{where} holds {len(keys)} keys: more than {KEYS_MAX}")
    for number, jwk in enumerate(keys):
        if isinstance(jwk, dict) and jwk.get("use", "sig") != "sig":
            continue
        try:
            key = key_of_jwk(jwk, f"{where}, key {number}")
            if strangers and isinstance(key.key, bytes):
                continue
            if key.kid is None and len(keys) > 1:
                raise ConfigError(f"{where}, key {number} has no kid, and there are several keys")
        except ConfigError:
            if not strangers:
                raise
            continue
        yield key


def _near(name: str, names: Iterable[str]) -> list[str]:
    """The one of ``names`` that looks most like ``name``, if one does."""
    from difflib import get_close_matches  # what only a mistake needs

    return get_close_matches(name, list(names), 1)


def _warn_of_members(jwk: Mapping[str, object], where: str) -> None:
    """A key may have members that nobody here knows; one like those that limit it is no such."""
    for name in jwk:
        near = name not in _MEMBERS and _near(name.lower(), _LIMITING)
        if near:
            logger.warning("%s has a member %r, which nothing reads: is %r meant?",
                           where, name, _LIMITING[near[0]])  # fmt: skip


def key_of_jwk(jwk: object, where: str) -> Key:
    """Raises ``ConfigError``, which never repeats the key."""
    if not isinstance(jwk, dict):
        raise ConfigError(f"{where} is no JWK")
    if "d" in jwk or "p" in jwk:
        raise ConfigError(f"{where} is a private key: a server needs the public one only")
    try:
        if jwk.get("alg") not in _TAKEN:
            raise ValueError("an algorithm that signs nothing, or nothing that is taken here")
        found = jwt.PyJWK.from_dict(jwk)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where} cannot be used: an unknown or damaged kind of key") from error
    key, algorithm = found.key, found.algorithm_name
    if isinstance(key, bytes):
        key, fits = check_secret(key, where), algorithm == "HS256"
    elif isinstance(key, RSAPublicKey):
        algorithm_of(key)  # large enough
        fits = algorithm in _OF_RSA
    else:
        fits = algorithm == algorithm_of(key)
    if not fits:
        raise ConfigError(f"{where} is for an algorithm that is not taken here")
    kid = None if jwk.get("kid") is None else check_kid(jwk["kid"])
    _warn_of_members(jwk, where)
    return Key(kid, key, algorithm, _moment(jwk, "nbf", where), _moment(jwk, "exp", where))


def _moment(jwk: dict[str, Any], name: str, where: str) -> float | None:
    value = jwk.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**40:
        raise ConfigError(f"{where}: {name} is no time in seconds since 1970")
    return float(value)


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON") from error


# ---------------------------------------------------------------- one key


def check_secret(secret: bytes, where: str = "the secret") -> bytes:
    """``secret`` without whitespace at its end. Raises ``ConfigError`` if it is too short, or is a
    PEM key: a public key as a secret would let everyone who has it make tokens."""
    secret = secret.rstrip()
    if secret.lstrip().startswith(b"-----BEGIN"):
        raise ConfigError(f"{where} holds a PEM key: a public key goes into jwt_public_key_file")
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigError(
            f"{where} holds {len(secret)} bytes, {SECRET_BYTES_MIN} are needed: make one with "
            "`entidb secret --out FILE`"
        )
    return secret


def public_key(pem: bytes, where: str) -> tuple[Any, str]:
    """The key in ``pem`` and its algorithm. Raises ``ConfigError``."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{where} holds no public key in PEM form") from error
    return key, algorithm_of(key)


def algorithm_of(key: object) -> str:
    """Raises ``ConfigError`` for a key that is weak or of another kind."""
    if isinstance(key, Ed25519PublicKey | Ed25519PrivateKey):
        return "EdDSA"
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        if key.curve.name in _CURVES:
            return _CURVES[key.curve.name]
    if not isinstance(key, RSAPublicKey | RSAPrivateKey):
        raise ConfigError(
            "tokens are signed with a key of Ed25519, RSA, or the curves P-256, P-384 and P-521; "
            "this key is none of them"
        )
    if key.key_size < RSA_BITS_MIN:
        raise ConfigError(f"the RSA key has {key.key_size} bits, {RSA_BITS_MIN} are needed")
    return "RS256"


def _read(path: str | os.PathLike[str], setting: str) -> bytes:
    try:
        return read_credential(path, "file")
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error

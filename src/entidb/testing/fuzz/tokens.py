"""Tokens that no server may believe."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
from collections.abc import Iterator
from typing import Any, Final

# ---------------------------------------------------------------- tokens


def forged_tokens(
    token: str, rng: random.Random, *, public_key: bytes = b""
) -> Iterator[tuple[str, str]]:
    """Tokens made from a valid JWT without the key; a server has to refuse each of them.

    ``public_key`` is the PEM a server checks with: a server that lets the token choose the
    algorithm takes it for an HMAC secret.
    """
    head, body, signature = token.split(".")
    claims = json.loads(_unbase64(body))
    for name in ("none", "None", "nOnE", "HS256", "HS512", "RS256", "ES256", "EdDSA", "", "HS257"):
        forged = _segment({"alg": name, "typ": "JWT"})
        yield f"alg {name!r} without a signature", f"{forged}.{body}."
        if forged != head:
            yield f"alg {name!r} with the old signature", f"{forged}.{body}.{signature}"
    for secret in (b"", b"secret", public_key, public_key.strip()):
        forged = _segment({"alg": "HS256", "typ": "JWT"})
        yield f"signed with {secret[:12]!r}", _signed(forged, body, secret)
    for name, value in _TEMPTING_CLAIMS:
        changed = _segment({**claims, name: value})
        yield f"claim {name} changed", f"{head}.{changed}.{signature}"
        yield f"claim {name} changed, alg none", f"{_segment({'alg': 'none'})}.{changed}."
    for extra in _TEMPTING_HEADERS:
        forged = _segment({"alg": "HS256", "typ": "JWT", **extra})
        yield f"header {next(iter(extra))}", _signed(forged, body, b"")
    yield from _misshapen(head, body, signature)
    for _ in range(64):
        at = rng.randrange(len(token))
        flipped = chr(ord(token[at]) ^ 1 << rng.randrange(7))
        changed = token[:at] + flipped + token[at + 1 :]
        if not _same_token(token, changed):
            yield f"bit flipped at {at}", changed


_TEMPTING_CLAIMS: Final[tuple[tuple[str, Any], ...]] = (
    ("databases", {"*": "rw"}),
    ("databases", ["*"]),
    ("exp", 2**40),
    ("exp", "never"),
    ("exp", None),
    ("aud", "*"),
    ("sub", "admin"),
    ("nbf", -1),
)
_TEMPTING_HEADERS: Final[tuple[dict[str, Any], ...]] = (
    {"kid": "/dev/null"},
    {"kid": "' UNION SELECT ''--"},
    {"jwk": {"kty": "oct", "k": ""}},
    {"jku": "http://localhost:1/keys"},
    {"crit": ["b64"], "b64": False},
    {"zip": "DEF"},
)


def _misshapen(head: str, body: str, signature: str) -> Iterator[tuple[str, str]]:
    yield "no signature", f"{head}.{body}"
    yield "nothing but dots", ".."
    yield "four parts", f"{head}.{body}.{signature}.{signature}"
    yield "parts swapped", f"{body}.{head}.{signature}"
    yield "cut", f"{head}.{body}.{signature[:-4]}"
    yield "long", f"{head}.{body}.{signature * 200}"
    yield "deep claims", f"{head}.{_base64(b'[' * 5000)}.{signature}"
    yield "no JSON", f"{head}.{_base64(bytes(range(256)))}.{signature}"
    yield "claims that are a list", f"{head}.{_segment([])}.{signature}"


def _signed(head: str, body: str, secret: bytes) -> str:
    digest = hmac.new(secret, f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}.{_base64(digest)}"


def _same_token(one: str, other: str) -> bool:
    """The last letter of a part has bits that mean nothing: flipping them changes nothing."""
    if one.count(".") != other.count("."):
        return False
    try:
        return [_unbase64(part) for part in one.split(".")] == [
            _unbase64(part) for part in other.split(".")
        ]
    except ValueError:
        return False


def _segment(value: Any) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

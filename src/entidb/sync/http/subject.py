"""For whom a token is, as far as a device can see: only to notice that it is another one's now. A
device believes none of it; the server says who somebody is (R36)."""

from __future__ import annotations

import base64
import binascii

from msgspec import DecodeError, Struct, json


class _Claims(Struct):
    sub: str | None = None
    iss: str | None = None


def subject_of(token: str) -> tuple[str | None, str]:
    """What is the same in two tokens of one subject: issuer and subject of a JWT (RFC 7519), which
    is made anew all the time, and of any other token itself."""
    parts = token.split(".")
    if len(parts) == 3:
        body = parts[1]
        try:
            claims = json.decode(
                base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=_Claims
            )
        except (binascii.Error, DecodeError, ValueError):
            return None, token
        if claims.sub is not None:
            return claims.iss, claims.sub
    return None, token


__all__ = ["subject_of"]

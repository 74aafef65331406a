"""From where a request may come: the name it asked for, and the web page that sent it.

A browser is a program that runs other people's code beside a server on the same machine. Where no
token is needed, what such a page may do has to be decided here: by DNS rebinding it can give its
own name the address 127.0.0.1, and its requests then look like any other but for two headers,
Host and Origin (RFC 9110, section 7.2; RFC 6454). With tokens neither matters, since no page has
one;
what a page may *read* is then decided by CORS, and off unless origins are named.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Final

from entidb.errors import ConfigError, PermissionDeniedError, ProtocolError

#: Headers of which a second one makes a request mean two things.
SINGLE: Final = frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"host",
        b"origin",
    )
)
_ORIGIN: Final = re.compile(r"https?://[^/\s?#@,*]+")
_HOST: Final = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:\s/@]+)(?::[0-9]{1,5})?")
_PREFLIGHT_S: Final = 600
_ALLOWED_METHODS: Final = "GET, POST"
_ALLOWED_HEADERS: Final = (
    "authorization, content-type, content-encoding, entidb-database, x-request-id"
)
_EXPOSED_HEADERS: Final = "retry-after, x-request-id"


def check_single(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises ``ProtocolError`` where a header is repeated that must not be: what reads the first
    and what reads the last of them would disagree."""
    seen: set[bytes] = set()
    for name, _ in headers:
        lower = name.lower()
        if lower in SINGLE:
            if lower in seen:
                raise ProtocolError(f"the header {lower.decode()} stands there twice; send it once")
            seen.add(lower)


class Origins:
    """``open_to_all`` says that no token is needed; ``hosts`` are names that such a server is
    asked for by beside those of this machine, ``cors`` the origins whose pages may use it."""

    def __init__(self, *, open_to_all: bool, hosts: tuple[str, ...], cors: tuple[str, ...]) -> None:
        self._open_to_all = open_to_all
        self._hosts = frozenset(host.lower() for host in hosts)
        self._cors = frozenset(cors)

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises ``PermissionDeniedError`` for what a page somewhere else has sent to a server
        that needs no token."""
        if not self._open_to_all:
            return
        host = headers.get("host")
        # No browser leaves Host out, and HTTP/1.0 clients may.
        if host is not None and not self._is_here(host):
            raise PermissionDeniedError(
                f"this server needs no token and so answers only on this machine's own names, not "
                f"on {host[:100]!r}; name it in allowed_hosts if it is meant"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self._cors and not _is_same(origin, host or ""):
            raise PermissionDeniedError(
                f"a page of {origin[:100]!r} may not use this server; name it in cors_origins if "
                "it may"
            )

    def _is_here(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            return ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return False

    def is_preflight(self, method: str, headers: Mapping[str, str]) -> bool:
        """Whether a browser asks if a page may send a request (Fetch, section 3.2)."""
        return method == "OPTIONS" and "access-control-request-method" in headers

    def answer_headers(self, headers: Mapping[str, str], *, preflight: bool) -> dict[str, str]:
        """What lets the page that asked read the answer; nothing for any other."""
        if not self._cors:
            return {}
        # Caches must not give one page what was meant for another.
        answer = {"vary": "Origin"}
        origin = headers.get("origin")
        if origin not in self._cors:
            return answer
        assert origin is not None
        answer["access-control-allow-origin"] = origin
        if not preflight:
            answer["access-control-expose-headers"] = _EXPOSED_HEADERS
            return answer
        answer["access-control-allow-methods"] = _ALLOWED_METHODS
        answer["access-control-allow-headers"] = _ALLOWED_HEADERS
        answer["access-control-max-age"] = str(_PREFLIGHT_S)
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return answer


def _is_same(origin: str, host: str) -> bool:
    """A page that this server itself has sent; ``host`` has been checked."""
    here = host.lower()
    return bool(host) and origin.lower() in (f"http://{here}", f"https://{here}")


def check_names(hosts: object, cors: object) -> None:
    """Raises ``ConfigError`` for settings that name no hosts and no origins."""
    for name, given in (("allowed_hosts", hosts), ("cors_origins", cors)):
        if not isinstance(given, tuple) or not all(isinstance(one, str) for one in given):
            raise ConfigError(f"{name} is a tuple of texts, not {given!r}")
    assert isinstance(hosts, tuple) and isinstance(cors, tuple)
    for host in hosts:
        found = _HOST.fullmatch(host)
        if found is None or found["name"] != host:
            raise ConfigError(f"allowed_hosts: {host!r} is no name of a host; leave out the port")
    for origin in cors:
        if _ORIGIN.fullmatch(origin) is None:
            raise ConfigError(
                f"cors_origins: {origin!r} is no origin; write it as the browser does, like "
                "'https://app.example.org', with no path and no *"
            )

"""Which URLs and which tokens a device may use, checked once, where they are given."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

import httpx2

from entidb.db.listeners import check_plain
from entidb.errors import ConfigError
from entidb.sync.config import HttpConfig
from entidb.sync.http.failures import SNIPPET_MAX

BAD_URL: Final = re.compile(r"[\x00-\x20\x7f\\]")
TOKEN: Final = re.compile(r"[\x21-\x7e]+")


def check_url(url: object) -> tuple[str, str]:
    """The URL without a trailing slash, and its host; ``ConfigError`` if it cannot work."""
    example = "write https://host[:port][/path]"
    if not isinstance(url, str) or BAD_URL.search(url):
        raise ConfigError(f"url {_shown(url)} is not a URL: {example}")
    try:
        parts = urlsplit(url)
        good_port = _has_good_port(parts)
        host = parts.hostname
        if good_port:
            httpx2.URL(url)
        if host is not None:
            host.encode("idna")  # as looking it up does
    except (ValueError, httpx2.InvalidURL) as error:
        raise ConfigError(f"url {_shown(url)} is not a URL: {example}") from error
    if not good_port:
        raise ConfigError(f"url {_shown(url)} has a port that is none of 1 to 65535: {example}")
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"url {_shown(url)} needs http or https and a host: {example}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url holds a user or a password: give the credential as token=")
    if "?" in url or "#" in url:
        raise ConfigError(f"url {_shown(url)} has a query or a fragment: {example}")
    # Schemes may be written in capitals; what compares them here does not expect it.
    return parts.scheme + url[len(parts.scheme) :].rstrip("/"), host


def _has_good_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


def _shown(url: object) -> str:
    """``url`` for a message: short, and without a password."""
    if isinstance(url, str):
        url = re.sub(r"//[^/@]*@", "//…@", url[:SNIPPET_MAX])
    return repr(url)[: SNIPPET_MAX + 40]


def check_token(token: object, url: str, host: str, config: HttpConfig) -> None:
    if token is None:
        return
    if callable(token):
        check_plain(token, "token", ("whether the server refused the last one",))
    if not callable(token) and (not isinstance(token, str) or TOKEN.fullmatch(token) is None):
        raise ConfigError("token must be visible ASCII text, or a function that returns such text")
    if url.startswith("https:") or is_loopback(host) or config.allow_insecure_token:
        return
    raise ConfigError(
        f"everyone on the way could read the token sent to {url}: use https://, or set "
        "allow_insecure_token=True if that network is encrypted below HTTP",
        code="insecure_token",
    )


def is_loopback(host: str) -> bool:
    """Whether the bytes stay on this machine. Names other than ``localhost`` are not trusted:
    what ``x.localhost`` resolves to is up to the network's name server on some systems."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

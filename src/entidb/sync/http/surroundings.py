"""The settings of the environment for the way to a server: proxies, and certificate authorities;
checked before the library sees them.
"""

from __future__ import annotations

import importlib.util
import os
import ssl
import urllib.request
from typing import Final
from urllib.parse import urlsplit

import httpx2

from entidb.errors import ConfigError
from entidb.sync.http.address import BAD_URL, is_loopback
from entidb.sync.transport import printable

#: Variables that name other certificate authorities, in the order in which they count.
_AUTHORITIES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def proxy_to(scheme: str, host: str) -> str | None:
    """The URL of the proxy to ``host`` that the environment (or the system) names; None if there
    is none. Raises ``ConfigError`` for one that cannot work."""
    proxies = urllib.request.getproxies()
    name = next((name for name in (scheme, "all") if proxies.get(name)), None)
    if name is None or urllib.request.proxy_bypass(host):
        return None
    given = proxies[name].strip()
    # Without a scheme, as curl and others take it.
    proxy = given if "://" in given else "http://" + given.removeprefix("//")
    try:
        parts = urlsplit(proxy)
        works = bool(parts.hostname) and parts.port != 0 and not BAD_URL.search(proxy)
        httpx2.URL(proxy)
    except (ValueError, httpx2.InvalidURL):
        works = False
    where = f"the proxy of the environment ({name.upper()}_PROXY)"
    without = f"correct it, or name {host} in NO_PROXY"
    if not works:
        raise ConfigError(f"{where} is not a URL like http://host:port: {without}")
    if parts.scheme not in ("http", "https", "socks5", "socks5h"):
        shown = printable(parts.scheme[:40])
        raise ConfigError(f"{where} is of an unknown kind, {shown!r}: {without}")
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigError(f"{where} speaks SOCKS, which needs a package: pip install socksio")
    return proxy


def proxy_before(url: str) -> str:
    """The proxy that requests to ``url`` go through, as it may be shown; empty: none does."""
    target = httpx2.URL(url)
    try:
        proxy = None if is_loopback(target.host) else proxy_to(target.scheme, target.host)
    except ConfigError:
        return ""
    if proxy is None:
        return ""
    # Without a user and a password.
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def check_authorities() -> None:
    """Raises ``ConfigError`` for directories that are not there. OpenSSL accepts those without a
    word, and then trusts no certificate."""
    if os.environ.get("SSL_CERT_FILE"):
        return
    named = os.environ.get("SSL_CERT_DIR")
    if named and not any(os.path.isdir(each) for each in named.split(os.pathsep)):
        raise ConfigError(
            f"SSL_CERT_DIR is {named!r}, and that is no directory: correct it, or unset it to use "
            "the certificate authorities of the system"
        )


def authorities_error(error: OSError) -> ConfigError:
    name = next((each for each in _AUTHORITIES if os.environ.get(each)), None)
    if name is None:
        return ConfigError("the certificate authorities of this system cannot be read")
    if isinstance(error, ssl.SSLError):
        why = "holds no certificates in PEM form"
    else:
        why = f"cannot be read ({error.strerror or 'input/output error'})"
    return ConfigError(
        f"{name} is {os.environ[name]!r}, which {why}: correct it, or unset it to use the "
        "certificate authorities of the system"
    )

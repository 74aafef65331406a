"""What a server is told of what stands beside it: the proxy in front, directories for its files.

What cannot be meant is refused when the server starts: later it would fail in each request, or in a
backup at night, or do nothing at all.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Final

from entidb.errors import ConfigError

#: What a path may have in it (RFC 3986, section 3.3), and what no proxy would leave as it is.
_ROOT_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]+)*/?")


def check_root_path(path: object) -> None:
    """Raises ``ConfigError`` unless ``path`` is that of an address, or empty."""
    if not isinstance(path, str) or _ROOT_PATH.fullmatch(path) is None:
        raise ConfigError(f"root_path is a path like '/sync', not {path!r:.100}")


def check_proxies(addresses: object) -> None:
    """Raises ``ConfigError`` unless ``addresses`` are some, with commas between: one that is
    misspelt would be nobody's, and every client would seem to be the proxy."""
    if not isinstance(addresses, str):
        raise ConfigError(f"trusted_proxies is text, not {addresses!r:.100}")
    for each in filter(None, map(str.strip, addresses.split(","))):
        try:
            if each != "*":
                ipaddress.ip_network(each)
        except ValueError as error:
            raise ConfigError(
                f"trusted_proxies: {each!r:.100} is no address like 10.0.0.7, and no network like "
                "10.0.0.0/8; * trusts everybody"
            ) from error


def check_folder(name: str, place: str | os.PathLike[str] | None) -> None:
    """Raises ``ConfigError`` if no directory can be at ``place``, which need not be there yet, or
    nothing may be written into it."""
    if place is None:
        return
    if not os.fspath(place):
        raise ConfigError(f"{name} is empty: name a directory")
    path = os.path.abspath(place)
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise ConfigError(f"{name}: {path} is no directory; name one, or where one can be made")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: the user of the server may not write to {path}; name another")


__all__ = ["check_folder", "check_proxies", "check_root_path"]

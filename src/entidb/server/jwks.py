"""The keys of an identity provider, fetched from its JWKS address and kept.

A fetch happens on a thread of its own and never while a request waits for it: in the background
when the keys are old, and, at most every ten seconds, when a token names an unknown key. Such a
request gets the answer to come again. A provider that is down or answers nonsense changes nothing:
the last good keys stay. Not here: what is a key (``keys``).
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any, Final
from urllib.parse import urlsplit

from entidb.errors import ConfigError, ServerBusyError
from entidb.events import Thread
from entidb.server.keys import KEYS_MAX, KeySet, keys_of_set
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

BYTES_MAX: Final = 256 * 1024
#: Seconds for one fetch, all of it.
FETCH_S: Final = 10.0
#: Seconds between two fetches for keys that are not known, or after one that failed.
AGAIN_S: Final = 10.0
_RETRY_S: Final = 1.0
_PIECE_BYTES: Final = 16 * 1024


class RemoteKeys:
    """A ``KeySource``. Nothing is fetched before the first request or ``reload``."""

    def __init__(self, url: str, *, refresh_s: float, clock: Clock) -> None:
        self._url = check_url(url)
        self._refresh_s = refresh_s
        self._clock = clock
        self._keys = KeySet(())
        #: Guards the fields below; never held during a fetch.
        self._lock = threading.Lock()
        self._fetching = False
        self._fetched_once = False
        self._tried_at: float | None = None
        self._failed = False

    def current(self) -> KeySet:
        if self._age() >= (AGAIN_S if self._failed else self._refresh_s):
            self._start()
        return self._keys

    def missing(self, kid: object) -> None:
        if self._age() >= AGAIN_S:
            self._start()
        if self._fetching or not self._fetched_once:
            raise ServerBusyError(
                "the keys that tokens are signed with are being fetched", retry_after=_RETRY_S
            )

    def reload(self) -> KeySet:
        with self._lock:
            self._fetching, self._tried_at = True, self._clock.monotonic()
        try:
            return self._fetch()
        finally:
            self._fetching = False

    def _age(self) -> float:
        tried = self._tried_at
        return float("inf") if tried is None else self._clock.monotonic() - tried

    def _start(self) -> None:
        with self._lock:
            if self._fetching:
                return
            self._fetching, self._tried_at = True, self._clock.monotonic()
        try:
            Thread(target=self._run, name="entidb-jwks", daemon=True).start()
        except RuntimeError as error:  # the next token tries again
            self._fetching, self._tried_at = False, None
            logger.warning("there is no thread to fetch keys: %s", error)

    def _run(self) -> None:
        try:
            self._fetch()
        except ConfigError as error:
            logger.error("%s; the last good keys stay: %s", error, self._keys.words())
        except Exception:
            # A thread that ends by a bug of ours would leave every token waiting.
            logger.exception("fetching keys failed")
        finally:
            self._fetching = False

    def _fetch(self) -> KeySet:
        self._failed = True
        content = _get(self._url)
        keys = list(keys_of_set(content, f"jwt_jwks_url: {self._url}", strangers=True))
        if not keys:
            raise ConfigError(
                f"jwt_jwks_url: {self._url} has no key that tokens can be signed with"
            )
        found = KeySet(keys[:KEYS_MAX])
        if found.words() != self._keys.words():
            logger.info("keys of %s: %s", self._url, found.words())
        self._keys = found
        self._fetched_once, self._failed = True, False
        return found


def check_url(url: str) -> str:
    """``url`` itself if keys may be fetched from it: over TLS, or from this machine. Raises
    ``ConfigError``."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError("jwt_jwks_url is no URL") from error
    if not host or parts.username is not None or parts.fragment:
        raise ConfigError("jwt_jwks_url names a host, and neither a user nor a fragment")
    if parts.scheme == "https" or (parts.scheme == "http" and _is_here(host)):
        return url
    raise ConfigError(
        f"jwt_jwks_url is an https:// address, not {url!r}: whoever can change the keys on their "
        "way can make tokens"
    )


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they would decide where the keys come from."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _get(url: str) -> bytes:
    """Raises ``ConfigError``, whatever goes wrong."""
    opener = urllib.request.build_opener(_NoRedirect)
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    end = time.monotonic() + FETCH_S
    content = bytearray()
    try:
        with opener.open(request, timeout=FETCH_S) as response:
            # In pieces, because a time limit of a socket is one for each of them.
            while piece := response.read1(_PIECE_BYTES):
                content += piece
                if len(content) > BYTES_MAX:
                    raise ConfigError(f"jwt_jwks_url: {url} sends more than {BYTES_MAX} bytes")
                if time.monotonic() > end:
                    raise ConfigError(f"jwt_jwks_url: {url} takes longer than {FETCH_S:g} s")
    except urllib.error.HTTPError as error:
        error.close()
        raise ConfigError(f"jwt_jwks_url: {url} answers with status {error.code}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"jwt_jwks_url: {url} cannot be read: {reason}") from error
    return bytes(content)

"""The certificate of a server, read again when it changes: the next connection gets the new one.

Not here: listening (``run``), and what else TLS is set to, which is uvicorn's.
"""

from __future__ import annotations

import ssl
from typing import Any

from entidb.credentials import why_unreadable
from entidb.errors import ConfigError
from entidb.server.watched import Watched, mark_of
from entidb.types import Clock


class Certificate:
    """A certificate and its key on the disk, as PEM. Raises ``ConfigError`` if they cannot be
    read, or do not belong together."""

    def __init__(self, cert: str, key: str, clock: Clock) -> None:
        self._cert, self._key = cert, key
        # Two files are never replaced at one instant: as long as they do not belong together, the
        # pair before them stays.
        self._watched = Watched(
            f"the certificate {cert}", self._load, lambda: (*mark_of(cert), *mark_of(key)), clock
        )

    def install(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """``context`` itself, whose connections from now on show the newest pair."""

        def choose(connection: Any, name: str | None, asked: ssl.SSLContext) -> None:
            connection.context = self._watched.current()

        # Called at the start of each handshake, also where no name is asked for. A context that
        # is in use is never changed: it could be left with half a pair.
        context.sni_callback = choose
        return context

    def reload(self) -> None:
        """Raises ``ConfigError``; the pair in force stays then."""
        self._watched.reread()

    def _load(self) -> ssl.SSLContext:
        for name, path in (("tls_cert", self._cert), ("tls_key", self._key)):
            try:
                with open(path, "rb"):
                    pass
            except (OSError, ValueError) as error:
                why = why_unreadable(error)
                raise ConfigError(f"{name}: cannot read {path}: {why}") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key, password="")
        except (OSError, ssl.SSLError) as error:
            fault = "one of them is not in PEM form, or the key has a password: take it away"
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                fault = (
                    "they do not belong together: give the key that the certificate was made for"
                )
            raise ConfigError(
                f"the certificate {self._cert} with the key {self._key}: {fault}"
            ) from error
        return context

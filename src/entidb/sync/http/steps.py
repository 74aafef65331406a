"""The steps of one exchange as the library reports them: sent, connecting, the TLS handshake.

``client`` decides who ends an exchange, and when.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from entidb.errors import SyncError
from entidb.sync.interrupt import Watch


class NewConnectionError(Exception):
    """No kept connection is left, and the request has to move to a thread that may be left to
    itself."""


class Steps:
    """What the library calls at every step of one exchange (its ``trace`` extension); every new
    connection is passed to ``remember`` before it is used."""

    def __init__(
        self,
        remember: Callable[[socket.socket], None],
        watch: Watch,
        on_sent: Callable[[], None] | None,
        *,
        connects: bool,
    ) -> None:
        self.watch = watch
        #: The connection was lost before the request had left: the server cannot have all of it.
        self.cut_short = False
        self._remember = remember
        self._on_sent = on_sent
        self._connects = connects
        self._connection: socket.socket | None = None
        self._during_handshake: socket.socket | None = None

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("send_request_body.complete"):
            if self._on_sent is not None:
                self._on_sent()
        elif event.endswith("send_request_body.failed"):
            self.cut_short = True
        elif event.endswith("connect_tcp.started"):
            if not self._connects:
                raise NewConnectionError
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connected(info["return_value"])
        elif event.endswith("start_tls.started"):
            self._shake_hands()

    def _connected(self, stream: Any) -> None:
        self.end()
        self._connection = stream.get_extra_info("socket")
        assert self._connection is not None
        try:
            self._remember(self._connection)
            self.watch.check()
        except SyncError:
            stream.close()
            raise

    def _shake_hands(self) -> None:
        """Wrapping a socket in TLS takes it away from its object, and the new one is not known
        before the handshake is over: a duplicate can be cut meanwhile."""
        if isinstance(self._connection, ssl.SSLSocket):
            return  # to a proxy over TLS; that one stays what it is
        assert self._connection is not None
        self._during_handshake = self._connection.dup()
        self._remember(self._during_handshake)
        self.watch.check()

    def end(self) -> None:
        """The handshake is over, or there was none. A duplicate would keep a connection open."""
        if self._during_handshake is not None:
            self._during_handshake.close()
            self._during_handshake = None

"""Administration beside the server: over a socket in the data directory, for its owner.

One line of JSON each way: ``{"method", "path", "query", "body"}``, and ``{"status", "body"}``. The
socket is made for the owner alone, and who connects is looked at once more by the number of his
user. Not where the system has no such sockets.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import socketserver
import stat
import struct
import sys
from typing import Any, Final

from msgspec import Raw, Struct, ValidationError, json

from entidb.errors import PermissionDeniedError, ProtocolError
from entidb.events import Thread
from entidb.server.admin.asking import BODY_BYTES_MAX, refusal
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office

logger = logging.getLogger("entidb.server")

SOCKET: Final = "entidb-admin.sock"
#: Bytes of a path that a socket can have.
_PATH_MAX: Final = 100
#: Seconds for one request and its answer to cross the socket.
_TIMEOUT_S: Final = 60.0


class LocalRequest(Struct):
    """One line."""

    method: str
    path: str
    query: dict[str, str] = {}
    body: Raw = Raw(b"{}")


class LocalAnswer(Struct):
    """The line that answers it."""

    status: int
    body: Raw


@contextlib.contextmanager
def reachable(data_dir: str, name: str = SOCKET) -> Any:
    """The path of the socket, as it can be given to the system: one that is too long goes by the
    way of the open directory."""
    path = os.path.join(data_dir, name)
    if len(os.fsencode(path)) <= _PATH_MAX:
        yield path
        return
    descriptor = os.open(data_dir, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


class LocalDoor:
    """The socket of a running server. Raises ``OSError`` where there can be none."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._path = os.path.join(str(office.root), SOCKET)
        with reachable(str(office.root)) as path:
            # The directory is this server's alone, so a socket that is there is a dead one's.
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(self._path).st_mode):
                    os.unlink(self._path)
            before = os.umask(0o177)
            try:
                self._server = _Server(path, self._answer)
            finally:
                os.umask(before)
        self._made = os.lstat(self._path)
        self._thread = Thread(target=self._server.serve_forever, name="entidb-admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with contextlib.suppress(OSError):
            # Where the directory was moved, another server's may stand there now.
            if os.path.samestat(os.lstat(self._path), self._made):
                os.unlink(self._path)

    def _answer(self, line: bytes, connection: socket.socket) -> bytes:
        from entidb.server.admin.routes import answer  # most servers are never asked this way

        try:
            caller = Caller(_user(connection), "local")
            request = json.decode(line, type=LocalRequest)
            status, body = answer(
                self._office,
                caller,
                request.method,
                request.path,
                request.query,
                bytes(request.body),
            )
        except (ValidationError, ValueError, RecursionError) as error:
            status, body = refusal(ProtocolError(f"the request cannot be read: {error}"))
        except PermissionDeniedError as error:
            status, body = refusal(error)
        return json.encode(LocalAnswer(status, Raw(body))) + b"\n"


def open_door(office: Office) -> LocalDoor | None:
    """None where there can be none: in memory, or where the system has no such sockets."""
    if office.place.root is None or not hasattr(socket, "AF_UNIX"):
        return None
    try:
        return LocalDoor(office)
    except OSError as error:
        logger.warning("`entidb admin` has no socket here: %s; it can go by --url", error)
        return None


def _user(connection: socket.socket) -> str:
    """Who is at the other end. Raises ``PermissionDeniedError`` for another user than the
    server's, or root."""
    if not hasattr(socket, "SO_PEERCRED"):
        return "local"  # the permissions of the socket have to do
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", raw)
    if user not in (0, os.geteuid()):
        raise PermissionDeniedError("only the user of the server, or root, administers it here")
    return _name(user)


def _name(user: int) -> str:
    if sys.platform == "win32":
        return "local"
    import pwd  # there is none on Windows

    try:
        return f"local:{pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"local:{user}"


if sys.platform != "win32":

    class _Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True
        block_on_close = False

        def __init__(self, path: str, call: Any) -> None:
            self.call = call
            super().__init__(path, _Handler)

        def handle_error(self, request: Any, client_address: Any) -> None:
            logger.warning("a local request was cut off", exc_info=True)

    class _Handler(socketserver.StreamRequestHandler):
        timeout = _TIMEOUT_S
        server: _Server

        def handle(self) -> None:
            line = self.rfile.readline(2 * BODY_BYTES_MAX)
            if line.endswith(b"\n"):
                self.wfile.write(self.server.call(line, self.request))


def ask(data_dir: str, request: LocalRequest, timeout_s: float = 120.0) -> LocalAnswer:
    """Ask the server of ``data_dir``. Raises ``OSError`` if none runs there, ``ValueError`` for
    an answer that is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        with reachable(data_dir) as path:
            connection.connect(path)
        connection.sendall(json.encode(request) + b"\n")
        with connection.makefile("rb") as answers:
            return json.decode(answers.readline(), type=LocalAnswer)

"""How the processes of one server ask each other: over a socket beside the seat of each, one line
of JSON each way. Who has answered a *lease* goes on until the one that asked hangs up, in whatever
way.

The folder of the seats is the owner's alone, and so are the sockets in it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

from msgspec import Raw, Struct, ValidationError, json

from entidb.errors import EntiDBError, ServerBusyError
from entidb.events import Thread
from entidb.server.admin.local import reachable

logger = logging.getLogger("entidb.server")

#: Seconds for a line to cross the socket, once somebody has begun it.
_LINE_S: Final = 30.0
_LINE_BYTES_MAX: Final = 64 * 2**20

Answers = dict[str, Callable[[Any], Any]]
Leases = dict[str, Callable[[Any], AbstractContextManager[None]]]


class Question(Struct):
    """One line."""

    ask: str
    given: Any = None


class Reply(Struct):
    """The line that answers it; ``fault`` where there is no answer."""

    value: Raw = Raw(b"null")
    fault: str | None = None


class Passed(Struct):
    """A request to administration, passed on to the process in the chair."""

    who: str
    where: str
    databases: list[str] | None
    method: str
    path: str
    query: dict[str, str]
    body: str


class Ear:
    """Where one process is asked, on threads of its own. Raises ``OSError``."""

    def __init__(self, folder: str, name: str, answers: Answers, leases: Leases) -> None:
        self._answers, self._leases = answers, leases
        with reachable(folder, name) as path:
            self._server = _Server(path, self)
        self._thread = Thread(
            target=self._server.serve_forever, args=[0.1], name="entidb-ear", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def hear(self, line: bytes, say: Callable[[bytes], object], wait: Callable[[], object]) -> None:
        """Answer one line; ``wait`` comes back when the other side has hung up."""
        hear(self._answers, self._leases, line, say, wait)


def hear(
    answers: Answers,
    leases: Leases,
    line: bytes,
    say: Callable[[bytes], object],
    wait: Callable[[], object],
) -> None:
    """Answer one line to ``say``. A lease goes on until ``wait`` comes back."""
    try:
        question = json.decode(line, type=Question)
        lease = leases.get(question.ask)
        if lease is not None:
            with lease(question.given):
                say(_line(Reply()))
                wait()
            return
        value = answers[question.ask](question.given)
        reply = Reply(Raw(json.encode(value)))
    except EntiDBError as error:
        reply = Reply(fault=str(error))
    except (KeyError, ValueError, ValidationError) as error:
        logger.warning("another process of this server asked what is not known: %s", error)
        reply = Reply(fault=f"not known here: {error}")
    say(_line(reply))


def _line(reply: Reply) -> bytes:
    return json.encode(reply) + b"\n"


if sys.platform != "win32":

    class _Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def __init__(self, path: str, ear: Ear) -> None:
            self.ear = ear
            super().__init__(path, _Handler)

        def handle_error(self, request: Any, client_address: Any) -> None:
            logger.debug("another process of this server was cut off", exc_info=True)

    class _Handler(socketserver.StreamRequestHandler):
        timeout = _LINE_S
        server: _Server

        def handle(self) -> None:
            line = self.rfile.readline(_LINE_BYTES_MAX)
            if line.endswith(b"\n"):
                self.server.ear.hear(line, self.wfile.write, self._wait)

        def _wait(self) -> None:
            self.connection.settimeout(None)
            with contextlib.suppress(OSError):
                self.rfile.read(1)


def ask(folder: str, name: str, what: str, given: Any, timeout_s: float, kind: Any = Any) -> Any:
    """The answer of the process at the socket ``name``. Raises ``OSError`` if it does not answer
    in time, or has ended; ``ServerBusyError`` with what it says instead."""
    with asking(folder, name, what, given, timeout_s) as value:
        return json.decode(value, type=kind)


@contextmanager
def asking(folder: str, name: str, what: str, given: Any, timeout_s: float) -> Iterator[Raw]:
    """As ``ask``, undecoded; a lease goes on until the end of the block."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        with reachable(folder, name) as path:
            connection.connect(path)
        connection.sendall(json.encode(Question(what, given)) + b"\n")
        with connection.makefile("rb") as lines:
            line = lines.readline(_LINE_BYTES_MAX)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("it has ended")
        yield said(line)


def said(line: bytes) -> Raw:
    """The answer in a line. Raises ``ServerBusyError`` with what is said instead."""
    reply = json.decode(line, type=Reply)
    if reply.fault is not None:
        raise ServerBusyError(reply.fault, retry_after=1.0)
    return reply.value


__all__ = ["Answers", "Ear", "Leases", "Passed", "Question", "ask", "asking", "hear", "said"]

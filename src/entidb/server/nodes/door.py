"""Administration of a server on PostgreSQL by who has its address: a letter to the node on duty.

Who may write to the tables may change anything in them anyway, so nobody asks him for a token.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, Final

from msgspec import Raw, json

from entidb.errors import TransportError
from entidb.server.admin.local import LocalAnswer, LocalRequest
from entidb.server.workers.talk import Passed, Question, said
from entidb.storage.addresses import whole

if TYPE_CHECKING:
    from entidb.storage.postgres.company import Nodes

#: Fewer than a node has, so that a command shares nothing with a server in the same process.
_CONNECTIONS: Final = 4
#: Seconds in which a node takes over that was not on duty.
_FIND_S: Final = 5.0
_LOOK_S: Final = 0.1


def ask_nodes(address: str, request: LocalRequest, timeout_s: float) -> LocalAnswer:
    """The answer of the node that is on duty. Raises ``ConfigError``, ``StorageError``;
    ``TransportError`` if no node serves there, or it does not answer; ``ServerBusyError``."""
    from entidb.storage.postgres.company import Nodes
    from entidb.storage.postgres.sharing import SharedTables

    shared = SharedTables(whole(address), _CONNECTIONS, read_only=True)
    with contextlib.closing(shared) as sharing:
        if not sharing.has_records:
            raise _nobody(sharing.where)
        nodes = Nodes(sharing)
        number = _on_duty(nodes, sharing.where)
        who = f"{sharing.user()} by PostgreSQL"
        body = bytes(request.body).decode("latin-1")
        where = socket.gethostname()
        passed = Passed(who, where, None, request.method, request.path, request.query, body)
        try:
            line = nodes.ask(number, json.encode(Question("admin", passed)), timeout_s)
        except OSError as error:
            raise TransportError(
                f"the node that is on duty at {sharing.where} gave no answer: {error}; look what "
                "came of this before you ask again"
            ) from error
    status, text = json.decode(said(line), type=tuple[int, str])
    return LocalAnswer(status, Raw(text.encode("latin-1")))


def _on_duty(nodes: Nodes, where: str) -> int:
    end = time.monotonic() + _FIND_S
    while True:
        members = nodes.members()
        for each in members:
            if each.on_duty:
                return each.number
        if not members or time.monotonic() >= end:
            raise _nobody(where)
        time.sleep(_LOOK_S)


def _nobody(where: str) -> TransportError:
    return TransportError(f"no server serves {where}: start one with `entidb serve`, or give --url")


__all__ = ["ask_nodes"]

"""What signals do to a server that is a process: SIGTERM and SIGINT stop it in order, SIGHUP has it
read its keys and its certificate again.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

import uvicorn

from entidb.errors import EntiDBError
from entidb.events import Thread
from entidb.server.certificates import Certificate
from entidb.server.inherited import heard
from entidb.server.server import SyncServer

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_HANGUP: Final = getattr(signal, "SIGHUP", None)


@contextlib.contextmanager
def signals(server: uvicorn.Server, hang_up: Callable[[], None]) -> Iterator[None]:
    """uvicorn stops by the signals itself and then raises them again, which would end the process
    by a signal after a clean stop. These handlers take that second one, and the one that comes
    before uvicorn listens. By itself SIGHUP would end the server without a word, also when it is
    only a terminal that closes; here ``hang_up`` runs, on a thread of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    def read_again(number: int, frame: FrameType | None) -> None:
        Thread(target=hang_up, name="entidb-sighup", daemon=True).start()

    before = {each: signal.signal(each, stop) for each in _STOP_SIGNALS}
    if _HANGUP is not None:
        before[_HANGUP] = signal.signal(_HANGUP, read_again)
    try:
        with heard(before):
            yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def read_again(server: SyncServer, certificate: Certificate | None) -> None:
    """Read everything again that can be, and say in one line what came of it."""
    said = []
    try:
        words = server.reload()
        said += [f"keys: {words}"] if words else []
    except EntiDBError as error:
        said.append(f"the keys stay as they were: {error}")
    if certificate is not None:
        try:
            certificate.reload()
            said.append("the certificate was read again")
        except EntiDBError as error:
            said.append(f"the certificate stays as it was: {error}")
    line = "; ".join([*(said or ["nothing to read again"]), "other settings need a restart"])
    # A path or a kid may hold anything.
    shown = "".join(each if each.isprintable() else "?" for each in line)
    print(f"entidb: SIGHUP: {shown}", file=sys.stderr, flush=True)

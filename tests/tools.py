"""Programs that some tests need and not every machine has: such a test is left out, and the end of
the run says so in one line (``conftest``). And ports for programs that choose none by themselves.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

#: How the reason of a test begins that was left out because something is not installed.
NOT_RUN = "not run: "
#: A property of the tests of planted bugs for which no seed was remembered that shows them.
SEARCHED = "searched for a seed"


def program(name: str) -> Path:
    """Where the program ``name`` is. Leaves the test out where there is none."""
    if (found := _found(name)) is None:
        pytest.skip(f"{NOT_RUN}{name} is not installed")
    return Path(found)


def missing(*names: str) -> str | None:
    """Why nothing is run that needs these programs; None where all of them are."""
    lacks = " and ".join(name for name in names if _found(name) is None)
    return f"{NOT_RUN}{lacks} is not installed" if lacks else None


def _found(name: str) -> str | None:
    # Debian keeps servers where only root looks by itself.
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


def package(name: str) -> None:
    """Leaves the test out where the package ``name`` is not installed."""
    pytest.importorskip(name, reason=f"{NOT_RUN}{name} is not installed")


#: A parent kills a worker that does not answer it for 5 seconds (uvicorn) or 30 (gunicorn), which
#: on a busy machine may be any of them, and again and again. That of uvicorn may wait so long
#: before it sees that one was killed.
PATIENT = {"uvicorn": ["--timeout-worker-healthcheck", "25"], "gunicorn": ["--timeout", "120"]}
#: Ports below those that a system gives to who asks for any: nobody has one by chance. One that a
#: process of tests has taken is no other's as long as that process lives.
_PORTS = range(20_000, 30_000)
_taken: list[socket.socket] = []


def free_port() -> int:
    """A port of this machine for a program that begins later. A port that the system chose, and
    that is closed again, may be given to somebody else before that program has it."""
    order = random.SystemRandom().sample(_PORTS, len(_PORTS))
    return next(each for each in order if _is_free(each) and _take(each))


def _is_free(port: int) -> bool:
    with socket.socket() as found, contextlib.suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("", port))
        return True
    return False


def _take(port: int) -> bool:
    """Whether it is this process's from now on, and of none of the other tests."""
    if not sys.platform.startswith("linux"):
        return True
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0entidb-test-port-{port}")
    except OSError:
        mark.close()
        return False
    _taken.append(mark)
    return True


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and nobody can until the end of the block."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]

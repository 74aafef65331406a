"""Looks whether a closed copy of a database is well, in a process of its own: reading all of it
would take the time of all others in this one, and a damaged page ends only that other one.

    python -m entidb.server.admin.checking PATH HOW      one line of JSON

HOW is ``idle``, where it may take as long as nobody else needs a processor, or ``nice``. While its
standard input has last said that the process works that had it made, it rests after each few
milliseconds: a core that reads all the time makes the others slower, whatever it would leave them.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct, ValidationError, json

from entidb.db import Database, inspect
from entidb.errors import CorruptionError, EntiDBError, FormatError, StorageError
from entidb.storage.disk_errors import said_of
from entidb.storage.opening import closed_faults

#: Faults that are reported at most.
FAULTS_MAX: Final = 100
_LOOK_S: Final = 0.1
_NICE: Final = 10
#: Bytes a second that a look reads at least, and seconds that it takes to begin. Where nothing is
#: left over for one that is ``idle``, it is slower, and another one takes its share.
_BYTES_PER_S: Final = 1_000_000
_BEGIN_S: Final = 60.0
#: Of a core that this process needs while it serves, the share from which on others are at work.
_AT_WORK: Final = 0.02
#: What a look is told of that, and seconds of a processor after which it rests, and for how long.
_THEY_WORK, _THEY_REST = b"w", b"r"
_WORK_S: Final = 0.01
_REST_S: Final = 0.015
_rest_for = time.sleep


class Found(Struct):
    """What is in a copy, and what is wrong with it."""

    faults: list[str]
    head: int = 0
    entities: int = 0
    role: str = ""


def check(path: str, go_on: Callable[[], None]) -> Found:
    """Look at the closed database at ``path``. ``go_on`` is called now and then, and ends the look
    by raising. Raises ``StorageError`` if nothing can be found out."""
    size = 0
    with contextlib.suppress(OSError):  # whoever looks says what is wrong
        size = sum(entry.stat().st_size for entry in os.scandir(path))
    found = _look_elsewhere(path, "idle", go_on, _BEGIN_S + size / _BYTES_PER_S)
    if found is None:
        found = _look_elsewhere(path, "nice", go_on)
    assert found is not None, "its patience has no end"
    return found


def _look_elsewhere(
    path: str, how: str, go_on: Callable[[], None], patience_s: float = math.inf
) -> Found | None:
    """None: it takes longer than ``patience_s``."""
    command = [sys.executable, "-m", "entidb.server.admin.checking", path, how]
    # The same code as this process has, however it came to it.
    source = str(Path(__file__).parents[3])
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    until = time.monotonic() + patience_s
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        bufsize=0,
    ) as process:
        # ``communicate`` would close it.
        telling, process.stdin = process.stdin, None
        assert telling is not None
        told, used = b"", time.process_time()
        try:
            go_on()  # a small file is looked at before the first time is over
            while True:
                try:
                    out, errors = process.communicate(timeout=_LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    go_on()
                before, used = used, time.process_time()
                now = _THEY_WORK if used - before > _AT_WORK * _LOOK_S else _THEY_REST
                if now != told:
                    told = now
                    with contextlib.suppress(BrokenPipeError):  # it has come to its end
                        telling.write(now)
                if time.monotonic() > until:
                    process.kill()
                    return None
        except BaseException:
            process.kill()
            raise
        finally:
            telling.close()
    try:
        return json.decode(out, type=Found)
    except (ValidationError, ValueError) as error:
        if process.returncode < 0:
            # Its pages lead nowhere.
            return Found([f"reading it ended a process by signal {-process.returncode}"])
        said = errors.decode("utf-8", "replace").strip().splitlines()
        raise StorageError(
            f"{path} could not be checked: {said[-1] if said else process.returncode}"
        ) from error


def main(path: str, how: str) -> None:
    if hasattr(os, "nice"):
        os.nice(_NICE)
    if sys.platform == "linux" and how == "idle":
        # Who is nice keeps its core for a moment when others wake up, which is long for a push.
        with contextlib.suppress(OSError):  # not everywhere is that allowed
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if sys.platform != "win32":
        _rest_now_and_then()
    try:
        found = _look(path)
    finally:
        if sys.platform != "win32":
            # While Python ends, its handlers are gone, and the signal would end the process.
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
    sys.stdout.buffer.write(json.encode(found))


def _rest_now_and_then() -> None:
    they_work = False

    def listen() -> None:
        nonlocal they_work
        while said := os.read(sys.stdin.fileno(), 1):
            they_work = said == _THEY_WORK
        they_work = False

    def rest(*_: object) -> None:
        if they_work:
            _rest_for(_REST_S)

    threading.Thread(target=listen, daemon=True).start()
    signal.signal(signal.SIGPROF, rest)
    signal.setitimer(signal.ITIMER_PROF, _WORK_S, _WORK_S)


def _look(path: str) -> Found:
    try:
        faults = closed_faults(path)
        if faults:
            return Found(faults[:FAULTS_MAX])
        with Database.open(path, create=False, read_only=True) as database:
            faults = database.verify()
            about = inspect(database)
    except (CorruptionError, FormatError) as error:
        return Found([str(error)])
    entities = sum(each["entities"] for each in about["collections"].values())
    return Found(faults[:FAULTS_MAX], about["sequence"], entities, about["role"])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except (EntiDBError, OSError) as error:
        said = said_of(error, "reading it") if isinstance(error, OSError) else error
        print(said, file=sys.stderr)
        sys.exit(1)

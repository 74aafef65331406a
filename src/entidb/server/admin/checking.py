"""Looks whether a closed copy of a database is well, in a process of its own: reading all of it
would take the time of all others in this one, and a damaged page ends only that other one.

    python -m entidb.server.admin.checking PATH      one line of JSON
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct, ValidationError, json

from entidb.db import Database, inspect
from entidb.errors import CorruptionError, EntiDBError, FormatError, StorageError
from entidb.storage.opening import closed_faults

#: Faults that are reported at most.
FAULTS_MAX: Final = 100
_LOOK_S: Final = 0.1
_NICE: Final = 10


class Found(Struct):
    """What is in a copy, and what is wrong with it."""

    faults: list[str]
    head: int = 0
    entities: int = 0
    role: str = ""


def check(path: str, go_on: Callable[[], None]) -> Found:
    """Look at the closed database at ``path``. ``go_on`` is called now and then, and ends the look
    by raising. Raises ``StorageError`` if nothing can be found out."""
    command = [sys.executable, "-m", "entidb.server.admin.checking", path]
    # The same code as this process has, however it came to it.
    source = str(Path(__file__).parents[3])
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        try:
            while True:
                try:
                    out, errors = process.communicate(timeout=_LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    go_on()
        except BaseException:
            process.kill()
            raise
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


def main(path: str) -> None:
    if hasattr(os, "nice"):
        os.nice(_NICE)
    sys.stdout.buffer.write(json.encode(_look(path)))


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
        main(sys.argv[1])
    except (EntiDBError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)

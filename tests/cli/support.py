"""What the tests of the command line share: running it here, and in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from entidb.cli.app import cli
from entidb.db import Database

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 120


def entidb(*words: object, stdin: str | bytes | None = None, **env: str) -> Result:
    """Run one command line in this process; the environment names no database unless ``env``."""
    blank = {name: None for name in os.environ if name.startswith("ENTIDB_")}
    runner = CliRunner(env={**blank, **env})
    return runner.invoke(cli, [str(word) for word in words], input=stdin)


def done(*words: object, stdin: str | bytes | None = None, **env: str) -> str:
    """As ``entidb``, which has to end with 0; what it printed."""
    result = entidb(*words, stdin=stdin, **env)
    assert result.exit_code == 0, result.output
    return result.stdout


def documents(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def document(text: str) -> Any:
    (found,) = documents(text)
    return found


def failed(result: Result, code: int, name: str) -> str:
    """The one line of an error that ended with exit ``code``; all promises about it hold."""
    assert result.exit_code == code, (result.exit_code, result.output)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"error[{name}]: "), lines[0]
    return lines[0]


def environment(**env: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ENTIDB_")}
    return {**kept, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error", **env}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "entidb", *map(str, words)]


def process(
    *words: object, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run one command line as anybody does, and wait for its end."""
    return subprocess.run(
        command(*words),
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
        env=environment(**(env or {})),
        check=False,
    )


def put(path: Path, collection: str, number: int, value: Any) -> uuid.UUID:
    """Commit one entity without the command line."""
    entity_id = uuid.UUID(int=number << 96 | number)
    with Database.open(path) as database:
        database.collection(collection)[entity_id] = value
    return entity_id


def dumped(path: Path, collection: str) -> dict[uuid.UUID, bytes]:
    with Database.open(path, create=False) as database:
        return {uuid.UUID(bytes=raw): bytes(payload)
                for raw, payload in database.collection(collection).payloads()}  # fmt: skip

"""Processes of this version and of an older one, side by side.

The older version is taken from this project's own git history. Where that is not at hand (an
unpacked source distribution, a shallow clone), the tests are skipped and say so.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
PEER: Final = Path(__file__).parent / "peer.py"
#: The commit of each older version that is tried.
OLD: Final = {"0.3.1": "3af7367"}
READY_S: Final = 60


def source_of(version: str, folder: Path) -> Path:
    """The ``src`` of ``version`` in ``folder``; skips the test where git does not have it."""
    if version == "now":
        return ROOT / "src"
    try:
        packed = subprocess.run(
            ["git", "archive", "--format=zip", OLD[version], "src"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"EntiDB {version} is not in the git history here: not tried against it")
    # Not tar: Python 3.11.0 to 3.11.3 have no filter for it, and later ones warn without one.
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(folder)
    return folder / "src"


def environment(source: Path) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ENTIDB_")}
    return {**kept, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}


class Device:
    """A ``peer.py`` in a process of its own; ``device.sync()`` sends ``{"do": "sync"}``."""

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PEER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(source),
            text=True,
        )

    def __getattr__(self, name: str) -> Any:
        return lambda **words: self._ask({"do": name, **words})

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended at {order}"
        return json.loads(line)

    def put(self, *writes: tuple[str, int, Any]) -> None:
        self._ask({"do": "write", "writes": writes})

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(READY_S)
        self._process.stdout.close()


@contextlib.contextmanager
def device(source: Path, path: Path, url: str = "", **settings: Any) -> Iterator[Device]:
    made = Device(source)
    try:
        made.open(path=str(path), url=url, **settings)
        yield made
        made.close()
    finally:
        made.end()


@contextlib.contextmanager
def server(source: Path, folder: Path, *options: str) -> Iterator[str]:
    """``entidb serve`` of that version; its URL."""
    ready = folder.with_suffix(".ready")
    ready.unlink(missing_ok=True)
    words = ["serve", str(folder), "--port", "0", "--ready-file", str(ready)]
    if "--jwt-secret-file" not in options:
        words.append("--insecure-no-auth")
    with subprocess.Popen(
        [sys.executable, "-m", "entidb", *words, *options],
        env=environment(source),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield _url(process, ready)
        finally:
            process.terminate()
            process.wait(READY_S)


def _url(process: subprocess.Popen[bytes], ready: Path) -> str:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if ready.exists() and (url := ready.read_text().strip()):
            return url
        assert process.poll() is None, f"the server ended with {process.returncode}"
        time.sleep(0.01)
    raise AssertionError("the server did not get ready")

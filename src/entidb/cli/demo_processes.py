"""The demo's processes: starting them, talking to them, and leaving none behind.

Every child is a session of its own, so that Ctrl-C reaches only the demo, which then stops them in
its own order. Devices also end by themselves when their input does; the server is stopped by the
context manager that started it, whatever happened in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click

from entidb.events import SafeEvent, Thread
from entidb.types import SystemClock

#: Seconds. Nothing that the demo asks for takes more than one; this only ends the wait for a
#: process that is gone.
ANSWER_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
_READY_POLL_S = 0.02
_LOG_TAIL_BYTES = 2000

Answer = dict[str, Any]


class DemoError(click.ClickException):
    """The demo cannot go on; the message says at which point, and why."""


class DeviceProcess:
    """A device in a process of its own, and the pipe to it. ``committed`` remembers the id of
    every transaction the device said is durable, also of a process that was killed since."""

    def __init__(self, name: str, directory: Path, url: str, token: str) -> None:
        self.name = name
        self.path = directory / name.lower()
        self.committed: list[str] = []
        self._log = directory / f"{name.lower()}.log"
        self._settings = {"path": str(self.path), "url": url, "token": token}
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader: threading.Thread | None = None

    def start(self) -> Answer:
        """Start the process and open its database; returns what it found there."""
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "entidb.cli.demo_device"],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        # A pipe cannot be read with a timeout, a queue can.
        self._answers = queue.Queue()
        arguments = (_pipe(process.stdout), self._answers)
        self._reader = Thread(target=_read_lines, args=arguments, daemon=True)
        self._reader.start()
        return self._ask(self._settings)

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Run one command. Raises ``DemoError`` for anything but an answer."""
        answer = self.try_to(do, **arguments)
        if "error" in answer:
            raise DemoError(f"{self.name} could not {do}: {answer['message']} ({answer['error']})")
        return answer

    def try_to(self, do: str, **arguments: Any) -> Answer:
        """As ``ask``, but an error of the device is an answer too."""
        answer = self._ask({"do": do, **arguments})
        self.committed += answer.get("committed", ())
        return answer

    def kill(self) -> int:
        """SIGKILL; the exit status as the system reports it."""
        assert self._process is not None, "only a running device can be killed"
        self._process.kill()
        status = self._process.wait(STOP_TIMEOUT_S)
        self._close_pipes(self._process)
        return status

    def stop(self) -> None:
        """End the process: close its input, and kill it if that does not help. Idempotent."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()
        _wait_or_kill(process)
        self._close_pipes(process)

    def _ask(self, command: Answer) -> Answer:
        assert self._process is not None, "start the device first"
        pipe = _pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # the empty answer below says more
            pipe.write(json.dumps(command) + "\n")
            pipe.flush()
        try:
            line = self._answers.get(timeout=ANSWER_TIMEOUT_S)
        except queue.Empty:
            raise DemoError(f"{self.name} did not answer to {command.get('do')!r}") from None
        if not line:
            raise DemoError(f"{self.name}'s process ended:\n{_tail(self._log)}")
        answer: Answer = json.loads(line)
        return answer

    def _close_pipes(self, process: subprocess.Popen[str]) -> None:
        if self._reader is not None:
            self._reader.join(STOP_TIMEOUT_S)
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()
        _pipe(process.stdout).close()


def _read_lines(pipe: IO[str], lines: queue.Queue[str]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put("")


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "the process was started with pipes"
    return pipe


class ServerProcess:
    """``entidb serve`` on a free port of loopback, started like any other server."""

    def __init__(self, directory: Path, secret_file: Path, *options: str) -> None:
        self.data = directory / "server"
        self._log = directory / "server.log"
        self._ready = directory / "server.ready"
        self.command = ["entidb", "serve", str(self.data)]
        self.command += ["--port", "0", "--secret-file", str(secret_file)]
        self.command += ["--ready-file", str(self._ready), *options]
        self.pid = 0
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until it serves."""
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = process.pid
        self.url = self._wait_until_ready(process)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> str:
        clock = SystemClock()
        end = clock.monotonic() + ANSWER_TIMEOUT_S
        while clock.monotonic() < end:
            if process.poll() is not None:
                raise DemoError(f"the server ended while it started:\n{_tail(self._log)}")
            if self._ready.exists():
                return self._ready.read_text(encoding="utf-8").strip()
            clock.wait(SafeEvent(), _READY_POLL_S)
        raise DemoError(f"the server is not ready after {ANSWER_TIMEOUT_S} s:\n{_tail(self._log)}")

    def stop(self) -> int:
        """SIGTERM, and its exit status; 0 says that it finished and closed everything."""
        if self._process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        return _wait_or_kill(self._process)


def _environment() -> dict[str, str]:
    """The environment of this process, without settings for the user's own server or database."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ENTIDB_")}


def _wait_or_kill(process: subprocess.Popen[Any]) -> int:
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _tail(log: Path) -> str:
    text = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return text or "(it left no message)"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: by an exception that cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not stop the cleaning up that the first one began."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""A worker as the torture run sees it: a process that is started, killed and stopped, and what it
reported before.

``torture_worker`` decides what the process does, ``torture`` when something happens to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from entidb.testing.torture_worker import end_with_parent

#: Seconds. Far beyond what each takes: they bound a run that hangs, and decide nothing else.
START_SECONDS: Final = 60.0


class TortureFailure(Exception):
    """A promise was broken, or a process ended by itself."""


class TortureProcess:
    """One worker, started again after every kill. Ended by its process id, and always reaped."""

    def __init__(
        self,
        name: str,
        role: str,
        settings: dict[str, Any],
        directory: Path,
        module: str = "entidb.testing.torture_worker",
    ) -> None:
        self.name = name
        self.stopped = False
        self.ledger = directory / f"{name}.ledger"
        self.log = directory / f"{name}.log"
        self._command = ["-m", module, role]
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        self._starts += 1
        seed = f"{self._settings['seed']} {self._starts}"
        settings = self._settings | {"seed": seed, "parent": os.getpid()}
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with open(self.ledger, "ab") as ledger, open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._command, json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=ledger, stderr=log,
                env={**os.environ, "PYTHONPATH": path}, preexec_fn=end_with_parent,
            )  # fmt: skip

    def kill(self) -> None:
        process = self._process
        if process is None:
            return
        self.check()
        process.kill()
        self._reap(process)

    def pause(self) -> None:
        if self._process is not None and not self.stopped:
            self._process.send_signal(signal.SIGSTOP)
            self.stopped = True

    def go_on(self) -> None:
        if self._process is not None and self.stopped:
            self._process.send_signal(signal.SIGCONT)
        self.stopped = False

    def check(self) -> None:
        """Raises ``TortureFailure`` if the process has ended without an order."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise TortureFailure(f"{self.name} ended by itself ({code}); {self._last_words()}")

    def order(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise TortureFailure(f"{self.name} takes no orders ({error})") from error

    def finish(self, how: Callable[[], None]) -> None:
        """End it with ``how``, and check that it ends in order."""
        process = self._process
        assert process is not None
        self.check()
        how()
        try:
            code = process.wait(START_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TortureFailure(f"{self.name} does not end") from error
        self._reap(process)
        if code != 0:
            raise TortureFailure(f"{self.name} ended with {code}; {self._last_words()}")

    def terminate(self) -> None:
        assert self._process is not None
        self._process.terminate()

    def discard(self) -> None:
        """End it whatever state it is in; never raises."""
        process = self._process
        if process is not None:
            process.kill()
            self._reap(process)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # what was not read any more
                process.stdin.close()
        self._process = None
        self.stopped = False

    def _last_words(self) -> str:
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return "its log ends: " + " | ".join(lines[-5:])


@dataclass
class Ledger:
    """What a client reported, whatever happened to it since."""

    begun: set[str] = field(default_factory=set)
    committed: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    drained: int | None = None
    synced: list[int] = field(default_factory=list)


def read_ledger(path: Path) -> Ledger:
    ledger = Ledger()
    with open(path, "rb") as file:
        for raw in file:
            _enter(json.loads(raw), ledger)
    return ledger


def _enter(line: dict[str, Any], ledger: Ledger) -> None:
    if "begun" in line:
        ledger.begun.add(line["begun"])
    elif "committed" in line:
        ledger.committed[line["committed"]] = line["sum"]
    elif "fault" in line:
        ledger.faults.append(line["fault"])
    elif "drained" in line:
        ledger.drained = line["drained"]
    else:
        ledger.synced.append(line["synced"])

"""The parent of workers by itself, in surroundings that a server does not choose: what its own
parent has left it, a system without room for a process, and workers that are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform == "win32", reason="there are no workers"),
]

#: Workers that serve nothing, and write a line each.
PROGRAM = """
import os, signal, sys, time
from entidb.server.workers.parent import Parent

LOG = sys.argv[1]

def note(*words):
    with open(LOG, "a") as file:
        print(*words, file=file, flush=True)

def work(number, ready):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    ready()
    note("began", os.getpid())
    while not stopped:
        time.sleep(0.02)
    note("ended", os.getpid())
"""
RUN = """
Parent(2, work, announce=lambda: note("announced"), grace_s=0.0).run()
note("parent ended")
"""
WAIT_S = 30.0


class Family:
    def __init__(self, place: Path, program: str, before: str = "") -> None:
        self.log = place / "log"
        self.log.touch()
        self.errors = place / "errors"
        source = str(Path(__file__).parents[2] / "src")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", before + PROGRAM + program, str(self.log)],
                env={**os.environ, "PYTHONPATH": source},
                stderr=errors,
            )

    def lines(self, word: str) -> list[int]:
        found = [line.split() for line in self.log.read_text().splitlines()]
        return [int(line[1]) if len(line) == 2 else 0 for line in found if line[0] == word]

    def until(self, word: str, count: int) -> list[int]:
        deadline = time.monotonic() + WAIT_S
        while len(self.lines(word)) < count:
            said = self.errors.read_text()
            assert self.process.poll() is None or word == "parent", said
            assert time.monotonic() < deadline, (word, self.log.read_text(), said)
            time.sleep(0.02)
        return self.lines(word)

    def end(self) -> None:
        """By SIGTERM, with all that belong to it."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WAIT_S) == 0, self.errors.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.lines("began"):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def test_a_parent_that_was_started_without_word_of_children_replaces_them_all_the_same(
    tmp_path: Path,
) -> None:
    """Some programs ignore SIGCHLD, and what they start inherits that: nobody can be waited for
    then, and the whole server ended with the first worker that did."""
    ignoring = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    family = Family(tmp_path, RUN, ignoring)
    try:
        first, _ = family.until("began", 2)
        os.kill(first, signal.SIGKILL)
        family.until("began", 3)
        family.end()
        assert len(family.lines("ended")) == 2
        assert "Traceback" not in family.errors.read_text()
    finally:
        family.close()


def test_signals_that_were_blocked_when_it_was_started_stop_it(tmp_path: Path) -> None:
    blocking = (
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))\n"
    )
    family = Family(tmp_path, RUN, blocking)
    try:
        family.until("began", 2)
        family.end()
        assert len(family.lines("ended")) == 2
    finally:
        family.close()


def test_a_system_that_has_no_process_for_a_moment_does_not_end_those_that_serve(
    tmp_path: Path,
) -> None:
    """The limit of a container is reached just when a worker has to be replaced."""
    scarce = """
fork, failed = os.fork, []

def scarce():
    if len(failed) < 3 and open(LOG).read().count("began") >= 2:
        failed.append(1)
        note("refused")
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

os.fork = scarce
"""
    family = Family(tmp_path, scarce + RUN)
    try:
        first, second = family.until("began", 2)
        os.kill(first, signal.SIGKILL)
        family.until("refused", 3)
        assert len(family.until("began", 3)) == 3
        assert family.lines("ended") == []
        assert "no process could be started" in family.errors.read_text()
        family.end()
        assert second in family.lines("ended")
    finally:
        family.close()


def test_a_system_that_has_no_process_at_the_start_says_so(tmp_path: Path) -> None:
    none = """
def none():
    raise BlockingIOError(11, "Resource temporarily unavailable")

os.fork = none
from entidb.errors import ConfigError
try:
    Parent(2, work, announce=lambda: None, grace_s=0.0).run()
except ConfigError as error:
    note("refused")
    print(error, file=sys.stderr)
"""
    family = Family(tmp_path, none)
    try:
        assert family.process.wait(WAIT_S) == 0, family.errors.read_text()
        assert "no process could be started" in family.errors.read_text()
    finally:
        family.close()


def test_a_worker_that_is_stopped_does_not_hold_up_the_end(tmp_path: Path) -> None:
    family = Family(tmp_path, RUN)
    try:
        first, _ = family.until("began", 2)
        os.kill(first, signal.SIGSTOP)
        family.end()
        assert len(family.lines("ended")) == 2, "by itself, and not killed"
    finally:
        family.close()

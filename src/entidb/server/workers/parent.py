"""The parent of the processes of one server: it starts them, replaces those that end, and stops
them all. It serves nothing itself, and no request goes through it.

The processes are forked from it, so that they have the settings, the hooks and the listening socket
that it has; it has one thread, and no database open. Not here: what a process does (``run``), and
what they know of each other (``team``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Final

from entidb.errors import ConfigError
from entidb.server.inherited import heard

logger = logging.getLogger("entidb.server")

#: Serves in a process of its own, with a number that no other one has at the time, until it is told
#: to stop; calls its second argument once it listens.
Work = Callable[[int, Callable[[], None]], None]

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_HANGUP: Final = getattr(signal, "SIGHUP", None)
_CONTINUE: Final = getattr(signal, "SIGCONT", None)
_HEARD: Final = (*_STOP_SIGNALS, *([_HANGUP] if _HANGUP is not None else []))
#: Seconds beyond those that requests get, after which a process that was told to stop is killed.
_KILL_AFTER_S: Final = 15.0
#: So many that end within so many seconds are replaced at once; the next ones wait for longer and
#: longer.
_DEATHS_FREE: Final = 3
_DEATHS_S: Final = 30.0
_PAUSE_S: Final = 0.1
_PAUSE_S_MAX: Final = 5.0
#: Ends of processes, while none has ever listened, after which no more are started.
_START_TRIES: Final = 3
#: Seconds between two looks at processes whose end was not noticed in another way.
_LOOK_S: Final = 1.0
#: Looks in a row at a process that is stopped, after which it is killed, and so replaced: it holds
#: up all who need what it has, its turn or the duty, and no lock can be taken from one that lives.
#: Looks and not seconds: the parent itself may be stopped, and everything with it.
STOPPED_LOOKS: Final = 10


@dataclass
class _Child:
    pid: int
    #: Says one byte when it listens, and ends with it.
    life: int
    #: From 0 up, below their count.
    number: int
    ready: bool = False
    #: Looks in a row that have found it stopped.
    stopped: int = 0


class Parent:
    """Of ``count`` processes that do ``work``. ``announce`` is called when all of them listen for
    the first time; a process that does not end gets ``grace_s`` seconds more than that."""

    def __init__(
        self, count: int, work: Work, *, announce: Callable[[], None], grace_s: float
    ) -> None:
        self._count = count
        self._work = work
        self._announce = announce
        self._grace_s = grace_s + _KILL_AFTER_S
        self._children: dict[int, _Child] = {}
        self._deaths: list[float] = []
        self._next_at = 0.0
        self._announced = False
        self._stopping = False
        self._hung_up = False
        self._look_at = 0.0

    def run(self) -> None:
        """Until SIGTERM or SIGINT, and until all processes have ended then. Raises ``ConfigError``
        if they end before they listen."""
        with self._signals() as bell, heard(_HEARD):
            try:
                while not self._stopping:
                    self._start_missing()
                    self._wait(bell, self._until_next())
                    self._pass_on_hangup()
                    self._look_at_stopped()
            finally:
                self._stop_all(bell)

    # ------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[int]:
        """Yields a descriptor that can be read when there was one."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        def hang_up(number: int, frame: FrameType | None) -> None:
            self._hung_up = True

        bell, ringing = os.pipe()
        os.set_blocking(ringing, False)
        os.set_blocking(bell, False)
        before = {each: signal.signal(each, stop) for each in _STOP_SIGNALS}
        if _HANGUP is not None:
            before[_HANGUP] = signal.signal(_HANGUP, hang_up)
        woken = signal.set_wakeup_fd(ringing, warn_on_full_buffer=False)
        try:
            yield bell
        finally:
            signal.set_wakeup_fd(woken)
            for each, handler in before.items():
                signal.signal(each, handler)
            os.close(bell)
            os.close(ringing)

    def _pass_on_hangup(self) -> None:
        if self._hung_up:
            self._hung_up = False
            for child in self._children.values():
                os.kill(child.pid, _HANGUP or signal.SIGTERM)

    def _look_at_stopped(self) -> None:
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        for child in self._children.values():
            child.stopped = child.stopped + 1 if _is_stopped(child.pid) else 0
            if child.stopped == STOPPED_LOOKS:
                logger.error(
                    "worker %d has been stopped for about %d s and holds the others up; it is "
                    "killed",
                    child.pid,
                    round(STOPPED_LOOKS * _LOOK_S),
                )
                os.kill(child.pid, signal.SIGKILL)

    # ------------------------------------------------------------ processes

    def _start_missing(self) -> None:
        while len(self._children) < self._count and time.monotonic() >= self._next_at:
            try:
                self._start()
            except OSError as error:  # no process, no memory, no open file
                said = f"no process could be started for a worker ({error.strerror or error})"
                if not self._announced:
                    raise ConfigError(
                        f"{said}: raise the limit of processes, open files or memory that this "
                        "server runs under, or give fewer workers"
                    ) from error
                # Those that there are serve on.
                logger.error("%s; it is tried again", said)
                self._next_at = time.monotonic() + _PAUSE_S_MAX / 5

    def _start(self) -> None:
        taken = {child.number for child in self._children.values()}
        number = next(each for each in range(self._count) if each not in taken)
        sys.stdout.flush()
        sys.stderr.flush()
        life, mine = os.pipe()
        # A signal between the fork and the child's own handlers would be lost in the parent's.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_child(number, mine, before)
        except OSError:
            os.close(life)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(mine)
        self._children[life] = _Child(pid, life, number)

    def _be_child(self, number: int, mine: int, mask: set[signal.Signals | int]) -> None:
        """Never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for each in _STOP_SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            if _HANGUP is not None:
                signal.signal(_HANGUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for life in self._children:
                os.close(life)
            self._work(number, partial(_say_ready, mine))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            logger.critical("a worker ends by an error", exc_info=True)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            # Not ``sys.exit``: what is above on this stack is the parent's to do.
            os._exit(code)

    def _until_next(self) -> float:
        if len(self._children) == self._count:
            return _LOOK_S
        return max(0.0, min(_LOOK_S, self._next_at - time.monotonic()))

    def _wait(self, bell: int, seconds: float) -> None:
        ready, _, _ = select.select([bell, *self._children], [], [], seconds)
        for each in ready or list(self._children):
            if each == bell:
                with contextlib.suppress(BlockingIOError):
                    os.read(bell, 100)
            elif ready and os.read(each, 1):
                self._is_ready(self._children[each])
            else:
                self._reap(self._children[each], certain=bool(ready))

    def _is_ready(self, child: _Child) -> None:
        child.ready = True
        if self._announced or len(self._children) < self._count:
            return
        if all(each.ready for each in self._children.values()):
            self._announced = True
            self._announce()

    def _reap(self, child: _Child, *, certain: bool) -> None:
        """See to a process that has ended; ``certain``: it has closed its pipe, which it does last,
        and is waited for."""
        found, status = os.waitpid(child.pid, 0 if certain else os.WNOHANG)
        if not found:
            return
        del self._children[child.life]
        os.close(child.life)
        if self._stopping:
            return
        code = os.waitstatus_to_exitcode(status)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        logger.warning("worker %d has ended %s; another takes its place", child.pid, how)
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < _DEATHS_S] + [now]
        if not self._announced and len(self._deaths) >= _START_TRIES:
            raise ConfigError(
                f"the workers end before they serve, the last one {how}; the log says why"
            )
        beyond = len(self._deaths) - _DEATHS_FREE
        self._next_at = now + (min(_PAUSE_S * 2**beyond, _PAUSE_S_MAX) if beyond > 0 else 0.0)

    def _stop_all(self, bell: int) -> None:
        self._stopping = True
        for child in self._children.values():
            os.kill(child.pid, signal.SIGTERM)
            if _CONTINUE is not None:  # one that is stopped hears of nothing
                os.kill(child.pid, _CONTINUE)
        end = time.monotonic() + self._grace_s
        while self._children:
            left = end - time.monotonic()
            if left <= 0:
                for child in self._children.values():
                    logger.error("worker %d does not end, and is killed", child.pid)
                    os.kill(child.pid, signal.SIGKILL)
                end = time.monotonic() + _KILL_AFTER_S
            self._wait(bell, max(0.0, min(_LOOK_S, left)))


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP or its like; where the system tells it. One that a debugger has is not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[:1] == [b"T"]
    except OSError:
        return False


def _say_ready(life: int) -> None:
    os.write(life, b"r")


__all__ = ["Parent", "Work"]

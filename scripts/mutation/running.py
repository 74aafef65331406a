"""Tries mutants: tests are imported and collected once, then each mutant gets a fork of that.

In the child the code of one function is exchanged, the tests run until one fails, and the answer
comes back through a pipe. The checkout is never written to. A test has a bound in processor time,
so that a mutant which loops is found on a busy machine as on an idle one; the whole child has
one on the wall clock, for one that waits.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NoReturn

import pytest

from .operators import Mutant, mutated_code
from .settings import Settings

#: Processor time for one test or seed, as a multiple of the slowest without a mutant, and at least.
STEP_FACTOR = 10
STEP_SECONDS_MIN = 1.0
#: Wall-clock seconds for one mutant.
MUTANT_SECONDS = 300
#: Bytes a child may allocate: a loop that collects things must not hurt the machine.
DATA_BYTES = 3 * 1024**3

SURVIVED, KILLED, TIMEOUT = "survived", "killed", "timeout"
#: What a survivor was tried against, if it was not everything.
QUICK = "quick tests only"


@dataclass(frozen=True)
class Result:
    """What became of a mutant; ``by`` is the test or seed that noticed it first."""

    id: str
    digest: str
    change: str
    line: int
    outcome: str
    by: str
    seconds: float


def read_results(path: Path) -> dict[str, Result]:
    """The newest result of each mutant in ``path``; a line cut off by a kill does not count."""
    found: dict[str, Result] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = Result(**json.loads(line))
            except ValueError:
                continue
            found[result.id] = result
    return found


def run(
    settings: Settings, todo: list[Mutant], out: Path, jobs: int, tell: Callable[[Result], None]
) -> int:
    """Try every mutant of ``todo`` and add its result to ``out``. Returns an exit code: not 0
    if the tests do not even pass without a mutant."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(settings.root / "src"), str(settings.root), *os.environ.get("PYTHONPATH", "").split()]
    )
    sys.path[:0] = [str(settings.root / "src"), str(settings.root)]
    os.chdir(settings.root)
    plugin = _Plugin(settings, todo, out, jobs, tell)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    files = [*settings.tests, *settings.slow]
    code = pytest.main([*options, "--hypothesis-profile=mutation", *files], [plugin])
    return int(code) or plugin.code


def _quiet_hypothesis() -> None:
    """The same examples for every mutant, and none written into the checkout."""
    import hypothesis

    hypothesis.settings.register_profile(
        "mutation",
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


class _Plugin:
    """Takes pytest's place at the moment when everything is collected and nothing has run."""

    def __init__(
        self,
        settings: Settings,
        todo: list[Mutant],
        out: Path,
        jobs: int,
        tell: Callable[[Result], None],
    ) -> None:
        self.code = 0
        self._settings = settings
        self._todo = todo
        self._out = out
        self._jobs = jobs
        self._tell = tell
        self._step_seconds = float(MUTANT_SECONDS)
        #: For each function and module, how many mutants each test or seed was first to notice.
        self._killers: dict[str, Counter[str]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self) -> None:
        _quiet_hypothesis()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise pytest.UsageError("not every test could be collected")
        if self._settings.seeds:
            importlib.import_module("entidb.testing.simulator")
        pool = _Pool(1)
        pool.start(None, partial(self._child, session, None))
        ((_, (outcome, by), seconds),) = list(pool.finished())
        told = "passed" if outcome == SURVIVED else f"{outcome} {by}"
        print(f"\nwithout a mutant: {told} in {seconds:.1f} s", flush=True)
        if outcome != SURVIVED:
            self.code = 1
            return True
        self._step_seconds = max(STEP_SECONDS_MIN, STEP_FACTOR * float(by))
        with self._out.open("a", encoding="utf-8") as out:
            self._try_all(session, out.write, out.flush)
        return True

    def _try_all(
        self, session: pytest.Session, write: Callable[[str], object], flush: Callable[[], object]
    ) -> None:
        pool = _Pool(self._jobs)
        todo = iter(self._todo)
        more = True
        while more or pool.running:
            while more and pool.free:
                mutant = next(todo, None)
                if mutant is None:
                    more = False
                else:
                    pool.start(mutant, partial(self._child, session, mutant))
            for mutant, (outcome, by), seconds in pool.finished():
                assert mutant is not None
                if outcome == KILLED:
                    for name in (mutant.function, mutant.module):
                        self._killers.setdefault(name, Counter())[by] += 1
                result = Result(
                    mutant.id,
                    mutant.digest,
                    mutant.change,
                    mutant.line,
                    outcome,
                    by,
                    round(seconds, 2),
                )
                write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                flush()
                self._tell(result)

    # ------------------------------------------------------------ in the child

    def _child(self, session: pytest.Session, mutant: Mutant | None) -> tuple[str, str]:
        if mutant is not None:
            _plant(self._settings.root, mutant)
        names = () if mutant is None else (mutant.function, mutant.module)
        killers = [self._killers.get(name, Counter()) for name in names]
        steps: list[tuple[str, Callable[[], bool]]] = [
            *((item.nodeid, self._test(session, item)) for item in session.items),
            *((f"seed {seed}", _seed(seed)) for seed in self._settings.seeds),
        ]
        # What noticed mutants of this function, or of this module, will mostly notice this one.
        steps.sort(key=lambda step: [-counter[step[0]] for counter in killers])
        slowest = 0.0
        for name, passes in steps:
            _bound_step(name, self._step_seconds)
            began = time.process_time()
            if not passes():
                return KILLED, name
            slowest = max(slowest, time.process_time() - began)
        if mutant is None:
            return SURVIVED, f"{slowest:.2f}"
        return SURVIVED, "" if self._settings.seeds or self._settings.slow else QUICK

    def _test(self, session: pytest.Session, item: pytest.Item) -> Callable[[], bool]:
        def passes() -> bool:
            failed_before = session.testsfailed
            # No next item: whatever was set up for this one is taken down with it.
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            return session.testsfailed == failed_before

        return passes


def _seed(seed: int) -> Callable[[], bool]:
    def passes() -> bool:
        from entidb.testing.simulator import Options, simulate

        return simulate(seed, Options({})).invariant is None

    return passes


def _plant(root: Path, mutant: Mutant) -> None:
    module = importlib.import_module(mutant.module)
    path = Path(str(module.__file__))
    if not path.resolve().is_relative_to(root.resolve()):
        raise RuntimeError(f"{mutant.module} was imported from {path}, not from {root}")
    code = mutated_code(path.read_text(encoding="utf-8"), str(path), mutant)
    _function(module, mutant.function).__code__ = code


def _function(module: Any, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = vars(found)[part]
    if isinstance(found, property):
        found = found.fget
    found = getattr(found, "__func__", found)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    assert isinstance(found, FunctionType) and isinstance(found.__code__, CodeType)
    return found


def _bound_step(name: str, seconds: float) -> None:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        _answer(TIMEOUT, name)

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)


# ---------------------------------------------------------------- processes

#: In a child: where its answer goes.
_pipe = -1


def _answer(outcome: str, by: str) -> NoReturn:
    """Say it, and be gone before any ``finally`` of a half-done test can get in the way."""
    os.write(_pipe, json.dumps([outcome, by]).encode())
    os._exit(0)


@dataclass
class _Child:
    mutant: Mutant | None
    pid: int
    directory: str
    began: float


class _Pool:
    """Up to ``size`` forked children at a time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._selector = selectors.DefaultSelector()

    @property
    def running(self) -> int:
        return len(self._selector.get_map())

    @property
    def free(self) -> bool:
        return self.running < self._size

    def start(self, mutant: Mutant | None, work: Callable[[], tuple[str, str]]) -> None:
        sys.stdout.flush()
        directory = tempfile.mkdtemp(prefix="entidb-mutant-")
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _live(write, directory, work)
        os.close(write)
        self._selector.register(
            read, selectors.EVENT_READ, _Child(mutant, pid, directory, time.monotonic())
        )

    def finished(self) -> Iterator[tuple[Mutant | None, tuple[str, str], float]]:
        """Waits until a child is done; yields what those that are done have said."""
        while self.running:
            now = time.monotonic()
            children = [key.data for key in self._selector.get_map().values()]
            patience = min(child.began for child in children) + MUTANT_SECONDS - now
            ready = [key.fd for key, _ in self._selector.select(max(0.0, patience))]
            late = [
                key.fd
                for key in self._selector.get_map().values()
                if time.monotonic() - key.data.began >= MUTANT_SECONDS and key.fd not in ready
            ]
            for fd in (*ready, *late):
                child: _Child = self._selector.get_key(fd).data
                said = b"" if fd in late else os.read(fd, 65536)
                self._selector.unregister(fd)
                os.close(fd)
                yield child.mutant, self._end(child, said, fd in late), _since(child)
            if ready or late:
                return

    def _end(self, child: _Child, said: bytes, late: bool) -> tuple[str, str]:
        # The child leads its own group: what it started ends with it.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        shutil.rmtree(child.directory, ignore_errors=True)
        if said:
            outcome, by = json.loads(said)
            return outcome, by
        return (TIMEOUT, "wall clock") if late else (KILLED, f"process ended with {status}")


def _since(child: _Child) -> float:
    return time.monotonic() - child.began


def _live(pipe: int, directory: str, work: Callable[[], tuple[str, str]]) -> NoReturn:
    """The life of a child: silent, bounded, with files of its own, and never back to pytest."""
    global _pipe
    _pipe = pipe
    try:
        os.setsid()
        tempfile.tempdir = os.environ["TMPDIR"] = directory
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        outcome, by = work()
    except BaseException as error:
        outcome, by = KILLED, f"{type(error).__name__}: {error}"[:200]
    _answer(outcome, by)

"""``beside``: programs that have one database open: from a commit of one until the observer of
another is called, what an observer takes while nothing happens, and how long nobody synchronises
when the program is killed whose engine did.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.figures import Figure, Target, figure, percentile
from benchmarks.payloads import COLLECTION, value
from benchmarks.world import World, environment
from entidb.db import Database
from entidb.db.observers import CommitEvent
from entidb.sync import SyncConfig, SyncEngine, SyncState

SIZES = (200,)
#: Seconds between two commits: while others come all the time; and after a rest, when an observer
#: looks less often.
PAUSES_S = {"": (0.05, 0.15), ", after a rest": (1.1, 2.2)}
#: One of so many commits follows a rest.
RESTS = 20
#: Seconds until an observer looks as seldom as it ever does; and for which it is watched then.
REST_S = 11.0
IDLE_S = 20.0
NAME = "beside"


class Program(AbstractContextManager["Program"]):
    """A process that has the database at ``path`` open and does what it is told."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.beside", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            env=environment(),
        )
        self.hear()

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what.encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, what: str) -> Any:
        self.tell(what)
        return self.hear()

    def kill(self) -> float:
        """When that was."""
        at = time.monotonic()
        self._process.send_signal(signal.SIGKILL)
        return at

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process as process:
            if process.stdin is not None:
                process.stdin.close()


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: commits in each round."""
    for count in sizes:
        yield from _observer(world, count, rounds)
        yield from _engine(world, count, rounds)


def _observer(world: World, count: int, rounds: int) -> Iterator[Figure]:
    path = world.path(NAME)
    times: dict[str, list[list[float]]] = {rest: [] for rest in PAUSES_S}
    shares = []
    # A small size is for seeing that it runs.
    short = min(1.0, count / SIZES[0])
    with Database.open(path) as database, Program(str(path)) as other:
        for _ in range(rounds):
            for rest in PAUSES_S:
                few = count if not rest else max(2, count // RESTS)
                pause = PAUSES_S[rest][0] * short, PAUSES_S[rest][1] * short
                times[rest].append(_seen(database, other, few, pause))
            time.sleep(REST_S * short)
            shares.append(100 * other.ask(f"idle {IDLE_S * short}"))
    for rest, each in times.items():
        for part, most in ((0.5, 15.0), (0.99, 60.0)):
            yield figure(
                NAME,
                f"from a commit to another's observer{rest}: p{100 * part:.0f}",
                count,
                "ms",
                [1000 * percentile(found, part) for found in each],
                target=Target("value", most=most),
            )
    yield figure(
        NAME, "an idle observer", count, "% of a core", shares, target=Target("value", most=0.2)
    )


def _seen(
    database: Database, other: Program, count: int, pause_s: tuple[float, float]
) -> list[float]:
    """Seconds from each commit's return until the other process was called."""
    done = {}
    for number in range(count):
        time.sleep(random.uniform(*pause_s))
        identity = str(database.collection(COLLECTION).add(value(number)))
        done[identity] = time.monotonic()
    seen: dict[str, float] = {}
    while not done.keys() <= seen.keys():
        seen = other.ask("seen")
        time.sleep(0.01)
    return [seen[identity] - at for identity, at in done.items()]


def _engine(world: World, count: int, rounds: int) -> Iterator[Figure]:
    token_file = world.path("token")
    token_file.write_text(world.token())
    found = []
    with world.server() as server, ExitStack() as stack:
        arguments = [str(world.path(NAME)), server.url, str(token_file)]
        Database.open(arguments[0]).close()
        first = stack.enter_context(Program(*arguments))
        first.ask("engine working")
        for _ in range(rounds):
            second = stack.enter_context(Program(*arguments))
            second.ask("engine standing by")
            second.tell("engine working")
            killed = first.kill()
            found.append(1000 * (second.hear() - killed))
            first = second
    yield figure(
        NAME,
        "takeover of a killed program's engine",
        count,
        "ms",
        found,
        target=Target("value", most=1000.0),
    )


def main(path: str, url: str = "", token_file: str = "") -> None:
    """One of the programs. Reads lines, and answers each with one of JSON: ``seen``, when it was
    called with which entities; ``idle S``, its share of a core in the next S seconds; ``engine
    working`` and ``engine standing by``, when it does. Times are those of the system's monotonic
    clock, which is the same in all processes."""
    seen: dict[str, float] = {}

    def observer(commit: CommitEvent) -> None:
        now = time.monotonic()
        for event in commit.events:
            seen.setdefault(str(event.entity_id), now)

    with Database.open(path) as database, ExitStack() as stack:
        engine = None
        if url:
            config, token = SyncConfig(db_id=NAME), Path(token_file).read_text()
            engine = stack.enter_context(SyncEngine(config, url, database, token=token))
            engine.start()
        else:
            database.observe(observer)
        _say(None)
        for line in sys.stdin:
            word, _, more = line.strip().partition(" ")
            if word == "seen":
                _say(seen)
            elif word == "idle":
                began, cpu = time.monotonic(), time.process_time()
                time.sleep(float(more))
                _say((time.process_time() - cpu) / (time.monotonic() - began))
            else:
                assert engine is not None
                while (engine.status().state is SyncState.STANDBY) != (more == "standing by"):
                    time.sleep(0.001)
                _say(time.monotonic())


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])

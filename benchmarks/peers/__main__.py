"""``python -m benchmarks.peers [--json] [--n N] [--rounds R] [--dir D]``: one commit on A until B's
observer is called, EntiDB beside RxDB and PouchDB with their own live replication.

A, B and the server are three processes of each; all of them stay while they are measured in turns,
one change after the other with a pause. Both ends read the system's monotonic clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import DIRECTORY
from benchmarks.figures import ROUNDS_DEFAULT, Figure, Target, figure, percentile
from benchmarks.payloads import ids, value
from benchmarks.world import World, environment

HERE = Path(__file__).parent
_ROOT = HERE.parent.parent
COUNT = 100
#: What the first changes take is what compilers and caches take.
_WARM = 20
#: A person's pace, not a load. A server tells a device of news at most every 50 ms.
_PAUSE_S = 0.06
_WAIT_S = 30.0

ENTIDB = "EntiDB"
#: The package that each peer is, and what EntiDB's p50 may be of theirs.
PACKAGES = {"RxDB": "rxdb", "PouchDB": "pouchdb"}
TARGETS = {"RxDB": Target("ratio", most=4.0), "PouchDB": Target("ratio", most=0.3)}
KEEPS = {
    ENTIDB: "every commit on all three disks",
    "RxDB": "in memory",
    "PouchDB": "LevelDB, no flush",
}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    missing = what_is_missing()
    if missing is not None:
        print(f"peers: {missing}", file=sys.stderr, flush=True)
    world = World(options.dir)
    try:
        for item in run(world, options.n, options.rounds, () if missing else tuple(PACKAGES)):
            print(item.to_json(), flush=True)
            if not options.json:
                print(item, file=sys.stderr, flush=True)
    finally:
        world.close()


def what_is_missing(directory: Path = HERE) -> str | None:
    """In one line, what the peers need and this machine does not have; None: nothing."""
    if shutil.which("node") is None:
        return "node is not installed, so there are no figures of " + " and ".join(PACKAGES)
    for name, package in PACKAGES.items():
        if not (directory / "node_modules" / package / "package.json").exists():
            return (
                f"{name} is not installed, so there are no figures of {' and '.join(PACKAGES)}: "
                "run  npm ci --prefix benchmarks/peers"
            )
    return None


def run(world: World, count: int, rounds: int, peers: Sequence[str]) -> Iterator[Figure]:
    """``count``: changes in each round; ``peers``: who is measured beside EntiDB."""
    halves: dict[str, list[float]] = {}
    tails: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        pairs = {ENTIDB: stack.enter_context(_entidb(world))}
        for name in peers:
            pairs[name] = stack.enter_context(_peer(world, name))
        for pair in pairs.values():
            pair.milliseconds(_WARM)
        for _ in range(rounds):
            for name, pair in pairs.items():
                times = pair.milliseconds(count)
                halves.setdefault(name, []).append(percentile(times, 0.5))
                tails.setdefault(name, []).append(percentile(times, 0.99))
    for share, found in (("p50", halves), ("p99", tails)):
        for name, values in found.items():
            yield figure("peers", f"{name}, {share}", count, "ms", values, note=KEEPS[name])
        for name in peers:
            yield figure(
                "peers",
                f"{ENTIDB} beside {name}, {share}",
                count,
                "ms",
                found[ENTIDB],
                floors=found[name],
                floor_is=f"{name}, {KEEPS[name]}",
                target=TARGETS[name] if share == "p50" else None,
            )


@contextlib.contextmanager
def _entidb(world: World) -> Iterator[Pair]:
    token_file = world.path("token")
    token_file.write_text(world.token())
    command = [sys.executable, "-m", "benchmarks.peers.device"]
    with world.server() as server, contextlib.ExitStack() as stack:

        def device(role: str) -> Process:
            place = str(world.path(role))
            arguments = [*command, role, place, server.url, str(token_file)]
            return stack.enter_context(Process(arguments, world.path("log"), environment()))

        yield Pair(device)


@contextlib.contextmanager
def _peer(world: World, name: str) -> Iterator[Pair]:
    """The script of peer ``name`` in its three roles."""
    script = str(HERE / f"{PACKAGES[name]}.mjs")
    with contextlib.ExitStack() as stack:

        def process(role: str, url: str = "") -> Process:
            directory = world.path(f"{PACKAGES[name]}-{role}")
            directory.mkdir()
            arguments = ["node", script, role, str(directory), url]
            return stack.enter_context(Process(arguments, world.path("log")))

        url = process("server").hears()["url"]
        yield Pair(lambda role: process(role, url))


class Pair:
    """Two devices, of which the first one commits and the other one observes. ``device`` starts
    the one in that role."""

    def __init__(self, device: Callable[[str], Process]) -> None:
        self._other = device("other")
        self._one = device("one")
        for each in (self._other, self._one):
            assert each.hears() == {"ready": True}
        self._number = 0

    def milliseconds(self, count: int) -> list[float]:
        """What each of ``count`` changes takes from before the commit on the first until the
        observer of the other is called."""
        return [self._change(entity_id) for entity_id in ids(count)]

    def _change(self, entity_id: bytes) -> float:
        self._number += 1
        name = str(uuid.UUID(bytes=entity_id))
        self._one.tell({"id": name, "value": value(self._number)})
        began, seen = self._one.hears(), self._other.hears()
        assert began["id"] == seen["id"] == name, f"{name} was asked for: {began}, {seen}"
        time.sleep(_PAUSE_S)
        took: float = (seen["at"] - began["at"]) / 1e6
        return took


class Process:
    """A process that speaks one JSON object a line, both ways, and ends with its input."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=_ROOT,
                env=environ,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def hears(self) -> dict[str, Any]:
        """The next line; raises ``RuntimeError`` with what the process wrote where none comes."""
        try:
            line = self._lines.get(timeout=_WAIT_S)
        except queue.Empty:
            line = b""
        if not line:
            raise RuntimeError(f"a process of a peer says nothing:\n{self._log.read_text()}")
        message: dict[str, Any] = json.loads(line)
        return message


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="One JSON line per figure on standard output, a table on standard error.",
    )
    parser.add_argument("--json", action="store_true", help="JSON only, no table")
    parser.add_argument("--n", type=int, default=COUNT, help="changes in each round")
    parser.add_argument("--rounds", type=int, default=ROUNDS_DEFAULT)
    parser.add_argument("--dir", type=Path, default=DIRECTORY, help="a directory on a disk")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.n < 1:
        parser.error("--n and --rounds are at least 1")
    return options


if __name__ == "__main__":
    main()

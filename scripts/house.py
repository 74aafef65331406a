"""The figures of the source tree, and what of them may not get worse.

    python scripts/house.py            print all of them; exit code 1 if one is beyond its bound
    python scripts/house.py --calls    also count the calls of a get, a set, an idle cycle, a push …

A bound stands where a figure would otherwise creep: a module that tells five stories, a circle of
imports, a hot path that takes one more call with every feature. ``docs/architecture.md`` says what
the rooms are.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

SOURCE: Final = Path(__file__).parent.parent / "src" / "entidb"
MODULE_LINES_MAX: Final = 500
#: Modules that are still above the bound, with the size they may have at most. A line leaves this
#: table when the module has been cut into rooms; none may come in.
LARGE: Final[Mapping[str, int]] = {}
#: Circles that are still there, each as its modules in order. One leaves this set when it has been
#: taken apart; none may come in.
CIRCLES: Final = frozenset[tuple[str, ...]]()
#: Tables: long because there is much of one thing in them, and read by looking a row up.
TABLES: Final = frozenset[str]()
FUNCTION_LINES_MAX: Final = 70
#: There is no depth in a circle, so it was first seen when the last of those went. 12 would do:
#: a database commits without knowing a class, and a service answers without a listener.
DEPTH_MAX: Final = 20
#: Calls of Python functions of this project, by what a program or the engine does: where they
#: stand, so that no feature adds to them unseen. The store is the one on disk, device and server
#: are in one thread.
#: Some more than there are on a quiet machine: looks that a clock makes due come on top by chance.
CALLS_MAX: Final[Mapping[str, int]] = {"get": 18, "set": 67, "idle": 140, "push": 500, "pull": 337}
#: Rounds in which they are counted.
_ROUNDS: Final = 4
#: Seconds that are long for the times of a file system.
_SETTLED_S: Final = 0.06


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/house", description="figures of the source tree")
    parser.add_argument("--calls", action="store_true", help="count calls of hot paths too")
    given = parser.parse_args(arguments)
    faults = [*look_at_modules(), *look_at_functions(), *look_at_imports()]
    if given.calls:
        faults += look_at_calls()
    for fault in faults:
        print(f"beyond its bound: {fault}", file=sys.stderr)
    return 1 if faults else 0


def modules() -> dict[str, str]:
    """Text by path within the package."""
    paths = sorted(SOURCE.rglob("*.py"))
    return {p.relative_to(SOURCE).as_posix(): p.read_text(encoding="utf-8") for p in paths}


# --- size -------------------------------------------------------------------------------------


def look_at_modules() -> list[str]:
    sizes = {name: text.count("\n") for name, text in modules().items()}
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    middle = statistics.median(sizes.values())
    print(f"modules: {len(sizes)}, {sum(sizes.values()):,} lines, median {middle:.0f}, largest:")
    for name, size in largest[:8]:
        print(f"  {size:5} {name}")
    return [
        f"{name} has {size} lines, at most {bound} are allowed: cut it by subject"
        for name, size in largest
        if name not in TABLES and size > (bound := LARGE.get(name, MODULE_LINES_MAX))
    ] + [
        f"{name} needs no line in LARGE any more: it has {sizes.get(name, 0)} lines"
        for name in LARGE
        if sizes.get(name, 0) <= MODULE_LINES_MAX
    ]


def look_at_functions() -> list[str]:
    lengths = sorted(_functions(), reverse=True)
    numbers = sorted(length for length, _ in lengths)
    half, tenth = numbers[len(numbers) // 2], numbers[len(numbers) * 9 // 10]
    print(f"functions: {len(numbers)}, p50 {half}, p90 {tenth}, longest:")
    for length, where in lengths[:5]:
        print(f"  {length:5} {where}")
    return [
        f"{where} has {length} lines, at most {FUNCTION_LINES_MAX} are allowed"
        for length, where in lengths
        if length > FUNCTION_LINES_MAX
    ]


def _functions() -> Iterable[tuple[int, str]]:
    for name, text in modules().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield node.end_lineno - node.lineno + 1, f"{name}:{node.lineno} {node.name}"


# --- imports ----------------------------------------------------------------------------------


def look_at_imports() -> list[str]:
    graph = import_graph()
    circles = [circle for circle in components(graph) if len(circle) > 1]
    depth = longest_road(graph) if not circles else None
    arrows = sum(map(len, graph.values()))
    print(f"imports: {arrows} arrows, {len(circles)} circles, longest road {depth or 'endless'}")
    known = {tuple(circle) for circle in circles} & CIRCLES
    faults = [
        f"a circle of imports: {', '.join(circle)}"
        for circle in circles
        if tuple(circle) not in known
    ]
    faults += [f"CIRCLES names one that is gone: {', '.join(c)}" for c in CIRCLES - known]
    if depth is not None and depth > DEPTH_MAX:
        faults.append(f"the longest road of imports is {depth}, at most {DEPTH_MAX} is allowed")
    return faults


def import_graph() -> dict[str, set[str]]:
    """Module to the modules of this project that it imports, wherever the statement stands; but
    for ``__init__`` and ``__main__``, which only name things."""
    known = {_dotted(name) for name in modules()}
    graph: dict[str, set[str]] = {}
    for name, text in modules().items():
        if not name.endswith(("__init__.py", "__main__.py")):
            found = _imported(ast.parse(text), known)
            graph[_dotted(name)] = found - {_dotted(name)}
    return {name: {other for other in found if other in graph} for name, found in graph.items()}


def _dotted(name: str) -> str:
    return "entidb." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported(tree: ast.AST, known: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known


def components(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of ``graph`` (Tarjan), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            found.append(sorted(part))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def longest_road(graph: Mapping[str, set[str]]) -> int:
    """Modules on the longest way down a ``graph`` without circles."""
    known: dict[str, int] = {}

    def down(name: str) -> int:
        if name not in known:
            known[name] = 1 + max(map(down, graph[name]), default=0)
        return known[name]

    return max(map(down, graph), default=0)


# --- calls ------------------------------------------------------------------------------------


def look_at_calls() -> list[str]:
    counts = count_calls()
    print("calls: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return [
        f"{name} takes {counts[name]} calls, at most {bound} are allowed"
        for name, bound in CALLS_MAX.items()
        if counts[name] > bound
    ]


def count_calls() -> dict[str, int]:
    """Calls of Python functions of this project in this thread, for one of each: the fewest of a
    few rounds, because now and then the time has come to look at a file, or at a directory."""
    from entidb.db import Database
    from entidb.server import ServerConfig, SyncServer
    from entidb.sync import SyncConfig, SyncEngine
    from entidb.sync.http import HttpTransport
    from entidb.sync.transport import LoopbackClient

    class Direct(LoopbackClient):
        """Says that it can be interrupted, so that the server works in this thread and is seen."""

        def interrupt(self) -> None: ...

        def resume(self) -> None: ...

    config = SyncConfig(db_id="house", compression="none")
    with tempfile.TemporaryDirectory() as folder:
        server = SyncServer(ServerConfig(data_dir=f"{folder}/server", insecure_no_auth=True))
        engines = [
            SyncEngine(
                config,
                HttpTransport("http://localhost", client=Direct(server)),
                Database.open(f"{folder}/{name}"),
            )
            for name in ("one", "other")
        ]
        one, other = engines
        notes = one.database.collection("notes")
        entity = notes.add({"n": 0})

        def settle() -> None:
            for engine in (one, other, one, other):
                engine.sync()

        def change() -> None:
            notes[entity] = {"n": 1}

        rounds = []
        for _ in range(_ROUNDS):
            settle()
            # Where a directory has just changed, it is looked at more than once.
            time.sleep(_SETTLED_S)
            settle()
            counts = {"get": _calls(lambda: notes[entity]), "set": _calls(change)}
            settle()
            counts["idle"] = _calls(one.sync)
            change()
            counts["push"] = _calls(one.sync)
            counts["pull"] = _calls(other.sync)
            rounds.append(counts)
        for engine in engines:
            engine.close()
            engine.database.close()
        server.close()
    return {name: min(counts[name] for counts in rounds) for name in rounds[0]}


def _calls(action: Callable[[], Any]) -> int:
    seen: Counter[str] = Counter()
    own = str(SOURCE)

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(own):
            seen["calls"] += 1

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return seen["calls"]


if __name__ == "__main__":
    sys.exit(main())

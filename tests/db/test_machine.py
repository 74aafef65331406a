"""The sync machine of a device: the table is complete, the code goes by it, the page shows it."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import machine
from entidb.db.machine import MOVES, PARTS, Lacks, Move, Sent
from entidb.db.replica import Inflight, ReplicaState, Stage
from entidb.errors import SyncStateError

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "entidb"
moves = pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)


def test_the_page_is_the_table_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("machine_page", ROOT / "scripts" / "machine.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (ROOT / "docs" / "machine.md").read_text(encoding="utf-8")
    assert written == script.page(), "run: python scripts/machine.py --write"


@moves
def test_every_move_is_one_of_its_part_and_cites_rules_that_are_stated(move: Move) -> None:
    stated = set(re.findall(r"\*\*(R\d+)\*\*", (ROOT / "docs/rules.md").read_text("utf-8")))
    cited = move.rules.split()
    assert cited
    assert set(cited) <= stated
    assert getattr(machine, move.name) is move
    assert move.ways
    for before, targets in move.ways.items():
        assert {before, *targets} <= set(move.part)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_r9_every_state_can_be_reached_and_left(part: type[Any]) -> None:
    start = Lacks.ALL if part is Lacks else part["NOTHING"]
    arrows = {
        (before, after)
        for move in MOVES
        if move.part is part
        for before, targets in move.ways.items()
        for after in targets
    }
    # From any state back to the one where nothing is to be done, and from that to all of them.
    states = {*part.__members__.values()}
    assert reached(start, arrows) == states
    assert reached(part["NOTHING"], {(after, before) for before, after in arrows}) == states


def reached(start: Any, arrows: set[tuple[Any, Any]]) -> set[Any]:
    found = {start}
    while more := {after for before, after in arrows if before in found} - found:
        found |= more
    return found


def stored() -> Iterator[tuple[str, str]]:
    """Where a record of the machine is stored, and what is given there."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("set_sync_state", "set_inflight", "set_stage"):
                place = f"{path.relative_to(SOURCE).as_posix()}:{node.lineno}"
                yield place, ast.unparse(node.args[0])


def test_no_record_of_the_machine_is_stored_without_a_move() -> None:
    found = list(stored())
    assert len(found) > 10
    assert [place for place in found if not re.match(r"(machine\.[A-Z_]+|move)\(", place[1])] == []


@moves
def test_every_move_is_made_somewhere(move: Move) -> None:
    texts = [
        path.read_text(encoding="utf-8")
        for path in SOURCE.rglob("*.py")
        if path.name != "machine.py"
    ]
    assert any(re.search(rf"\bmachine\.{move.name}\b", text) for text in texts)


def test_a_move_that_is_not_in_the_table_raises_and_says_which() -> None:
    one, two = Inflight([[1, 1]]), Inflight([[1, 1]], [[2, 2]])
    assert machine.FOLLOW(one, two) is two
    with pytest.raises(SyncStateError, match=r"SEND cannot lead from Sent\.ONE to ONE"):
        machine.SEND(one, one)
    level = ReplicaState(full=False)
    with pytest.raises(SyncStateError, match=r"STAND cannot lead from Lacks\.NOTHING to ALL"):
        machine.STAND(level, ReplicaState())
    stage = Stage(history=b"h" * 16, cursor=0, floor=0, first_head=9, full=None)
    with pytest.raises(SyncStateError, match=r"PUBLISH cannot lead from Staged\.FULL to NOTHING"):
        machine.PUBLISH(stage, None)


def test_each_record_is_in_the_state_that_its_fields_say() -> None:
    full = ReplicaState()
    assert [
        machine.lacks(state)
        for state in (
            full,
            ReplicaState(foreign=True),
            ReplicaState(foreign=True, keep_device=True),
            ReplicaState(full=False, uncovered=["notes"]),
            ReplicaState(full=False),
        )
    ] == [Lacks.ALL, Lacks.OTHER, Lacks.KEEPING, Lacks.SOME, Lacks.NOTHING]
    assert machine.sent(None) is Sent.NOTHING
    assert machine.from_nothing(full, None) is None
    assert machine.from_nothing(ReplicaState(full=False, uncovered=["a"]), None) == ["a"]
    assert machine.from_nothing(ReplicaState(full=False), None) == []

"""Write ``docs/machine.md`` from the table of the sync machine.

python scripts/machine.py            print the page
python scripts/machine.py --write    write it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from entidb.db.machine import MOVES, PARTS

PAGE = Path(__file__).parent.parent / "docs" / "machine.md"
HEAD = """# The sync machine of a device

A device has four things that change by themselves: what it lacks of the server's state, what it
has sent, what it has staged, and what it has still to make pending. Each is a record of its own,
changed in the commit of the step that it belongs to. `entidb.db.machine` is the one table of their
states and moves; whoever stores such a record names the move, and a move that is not in the table
raises. This page is made from it by `python scripts/machine.py --write`, and a test compares. The
numbers are those of [the rules](rules.md).
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/machine", description="the page of the machine")
    parser.add_argument("--write", action="store_true", help="write the page, and not to stdout")
    given = parser.parse_args(arguments)
    if given.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


def page() -> str:
    return "\n".join([HEAD, *(line for part in PARTS for line in _section(part))])


def _section(part: type[Enum]) -> Iterator[str]:
    yield f"## {part.__name__}: {_first_line(part)}\n"
    yield "| state | means |\n|---|---|"
    for state in part:
        yield f"| {state.name} | {state.value} |"
    yield "\n```mermaid\nstateDiagram-v2"
    yield f"    [*] --> {_first(part)}"
    for (before, after), names in _arrows(part).items():
        yield f"    {before} --> {after} : {', '.join(names)}"
    yield "```\n"
    yield "| move | rules | when |\n|---|---|---|"
    for move in MOVES:
        if move.part is part:
            yield f"| {move.name} | {move.rules.replace(' ', ', ')} | {move.text} |"
    yield ""


def _first_line(part: type[Enum]) -> str:
    text = (part.__doc__ or "").partition("\n")[0].rstrip(".")
    return text[0].lower() + text[1:]


def _first(part: type[Enum]) -> str:
    """A new device lacks everything, and has nothing else to do."""
    return "ALL" if "ALL" in part.__members__ else "NOTHING"


def _arrows(part: type[Enum]) -> dict[tuple[str, str], list[str]]:
    """From and to, with the moves that lead so; those that change no state are left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for move in MOVES:
        if move.part is not part:
            continue
        for before, targets in move.ways.items():
            for after in targets:
                if after is not before:
                    found.setdefault((before.name, after.name), []).append(move.name)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    sys.exit(main())

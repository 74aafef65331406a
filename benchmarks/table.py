"""Figures as the tables of ``docs/performance.md``: ``python -m benchmarks.table FILE …``.

The files hold what ``python -m benchmarks`` printed. Without ``--write`` the tables go to standard
output; with it they replace what stands in the document between its two marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.figures import short

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
_HEAD = (
    "| figure | N | measured | floor | ratio | target | met |\n|---|---:|---:|---:|---:|---|---|"
)


def tables(figures: Iterable[dict[str, Any]]) -> str:
    """One table for each benchmark, in the order in which they come."""
    rows: dict[str, list[str]] = {}
    for item in figures:
        rows.setdefault(item["benchmark"], []).append(_row(item))
    parts = [f"### `{name}`\n\n{_HEAD}\n" + "\n".join(lines) for name, lines in rows.items()]
    return "\n\n".join(parts) + "\n"


def _row(item: dict[str, Any]) -> str:
    floor = f"{short(item['floor'])} ({item['floor_is']})" if item["floor"] is not None else ""
    ratio = f"{item['ratio']:.3g}" if item["ratio"] is not None else ""
    met = {True: "yes", False: "**no**", None: ""}[item["met"]]
    cells = [
        item["figure"],
        f"{item['n']:,}",
        f"{short(item['value'])} {item['unit']}",
        floor,
        ratio,
        item["target"] or "",
        met,
    ]
    return "| " + " | ".join(cells) + " |"


def replaced(document: str, new: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, "the document has both marks"
    return f"{before}{BEGIN}\n\n{new}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    options = parser.parse_args()
    lines = [line for path in options.files for line in path.read_text().splitlines()]
    text = tables(json.loads(line) for line in lines if line.startswith("{"))
    if options.write:
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), text))
    else:
        print(text, end="")


if __name__ == "__main__":
    main()

"""One word, one thing (docs/architecture.md, Glossary)."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = ROOT / "src" / "entidb"

#: Names that two classes have, because they are the same thing at two places.
SAME: Final = {
    "Snapshot": "one moment, of a store and of a database",
}


def test_no_two_classes_have_one_name() -> None:
    homes = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.relative_to(SOURCE).as_posix())
    doubled = {name: places for name, places in homes.items() if len(places) > 1}
    assert set(doubled) == set(SAME), doubled


def test_every_room_of_the_glossary_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page.partition("## Glossary")[2].splitlines()
    rooms = {room for row in rows for room in re.findall(r"`([a-z_/]+)`", row.rpartition("| ")[2])}
    rooms |= {room for row in rows for room in re.findall(r"`([a-z]+/[a-z_/]+)`", row)}
    assert len(rooms) > 20
    for room in rooms:
        assert (SOURCE / f"{room}.py").is_file() or (SOURCE / room).is_dir(), room


def test_no_word_of_the_glossary_is_explained_twice() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| \*\*([a-z ]+)\*\*", page.partition("## Glossary")[2], re.MULTILINE)
    assert len(words) > 30
    assert len(words) == len(set(words))

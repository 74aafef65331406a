"""Rows of entities have one room: nothing else in ``src`` packs one, or changes what it keeps.

``tests/db/test_entities.py`` shows the same of the running code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.db import records

SOURCE = Path(__file__).parent.parent / "src" / "entidb"
#: The room, and what it is built on: the changes of a commit with their feed and counts, and how a
#: row is laid out.
ROOM = {"db/entities.py", "db/overlay.py", "db/records.py", "db/staged.py"}
#: What makes a row of an entity, its base, its place in the feed or a count.
PACKERS = {"pack_entity", "pack_pending", "pack_feed_key"}
#: What makes the key of one, and what takes one apart. Whoever looks into a database needs these.
KEYS = {"table_prefix", "base_key", "feed_key", "count_key", "split_feed_key", "split_feed_keys"}
LAYOUT = {"ENTITY_HEAD", "PENDING_HEAD", "TOMBSTONE", "DIRTY"} | {
    name
    for name in vars(records)
    if name.startswith("unpack_") and name not in ("unpack_u64", "unpack_overruled")
}
#: Only these may know them beside the room: where a collection stands, and what reads.
READERS = {
    "db/adopt.py",
    "db/catalogue.py",
    "db/copying.py",
    "db/digests.py",
    "db/feed.py",
    "db/index_care.py",
    "db/index_run.py",
    "db/maintenance.py",
    "db/rows.py",
    "db/sharing.py",
    "db/verifying.py",
    "server/fullness.py",
    "server/segments/building.py",
}
#: Still cuts rows: the page of a pull in columns. The line goes with the last of them.
CUTS = {"server/pages.py"}

MODULES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
    if "testing" not in path.relative_to(SOURCE).parts
}


def imported(tree: ast.Module) -> set[str]:
    """Names that come from the rooms of ``db``."""
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entidb.db")
        for alias in node.names
    }


def faults(name: str, tree: ast.Module) -> Iterator[str]:
    names = imported(tree)
    if name not in ROOM:
        yield from sorted(names & PACKERS)
        if name not in WRITERS:
            looks = {id(node) for node in looked_at(tree)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and node.attr == "changes":
                    if id(node) not in looks:
                        yield f"line {node.lineno}: the changes of a commit"
    if name not in ROOM | READERS:
        yield from sorted(names & (KEYS | LAYOUT))
    if name.split("/")[0] in ("sync", "server"):
        yield from slices(tree)


#: What these put there are no rows of entities: the records of sync, accepted transactions and the
#: outbox; and places in indexes, which hang on the room.
WRITERS = {"db/writer.py", "db/indexing.py", "db/index_run.py"}


def looked_at(tree: ast.Module) -> Iterator[ast.AST]:
    """What is asked whether it is empty, or has a key, or what stands there; and no more."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            yield node.test
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            yield node.comparators[0]
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            yield node.value


def slices(tree: ast.Module) -> Iterator[str]:
    """Keys and rows that are cut."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            cut = node.value.id == "key" and isinstance(node.slice, ast.Slice)
            if cut or node.value.id in ("row", "raw"):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_room_of_entities_writes_their_rows(name: str) -> None:
    found = list(faults(name, MODULES[name]))
    assert bool(found) is (name in CUTS), found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("db/scope.py", "from entidb.db.records import pack_entity"),
        ("sync/apply/page.py", "from entidb.db.records import feed_key"),
        ("sync/apply/page.py", "from entidb.db.records import ENTITY_HEAD as SIZE"),
        ("server/decide.py", "from entidb.db.records import unpack_entity"),
        ("server/decide.py", "writer.changes[key] = b''"),
        ("server/decide.py", "writer.changes.update(rows)"),
        ("server/decide.py", "changes = writer.changes"),
        ("server/decide.py", "del writer.changes[key]"),
        ("sync/apply/settle.py", "ids = [key[-16:] for key in keys]"),
        ("server/decide.py", "deleted = row[0] & 1"),
    ],
)
def test_a_row_that_is_written_elsewhere_is_found(name: str, text: str) -> None:
    assert list(faults(name, ast.parse(text)))

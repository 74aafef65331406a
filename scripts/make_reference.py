"""Writes `docs/reference.md`: the methods of what programs hold, from their docstrings.

A test compares the page with this, and sees to it that every method has a docstring. Running it
twice changes nothing.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import entidb
from entidb import db, server, sync

TARGET: Final = Path(__file__).parent.parent / "docs" / "reference.md"
COLUMNS: Final = 118
HEAD: Final = """# Methods

What the objects of a program can do, and what the answers hold that it gets, from their docstrings:
`help(entidb.Database)` shows the same. Those that `entidb` does not have are in `entidb.db`,
`entidb.sync` and `entidb.server`. [Public names](api.md) says which names there are, and
[Errors](errors.md) what they raise.
"""
#: In the order of the page.
CLASSES: Final[tuple[type[Any], ...]] = (
    entidb.Database,
    entidb.Collection,
    entidb.Query,
    entidb.Transaction,
    entidb.Snapshot,
    entidb.ChangeFeed,
    entidb.ChangeEvent,
    db.EntityInfo,
    db.Index,
    entidb.AsyncDatabase,
    db.AsyncCollection,
    db.AsyncTransaction,
    entidb.SyncEngine,
    entidb.AsyncSyncEngine,
    entidb.SyncCycleResult,
    sync.SyncStatus,
    entidb.Conflict,
    entidb.ConflictResolution,
    db.DiscardedTransaction,
    db.OverruledValue,
    entidb.CommitEvent,
    sync.Fate,
    sync.FateState,
    sync.EntityStatus,
    sync.EntityState,
    sync.SyncProgress,
    sync.Withdrawn,
    sync.KeptBack,
    sync.Verification,
    sync.Difference,
    server.ValidateContext,
    server.ValidateTransaction,
    server.ValidateOperation,
    server.Refusal,
    server.Grants,
    server.Rights,
)
#: Those that programs make by calling the class.
CALLED: Final[frozenset[type[Any]]] = frozenset(
    (entidb.SyncEngine, entidb.AsyncSyncEngine, db.Index)
)
#: A member of an enum in its source, and what is said of it.
_STATE: Final = re.compile(r'((?: +#: .*\n)+) +([A-Z_]+) = (".*")')
#: Of the mapping that a collection is, what Python says of it.
OF_MAPPINGS: Final = {
    "get": "As `dict.get`.",
    "items": "The pairs of id and value, in the order of ids; each iteration from one snapshot.",
    "keys": "The ids, in order.",
    "values": "The values, in the order of ids; each iteration from one snapshot.",
}


def members(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of ``kind``, without plumbing."""
    if issubclass(kind, Enum):
        return
    hidden = getattr(kind, "plumbing", frozenset()) | {"plumbing"}
    for name in sorted(dir(kind)):
        found = inspect.getattr_static(kind, name)
        if name.startswith("_") or name in hidden:
            continue
        if callable(getattr(kind, name, None)) or is_property(found):
            yield name, found


def fields_of(kind: type[Any]) -> Iterator[str]:
    """What a value of ``kind`` holds, as one would annotate it."""
    annotations: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        annotations |= inspect.get_annotations(base)
    for name in getattr(kind, "__struct_fields__", ()):
        yield f"{name}: {annotations[name]}"


def states_of(kind: type[Enum]) -> Iterator[str]:
    """The members of an enum, each with the comment above it."""
    for comment, name, value in _STATE.findall(inspect.getsource(kind)):
        yield f"```text\n{name} = {value}\n```"
        yield from prose(re.sub(r"\s*#: ", " ", comment).strip())


def is_property(found: Any) -> bool:
    return isinstance(found, (property, cached_property))


def said_of(kind: type[Any], name: str, found: Any) -> str | None:
    """The docstring of a member; that of the class below, where it has none of its own."""
    if name in OF_MAPPINGS and issubclass(kind, db.ReadCollection):
        return OF_MAPPINGS[name]
    if kind is entidb.AsyncSyncEngine and not inspect.getdoc(getattr(kind, name)):
        # The same, awaited.
        return inspect.getdoc(getattr(entidb.SyncEngine, name, entidb.SyncStats))
    function = getattr(found, "func", None) or getattr(found, "fget", None) or found
    return inspect.getdoc(function) or inspect.getdoc(getattr(kind, name))


def signature_of(kind: type[Any], name: str, found: Any) -> str:
    if is_property(found):
        return name
    function = getattr(found, "__func__", found)
    word = "await " if inspect.iscoroutinefunction(function) else ""
    own = isinstance(found, (classmethod, staticmethod))
    parameters = list(inspect.signature(function).parameters.values())
    if not isinstance(found, staticmethod):
        parameters = parameters[1:]
    return f"{word}{f'{kind.__name__}.' if own else ''}{name}{shown(parameters)}"


def shown(parameters: list[inspect.Parameter]) -> str:
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def prose(text: str) -> Iterator[str]:
    """A docstring as Markdown, in lines that fit."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("    "):
            yield f"```text\n{textwrap.dedent(paragraph)}\n```"
        elif paragraph.startswith("* "):
            yield "\n".join(filled(f"- {point}", "  ") for point in paragraph[2:].split("\n* "))
        else:
            yield filled(paragraph)


def filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        COLUMNS,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def page() -> str:
    parts = [HEAD.rstrip()]
    for kind in CLASSES:
        parts.append(f"## {kind.__name__}")
        if kind in CALLED:
            parameters = list(inspect.signature(kind).parameters.values())
            parts.append(f"```text\n{kind.__name__}{shown(parameters)}\n```")
        parts += prose(inspect.getdoc(kind) or "")
        if held := list(fields_of(kind)):
            parts.append("```text\n" + "\n".join(held) + "\n```")
        if issubclass(kind, Enum):
            parts += states_of(kind)
            continue
        for name, found in members(kind):
            said = said_of(kind, name, found)
            assert said, f"{kind.__name__}.{name} has no docstring"
            parts.append(f"```text\n{signature_of(kind, name, found)}\n```")
            parts += prose(said)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET.name}: {len(CLASSES)} classes")

"""How objects present themselves to a person who explores: in one readable line, as a table in a
notebook, and by the names that the tab key offers. Made for reading; programs use the fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

from entidb import cbor

#: Characters of one value, rows and columns of a table at most.
VALUE_MAX: Final = 80
ROWS_MAX: Final = 20
_COLUMNS_MAX: Final = 12


class Explored:
    """Base of what programs hold: ``dir()`` lists what is for them, and not the ``plumbing``."""

    __slots__ = ()
    plumbing: ClassVar[frozenset[str]] = frozenset()

    def __dir__(self) -> Iterable[str]:
        hidden = type(self).plumbing | {"plumbing"}
        return [
            name
            for name in super().__dir__()
            if name not in hidden and (not name.startswith("_") or name.endswith("__"))
        ]


def value_text(value: Any, most: int = VALUE_MAX) -> str:
    """``value`` in at most so many characters, none of which can steer a terminal."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def payload_text(payload: bytes | None, absent: str = "deleted") -> str:
    return absent if payload is None else value_text(cbor.decode_trusted(payload))


def line(name: str, *parts: str) -> str:
    """``<name part part>``, without empty parts."""
    return f"<{' '.join((name, *filter(None, parts)))}>"


def counted(**counts: Any) -> str:
    """Those of ``counts`` that are not nothing, with their names: ``pulled 3, pushed 1``."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], more: str = "") -> str:
    """An HTML table; everything in it is escaped here."""
    from html import escape  # with all names of characters: only a notebook needs them

    cells = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    under = f"<p>{escape(more)}</p>" if more else ""
    return (
        f"<div><p>{escape(title)}</p><table><thead><tr>{cells}</tr></thead>"
        f"<tbody>{body}</tbody></table>{under}</div>"
    )


def entities_table(title: str, found: Sequence[tuple[Any, bytes]]) -> str:
    """(id, payload) of some entities; one more than ``ROWS_MAX`` says that there are others."""
    values = [(str(one), cbor.decode_trusted(payload)) for one, payload in found[:ROWS_MAX]]
    fields: dict[str, None] = {}
    for _, value in values:
        fields.update(dict.fromkeys(value if isinstance(value, dict) else ["value"]))
    names = list(fields)[:_COLUMNS_MAX]
    rows = [[identity, *_cells(value, names)] for identity, value in values]
    left_out = []
    if len(found) > ROWS_MAX:
        left_out.append("there are more entities")
    if len(fields) > _COLUMNS_MAX:
        left_out.append(f"there are {len(fields) - _COLUMNS_MAX} more fields")
    return table(title, ["id", *names], rows, ", ".join(left_out))


def _cells(value: Any, names: Sequence[str]) -> list[str]:
    whole = value if isinstance(value, dict) else {"value": value}
    return [value_text(whole[name]) if name in whole else "" for name in names]


__all__ = [
    "ROWS_MAX",
    "Explored",
    "counted",
    "entities_table",
    "line",
    "payload_text",
    "table",
    "value_text",
]

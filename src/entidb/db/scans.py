"""A query that looks at many entities because no index helps says so once, and which would."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Final

from entidb.db.catalogue import IndexInfo
from entidb.db.conditions import Compared, Condition, FieldTest, Joined
from entidb.db.looking import By, Path
from entidb.db.plans import Chosen, Order
from entidb.db.rows import Rows
from entidb.errors import ScanWarning

#: Entities that may be looked at without a word.
SCANNED_MAX: Final = 10_000
#: Why an index cannot answer a question; behind its name.
_UPGRADED: Final = (
    "the collection is read with upgrade=, and an index knows what is stored: entidb migrate "
    "rewrites that, and upgrade= can go"
)
_UNREADY: Final = " is not built yet; db.wait_for_indexes() returns when it is"
_PAUSED: Final = " waits for a program that has its function, and declares it again"
#: (collection, index) that were reported, and how many at most are remembered.
_told: set[tuple[str, str]] = set()
_TOLD_MAX: Final = 1000


def warn_of_scan(
    rows: Rows, name: str, condition: Condition, order: tuple[Order, ...], because: str
) -> None:
    """Warn, once in a process for each kind of question, of one that no index answers; ``because``
    of what not, though one is declared. Of one that is being built nothing is said."""
    wanted = helping_index(condition, order)
    if wanted is None or (name, wanted) in _told or because.endswith(_UNREADY):
        return
    if (count := rows.count(name)) <= SCANNED_MAX:
        return
    if len(_told) < _TOLD_MAX:
        _told.add((name, wanted))
    hint = because or f"with db.collection({name!r}, indexes=[{wanted}]) it would not"
    warnings.warn(
        f"a query looks at all {count:,} entities of {name!r}; {hint}",
        ScanWarning,
        stacklevel=3,
    )


def why_unindexed(
    rows: Rows,
    name: str,
    best_of: Callable[[Sequence[IndexInfo]], Chosen | None],
    *,
    upgraded: bool,
) -> str:
    """Why an index of collection ``name`` that is declared does not answer a question, of which
    ``best_of`` says which would; empty if there is none. ``upgraded``: the question is about what
    ``upgrade=`` makes."""
    if upgraded:
        return _UPGRADED
    chosen = best_of(rows.unready_indexes(name))
    if chosen is None:
        return ""
    return f"{chosen}{_PAUSED if chosen.index.paused else _UNREADY}"


def helping_index(condition: Condition, order: tuple[Order, ...]) -> str | None:
    """The index that would answer a question, as it is declared; None if none would."""
    equal: list[Path] = []
    ranges: list[Path] = []
    parts = condition.parts if isinstance(condition, Joined) and condition.all else (condition,)
    for part in parts:
        if isinstance(part, Compared):
            (equal if part.sign == "==" else ranges).append(part.path)
        elif isinstance(part, FieldTest):
            if part.asked[0] == "contains":
                return f"Index({_name(part.path)}, each=True)"
            ranges.append(part.path)
        elif isinstance(part, Joined):
            ranges += [p.path for p in part.parts if isinstance(p, Compared) and p.sign == "=="][:1]
    wanted = list(dict.fromkeys([*equal, *(ranges[:1] or [one.path for one in order])]))
    made = next((path[-1] for path in wanted if isinstance(path[-1], By)), None)
    if not wanted:
        return None
    if made is not None:
        path = next(path for path in wanted if path[-1] is made)
        return f"Index({_name(path[:-1])}, key={made})"
    return f"Index({', '.join(map(_name, wanted))})"


def _name(path: Path) -> str:
    return f'"{".".join(path)}"'


__all__ = ["SCANNED_MAX", "helping_index", "warn_of_scan", "why_unindexed"]

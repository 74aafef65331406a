"""Which index answers a query, if any does: the longest run of equal fields, then one range or
the order. What an index cannot say is left to the conditions, which are asked of all it gives.

Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from entidb.db.catalogue import IndexInfo
from entidb.db.conditions import ALL, Compared, Condition, FieldTest, Joined
from entidb.db.index_keys import INDEXED_BYTES_MAX, WHOLE_TEXT, Span
from entidb.db.looking import Path, order_key, written
from entidb.db.records import end_of
from entidb.db.sort_keys import ABSENT, sort_key, text_start

#: How many values ``in_`` may have, for an index to look each of them up.
LOOKED_UP_MAX: Final = 1000


class Order(Struct, frozen=True):
    """One field to sort by."""

    path: Path
    descending: bool = False

    def __str__(self) -> str:
        return written(self.path) + (" descending" if self.descending else "")


class Chosen(Struct, frozen=True):
    """How an index answers a query: from its places in ``spans``, of which ``fixed`` is what the
    equal fields make the first bytes of each.

    They come in the query's order if ``ordered`` (``backwards``: from the last to the first), and
    are just what the condition says if ``exact``. ``whole`` says that all entities have to be in
    the index for that. ``rest`` are the fields behind the equal ones.
    """

    index: IndexInfo
    spans: tuple[Span, ...]
    fixed: bytes = b""
    rest: tuple[Path, ...] = ()
    ordered: bool = False
    backwards: bool = False
    exact: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return f"index({self.index})"


class _Asks:
    """What a query asks of its fields that an index can know."""

    def __init__(self, condition: Condition) -> None:
        parts: Sequence[Condition] = (condition,)
        if isinstance(condition, Joined) and condition.all:
            parts = condition.parts
        self.count = len(parts)
        self.equal: dict[Path, Any] = {}
        self.one_of: dict[Path, list[Any]] = {}
        self.ranges: dict[Path, list[Compared | FieldTest]] = {}
        self.members: dict[Path, Any] = {}
        for part in parts:
            self._take(part)

    def _take(self, part: Condition) -> None:
        if isinstance(part, Compared) and part.sign == "==":
            # A second value for the same field is left to the condition.
            self.equal.setdefault(part.path, part.other)
        elif isinstance(part, Compared):
            self.ranges.setdefault(part.path, []).append(part)
        elif isinstance(part, FieldTest) and part.asked[0] == "contains":
            self.members.setdefault(part.path, part.asked[1])
        elif isinstance(part, FieldTest):
            self.ranges.setdefault(part.path, []).append(part)
        elif isinstance(part, Joined) and 0 < len(part.parts) <= LOOKED_UP_MAX:
            equal = [p for p in part.parts if isinstance(p, Compared) and p.sign == "=="]
            if len(equal) == len(part.parts) and len({p.path for p in equal}) == 1:
                self.one_of.setdefault(equal[0].path, [p.other for p in equal])


def choose(
    indexes: Sequence[IndexInfo],
    condition: Condition,
    order: Sequence[Order],
    *,
    limited: bool,
    after: Sequence[Any] | None = None,
) -> Chosen | None:
    """The index that answers a query best; None if none is of use. ``limited`` says that not all
    are wanted, ``after`` where a page begins: the keys of the order's fields there."""
    asks = _Asks(condition)
    if condition is ALL and not (order and limited):
        return None
    best: tuple[tuple[int, ...], Chosen] | None = None
    for index in indexes:
        found = _by_members(index, asks) if index.each else _by_fields(index, asks, order, after)
        if found is None:
            continue
        score, chosen = found
        if chosen.whole and not limited:
            # One entity after the other from all over the table: reading it through is faster.
            continue
        if best is None or score > best[0]:
            best = score, chosen
    return None if best is None else best[1]


def columns_of(index: IndexInfo) -> tuple[Path, ...]:
    """The fields an index goes by, as conditions name them."""
    if index.key is None:
        return index.fields
    return tuple((*path, index.key) for path in index.fields)


def _by_members(index: IndexInfo, asks: _Asks) -> tuple[tuple[int, ...], Chosen] | None:
    (path,) = columns_of(index)
    if path not in asks.members:
        return None
    member = asks.members[path]
    span, cut = _span(sort_key(member), sort_key(member))
    spans = [span]
    if type(member) is str:
        spans.append((WHOLE_TEXT, end_of(WHOLE_TEXT)))
    exact = not cut and len(spans) == 1 and asks.count == 1
    return (1, 1, 0, -1), Chosen(index, tuple(spans), exact=exact)


def _by_fields(
    index: IndexInfo, asks: _Asks, order: Sequence[Order], after: Sequence[Any] | None
) -> tuple[tuple[int, ...], Chosen] | None:
    columns = columns_of(index)
    equal = 0
    while equal < len(columns) and columns[equal] in asks.equal:
        equal += 1
    fixed = b"".join(sort_key(asks.equal[path]) for path in columns[:equal])
    rest = columns[equal:]
    spans, cut, used = _spans(fixed, rest, asks)
    ranged = used > 0
    ordered, backwards = _in_order(asks, columns[:equal], rest, order, after)
    ordered = ordered and len(spans) == 1
    if not equal and not ranged and not (ordered and order):
        return None
    chosen = Chosen(
        index,
        tuple(spans),
        fixed,
        rest,
        ordered,
        backwards,
        exact=not cut and equal + used == asks.count,
        whole=not equal and not ranged,
    )
    helps = int(ranged or (ordered and bool(order)))
    return (equal + helps, equal, int(ranged), int(ordered), -len(columns)), chosen


def _spans(fixed: bytes, rest: Sequence[Path], asks: _Asks) -> tuple[list[Span], bool, int]:
    """Where to look behind the equal fields, whether a bound is cut, and how many conditions are
    used for that."""
    path = rest[0] if rest else None
    if path is not None and path in asks.one_of:
        keys = sorted({sort_key(value) for value in asks.one_of[path]})
        found = [_span(fixed + key, fixed + key) for key in keys]
        cut = any(is_cut for _, is_cut in found)
        # Two that are cut to the same bytes are one place to look.
        return list(dict.fromkeys(span for span, _ in found)), cut, 1
    if path is None or path not in asks.ranges:
        span, cut = _span(fixed, fixed)
        return [span], cut, 0
    found = [_bounds(fixed, part) for part in asks.ranges[path]]
    start = max(span[0] for span, _ in found)
    stop = min(span[1] for span, _ in found if span[1] is not None)
    return [(start, max(start, stop))], any(is_cut for _, is_cut in found), len(found)


def _bounds(fixed: bytes, part: Compared | FieldTest) -> tuple[Span, bool]:
    """The range of an index whose fields meet a condition."""
    if isinstance(part, FieldTest):
        if part.asked[0] == "startswith":
            start = fixed + text_start(part.asked[1])
            return _span(start, start)
        return _span(fixed + end_of(ABSENT), fixed + b"\xfe")
    key = sort_key(part.other)
    kind = key[:1]
    if part.sign == "<":
        return _span(fixed + kind, fixed + key, without_last=True)
    if part.sign == "<=":
        return _span(fixed + kind, fixed + key)
    if part.sign == ">":
        return _span(fixed + key, fixed + kind, without_first=True)
    return _span(fixed + key, fixed + kind)


def _span(
    first: bytes, last: bytes, *, without_first: bool = False, without_last: bool = False
) -> tuple[Span, bool]:
    """From all that begins with ``first`` up to all that begins with ``last``, and whether what
    stands there is more than was asked for, because a bound has no room in a key."""
    cut = len(first) >= INDEXED_BYTES_MAX or len(last) >= INDEXED_BYTES_MAX
    start, stop = first[:INDEXED_BYTES_MAX], last[:INDEXED_BYTES_MAX]
    if without_first and len(first) < INDEXED_BYTES_MAX:
        start = end_of(start)
    if without_last and len(last) < INDEXED_BYTES_MAX:
        return (start, stop), cut
    return (start, end_of(stop) if stop else None), cut


def _in_order(
    asks: _Asks,
    fixed: Sequence[Path],
    rest: Sequence[Path],
    order: Sequence[Order],
    after: Sequence[Any] | None,
) -> tuple[bool, bool]:
    """Whether places come in the order of the query, and whether from the last to the first."""
    if not order:
        return not rest, False
    open_fields = [one for one in order if one.path not in fixed]
    backwards = order[-1].descending
    if [one.path for one in open_fields] != list(rest):
        return False, False
    if any(one.descending is not backwards for one in open_fields):
        return False, False
    for at, one in enumerate(order):
        # A page that begins at an entity of another kind is not in this part of the index.
        known = one.path in fixed
        if known and after is not None and after[at] != order_key(asks.equal[one.path]):
            return False, False
    return True, backwards


__all__ = ["Chosen", "Order", "choose", "columns_of"]

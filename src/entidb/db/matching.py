"""Which of many entities meet a condition, decoding as few of them as it can (``sieve``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from msgspec import Struct

from entidb import cbor
from entidb.db.comparing import Test
from entidb.db.conditions import ALL, Condition, Needles
from entidb.db.rows import Pair
from entidb.db.sieve import Sieve
from entidb.errors import ValueTypeError


class Plan(Struct, frozen=True):
    """How a query found its answer, and what that took.

    ``collection`` was read by ``way`` (``scan``: every entity; or the index, like
    ``index(kind, price)``); ``entities`` were looked at, ``decoded`` of them decoded because they
    could match, and ``found`` matched. ``condition`` and ``order`` are the query's. ``because``
    says why an index that is declared did not answer it: it is not built yet, or the collection
    is read with ``upgrade=``.
    """

    collection: str
    way: str
    condition: str
    order: tuple[str, ...]
    entities: int
    decoded: int
    found: int
    because: str = ""

    def __str__(self) -> str:
        sorting = f", sorted by {', '.join(self.order)}" if self.order else ""
        because = f" ({self.because})" if self.because else ""
        return (
            f"{self.way} of {self.collection!r} for {self.condition or 'everything'}{sorting}: "
            f"{self.entities:,} entities looked at, {self.decoded:,} decoded, {self.found:,} found"
            f"{because}"
        )


class Tally:
    """What finding took."""

    def __init__(self) -> None:
        self.entities = 0
        self.decoded = 0
        self.way = "scan"
        self.because = ""

    def counted(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """``pairs``, as entities that are looked at."""
        for pair in pairs:
            self.entities += 1
            yield pair


def matching(
    pairs: Iterable[Pair],
    condition: Condition,
    tally: Tally | None,
    upgraded: Callable[[bytes], bytes] | None = None,
    *,
    decoded: bool = False,
    sieve: Sieve | None = None,
) -> Iterator[tuple[bytes, bytes, Any]]:
    """(id, payload, value) of those of ``pairs`` that meet ``condition``; the value may be None
    where it is not needed and not ``decoded``. Conditions are about what ``upgraded`` makes.
    Without a ``tally``, ``pairs`` are what ``sieve`` let through, if there is one."""
    if tally is not None:
        pairs = tally.counted(pairs)
    if condition is ALL and not decoded:
        return ((raw, payload, None) for raw, payload in pairs)
    if upgraded is not None:
        # The bytes that are stored may be of an older shape, so they cannot be searched.
        return _tested(pairs, condition.test(), tally, partial(shape_of, upgraded))
    if sieve is None:
        pairs = _holding(pairs, condition.needles())
    elif tally is not None:
        pairs = (pair for pair in pairs if sieve.lets(pair[1]))
    return _tested(pairs, condition.test(), tally)


def shape_of(upgraded: Callable[[bytes], bytes], payload: bytes) -> Any:
    """The value a condition looks at. What cannot be upgraded is looked at as it is stored; who
    reads it is informed."""
    try:
        return cbor.decode_trusted(upgraded(payload))
    except ValueTypeError:
        return cbor.decode_trusted(payload)


def _holding(pairs: Iterable[Pair], needles: Needles | None) -> Iterable[Pair]:
    if not needles:
        return pairs
    if len(needles) == 1:
        (needle,) = needles
        return (pair for pair in pairs if needle in pair[1])
    return (pair for pair in pairs if any(needle in pair[1] for needle in needles))


def _tested(
    pairs: Iterable[Pair],
    test: Test,
    tally: Tally | None,
    decode: Callable[[bytes], Any] = cbor.decode_trusted,
) -> Iterator[tuple[bytes, bytes, Any]]:
    for raw, payload in pairs:
        value = decode(payload)
        if tally is not None:
            tally.decoded += 1
        if test(value):
            yield raw, payload, value

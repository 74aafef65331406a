"""``items()`` and ``values()`` of a collection: each iteration from one snapshot."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from entidb.db.rows import Pair

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)


class Viewed(Protocol[V_co]):
    """The collection that is looked at."""

    def __len__(self) -> int: ...

    def range(self) -> Iterator[tuple[uuid.UUID, V_co]]: ...

    def payloads(self) -> Iterator[Pair]: ...

    def _read_values(self, find: Callable[[int | None], Iterator[Pair]]) -> Iterator[V_co]: ...


class PairsView(Generic[V]):
    """``collection.items()``: iterates (id, value) from one snapshot."""

    def __init__(self, collection: Viewed[V]) -> None:
        self._collection = collection

    def __iter__(self) -> Iterator[tuple[uuid.UUID, V]]:
        return self._collection.range()

    def __len__(self) -> int:
        return len(self._collection)


class ValuesView(Generic[V]):
    """``collection.values()``: iterates values from one snapshot."""

    def __init__(self, collection: Viewed[V]) -> None:
        self._collection = collection

    def __iter__(self) -> Iterator[V]:
        collection = self._collection
        return collection._read_values(lambda _: collection.payloads())

    def __len__(self) -> int:
        return len(self._collection)

"""Writes that are put together on a view of the database, and what was read on the way.

Nothing is committed here: who has a draft commits it (``committer``), and finds out with
``ReadSet`` whether what it was made on is still so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

from entidb.db.catalogue import IndexInfo
from entidb.db.codec import codec_for
from entidb.db.collection import ReadCollection, TransactionCollection
from entidb.db.feed import ChangeFeed
from entidb.db.index_keys import Span
from entidb.db.local import Writes
from entidb.db.notebook import Explored
from entidb.db.plain import ValueCodec
from entidb.db.reading import OnInvalid, Upgrade
from entidb.db.records import EntityRow
from entidb.db.rows import LentRows, OverlayRows, Pair, Rows, SnapshotRows, Stops
from entidb.errors import TransactionConflictError, TransactionError
from entidb.types import check_name, uuid_from_bytes

V = TypeVar("V")


class Draft(Explored):
    """Collections to read and to write to, on ``below``; the writes stay in ``writes``."""

    plumbing = frozenset(("transaction_id", "with_codec", "writes"))

    def __init__(self, below: Rows, new_id: Callable[[], bytes]) -> None:
        self.writes: Writes = {}
        self._rows = OverlayRows(below, self.writes)
        self._new_id = new_id
        #: Why nothing can be done with it any more.
        self._over: str | None = None

    @overload
    def collection(
        self, name: str, *, on_invalid: OnInvalid = "raise", upgrade: Upgrade | None = None
    ) -> TransactionCollection[Any]: ...

    @overload
    def collection(
        self,
        name: str,
        type: type[V],
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> TransactionCollection[V]: ...

    def collection(
        self,
        name: str,
        type: type[Any] | None = None,
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> TransactionCollection[Any]:
        """The collection ``name`` inside this transaction; all else as in ``Database.collection``.
        Raises ``InvalidNameError``, ``ValueTypeError``, ``ConfigError``."""
        codec = codec_for(type, exact=exact, on_invalid=on_invalid, upgrade=upgrade)
        return self.with_codec(name, codec)

    @overload
    def __getitem__(self, name: str) -> TransactionCollection[Any]: ...

    @overload
    def __getitem__(self, name: ReadCollection[V]) -> TransactionCollection[V]: ...

    def __getitem__(self, name: str | ReadCollection[Any]) -> TransactionCollection[Any]:
        """``tx["notes"]``; or ``tx[notes]``, the collection of a database with its type."""
        if isinstance(name, ReadCollection):
            return self.with_codec(name.name, name._codec)
        return self.collection(name)

    def with_codec(self, name: str, codec: ValueCodec[V]) -> TransactionCollection[V]:
        """As ``collection``, for what has a codec already."""
        self._check_open()
        check_name(name)
        return TransactionCollection(
            name, codec, self._open_rows, self._stored, self._stage, self._new_id
        )

    def _stage(self, name: str, entity_id: bytes, payload: bytes | None) -> None:
        self._check_open()
        self.writes.setdefault(name, {})[entity_id] = payload

    def _stored(self, name: str, entity_id: bytes) -> bytes | None:
        self._check_open()
        return self._rows.get(name, entity_id)

    def _open_rows(self) -> LentRows[Rows]:
        self._check_open()
        return LentRows(self._rows)

    def _check_open(self) -> None:
        if self._over is not None:
            raise TransactionError(f"this transaction is over ({self._over}); begin another")


class ReadSet:
    """What was read of a snapshot: entities with their payloads, and collections as a whole."""

    def __init__(self, sequence: int) -> None:
        self._sequence = sequence
        self._entities: dict[tuple[str, bytes], bytes | None] = {}
        self._collections: set[str] = set()

    def entity(self, name: str, entity_id: bytes, payload: bytes | None) -> None:
        self._entities.setdefault((name, entity_id), payload)

    def whole(self, name: str) -> None:
        self._collections.add(name)

    def check(self, committed: SnapshotRows, staged: Writes) -> None:
        """Raises ``TransactionConflictError`` if something of it has changed since: in what is
        ``committed``, or in what is ``staged`` to be committed before."""
        now = OverlayRows(committed, staged)
        for (name, entity_id), payload in self._entities.items():
            if now.get(name, entity_id) != payload:
                raise _conflict(f"entity {uuid_from_bytes(entity_id)} of {name!r}")
        for name in sorted(self._collections):
            if name in staged:
                raise _conflict(f"collection {name!r}")
        if self._collections:
            chosen = frozenset(self._collections)
            feed = ChangeFeed(lambda: LentRows(committed), self._sequence, chosen)
            for event in feed:
                raise _conflict(f"collection {event.collection!r}")


def _conflict(what: str) -> TransactionConflictError:
    return TransactionConflictError(
        f"{what} was read in this transaction, and another one has changed it since; nothing was "
        "written. Begin again, or let db.run(fn) do that"
    )


class SeeingRows:
    """``below``, noting in ``seen`` what is read of it."""

    def __init__(self, below: SnapshotRows, seen: ReadSet) -> None:
        self._below = below
        self._seen = seen

    def get(self, name: str, entity_id: bytes) -> bytes | None:
        payload = self._below.get(name, entity_id)
        self._seen.entity(name, entity_id, payload)
        return payload

    def get_many(self, name: str, ids: Sequence[bytes]) -> list[bytes | None]:
        payloads = self._below.get_many(name, ids)
        for entity_id, payload in zip(ids, payloads, strict=True):
            self._seen.entity(name, entity_id, payload)
        return payloads

    def row(self, name: str, entity_id: bytes) -> EntityRow | None:
        row = self._below.row(name, entity_id)
        self._seen.entity(name, entity_id, None if row is None else row.payload)
        return row

    def pairs(self, name: str, start: bytes, stop: bytes | None, reverse: bool) -> Iterator[Pair]:
        self._seen.whole(name)
        return self._below.pairs(name, start, stop, reverse)

    def pages(
        self, name: str, start: bytes, stop: bytes | None, reverse: bool
    ) -> Iterator[list[Pair]]:
        self._seen.whole(name)
        return self._below.pages(name, start, stop, reverse)

    def holding(self, name: str, start: bytes, sieve: Stops) -> Iterator[Pair]:
        self._seen.whole(name)
        return self._below.holding(name, start, sieve)

    def count(self, name: str) -> int:
        self._seen.whole(name)
        return self._below.count(name)

    def indexes(self, name: str) -> tuple[IndexInfo, ...]:
        return self._below.indexes(name)

    def unready_indexes(self, name: str) -> tuple[IndexInfo, ...]:
        return self._below.unready_indexes(name)

    def places(
        self, name: str, index: IndexInfo, span: Span, backwards: bool, limit: int
    ) -> Iterator[list[bytes]]:
        # An entity that comes into the part of the index later was not seen.
        self._seen.whole(name)
        return self._below.places(name, index, span, backwards, limit)

    def index_count(self, name: str, index: IndexInfo) -> int:
        self._seen.whole(name)
        return self._below.index_count(name, index)

    def own(self, name: str) -> Mapping[bytes, bytes | None]:
        return self._below.own(name)


__all__ = ["Draft", "SeeingRows", "ReadSet"]

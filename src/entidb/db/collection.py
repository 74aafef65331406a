"""Collections as mappings from ``uuid.UUID`` to values: of a database, a transaction, a snapshot.

The three differ only in where they read and what a write does; storage and records are below.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from itertools import chain, islice, starmap
from operator import itemgetter
from typing import Any, Generic, TypeVar, overload

from entidb import cbor
from entidb.db.codec import located
from entidb.db.conditions import Field
from entidb.db.entity_info import EntityInfo, id_bytes, ids_bytes, natural_id
from entidb.db.given import changed, pairs_of, range_of, several
from entidb.db.live import Observe
from entidb.db.notebook import Explored, line
from entidb.db.plain import Keep, PlainCodec, ValueCodec
from entidb.db.query import Query, Where
from entidb.db.reading import plain_pair, plain_pairs, plain_values, read_many
from entidb.db.rows import Pair, Rows
from entidb.db.views import PairsView, ValuesView
from entidb.errors import CorruptionError, ValueTypeError
from entidb.types import datetime_of, uuid_from_bytes, uuids_from_bytes

V = TypeVar("V")
D = TypeVar("D")
#: Opens a view to read from; closing it ends the snapshot under it.
OpenRows = Callable[[], AbstractContextManager[Rows]]


class ReadCollection(Explored, Mapping[uuid.UUID, V], Generic[V]):
    """A collection to read: a mapping ordered by id.

    Iterating holds one snapshot until the iterator is exhausted or dropped, so it never sees half
    a transaction (R2); long iterations keep old pages alive, so finish them.
    """

    def __init__(self, name: str, codec: ValueCodec[V], open_rows: OpenRows) -> None:
        self.name = name
        self._codec = codec
        self._open = open_rows
        #: Adds an observer, where something can change.
        self._observe: Observe | None = None

    def __getitem__(self, entity_id: uuid.UUID) -> V:
        raw = id_bytes(entity_id)
        with self._open() as rows:
            payload = rows.get(self.name, raw)
        if payload is None:
            raise KeyError(entity_id)
        try:  # as ``_decode``, without the call
            return self._codec.decode(payload)
        except ValueTypeError as error:
            return self._instead(located(error, self.name, raw), payload)

    def _decode(self, raw: bytes, payload: bytes) -> V:
        try:
            return self._codec.decode(payload)
        except ValueTypeError as error:
            return self._instead(located(error, self.name, raw), payload)

    def _instead(self, error: ValueTypeError, payload: bytes) -> V:
        """The value that is read instead of one that does not fit; raises ``error`` where there is
        none."""
        instead = self._codec.instead
        made = None if instead is None else instead(error, cbor.decode_trusted(payload))
        if made is None:
            raise error from error.__cause__
        return made  # type: ignore[no-any-return]

    def _pair(self, raw: bytes, payload: bytes) -> tuple[uuid.UUID, V]:
        return uuid_from_bytes(raw), self._decode(raw, payload)

    def _pair_or_none(self, raw: bytes, payload: bytes) -> tuple[uuid.UUID, V] | None:
        try:
            value = self._codec.decode(payload)
        except ValueTypeError as error:
            located_error = located(error, self.name, raw)
            assert self._codec.instead is not None, "called only where there is one"
            value = self._codec.instead(located_error, cbor.decode_trusted(payload))
            if value is None:
                return None
        return uuid_from_bytes(raw), value

    def _read(
        self, find: Callable[[int | None], Iterator[Pair]], limit: int | None = None
    ) -> Iterator[tuple[uuid.UUID, V]]:
        """What ``find`` finds, with the values of this collection."""
        if type(self._codec) is PlainCodec:
            # Every entity fits, so nobody has to be told which one did not.
            return starmap(plain_pair, find(limit))
        skipping = None if self._codec.instead is None else self._pair_or_none
        return read_many(find, limit, self._pair, skipping)

    def _read_values(
        self, find: Callable[[int | None], Iterator[Pair]], limit: int | None = None
    ) -> Iterator[V]:
        if type(self._codec) is PlainCodec:
            return map(self._codec.decode, map(itemgetter(1), find(limit)))
        if self._codec.instead is None:
            return starmap(self._decode, find(limit))
        return map(itemgetter(1), self._read(find, limit))

    @overload
    def get(self, key: uuid.UUID) -> V | None: ...

    @overload
    def get(self, key: uuid.UUID, default: V | D) -> V | D: ...

    def get(self, key: uuid.UUID, default: Any = None) -> Any:
        raw = id_bytes(key)
        with self._open() as rows:
            payload = rows.get(self.name, raw)
        return default if payload is None else self._decode(raw, payload)

    def get_many(self, ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, V]:
        """The entities among ``ids`` that exist, from one snapshot; others are left out."""
        wanted = list(several("get_many", ids, "several ids"))
        raws = ids_bytes(wanted)
        with self._open() as rows:
            payloads = rows.get_many(self.name, raws)
        if type(self._codec) is PlainCodec:
            return plain_values(wanted, payloads)
        there = ((raw, one) for raw, one in zip(raws, payloads, strict=True) if one is not None)
        return dict(self._read(lambda _: there))

    def __contains__(self, entity_id: object) -> bool:
        raw = id_bytes(entity_id)
        with self._open() as rows:
            return rows.get(self.name, raw) is not None

    def __len__(self) -> int:
        with self._open() as rows:
            return rows.count(self.name)

    def __iter__(self) -> Iterator[uuid.UUID]:
        for page in self._pages(None, None, False):
            yield from uuids_from_bytes([raw for raw, _ in page])

    def range(
        self,
        start: uuid.UUID | None = None,
        stop: uuid.UUID | None = None,
        *,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[uuid.UUID, V]]:
        """(id, value) with ``start <= id < stop``, in id order or against it, at most ``limit``.

        UUIDv7 ids sort by the time they were made, so a range of ids is a range of time. An
        entity that does not fit raises ``ValueTypeError`` and does not end the iterator: ``next``
        goes on behind it (see ``on_invalid``)."""
        reverse, limit = range_of(reverse, limit)
        if limit == 0:
            return iter(())
        pages = self._pages(start, stop, reverse)
        if limit is None and type(self._codec) is PlainCodec:
            return chain.from_iterable(map(plain_pairs, pages))
        pairs = chain.from_iterable(pages)
        return self._read(lambda most: islice(pairs, most), limit)

    def id_for(self, *key: str | int | bytes | uuid.UUID) -> uuid.UUID:
        """The id of the entity with a natural key: always the same for this collection and ``key``,
        so that two devices which make the same thing make one entity, and a conflict if their
        values differ: ``stock[stock.id_for("sku-123")] = …``.

        It is a UUIDv8 (RFC 9562, section 5.8) of the SHA-256 of the canonical CBOR of
        ``[name, *key]``, UUIDs as their bytes. Raises ``ValueTypeError`` for any other key.
        """
        return natural_id(self.name, key)

    @property
    def raw(self) -> ReadCollection[Any]:
        """The same entities as plain values, as they are stored: also those that do not fit the
        class, and without ``upgrade``."""
        return ReadCollection(self.name, PlainCodec(), self._open)

    def info(self, entity_id: uuid.UUID) -> EntityInfo:
        """Which version of an entity is here, who changed it and when, and whether the server
        has decided on it. Raises ``KeyError`` if there is no such entity.

        In a transaction this is about what was committed: what the transaction writes has no
        version and no time before its commit, and there is nothing to know of an entity that it
        adds."""
        raw = id_bytes(entity_id)
        with self._open() as rows:
            row = rows.row(self.name, raw)
        if row is None or row.payload is None:
            raise KeyError(entity_id)
        return EntityInfo(
            id=entity_id,
            version=row.version,
            pending=row.dirty,
            device_id=row.device_id,
            changed_at=datetime_of(row.timestamp),
            payload_bytes=len(row.payload),
        )

    @property
    def where(self) -> Where[V]:
        """The entities that meet conditions: ``stock.where(F.price > 3, kind="tea")``, or
        ``stock.where.from_dict({"kind": "tea"})``. See ``Query``."""
        return Where(self._query())

    def order_by(self, *fields: str | Field) -> Query[V]:
        """All entities, sorted by ``fields``: see ``Query.order_by``."""
        return self._query().order_by(*fields)

    def _query(self) -> Query[V]:
        return Query(self)

    def items(self) -> PairsView[V]:  # type: ignore[override]
        return PairsView(self)

    def values(self) -> ValuesView[V]:  # type: ignore[override]
        return ValuesView(self)

    def payloads(self) -> Iterator[tuple[bytes, bytes]]:
        """(16 bytes of id, canonical CBOR) in id order, for exports that need no values."""
        return chain.from_iterable(self._pages(None, None, False))

    def _pages(
        self, start: uuid.UUID | None, stop: uuid.UUID | None, reverse: bool
    ) -> Iterator[list[Pair]]:
        low = b"" if start is None else id_bytes(start)
        high = None if stop is None else id_bytes(stop)
        with self._open() as rows:
            yield from rows.pages(self.name, low, high, reverse)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        kind = self._codec.kind
        return line(type(self).__name__, repr(self.name), f"of {kind}" if kind else "")

    def _repr_html_(self) -> str:
        return self._query()._repr_html_()


def kept(keep: Keep, name: str, entity_id: bytes, payload: bytes, stored: bytes) -> bytes:
    """The payload to write over ``stored``. Raises ``ValueTypeError``, which names the entity."""
    try:
        return keep(payload, stored)
    except ValueTypeError as error:
        raise located(error, name, entity_id) from error


#: The payload at (collection name, id), the transaction's own writes included.
Stored = Callable[[str, bytes], bytes | None]
#: Stages one write: (collection name, id, payload or None).
Stage = Callable[[str, bytes, bytes | None], None]


class TransactionCollection(ReadCollection[V], MutableMapping[uuid.UUID, V]):
    """A collection inside a transaction: reads see its own writes, writes wait for the commit."""

    def __init__(
        self,
        name: str,
        codec: ValueCodec[V],
        open_rows: OpenRows,
        stored: Stored,
        stage: Stage,
        new_id: Callable[[], bytes],
    ) -> None:
        super().__init__(name, codec, open_rows)
        self._stored = stored
        self._stage = stage
        self._new_id = new_id

    def __setitem__(self, entity_id: uuid.UUID, value: V) -> None:
        """Store ``value``; fields of the stored entity that its class does not know stay, unless
        the collection was opened with ``exact=True``."""
        raw = id_bytes(entity_id)
        payload = self._codec.encode(value)
        keep = self._codec.keep
        if keep is not None:
            stored = self._stored(self.name, raw)
            if stored is not None:
                payload = kept(keep, self.name, raw, payload, stored)
        self._stage(self.name, raw, payload)

    def patch(
        self, entity_id: uuid.UUID, changes: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> None:
        """Change the named fields of an entity, and nothing else of it: ``patch(id, price=4)``.

        ``changes`` is for names that Python cannot write as keywords. A typed collection checks
        them as its class does. Raises ``KeyError`` if there is no such entity, ``ValueTypeError``
        for a field the class does not have and for a value that does not fit it."""
        raw = id_bytes(entity_id)
        stored = self._stored(self.name, raw)
        if stored is None:
            raise KeyError(entity_id)
        try:
            payload = self._codec.patch(stored, changed("patch", changes, fields))
        except ValueTypeError as error:
            raise located(error, self.name, raw) from error
        if payload != stored:
            self._stage(self.name, raw, payload)

    def __delitem__(self, entity_id: uuid.UUID) -> None:
        if entity_id not in self:
            raise KeyError(entity_id)
        self._stage(self.name, entity_id.bytes, None)

    def add(self, value: V) -> uuid.UUID:
        """Store ``value`` under a new UUIDv7 and return it."""
        raw = self._new_id()
        self._stage(self.name, raw, self._codec.encode(value))
        return uuid_from_bytes(raw)

    def _query(self) -> Query[V]:
        return Query(self, delete=self._delete_found)

    def _delete_found(self, query: Query[V]) -> int:
        found = [raw for raw, _ in query._on(self)._found()]
        for raw in found:
            self._stage(self.name, raw, None)
        return len(found)

    def get_or_add(self, entity_id: uuid.UUID, value: V) -> V:
        """The entity as it is, or ``value``, which is stored if there is none."""
        found = self.get(entity_id)
        if found is None:
            self[entity_id] = value
            return value
        return found

    def upsert(
        self, entity_id: uuid.UUID, changes: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> bool:
        """As ``patch`` where there is such an entity; else store one of these fields and the
        defaults of its class. Whether it is new. Raises ``ValueTypeError`` as ``patch`` does, and
        for a new one that lacks a field."""
        if entity_id in self:
            self.patch(entity_id, changes, **fields)
            return False
        try:
            payload = self._codec.make(changed("upsert", changes, fields))
        except ValueTypeError as error:
            raise located(error, self.name, entity_id.bytes) from error
        self._stage(self.name, entity_id.bytes, payload)
        return True

    def put_many(self, values: Mapping[uuid.UUID, V] | Iterable[tuple[uuid.UUID, V]]) -> None:
        """Store all of ``values``: a mapping, or pairs. Raises ``ValueTypeError``."""
        for entity_id, value in pairs_of("put_many", values):
            self[entity_id] = value

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As ``dict.update``. Raises ``ValueTypeError``."""
        if len(args) > 1:
            raise TypeError(f"update takes one mapping, not {len(args)}")
        for given in args:
            keys = None if isinstance(given, Mapping) else getattr(given, "keys", None)
            self.put_many(given if keys is None else ((key, given[key]) for key in keys()))
        self.put_many(kwargs)  # type: ignore[arg-type]  # refused: a name is no id

    def discard(self, entity_id: uuid.UUID) -> bool:
        """Delete if there; returns whether it was."""
        there = entity_id in self
        if there:
            del self[entity_id]
        return there

    def clear(self) -> None:
        """Delete every entity of the collection."""
        for entity_id in list(self):
            try:
                del self[entity_id]
            except KeyError as error:
                raise CorruptionError(
                    f"a walk through {self.name!r} finds entity {entity_id}, and looking it up "
                    "does not; run verify, and restore a backup"
                ) from error


#: Opens a transaction that commits when the block ends.
OpenTransaction = Callable[[], AbstractContextManager[Any]]
#: Commits one entity: (collection name, id or None for a new one, payload, what to keep of the
#: stored one); returns the id.
CommitOne = Callable[[str, bytes | None, bytes, Keep | None], bytes]


class Collection(ReadCollection[V], MutableMapping[uuid.UUID, V]):
    """A collection of a database: every read is a snapshot of its own, every write its own
    durable commit. Use ``db.transaction()`` to commit several writes as one."""

    def __init__(
        self,
        name: str,
        codec: ValueCodec[V],
        open_rows: OpenRows,
        open_transaction: OpenTransaction,
        commit_one: CommitOne,
        observe: Observe,
    ) -> None:
        super().__init__(name, codec, open_rows)
        self._transaction = open_transaction
        self._commit_one = commit_one
        self._observe = observe

    def _query(self) -> Query[V]:
        return Query(self, delete=self._delete_found)

    def _delete_found(self, query: Query[V]) -> int:
        with self._transaction() as tx:
            return self._one(tx)._delete_found(query)

    def _one(self, tx: Any) -> TransactionCollection[V]:
        made: TransactionCollection[V] = tx.with_codec(self.name, self._codec)
        return made

    def __setitem__(self, entity_id: uuid.UUID, value: V) -> None:
        """Store ``value``; fields of the stored entity that its class does not know stay, unless
        the collection was opened with ``exact=True``."""
        codec = self._codec
        self._commit_one(self.name, id_bytes(entity_id), codec.encode(value), codec.keep)

    def patch(
        self, entity_id: uuid.UUID, changes: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> None:
        """Change the named fields of an entity, and nothing else of it, in one transaction:
        ``patch(id, price=4)``.

        ``changes`` is for names that Python cannot write as keywords. A typed collection checks
        them as its class does. Raises ``KeyError`` if there is no such entity, ``ValueTypeError``
        for a field the class does not have and for a value that does not fit it."""
        with self._transaction() as tx:
            self._one(tx).patch(entity_id, changes, **fields)

    def __delitem__(self, entity_id: uuid.UUID) -> None:
        with self._transaction() as tx:
            del self._one(tx)[entity_id]

    def add(self, value: V) -> uuid.UUID:
        """Store ``value`` under a new UUIDv7 and return it."""
        return uuid_from_bytes(self._commit_one(self.name, None, self._codec.encode(value), None))

    def get_or_add(self, entity_id: uuid.UUID, value: V) -> V:
        """The entity as it is, or ``value``, which is stored if there is none; in one transaction.
        With ``id_for``, repeated calls make a thing only once."""
        with self._transaction() as tx:
            return self._one(tx).get_or_add(entity_id, value)

    def upsert(
        self, entity_id: uuid.UUID, changes: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> bool:
        """Change the named fields of an entity, or store one of these fields and the defaults of
        its class if there is none, in one transaction: ``upsert(id, count=1)``. Whether it is new.
        Raises ``ValueTypeError`` as ``patch`` does, and for a new one that lacks a field."""
        with self._transaction() as tx:
            return self._one(tx).upsert(entity_id, changes, **fields)

    def put_many(self, values: Mapping[uuid.UUID, V] | Iterable[tuple[uuid.UUID, V]]) -> None:
        """Store all of ``values`` in one transaction."""
        with self._transaction() as tx:
            self._one(tx).put_many(values)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As ``dict.update``, in one transaction."""
        with self._transaction() as tx:
            self._one(tx).update(*args, **kwargs)

    def discard(self, entity_id: uuid.UUID) -> bool:
        """Delete if there; returns whether it was."""
        with self._transaction() as tx:
            return self._one(tx).discard(entity_id)

    def clear(self) -> None:
        """Delete every entity of the collection in one transaction."""
        with self._transaction() as tx:
            self._one(tx).clear()

    def pop(self, key: uuid.UUID, *default: Any) -> Any:
        """As ``dict.pop``, in one transaction."""
        with self._transaction() as tx:
            return self._one(tx).pop(key, *default)

    def popitem(self) -> tuple[uuid.UUID, V]:
        """Remove and return the first entity, in one transaction."""
        with self._transaction() as tx:
            return self._one(tx).popitem()

    def setdefault(self, key: uuid.UUID, default: Any = None) -> V:
        """As ``dict.setdefault``, in one transaction."""
        with self._transaction() as tx:
            return self._one(tx).setdefault(key, default)

"""Reading: one transaction, repeatable read, on a connection that is the snapshot's until it ends.

Each value is proved by its checksum before it is returned. What was read or written lately, and is
of the very state that this shows, is not asked for (``remembered``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import psycopg
from psycopg.pq.abc import PGresult

from entidb.errors import CorruptionError, DatabaseClosedError
from entidb.storage.base import KEY_BYTES_MAX
from entidb.storage.checksums import RESIDUE
from entidb.storage.crc import crc32
from entidb.storage.postgres.line import (
    Line,
    Question,
    Statement,
    Value,
    byteas,
    column_in,
    int4,
    int8,
    items_in,
    number_in,
    pairs_in,
)
from entidb.storage.postgres.opened import Opened

#: Keys that one statement looks for.
_KEYS_AT_ONCE: Final = 5000
#: Keys that are worth a look at what lies between them, and how much of that is looked at.
_NEIGHBOURS_FROM: Final = 100
_BETWEEN_MAX: Final = 8
#: Records of one read that are remembered: a first sync reads everything once.
_REMEMBERED_MAX: Final = 128

_BEGIN: Final[Question] = (
    Statement(b"begin", b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
    (),
)
#: The first statement decides which state it is.
_MARK: Final = Statement(
    b"first",
    b"SELECT mark, ARRAY(SELECT (SELECT kv.v FROM entidb_kv kv "
    b"WHERE kv.store = $1 AND kv.k = wanted.k) FROM unnest($2::bytea[]) wanted(k)) "
    b"FROM entidb_store WHERE id = $1 AND name = $3",
)
_GET: Final = Statement(b"get", b"SELECT v FROM entidb_kv WHERE store = $1 AND k = $2")
#: In the order of the keys; a join would be planned as one.
_GET_MANY: Final = Statement(
    b"get_many",
    b"SELECT (SELECT kv.v FROM entidb_kv kv WHERE kv.store = $1 AND kv.k = wanted.k) "
    b"FROM unnest($2::bytea[]) wanted(k)",
)


def _range(name: str, columns: str, order: str) -> Statement:
    return Statement(
        name.encode(),
        f"SELECT {columns} FROM entidb_kv WHERE store = $1 AND k >= $2 AND k < $3 "
        f"ORDER BY k {order} LIMIT $4".encode(),
    )


#: By whether it is reverse.
_SCAN: Final = _range("scan", "k, v", "ASC"), _range("scan_back", "k, v", "DESC")
_SCAN_KEYS: Final = _range("keys", "k", "ASC"), _range("keys_back", "k", "DESC")
#: Of the first records of a range: how many there are, and bytes of their values.
_WEIGH: Final = Statement(
    b"weigh",
    b"SELECT count(*), coalesce(sum(length(v)), 0)::bigint FROM (SELECT v FROM entidb_kv "
    b"WHERE store = $1 AND k >= $2 AND k < $3 ORDER BY k LIMIT $4) AS first",
)
_COUNT: Final = Statement(b"count", b"SELECT count(*) FROM entidb_kv WHERE store = $1")
_BYTES: Final = Statement(
    b"bytes",
    b"SELECT coalesce(sum(length(k) + length(v)), 0)::bigint FROM entidb_kv WHERE store = $1",
)


class PostgresSnapshot:
    """See the module."""

    def __init__(self, store: Opened) -> None:
        self._store = store
        self._connection: Line | None = None
        self._remembered = store.remembered
        often, losses = store.often.keys, store.node.losses
        self._connection, answer = _begin(store, often)
        self.mark = number_in(answer) or 0
        self._remembered.begin(self.mark, losses)
        #: As they are stored, what came with the mark; and which of it was asked for.
        self._came = dict(zip(often, items_in(answer.get_value(0, 1)), strict=True))
        self._used: set[bytes] = set()
        store.readers.add(id(self))

    def get(self, key: bytes) -> bytes | None:
        if key in self._came:
            self._open()
            self._used.add(key)
            stored = self._came[key]
            self._note((key,), (stored,))
            return None if stored is None else proved(key, stored)
        self._open()
        value = self._remembered.values(self.mark, (key,))[0]
        if value is None:
            answer = self._ask(_GET, key)
            stored = answer.get_value(0, 0) if answer.ntuples else None
            value = None if stored is None else proved(key, stored)
            self._remembered.read(self.mark, ((key, value),))
        self._store.often.asked(key, len(value or b""))
        self._note((key,), (value,))
        return value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if len(keys) == 1:
            return [self.get(keys[0])]
        self._open()
        found = self._remembered.values(self.mark, keys)
        missing = [place for place, value in enumerate(found) if value is None]
        if len(missing) >= _NEIGHBOURS_FROM:
            near = self._near_each_other([keys[at] for at in missing])
            if near is not None:
                for place in missing:
                    found[place] = near.get(keys[place])
                self._note(keys, found)
                return found
        for first in range(0, len(missing), _KEYS_AT_ONCE):
            places = missing[first : first + _KEYS_AT_ONCE]
            part = [keys[place] for place in places]
            values = column_in(self._ask(_GET_MANY, byteas(part)))
            for place, key, stored in zip(places, part, values, strict=True):
                found[place] = None if stored is None else proved(key, stored)
        if 0 < len(missing) <= _REMEMBERED_MAX:
            self._remembered.read(self.mark, [(keys[place], found[place]) for place in missing])
        self._note(keys, found)
        return found

    def _note(self, keys: Sequence[bytes], found: Sequence[bytes | None]) -> None:
        """Whoever has the turn may be about to replace what is there."""
        if self._store.fresh.noting:
            self._store.fresh.note(keys, found)

    def weigh(self, keys: Sequence[bytes]) -> int | None:
        """As ``WeighingSnapshot``. Of keys that lie near each other it is what lies between."""
        limit = len(keys) + _BETWEEN_MAX
        between = self._ask(_WEIGH, min(keys), max(keys) + b"\0", _limit(limit))
        return None if number_in(between) == limit else number_in(between, 1)

    def _near_each_other(self, keys: Sequence[bytes]) -> dict[bytes, bytes] | None:
        """What there is of ``keys``, if hardly anything else lies between them: then one range is
        read, and nothing looked for. So it is with what is new, and what came together. None: they
        are to be looked for."""
        start, stop, wanted = min(keys), max(keys) + b"\0", set(keys)
        between = column_in(self._ask(_SCAN_KEYS[False], start, stop, _limit(_BETWEEN_MAX)))
        few = len(between) < _BETWEEN_MAX
        if not (few or wanted.issuperset(between)):
            return None
        if few and wanted.isdisjoint(between):
            return {}
        limit = len(keys) + _BETWEEN_MAX
        rows = self.stored(start, stop, limit=limit)
        if len(rows) == limit:
            return None
        return {key: proved(key, stored) for key, stored in rows if key in wanted}

    def scan(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        rows = self.stored(start, stop, limit=limit, reverse=reverse)
        return [(key, proved(key, stored)) for key, stored in rows]

    def stored(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """As ``scan``, with values as they are stored: not proved, and with their checksums."""
        return pairs_in(self._ask(_SCAN[reverse], start, stop, _limit(limit)))

    def scan_keys(
        self,
        start: bytes,
        stop: bytes,
        *,
        limit: int | None = None,
        reverse: bool = False,
        proved: bool = False,
    ) -> list[bytes]:
        if not proved:
            return column_in(self._ask(_SCAN_KEYS[reverse], start, stop, _limit(limit)))
        if limit is None or limit <= 0 or reverse:
            return [key for key, _ in self.scan(start, stop, limit=limit, reverse=reverse)]
        self._open()
        known = self._remembered.keys(self.mark, start, stop, limit)
        if known is not None:
            return known
        keys = [key for key, _ in self.scan(start, stop, limit=limit)]
        if len(keys) <= _REMEMBERED_MAX:
            end = stop if len(keys) < limit else keys[-1] + b"\0"
            self._remembered.read_keys(self.mark, start, end, keys)
        return keys

    def size(self) -> tuple[int, int]:
        """Records, and bytes of all of them."""
        return number_in(self._ask(_COUNT)) or 0, number_in(self._ask(_BYTES)) or 0

    def _ask(self, statement: Statement, *values: Value) -> PGresult:
        """The first value is the store."""
        line, store = self._open(), self._store
        try:
            return line.ask(statement, int4(store.number), *values)
        except psycopg.Error as error:
            raise store.failure(error, f"reading {store.path}") from error

    def _open(self) -> Line:
        if self._connection is None:
            raise DatabaseClosedError("this snapshot is closed; take a new one")
        self._store.check_open()
        return self._connection

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        store = self._store
        store.readers.discard(id(self))
        sizes = {key: len(stored or b"") for key, stored in self._came.items()}
        store.often.ended(sizes, self._used)
        store.node.take_back(store.node.reading, _ended(connection))

    def __enter__(self) -> PostgresSnapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # interrupted while it was made
            connection, self._connection = self._connection, None
            if connection is not None:
                self._store.readers.discard(id(self))
                self._store.node.forgotten.append(connection)


def _ended(line: Line) -> Line:
    """Whose transaction ends without anybody waiting for it."""
    try:
        if not line.closed:
            line.leave(b"ROLLBACK")
    except psycopg.Error:
        line.close()
    return line


def _begin(store: Opened, often: Sequence[bytes]) -> tuple[Line, PGresult]:
    """A connection inside a transaction, and its first answer: the mark, and what stands at the
    keys ``often`` in the state of that mark."""
    node = store.node
    try:
        mark = _MARK, (int4(store.number), byteas(often), store.known_as)
        line, answers = node.ask(node.reading, [_BEGIN, mark])
    except psycopg.Error as error:
        raise store.failure(error, f"reading {store.path}") from error
    if not answers[1].ntuples:
        node.take_back(node.reading, _ended(line))
        raise store.gone()
    return line, answers[1]


def _limit(limit: int | None) -> Value:
    return None if limit is None else int8(max(0, int(limit)))


def proved(key: bytes, stored: bytes) -> bytes:
    """The value of a record as it is stored. Raises ``CorruptionError``."""
    if crc32(key + stored) != RESIDUE:
        raise CorruptionError(
            f"the record at key {key.hex()} fails its checksum; it was not returned. Restore a "
            "backup of the PostgreSQL database"
        )
    return stored[:-4]


#: Above every key.
ABOVE_ALL: Final = b"\xff" * (KEY_BYTES_MAX + 1)

__all__ = ["ABOVE_ALL", "PostgresSnapshot", "proved"]

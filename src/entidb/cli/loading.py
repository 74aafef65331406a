"""Rows of a file on their way into a collection: which id each gets, what is committed when, and
what is said about those that replace each other or cannot be stored. Files are read in ``rows``.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from entidb import cbor
from entidb.cli.exits import InputError
from entidb.cli.output import one_line, plural
from entidb.cli.rows import ID_FIELD, VALUE_FIELD, Row, key_text
from entidb.cli.words import key_id, parse_uuid
from entidb.db import Database
from entidb.db.columns import keep_column_order
from entidb.errors import CborEncodeError, EntiDBError

#: Payload bytes after which a transaction is committed with fewer rows: far below what one may
#: hold, and little memory.
BATCH_BYTES: Final = 4 << 20
#: Rows that are named one by one when they are left out.
NAMED_MAX: Final = 10

#: From a row to the id and the value of its entity.
IdOf = Callable[[Row], tuple[uuid.UUID, Any]]


def by_field(new_id: Callable[[], uuid.UUID], chosen: str | None) -> IdOf:
    """The id is in a field of the row, which is not part of the value. The default field may be
    missing; then the id is new."""
    name = chosen or ID_FIELD

    def id_of(row: Row) -> tuple[uuid.UUID, Any]:
        value = row[1]
        if type(value) is not dict or name not in value:
            if chosen is None:
                return new_id(), value
            raise InputError(f"it has no field {name!r}, which --id-field names")
        rest = {field: item for field, item in value.items() if field != name}
        if chosen is None and list(rest) == [VALUE_FIELD]:
            return parse_uuid(value[name]), rest[VALUE_FIELD]
        return parse_uuid(value[name]), rest

    return id_of


def by_key(collection: str) -> IdOf:
    """The id is made of the row's key: of the texts in the file, whatever becomes of them in the
    value."""

    def id_of(row: Row) -> tuple[uuid.UUID, Any]:
        parts = row[2]
        assert parts is not None, "the reader knows which fields make the key"
        return key_id(collection, parts[0] if len(parts) == 1 else key_text(parts)), row[1]

    return id_of


@dataclass
class Import:
    """Rows on their way into a collection. Counts are of committed rows; ``repeated`` of those
    that replaced another row of this import, ``bad`` of those left out."""

    open_database: Callable[[], Database]
    collection: str
    id_of: IdOf
    batch: int
    source: str
    committed: Callable[[], None]
    warn: Callable[[str], None]
    skip: int = 0
    skip_bad: bool = False
    new: int = 0
    replaced: int = 0
    unchanged: int = 0
    repeated: int = 0
    bad: int = 0
    transactions: int = 0
    #: The fields of the rows, in the order of the file.
    order: dict[str, None] = field(default_factory=dict)
    #: Rows of the file, from its beginning, that are committed or left out.
    done: int = 0
    _seen: int = 0
    _waiting: list[tuple[int, uuid.UUID, Any, bytes]] = field(default_factory=list)
    _bytes: int = 0
    _started: int = -1
    _kept: int = 0

    @cached_property
    def database(self) -> Database:
        """Opened, or made, for the first row."""
        return self.open_database()

    @property
    def rows(self) -> int:
        return self.new + self.replaced + self.unchanged

    def run(self, rows: Iterator[Row]) -> None:
        """Import all rows. Raises ``InputError`` at the first row that cannot be stored, unless bad
        ones are skipped. Every error that ends it early says how to go on."""
        try:
            for row in rows:
                self._seen += 1
                if self._seen > self.skip:
                    try:
                        self._add(row)
                    except (InputError, CborEncodeError) as error:
                        self._seen -= 1  # ``on_bad`` counts it
                        self.on_bad(InputError(f"row {row[0]}: {error}", code=error.code))
            self._commit()
        except (InputError, CborEncodeError) as error:
            raise InputError(
                f"{self.source}: {error}; {self.how_far()}", code=error.code
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped by Ctrl-C; {self.how_far()}") from None
        except SystemExit:
            self.warn(f"stopped; {self.how_far()}")
            raise
        except EntiDBError as error:
            error.args = (f"{error}; {self.how_far()}", *error.args[1:])
            raise

    def on_bad(self, error: InputError) -> None:
        """What the reader calls with what is wrong with a row."""
        self._seen += 1
        if self._seen <= self.skip:
            return
        if not self.skip_bad:
            raise error
        self.bad += 1
        if self.bad <= NAMED_MAX:
            self.warn(f"left out: {one_line(str(error))[:300]}")
        elif self.bad == NAMED_MAX + 1:
            self.warn("left out: more rows, which are only counted")

    def how_far(self) -> str:
        """What is committed, and with which option to go on behind it."""
        if not self.rows:
            return "nothing was committed"
        return f"{plural(self.rows, 'row')} before it are committed: go on with --skip {self.done}"

    def _add(self, row: Row) -> None:
        entity_id, value = self.id_of(row)
        if value is None:
            raise InputError("null cannot be an entity")
        payload = cbor.encode(value)
        if type(value) is dict and not value.keys() <= self.order.keys():
            self.order.update(dict.fromkeys(value))
        self._waiting.append((row[0], entity_id, value, payload))
        self._bytes += len(payload)
        if len(self._waiting) >= self.batch or self._bytes >= BATCH_BYTES:
            self._commit()

    def _commit(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not waiting:
            self.done = max(self._seen, self.done)
            return
        tx = None
        counts = _Counts()
        try:
            with self.database.transaction() as tx:
                if self._started < 0:
                    self._started = self.database.sequence
                counts.write(tx, self, waiting)
        finally:
            # Also when it was interrupted after the commit, which then is durable.
            if tx is not None and (tx.sequence or counts.nothing):
                self._count(counts, bool(tx.sequence))
        if len(self.order) > self._kept:
            self._kept = len(self.order)
            keep_column_order(self.database, self.collection, list(self.order))
        self.committed()

    def _count(self, counts: _Counts, written: bool) -> None:
        if self.repeated == 0 and counts.first is not None:
            self.warn(
                f"row {counts.first} has the id of an earlier row of this file, and replaces it"
            )
        self.new += counts.new
        self.replaced += counts.replaced
        self.unchanged += counts.unchanged
        self.repeated += counts.repeated
        self.transactions += written
        self.done = self._seen

    def written_by_us(self, ids: list[uuid.UUID]) -> set[uuid.UUID]:
        """Which of ``ids`` this import has written before."""
        with self.database.view() as view:
            info = view.catalogue.by_name.get(self.collection)
            rows = {i: None if info is None else view.entity((info.number, i.bytes)) for i in ids}
        return {i for i, row in rows.items() if row is not None and row.sequence > self._started}

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.rows,
            "new": self.new,
            "replaced": self.replaced,
            "unchanged": self.unchanged,
            "repeated": self.repeated,
            "bad": self.bad,
            "transactions": self.transactions,
        }

    def summary(self) -> str:
        left_out = f", {self.bad:,} left out" if self.bad else ""
        return (
            f"imported {plural(self.rows, 'row')} into {self.collection}: {self.new:,} new, "
            f"{self.replaced:,} replaced, {self.unchanged:,} unchanged{left_out}, "
            f"in {plural(self.transactions, 'transaction')}"
        )

    def warn_of_repeated(self) -> None:
        """One line if rows of the file replaced each other: mostly a key that is none."""
        if self.repeated:
            self.warn(
                f"{plural(self.repeated, 'row')} replaced an earlier row of the same file, because "
                "they have the same id: is the key the right one?"
            )

    def warn_of_too_short(self) -> None:
        """One line where nothing was left to import behind ``skip``."""
        if 0 < self.skip >= self._seen:
            self.warn(
                f"{self.source} has {plural(self._seen, 'row')}, and --skip {self.skip} leaves out "
                "all of them"
            )


@dataclass
class _Counts:
    """What one transaction does."""

    new: int = 0
    replaced: int = 0
    unchanged: int = 0
    repeated: int = 0
    first: int | None = None
    nothing: bool = False

    def write(self, tx: Any, job: Import, waiting: list[tuple[int, uuid.UUID, Any, bytes]]) -> None:
        collection = tx.collection(job.collection)
        there = collection.get_many({entity_id for _, entity_id, _, _ in waiting})
        known = {entity_id: cbor.encode(value) for entity_id, value in there.items()}
        changed = [i for _, i, _, payload in waiting if known.get(i, payload) != payload]
        ours = job.written_by_us(changed) if changed else set()
        for place, entity_id, value, payload in waiting:
            before = known.get(entity_id)
            if before == payload:
                self.unchanged += 1
                ours.add(entity_id)
                continue
            if before is not None and entity_id in ours:
                self.repeated += 1
                self.first = place if self.first is None else self.first
            self.replaced += before is not None
            self.new += before is None
            collection[entity_id] = value
            known[entity_id] = payload
            ours.add(entity_id)
        self.nothing = self.new == self.replaced == 0

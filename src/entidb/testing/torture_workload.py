"""What the clients of a torture run write, and how a reader recognises that it is whole.

Every transaction gets a tag of its own, writes it into each row it touches, and adds one *sum*: an
entity that no client writes again, which lists the rows with the tags that they had before. So a
reader who sees a row of a transaction must see its sum, and a reader who sees its sum must not see
a tag that the transaction replaced. Rows are few and shared by all clients, so transactions meet.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from entidb import cbor
from entidb.db import Database, Role, Snapshot
from entidb.db.records import decode_entity
from entidb.db.writer import Writer

#: Collections of rows are named for the policy their conflicts are decided by.
ROWS: Final = ("server_wins", "client_wins", "last_write_wins", "manual")
SUMS: Final = "sums"
ROWS_PER_COLLECTION: Final = 40
_NAMESPACE: Final = uuid.UUID("6f6e2d1c-64a6-4b0c-9d5e-0a6c3a6f5b11")
_PAD_BYTES_MAX: Final = 60_000


def row_id(name: str, number: int) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, f"{name}/{number}")


@dataclass(frozen=True)
class Written:
    """One transaction, as the ledger knows it: hexadecimal ids of itself and of its sum."""

    transaction: str
    sum: str


def write_one(
    database: Database,
    source: random.Random,
    begun: Callable[[Written], None],
    names: tuple[str, ...] = ROWS,
) -> Written:
    """Commit one random transaction with rows of ``names``; ``begun`` is called with it before the
    commit."""
    sum_id = database.new_id()
    with database.transaction() as tx:
        written = Written(tx.transaction_id.hex(), sum_id.hex)
        before: dict[str, str] = {}
        deleted: list[str] = []
        for name, number in _choose(source, names):
            collection, entity_id = tx.collection(name), row_id(name, number)
            old = collection.get(entity_id)
            place = f"{name}/{entity_id.hex}"
            before[place] = old["tag"] if old is not None else ""
            if old is not None and source.random() < 0.15:
                del collection[entity_id]
                deleted.append(place)
            else:
                collection[entity_id] = _row(written, source)
        tx.collection(SUMS)[sum_id] = {
            "tag": written.transaction,
            "before": before,
            "deleted": deleted,
        }
        begun(written)
    return written


def _choose(source: random.Random, all_names: tuple[str, ...]) -> list[tuple[str, int]]:
    # Mostly one policy, so that not every transaction has a collection that withdraws it.
    names = all_names if source.random() < 0.2 else (source.choice(all_names),)
    return list(
        {
            (source.choice(names), source.randrange(ROWS_PER_COLLECTION))
            for _ in range(source.randrange(1, 6))
        }
    )


def _row(written: Written, source: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {"tag": written.transaction, "sum": written.sum}
    if source.random() < 0.03:
        row["pad"] = source.randbytes(source.randrange(_PAD_BYTES_MAX))
    return row


def parts_seen(snapshot: Snapshot) -> Iterator[str]:
    """One line for each transaction of which this snapshot shows a part only (WHOLE)."""
    sums = snapshot.collection(SUMS)
    tags = {
        f"{name}/{entity_id.hex}": row
        for name in ROWS
        for entity_id, row in snapshot.collection(name).items()
    }
    for place, row in tags.items():
        entry: Any = sums.get(uuid.UUID(row["sum"]))
        if entry is None:
            yield f"{place} is of transaction {row['tag']}, whose sum is missing"
            continue
        if place not in entry["before"]:
            yield f"{place} is of transaction {row['tag']}, which did not write it"
        for other, before in entry["before"].items():
            if before and other in tags and tags[other]["tag"] == before:
                yield f"transaction {row['tag']} is seen at {place} and not at {other}"


def parts_stored(database: Database) -> Iterator[str]:
    """As ``parts_seen``, on a server or on a device in step with it, by versions: everything a
    transaction wrote has its version or was written again later. Not what it deleted: that is
    dropped as done if the server has deleted it first (R24)."""
    # A device does not keep the deletion of what it never had.
    missing = "has never been written" if database.role is Role.SERVER else None
    with database.view() as view:
        infos = view.catalogue.by_name
        if SUMS not in infos:
            return
        for entity_id, entry in database.collection(SUMS).items():
            version = _version(view, SUMS, entity_id)
            for place in set(entry["before"]).difference(entry["deleted"]):
                name, _, raw = place.partition("/")
                fault = _fault(view, name, uuid.UUID(raw), version, entry["tag"], missing)
                if fault is not None:
                    yield f"transaction {entry['tag']} (version {version}): {place} {fault}"


def _fault(
    view: Writer, name: str, entity_id: uuid.UUID, version: int, tag: str, missing: str | None
) -> str | None:
    raw = view.snapshot.get(view.catalogue.by_name[name].prefix + entity_id.bytes)
    if raw is None:
        return missing
    row = decode_entity(raw)
    if row.version < version:
        return f"is still at version {row.version}"
    stored = None if row.payload is None else cbor.decode_trusted(row.payload)
    if row.version == version and (stored is None or stored["tag"] != tag):
        return "has the version and not the tag"
    return None


def _version(view: Writer, name: str, entity_id: uuid.UUID) -> int:
    raw = view.snapshot.get(view.catalogue.by_name[name].prefix + entity_id.bytes)
    return 0 if raw is None else decode_entity(raw).version

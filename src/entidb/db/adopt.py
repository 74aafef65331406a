"""Making entities pending that are already there: when a scope widens (R31), and when a reset keeps
the device's side (R29). Bounded commits, resumable; the ``m adopt`` record says how far they are.

First the entities are indexed by the commit that wrote them, so that what was one transaction is
committed as one again; then group after group is committed like a local transaction.
"""

from __future__ import annotations

from msgspec.structs import replace

from entidb import cbor
from entidb.db import machine, overruled
from entidb.db.core import Core
from entidb.db.fields import Side
from entidb.db.local import Writes
from entidb.db.records import (
    ADOPT,
    META_ADOPT,
    NO_ID,
    EntityRow,
    adopt_key,
    decode_entity,
    end_of,
    split_feed_key,
    table_prefix,
)
from entidb.db.replica import Adopt, decode_record, encode_record
from entidb.db.writer import Ref, Writer
from entidb.types import OPERATION_OVERHEAD_BYTES, TRANSACTION_CONTAINERS_MAX

INDEX_ROWS = 10_000
COMMIT_ROWS = 2_000


def schedule_adoption(writer: Writer, sources: list[list[int]], *, compare: bool) -> None:
    """Adopt the entities of ``sources`` (collection number, table). With ``compare`` only those
    that are newer than what is in the collection now, or missing there."""
    raw = writer.get(META_ADOPT)
    # A scheduled adoption that is not done yet keeps its own ``compare``, and a collection may be
    # in both.
    before = None if raw is None else decode_record(Adopt, raw)
    standing = [] if before is None else _sources(before)
    new = [[number, table, int(compare)] for number, table in sources]
    every = sorted(standing + new, key=lambda source: source[1])
    writer.put(META_ADOPT, encode_record(machine.SCHEDULE(before, Adopt(every, b"", False))))


def _sources(adopt: Adopt) -> list[list[int]]:
    """(collection number, table, whether to compare), by table: the order of the keys in them."""
    return [[*source, int(adopt.compare)][:3] for source in adopt.sources]


def adopt_step(database: Core, *, keeps: bool = True, rows: int = COMMIT_ROWS) -> bool:
    """One bounded commit of the adoption, of about ``rows`` entities; whether there may be more to
    do. With ``keeps``, what the server has where this device's side is committed again is kept as
    overruled (R4)."""
    with database.write("local") as writer:
        raw = writer.get(META_ADOPT)
        if raw is None:
            return False
        adopt = decode_record(Adopt, raw)
        if not adopt.indexed:
            indexed = machine.INDEX(adopt, _index(writer, adopt))
            writer.put(META_ADOPT, encode_record(indexed))
            return True
        if _commit_groups(database, writer, adopt, keeps, rows):
            return True
        machine.ADOPTED(adopt, None)
        writer.delete(META_ADOPT)
        return False


def _index(writer: Writer, adopt: Adopt) -> Adopt:
    budget = INDEX_ROWS
    for number, table, compare in _sources(adopt):
        prefix = table_prefix(table)
        if adopt.after >= end_of(prefix):
            continue
        start = max(prefix, adopt.after + b"\0" if adopt.after else prefix)
        rows = writer.snapshot.scan(start, end_of(prefix), limit=budget)
        for key, raw in rows:
            row = decode_entity(raw)
            if not row.pending and (compare or row.payload is not None):
                group = row.version if compare else row.sequence
                writer.put(adopt_key(group, number, key[5:]), b"")
        budget -= len(rows)
        if budget <= 0:
            return replace(adopt, after=rows[-1][0])
    return replace(adopt, indexed=True)


def _commit_groups(database: Core, writer: Writer, adopt: Adopt, keeps: bool, rows: int) -> bool:
    keys = writer.snapshot.scan_keys(ADOPT, end_of(ADOPT), limit=rows)
    if not keys:
        return False
    if len(keys) == rows:
        keys = _whole_groups(writer, keys)
    sources: dict[int, list[tuple[int, bool]]] = {}
    for number, table, compare in _sources(adopt):
        sources.setdefault(number, []).append((table, bool(compare)))
    group, room = -1, _Room(database.transaction_bytes_max)
    writes: Writes = {}
    keeper = overruled.OverruledKeeper(writer, writer.now_ms)
    for key in keys:
        at, number, entity_id = split_feed_key(key)
        writer.delete(key)
        found = (
            _wanted(writer, table, number, entity_id, compare) for table, compare in sources[number]
        )
        row = next((row for row in found if row is not None), None)
        now = writer.entity((number, entity_id))
        if row is None:
            if keeps and now is not None:
                compared = [table for table, compare in sources[number] if compare]
                _keep_own(writer, keeper, (number, entity_id), now, compared)
            continue
        if keeps and now is not None and now.payload != row.payload:
            _overrule(keeper, (number, entity_id), now, row)
        if at != group or not room.add(row.payload):
            database.commit_writes(writer, writes)
            writes, group, room = {}, at, _Room(database.transaction_bytes_max)
            room.add(row.payload)
        writes.setdefault(writer.catalogue.by_number[number].name, {})[entity_id] = row.payload
    database.commit_writes(writer, writes)
    keeper.store()
    return True


def _overrule(keeper: overruled.OverruledKeeper, ref: Ref, now: EntityRow, row: EntityRow) -> None:
    """What the server has, ``now``, loses to ``row``. Their common base is unknown."""
    theirs = now.device_id, now.timestamp, now.version
    mine = row.device_id, row.timestamp, 0
    lost = (Side.REMOTE, (), now.payload, row.payload, None)
    keeper.add(ref, mine, theirs, NO_ID, [lost], overruled.BY_RESET)


def _keep_own(
    writer: Writer, keeper: overruled.OverruledKeeper, ref: Ref, now: EntityRow, tables: list[int]
) -> None:
    """What this device wrote in the history before, and the server does not have, although what it
    has counts as newer: versions of two histories say which is larger, and not that one of them was
    built on the other. Of other devices' writes, theirs keep what is lost."""
    if now.pending:
        return
    for table in tables:
        row = writer.entity_in(table, ref[1])
        if row is None or row.pending or row.device_id != writer.device_id:
            continue
        if row.payload != now.payload:
            theirs = now.device_id, now.timestamp, now.version
            mine = row.device_id, row.timestamp, 0
            lost = (Side.LOCAL, (), row.payload, now.payload, None)
            keeper.add(ref, mine, theirs, NO_ID, [lost], overruled.BY_RESET)


def _whole_groups(writer: Writer, keys: list[bytes]) -> list[bytes]:
    """``keys`` cut between groups; a group larger than the page is completed instead."""
    last = split_feed_key(keys[-1])[0]
    cut = [key for key in keys if split_feed_key(key)[0] != last]
    if cut:
        return cut
    while further := writer.snapshot.scan_keys(keys[-1] + b"\0", end_of(ADOPT), limit=1):
        if split_feed_key(further[0])[0] != last:
            break
        keys += further
    return keys


def _wanted(
    writer: Writer, table: int, number: int, entity_id: bytes, compare: bool
) -> EntityRow | None:
    row = writer.entity_in(table, entity_id)
    if row is None or row.pending:
        return None
    if not compare:
        # Written again since it was indexed: then it is pending already or came from the server.
        return row if row.version == 0 and row.payload is not None else None
    now = writer.entity((number, entity_id))
    if now is None:
        return row if row.payload is not None else None
    if now.pending or now.version >= row.version or now.payload == row.payload:
        return None
    return row


class _Room:
    """What one transaction may still hold (``check_size``)."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._size = 0
        self._payloads: list[bytes] = []
        #: Arrays and maps in all payloads; an upper bound of them while they have not been counted.
        self._containers = 0
        self._counted = False

    def add(self, payload: bytes | None) -> bool:
        """False if there is no room for one more write, which is not added then."""
        value = payload or b""
        size = self._size + OPERATION_OVERHEAD_BYTES + len(value)
        containers = self._containers + (
            cbor.containers_in(value) if self._counted else cbor.containers_at_most(value)
        )
        if containers > TRANSACTION_CONTAINERS_MAX and not self._counted:
            self._counted = True
            self._containers = sum(map(cbor.containers_in, self._payloads))
            self._payloads.clear()
            containers = self._containers + cbor.containers_in(value)
        if size > self._bytes_max or containers > TRANSACTION_CONTAINERS_MAX:
            return False
        if not self._counted:
            self._payloads.append(value)
        self._size, self._containers = size, containers
        return True

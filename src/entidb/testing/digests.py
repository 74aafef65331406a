"""DIGESTS: a quiet device and its server agree by their digests, and what is damaged is found.

The comparison is the real one (R34), driven here against the server's database. Damage is done to
a copy of the device, with pending work on top.
"""

from __future__ import annotations

import random
import uuid
from typing import Any, Final, Protocol

from msgspec.structs import replace

from entidb import cbor
from entidb.db import Database
from entidb.db.catalogue import CollectionInfo
from entidb.db.records import BaseRow, EntityRow, decode_entity, end_of
from entidb.db.verifying import verify
from entidb.db.writer import Writer
from entidb.protocol import (
    LIMITS,
    DigestRequest,
    DigestResponse,
    decode,
    encode,
)
from entidb.server.digesting import digested
from entidb.server.hooks import Grant
from entidb.server.service import DatabaseService
from entidb.storage import MemoryStorage
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.comparing import Comparing, Verification
from entidb.sync.config import SyncConfig
from entidb.sync.exchange import Connection, Exchange
from entidb.testing.invariants import Checks

_POLICIES: Final = ("server_wins", "client_wins", "merge", "manual")


class Subject(Protocol):
    """What of a device is compared."""

    name: str
    config: SyncConfig
    granted: tuple[str, ...] | None
    applier: Any
    clock: Any
    storage: Any
    tenant: Any
    world: Any


def check_digests(device: Subject, rng: random.Random) -> None:
    """Nothing differs; and what is damaged in a copy of the device is found and put right, with
    nothing pending lost."""
    checks = device.world.checks
    found = _compare(device, device.applier, repair=False)
    says = [str(difference) for difference in found.differences[:3]]
    checks.that(found.agrees, "DIGESTS", f"{device.name} and its server differ by digest: {says}")
    storage = MemoryStorage()
    storage.commit(dict(device.storage.records))
    copy = Database(storage, clock=device.clock, entropy=rng.randbytes)
    try:
        _check_repair(device, copy, rng, checks)
    finally:
        copy.close()


def _check_repair(device: Subject, copy: Database, rng: random.Random, checks: Checks) -> None:
    applier = DatabaseApplier(copy, default_policy=rng.choice(_POLICIES))
    with copy.view() as view:
        there = _clean_entities(view)
    if not there:
        return
    chosen = rng.sample(there, min(3, len(there)))
    info, entity_id, _ = chosen[0]
    with copy.transaction() as tx:
        tx.collection(info.name)[uuid.UUID(bytes=entity_id)] = {"written": "beside the damage"}
        tx.commit()
    found = _compare(device, applier, repair=False)
    checks.that(found.agrees, "DIGESTS", f"{device.name} differs for what is pending")
    pending = {transaction.transaction_id for transaction in applier.pending()}
    with copy.write() as writer:
        for place in chosen:
            _damage(writer, place, rng)
    expected = {(info.name, entity_id) for info, entity_id, _ in chosen}
    repaired = _compare(device, applier, repair=True)
    named = {(it.collection, it.id_bytes) for it in repaired.differences}
    checks.that(named == expected, "DIGESTS", f"{named} was found to differ, and not {expected}")
    again = _compare(device, applier, repair=False)
    checks.that(again.agrees, "DIGESTS", f"{device.name} still differs after its repair")
    faults = verify(copy)
    checks.that(not faults, "DIGESTS", f"the repair of {device.name} leaves faults: {faults[:3]}")
    kept = {transaction.transaction_id for transaction in applier.pending()}
    kept |= {lost.transaction_id for lost in applier.discarded()}
    checks.that(pending <= kept, "DIGESTS", f"the repair of {device.name} lost what was pending")


def _compare(device: Subject, applier: DatabaseApplier, *, repair: bool) -> Verification:
    """One comparison, with messages as they are on the wire and nothing lost on the way."""
    tenant = device.tenant
    service = DatabaseService(tenant.database, db_id=tenant.db_id, limits=LIMITS)
    granted = None if device.granted is None else frozenset(device.granted)
    grant = Grant("the simulator", True, True, granted)
    connection = Connection(features=["digest"])
    exchange = Exchange(applier, device.config, connection, _nothing, _nothing, lambda: None)
    comparing = Comparing(applier, repair=repair)
    course, answer = comparing.run(exchange), None
    while True:
        try:
            step: Any = course.send(answer)
        except StopIteration:
            return comparing.result
        request = decode(DigestRequest, encode(step))
        answer = decode(DigestResponse, encode(digested(service, request, grant)))


def _nothing(_: object) -> None:
    return None


_Place = tuple[CollectionInfo, bytes, EntityRow]


def _clean_entities(view: Writer) -> list[_Place]:
    state = view.sync_state
    found = []
    for info in view.catalogue.by_name.values():
        if not info.synced or not state.grants(info.name):
            continue
        for key, raw in view.snapshot.scan(info.prefix, end_of(info.prefix), limit=50):
            row = decode_entity(raw)
            if row.payload is not None and not row.pending:
                found.append((info, key[-16:], row))
    return found


def _damage(writer: Writer, place: _Place, rng: random.Random) -> None:
    """Something else than the server has, as a bug of an older program might have left it."""
    info, entity_id, _ = place
    ref = info.number, entity_id
    row = writer.entity(ref)
    assert row is not None, "it was there a moment ago"
    other = cbor.encode({"damaged": rng.randrange(1 << 30)})
    if row.pending:
        base = writer.base(ref, row)
        writer.set_base(ref, row, BaseRow(base.version, base.device_id, base.timestamp, other))
    elif rng.random() < 0.3:
        writer.remove_entity(ref, row)
    elif rng.random() < 0.5:
        writer.put_entity(ref, replace(row, version=max(0, row.version - 1)), row)
    else:
        writer.show(ref, replace(row, payload=other), row, writer.next_sequence())


__all__ = ["check_digests"]

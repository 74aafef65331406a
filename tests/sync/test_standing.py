"""How an entity stands with the server: as data, and in words."""

from __future__ import annotations

import asyncio

import pytest

from entidb import AsyncSyncEngine, Database, SyncConfig
from entidb.errors import TransportError
from entidb.protocol import SyncRequest
from entidb.server import Grant
from entidb.sync import MockTransport
from entidb.sync.standing import EntityState
from tests.support import World, uid


def test_an_entity_is_absent_pending_and_then_synced():
    world = World()
    a = world.device()
    world.put(("notes", 9, "before"))
    assert a.engine.entity_status("notes", uid(1)).state is EntityState.ABSENT
    a.put(("notes", 5, "first"))
    a.put(("notes", 1, "x"))
    a.put(("notes", 1, "y"))
    status = a.engine.entity_status("notes", uid(1))
    assert (status.state, status.version, status.ahead) == (EntityState.PENDING, 0, 1)
    assert status.sequences == [a.db.sequence - 1, a.db.sequence]
    assert status.changed_by == a.engine.applier.device_id
    assert "2 commits wait for the server; another is pushed before it." in a.engine.explain(
        "notes", uid(1)
    )
    a.sync()
    status = a.engine.entity_status("notes", uid(1))
    assert (status.state, status.version, status.sequences) == (EntityState.SYNCED, 4, [])
    assert "as the server had it in commit 4" in status.explain()


def test_a_deletion_that_waits_is_pending_too():
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.sync()
    a.put(("notes", 1, None))
    assert a.engine.entity_status("notes", uid(1)).state is EntityState.PENDING
    a.sync()
    assert a.engine.entity_status("notes", uid(1)).state is EntityState.ABSENT


def test_a_conflict_holds_it_and_what_was_changed_together_with_it():
    world = World()
    a, b = world.device(default_policy="manual"), world.device()
    b.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"), ("notes", 2, "together"))
    b.sync()
    a.sync()
    own, other = (a.engine.entity_status("notes", uid(n)) for n in (1, 2))
    assert own.state is other.state is EntityState.HELD
    assert own.conflict == a.engine.conflicts()[0] and other.conflict is None
    assert "resolve() decides" in own.explain()
    assert "together with something that is in conflict" in other.explain()


def test_what_stays_here_or_is_not_granted_says_so():
    world = World()
    a = world.device()
    a.db.declare_local("drafts")
    a.put(("drafts", 1, "mine alone"))
    assert a.engine.entity_status("drafts", uid(1)).state is EntityState.LOCAL
    assert "stays on this device" in a.engine.explain("drafts", uid(1))
    a.wire.grant = Grant("ada", read=True, write=True, collections=frozenset({"notes"}))
    a.sync()
    status = a.engine.entity_status("bills", uid(1))
    assert (status.state, status.granted) == (EntityState.OUTSIDE, False)
    assert "is not granted by the token" in status.explain()
    narrow = world.device(collections=["notes"])
    status = narrow.engine.entity_status("bills", uid(1))
    assert (status.state, status.granted) == (EntityState.OUTSIDE, True)
    assert "is not in the scope" in status.explain()


def test_the_words_name_the_last_error():
    a = World().device()

    def lost(request: SyncRequest) -> None:
        raise TransportError("the network is away")

    a.wire.before = lost
    a.put(("notes", 1, "x"))
    with pytest.raises(TransportError):
        a.sync()
    said = a.engine.explain("notes", uid(1))
    assert "1 commit waits for the server; the last sync failed: the network is away." in said


def test_in_asyncio_it_is_the_same():
    async def main() -> None:
        with Database.in_memory() as db:
            made = db.collection("notes").add("x")
            config = SyncConfig(db_id="shop")
            async with AsyncSyncEngine(config, MockTransport([]), db) as engine:
                assert (await engine.entity_status("notes", made)).state is EntityState.PENDING
                assert "1 commit waits" in await engine.explain("notes", made)

    asyncio.run(main())

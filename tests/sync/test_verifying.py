"""A device compared with its server by digests (R34), and put right where it differs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import convert, to_builtins
from msgspec.structs import replace

from entidb import AsyncSyncEngine, RetryConfig, SyncConfig, SyncEngine, cbor
from entidb.db.records import BaseRow
from entidb.errors import (
    PermissionDeniedError,
    ProtocolError,
    SyncStateError,
    VersionMismatchError,
)
from entidb.protocol import (
    DigestRequest,
    DigestResponse,
    DigestState,
    HandshakeResponse,
    decode,
    encode,
)
from entidb.server import SyncServer, digesting
from entidb.server.hooks import Grant
from entidb.sync import HttpTransport
from entidb.sync.transport import HttpResponse
from tests.sync.test_rounds import Device, Line

ALL = Grant("tester", True, True)


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with SyncServer.in_memory(access_log=False) as made:
        yield made


def filled(server: SyncServer, count: int, **config: Any) -> Device:
    """A device that has what the server has: notes, and one thing in another collection."""
    with server.database("shop").transaction() as tx:
        for number in range(count):
            tx.collection("notes").add({"n": number})
        tx.collection("other").add({"only": "one"})
    return Device(server, **config)


def spoil(device: Device, entity_id: uuid.UUID, value: bytes | None = b"\x01") -> None:
    """Of this entity the device knows something else than the server has; None: nothing at all."""
    with device.database.write() as writer:
        ref = writer.collection("notes").number, entity_id.bytes
        row = writer.entity(ref)
        assert row is not None
        if value is None:
            writer.remove_entity(ref, row)
        elif row.pending:
            base = writer.base(ref, row)
            writer.set_base(ref, row, BaseRow(base.version, base.device_id, base.timestamp, value))
        else:
            writer.show(ref, replace(row, payload=value), row, writer.next_sequence())


def some(device: Device, count: int = 1) -> list[uuid.UUID]:
    return sorted(device.notes)[:count]


def kinds(found: Any) -> set[tuple[str, uuid.UUID]]:
    return {(each.kind, each.id) for each in found.differences}


def test_a_device_that_has_what_its_server_has_agrees(server: SyncServer) -> None:
    device = filled(server, 20)
    found = device.engine.verify_with_server()
    assert (found.agrees, found.entities, found.collections) == (True, 21, 2)
    assert found.cursor == server.database("shop").read_head().sequence


def test_what_is_other_missing_or_too_much_is_named_and_nothing_is_changed(
    server: SyncServer,
) -> None:
    device = filled(server, 20)
    other, missing, extra = some(device, 3)
    with device.database.view() as view:
        row = view.entity((view.catalogue.by_name["notes"].number, extra.bytes))
    assert row is not None
    spoil(device, other)
    spoil(device, missing, None)
    beside = uuid.UUID(int=7)
    with device.database.write() as writer:
        number = writer.collection("notes").number
        writer.show((number, beside.bytes), row, None, writer.next_sequence())
    before = device.values()
    found = device.engine.verify_with_server()
    assert kinds(found) == {("other", other), ("missing", missing), ("extra", beside)}
    assert not found.agrees and found.repaired == 0
    assert device.values() == before
    said = " ".join(str(each) for each in found.differences)
    assert all(str(each) in said for each in (other, missing, beside))


def test_a_repair_makes_them_what_the_server_has(server: SyncServer) -> None:
    device = filled(server, 20)
    other, missing = some(device, 2)
    values = device.values()
    spoil(device, other)
    spoil(device, missing, None)
    assert device.values() != values
    assert device.engine.verify_with_server(repair=True).repaired == 2
    assert device.values() == values
    assert device.engine.verify_with_server().agrees
    assert device.database.verify() == []


def test_readers_hear_of_a_repair(server: SyncServer) -> None:
    device = filled(server, 3)
    [entity_id] = some(device)
    spoil(device, entity_id)
    heard: list[Any] = []
    device.database.observe(heard.append)
    device.engine.verify_with_server(repair=True)
    assert heard


def test_what_is_pending_counts_with_its_base_and_stays_on_top_of_a_repaired_one(
    server: SyncServer,
) -> None:
    device = filled(server, 5, default_policy="client_wins")
    first, second = some(device, 2)
    now = server.database("shop").collection("notes")[first]

    # Between the end of the cycle and the comparison a program writes: nothing differs for that.
    def write(*_: object) -> None:
        if device.engine.status().pending == 0:
            device.notes[first] = {"mine": True}
            spoil(device, first)
            spoil(device, second)

    device.engine.on_state(lambda old, new: write() if new.value == "synced" else None)
    found = device.engine.verify_with_server(repair=True)
    assert kinds(found) == {("other", first), ("other", second)}
    assert (found.repaired, device.engine.status().pending) == (2, 1)
    assert device.notes[first] == {"mine": True}
    with device.database.view() as view:
        info = view.catalogue.by_name["notes"]
        row = view.entity((info.number, first.bytes))
        assert row is not None and row.pending
        base = view.base((info.number, first.bytes), row)
    assert base.payload == cbor.encode(now)
    assert device.database.verify() == []


def test_a_policy_that_prefers_the_server_keeps_the_pending_work_in_discarded(
    server: SyncServer,
) -> None:
    device = filled(server, 5)
    [entity_id] = some(device)

    def write() -> None:
        if device.engine.status().pending == 0:
            device.notes[entity_id] = {"mine": True}
            spoil(device, entity_id)

    device.engine.on_state(lambda old, new: write() if new.value == "synced" else None)
    found = device.engine.verify_with_server(repair=True)
    assert (found.repaired, found.withdrawn) == (1, 1)
    [lost] = device.engine.discarded()
    assert "mine" in str(lost.operations)


def test_one_of_very_many_is_found_with_few_bytes_and_few_requests(server: SyncServer) -> None:
    device = filled(server, 30_000)
    wanted = some(device, 20_001)[-1]
    spoil(device, wanted)
    sizes: list[int] = []
    device.line.hook = lambda path, answer: noted(answer())

    def noted(answer: HttpResponse) -> HttpResponse:
        sizes.append(len(answer.body))
        return answer

    found = device.engine.verify_with_server()
    assert kinds(found) == {("other", wanted)}
    assert sum(sizes) < 60_000 and len(sizes) < 10


def test_a_request_reads_a_bounded_number_of_rows_and_goes_on(
    server: SyncServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = filled(server, 40)
    spoil(device, some(device, 35)[-1])
    monkeypatch.setattr(digesting, "ROWS_MAX", 3)
    found = device.engine.verify_with_server()
    assert len(found.differences) == 1 and found.requests > 13
    monkeypatch.setattr(digesting, "ROWS_MAX", 1000)
    monkeypatch.setattr(digesting, "BYTES_MAX", 1)
    assert device.engine.verify_with_server().differences == found.differences
    monkeypatch.setattr(digesting, "PAGE_BYTES_MAX", 1)
    for entity_id in some(device, 5):
        spoil(device, entity_id)
    assert device.engine.verify_with_server(repair=True).repaired == 6
    assert device.engine.verify_with_server().agrees


def test_what_others_write_meanwhile_is_no_difference(server: SyncServer) -> None:
    device = filled(server, 20)
    written, gone, wrong = some(device, 3)
    spoil(device, wrong)

    def late(path: str, answer: Any) -> HttpResponse:
        if path == "/v1/digest":
            with server.database("shop").transaction() as tx:
                tx.collection("notes")[written] = {"n": "newer"}
                tx.collection("notes").discard(gone)
                tx.collection("notes").add({"n": "new"})
        response: HttpResponse = answer()
        return response

    device.line.hook = late
    assert kinds(device.engine.verify_with_server(repair=True)) == {("other", wrong)}
    device.line.hook = lambda path, answer: answer()
    assert device.engine.verify_with_server().agrees


def test_it_compares_only_what_is_in_scope_and_granted(server: SyncServer) -> None:
    filled(server, 3)
    assert Device(server, collections=("other",)).engine.verify_with_server().entities == 1
    request = DigestRequest(
        db_id="shop",
        device_id=b"d" * 16,
        history=server.database("shop").history or b"",
        cursor=1,
    )
    with server.stores.using("shop", create=False) as store:
        narrow = Grant("tester", True, True, frozenset(["other"]))
        assert digesting.digested(store.service, request, narrow).collections == ["other"]
        with pytest.raises(PermissionDeniedError, match="notes"):
            digesting.digested(store.service, replace(request, collection="notes"), narrow)
        blind = Grant("tester", False, True)
        with pytest.raises(PermissionDeniedError):
            digesting.digested(store.service, request, blind)
        asked = replace(request, collection="nobody's")
        [block] = digesting.digested(store.service, asked, ALL).blocks
        assert (block.last, block.count) == (b"\xff" * 16, 0)


def test_a_server_that_does_not_know_how_is_named_and_the_device_stays(
    server: SyncServer,
) -> None:
    device = filled(server, 3)

    def older(path: str, answer: Any) -> HttpResponse:
        response: HttpResponse = answer()
        if path == "/v1/handshake":
            said = decode(HandshakeResponse, response.body)
            body = encode(replace(said, features=[f for f in said.features if f != "digest"]))
            return HttpResponse(200, response.headers, body)
        return response

    settings = SyncConfig(db_id="shop", retry=RetryConfig.none(), compression="none")
    device.engine.close()
    line = Line(server)
    line.hook = older
    transport = HttpTransport("http://localhost", client=line, config=settings)
    with SyncEngine(settings, transport, device.database) as engine:
        with pytest.raises(VersionMismatchError, match="Update the server"):
            engine.verify_with_server()
        engine.sync()


@pytest.mark.parametrize(
    "lie",
    [
        {"blocks": []},
        {"more": True},
        {"blocks": [[b"\x05" * 16, 1, bytes(16)]]},
    ],
    ids=["nothing", "more after the end", "too short"],
)
def test_digests_that_cannot_be_true_are_not_believed(
    server: SyncServer, lie: dict[str, Any]
) -> None:
    device = filled(server, 3)

    def lying(path: str, answer: Any) -> HttpResponse:
        response: HttpResponse = answer()
        if path == "/v1/digest" and decode(DigestResponse, response.body).blocks:
            said = to_builtins(decode(DigestResponse, response.body), builtin_types=(bytes,)) | lie
            body = encode(convert(said, DigestResponse, builtin_types=(bytes,)))
            return HttpResponse(200, response.headers, body)
        return response

    device.line.hook = lying
    with pytest.raises(ProtocolError):
        device.engine.verify_with_server()


def test_a_state_that_was_not_asked_for_repairs_nothing(server: SyncServer) -> None:
    device = filled(server, 3)
    [entity_id] = some(device)
    request = DigestRequest(
        db_id="shop",
        device_id=b"d" * 16,
        history=server.database("shop").history or b"",
        cursor=1,
        collection="notes",
        ids=[entity_id.bytes],
    )
    values = device.values()
    for state in (
        DigestState(b"x" * 16, 1, bytes(16), 0, b"\x01"),
        DigestState(entity_id.bytes, 9, bytes(16), 0, b"\x01"),
        DigestState(entity_id.bytes, 1, bytes(16), 0, b"\xff"),
    ):
        with pytest.raises(ProtocolError):
            device.engine.applier.repair(request, DigestResponse(head=1, states=[state]))
    right = DigestState(entity_id.bytes, 1, bytes(16), 0, b"\x01")
    with pytest.raises(SyncStateError):
        device.engine.applier.repair(
            replace(request, cursor=7), DigestResponse(head=7, states=[right])
        )
    assert device.values() == values


def test_the_engine_of_asyncio_compares_too(server: SyncServer) -> None:
    device = filled(server, 3)
    spoil(device, some(device)[0])
    device.engine.close()

    async def compare() -> int:
        settings = SyncConfig(db_id="shop", retry=RetryConfig.none(), compression="none")
        transport = HttpTransport("http://localhost", client=Line(server), config=settings)
        async with AsyncSyncEngine(settings, transport, device.database) as engine:
            return (await engine.verify_with_server(repair=True)).repaired

    assert asyncio.run(compare()) == 1

"""A server's files that were put back by hand, and the devices that prove it (R29)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import Database, SyncConfig, SyncEngine
from entidb.db import Role
from entidb.db.records import META_IDENTITY
from entidb.db.replica import ReplicaState
from entidb.errors import HistoryChangedError, PermissionDeniedError, TransportError
from entidb.protocol import (
    HandshakeRequest,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    RoundRequest,
)
from entidb.server import ServerConfig, SyncServer
from entidb.server.hooks import Grant
from entidb.server.proofs import HISTORIES_MAX, HISTORIES_WITHIN_MS, Proofs
from entidb.sync import HttpTransport, LoopbackClient
from entidb.sync.apply.position import seen_in
from entidb.types import SeenCommit, Term
from tests.server.test_service import DEVICE, op, request, tx
from tests.support import GRANT, Device, World, assert_in_step, uid

LIMITED = Grant("limited", True, True, frozenset(["notes"]))
READER = Grant("reader", True, False)
WRITER = Grant("writer", False, True)


def put_back_world() -> tuple[World, Device, Device]:
    """``a`` has seen more than the server has now, ``b`` has not; both have something to say."""
    world = World()
    a, b = world.device(), world.device()
    a.put(("notes", 1, "old"))
    a.sync()
    b.sync()
    files = world.copy_files()
    for n in range(2, 6):
        a.put(("notes", n, "written after the copy"))
        a.sync()
    world.open_server(files)
    return world, a, b


def claim(world: World, kind: str, grant: Grant = GRANT, seen: int = 99) -> object:
    """What a message says, to which commit ``seen`` is nothing special."""
    history = world.server.history
    assert history is not None
    if kind == "handshake":
        return world.service.handshake(
            HandshakeRequest(
                major=1, minor=0, db_id="shop", device_id=DEVICE, history=history, cursor=seen
            ),
            grant,
        ).history
    pull = PullRequest(
        db_id="shop", device_id=DEVICE, history=history, cursor=0, limit=10, bytes_max=1000
    )
    if kind == "cursor":
        pull = PullRequest(**{**_fields(pull), "cursor": seen})
    elif kind == "have":
        pull = PullRequest(**{**_fields(pull), "have": [(seen, seen)]})
    else:
        cursor, base = (seen, 0) if kind == "push" else (0, seen)
        [answer] = world.service.push_many(
            [(request(world, tx(1, op(1, "x", base)), cursor=cursor), grant)]
        )
        return answer
    try:
        world.service.idle_pull(pull, grant)
        return world.service.pull(pull, grant)
    except (HistoryChangedError, PermissionDeniedError) as error:
        return error


def _fields(message: PullRequest) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


KINDS = ["handshake", "cursor", "have", "push", "base"]


def test_r29_the_first_proof_begins_a_history_that_every_device_learns_of() -> None:
    world, a, b = put_back_world()
    with pytest.raises(HistoryChangedError):
        a.sync()
    b.put(("notes", 3, "b's"))
    with pytest.raises(HistoryChangedError):
        b.sync()
    for device in (a, b):
        device.engine.reset(keep="device")
        device.settle()
    a.settle()
    assert world.values() == a.values() == b.values()
    assert set(a.values()) == {1, 2, 3, 4, 5}
    assert_in_step(world, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_r29_a_cursor_a_range_a_base_or_a_handshake_above_the_head_proves_it(kind: str) -> None:
    world, _, _ = put_back_world()
    before = world.server.history
    commits = world.server_storage.commits
    answer = claim(world, kind)
    after = world.server.history
    assert after != before
    assert world.server_storage.commits == commits + 1
    if kind == "handshake":
        assert answer == after
    else:
        assert isinstance(answer, HistoryChangedError)
        assert answer.details["history"] == after
    assert world.server.sequence == 1
    world.restart_server()
    assert world.server.history == after, "it is durable before anybody is told"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grant", [LIMITED, READER, WRITER], ids=lambda grant: grant.subject)
def test_r29_a_token_that_may_not_read_and_write_everything_begins_no_history(
    kind: str, grant: Grant
) -> None:
    world, _, _ = put_back_world()
    before = world.server.history
    commits = world.server_storage.commits
    claim(world, kind, grant)
    assert world.server.history == before
    assert world.server_storage.commits == commits
    # It took nothing away from those who are believed.
    claim(world, kind)
    assert world.server.history != before


@pytest.mark.parametrize("kind", ["handshake", "push"])
def test_r29_a_claim_about_another_history_begins_none(kind: str) -> None:
    world, _, _ = put_back_world()
    known, history = world.server.history, bytes(16)
    if kind == "handshake":
        world.service.handshake(
            HandshakeRequest(
                major=1, minor=0, db_id="shop", device_id=DEVICE, history=history, cursor=99
            ),
            GRANT,
        )
    else:
        [answer] = world.service.push_many(
            [(request(world, tx(1, op(1, "x", 99)), cursor=99, history=history), GRANT)]
        )
        assert isinstance(answer, HistoryChangedError)
    assert world.server.history == known


def test_r29_a_client_that_makes_it_up_gets_one_history_for_each_opening_of_the_files() -> None:
    world, _, _ = put_back_world()
    claim(world, "cursor")
    begun = world.server.history
    for kind in KINDS:
        claim(world, kind)
    assert world.server.history == begun


def test_r29_and_a_few_in_an_hour_however_often_they_are_opened() -> None:
    world, _, _ = put_back_world()
    seen = {world.server.history}
    for _ in range(HISTORIES_MAX + 3):
        world.restart_server()
        claim(world, "cursor")
        seen.add(world.server.history)
    assert len(seen) == 1 + HISTORIES_MAX
    world.clock.ms += HISTORIES_WITHIN_MS
    world.restart_server()
    claim(world, "cursor")
    assert len(seen | {world.server.history}) == 2 + HISTORIES_MAX


def test_r29_a_wrong_clock_that_was_put_right_stops_no_proof() -> None:
    world, _, _ = put_back_world()
    now = world.clock.ms
    world.clock.ms += 75 * 365 * 24 * HISTORIES_WITHIN_MS
    for _ in range(HISTORIES_MAX):
        world.restart_server()
        claim(world, "cursor")
    world.clock.ms = now
    begun = world.server.history
    world.restart_server()
    claim(world, "cursor")
    assert world.server.history != begun


def test_r29_files_put_back_again_are_proved_again() -> None:
    world, a, b = put_back_world()
    seen = {world.server.history}
    for _ in range(3):
        with pytest.raises(HistoryChangedError):
            a.sync()
        seen.add(world.server.history)
        a.engine.reset(keep="device")
        a.settle()
        with pytest.raises(HistoryChangedError):
            b.sync()
        b.engine.reset(keep="server")
        b.settle()
        assert_in_step(world, a, b)
        # A copy of this life, which ends before what a does next.
        files = world.copy_files()
        a.put(("notes", 9, "after the copy"))
        a.sync()
        world.open_server(files)
    assert len(seen) == 4


def test_r29_a_history_that_cannot_be_stored_is_told_to_nobody() -> None:
    world, a, _ = put_back_world()
    before = world.server.history
    world.server_storage.fail_next(error=OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        a.sync()
    assert world.server.history == before
    with pytest.raises(HistoryChangedError):
        a.sync()
    assert world.server.history != before


@pytest.mark.parametrize("kind", KINDS)
def test_r29_two_processes_that_have_a_proof_end_the_history_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the files and the new history another process begins one."""
    world, _, _ = put_back_world()
    seen_more, begun = Proofs.seen_more, list[bytes | None]()

    def others_first(self: Proofs, seen: int, head: int) -> HistoryChangedError:
        if not begun:
            assert world.server.begin_history(HISTORIES_MAX, HISTORIES_WITHIN_MS)
            begun.append(world.server.history)
        return seen_more(self, seen, head)

    monkeypatch.setattr(Proofs, "seen_more", others_first)
    answer = claim(world, kind)
    assert [world.server.history] == begun
    if kind == "handshake":
        assert answer == begun[0]
    else:
        assert isinstance(answer, HistoryChangedError)
        assert answer.details["history"] == begun[0]


def test_r29_nothing_of_a_group_is_decided_in_the_history_that_ends() -> None:
    world, _, _ = put_back_world()
    answers = world.service.push_many(
        [
            (request(world, tx(1, op(1, "x", 1))), GRANT),
            (request(world, tx(2, op(2, "y")), cursor=99), GRANT),
        ]
    )
    assert [type(answer) for answer in answers] == [HistoryChangedError, HistoryChangedError]
    assert world.values() == {1: "old"}


def test_r29_the_operator_is_told_loudly(caplog: pytest.LogCaptureFixture) -> None:
    world, _, _ = put_back_world()
    with caplog.at_level(logging.ERROR, "entidb.server"):
        claim(world, "cursor", LIMITED)
        claim(world, "cursor")
        claim(world, "cursor")
    limited, begun, again = [record.getMessage() for record in caplog.records]
    assert "'limited'" in limited
    assert "the history was kept" in limited.lower()
    assert "A new history begins" in begun
    assert "makes it up" in again


def test_r29_files_of_a_real_server_put_back_between_two_runs(tmp_path: Path) -> None:
    data = tmp_path / "server"

    def sync(database: Database) -> None:
        with SyncServer(ServerConfig(data_dir=str(data), insecure_no_auth=True)) as server:
            transport = HttpTransport("http://localhost", client=LoopbackClient(server))
            with SyncEngine(SyncConfig(db_id="shop"), transport, database) as engine:
                engine.sync()

    a, b = Database.in_memory(), Database.in_memory()
    a.collection("notes")[uid(1)] = "old"
    sync(a)
    sync(b)
    [path] = data.iterdir()
    saved = (path / "data.mdb").read_bytes()
    a.collection("notes")[uid(2)] = "new"
    sync(a)
    sync(a)
    (path / "data.mdb").write_bytes(saved)
    with pytest.raises(HistoryChangedError):
        sync(a)
    b.collection("notes")[uid(2)] = "b's"
    with pytest.raises(HistoryChangedError):
        sync(b)
    a.close()
    b.close()


@pytest.mark.parametrize("full", [False, True])
def test_r29_a_device_that_nobody_believes_stops_all_the_same(full: bool) -> None:
    world, a, _ = put_back_world()
    a.wire.grant = LIMITED
    with a.db.write() as writer:
        writer.set_sync_state(replace(writer.sync_state, full=full))
    for _ in range(2):
        with pytest.raises(HistoryChangedError, match="older"):
            a.sync()
    assert world.values() == {1: "old"}
    assert set(a.values()) == {1, 2, 3, 4, 5}
    a.engine.reset(keep="device")
    a.settle()
    assert world.values() == a.values()


def test_r29_the_identity_keeps_the_rest() -> None:
    world, a, _ = put_back_world()
    device_id, created = world.server.device_id, world.server.created_ms
    with pytest.raises(HistoryChangedError):
        a.sync()
    world.restart_server()
    assert (world.server.device_id, world.server.created_ms) == (device_id, created)
    assert world.server.role is Role.SERVER
    with world.server.storage.snapshot() as snapshot:
        assert snapshot.get(META_IDENTITY) is not None
    assert world.server.verify() == []


def head_of(world: World) -> int:
    return world.server.read_head().sequence


def gone_on_world() -> tuple[World, Device, Device, Device]:
    """``a`` has seen commits that are gone; ``b`` goes on from the older files until the server is
    beyond everything that ``a`` has seen; ``c`` has seen no more than the copy."""
    world, a, b = put_back_world()
    c = world.device()
    for n in range(10, 20):
        b.put(("notes", n, "written on the older files"))
        b.sync()
    assert head_of(world) > a.state.cursor
    return world, a, b, c


def test_r29_files_that_others_went_on_from_are_proved_all_the_same() -> None:
    world, a, b, c = gone_on_world()
    history = world.server.history
    a.put(("notes", 5, "a goes on"))
    with pytest.raises(HistoryChangedError, match="others have gone on from there"):
        a.sync()
    assert world.server.history != history
    for device in (b, c):
        if device.state.history is not None:
            with pytest.raises(HistoryChangedError):
                device.sync()
            device.engine.reset("device")
    a.engine.reset("device")
    for device in (a, b, c, a, b, c):
        device.sync()
    assert_in_step(world, a, b, c)
    values = world.values()
    assert values[19] == "written on the older files" and values[5] == "a goes on"
    assert values[4] == "written after the copy"


def test_r29_with_nothing_to_say_it_is_proved_by_a_pull_that_would_bring_nothing() -> None:
    world, a, _, _ = gone_on_world()
    history = world.server.history
    with pytest.raises(HistoryChangedError):
        a.sync()
    assert world.server.history != history


def swap_before(world: World, device: Device, kind: type, number: int, files: Any) -> None:
    """The files are put back, and another device goes on from them, just before ``device`` sends
    its request ``number`` of this kind."""
    sent = 0

    def before(message: object) -> None:
        nonlocal sent
        sent += isinstance(message, kind)
        if sent == number:
            sent = 10**6
            world.open_server(files)
            other = world.device()
            for n in range(30, 36):
                other.put(("notes", n, "another's"))
                other.sync()

    device.wire.before = before


def test_r29_pages_of_one_pull_are_of_one_past() -> None:
    """What a later commit has changed again is missing in the page before it."""
    world = World()
    a, b = world.device(), world.device(pull_operations_max=1)
    b.put(("notes", 20, "b's"))
    b.sync()
    for n in range(1, 4):
        a.put(("notes", n, "old"))
        a.sync()
    files = world.copy_files()
    a.put(("notes", 1, "new"))
    a.sync()
    swap_before(world, b, PullRequest, 2, files)
    with pytest.raises(HistoryChangedError):
        b.sync()
    assert b.values() == {20: "b's"}
    b.engine.reset("server")
    b.sync()
    assert b.values()[1] == "old"


def test_r29_pages_of_one_pull_are_of_one_past_in_two_cycles_too() -> None:
    world = World()
    b = world.device()
    b.put(("notes", 1, "old"))
    b.sync()
    files = world.copy_files()
    for n in range(2, 10):
        b.put(("notes", n, "written after the copy"))
        b.sync()
    a = world.device(pull_operations_max=2)

    def cut(message: object) -> None:
        if isinstance(message, PullRequest) and message.cursor == 4:
            raise TransportError("cut off")

    a.wire.before = cut
    with pytest.raises(TransportError):
        a.sync()
    a.restart()
    world.open_server(files)
    other = world.device()
    for n in range(30, 45):
        other.put(("notes", n, "another's"))
        other.sync()
    a.wire.before = lambda message: None
    # What it has staged is of commits that are not there any more.
    with pytest.raises(HistoryChangedError):
        a.sync()


def test_r29_what_was_sent_ahead_is_answered_by_the_same_past_or_not_taken() -> None:
    world = World()
    a = world.device(push_operations_max=2)
    a.sync()
    files = world.copy_files()
    for n in range(6):
        a.put(("notes", n, "a's"))
    swap_before(world, a, PushRequest, 2, files)
    with pytest.raises(HistoryChangedError):
        a.sync()
    assert [request.seen for request in a.wire.pushes()[:2]] == [None, None]
    with pytest.raises(HistoryChangedError):
        a.sync()
    a.engine.reset("device")
    a.settle()
    assert_in_step(world, a)
    assert [world.values()[n] for n in range(6)] == ["a's"] * 6


def test_r29_what_was_sent_ahead_is_not_taken_where_the_answer_leaves_open_what_was_there() -> None:
    """The files are opened twice, so that the term of the answer begins after all that was seen."""
    world = World()
    a = world.device(push_operations_max=2)
    a.put(("notes", 9, "a's"))
    a.settle()
    files = world.copy_files()
    for n in range(4):
        a.put(("notes", n, "a's"))
    sent = 0

    def before(message: object) -> None:
        nonlocal sent
        sent += isinstance(message, PushRequest)
        if sent == 2:
            sent = 10**6
            world.open_server(files)
            other = world.device()
            for n in (30, 31):
                other.put(("notes", n, "another's"))
            other.sync()
            world.restart_server()

    a.wire.before = before
    for _ in range(2):
        with pytest.raises((TransportError, HistoryChangedError)):
            a.sync()
    with pytest.raises(HistoryChangedError):
        a.sync()
    a.engine.reset("device")
    a.settle()
    assert_in_step(world, a)
    assert [world.values()[n] for n in range(4)] == ["a's"] * 4


def test_r29_an_older_server_or_device_proves_as_before() -> None:
    """Neither says terms: nothing is proved by them, and nothing is refused."""
    world, a, _, _ = gone_on_world()
    state = a.state
    pull = PullRequest(
        db_id="shop",
        device_id=DEVICE,
        history=state.history or b"",
        cursor=state.cursor,
        limit=10,
        bytes_max=1000,
    )
    assert world.service.pull(pull, GRANT).head == head_of(world)
    unknown = replace(pull, seen=SeenCommit(0, bytes(8)))
    assert world.service.pull(unknown, GRANT).head == head_of(world)
    with pytest.raises(HistoryChangedError):
        world.service.pull(replace(pull, seen=SeenCommit(state.cursor, bytes(8))), GRANT)


@pytest.mark.parametrize("is_round", [False, True])
def test_r29_what_nobody_believes_is_not_decided_either(is_round: bool) -> None:
    world, a, _, _ = gone_on_world()
    history, head = a.state.history, head_of(world)
    assert history is not None and a.state.seen is not None
    assert a.state.seen.version <= head
    pushed = request(world, tx(1, op(50, "x")), history=history, cursor=head, seen=a.state.seen)
    pull = PullRequest(
        db_id="shop",
        device_id=DEVICE,
        history=history,
        cursor=head,
        limit=10,
        bytes_max=1000,
        seen=a.state.seen,
    )
    member: PushRequest | RoundRequest = (
        RoundRequest(pull=pull, push=pushed) if is_round else pushed
    )
    beside = request(world, tx(2, op(51, "x")))
    answers = world.service.push_many([(member, LIMITED), (beside, GRANT)])
    assert [type(answer) for answer in answers] == [HistoryChangedError, PushResponse]
    assert world.server.history == history
    assert 51 in world.values() and 50 not in world.values()


def test_r29_a_server_without_a_commit_has_no_term_and_refuses_none() -> None:
    world = World()
    pull = PullRequest(
        db_id="shop",
        device_id=DEVICE,
        history=world.server.history or b"",
        cursor=0,
        limit=10,
        bytes_max=1000,
        seen=SeenCommit(0, bytes(8)),
    )
    assert world.service.pull(pull, GRANT).term is None


def test_r29_the_newest_term_with_a_commit_from_before_it_proves_it_too() -> None:
    world, a, _, _ = gone_on_world()
    head = head_of(world)
    pull = PullRequest(
        db_id="shop",
        device_id=DEVICE,
        history=a.state.history or b"",
        cursor=head,
        limit=10,
        bytes_max=1000,
    )
    newest = world.service.pull(pull, READER).term
    assert newest is not None and newest.first > 1
    for version, refused in ((newest.first, False), (newest.first - 1, True)):
        said = replace(pull, seen=SeenCommit(version, newest.name))
        if refused:
            with pytest.raises(HistoryChangedError, match="is another one than"):
                world.service.pull(said, READER)
        else:
            assert world.service.pull(said, READER).head == head


@pytest.mark.parametrize("term", [None, Term(1, b"the term")])
@pytest.mark.parametrize("head", [100, 149, 199])
def test_r29_an_older_server_may_have_moved_the_cursor_beyond_what_has_a_term(
    head: int, term: Term | None
) -> None:
    """A full pull does not say where the device is, so it is the device that looks."""
    state = ReplicaState(history=b"h" * 16, cursor=200, seen=SeenCommit(100, b"the term"))
    page = PullResponse(
        collections=[], commits=[], cursor=head, has_more=False, head=head, floor=0, time=0
    )
    with pytest.raises(HistoryChangedError, match="has seen commit 200"):
        seen_in(state, replace(page, term=term))
    assert seen_in(state, replace(page, head=200, cursor=200)) == state.seen

"""A device changes hands (R36): what somebody has committed goes to the server under their subject
and under nobody else's, whoever syncs, and signing out says what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.db.overruled import read_whose
from entidb.db.records import META_WHOSE
from entidb.errors import (
    CommitUnknownError,
    ConfigError,
    PermissionDeniedError,
    StorageError,
    StorageFullError,
    SyncStateError,
    TransportError,
)
from entidb.protocol import (
    HandshakeRequest,
    HandshakeResponse,
    PushRequest,
    RoundRequest,
    SyncRequest,
    decode,
    decode_request,
    encode,
    push_in,
)
from entidb.server import Grants, Rights, ServerConfig, SyncServer, ValidateTransaction
from entidb.storage import MemoryStorage
from entidb.sync import (
    AsyncSyncEngine,
    HttpTransport,
    LoopbackClient,
    RetryConfig,
    SyncConfig,
    SyncEngine,
)
from entidb.sync.transport import HttpResponse
from tests.support import DB_ID, WatchedStorage, assert_sound, uid


class Line(LoopbackClient):
    """Every request as it passes; ``before`` and ``after`` may raise, or do something."""

    def __init__(self, server: SyncServer) -> None:
        super().__init__(server)
        self.requests: list[SyncRequest] = []
        self.before: Callable[[SyncRequest], object] = lambda request: None
        self.after: Callable[[SyncRequest], object] = lambda request: None

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        request = decode_request("/v1" + url.rpartition("/v1")[2], body)
        self.requests.append(request)
        self.before(request)
        response = super().request(method, url, headers, body, timeout_s)
        self.after(request)
        return response

    def pushed(self) -> list[PushRequest]:
        """Those with something in them."""
        found = map(push_in, self.requests)
        return [each for each in found if each is not None and each.transactions]


#: Subjects of tokens that a message cannot hold as they are.
ODD = {
    "long": "l" * 300,
    "longer": "l" * 301,
    "tab": "a\tb",
    "joined": "\U0001f469\u200d\U0001f33e",
}


class Till:
    """One device, at which somebody works: ``who`` is what its token says."""

    def __init__(self, *, names: bool = True, policy: str = "server_wins") -> None:
        #: Of each accepted transaction who the server was told it is from.
        self.accepted: dict[bytes, str] = {}
        self.names = names
        self.policy = policy
        self.who = "alice"
        self.server = self._server()
        self.storage = WatchedStorage(MemoryStorage())
        self.open()

    def _server(self) -> SyncServer:
        def check(context: Any, transaction: ValidateTransaction) -> None:
            self.accepted[transaction.transaction_id.bytes] = context.subject

        def grants(token: str | None) -> Grants:
            assert token is not None
            return Grants(ODD.get(token, token), {"*": Rights(read=True, write=True)})

        how: dict[str, Any] = (
            {"authenticator": grants} if self.names else {"insecure_no_auth": True}
        )
        return SyncServer(ServerConfig(data_dir=None, compression=False, validate=check, **how))

    def open(self) -> None:
        self.storage = WatchedStorage(self.storage.inner)
        self.db = Database(self.storage)
        self.line = Line(self.server)
        config = SyncConfig(db_id=DB_ID, retry=RetryConfig.none(), default_policy=self.policy)
        transport = self.transport()
        self.engine = SyncEngine(config, transport, self.db)

    def transport(self) -> HttpTransport:
        return HttpTransport("http://127.0.0.1", token=lambda again: self.who, client=self.line)

    def restart(self) -> None:
        self.engine.close()
        self.open()

    def put(self, number: int, value: Any) -> bytes:
        """One transaction."""
        with self.db.transaction() as tx:
            tx.collection("notes")[uid(number)] = value
        return tx.id.bytes

    def values(self) -> dict[int, Any]:
        return {each.int: value for each, value in self.db.collection("notes").items()}

    def on_server(self) -> dict[int, Any]:
        database = self.server.database(DB_ID)
        return {each.int: value for each, value in database.collection("notes").items()}

    def come(self, who: str) -> None:
        """Somebody else takes the device over, and nothing is said to it."""
        self.who = who

    @property
    def others(self) -> dict[str, int]:
        return self.engine.status().others


@pytest.fixture
def till() -> Iterator[Till]:
    made = Till()
    yield made
    assert_sound(made.db, made.server.database(DB_ID))
    made.engine.close()
    made.server.close()


def refused(request: SyncRequest) -> None:
    raise TransportError("the line is dead")


def lose_answer_of_push(request: SyncRequest) -> None:
    if isinstance(request, PushRequest | RoundRequest):
        raise TransportError("lost on the way back")


# ---------------------------------------------------------------- one after the other


def test_what_somebody_committed_waits_for_them_when_another_syncs(till: Till) -> None:
    till.engine.sync()
    mine = [till.put(1, "alice's"), till.put(2, "alice's")]
    till.come("bob")
    till.restart()
    till.engine.sync()
    assert (till.on_server(), till.others) == ({}, {"alice": 2})
    assert till.engine.status().subject == "bob"
    his = till.put(3, "bob's")
    till.engine.sync()
    assert till.on_server() == {3: "bob's"}
    till.come("alice")
    till.restart()
    till.engine.sync()
    assert till.on_server() == till.values() == {1: "alice's", 2: "alice's", 3: "bob's"}
    assert till.accepted == {mine[0]: "alice", mine[1]: "alice", his: "bob"}
    assert till.others == {}


def test_people_who_come_and_go_each_find_their_own_work(till: Till) -> None:
    till.engine.sync()
    wrote: dict[bytes, str] = {}
    number = 0
    for who in ("alice", "bob", "alice", "carol", "bob", "alice"):
        till.come(who)
        till.restart()
        till.line.before = lambda request: (
            refused(request) if isinstance(request, PushRequest | RoundRequest) else None
        )
        with contextlib.suppress(TransportError):
            till.engine.sync()  # signs in, and nothing that was committed gets through
        for _ in range(2):
            number += 1
            wrote[till.put(number, who)] = who
    for who in ("carol", "alice", "bob"):
        till.come(who)
        till.restart()
        till.engine.sync()
    assert till.others == {}
    assert till.engine.status().pending == 0
    assert {each: till.accepted[each] for each in wrote} == wrote


@pytest.mark.parametrize("token", sorted(ODD))
def test_a_subject_that_no_message_can_hold_is_somebody_else_all_the_same(
    till: Till, token: str
) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.come(token)
    till.engine.sync()
    assert (till.others, till.on_server()) == ({"alice": 1}, {})
    theirs = till.put(2, "theirs")
    till.engine.sync()
    assert till.accepted[theirs] == ODD[token]
    till.put(3, "theirs too")
    till.come("longer" if token == "long" else "bob")
    till.engine.sync()
    name = till.engine.status().subject
    assert sorted(till.others.values()) == [1, 1]
    assert name not in till.others
    till.come(token)
    till.engine.sync()
    assert till.others == {"alice": 1}
    assert till.on_server() == {2: "theirs", 3: "theirs too"}


def test_what_is_built_on_another_persons_change_waits_with_it(till: Till) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.come("bob")
    till.restart()
    till.engine.sync()
    till.put(1, "bob's, on top of hers")
    with till.db.transaction() as tx:  # and this on that one
        tx.collection("notes")[uid(1)] = "bob's again"
        tx.collection("notes")[uid(2)] = "bob's too"
    till.put(2, "the last")
    free = till.put(3, "bob's alone")
    till.engine.sync()
    assert till.on_server() == {3: "bob's alone"}
    assert list(till.accepted) == [free]
    said = till.engine.explain("notes", uid(1))
    assert "alice" in said
    till.come("alice")
    till.restart()
    till.engine.sync()
    assert till.on_server() == {1: "alice's", 3: "bob's alone"}
    till.come("bob")
    till.restart()
    till.engine.sync()
    assert till.on_server() == {1: "bob's again", 2: "the last", 3: "bob's alone"}


def test_a_conflict_is_decided_for_who_is_away_as_for_anybody(till: Till) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.come("bob")
    till.restart()
    till.engine.sync()
    with till.server.database(DB_ID).transaction() as tx:
        tx.collection("notes")[uid(1)] = "the server's"
    till.engine.sync()
    assert till.values() == {1: "the server's"}
    assert [entry.code for entry in till.engine.discarded()] == ["conflict"]
    assert till.others == {}


def test_the_first_who_is_named_has_what_was_committed_before(till: Till) -> None:
    first = till.put(1, "nobody knew who")
    till.engine.sync()
    assert till.accepted == {first: "alice"}


def test_waiting_for_a_sync_does_not_wait_for_another_person(till: Till) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.come("bob")
    till.restart()
    till.put(2, "on nobody's account yet, so alice's")
    till.engine.sync()
    till.put(1, "on top of hers")
    till.put(3, "bob's")
    assert till.engine.synced(timeout_s=30)
    assert till.on_server() == {3: "bob's"}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("restarts", [False, True])
def test_waiting_for_a_sync_does_not_end_before_it_is_known_who_is_there(
    till: Till, background: bool, restarts: bool
) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.engine.logout("keep")
    till.come("bob")
    till.engine.sync()
    if restarts:
        till.restart()
    else:
        till.engine.logout("keep")
    till.come("alice")
    if background:
        till.engine.start()
    assert till.engine.synced(timeout_s=30)
    assert till.on_server() == {1: "alice's"}


def test_a_background_engine_rests_while_only_the_work_of_others_waits(till: Till) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.come("bob")
    till.restart()
    till.engine.start()
    assert till.engine.synced(timeout_s=30)
    with till.server.database(DB_ID).transaction() as tx:
        tx.collection("notes")[uid(2)] = "news"
    till.engine.wake()
    assert till.engine.synced(timeout_s=30)
    till.engine.stop()
    assert len(till.line.requests) < 20
    assert till.line.pushed() == []


# ---------------------------------------------------------------- in the middle of something


def test_a_push_whose_answer_got_lost_is_not_sent_again_by_another(till: Till) -> None:
    till.engine.sync()
    mine = till.put(1, "alice's")
    till.line.after = lose_answer_of_push
    with pytest.raises(TransportError):
        till.engine.sync()
    assert till.accepted == {mine: "alice"}
    till.come("bob")
    till.restart()
    till.engine.sync()
    assert till.line.pushed() == []
    # The pull has shown that it was accepted, and under whom is the server's to know.
    assert (till.others, till.engine.status().pending) == ({}, 0)
    assert till.on_server() == till.values() == {1: "alice's"}


def test_a_push_that_never_arrived_is_not_sent_by_another(till: Till) -> None:
    till.engine.sync()
    mine = till.put(1, "alice's")
    till.line.before = lambda request: (
        refused(request) if isinstance(request, PushRequest | RoundRequest) else None
    )
    with pytest.raises(TransportError):
        till.engine.sync()
    till.come("bob")
    till.restart()
    till.engine.sync()
    assert (till.line.pushed(), till.others) == ([], {"alice": 1})
    till.come("alice")
    till.restart()
    till.engine.sync()
    assert till.accepted == {mine: "alice"}


def test_a_token_that_is_exchanged_under_way_gets_nothing_decided(till: Till) -> None:
    """Between the handshake and the push somebody else's token comes."""
    till.engine.sync()
    mine = till.put(1, "alice's")
    with till.server.database(DB_ID).transaction() as tx:
        tx.collection("notes")[uid(2)] = "news, so that a page comes first"
    till.line.before = lambda request: till.come("bob")
    with pytest.raises(PermissionDeniedError) as failed:
        till.engine.sync()
    assert (failed.value.code, failed.value.retryable) == ("subject_changed", True)
    assert till.accepted == {}
    till.line.before = lambda request: None
    till.engine.sync()
    assert (till.accepted, till.others) == ({}, {"alice": 1})
    till.come("alice")
    till.engine.sync()
    assert till.accepted == {mine: "alice"}


def test_another_engine_on_the_same_database_may_be_somebody_elses() -> None:
    till = Till()
    till.engine.sync()
    till.put(1, "alice's")
    # What an engine of another process has done meanwhile.
    till.engine.applier.sign_in("bob")
    his = till.put(2, "bob's")
    till.engine.sync()
    assert his not in till.accepted
    assert till.on_server() == {1: "alice's"}
    assert till.others == {"bob": 1}
    till.engine.close()
    till.server.close()


# ---------------------------------------------------------------- signing out


def test_keeping_at_logout_separates_what_comes_before_from_what_comes_after(till: Till) -> None:
    till.engine.sync()
    mine = till.put(1, "alice's")
    assert till.engine.logout("keep") == 1
    assert (till.engine.status().subject, till.others) == (None, {"alice": 1})
    his = till.put(2, "of whoever comes")
    till.come("bob")
    till.engine.sync()
    assert till.accepted == {his: "bob"}
    till.engine.logout("keep")
    till.come("alice")
    till.engine.sync()
    assert till.accepted == {his: "bob", mine: "alice"}


def test_a_device_that_never_met_a_server_is_told_whose_the_work_is(till: Till) -> None:
    mine = till.put(1, "alice's")
    with pytest.raises(SyncStateError, match="subject="):
        till.engine.logout("keep")
    assert till.engine.logout("keep", subject="alice") == 1
    his = till.put(2, "bob's")
    till.come("bob")
    till.engine.sync()
    till.come("alice")
    till.restart()
    till.engine.sync()
    assert till.accepted == {his: "bob", mine: "alice"}


def test_discarding_at_logout_leaves_what_the_server_has(till: Till) -> None:
    till.put(1, "known")
    till.engine.sync()
    till.put(1, "changed")
    till.put(2, "new")
    assert till.engine.logout("discard") == 2
    assert till.values() == {1: "known"}
    assert (till.engine.status().pending, till.engine.discarded()) == (0, [])
    till.come("bob")
    till.engine.sync()
    assert till.on_server() == till.values() == {1: "known"}


def test_discarding_what_was_accepted_without_an_answer_brings_it_back(till: Till) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.line.after = lose_answer_of_push
    with pytest.raises(TransportError):
        till.engine.sync()
    till.line.after = lambda request: None
    assert till.engine.logout("discard") == 1
    assert till.values() == {}
    till.come("bob")
    till.engine.sync()
    assert till.on_server() == till.values() == {1: "alice's"}


def test_what_another_has_built_on_what_is_discarded_is_listed(till: Till) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.come("bob")
    till.restart()
    till.engine.sync()
    till.put(1, "bob's on top")
    till.engine.logout("keep")
    till.come("alice")
    till.line.before = lambda request: (
        refused(request) if isinstance(request, PushRequest | RoundRequest) else None
    )
    with pytest.raises(TransportError):
        till.engine.sync()
    assert till.engine.logout("discard") == 1
    (entry,) = till.engine.discarded()
    assert (entry.code, entry.values()[0][2]) == ("depends", "bob's on top")
    assert till.values() == {}


def test_exporting_at_logout_writes_a_private_file(till: Till, tmp_path: Path) -> None:
    till.engine.sync()
    value = {"text": "ä", "raw": b"\x01"}
    till.put(1, value)
    second = till.put(2, "x")
    with till.db.transaction() as tx:
        del tx.collection("notes")[uid(1)]
    file = tmp_path / "alice.ndjson"
    assert till.engine.logout("export", file=file) == 3
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [line["subject"] for line in lines] == ["alice"] * 3
    assert lines[1]["transaction"].replace("-", "") == second.hex()
    assert [write for line in lines for write in line["writes"]] == [
        {"collection": "notes", "id": str(uid(1)), "value": value | {"raw": {"$bytes": "AQ=="}}},
        {"collection": "notes", "id": str(uid(2)), "value": "x"},
        {"collection": "notes", "id": str(uid(1)), "value": None},
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]
    assert (till.engine.status().pending, till.values()) == (0, {})


def test_an_export_removes_what_a_killed_one_left(till: Till, tmp_path: Path) -> None:
    dead = tmp_path / "bob.ndjson.entidb-partial"
    dead.mkdir()
    (dead / "bob.ndjson").write_text("what bob wrote")
    till.engine.sync()
    till.engine.logout("export", file=tmp_path / "alice.ndjson")
    assert [path.name for path in tmp_path.iterdir()] == ["alice.ndjson"]


@pytest.mark.parametrize("where", ["there", "nowhere/at/all"])
def test_an_export_that_cannot_be_written_changes_nothing(
    till: Till, tmp_path: Path, where: str
) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(StorageError, match=r"there|nowhere"):
        till.engine.logout("export", file=tmp_path / where)
    assert (till.engine.status().pending, till.engine.status().subject) == (1, "alice")
    assert (tmp_path / "there").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def test_an_export_whose_commit_a_full_disk_stops_can_be_repeated(
    till: Till, tmp_path: Path
) -> None:
    """The file was written before the commit, and was in the way of the next try."""
    till.engine.sync()
    till.put(1, "alice's")
    till.storage.fail_next(error=StorageFullError("the disk is full"))
    with pytest.raises(StorageFullError):
        till.engine.logout("export", file=tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    assert (till.engine.status().pending, till.engine.status().subject) == (1, "alice")
    assert till.engine.logout("export", file=tmp_path / "f") == 1
    assert json.loads((tmp_path / "f").read_text())["subject"] == "alice"


def test_an_export_stays_where_it_alone_has_what_was_pending(till: Till, tmp_path: Path) -> None:
    """Whatever a store says of its commit: what it did counts."""
    till.engine.sync()
    till.put(1, "alice's")
    till.storage.fail_next(after=True, error=StorageError("done, and then it failed"))
    with pytest.raises(StorageError):
        till.engine.logout("export", file=tmp_path / "f")
    assert json.loads((tmp_path / "f").read_text())["subject"] == "alice"


@pytest.mark.parametrize("pending", ["keep", "discard", "export"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_logout_leaves_all_or_nothing(
    till: Till, tmp_path: Path, pending: str, after: bool
) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    more: dict[str, Any] = {"file": tmp_path / "f"} if pending == "export" else {}
    till.storage.fail_next(after=after, error=CommitUnknownError("killed"))
    with pytest.raises(CommitUnknownError):
        till.engine.logout(pending, **more)
    till.restart()
    done = till.engine.status().subject is None
    assert done is after
    if not done:
        assert (till.engine.status().pending, till.others) == (1, {})
    elif pending == "keep":
        assert till.others == {"alice": 1}
    else:
        assert till.engine.status().pending == 0
    if pending == "export":
        assert json.loads((tmp_path / "f").read_text())["subject"] == "alice"


def test_logout_ends_the_background_engine(till: Till) -> None:
    till.engine.start()
    assert till.engine.synced(timeout_s=30)
    till.engine.logout("keep")
    asked = len(till.line.requests)
    till.put(1, "nobody's")
    till.engine.wake()
    assert len(till.line.requests) == asked


@pytest.mark.parametrize(
    ("pending", "more"),
    [
        ("forget", {}),
        ("export", {}),
        ("export", {"file": ""}),
        ("export", {"file": "a\0b"}),
        ("keep", {"file": "x"}),
        ("discard", {"subject": "alice"}),
        ("keep", {"subject": ""}),
        ("keep", {"subject": 5}),
        ("keep", {"subject": "x" * 256}),
    ],
)
def test_wrong_arguments_of_logout_are_named(
    till: Till, pending: str, more: dict[str, Any]
) -> None:
    till.engine.sync()
    with pytest.raises(ConfigError):
        till.engine.logout(pending, **more)


@pytest.mark.parametrize("subject", [None, "", 5, "x" * 256])
def test_only_a_subject_can_be_taken_over(till: Till, subject: Any) -> None:
    with pytest.raises(ConfigError, match="a subject is text"):
        till.engine.take_over(subject)


def test_logout_inside_a_cycle_is_refused(till: Till) -> None:
    said: list[Exception] = []

    def listen(*given: object) -> None:
        for call in (
            lambda: till.engine.logout("keep"),
            lambda: till.engine.take_over("bob"),
            lambda: till.engine.reset("server"),
        ):
            try:
                call()
            except SyncStateError as error:
                said.append(error)

    till.engine.on_progress(listen)
    till.put(1, "x")
    till.engine.sync()
    assert len(said) >= 3
    assert till.on_server() == {1: "x"}


def test_work_of_somebody_who_does_not_come_back_can_be_taken_over(till: Till) -> None:
    till.engine.sync()
    mine = till.put(1, "alice's")
    till.come("bob")
    till.restart()
    till.engine.sync()
    assert till.engine.take_over("carol") == 0
    assert till.engine.take_over("alice") == 1
    till.engine.sync()
    assert till.accepted == {mine: "bob"}
    assert till.others == {}


def test_asyncio_signs_out_as_well(till: Till) -> None:
    async def main() -> None:
        till.engine.close()
        till.line = Line(till.server)
        transport = till.transport()
        engine = AsyncSyncEngine(SyncConfig(db_id=DB_ID), transport, till.db)
        await engine.sync()
        till.put(1, "alice's")
        assert await engine.logout("keep") == 1
        till.come("bob")
        await engine.sync()
        assert engine.engine.status().others == {"alice": 1}
        assert await engine.take_over("alice") == 1
        await engine.sync()
        assert till.on_server() == {1: "alice's"}
        await engine.close()

    asyncio.run(main())


# ---------------------------------------------------------------- addresses and servers


def test_a_server_that_moved_to_another_address_is_the_same_server(till: Till) -> None:
    till.engine.sync()
    till.put(1, "alice's")
    till.engine.close()
    line = Line(till.server)
    transport = HttpTransport("http://localhost:8443", token="alice", client=line)
    engine = SyncEngine(SyncConfig(db_id=DB_ID), transport, till.db)
    result = engine.sync()
    assert (result.pushed, result.reset) == (1, False)
    engine.close()


def test_a_server_without_authentication_names_nobody_and_keeps_nothing_apart() -> None:
    till = Till(names=False)
    till.put(1, "one")
    till.engine.sync()
    till.come("bob")
    till.restart()
    till.put(2, "two")
    till.engine.sync()
    assert till.on_server() == {1: "one", 2: "two"}
    assert till.engine.status().subject is None
    assert all(push.subject is None for push in till.line.pushed())
    till.engine.close()
    till.server.close()


def test_messages_without_a_subject_are_those_of_before() -> None:
    push = PushRequest(
        db_id="x", device_id=bytes(16), history=bytes(16), cursor=0, collections=[], transactions=[]
    )
    assert b"subject" not in encode(push)
    named = PushRequest(
        **{name: getattr(push, name) for name in push.__struct_fields__}
        | {"subject": "alice", "schema": 3}
    )
    assert decode(PushRequest, encode(named)) == named
    till = Till()
    till.engine.sync()
    asked = next(each for each in till.line.requests if isinstance(each, HandshakeRequest))
    answer = till.server.handle("/v1/handshake", "alice", asked)
    assert isinstance(answer, HandshakeResponse)
    assert answer.subject == "alice"
    assert decode(HandshakeResponse, encode(answer)) == answer
    till.engine.close()
    till.server.close()


@pytest.mark.parametrize("background", [False, True])
def test_waiting_for_what_waits_for_another_person_ends_and_names_them(
    till: Till, background: bool
) -> None:
    till.engine.sync()
    hers = till.put(1, "alice's")
    sequence = till.db.sequence
    till.come("bob")
    till.restart()
    if background:
        till.engine.start()
    else:
        till.engine.sync()
    fate = till.engine.accepted(sequence)
    assert (fate.state, fate.waits_for) == ("pending", "alice")
    till.put(1, "bob's, on top of hers")
    built = till.engine.accepted(till.db.sequence)
    assert (built.state, built.waits_for) == ("pending", "alice")
    his = till.put(2, "bob's")
    assert till.engine.accepted(till.db.sequence).waits_for is None
    till.engine.stop()
    assert till.accepted == {his: "bob"}
    till.come("alice")
    till.restart()
    assert till.engine.fate(sequence).waits_for is None or till.engine.status().subject == "bob"
    till.engine.sync()
    assert hers in till.accepted


# ---------------------------------------------------------------- whose it is that was withdrawn


def withdrawn(till: Till, *numbers: int) -> None:
    """Whoever is there changes each entity after another device did, and the server's side wins."""
    for number in numbers:
        till.server.database(DB_ID).collection("notes")[uid(number)] = "the server's"
        till.put(number, f"{till.who}'s")
    till.engine.sync()


def listed(till: Till) -> list[tuple[str | None, str]]:
    return [(each.subject, each.values()[0][2]) for each in till.engine.discarded()]


def next_one(till: Till, who: str) -> None:
    till.come(who)
    till.restart()
    till.engine.sync()


def test_what_was_withdrawn_stays_theirs_who_wrote_it(till: Till) -> None:
    till.engine.sync()
    withdrawn(till, 1, 2)
    assert listed(till) == [("alice", "alice's")] * 2
    next_one(till, "bob")
    withdrawn(till, 3)
    assert listed(till) == [("alice", "alice's")] * 2 + [("bob", "bob's")]
    assert (till.others, till.engine.synced()) == ({}, True)
    next_one(till, "carol")
    next_one(till, "alice")
    withdrawn(till, 4)
    whose = [("alice", "alice's")] * 2 + [("bob", "bob's"), ("alice", "alice's")]
    assert listed(till) == whose
    till.engine.logout("keep")
    assert listed(till) == whose
    next_one(till, "dave")
    assert listed(till) == whose


def test_what_is_forgotten_leaves_no_trace_of_its_person(till: Till) -> None:
    till.engine.sync()
    withdrawn(till, 1)
    next_one(till, "bob")
    assert [each.subject for each in till.engine.applier.state().others] == ["alice"]
    till.engine.prune(till.engine.discarded()[0])
    next_one(till, "carol")
    assert till.engine.applier.state().others == []


@pytest.mark.parametrize("how", ["discard", "take_over"])
def test_who_leaves_or_is_followed_has_still_written_what_was_withdrawn(
    till: Till, how: str
) -> None:
    till.engine.sync()
    withdrawn(till, 1)
    till.put(7, "alice's, and pending")
    if how == "discard":
        assert till.engine.logout("discard") == 1
        assert listed(till) == [("alice", "alice's")]
        next_one(till, "bob")
    else:
        next_one(till, "bob")
        assert till.engine.take_over("alice") == 1
        till.engine.sync()
        assert till.on_server()[7] == "alice's, and pending"
    withdrawn(till, 2)
    assert listed(till) == [("alice", "alice's"), ("bob", "bob's")]
    assert till.others == {}


def test_where_nobody_is_named_what_was_withdrawn_is_nobodys() -> None:
    till = Till(names=False)
    till.engine.sync()
    withdrawn(till, 1)
    assert listed(till) == [(None, "alice's")]
    till.engine.close()
    till.server.close()


# ---------------------------------------------------------------- whose it is that was overruled


def lost(till: Till) -> list[tuple[str | None, str, Any]]:
    return [(each.subject, each.side, each.value) for each in till.engine.overruled()]


def overrule(till: Till, number: int, value: str) -> None:
    """Another device writes what this one has pending, and the next cycle decides."""
    till.server.database(DB_ID).collection("notes")[uid(number)] = {"text": value}
    till.engine.sync()


@pytest.fixture
def merging() -> Iterator[Till]:
    made = Till(policy="merge")
    made.engine.sync()
    yield made
    made.engine.close()
    made.server.close()


def test_what_was_overruled_says_whose_it_was_whoever_is_there_when_it_is_decided(
    merging: Till,
) -> None:
    till = merging
    till.put(1, {"text": "alice's"})
    till.come("bob")
    till.restart()
    till.engine.sync()
    till.put(2, {"text": "bob's"})
    till.server.database(DB_ID).collection("notes")[uid(1)] = {"text": "theirs"}
    overrule(till, 2, "theirs")
    assert sorted(lost(till), key=str) == [
        ("alice", "local", "alice's"),
        ("bob", "local", "bob's"),
    ]
    texts = [each.explain() for each in till.engine.overruled()]
    assert sum("of 'alice')" in text for text in texts) == 1
    next_one(till, "carol")
    assert {each for each, _, _ in lost(till)} == {"alice", "bob"}


def test_whose_it_was_is_forgotten_with_the_value_and_with_no_other(merging: Till) -> None:
    till = merging
    for number in range(3):
        till.put(number, {"text": f"{till.who}'s"})
        overrule(till, number, "theirs")
        next_one(till, f"person-{number}")
    whose = [each for each, _, _ in lost(till)]
    assert whose == ["alice", "person-0", "person-1"]
    middle = till.engine.overruled()[1]
    till.engine.prune(middle)
    assert [each for each, _, _ in lost(till)] == ["alice", "person-1"]
    for value in till.engine.overruled():
        till.engine.prune(value)
    till.put(7, {"text": "again"})
    overrule(till, 7, "theirs")
    assert lost(till) == [("person-2", "local", "again")]
    with till.db.view() as view:
        assert [each.subject for each in read_whose(view)] == ["person-2"]


def test_of_what_an_older_program_kept_nobody_knows_whose_it_was(merging: Till) -> None:
    till = merging
    till.put(1, {"text": "alice's"})
    overrule(till, 1, "theirs")
    with till.db.write() as writer:
        writer.delete(META_WHOSE)
    till.put(2, {"text": "alice's"})
    overrule(till, 2, "theirs")
    assert [each for each, _, _ in lost(till)] == [None, "alice"]


def test_where_nobody_is_named_what_was_overruled_is_nobodys() -> None:
    till = Till(names=False, policy="merge")
    till.engine.sync()
    till.put(1, {"text": "mine"})
    overrule(till, 1, "theirs")
    assert lost(till) == [(None, "local", "mine")]
    assert "of '" not in till.engine.overruled()[0].explain()
    with till.db.view() as view:
        assert view.get(META_WHOSE) is None
    till.engine.close()
    till.server.close()

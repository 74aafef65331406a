"""A pull and a push in one exchange (R6): decided for a device that has seen everything, and for no
other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import pytest
from msgspec.structs import replace

from entidb import Database, RetryConfig, SyncConfig, SyncEngine
from entidb.db import Role, purge_tombstones
from entidb.errors import (
    HistoryChangedError,
    PermissionDeniedError,
    ResetRequiredError,
    ServerBusyError,
    SyncError,
    TransportError,
)
from entidb.protocol import (
    LIMITS,
    PullRequest,
    PushRequest,
    PushResponse,
    RoundRequest,
    RoundResponse,
    Verdict,
    decode,
    decode_request,
    encode,
)
from entidb.server import Grants, Rights, SyncServer
from entidb.server.hooks import Grant
from entidb.server.pages import unseen
from entidb.server.service import ROUND_ROWS_MAX, BehindError, DatabaseService
from entidb.sync import HttpTransport, LoopbackClient
from entidb.sync.refusal import TRY_AGAIN_CYCLES
from entidb.sync.rounds import FAILURES_MAX
from entidb.sync.transport import HttpResponse
from tests.server.support import pull, push
from tests.support import uid

GRANT = Grant("tester", True, True)
Answer = Callable[[], HttpResponse]


class Line(LoopbackClient):
    """Notes what passes, and lets a test do something to it."""

    def __init__(self, server: SyncServer) -> None:
        super().__init__(server)
        self.paths: list[str] = []
        self.hook: Callable[[str, Answer], HttpResponse] = lambda path, answer: answer()

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        path = url.removeprefix("http://localhost")
        self.paths.append(path)
        return self.hook(path, lambda: LoopbackClient.request(
            self, method, url, headers, body, timeout_s
        ))  # fmt: skip

    def taken(self) -> list[str]:
        paths, self.paths = self.paths, []
        return paths


class Device:
    def __init__(self, server: SyncServer, **config: Any) -> None:
        none: Literal["none"] = "none"
        settings = SyncConfig(db_id="shop", retry=RetryConfig.none(), compression=none, **config)
        self.line = Line(server)
        self.database = Database.in_memory()
        transport = HttpTransport("http://localhost", client=self.line, config=settings)
        self.engine = SyncEngine(settings, transport, self.database)
        self.notes = self.database.collection("notes")
        self.engine.sync()
        self.line.taken()

    def values(self) -> list[Any]:
        return sorted(str(value) for value in self.notes.values())


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with SyncServer.in_memory(access_log=False) as made:
        yield made


@pytest.fixture
def one(server: SyncServer) -> Device:
    return Device(server)


@pytest.fixture
def other(server: SyncServer) -> Device:
    return Device(server)


def on_the_server(server: SyncServer) -> list[Any]:
    return sorted(str(value) for value in server.database("shop").collection("notes").values())


# ---------------------------------------------------------------- a device and its server


def test_a_device_that_has_seen_everything_pushes_with_one_exchange(
    server: SyncServer, one: Device
) -> None:
    for number in range(3):
        one.notes.add({"n": number})
        result = one.engine.sync()
        assert one.line.taken() == ["/v1/sync"]
        assert (result.requests, result.pushed, result.pulled) == (1, 1, 0)
    assert one.engine.status().pending == 0
    assert on_the_server(server) == one.values()
    one.engine.sync()
    assert one.line.taken() == ["/v1/pull"]


def test_a_page_that_was_asked_for_another_scope_is_not_taken(
    server: SyncServer, one: Device, other: Device
) -> None:
    other.notes.add({"by": "other"})
    other.database.collection("tasks").add({"by": "other"})
    other.engine.sync()
    one.notes.add({"by": "one"})

    def narrow(path: str, answer: Answer) -> HttpResponse:
        one.line.hook = lambda path, answer: answer()
        found = answer()
        one.database.set_scope(["notes"])
        return found

    one.line.hook = narrow
    one.engine.sync()
    assert one.line.taken()[:2] == ["/v1/sync", "/v1/pull"]
    assert [str(value) for value in one.database.collection("tasks").values()] == []
    one.engine.sync()
    assert on_the_server(server) == one.values()


def test_one_that_is_behind_gets_its_page_and_nothing_is_decided(
    server: SyncServer, one: Device, other: Device
) -> None:
    one.notes.add({"by": "one"})
    one.engine.sync()
    other.notes.add({"by": "other"})
    result = other.engine.sync()
    assert other.line.taken() == ["/v1/sync", "/v1/push"]
    assert (result.pushed, result.pulled) == (1, 1)
    assert on_the_server(server) == other.values() == ["{'by': 'one'}", "{'by': 'other'}"]


def test_what_is_decided_behind_others_is_rebased_first_and_no_conflict_for_the_server(
    one: Device, server: SyncServer
) -> None:
    late = Device(server, default_policy="client_wins")
    entity = one.notes.add({"n": 1})
    one.engine.sync()
    late.engine.sync()
    one.notes[entity] = {"n": 2}
    one.engine.sync()
    late.notes[entity] = {"n": 3}
    result = late.engine.sync()
    assert len(result.conflicts) == 1
    assert on_the_server(server) == ["{'n': 3}"]
    assert late.line.taken()[-2:] == ["/v1/sync", "/v1/push"]


def test_what_others_wrote_where_this_device_does_not_look_does_not_make_it_behind(
    server: SyncServer, other: Device
) -> None:
    narrow = Device(server, collections=("notes",))
    other.database.collection("drafts").add({"n": 1})
    other.engine.sync()
    narrow.notes.add({"n": 2})
    assert narrow.engine.sync().pushed == 1
    assert narrow.line.taken() == ["/v1/sync"]
    narrow.engine.sync()
    assert narrow.line.taken() == ["/v1/pull"]


def test_a_lost_answer_is_pushed_again_and_stored_once(server: SyncServer, one: Device) -> None:
    def lose(path: str, answer: Answer) -> HttpResponse:
        answer()
        raise TransportError("lost")

    one.line.hook = lose
    one.notes.add({"n": 1})
    with pytest.raises(TransportError):
        one.engine.sync()
    one.line.hook = lambda path, answer: answer()
    one.line.taken()
    one.engine.sync()
    assert one.line.taken() == ["/v1/handshake", "/v1/push", "/v1/pull"]
    assert server.database("shop").read_head().sequence == 1
    assert one.engine.status().pending == 0


def test_a_lost_answer_that_decided_nothing_is_pushed_again(
    server: SyncServer, one: Device, other: Device
) -> None:
    one.notes.add({"by": "one"})
    one.engine.sync()

    def lose(path: str, answer: Answer) -> HttpResponse:
        answer()
        raise TransportError("lost")

    other.line.hook = lose
    other.notes.add({"by": "other"})
    with pytest.raises(TransportError):
        other.engine.sync()
    assert on_the_server(server) == ["{'by': 'one'}"]
    other.line.hook = lambda path, answer: answer()
    other.engine.sync()
    assert on_the_server(server) == other.values() == ["{'by': 'one'}", "{'by': 'other'}"]


@pytest.mark.parametrize("status", [404, 405, 413, 400])
def test_a_proxy_that_refuses_rounds_stops_nothing(
    status: int, server: SyncServer, one: Device
) -> None:
    def refuse(path: str, answer: Answer) -> HttpResponse:
        if path == "/v1/sync":
            return HttpResponse(status, {"content-type": "text/html"}, b"no")
        return answer()

    one.line.hook = refuse
    one.notes.add({"n": 1})
    one.engine.sync()
    assert one.line.taken() == ["/v1/sync", "/v1/pull", "/v1/push"]
    one.notes.add({"n": 2})
    one.engine.sync()
    assert one.line.taken() == ["/v1/pull", "/v1/push"], "it counts for the connection"
    assert on_the_server(server) == one.values()


OPEN = [200, 301, 302, 401, 407, 408, 409, 421, 429, 500, 501, 502, 503, 504, 511]


@pytest.mark.parametrize("status", OPEN)
def test_a_proxy_that_answers_rounds_in_the_servers_place_costs_three_failures_and_no_more(
    status: int, server: SyncServer, one: Device
) -> None:
    """Such an answer proves nothing, so each is settled by a push; which gets through."""

    def answers(path: str, answer: Answer) -> HttpResponse:
        if path == "/v1/sync":
            return HttpResponse(status, {"content-type": "text/html"}, b"no")
        return answer()

    one.line.hook = answers
    failures = 0
    for number in range(10):
        one.notes.add({"n": number})
        try:
            one.engine.sync()
        except SyncError:
            failures += 1
    assert failures == FAILURES_MAX
    assert one.line.taken()[-2:] == ["/v1/pull", "/v1/push"]
    assert (one.engine.status().pending, one.engine.discarded()) == (0, [])
    assert on_the_server(server) == one.values()


def test_rounds_that_were_left_out_are_tried_again_after_some_cycles(
    server: SyncServer, one: Device
) -> None:
    one.line.hook = lambda path, answer: (
        HttpResponse(502, {}, b"") if path == "/v1/sync" else answer()
    )
    for _ in range(2 * FAILURES_MAX):  # each failure is settled by the next cycle
        one.notes.add({"n": 1})
        with contextlib.suppress(SyncError):
            one.engine.sync()
    one.line.hook = lambda path, answer: answer()
    one.line.taken()
    tried = 0
    for number in range(TRY_AGAIN_CYCLES + 2):
        one.notes.add({"later": number})
        one.engine.sync()
        tried += "/v1/sync" in one.line.taken()
    assert tried == 2, "one after a hundred, and then each"
    assert on_the_server(server) == one.values()


def test_more_than_a_round_holds_goes_on_as_pushes_in_order(
    server: SyncServer, one: Device
) -> None:
    for number in range(1000):
        one.notes.add({"n": number})
    result = one.engine.sync()
    assert result.pushed == 1000
    paths = one.line.taken()
    assert paths[0] == "/v1/sync" and set(paths[1:]) == {"/v1/push"}
    events = server.database("shop").changes(0)
    assert [event.value["n"] for event in events] == list(range(1000))


def test_a_server_that_does_not_name_it_is_asked_as_ever(server: SyncServer) -> None:
    server.front._features.remove("sync")
    device = Device(server)
    device.notes.add({"n": 1})
    device.engine.sync()
    assert device.line.taken() == ["/v1/pull", "/v1/push"]


def test_a_first_sync_and_a_wider_scope_are_no_rounds(server: SyncServer, other: Device) -> None:
    other.notes.add({"n": 1})
    other.engine.sync()
    fresh = Database.in_memory()
    fresh.collection("notes").add({"n": 2})
    config = SyncConfig(db_id="shop", retry=RetryConfig.none())
    line = Line(server)
    with SyncEngine(config, HttpTransport("http://localhost", client=line), fresh) as engine:
        engine.sync()
    assert "/v1/sync" not in line.paths
    assert len(on_the_server(server)) == 2


def test_a_token_that_may_not_read_pushes_no_round() -> None:
    def authenticate(token: str | None) -> Grants:
        return Grants("writer", {"shop": Rights(read=False, write=True)})

    with SyncServer.in_memory(authenticator=authenticate) as server:
        request = RoundRequest(pull=pull(bytes(16)), push=push(bytes(16), 1))
        with pytest.raises(PermissionDeniedError):
            server.front.permit(request, authenticate(None))


# ---------------------------------------------------------------- in one group


@pytest.fixture
def service() -> DatabaseService:
    database = Database.in_memory(role=Role.SERVER)
    return DatabaseService(database, db_id="shop", limits=LIMITS)


def round_of(service: DatabaseService, cursor: int, push_request: PushRequest) -> RoundRequest:
    history = service.database.history
    assert history is not None
    request: PullRequest = pull(history, cursor=cursor)
    return RoundRequest(
        pull=request,
        push=PushRequest(
            db_id="shop",
            device_id=push_request.device_id,
            history=history,
            cursor=cursor,
            collections=push_request.collections,
            transactions=push_request.transactions,
        ),
    )


def test_members_of_one_group_are_all_decided_against_what_came_before_them(
    service: DatabaseService,
) -> None:
    history = service.database.history
    assert history is not None
    first = round_of(service, 0, push(history, 1, value="a"))
    second = round_of(service, 0, push(history, 2, value="b"))
    answers = service.push_many([(first, GRANT), (second, GRANT)])
    assert all(isinstance(answer, PushResponse) for answer in answers)
    rest = [
        decode_page(service, request, answer)
        for request, answer in zip((first, second), answers, strict=True)
    ]
    # Each is brought what the other has committed, and not its own.
    assert [[commit.version for commit in page.pull.commits] for page in rest] == [[2], [1]]


def decode_page(service: DatabaseService, request: RoundRequest, answer: Any) -> RoundResponse:
    page = service.pull(unseen(request, answer), GRANT)
    return RoundResponse(pull=page, push=answer)


def test_nothing_of_a_round_that_is_behind_is_remembered(service: DatabaseService) -> None:
    history = service.database.history
    assert history is not None
    service.push_many([(push(history, 1), GRANT)])
    behind = round_of(service, 0, push(history, 2))
    (answer,) = service.push_many([(behind, GRANT)])
    assert isinstance(answer, BehindError)
    assert service.database.read_head().sequence == 1
    # The same id with other content is a new transaction: nothing is known of it.
    current = round_of(service, 1, push(history, 2, value="other"))
    (answer,) = service.push_many([(current, GRANT)])
    assert isinstance(answer, PushResponse)
    assert answer.results[0].verdict == Verdict.ACCEPTED


def test_a_round_is_refused_as_its_pull_would_be(service: DatabaseService) -> None:
    history = service.database.history
    assert history is not None
    service.push_many([(push(history, 1), GRANT)])
    current = round_of(service, 1, push(history, 2))
    other = replace(current, pull=replace(current.pull, history=bytes(16)))
    ahead = round_of(service, 9, push(history, 3))
    limited = Grant("limited", True, True, frozenset(["notes"]))
    answers = service.push_many(
        [(current, Grant("writer", False, True)), (other, GRANT), (ahead, limited)]
    )
    assert [type(answer) for answer in answers] == [
        PermissionDeniedError,
        HistoryChangedError,
        HistoryChangedError,
    ]
    purge_tombstones(service.database, 1)
    (answer,) = service.push_many([(round_of(service, 0, push(history, 4)), GRANT)])
    assert isinstance(answer, ResetRequiredError)
    assert service.database.read_head().sequence == 1


@pytest.mark.parametrize(
    ("rows", "kind"), [(ROUND_ROWS_MAX, PushResponse), (ROUND_ROWS_MAX + 1, BehindError)]
)
def test_a_round_is_behind_where_there_is_more_than_it_looks_at(
    service: DatabaseService, rows: int, kind: type
) -> None:
    """Whatever it is: here nothing that the device would pull."""
    history = service.database.history
    assert history is not None
    for number in range(rows):
        service.database.collection("others")[uid(number)] = number
    request = round_of(service, 0, push(history, 1))
    request = replace(request, pull=replace(request.pull, collections=["notes"]))
    (answer,) = service.push_many([(request, GRANT)])
    assert type(answer) is kind


def test_a_round_is_behind_where_a_push_would_have_to_wait(service: DatabaseService) -> None:
    """It is told so at once; the push that follows its pull is the one that waits."""
    history = service.database.history
    assert history is not None
    service.is_frozen = lambda: True
    (answer, pushed) = service.push_many(
        [(round_of(service, 0, push(history, 1)), GRANT), (push(history, 2), GRANT)]
    )
    assert isinstance(answer, BehindError)
    assert isinstance(pushed, ServerBusyError)
    assert pushed.details == {"reason": "frozen"}
    assert service.database.read_head().sequence == 0
    service.is_frozen = lambda: False
    (answer,) = service.push_many([(round_of(service, 0, push(history, 1)), GRANT)])
    assert isinstance(answer, PushResponse)


def test_versions_that_were_accepted_count_as_had(service: DatabaseService) -> None:
    history = service.database.history
    assert history is not None
    request = round_of(service, 0, push(history, 1, 2, 3))
    (answer,) = service.push_many([(request, GRANT)])
    assert isinstance(answer, PushResponse)
    assert unseen(request, answer).have == [(1, 3)]
    idle = service.idle_pull(unseen(request, answer), GRANT)
    assert idle is not None and idle.cursor == 3 and idle.commits == []


def test_a_round_goes_over_the_wire_as_it_is(service: DatabaseService) -> None:
    request = round_of(service, 0, push(bytes(16), 1))
    assert decode_request("/v1/sync", encode(request)) == request
    empty = service.pull(request.pull, GRANT)
    answer = RoundResponse(pull=empty, push=None)
    assert decode(RoundResponse, encode(answer)) == answer

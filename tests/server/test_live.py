"""``GET /v1/live``: a hint for every commit, and nothing but hints."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from entidb import cbor
from entidb.errors import ProtocolError, ServerBusyError
from entidb.protocol import HandshakeResponse
from entidb.server import Grants, Rights, ServerConfig, SyncServer, live_http, serving
from entidb.server import live as live_room
from entidb.server.control import Revoked
from entidb.server.live import LiveChannels
from entidb.server.live_http import LiveRequest, Stream
from entidb.server.segments.serving import SEGMENTS_PATH, SegmentRequest
from entidb.server.stores import Store
from tests.server.support import Client, handshake, pull, push
from tests.server.test_app import eventually
from tests.support import FakeClock

pytestmark = pytest.mark.process


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[tuple[SyncServer, str]]:
    with SyncServer.in_memory(**settings) as server:
        server.database("shop")
        with serving(server) as url:
            yield server, url


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while Events.opened:
        Events.opened.pop().close()


class Events:
    """A client that reads one stream, event by event; closed with the test that opened it."""

    opened: ClassVar[list[Events]] = []

    def __init__(self, url: str, token: str | None = None, query: str = "db_id=shop") -> None:
        parts = urlsplit(url)
        self.connection = http.client.HTTPConnection(
            str(parts.hostname), parts.port or 0, timeout=30
        )
        headers = {"accept": "text/event-stream"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self.connection.request("GET", f"/v1/live?{query}", headers=headers)
        self.response = self.connection.getresponse()
        self.opened.append(self)

    def next(self) -> dict[str, str] | None:
        """The next event; None at the end of the stream."""
        found: dict[str, str] = {}
        while True:
            line = self.response.readline().decode()
            if not line:
                return None
            line = line.rstrip("\n")
            if not line and found:
                return found
            name, colon, value = line.partition(": ")
            if name and colon:
                found[name] = value

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def add(server: SyncServer, text: str = "a") -> int:
    database = server.database("shop")
    database.collection("notes").add({"text": text})
    return database.read_head().sequence


def test_a_stream_begins_with_the_newest_commit_and_goes_on_with_every_newer_one() -> None:
    with running() as (server, url):
        first = add(server)
        events = Events(url)
        assert events.response.status == 200
        assert events.response.headers["content-type"] == "text/event-stream"
        assert events.response.headers["cache-control"] == "no-store"
        assert events.response.headers["x-accel-buffering"] == "no"
        assert events.response.headers["x-request-id"]
        assert events.next() == {"id": str(first), "event": "head", "data": str(first)}
        second = add(server)
        assert events.next() == {"id": str(second), "event": "head", "data": str(second)}
        events.close()


def test_a_push_of_another_device_is_told() -> None:
    with running() as (_, url), Client(url) as client:
        events = Events(url)
        assert events.next() == {"id": "0", "event": "head", "data": "0"}
        client.send(push(client.history(), 1))
        told = events.next()
        assert told is not None and told["data"] == "1"
        events.close()


def test_a_hint_carries_a_number_and_nothing_else() -> None:
    with running() as (server, url):
        events = Events(url)
        events.next()
        add(server, "a secret")
        told = events.next()
        assert told is not None and set(told) == {"id", "event", "data"} and told["data"].isdigit()
        events.close()


def test_a_poll_answers_at_once_if_there_is_more_and_else_with_the_first_news() -> None:
    with running() as (server, url), Client(url) as client:
        head = add(server)

        def poll(cursor: int) -> int:
            connection = client.connection
            path = f"/v1/live?db_id=shop&cursor={cursor}"
            connection.request("GET", path, headers={"accept": "application/cbor"})
            response = connection.getresponse()
            assert response.status == 200
            answer = cbor.decode(response.read())
            assert set(answer) == {"head"}
            return int(answer["head"])

        assert poll(0) == head
        timer = threading.Timer(0.1, add, [server])
        timer.start()
        assert poll(head) == head + 1
        timer.join()


def test_a_poll_without_news_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_http, "POLL_S", 0.05)
    with running() as (server, url), Client(url) as client:
        head = add(server)
        path = f"/v1/live?db_id=shop&cursor={head}"
        client.connection.request("GET", path, headers={"accept": "application/cbor"})
        response = client.connection.getresponse()
        assert cbor.decode(response.read()) == {"head": head}


def test_another_history_is_news() -> None:
    with running() as (server, url), Client(url) as client:
        head = add(server)
        path = f"/v1/live?db_id=shop&cursor={head}&history={'ab' * 16}"
        client.connection.request("GET", path, headers={"accept": "application/cbor"})
        response = client.connection.getresponse()
        assert cbor.decode(response.read()) == {"head": head}


def test_one_who_has_seen_more_than_there_is_is_answered_at_once() -> None:
    """The database was replaced by an older one: whoever waits for more would wait for long."""
    with running() as (server, url), Client(url) as client:
        head = add(server)
        path = f"/v1/live?db_id=shop&cursor={head + 5}"
        client.connection.request("GET", path, headers={"accept": "application/cbor"})
        response = client.connection.getresponse()
        assert cbor.decode(response.read()) == {"head": head}


@pytest.mark.parametrize(
    ("method", "query", "code"),
    [
        ("GET", "", "invalid_message"),
        ("GET", "db_id=shop&cursor=-1", "invalid_message"),
        ("GET", "db_id=shop&history=xyz", "invalid_message"),
        ("GET", "db_id=nothing", "unknown_database"),
        ("POST", "db_id=shop", "method_not_allowed"),
    ],
)
def test_what_is_no_question_is_refused(method: str, query: str, code: str) -> None:
    with running() as (_, url), Client(url) as client:
        client.connection.request(method, f"/v1/live?{query}")
        response = client.connection.getresponse()
        answer = cbor.decode(response.read())
        assert answer["code"] == code


def test_who_may_not_read_hears_nothing() -> None:
    def authenticate(token: str | None) -> Grants:
        return Grants(token or "", {"shop": Rights(read=token == "reader", write=True)})

    with running(authenticator=authenticate) as (_, url):
        assert Events(url, "writer").response.status == 403
        assert Events(url, "reader", "db_id=other").response.status == 403
        events = Events(url, "reader")
        assert events.next() is not None
        events.close()


def test_a_waiter_is_no_user_of_the_database(tmp_path: Path) -> None:
    """Else a broken store could not be opened again, and an idle one never be closed."""
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        history = client.history()
        many = [Events(url) for _ in range(10)]
        for events in many:
            events.next()
        store: Store = server.stores._stores["shop"]
        eventually(lambda: store.users == 0)
        store.broken = True
        assert client.send(pull(history)).status == 200
        assert server.stores._stores["shop"] is not store
        add(server)
        assert all(events.next() for events in many)


def test_a_stream_ends_before_its_token_does_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def authenticate(token: str | None) -> Grants:
        rights = {"shop": Rights(read=True, write=True)}
        return Grants("a", rights, {}, time.time() + live_http.TOKEN_MARGIN_S + 1)

    with running(authenticator=authenticate) as (_, url):
        events = Events(url, "t")
        assert events.next() is not None
        assert events.next() == {"retry": "0", "event": "bye", "data": "token"}
        assert events.next() is None


@pytest.mark.parametrize(
    ("left_s", "lives_s"), [(60.0, 50.0), (10.5, 1.0), (1.0, 1.0), (0.3, 0.3), (-5.0, -5.0)]
)
def test_no_stream_lives_longer_than_its_token(left_s: float, lives_s: float) -> None:
    clock = FakeClock()
    until_s = clock.now_ms() / 1000 + left_s
    grants = Grants("a", {"shop": Rights(read=True, write=False)}, {}, until_s)
    stream = Stream(LiveRequest(b"db_id=shop", {}), grants, clock, 1)
    assert stream._life_s == pytest.approx(lives_s, abs=0.001)


def test_a_stream_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_http, "STREAM_S", 0.2)
    with running() as (_, url):
        events = Events(url)
        assert events.next() is not None
        assert events.next() == {"retry": "0", "event": "bye", "data": "time"}
        assert events.next() is None


def test_a_server_that_stops_sends_all_away_and_does_not_wait_for_them() -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(SyncServer.in_memory())
        server.database("shop")
        url = stack.enter_context(serving(server))
        many = [Events(url) for _ in range(20)]
        for events in many:
            assert events.next() is not None
        began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < 10
        waits = set()
        for events in many:
            told = events.next()
            assert told is not None and told["data"] == "shutdown"
            waits.add(told["retry"])
            assert events.next() is None
        assert len(waits) > 10, "they would all come back at once"


def test_there_is_an_end_to_how_many_may_wait() -> None:
    with running(live_max=2) as (_, url):
        first, second = Events(url), Events(url)
        third = Events(url)
        assert third.response.status == 503
        assert third.response.headers["retry-after"]
        first.close()
        eventually(lambda: Events(url).response.status == 200)
        second.close()


def test_one_subject_does_not_take_all_places() -> None:
    def authenticate(token: str | None) -> Grants:
        return Grants(token or "", {"shop": Rights(read=True, write=True)})

    with running(authenticator=authenticate, live_subject_max=1) as (_, url):
        kept = [Events(url, "a"), Events(url, "b")]
        assert [each.response.status for each in kept] == [200, 200]
        assert Events(url, "a").response.status == 503


def test_a_client_that_goes_away_is_forgotten() -> None:
    with running() as (server, url):
        events = Events(url)
        events.next()
        app = server_app(url, server)
        assert app() == 1
        events.close()
        eventually(lambda: app() == 0)


def server_app(url: str, server: SyncServer) -> Any:
    live = server.stores.on_commit.__self__  # type: ignore[attr-defined]
    return lambda: live.count


def test_signs_of_life_come_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as (server, url):
        events = Events(url)
        events.next()
        live: LiveChannels = server.stores.on_commit.__self__  # type: ignore[attr-defined]

        def quarter_of_a_minute() -> None:
            for _ in range(15):
                live._tick()

        live._loop.call_soon_threadsafe(quarter_of_a_minute)
        assert events.response.readline() == b":\n"
        events.close()


def test_the_handshake_names_the_channel_unless_there_is_none() -> None:
    for most, named in ((10, True), (0, False)):
        with running(live_max=most) as (_, url), Client(url) as client:
            features = client.send(handshake()).message(HandshakeResponse).features
            assert ("live" in features) is named


# ---------------------------------------------------------------- who is told when, no socket


class Told:
    """A waiter that writes down what it is told, and may be slow to read, or have written all that
    there is to be told."""

    db_id = "shop"
    subject = "someone"
    grants = Grants("someone", {})
    device_id: bytes | None = None

    def __init__(self, slow_s: float = 0.0, *, writes: bool = False) -> None:
        self.head = 0
        self.heads: list[int] = []
        self.ended = ""
        self._slow_s = slow_s
        self._writes = writes

    async def hint(self, head: int, *, own: bool = False) -> bool:
        if self._writes and not own:
            return False
        if self._slow_s:
            await asyncio.sleep(self._slow_s)
        self.heads.append(head)
        return True

    async def beat(self) -> bool:
        self.heads.append(-1)
        return True

    def end(self, reason: str) -> None:
        self.ended = reason


def in_loop(test: Any) -> None:
    async def run() -> None:
        await test(LiveChannels(asyncio.get_running_loop(), 10_000, 10_000))

    asyncio.run(run())


async def comes(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.001)


def test_many_commits_at_once_are_two_hints() -> None:
    async def test(live: LiveChannels) -> None:
        waiter = Told()
        live.add(waiter)
        for head in range(1, 101):
            live._told("shop", head)
        await comes(lambda: waiter.heads[-1:] == [100])
        assert len(waiter.heads) <= 2

    in_loop(test)


def test_the_first_of_many_are_told_at_once_and_the_rest_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(live: LiveChannels) -> None:
        waiters = [Told() for _ in range(500)]
        for waiter in waiters:
            live.add(waiter)
        with monkeypatch.context() as patch:
            patch.setattr(live_room, "BATCH_PAUSE_S", 0.2)
            live._told("shop", 1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        told = sum(bool(waiter.heads) for waiter in waiters)
        assert told == live_room.BATCH
        await comes(lambda: all(waiter.heads == [1] for waiter in waiters))

    in_loop(test)


def test_a_head_that_comes_in_the_middle_of_a_round_reaches_everybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live_room, "BATCH_PAUSE_S", 0.1)

    async def test(live: LiveChannels) -> None:
        waiters = [Told() for _ in range(200)]
        for waiter in waiters:
            live.add(waiter)
        live._told("shop", 1)
        await comes(lambda: any(waiter.heads for waiter in waiters))
        assert not all(waiter.heads for waiter in waiters)
        live._told("shop", 2)
        await comes(lambda: all(waiter.heads[-1:] == [2] for waiter in waiters))

    in_loop(test)


def test_who_wrote_it_is_told_when_all_others_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_room, "OWN_S", 0.3)

    async def test(live: LiveChannels) -> None:
        writer, other, gone = Told(writes=True), Told(), Told(writes=True)
        for waiter in (writer, other, gone):
            live.add(waiter)
        live._told("shop", 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (writer.heads, other.heads) == ([], [1])
        live.remove(gone)
        await comes(lambda: writer.heads)
        assert (writer.heads, other.heads, gone.heads) == ([1], [1], [])

    in_loop(test)


def test_one_who_does_not_read_holds_up_nobody() -> None:
    async def test(live: LiveChannels) -> None:
        waiters = [Told(60.0), *(Told() for _ in range(30))]
        for waiter in waiters:
            live.add(waiter)
        live._told("shop", 1)
        await comes(lambda: all(waiter.heads == [1] for waiter in waiters[1:]))
        assert waiters[0].heads == []

    in_loop(test)


def test_who_waits_for_another_database_hears_nothing() -> None:
    async def test(live: LiveChannels) -> None:
        waiter, other = Told(), Told()
        other.db_id = "office"
        live.add(waiter)
        live.add(other)
        live._told("shop", 1)
        await comes(lambda: waiter.heads)
        await asyncio.sleep(0.05)
        assert (waiter.heads, other.heads) == ([1], [])

    in_loop(test)


def test_a_database_that_went_back_sends_its_waiters_away() -> None:
    async def test(live: LiveChannels) -> None:
        waiter = Told()
        live.add(waiter)
        live._told("shop", 5)
        await comes(lambda: waiter.heads)
        live._opened("shop", 3)
        assert waiter.ended == "restarted"
        assert live.count == 0

    in_loop(test)


def test_after_the_end_nobody_waits() -> None:
    async def test(live: LiveChannels) -> None:
        waiter = Told()
        live.add(waiter)
        live.close()
        assert waiter.ended == "shutdown"
        with pytest.raises(ServerBusyError):
            live.add(Told())

    in_loop(test)


# ---------------------------------------------------------------- who is revoked (R32)


def test_a_stream_of_a_revoked_device_ends_within_a_second_or_two_and_no_other():
    with running() as (server, url):
        one = Events(url, query=f"db_id=shop&device_id={'aa' * 16}")
        other = Events(url, query=f"db_id=shop&device_id={'bb' * 16}")
        assert one.next()
        assert other.next()
        server.front.control.revoke(Revoked("device", "aa" * 16, 0, "root"))
        began = time.monotonic()
        bye = one.next()
        assert bye is not None
        assert (bye["event"], bye["data"]) == ("bye", "revoked")
        assert time.monotonic() - began < 10
        server.database("shop").collection("notes")[uuid.uuid4()] = {"a": 1}
        told = other.next()
        assert told is not None
        assert told["event"] == "head"
        with Client(url) as client:
            refused = client.request("GET", f"/v1/live?db_id=shop&device_id={'aa' * 16}")
        assert refused.error.details == {"reason": "revoked"}


def test_those_who_wait_leave_half_of_the_connections_to_those_who_ask() -> None:
    with running(connections_max=4) as (_, url):
        kept = [Events(url), Events(url)]
        assert [each.response.status for each in kept] == [200, 200]
        assert Events(url).response.status == 503


@pytest.mark.parametrize(
    "query",
    [
        b"db_id=a&db_id=b",
        b"db_id=a&cursor=1&cursor=1",
        b"x=1&db_id=a&x=1",
        # An empty one is one too.
        b"db_id=&db_id=b",
        b"db_id=a&cursor&cursor=1",
    ],
)
def test_a_parameter_that_is_there_twice_is_refused(query: bytes) -> None:
    with pytest.raises(ProtocolError, match="names a parameter twice"):
        LiveRequest(query, {})
    with pytest.raises(ProtocolError, match="names a parameter twice"):
        SegmentRequest("GET", f"{SEGMENTS_PATH}{'a' * 64}", query.decode())
    assert LiveRequest(b"db_id=a&cursor=1&x=1&y=", {}).cursor == 1


def test_an_empty_cursor_is_no_commit() -> None:
    with pytest.raises(ProtocolError, match="cursor is the number of a commit"):
        LiveRequest(b"db_id=a&cursor=", {})

"""Pages that go with the news of them: what leaves, and for whom."""

from __future__ import annotations

import base64
import http.client
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from msgspec.structs import replace

from entidb import protocol
from entidb.protocol import PullRequest, PullResponse
from entidb.server import Grants, Rights, SyncServer, carrying
from entidb.server.control import Revoked
from entidb.sync.carried import CarriedPage, page_in, question
from tests.server.support import DEVICE, Client, pull, push
from tests.server.test_live import Events, add, running

pytestmark = pytest.mark.process

OTHER = b"o" * 16


def asks(server: SyncServer, **changes: Any) -> PullRequest:
    history = server.database("shop").history
    assert history is not None
    request = PullRequest(
        db_id="shop", device_id=DEVICE, history=history, cursor=0, limit=1000, bytes_max=1 << 20
    )
    return replace(request, **changes)


def opened(url: str, request: PullRequest, token: str | None = None) -> Events:
    """A stream that has had its first word."""
    query = f"db_id=shop&device_id={request.device_id.hex()}&pages={question(request)}"
    events = Events(url, token, query)
    told = events.next()
    assert told is not None and told["event"] == "head"
    return events


def page_of(told: dict[str, str] | None, request: PullRequest) -> CarriedPage:
    assert told is not None and told["event"] == "page"
    said = page_in(request, told["data"])
    assert said is not None and said[1] is not None and told["id"] == str(said[0])
    return said[1]


def test_a_page_is_byte_for_byte_what_a_pull_from_there_brings() -> None:
    with running() as (server, url), Client(url) as client:
        first = add(server)
        request = asks(server)
        events = opened(url, request)
        for text in ("a", "b"):
            head = add(server, text)
            page = page_of(events.next(), request)
            assert (page.begins, page.head, page.history) == (head - 1, head, request.history)
            asked = client.send(pull(request.history, cursor=page.begins))
            theirs = protocol.decode(PullResponse, asked.body)
            mine = page.opened()
            assert mine is not None and replace(mine, time=theirs.time) == theirs
            assert protocol.encode(mine) == page.body
        assert first == 1


def test_a_stream_that_did_not_ask_gets_numbers() -> None:
    with running() as (server, url):
        events = Events(url, None, f"db_id=shop&device_id={DEVICE.hex()}")
        events.next()
        add(server)
        told = events.next()
        assert told is not None and told["event"] == "head"


def test_where_a_pull_would_be_refused_there_is_no_page() -> None:
    with running() as (server, url):
        events = opened(url, asks(server, history=b"x" * 16))
        add(server)
        told = events.next()
        assert told is not None and told["event"] == "head"


def test_a_large_page_stays_where_it_is_and_the_next_one_comes() -> None:
    with running() as (server, url):
        request = asks(server)
        events = opened(url, request)
        head = add(server, "x" * carrying.CARRIED_BYTES_MAX)
        assert events.next() == {"id": str(head), "event": "head", "data": str(head)}
        add(server, "small")
        assert page_of(events.next(), request).begins == head


def test_many_entities_in_one_commit_are_no_page_where_they_are_more_than_it_takes() -> None:
    with running() as (server, url):
        events = opened(url, asks(server))
        database = server.database("shop")
        with database.transaction() as tx:
            for _ in range(carrying.CARRIED_OPERATIONS_MAX + 100):
                tx.collection("notes")[uuid.uuid4()] = {}
        told = events.next()
        assert told is not None
        # A commit is never split, so this one is whole, and too large.
        assert told["event"] == "head" or len(told["data"]) < carrying.CARRIED_BYTES_MAX * 3


def test_who_wrote_it_is_told_the_number_alone() -> None:
    with running() as (server, url), Client(url) as client:
        request = asks(server)
        mine = opened(url, request)
        others = opened(url, replace(request, device_id=OTHER))
        client.send(push(request.history, 1))
        told = mine.next()
        assert told is not None and told["event"] == "head"
        assert page_of(others.next(), request).begins == 0


def test_one_page_is_made_for_all_who_ask_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = carrying._read_in

    def counted(*rest: Any) -> bytes:
        made.append(1)
        return real(*rest)

    monkeypatch.setattr(carrying, "_read_in", counted)
    with running() as (server, url):
        request = asks(server)
        streams = [opened(url, replace(request, device_id=bytes([n]) * 16)) for n in range(1, 6)]
        streams += [opened(url, replace(request, collections=["lists"]))]
        add(server)
        pages = [page_of(each.next(), request) for each in streams]
        assert len({page.body for page in pages[:5]}) == 1
        assert pages[5].body != pages[0].body
        assert len(made) == 2


def token_of(names: frozenset[str] | None) -> Callable[[str | None], Grants]:
    def authenticate(token: str | None) -> Grants:
        few = frozenset(["lists"]) if token == "few" else names
        return Grants(token or "", {"shop": Rights(read=True, write=True, collections=few)})

    return authenticate


def test_a_page_holds_what_the_token_of_its_stream_grants() -> None:
    with running(authenticator=token_of(None)) as (server, url):
        request = asks(server)
        narrow, wide = opened(url, request, "few"), opened(url, request, "all")
        add(server, "secret")
        seen = page_of(narrow.next(), request)
        assert b"secret" not in seen.body
        page = seen.opened()
        assert page is not None and page.granted == ["lists"] and page.commits == []
        assert b"secret" in page_of(wide.next(), request).body


def test_who_is_revoked_gets_no_page_from_that_moment_on() -> None:
    with running(authenticator=token_of(None)) as (server, url):
        request = asks(server)
        locked, other = opened(url, request, "a"), opened(url, request, "b")
        control = server.front.control
        control.revoke(Revoked("subject", "a", 0, "root"))
        add(server)
        told = locked.next()
        assert told is not None and told["event"] in ("head", "bye")
        assert page_of(other.next(), request).begins == 0


def test_a_page_counts_as_a_request() -> None:
    with running(authenticator=token_of(None), subject_requests_per_s=0.001) as (server, url):
        request = asks(server)
        events = opened(url, request, "a")
        kinds = []
        for text in map(str, range(15)):
            add(server, text)
            told = events.next()
            assert told is not None
            kinds.append(told["event"])
        # Ten are what a bucket holds at first.
        assert kinds == ["page"] * 10 + ["head"] * 5


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "%%%",
        base64.urlsafe_b64encode(b"\xa0").decode(),
        "other database",
        "other device",
        "full",
    ],
)
def test_a_question_that_cannot_be_meant_is_refused(text: str) -> None:
    with running() as (server, url):
        given = {
            "other database": lambda: question(asks(server, db_id="other")),
            "other device": lambda: question(asks(server, device_id=OTHER)),
            "full": lambda: question(asks(server, full=True)),
        }
        pages = given[text]() if text in given else text
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 0, timeout=30)
        headers = {"accept": "text/event-stream"}
        address = f"/v1/live?db_id=shop&device_id={DEVICE.hex()}&pages={pages}"
        connection.request("GET", address, headers=headers)
        response = connection.getresponse()
        assert response.status == 400
        assert protocol.decode(protocol.ErrorResponse, response.read()).code == "invalid_message"
        connection.close()


def test_pages_are_counted() -> None:
    with running(metrics=True) as (server, url), Client(url) as client:
        request = asks(server)
        events = opened(url, request)
        add(server)
        page_of(events.next(), request)
        told = client.request("GET", "/metrics").body.decode()
        assert "entidb_carried_pages_total 1.0" in told


def test_the_registry_notes_where_a_page_leads() -> None:
    with running() as (server, url), Client(url) as client:
        request = asks(server)
        client.send(pull(request.history))
        events = opened(url, request)
        head = add(server)
        page_of(events.next(), request)
        [device] = server.registry.devices("shop")
        assert device.cursor == head

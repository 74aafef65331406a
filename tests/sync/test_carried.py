"""A page that comes with a hint is taken for a pull where it is one, and else is a hint."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import Database, SyncConfig, SyncEngine
from entidb.protocol import PullRequest, PullResponse, encode
from entidb.server import SyncServer, serving
from entidb.server.carrying import event_text
from entidb.sync import HttpTransport, LoopbackClient, RetryConfig
from entidb.sync.carried import Carried, CarriedPage, page_in, question
from entidb.sync.live import ChannelCourse, Event, Next, OpenStream
from tests.server.test_app import eventually

HISTORY = b"h" * 16


def request(**changes: Any) -> PullRequest:
    made = PullRequest(
        db_id="shop", device_id=b"d" * 16, history=HISTORY, cursor=7, limit=10, bytes_max=1000
    )
    return replace(made, **changes)


def page(**changes: Any) -> CarriedPage:
    return replace(CarriedPage(request(cursor=0), HISTORY, 7, 9, b"x"), **changes)


# ---------------------------------------------------------------- whether it is the next pull's


def test_it_answers_a_pull_from_where_it_begins() -> None:
    assert page().answers(request())
    assert page(begins=8).answers(request(have=[(8, 8)]))


@pytest.mark.parametrize(
    "asked",
    [
        request(cursor=6),
        request(cursor=8),
        request(have=[(8, 8)]),
        request(have=[(9, 9)]),
        request(history=b"o" * 16),
        request(collections=["notes"]),
        request(schema=2),
        request(full=True),
    ],
)
def test_it_answers_no_other(asked: PullRequest) -> None:
    assert not page().answers(asked)


def test_what_an_event_says_is_read_and_what_is_no_event_is_not() -> None:
    text = event_text(HISTORY, 7, 9, b"\x00body").split(b"data: ")[1].strip().decode()
    assert page_in(request(), text) == (9, CarriedPage(request(), HISTORY, 7, 9, b"\x00body"))
    assert page_in(None, text) == (9, None)
    words = text.split(" ")
    for bad in (
        "",
        "9",
        text + " more",
        " ".join(["xy", *words[1:]]),
        " ".join([words[0], "9", "7", words[3]]),
        " ".join([words[0], "7", "9" * 20, words[3]]),
    ):
        assert page_in(request(), bad) is None
    assert page_in(request(), " ".join([*words[:3], "AAA"])) == (9, None)


def test_a_page_that_cannot_be_read_is_none() -> None:
    assert page(body=b"\xff").opened() is None
    answer = PullResponse(
        collections=[], commits=[], cursor=9, has_more=False, head=9, floor=0, time=1
    )
    assert page(body=encode(answer)).opened() == answer
    assert page(body=encode(answer), head=10).opened() is None


def test_a_scope_that_no_address_can_hold_is_not_asked_for() -> None:
    asked = question(request())
    assert asked is not None and "=" not in asked
    base64.urlsafe_b64decode(asked + "==")
    assert question(request(collections=["n" * 200 + str(n) for n in range(30)])) is None


def test_of_several_only_the_newest_counts_and_a_hint_without_one_takes_it_back() -> None:
    carried = Carried()
    assert carried.take() is None
    carried.put(page(head=8))
    carried.put(page(head=9))
    assert carried.take() == page(head=9) and carried.take() is None
    carried.put(page())
    carried.put(None)
    assert carried.take() is None


# ---------------------------------------------------------------- on a stream


def test_the_first_word_of_a_stream_is_no_page_whatever_it_brings() -> None:
    told: list[Any] = []
    course = ChannelCourse(
        lambda: 0.0,
        lambda: 0.0,
        news=lambda head, first: told.append((head, first)),
        changed=lambda state: None,
        asks=request,
        page=told.append,
    )
    steps = course.run()
    assert next(steps) == OpenStream(refresh=False, asks=request())
    text = event_text(HISTORY, 7, 9, b"x").split(b"data: ")[1].strip().decode()
    assert steps.send(None) == Next()
    steps.send(Event("page", text))
    steps.send(Event("page", text))
    steps.send(Event("page", "nothing"))
    steps.send(Event("head", "10"))
    came = CarriedPage(request(), HISTORY, 7, 9, b"x")
    assert told == [None, (9, True), came, (9, False), None, (10, False)]


# ---------------------------------------------------------------- in a cycle


class Device:
    """A device that is up to date, and a page that leads it on."""

    def __init__(self, server: SyncServer) -> None:
        self.server = server
        self.database = Database.in_memory()
        client = LoopbackClient(server)
        config = SyncConfig(db_id="shop", retry=RetryConfig.none())
        transport = HttpTransport("http://localhost", client=client)
        self.engine = SyncEngine(config, transport, self.database)
        self.engine.sync()

    def page(self, **changes: Any) -> CarriedPage:
        """What a pull would bring now."""
        self.engine._attempts.connection.features.append("pages")
        asked = self.engine.asks_pages()
        assert asked is not None
        answer = self.server.handle("/v1/pull", None, asked)
        assert isinstance(answer, PullResponse)
        answer = replace(answer, **changes)
        return CarriedPage(asked, asked.history, asked.cursor, answer.head, encode(answer))

    def write(self, text: str) -> None:
        self.server.database("shop").collection("notes").add({"text": text})

    @property
    def texts(self) -> set[str]:
        return {note["text"] for note in self.database.collection("notes").values()}


@pytest.fixture
def device() -> Iterator[Device]:
    with SyncServer.in_memory() as server:
        server.database("shop")
        made = Device(server)
        yield made
        made.engine.close()


def test_a_page_is_a_pull_without_a_request(device: Device) -> None:
    device.write("a")
    device.engine.page_came(device.page())
    result = device.engine.sync()
    assert (result.requests, result.pulled) == (0, 1) and result.bytes_pulled > 0
    assert device.texts == {"a"} and device.engine.status().cursor == 1
    # It was taken once.
    assert device.engine.sync().requests == 1


def test_what_waits_is_pushed_after_the_page_in_one_request(device: Device) -> None:
    device.write("a")
    came = device.page()
    device.database.collection("notes").add({"text": "mine"})
    device.engine.page_came(came)
    result = device.engine.sync()
    assert (result.requests, result.pulled, result.pushed) == (1, 1, 1)
    assert len(list(device.server.database("shop").collection("notes").values())) == 2


def test_a_page_from_elsewhere_is_a_hint(device: Device) -> None:
    device.write("a")
    came = device.page()
    device.engine.sync()
    device.write("b")
    device.engine.page_came(came)
    result = device.engine.sync()
    assert (result.requests, result.pulled) == (1, 1) and device.texts == {"a", "b"}


@pytest.mark.parametrize("changes", [{"granted": ["notes"]}, {"granted": []}])
def test_a_page_under_another_grant_is_a_hint(device: Device, changes: dict[str, Any]) -> None:
    device.write("a")
    device.engine.page_came(device.page(**changes))
    result = device.engine.sync()
    assert result.requests == 1 and device.texts == {"a"}


def test_the_first_page_of_several_is_followed_by_the_others(device: Device) -> None:
    device.write("a")
    first = device.page()
    device.write("b")
    now = device.page()
    opened = first.opened()
    assert opened is not None
    body = encode(replace(opened, has_more=True, head=2))
    device.engine.page_came(replace(now, body=body))
    result = device.engine.sync()
    assert (result.requests, result.pulled) == (1, 2) and device.texts == {"a", "b"}


def test_a_handshake_forgets_the_page_before_it(device: Device) -> None:
    device.write("a")
    device.engine.page_came(device.page())
    device.engine._attempts.connection.forget()
    assert device.engine.sync().requests == 2 and device.texts == {"a"}


# ---------------------------------------------------------------- over the wire


def background(url: str, **settings: Any) -> tuple[SyncEngine, list[Any]]:
    engine = SyncEngine(SyncConfig(db_id="shop", **settings), url, Database.in_memory())
    results: list[Any] = []
    engine.on_result(results.append)
    engine.start()
    eventually(lambda: engine.status().live == "live" and len(results) >= 2)
    return engine, results


@pytest.mark.process
@pytest.mark.parametrize(("wanted", "requests"), [(True, 0), (False, 1)])
def test_what_others_write_comes_with_its_news_unless_that_is_turned_off(
    wanted: bool, requests: int
) -> None:
    with SyncServer.in_memory() as server:
        server.database("shop")
        with serving(server) as url:
            engine, results = background(url, live_pages=wanted)
            del results[:]
            server.database("shop").collection("notes").add({"text": "a"})
            eventually(lambda: any(result.pulled for result in results))
            assert [each.requests for each in results if each.pulled] == [requests]
            engine.close()

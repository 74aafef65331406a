"""The channel of hints from the device's side: what to do next, and doing it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from entidb.errors import (
    AuthenticationError,
    PermissionDeniedError,
    ServerBusyError,
    SyncCancelledError,
    SyncError,
    TransportError,
)
from entidb.server import Grants, Rights, SyncServer, serving
from entidb.sync import HttpTransport, live
from entidb.sync.http.news import HttpEvents
from entidb.sync.live import (
    POLL_INSTEAD_S,
    Ask,
    Channel,
    ChannelCourse,
    Event,
    HeldUpError,
    LiveState,
    OpenStream,
    Policy,
    Wait,
)
from entidb.types import SystemClock
from tests.server.test_app import eventually
from tests.tools import closed_port, free_port

DEVICE = b"d" * 16
#: Far above what a busy machine takes, and below any time that a channel waits by itself.
PROMPT_S = 10.0


def policy(draw: float = 1.0) -> Policy:
    return Policy(lambda: draw)


# ---------------------------------------------------------------- what to do next


def test_it_begins_with_a_stream() -> None:
    assert policy().next(0.0) == OpenStream(refresh=False)


def test_a_stream_that_is_held_up_gives_way_to_polls_and_is_tried_again_later() -> None:
    steps = policy()
    steps.held_up(100.0)
    assert steps.next(100.0) == Ask(refresh=False)
    steps.answered(101.0)
    assert steps.state is LiveState.POLLING
    assert isinstance(steps.next(101.0), Wait)
    assert steps.next(100.0 + POLL_INSTEAD_S) == OpenStream(refresh=False)


def test_failures_wait_longer_each_time_up_to_a_bound() -> None:
    steps, now, waits = policy(), 0.0, []
    for _ in range(10):
        steps.failed(now, TransportError("cut"))
        step = steps.next(now)
        assert isinstance(step, Wait)
        waits.append(step.seconds)
        now += step.seconds
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(waits) == 60.0


def test_a_stream_that_lived_for_a_while_begins_anew_with_short_waits() -> None:
    steps = policy()
    for _ in range(8):
        steps.failed(0.0, TransportError("cut"))
    steps.failed(0.0, TransportError("cut"), 500.0)
    assert steps.next(0.0) == Wait(1.0)


def test_a_stream_that_ended_as_it_should_begins_anew_with_short_waits_too() -> None:
    steps = policy()
    for _ in range(8):
        steps.failed(0.0, TransportError("cut"))
    steps.said_goodbye(0.0, Event("bye", "shutdown", 3000), 500.0)
    steps.failed(10.0, TransportError("the server is still away"))
    assert steps.next(10.0) == Wait(1.0)


def test_a_time_of_years_that_a_server_names_counts_as_an_hour() -> None:
    steps = policy(0.0)
    steps.failed(0.0, ServerBusyError("many", retry_after=999_999_999.0))
    assert steps.next(0.0) == Wait(3600.0)
    steps = policy(0.0)
    steps.said_goodbye(0.0, Event("bye", "shutdown", 999_999_999), 100.0)
    assert steps.next(0.0) == Wait(3600.0)


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("no"),
        PermissionDeniedError("no", code="revoked"),
        PermissionDeniedError("no", code="too_many_devices"),
    ],
)
def test_who_was_shut_out_listens_again_when_a_cycle_has_worked(error: SyncError) -> None:
    steps = policy()
    steps.failed(0.0, error)
    if steps.next(0.0) == OpenStream(refresh=True):
        steps.failed(0.0, error)
    assert isinstance(steps.next(1.0), Wait)
    steps.nudged(worked=True)
    assert steps.next(1.0) == OpenStream(refresh=False)
    steps.failed(1.0, PermissionDeniedError("there are no news here"))
    steps.nudged(worked=True)
    assert isinstance(steps.next(1.0), Wait), "that says nothing of news"


def test_who_wants_it_tried_now_waits_no_longer_than_the_server_asked() -> None:
    steps = policy()
    for _ in range(8):
        steps.failed(0.0, TransportError("cut"))
    steps.nudged(worked=False)
    assert steps.next(0.0) == OpenStream(refresh=False)
    steps.failed(0.0, ServerBusyError("many", retry_after=7.0))
    assert cast(Wait, steps.next(0.0)).seconds > 7
    steps.nudged(worked=False)
    assert steps.next(0.0) == Wait(7.0)


def test_what_the_server_says_of_when_to_come_again_is_kept() -> None:
    steps = policy(0.0)
    steps.failed(0.0, ServerBusyError("many", retry_after=7.0))
    assert steps.next(0.0) == Wait(7.0)
    steps = policy(0.0)
    steps.said_goodbye(0.0, Event("bye", "shutdown", 3000), 100.0)
    assert steps.next(0.0) == Wait(3.0)


def test_the_end_of_a_token_asks_for_a_fresh_one_at_once() -> None:
    steps = policy()
    steps.said_goodbye(0.0, Event("bye", "token", 0), 100.0)
    assert steps.next(0.0) == OpenStream(refresh=True)
    assert steps.next(0.0) == OpenStream(refresh=False)


def test_a_refused_token_is_refreshed_once_and_then_waits() -> None:
    steps = policy()
    steps.failed(0.0, AuthenticationError("no"))
    assert steps.next(0.0) == OpenStream(refresh=True)
    steps.failed(0.0, AuthenticationError("no"))
    assert isinstance(steps.next(0.0), Wait)
    steps = policy()
    steps.failed(0.0, AuthenticationError("no"))
    steps.opened()
    steps.failed(0.0, AuthenticationError("no"))
    assert steps.next(0.0) == OpenStream(refresh=True)


def test_a_server_that_refuses_is_not_asked_again_for_minutes() -> None:
    steps = policy(0.0)
    steps.failed(0.0, PermissionDeniedError("no"))
    step = steps.next(0.0)
    assert isinstance(step, Wait) and step.seconds >= 100


def test_a_stream_that_ends_at_once_each_time_is_no_loop() -> None:
    steps = policy()
    steps.said_goodbye(0.0, Event("bye", "time", 0), 0.01)
    assert isinstance(steps.next(0.0), Wait)
    steps = policy()
    steps.said_goodbye(0.0, Event("bye", "time", 0), 300.0)
    assert steps.next(0.0) == OpenStream(refresh=False)


def test_a_poll_that_is_answered_at_once_without_news_is_no_loop() -> None:
    """A gateway that answers by itself, or drops what the poll names, was asked 20 times a second
    for as long as streams were held up."""
    now, heard = [0.0], Heard()
    course = ChannelCourse(
        lambda: now[0], lambda: 0.0, news=heard.news, changed=heard.states.append
    ).run()
    assert course.send(None) == OpenStream(refresh=False)
    course.throw(HeldUpError())
    asked = 0
    step = course.send(7)
    while isinstance(step, Wait) and now[0] < live.POLL_INSTEAD_S - 200:
        now[0] += step.seconds
        assert isinstance(course.send(None), Ask)
        asked += 1
        step = course.send(7)
    assert asked < 20
    assert isinstance(step, Wait)
    now[0] += step.seconds
    course.send(None)
    step = course.send(8)
    assert isinstance(step, Wait) and step.seconds < 0.1, "news is worth asking for the next"
    now[0] += 0.06
    assert isinstance(course.send(None), Ask)
    now[0] += 25.0
    step = course.send(8)
    assert isinstance(step, Wait) and step.seconds < 0.1, "and this one has waited"
    course.close()


def test_a_poll_that_names_less_than_before_is_a_first_word() -> None:
    """The database is another one: whatever the device has, there is something to pull."""
    now, heard = [0.0], Heard()
    course = ChannelCourse(
        lambda: now[0], lambda: 0.0, news=heard.news, changed=heard.states.append
    ).run()
    assert course.send(None) == OpenStream(refresh=False)
    assert course.throw(HeldUpError()) == Ask(refresh=False, known=None)
    for head in (10, 12, 5, 5):
        pause = course.send(head)
        assert isinstance(pause, Wait)
        now[0] += pause.seconds
        assert course.send(None) == Ask(refresh=False, known=head)
    assert heard.heads == [(10, True), (12, False), (5, True), (5, False)]
    course.close()
    assert heard.states == [LiveState.POLLING, LiveState.OFFLINE]


@pytest.mark.parametrize("data", ["\u00b2", "\u0663", "9" * 5000, "", "-1", "1.5", str(2**64)])
def test_a_commit_that_is_none_is_no_news_and_ends_nothing(data: str) -> None:
    heads: list[int] = []
    course = ChannelCourse(
        lambda: 0.0,
        lambda: 0.0,
        news=lambda head, first: heads.append(head),
        changed=lambda state: None,
    ).run()
    assert isinstance(next(course), OpenStream)
    course.send(None)
    course.send(Event("head", data))
    course.send(Event("head", "7"))
    assert heads == [7]


class Piece:
    """One answer that comes as it is, and has an end."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __iter__(self) -> Iterator[bytes]:
        yield self._text.encode()

    def arrived(self) -> None: ...


@pytest.mark.parametrize(("retry", "known"), [("\u00b2", None), ("12", 12), ("9" * 20, None)])
def test_a_time_to_come_again_that_is_none_is_passed_over(retry: str, known: int | None) -> None:
    events = HttpEvents(cast("Any", Piece(f"retry: {retry}\nevent: bye\ndata: time\n\n")))
    assert events.next() == Event("bye", "time", known)


# ---------------------------------------------------------------- over a network


@contextlib.contextmanager
def served(**settings: Any) -> Iterator[tuple[SyncServer, str]]:
    with SyncServer.in_memory(**settings) as server:
        server.database("shop")
        with serving(server) as url:
            yield server, url


class Heard:
    """What a channel says."""

    def __init__(self) -> None:
        self.heads: list[tuple[int, bool]] = []
        self.states: list[LiveState] = []

    def news(self, head: int, first: bool) -> None:
        self.heads.append((head, first))


@contextlib.contextmanager
def listening(
    url: str,
    heard: Heard,
    token: str | Callable[[bool], str] | None = None,
    *,
    draw: float = 0.1,
) -> Iterator[Channel]:
    with HttpTransport(url, token=token) as transport:
        source = transport.news("shop", DEVICE)
        assert source is not None
        channel = Channel(
            source,
            SystemClock(),
            lambda: draw,
            news=heard.news,
            changed=heard.states.append,
        )
        channel.start()
        try:
            yield channel
        finally:
            channel.stop()


def add(server: SyncServer) -> int:
    database = server.database("shop")
    database.collection("notes").add({"n": 1})
    return database.read_head().sequence


@pytest.mark.process
def test_a_commit_on_the_server_is_heard_of_at_once() -> None:
    heard = Heard()
    with served() as (server, url), listening(url, heard) as channel:
        eventually(lambda: heard.heads == [(0, True)])
        assert channel.state is LiveState.LIVE
        head = add(server)
        eventually(lambda: heard.heads == [(0, True), (head, False)])


@pytest.mark.process
def test_a_channel_stops_at_once_from_anywhere() -> None:
    heard = Heard()
    with served() as (_, url), listening(url, heard) as channel:
        eventually(lambda: bool(heard.heads))
        began = time.monotonic()
        channel.stop()
        assert time.monotonic() - began < PROMPT_S
        eventually(lambda: heard.states == [LiveState.LIVE, LiveState.OFFLINE])
        assert channel.state is LiveState.OFFLINE


@pytest.mark.process
def test_after_a_restart_of_the_server_it_is_heard_again() -> None:
    heard = Heard()
    with contextlib.ExitStack() as stack:
        server = SyncServer.in_memory()
        server.database("shop")
        port = free_port()
        first = contextlib.ExitStack()
        url = first.enter_context(serving(server, port=port))
        stack.enter_context(server)
        stack.enter_context(listening(url, heard))
        eventually(lambda: len(heard.heads) == 1)
        first.close()
        eventually(lambda: heard.states[-1] is LiveState.OFFLINE)
        add(server)  # while nobody hears of it: with the first word of the next stream it comes
        stack.enter_context(serving(server, port=port))
        eventually(lambda: heard.heads[-1] == (1, True))


@pytest.mark.process
def test_a_stream_that_something_gathers_gives_way_to_polls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "FIRST_EVENT_S", 0.3)
    heard = Heard()
    with served() as (server, url), gathering_proxy(url) as proxy, listening(proxy, heard):
        eventually(lambda: heard.states[-1:] == [LiveState.POLLING])
        eventually(lambda: heard.heads)
        assert heard.heads[0] == (0, True)
        head = add(server)
        eventually(lambda: (head, False) in heard.heads)
        count = len(heard.heads)
        time.sleep(0.3)
        assert len(heard.heads) <= count + 1, "polls turn in a circle"


@contextlib.contextmanager
def gathering_proxy(url: str) -> Iterator[str]:
    """A proxy that passes an answer on when it is complete, as many do with what they pack."""
    host, port = url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = [listener]

    def serve(client: socket.socket) -> None:
        upstream = socket.create_connection((host, int(port)))
        open_sockets.append(upstream)
        with client, upstream, contextlib.suppress(OSError):
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    piece = client.recv(65536)
                    if not piece:
                        return
                    head += piece
                upstream.sendall(head)
                answer = b""
                while True:
                    answer += upstream.recv(65536)
                    top, found, body = answer.partition(b"\r\n\r\n")
                    length = [
                        int(line.split(b":")[1])
                        for line in top.split(b"\r\n")
                        if line.lower().startswith(b"content-length")
                    ]
                    if found and length and len(body) >= length[0]:
                        break
                client.sendall(answer)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                open_sockets.append(client)
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for each in open_sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.mark.process
def test_the_token_is_asked_for_again_when_the_stream_ends_for_its_token() -> None:
    asked: list[bool] = []

    def provide(refresh: bool) -> str:
        asked.append(refresh)
        return "t"

    def authenticate(token: str | None) -> Grants:
        rights = {"shop": Rights(read=True, write=True)}
        return Grants("a", rights, {}, time.time() + 10.2)

    heard = Heard()
    with served(authenticator=authenticate) as (_, url), listening(url, heard, provide):
        eventually(lambda: len(heard.heads) >= 2)
    assert asked[:2] == [False, True]


@pytest.mark.process
def test_no_server_is_no_loop_and_stops_at_once() -> None:
    heard = Heard()
    with closed_port() as port, listening(f"http://127.0.0.1:{port}", heard, draw=60.0) as channel:
        time.sleep(0.2)
        assert channel.state is LiveState.OFFLINE
        began = time.monotonic()
        channel.stop()
        assert time.monotonic() - began < PROMPT_S
        # It waits to try again, for a minute if nobody ends that.
        eventually(lambda: channel.thread is None or not is_alive(channel.thread))
        assert time.monotonic() - began < 3 * PROMPT_S
    assert heard.heads == []


def is_alive(ident: int) -> bool:
    return any(thread.ident == ident for thread in threading.enumerate())


class Refusing:
    """A source that counts how often it is asked."""

    def __init__(self, error: SyncError) -> None:
        self.error = error
        self.count = 0

    def open(self, **options: Any) -> live.Events:
        self.count += 1
        raise self.error

    def poll(self, known: int | None, *, refresh: bool) -> int:
        raise self.error

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def test_what_was_cancelled_for_another_reason_does_not_end_the_channel() -> None:
    source = Refusing(SyncCancelledError("somebody stopped a cycle"))
    channel = Channel(source, SystemClock(), lambda: 0.01, news=lambda head, first: None)
    channel.start()
    eventually(lambda: source.count >= 2)
    channel.stop()

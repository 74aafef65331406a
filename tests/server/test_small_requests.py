"""What a small request does not pay for: timers that never end, copies, and a thread to read in."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.protocol import PullRequest, PullResponse
from entidb.server import ServerConfig, SyncServer, serving, warmth
from entidb.server.cycle import RequestCycle
from entidb.server.deadlines import Deadline, within
from entidb.server.read_answers import ReadAnswers
from entidb.server.threads import PAGES_AHEAD, _Line
from entidb.server.warmth import SMALL_BYTES, SMALL_OPERATIONS, WARM_PAGES, Warmth, is_small
from tests.server.support import Client, pull, push

# ---------------------------------------------------------------- time limits


class _Timer:
    def __init__(self, due: float, call: Any) -> None:
        self.due = due
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class _Loop:
    """Time, and the timers that were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[_Timer] = []
        self._left: list[_Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, call: Any) -> _Timer:
        timer = _Timer(due, call)
        self.made.append(timer)
        self._left.append(timer)
        return timer

    def pass_until(self, then: float) -> None:
        while due := [t for t in self._left if t.due <= then and not t.cancelled]:
            first = min(due, key=lambda timer: timer.due)
            self._left.remove(first)
            self.now = first.due
            first.call()
        self.now = then


def _deadline(seconds: float = 10.0) -> tuple[Any, Deadline, list[float]]:
    loop: Any = _Loop()
    ends: list[float] = []
    return loop, Deadline(loop, seconds, lambda: ends.append(loop.now)), ends


def test_a_limit_that_always_stops_in_time_makes_one_timer() -> None:
    loop, limit, ends = _deadline()
    for step in range(9):
        loop.pass_until(float(step))
        limit.start()
        assert limit.running
        limit.stop()
        assert not limit.running
    assert len(loop.made) == 1
    loop.pass_until(100.0)
    assert ends == [] and len(loop.made) == 1


def test_a_limit_ends_its_seconds_after_its_last_start_whatever_its_timer_was_made_for() -> None:
    loop, limit, ends = _deadline()
    limit.start()
    loop.pass_until(7.0)
    limit.stop()
    limit.start()
    loop.pass_until(8.0)
    limit.start()  # it is running, and goes on as it was
    loop.pass_until(16.0)
    assert ends == []
    loop.pass_until(17.0)
    assert ends == [17.0] and not limit.running


def test_a_limit_that_has_ended_leaves_nothing_in_the_loop() -> None:
    loop, limit, ends = _deadline()
    limit.start()
    limit.end()
    assert [timer.cancelled for timer in loop.made] == [True]
    loop.pass_until(100.0)
    assert ends == []


def test_work_that_does_not_wait_is_awaited_without_a_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> int:
        return 7

    def none(*_: object) -> None:
        raise AssertionError("a timer was made")

    monkeypatch.setattr("entidb.server.deadlines.asyncio.timeout", none)
    assert asyncio.run(_awaited(60.0, work())) == 7


async def _awaited(seconds: float, work: Any) -> Any:
    return await within(seconds, work)


async def _over_many_waits(result: int) -> int:
    for _ in range(3):
        await asyncio.sleep(0)
    await asyncio.sleep(0.001)
    return result


def test_work_that_waits_goes_on_from_where_it_was() -> None:
    assert asyncio.run(_awaited(60.0, _over_many_waits(7))) == 7


@pytest.mark.parametrize("waits", [False, True])
def test_what_work_raises_is_raised(waits: bool) -> None:
    async def work() -> None:
        if waits:
            await asyncio.sleep(0)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        asyncio.run(_awaited(60.0, work()))


def test_work_that_waits_for_too_long_is_ended_and_cleans_up() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    with pytest.raises(TimeoutError):
        asyncio.run(_awaited(0.01, work()))
    assert ended == ["cleaned up"]


def test_who_is_cancelled_while_work_waits_is_cancelled_and_not_out_of_time() -> None:
    async def story() -> None:
        task = asyncio.ensure_future(_awaited(60.0, asyncio.Event().wait()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())


# ---------------------------------------------------------------- one request and its answer


class _Transport:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


class _Flow:
    write_paused = False
    reads = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


def _cycle(method: str = "POST", **named: Any) -> tuple[RequestCycle, _Transport, list[str]]:
    transport, done = _Transport(), []
    cycle = RequestCycle(
        scope={"method": method, "http_version": "1.1"},
        transport=transport,
        flow=_Flow(),
        logger=None,
        access_logger=None,
        access_log=False,
        default_headers=[(b"date", b"today")],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        on_response=lambda: done.append("answered"),
        **{"keep_alive": True, **named},
    )
    return cycle, transport, done


async def _answer(
    cycle: RequestCycle, *pieces: bytes, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    await cycle.send({"type": "http.response.start", "status": 200, "headers": list(headers)})
    for number, piece in enumerate(pieces, 1):
        more = number < len(pieces)
        await cycle.send({"type": "http.response.body", "body": piece, "more_body": more})


LENGTH = (b"content-length", b"5")


def test_a_small_answer_is_written_at_once_and_says_what_uvicorn_would_say() -> None:
    cycle, transport, done = _cycle()
    asyncio.run(_answer(cycle, b"hello", headers=((b"x-id", b"1"), LENGTH)))
    expected = b"HTTP/1.1 200 OK\r\ndate: today\r\nx-id: 1\r\ncontent-length: 5\r\n\r\nhello"
    assert transport.written == [expected]
    assert done == ["answered"] and cycle.response_complete and not transport.is_closed


@pytest.mark.parametrize(
    ("named", "headers", "pieces"),
    [
        ({"method": "HEAD"}, (LENGTH,), (b"hello",)),
        ({"keep_alive": False}, (LENGTH,), (b"hello",)),
        ({}, (LENGTH, (b"connection", b"close")), (b"hello",)),
        ({}, (LENGTH,), (b"he", b"llo")),
        ({}, (), (b"hello",)),
    ],
)
def test_any_other_answer_goes_the_usual_way(
    named: dict[str, Any], headers: Any, pieces: tuple[bytes, ...]
) -> None:
    cycle, transport, done = _cycle(**named)
    asyncio.run(_answer(cycle, *pieces, headers=headers))
    assert len(transport.written) > ("method" not in named)
    assert done == ["answered"] and cycle.response_complete
    closes = "keep_alive" in named or len(headers) == 2
    assert transport.is_closed == closes
    whole = b"".join(transport.written)
    assert whole.startswith(b"HTTP/1.1 200 OK\r\ndate: today\r\n")
    assert (b"transfer-encoding: chunked" in whole) == (not headers)


@pytest.mark.parametrize("bad", [b"one\r\ntwo: 2", b"one\ntwo"])
def test_a_header_that_would_be_two_is_never_written(bad: bytes) -> None:
    cycle, transport, done = _cycle()
    with pytest.raises(RuntimeError, match="header"):
        asyncio.run(_answer(cycle, b"hello", headers=((b"x-id", bad), LENGTH)))
    assert transport.written == [] and done == []


def test_a_length_that_is_not_that_of_the_body_is_an_error() -> None:
    cycle, _, _ = _cycle()
    with pytest.raises(RuntimeError, match="longer than Content-Length"):
        asyncio.run(_answer(cycle, b"hello!", headers=(LENGTH,)))


def test_an_app_that_fails_after_the_head_of_its_answer_answers_with_an_error() -> None:
    class _Log:
        def error(self, *_: object, **__: object) -> None:
            return None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [LENGTH]})
        raise KeyError("broken")

    cycle, transport, _ = _cycle()
    cycle.logger = _Log()  # type: ignore[assignment]
    asyncio.run(cycle.run_asgi(app))
    assert transport.written[0].startswith(b"HTTP/1.1 500 ")


def test_a_body_that_comes_in_one_piece_is_not_copied() -> None:
    cycle, _, _ = _cycle()
    piece = bytes(1000)
    cycle.came(piece)
    cycle.more_body = False
    message = asyncio.run(cycle.receive())
    assert message["body"] is piece and not message["more_body"]


def test_pieces_that_come_before_anybody_asks_are_one_and_a_lot_of_them_stop_the_reading() -> None:
    async def story() -> None:
        cycle, _, _ = _cycle()
        flow: Any = cycle.flow
        for number in range(3):
            cycle.came(bytes([number]) * 30_000)
        assert not flow.reads
        message = await cycle.receive()
        assert message["body"] == b"".join(bytes([n]) * 30_000 for n in range(3))
        assert message["more_body"] and flow.reads
        waiting = asyncio.ensure_future(cycle.receive())
        await asyncio.sleep(0)
        assert not waiting.done()
        cycle.came(b"rest")
        assert (await waiting)["body"] == b"rest"

    asyncio.run(story())


# ---------------------------------------------------------------- small pages


@pytest.mark.parametrize("counted", [None, 7])
def test_a_database_is_warm_after_many_small_pages_without_a_wait_and_cold_after_one_with(
    counted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the system counts of this thread may change between any two lines.
    monkeypatch.setattr(warmth, "waits", lambda: counted)
    known = Warmth(counted=True)
    for _ in range(WARM_PAGES):
        assert not known.is_warm
        known.read(counted, 100)
    assert known.is_warm == (counted is not None)
    known.read(6, 100)
    assert not known.is_warm


@pytest.mark.skipif(sys.platform != "linux", reason="nobody counts here what a thread waits for")
def test_the_system_counts_how_often_a_thread_has_waited() -> None:
    before = warmth.waits()
    assert before is not None and (warmth.waits() or 0) >= before >= 0


def test_a_store_that_can_wait_for_more_than_a_file_is_never_warm() -> None:
    known = Warmth(counted=False)
    for _ in range(2 * WARM_PAGES):
        known.read(warmth.waits(), 100)
    assert not known.is_warm


def test_large_answers_to_small_requests_are_for_the_readers_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warmth, "waits", lambda: 7)
    known = Warmth(counted=True)
    for _ in range(WARM_PAGES):
        known.read(7, 100)
    assert known.is_warm
    known.read(7, SMALL_BYTES + 1)
    assert not known.is_warm


def test_a_small_request_asks_for_few_operations() -> None:
    def asking(limit: int, **fields: Any) -> PullRequest:
        return pull(bytes(16), limit=limit, **fields)

    assert is_small(asking(SMALL_OPERATIONS)) and not is_small(asking(SMALL_OPERATIONS + 1))


@pytest.fixture
def pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[str]]]:
    """A client of a server with 200 commits, and in which kind of thread its pages were read."""
    import threading

    threads: list[str] = []
    read = ReadAnswers._page

    def noted(self: ReadAnswers, *given: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        return read(self, *given)

    monkeypatch.setattr(ReadAnswers, "_page", noted)
    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True, create_databases=True)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        history = client.history()
        client.send(push(history, *range(1, 201)))

        def page(cursor: int = 0, limit: int = 2) -> None:
            wanted = pull(history, cursor=cursor, limit=limit)
            answer = client.send(wanted).message(PullResponse)
            assert [commit.version for commit in answer.commits] == [
                *range(cursor + 1, cursor + 1 + limit)
            ]

        yield page, threads


@pytest.mark.process
@pytest.mark.skipif(warmth.waits() is None, reason="nobody counts here what a thread waits for")
def test_small_pages_are_read_at_once_while_reading_them_waits_for_no_disk(
    pulled: tuple[Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, threads = pulled
    # Whether the system has something better to do with its memory is not the subject.
    waited = [0]
    monkeypatch.setattr("entidb.server.warmth.waits", lambda: waited[0])
    monkeypatch.setattr("entidb.server.read_answers.waits", lambda: waited[0])
    for cursor in range(WARM_PAGES):
        page(cursor)
    assert set(threads) == {"entidb-reader"}
    threads.clear()
    page(3)
    page(3, limit=SMALL_OPERATIONS + 1)
    assert threads[0] == "entidb-server" and threads[1] == "entidb-reader"
    threads.clear()
    monkeypatch.setattr("entidb.server.read_answers.waits", lambda: waited[0] - 1)
    page(5)
    page(6)
    assert threads == ["entidb-server", "entidb-reader"]


# ---------------------------------------------------------------- waiting for a turn


def test_who_waits_for_a_small_page_goes_on_when_those_are_read_at_once_and_others_stay() -> None:
    async def story() -> None:
        line = _Line()
        turns = [line.take() for _ in range(PAGES_AHEAD)]
        assert all(turns) and not line.take()
        small = [asyncio.ensure_future(line.wait(small=True)) for _ in range(3)]
        large = [asyncio.ensure_future(line.wait(small=False)) for _ in range(2)]
        await asyncio.sleep(0)
        line.hurry()
        assert [await each for each in small] == [False] * 3
        await asyncio.sleep(0)
        assert not any(each.done() for each in large)
        line.give()
        assert await large[0]
        line.give()
        assert await large[1]
        for _ in range(2):
            line.give()
        assert [line.take() for _ in range(PAGES_AHEAD + 1)] == [True] * PAGES_AHEAD + [False]

    asyncio.run(story())


def test_who_gives_up_waiting_for_a_turn_takes_none_away() -> None:
    async def story() -> None:
        line = _Line()
        for _ in range(PAGES_AHEAD):
            assert line.take()
        gone, late, next_one = (asyncio.ensure_future(line.wait(small=False)) for _ in range(3))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        line.give()  # for the second one, who leaves at that very moment
        late.cancel()
        assert await next_one
        assert gone.cancelled() and late.cancelled()

    asyncio.run(story())

"""One tenant does not stop the others: room, turns and threads are shared between databases."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import CorruptionError, ServerBusyError
from entidb.protocol import PullRequest, encode
from entidb.server import ServerConfig, SyncServer, create_app, serving
from entidb.server.app import SyncApp
from entidb.server.front import Front
from entidb.server.hooks import Grant
from entidb.server.room import SMALL_BYTES, Budget
from entidb.server.service import DatabaseService
from tests.server.support import Client, pull, push
from tests.server.test_app import _served, eventually, head, raw, running

pytestmark = pytest.mark.process

WAIT_S = 60.0


# ---------------------------------------------------------------- room


def test_one_database_never_holds_all_room() -> None:
    budget = Budget(1000)
    while budget.take(10, ("database", "greedy")):
        continue
    assert 700 <= budget.used <= 800
    assert budget.take(200, ("database", "other"))
    assert not budget.take(10, ("database", "greedy"))


def test_many_greedy_databases_leave_room_for_one_more() -> None:
    budget = Budget(10_000)
    greedy = [("database", str(number)) for number in range(8)]
    for _ in range(1000):
        for account in greedy:
            budget.take(10, account)
    assert budget.take(300, ("database", "other"))


def test_who_holds_more_than_its_share_lets_those_behind_it_pass() -> None:
    async def story() -> None:
        budget = Budget(100)
        greedy, other = ("database", "greedy"), ("database", "other")
        assert budget.take(75, greedy)
        assert not budget.take(10, greedy)
        waiting = asyncio.ensure_future(budget.wait(10, greedy))
        await asyncio.sleep(0)
        await asyncio.wait_for(budget.wait(20, other), 1)
        assert not waiting.done()
        budget.give(75, greedy)
        await waiting
        budget.give(20, other)
        budget.give(10, greedy)
        assert budget.used == 0

    asyncio.run(story())


def test_who_gives_up_waiting_lets_those_behind_it_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entidb.server.room.ROOM_WAIT_S", 0.05)

    async def story() -> None:
        budget = Budget(100)
        assert budget.take(60, ("database", "first"))
        large = asyncio.ensure_future(budget.wait(90, ("database", "large")))
        await asyncio.sleep(0)
        monkeypatch.setattr("entidb.server.room.ROOM_WAIT_S", WAIT_S)
        small = asyncio.ensure_future(budget.wait(40, ("database", "small")))
        with pytest.raises(TimeoutError):
            await large
        await asyncio.wait_for(small, WAIT_S)

    asyncio.run(story())


def test_what_a_request_holds_moves_with_whom_it_is_charged_to() -> None:
    budget = Budget(100 << 10)
    with budget.hold() as held:
        held.take(10 << 10)
        held.charge(("subject", "ann"))
        held.take(20 << 10)
        held.charge(("database", "shop"))
        assert budget.used == 30 << 10
        held.resize(50 << 10)
        assert budget._used_by == {("database", "shop"): 50 << 10}
        with budget.hold() as other, pytest.raises(ServerBusyError):
            other.take(60 << 10)
    assert budget.used == 0
    assert not budget._used_by


def test_who_asks_for_little_waits_where_there_is_no_room_and_is_not_refused() -> None:
    """Many devices of one subject ask a server that has just been started for a page: each is
    given room for a large one, until it is known how large they are."""

    async def story() -> None:
        budget = Budget(100 << 10)
        ann = ("subject", "ann")
        with budget.hold() as first, budget.hold() as second:
            first.charge(ann)
            await first.reserve(100 << 10)
            second.charge(ann)
            second.take(SMALL_BYTES // 2)
            second.take(SMALL_BYTES // 2)
            with pytest.raises(ServerBusyError):
                second.take(1)
            waiting = asyncio.create_task(second.reserve(50 << 10))
            await asyncio.sleep(0)
            assert not waiting.done()
            first.resize(1 << 10)
            await waiting
            assert budget.used == 51 << 10
        assert budget.used == 0
        assert not budget._used_by

    asyncio.run(story())


def test_readers_that_do_not_read_do_not_make_another_database_wait() -> None:
    room = 63 << 20
    # Without another end to them: only sharing can help the other one.
    with running(write_timeout_s=600, in_flight_bytes_max=room) as (_, url):
        with Client(url) as client:
            greedy, other = client.history(db_id="greedy"), client.history(db_id="other")
            client.send(push(greedy, 1, db_id="greedy", value="x" * (8 << 20)))
            client.send(push(other, 1, db_id="other", value="here"))
        # In full, so that nothing is answered before it stands in line.
        request = encode(pull(greedy, db_id="greedy", full=True))
        stuck = [raw(url) for _ in range(60)]
        try:
            for connection in stuck:
                connection.sendall(head("/v1/pull", content_length=len(request)) + request)
            with Client(url) as client:
                for _ in range(20):
                    answer = client.send(pull(other, db_id="other", full=True))
                    assert answer.status == 200
        finally:
            for connection in stuck:
                connection.close()


# ---------------------------------------------------------------- turns


@contextlib.contextmanager
def slow_pages(monkeypatch: pytest.MonkeyPatch, db_id: str) -> Iterator[threading.Semaphore]:
    """Pages of ``db_id`` are read when the semaphore lets them."""
    go_on = threading.Semaphore(0)
    real = DatabaseService.pull_bytes

    def slow(self: DatabaseService, request: PullRequest, grant: Grant, view: Any) -> bytes:
        if self.db_id == db_id:
            assert go_on.acquire(timeout=WAIT_S)
        return real(self, request, grant, view)

    with monkeypatch.context() as patch:
        patch.setattr(DatabaseService, "pull_bytes", slow)
        yield go_on


def waiting(app: SyncApp) -> int:
    """How many stand in front of the reader."""
    assert app._running is not None
    return app._running.reader._work_queue.qsize()


def test_databases_take_turns_in_front_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(SyncServer.in_memory())
        app = create_app(server)
        url = stack.enter_context(_served(app))
        client = stack.enter_context(Client(url))
        greedy, other = client.history(db_id="greedy"), client.history(db_id="other")
        client.send(push(greedy, 1, db_id="greedy"))
        client.send(push(other, 1, db_id="other"))

        def read(db_id: str, history: bytes) -> int:
            with Client(url) as own:
                return own.send(pull(history, db_id=db_id, full=True)).status

        with slow_pages(monkeypatch, "greedy") as go_on, ThreadPoolExecutor(12) as pool:
            many = [pool.submit(read, "greedy", greedy) for _ in range(10)]
            # Of ten one is being read, and one stands behind it.
            eventually(lambda: waiting(app) == 1)
            mine = pool.submit(read, "other", other)
            eventually(lambda: waiting(app) == 2)
            go_on.release(2)
            assert mine.result(WAIT_S) == 200
            assert sum(each.done() for each in many) <= 2
            go_on.release(8)
            assert [each.result(WAIT_S) for each in many] == [200] * 10


def test_a_broken_database_is_opened_again_while_others_wait_in_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("entidb.server.threads.PAGES_AHEAD", 1)
    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        history = client.history()
        client.send(push(history, 1))
        broken = server.stores.try_use("shop")
        assert broken is not None
        server.stores.release(broken)
        real = DatabaseService.pull_bytes
        entered, fail = threading.Event(), threading.Event()

        def read(self: DatabaseService, request: PullRequest, grant: Grant, view: Any) -> bytes:
            if self is broken.service:
                entered.set()
                assert fail.wait(WAIT_S)
                raise CorruptionError("a page is damaged")
            return real(self, request, grant, view)

        monkeypatch.setattr(DatabaseService, "pull_bytes", read)

        def ask() -> int:
            with Client(url) as own:
                return own.send(pull(history, full=True)).status

        with ThreadPoolExecutor(6) as pool:
            first = pool.submit(ask)
            assert entered.wait(WAIT_S)
            waiting = [pool.submit(ask) for _ in range(5)]
            # The one that reads is a user; those behind it are not, once they wait.
            eventually(lambda: broken.users == 1)
            fail.set()
            assert first.result(WAIT_S) == 500
            # They find it opened again, each in its turn.
            assert [each.result(WAIT_S) for each in waiting] == [200] * 5
        now = server.stores.try_use("shop")
        assert now is not None
        assert now is not broken
        server.stores.release(now)


# ---------------------------------------------------------------- threads


def test_a_database_whose_pushes_take_long_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    real = DatabaseService.push_many

    def slow(self: DatabaseService, members: Any) -> Any:
        if self.db_id == "greedy":
            assert go_on.wait(WAIT_S)
        return real(self, members)

    monkeypatch.setattr(DatabaseService, "push_many", slow)
    with running() as (_, url), Client(url) as client:
        greedy, other = client.history(db_id="greedy"), client.history(db_id="other")

        def flood(number: int) -> int:
            with Client(url) as own:
                return own.send(push(greedy, number, db_id="greedy")).status

        with ThreadPoolExecutor(20) as pool:
            many = [pool.submit(flood, number) for number in range(20)]
            assert client.send(push(other, 1, db_id="other")).status == 200
            assert client.send(pull(other, db_id="other", full=True)).status == 200
            assert client.request("GET", "/healthz").status == 200
            assert not any(each.done() for each in many)
            go_on.set()
            assert [each.result(WAIT_S) for each in many] == [200] * 20


def test_large_messages_are_decoded_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    real = Front.decode

    def decode(self: Front, path: str, body: bytes) -> Any:
        names.append(threading.current_thread().name)
        return real(self, path, body)

    monkeypatch.setattr(Front, "decode", decode)
    with running() as (_, url), Client(url) as client:
        history = client.history()
        names.clear()
        assert client.send(push(history, 1, value="x" * 300_000)).status == 200
    (name,) = names
    assert name.startswith("entidb-unpacker")

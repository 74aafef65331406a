"""Ending and cancelling: promptly, from anywhere, whatever the network does, and nothing is lost.

Bounds of time are generous: what these tests would wait for without an interrupt takes minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import CommitEvent, Database
from entidb.errors import (
    ConfigError,
    DatabaseClosedError,
    ServerBusyError,
    SyncCancelledError,
    SyncStateError,
    TransportError,
)
from entidb.protocol import PushRequest, SyncRequest, SyncResponse
from entidb.server import SyncServer
from entidb.sync import (
    AsyncSyncEngine,
    HttpResponse,
    HttpTransport,
    HttpxClient,
    LoopbackClient,
    MockTransport,
    RetryConfig,
    SyncConfig,
    SyncEngine,
    SyncProgress,
    SyncState,
    SyncTransport,
)
from tests.support import FakeClock, World, assert_in_step, uid

#: Far below any timeout of the settings and the 30 s after which an end waits no more, far above
#: 100 ms on a busy machine.
PROMPT_S = 15.0
LONG_S = 600.0
CONFIG = SyncConfig(
    db_id="shop",
    retry=RetryConfig.none(),
    interval_s=3600.0,
    connect_timeout_s=LONG_S,
    read_timeout_s=LONG_S,
    total_timeout_s=LONG_S,
)


class Network:
    """A URL behind which nothing ever answers; ``reached`` is set when a request waits there."""

    def __init__(self, url: str, reached: threading.Event) -> None:
        self.url = url
        self.reached = reached
        self.connections: list[socket.socket] = []

    def wait_until_closed(self) -> None:
        """Every connection that was made is closed by the device."""
        for each in self.connections:
            each.settimeout(PROMPT_S)
            with contextlib.suppress(ConnectionError):
                while each.recv(65536):
                    pass


@contextlib.contextmanager
def accepting_and_silent(scheme: str) -> Iterator[Network]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        network = Network(f"{scheme}://127.0.0.1:{port}", threading.Event())

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    network.connections.append(connection)
                    connection.recv(1, socket.MSG_PEEK)
                    network.reached.set()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield network
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for each in network.connections:
                each.close()
            thread.join(PROMPT_S)


@contextlib.contextmanager
def swallowing_packets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """A backlog that is full: Linux drops what would be one connection more."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        reached = threading.Event()
        connect = socket.create_connection

        def connecting(*arguments: Any, **named: Any) -> socket.socket:
            reached.set()
            return connect(*arguments, **named)

        monkeypatch.setattr(socket, "create_connection", connecting)
        yield Network(f"http://127.0.0.1:{port}", reached)


@contextlib.contextmanager
def no_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    reached, over = threading.Event(), threading.Event()

    def lookup(*arguments: Any, **named: Any) -> Any:
        reached.set()
        over.wait(LONG_S)
        raise socket.gaierror(socket.EAI_AGAIN, "no name server")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    try:
        yield Network("http://sync.example.org", reached)
    finally:
        over.set()


NETWORKS = ["silent server", "silent TLS", "swallowed packets", "no name server"]


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    made = {
        "silent server": lambda: accepting_and_silent("http"),
        "silent TLS": lambda: accepting_and_silent("https"),
        "swallowed packets": lambda: swallowing_packets(monkeypatch),
        "no name server": lambda: no_name_server(monkeypatch),
    }
    with made[request.param]() as found:
        yield found


@contextlib.contextmanager
def prompt() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < PROMPT_S


def written() -> Database:
    db = Database.in_memory()
    db.collection("notes")[uid(1)] = "mine"
    return db


def reached(network: Network) -> None:
    assert network.reached.wait(60)


# ---------------------------------------------------------------- whatever the network does


def test_cancelling_a_blocking_cycle_ends_it_and_its_connection(network: Network) -> None:
    with written() as db, SyncEngine(CONFIG, network.url, db) as engine:

        def cancel() -> None:
            reached(network)
            engine.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(SyncCancelledError):
            engine.sync()
        thread.join()
        assert engine.state is SyncState.IDLE
        assert engine.status().pending == 1
        network.wait_until_closed()


@pytest.mark.parametrize("end", [SyncEngine.stop, SyncEngine.close])
def test_ending_the_background_waits_for_no_network(
    network: Network, end: Callable[[SyncEngine], None]
) -> None:
    before = set(threading.enumerate())
    with written() as db:
        engine = SyncEngine(CONFIG, network.url, db)
        engine.start()
        reached(network)
        with prompt():
            end(engine)
        assert engine.state is SyncState.IDLE
        network.wait_until_closed()
        engine.close()
        SyncEngine(CONFIG, network.url, db).close()
        begun = set(threading.enumerate()) - before
        assert not [each for each in begun if each.name == "entidb-sync"]


@pytest.mark.parametrize("way", ["sync", "run", "close", "timeout", "stop"])
def test_a_task_ends_whatever_the_network_does(network: Network, way: str) -> None:
    async def main() -> None:
        db = written()
        engine = AsyncSyncEngine(CONFIG, network.url, db)
        task = asyncio.create_task(engine.sync() if way == "sync" else engine.run())
        while not network.reached.is_set():
            await asyncio.sleep(0.001)
        with prompt():
            if way == "close":
                await engine.close()
                await task
            elif way == "stop":
                engine.stop()
                await task
            elif way == "timeout":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(task, 0.01)
            else:
                task.cancel()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert engine.state is SyncState.IDLE
        network.wait_until_closed()
        await engine.close()
        SyncEngine(CONFIG, network.url, db).close()
        db.close()

    asyncio.run(main())


@pytest.mark.parametrize("way", ["provider", "client", "transport", "server"])
def test_somebody_elses_part_that_blocks_is_left_to_itself(way: str) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def block() -> None:
        inside.set()
        go_on.wait(LONG_S)

    def provider(refused: bool) -> str:
        block()
        return "token"

    class Client:
        def request(self, *arguments: Any) -> HttpResponse:
            block()
            raise TransportError("the network went away")

        def close(self) -> None:
            pass

    def answer(request: SyncRequest) -> SyncResponse:
        block()
        raise TransportError("the network went away")

    class SlowLoopback(LoopbackClient):
        def request(self, *arguments: Any) -> HttpResponse:
            block()
            return super().request(*arguments)

    with SyncServer.in_memory() as server, written() as db:
        url = "http://localhost"
        makers: dict[str, Callable[[], SyncTransport]] = {
            "provider": lambda: HttpTransport(url, token=provider, client=LoopbackClient(server)),
            "client": lambda: HttpTransport(url, client=Client()),
            "transport": lambda: MockTransport(answer),
            "server": lambda: HttpTransport(url, client=SlowLoopback(server)),
        }
        engine = SyncEngine(CONFIG, makers[way](), db)
        engine.start()
        assert inside.wait(60)
        with prompt():
            engine.stop()
        assert engine.state is SyncState.IDLE
        go_on.set()
        with contextlib.suppress(TransportError):
            engine.sync()  # waits for what was left to itself, and goes on
        engine.close()


def test_a_transport_is_not_used_again_before_what_was_left_to_itself_is_over() -> None:
    inside, go_on = threading.Event(), threading.Event()
    under_way: list[int] = [0]
    most: list[int] = [0]

    def answer(request: SyncRequest) -> SyncResponse:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        inside.set()
        go_on.wait(LONG_S)
        under_way[0] -= 1
        raise TransportError("the network went away")

    with written() as db, SyncEngine(CONFIG, MockTransport(answer), db) as engine:
        engine.start()
        assert inside.wait(60)
        engine.stop()
        threading.Timer(0.05, go_on.set).start()
        with pytest.raises(TransportError):
            engine.sync()
        assert most == [1]


def test_what_was_in_flight_when_it_was_cancelled_is_settled_by_the_next_cycle() -> None:
    """The server commits and its answer never comes (R5, R24)."""
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    stuck, go_on = threading.Event(), threading.Event()

    def silent(request: SyncRequest) -> None:
        if isinstance(request, PushRequest) and not stuck.is_set():
            stuck.set()
            go_on.wait(LONG_S)

    a.wire.after = silent

    def cancel() -> None:
        assert stuck.wait(60)
        a.engine.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(SyncCancelledError):
        a.sync()
    thread.join()
    go_on.set()
    assert a.pending + len(a.engine.applier.inflight()) > 0
    a.settle()
    assert_in_step(world, a)
    assert world.server.collection("notes")[uid(1)] == "x"


def test_a_kept_connection_that_was_cut_is_replaced_by_the_next_cycle(tmp_path: Path) -> None:
    from entidb.server import ServerConfig, serving

    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True, access_log=False)
    with serving(config) as url, written() as db, SyncEngine(CONFIG, url, db) as engine:
        engine.sync()
        engine.on_state(
            lambda old, new: engine.cancel() if new is SyncState.PULLING and not went else None
        )
        went: list[int] = []
        with pytest.raises(SyncCancelledError):
            engine.sync()
        went.append(1)
        db.collection("notes")[uid(2)] = "more"
        assert engine.sync().pushed == 1


def test_a_client_that_was_interrupted_refuses_until_it_may_go_on(tmp_path: Path) -> None:
    from entidb.server import ServerConfig, serving

    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True, access_log=False)
    with serving(config) as url:
        client = HttpxClient()
        client.interrupt()
        with pytest.raises(SyncCancelledError):
            client.request("GET", f"{url}/healthz", {}, b"", PROMPT_S)
        client.resume()
        assert client.request("GET", f"{url}/healthz", {}, b"", PROMPT_S).status == 200
        client.close()


# ---------------------------------------------------------------- from anywhere


def loopback(server: SyncServer) -> HttpTransport:
    return HttpTransport("http://localhost", client=LoopbackClient(server))


def engine_of(server: SyncServer, db: Database) -> SyncEngine:
    return SyncEngine(CONFIG, loopback(server), db)


def in_another_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


PLACES = ["state listener", "progress listener", "observer"]
HOWS: dict[str, Callable[[SyncEngine], object]] = {
    "stop": SyncEngine.stop,
    "close": SyncEngine.close,
    "cancel": SyncEngine.cancel,
    "stop in another thread": lambda engine: in_another_thread(engine.stop),
    "close in another thread": lambda engine: in_another_thread(engine.close),
}


def call_once(engine: SyncEngine, db: Database, place: str, work: Callable[[], object]) -> None:
    went: list[int] = []

    def once(*arguments: Any) -> None:
        if not went:
            went.append(1)
            work()

    def observer(event: CommitEvent) -> None:
        if event.origin == "sync":
            once()

    if place == "observer":
        db.observe(observer)
    elif place == "progress listener":
        engine.on_progress(once)
    else:
        engine.on_state(lambda old, new: once() if new is SyncState.PULLING else None)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("background", [False, True])
def test_an_engine_can_be_ended_from_inside_a_cycle(place: str, how: str, background: bool) -> None:
    ended = threading.Event()
    with SyncServer.in_memory() as server, written() as db:
        server.database("shop").collection("notes")[uid(2)] = "theirs"
        engine = SyncEngine(CONFIG, loopback(server), db)

        def work() -> None:
            with prompt():
                HOWS[how](engine)
            ended.set()

        call_once(engine, db, place, work)
        if background:
            engine.start()
            assert ended.wait(60)
            engine.stop()
        else:
            with contextlib.suppress(SyncCancelledError):
                engine.sync()
            assert ended.is_set()
        engine.close()
        with SyncEngine(CONFIG, loopback(server), db) as another:
            another.sync()
            assert another.status().pending == 0
        assert db.collection("notes")[uid(2)] == "theirs"
        assert server.database("shop").collection("notes")[uid(1)] == "mine"


def test_a_closed_engine_lets_go_of_the_database_when_the_listeners_cycle_is_over() -> None:
    with SyncServer.in_memory() as server, written() as db:
        engine = SyncEngine(CONFIG, loopback(server), db)
        engine.on_state(lambda old, new: engine.close())
        with pytest.raises(SyncCancelledError):
            engine.sync()
        with pytest.raises(DatabaseClosedError):
            engine.sync()
        with pytest.raises(DatabaseClosedError):
            engine.start()
        SyncEngine(CONFIG, loopback(server), db).close()


def test_a_listener_can_start_again_what_it_stopped() -> None:
    with SyncServer.in_memory() as server, written() as db, engine_of(server, db) as engine:
        again, synced = [True], threading.Event()

        def listener(old: SyncState, new: SyncState) -> None:
            if new is SyncState.CONNECTING and again.pop():
                again.append(False)
                engine.stop()
                engine.start()
            if new is SyncState.SYNCED:
                synced.set()

        engine.on_state(listener)
        engine.start()
        assert synced.wait(60)


def test_stopping_inside_a_transaction_does_not_wait_for_a_cycle_that_waits_for_it() -> None:
    with SyncServer.in_memory() as server, written() as db:
        connecting = threading.Event()
        engine = SyncEngine(CONFIG, loopback(server), db)
        engine.on_state(lambda old, new: connecting.set())
        with db.transaction() as tx:
            tx.collection("notes")[uid(3)] = "more"
            engine.start()
            assert connecting.wait(60)
            with prompt():
                engine.stop()
        engine.close()
        assert db.collection("notes")[uid(3)] == "more"


def test_a_reset_inside_a_cycle_is_refused_instead_of_waiting_for_itself() -> None:
    refused: list[SyncStateError] = []
    with SyncServer.in_memory() as server, written() as db, engine_of(server, db) as engine:

        def listener(step: SyncProgress) -> None:
            with pytest.raises(SyncStateError) as caught:
                engine.reset("server")
            refused.append(caught.value)

        engine.on_progress(listener)
        engine.sync()
    assert refused


def test_a_reset_by_a_token_provider_is_refused_although_it_runs_on_a_helpers_thread() -> None:
    refused: list[str] = []
    with SyncServer.in_memory() as server, written() as db:

        def provider(refresh: bool) -> str:
            with contextlib.suppress(SyncStateError):
                engine.reset("server")
                return "the reset went through in the middle of a cycle"
            refused.append(threading.current_thread().name)
            return "token"

        client = LoopbackClient(server)
        transport = HttpTransport("http://localhost", token=provider, client=client)
        with SyncEngine(CONFIG, transport, db) as engine:
            cycle = threading.Thread(target=engine.sync, daemon=True)
            cycle.start()
            cycle.join(PROMPT_S)
            waits_for_itself = cycle.is_alive()
            engine.cancel()
            cycle.join(PROMPT_S)
        assert not waits_for_itself
        assert set(refused) == {"entidb-token"}
        assert server.database("shop").collection("notes")[uid(1)] == "mine"


@pytest.mark.parametrize("way", ["stop", "cancel", "engine.close"])
def test_a_listener_of_the_asyncio_engine_can_end_it(way: str) -> None:
    async def main() -> None:
        with SyncServer.in_memory() as server, written() as db:
            engine = AsyncSyncEngine(CONFIG, loopback(server), db)
            end = {
                "stop": engine.stop,
                "cancel": engine.cancel,
                "engine.close": engine.engine.close,
            }[way]
            call_once(engine.engine, db, "state listener", end)
            task = asyncio.create_task(engine.run())
            if way == "cancel":
                while engine.state is not SyncState.IDLE:
                    await asyncio.sleep(0.001)
                while engine.stats.cycles < 1:
                    engine.wake()
                    await asyncio.sleep(0.001)
                engine.stop()
            async with asyncio.timeout(60):
                await task
            await engine.close()
            SyncEngine(CONFIG, loopback(server), db).close()

    asyncio.run(main())


def test_a_pool_full_of_other_work_keeps_no_asyncio_engine_from_ending() -> None:
    async def main() -> None:
        over = threading.Event()
        loop = asyncio.get_running_loop()
        for _ in range(64):
            loop.run_in_executor(None, over.wait, LONG_S)
        with SyncServer.in_memory() as server, written() as db:
            async with asyncio.timeout(60):
                async with AsyncSyncEngine(CONFIG, loopback(server), db) as engine:
                    assert (await engine.sync()).pushed == 1
        over.set()

    asyncio.run(main())


PROGRAM = """
import atexit, signal, sys, threading, time
from entidb import Database, SyncConfig, SyncEngine
from entidb.sync import RetryConfig
way, url = sys.argv[1:]
config = SyncConfig(db_id="shop", retry=RetryConfig.none(), read_timeout_s=600.0,
                    total_timeout_s=600.0)
db = Database.in_memory()
engine = SyncEngine(config, url, db)
if way == "atexit":
    atexit.register(engine.close)
    engine.start()
    sys.stdin.readline()
elif way == "handler in the background":
    signal.signal(signal.SIGTERM, lambda *_: (engine.close(), sys.exit(0)))
    engine.start()
    time.sleep(600)
else:
    signal.signal(signal.SIGTERM, lambda *_: engine.cancel())
    try:
        engine.sync()
    except Exception as error:
        print(error.code, flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize("way", ["atexit", "handler in the background", "handler in a cycle"])
def test_a_program_ends_at_once_beside_a_silent_server(way: str) -> None:
    with accepting_and_silent("http") as network:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, way, network.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            reached(network)
            if way != "atexit":
                process.send_signal(signal.SIGTERM)
            with prompt():
                said, _ = process.communicate(input="\n", timeout=60)
            assert process.returncode == 0
            assert said == ("cancelled\n" if way == "handler in a cycle" else "")
        finally:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- trying again, and bugs


def test_waking_ends_a_wait_to_try_again() -> None:
    with SyncServer.in_memory() as server, written() as db:
        away = [True]

        class Client(LoopbackClient):
            def request(self, *arguments: Any) -> HttpResponse:
                if away[0]:
                    raise TransportError("no network here")
                return super().request(*arguments)

        config = SyncConfig(
            db_id="shop",
            interval_s=3600.0,
            retry=RetryConfig(delay_initial_s=3600.0, delay_max_s=3600.0, jitter=False),
        )
        transport = HttpTransport("http://localhost", client=Client(server))
        with SyncEngine(config, transport, db) as engine:
            waiting, synced = threading.Event(), threading.Event()
            moves = {SyncState.RETRY_WAIT: waiting, SyncState.SYNCED: synced}
            engine.on_state(lambda old, new: moves[new].set() if new in moves else None)
            engine.start()
            assert waiting.wait(60)
            away[0] = False
            engine.wake()
            assert synced.wait(60)
            assert engine.status().pending == 0


def test_a_listener_of_the_wait_to_try_again_can_wake_it() -> None:
    def fail(request: SyncRequest) -> SyncResponse:
        raise TransportError("no network")

    retry = RetryConfig(attempts_max=3, delay_initial_s=3600.0, delay_max_s=3600.0, jitter=False)
    with (
        written() as db,
        SyncEngine(SyncConfig(db_id="shop", retry=retry), MockTransport(fail), db) as engine,
    ):
        engine.on_state(lambda old, new: engine.wake() if new is SyncState.RETRY_WAIT else None)
        with prompt(), pytest.raises(TransportError):
            engine.sync()
        assert engine.stats.retries == 2


def test_an_asyncio_engine_that_waits_to_try_again_is_woken() -> None:
    async def main() -> None:
        tries: list[int] = []

        def fail(request: SyncRequest) -> SyncResponse:
            tries.append(1)
            raise TransportError("no network")

        retry = RetryConfig(delay_initial_s=3600.0, delay_max_s=3600.0, jitter=False)
        config = SyncConfig(db_id="shop", retry=retry, interval_s=3600.0)
        with written() as db:
            async with AsyncSyncEngine(config, MockTransport(fail), db) as engine:
                task = asyncio.create_task(engine.run())
                async with asyncio.timeout(60):
                    while engine.state is not SyncState.RETRY_WAIT:
                        await asyncio.sleep(0.001)
                    while len(tries) < 2:
                        engine.wake()
                        await asyncio.sleep(0.001)
                engine.stop()
                await task

    asyncio.run(main())


def test_waking_does_not_try_before_the_time_that_a_server_asked_for() -> None:
    said: list[float] = []

    def busy(request: SyncRequest) -> SyncResponse:
        said.append(clock.monotonic())
        raise ServerBusyError("later", retry_after=100.0)

    clock = FakeClock()
    config = SyncConfig(db_id="shop", retry=RetryConfig(attempts_max=2))
    with written() as db, SyncEngine(config, MockTransport(busy), db, clock=clock) as engine:
        engine.on_state(lambda old, new: engine.wake() if new is SyncState.RETRY_WAIT else None)
        with pytest.raises(ServerBusyError):
            engine.sync()
        assert said[1] - said[0] >= 100.0


class ABugOfAnotherKind(BaseException):
    pass


@pytest.mark.parametrize("kind", [ZeroDivisionError, asyncio.CancelledError, ABugOfAnotherKind])
def test_a_listeners_bug_does_not_end_an_asyncio_engine(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def bug() -> None:
        raise kind

    async def main() -> None:
        with SyncServer.in_memory() as server, written() as db:
            async with AsyncSyncEngine(CONFIG, loopback(server), db) as engine:
                call_once(engine.engine, db, "state listener", bug)
                task = asyncio.create_task(engine.run())
                async with asyncio.timeout(60):
                    while not told:
                        await asyncio.sleep(0.001)
                    status = await engine.status()
                    assert kind.__name__ in str(status.last_error)
                    while engine.stats.cycles < 1:
                        engine.wake()
                        await asyncio.sleep(0.001)
                engine.stop()
                await task

    asyncio.run(main())
    assert [type(each.exc_value) for each in told] == [kind]


async def a_coroutine(*arguments: Any) -> None:
    raise AssertionError("nobody awaits this")


class WithAsyncCall:
    async def __call__(self, *arguments: Any) -> None:
        raise AssertionError("nobody awaits this")


@pytest.mark.parametrize("wrong", [a_coroutine, WithAsyncCall()])
def test_a_token_function_that_nobody_would_await_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="token needs a plain function"):
        HttpTransport("http://localhost", token=wrong)


@pytest.mark.parametrize("wrong", [None, 3, "listener", a_coroutine, WithAsyncCall()])
@pytest.mark.parametrize("where", ["on_state", "on_progress", "observe"])
def test_what_cannot_be_called_is_refused_where_it_is_given(where: str, wrong: Any) -> None:
    with Database.in_memory() as db, SyncEngine(CONFIG, MockTransport([]), db) as engine:
        taker = db.observe if where == "observe" else getattr(engine, where)
        with pytest.raises(ConfigError, match=where):
            taker(wrong)
        db.collection("notes")[uid(1)] = "stored"


def test_of_two_threads_that_start_an_engine_at_once_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[threading.Thread] = []

    with SyncServer.in_memory() as server, Database.in_memory() as database:
        transport = HttpTransport("http://localhost", client=LoopbackClient(server))
        engine = SyncEngine(SyncConfig(db_id="shop"), transport, database)

        class AnotherFirst(threading.Thread):
            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(*args, **settings)
                made.append(self)
                if len(made) == 1:
                    other = threading.Thread(target=engine.start)
                    other.start()
                    other.join()

        monkeypatch.setattr("entidb.sync.engine.Thread", AnotherFirst)
        with pytest.raises(SyncStateError, match="already"):
            engine.start()
        assert [thread.ident is not None for thread in made] == [False, True]
        assert engine.synced(timeout_s=20)
        engine.stop()
        assert not made[1].is_alive()
        engine.start()
        assert engine.synced(timeout_s=20)
        engine.close()
        assert not made[2].is_alive()


@pytest.mark.parametrize("where", ["another thread", "a signal handler"])
def test_an_engine_is_stopped_between_two_steps_of_its_start(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[threading.Thread] = []
    raised: list[BaseException] = []

    with SyncServer.in_memory() as server, Database.in_memory() as database:
        transport = HttpTransport("http://localhost", client=LoopbackClient(server))
        engine = SyncEngine(SyncConfig(db_id="shop"), transport, database)

        def stop() -> None:
            try:
                engine.stop()
            except BaseException as error:
                raised.append(error)

        class StoppedFirst(threading.Thread):
            def start(self) -> None:
                if not begun:
                    begun.append(self)
                    if where == "another thread":
                        other = threading.Thread(target=stop)
                        other.start()
                        other.join()
                    else:
                        stop()
                super().start()

        monkeypatch.setattr("entidb.sync.engine.Thread", StoppedFirst)
        engine.start()
        assert raised == []
        begun[0].join(20)
        assert not begun[0].is_alive()
        database["notes"].add({"text": "while nothing runs"})
        assert server.database("shop")["notes"].where().count() == 0

        engine.start()
        assert engine.synced(timeout_s=20)
        engine.close()

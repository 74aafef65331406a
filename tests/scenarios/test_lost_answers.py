"""A wire that breaks: answers cut at every byte, tokens that end, a server that goes and comes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.errors import AuthenticationError, SyncError, TransportError
from entidb.protocol import PATHS
from entidb.server import ServerConfig, SyncServer, mint_token, serving
from entidb.sync import (
    HttpTransport,
    LoopbackClient,
    RetryConfig,
    SyncConfig,
    SyncEngine,
    SyncState,
)
from tests.support import FakeClock, assert_sound, uid
from tests.tools import free_port

SECRET = b"correct horse battery staple, twice over"
CONFIG = SyncConfig(db_id="shop", retry=RetryConfig.none(), compression="none")
WAIT_S = 60.0


# ---------------------------------------------------------------- every byte


class CuttingServer:
    """Answers HTTP with a real server's answers, and hangs up after ``bytes_max`` bytes of those
    that ``path`` gets. ``sent`` is how long the last of these was in full."""

    def __init__(self, server: SyncServer) -> None:
        self.server = server
        self.path = ""
        self.bytes_max = 0
        self.sent = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                while self._answer_one(connection, stream):
                    pass

    def _answer_one(self, connection: socket.socket, stream: object) -> bool:
        """One request; whether the connection is still good."""
        line: bytes = stream.readline()  # type: ignore[attr-defined]
        if not line:
            return False
        headers = {}
        while text := stream.readline().decode().strip():  # type: ignore[attr-defined]
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers["content-length"]))  # type: ignore[attr-defined]
        method, path, _ = line.decode().split()
        answer = self.server.handle_http(method, path, headers, body)
        head = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        data = (
            f"HTTP/1.1 {answer.status} OK\r\n{head}content-length: {len(answer.body)}\r\n\r\n"
        ).encode() + answer.body
        if path != self.path:
            connection.sendall(data)
            return True
        self.sent = len(data)
        connection.sendall(data[: self.bytes_max])
        # An answer that went out whole is a good one: hanging up behind it would race with the
        # request after it.
        return self.bytes_max >= len(data)

    def close(self) -> None:
        # Closing alone does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(WAIT_S)


@contextlib.contextmanager
def cutting() -> Iterator[tuple[SyncServer, CuttingServer]]:
    with SyncServer.in_memory(compression=False) as server:
        cutter = CuttingServer(server)
        try:
            yield server, cutter
        finally:
            cutter.close()


@pytest.mark.parametrize("path", sorted(PATHS.keys() - {"/v1/digest", "/v1/snapshot"}))
def test_an_answer_lost_at_any_byte_is_made_up_for_by_the_next_cycle(path: str):
    with cutting() as (server, cutter), Database.in_memory() as db:
        notes, there = db.collection("notes"), server.database("shop").collection("notes")
        if path != "/v1/sync":
            server.front._features.remove("sync")  # a device that knows it hardly pulls alone
        with SyncEngine(CONFIG, cutter.url, db) as engine:
            engine.sync()
        cuts = 0
        while True:
            cutter.path, cutter.bytes_max = path, cuts
            notes[uid(1)] = cuts
            there[uid(2)] = cuts
            with SyncEngine(CONFIG, cutter.url, db) as engine:
                before = server.database("shop").sequence
                try:
                    engine.sync()
                except TransportError:
                    assert cuts < cutter.sent
                else:
                    assert cuts == cutter.sent
                    break
                assert db.read_head().ready == 1
                cutter.path = ""
                engine.sync()
                # Taken once, however much of the answer came.
                assert server.database("shop").sequence == before + 1
                assert db.read_head().ready == 0
                assert (notes[uid(2)], there[uid(1)]) == (cuts, cuts)
            cuts += 1
        assert cuts > 150
        assert_sound(db, server.database("shop"))


# ---------------------------------------------------------------- a token that ends


class Tokens:
    """A token provider whose tokens last ten seconds of the server's clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.asked: list[bool] = []
        self.fresh = True
        self._token = self._mint()

    def _mint(self) -> str:
        return mint_token(
            SECRET, subject="ann", databases=["shop"], expires_s=10.0, clock=self.clock
        )

    def __call__(self, refused: bool) -> str:
        self.asked.append(refused)
        if refused and self.fresh:
            self._token = self._mint()
        return self._token


class Hooked(LoopbackClient):
    """Calls ``before`` with the path of every request, before it is made."""

    before: Callable[[str], object] = staticmethod(lambda path: None)

    def request(self, method, url, headers, body, timeout_s):
        self.before(url)
        return super().request(method, url, headers, body, timeout_s)


@contextlib.contextmanager
def guarded(
    tmp_path: Path, entities: int = 20
) -> Iterator[tuple[SyncServer, FakeClock, Tokens, Hooked, SyncEngine]]:
    """A server that wants tokens, and a device that needs many pages to get what is there."""
    (tmp_path / "secret").write_bytes(SECRET)
    clock = FakeClock()
    settings: dict[str, Any] = {"jwt_secret_file": tmp_path / "secret", "leeway_s": 0.0}
    with SyncServer.in_memory(clock=clock, **settings) as server:
        for n in range(entities):
            server.database("shop").collection("notes")[uid(n)] = n
        tokens, client = Tokens(clock), Hooked(server)
        config = SyncConfig(db_id="shop", retry=RetryConfig.none(), pull_operations_max=3)
        transport = HttpTransport("http://localhost", token=tokens, client=client)
        with Database.in_memory() as db, SyncEngine(config, transport, db) as engine:
            yield server, clock, tokens, client, engine


def expire_at_pull(clock: FakeClock, number: int) -> Callable[[str], None]:
    """Let ten seconds pass before the ``number``-th pull, and no more after it."""
    pulls = [0]

    def hook(url: str) -> None:
        if url.endswith("/v1/pull"):
            pulls[0] += 1
            if pulls[0] == number:
                clock.ms += 10_000

    return hook


@pytest.mark.parametrize("page", range(1, 8))
def test_a_token_that_expires_between_two_pages_is_renewed_once_and_the_cycle_goes_on(
    tmp_path: Path, page: int
):
    with guarded(tmp_path) as (server, clock, tokens, client, engine):
        client.before = expire_at_pull(clock, page)
        result = engine.sync()
        assert server.database("shop").sequence == 20
        assert tokens.asked.count(True) == 1
        assert (result.pulled, result.attempts, engine.state) == (20, 1, SyncState.SYNCED)


@pytest.mark.parametrize("page", range(1, 8))
def test_a_token_that_nobody_renews_stops_the_cycle_which_goes_on_from_its_page_later(
    tmp_path: Path, page: int
):
    with guarded(tmp_path) as (server, clock, tokens, client, engine):
        db = engine.applier.database
        db.collection("notes")[uid(100)] = "mine"
        tokens.fresh = False
        client.before = expire_at_pull(clock, page)
        with pytest.raises(AuthenticationError) as caught:
            engine.sync()
        assert (caught.value.code, caught.value.retryable) == ("unauthorized", False)
        assert engine.state is SyncState.ERROR
        assert db.read_head().ready == 1
        assert list(db.collection("notes").values()) == ["mine"]
        tokens.fresh = True
        pulls: list[str] = []
        client.before = lambda url: pulls.append(url) if url.endswith("/v1/pull") else None
        engine.sync()
        # Seven pages in all, of which page - 1 are there already. The old token is tried first, so
        # one request is made twice.
        assert len(pulls) in (7 - (page - 1), 7 - (page - 1) + 1)
        assert len(db.collection("notes")) == len(server.database("shop").collection("notes")) == 21
        assert_sound(db, server.database("shop"))


# ---------------------------------------------------------------- a server that goes and comes


@contextlib.contextmanager
def real_server(path: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None], str]]:
    """A server on a real port: how to stop it, how to start it again on the same port, its URL."""
    config = ServerConfig(
        data_dir=path, insecure_no_auth=True, access_log=False, shutdown_timeout_s=1.0
    )
    running, port = contextlib.ExitStack(), free_port()
    url = running.enter_context(serving(config, port=port))

    def start() -> None:
        running.enter_context(serving(config, port=port))

    try:
        yield running.close, start, url
    finally:
        running.close()


def filled_and_behind(url: str) -> Database:
    """A device with work of its own, and many pages to pull."""
    with Database.in_memory() as other:
        for n in range(12):
            other.collection("notes")[uid(n)] = "old"
        with SyncEngine(SyncConfig(db_id="shop"), url, other) as engine:
            engine.sync()
    db = Database.in_memory()
    for n in range(3):
        db.collection("notes")[uid(100 + n)] = "mine"
    return db


@pytest.mark.process
@pytest.mark.parametrize("state", [SyncState.CONNECTING, SyncState.PULLING, SyncState.PUSHING])
def test_a_server_that_goes_in_the_middle_of_a_cycle_is_found_again_by_the_same_sync(
    tmp_path: Path, state: SyncState
):
    with real_server(tmp_path) as (stop, start, url), filled_and_behind(url) as db:
        config = SyncConfig(
            db_id="shop",
            pull_operations_max=4,
            retry=RetryConfig(attempts_max=5, delay_initial_s=0.01, delay_max_s=0.1),
        )
        with SyncEngine(config, url, db) as engine:
            gone: list[SyncState] = []

            def listen(old: SyncState, new: SyncState) -> None:
                if new is state and not gone:
                    gone.append(new)
                    stop()
                elif new is SyncState.RETRY_WAIT and len(gone) == 1:
                    gone.append(new)
                    start()

            engine.on_state(listen)
            result = engine.sync()
            assert gone == [state, SyncState.RETRY_WAIT]
            assert result.attempts > 1
            assert engine.state is SyncState.SYNCED
            assert db.read_head().ready == 0
            assert len(db.collection("notes")) == 15
        with Database.in_memory() as other, SyncEngine(config, url, other) as engine:
            engine.sync()
            assert dict(other.collection("notes").items()) == dict(db.collection("notes").items())


@pytest.mark.process
def test_a_server_that_stays_away_is_an_error_and_the_next_sync_goes_on_with_its_page(
    tmp_path: Path,
):
    with real_server(tmp_path) as (stop, start, url), filled_and_behind(url) as db:
        config = SyncConfig(db_id="shop", pull_operations_max=4, retry=RetryConfig.none())
        with SyncEngine(config, url, db) as engine:
            deaf = engine.on_progress(lambda progress: stop() if progress.operations == 4 else None)
            with pytest.raises(SyncError) as caught:
                engine.sync()
            assert caught.value.retryable
            assert list(db.collection("notes").values()) == ["mine"] * 3
            deaf()
            start()
            result = engine.sync()
            assert (result.pulled, result.pushed) == (12, 3)
            assert_sound(db)

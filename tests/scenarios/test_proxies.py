"""What stands between a device and its server, and has its own ideas of what may pass (R5)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import pytest

from entidb import Database, RetryConfig, SyncConfig, SyncEngine
from entidb.errors import SyncError
from entidb.server import SyncServer
from entidb.sync import HttpTransport, LoopbackClient
from entidb.sync.transport import HttpResponse

Compression = Literal["none", "gzip"]
Rule = Callable[[str, Mapping[str, str], bytes], HttpResponse | None]
HTML = {"content-type": "text/html"}


def page(status: int) -> HttpResponse:
    return HttpResponse(status, HTML, f"<h1>{status} nginx</h1>".encode())


class Proxy(LoopbackClient):
    """Hands requests on unless ``rule`` answers them itself."""

    def __init__(self, server: SyncServer) -> None:
        super().__init__(server)
        self.rule: Rule = lambda path, headers, body: None
        self.answered = 0

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        mine = self.rule(url, headers, body)
        if mine is None:
            return super().request(method, url, headers, body, timeout_s)
        self.answered += 1
        return mine


class Scene:
    """A device behind a proxy, one without, and their server."""

    def __init__(self, server: SyncServer, compression: Compression = "none") -> None:
        self.proxy = Proxy(server)
        config = SyncConfig(db_id="x", retry=RetryConfig.none(), compression=compression)
        self.db, self.other = Database.in_memory(), Database.in_memory()
        url = "http://localhost"
        self.engine = SyncEngine(
            config, HttpTransport(url, client=self.proxy, config=config), self.db
        )
        self.free = SyncEngine(
            config, HttpTransport(url, client=LoopbackClient(server), config=config), self.other
        )
        self.notes, self.theirs = self.db.collection("notes"), self.other.collection("notes")
        self.theirs.add({"by": "other"})
        self.free.sync()
        self.engine.sync()

    def work(self, count: int = 30, size: int = 10_000) -> None:
        for number in range(count):
            self.notes.add({"text": f"{number:>{size}}"})
        self.theirs.add({"by": "other", "later": True})
        self.free.sync()

    def pulled(self) -> bool:
        return any(value.get("later") for value in self.notes.values())

    def arrived(self) -> int:
        self.free.sync()
        return sum("text" in value for value in self.theirs.values())


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with SyncServer.in_memory(access_log=False) as made:
        yield made


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("limit", [12_000, 50_000, 200_000])
def test_a_body_limit_stops_neither_pushes_nor_pulls(
    server: SyncServer, limit: int, compression: Compression
) -> None:
    scene = Scene(server, compression)
    scene.work()
    scene.proxy.rule = lambda url, headers, body: page(413) if len(body) > limit else None
    result = scene.engine.sync()
    assert (result.pushed, scene.engine.status().pending) == (30, 0)
    assert scene.pulled() and scene.arrived() == 30


@pytest.mark.parametrize("status", [400, 403, 404, 405, 411, 413, 414, 415, 431])
def test_a_way_that_lets_no_push_through_withdraws_nothing_and_pulls_go_on(
    server: SyncServer, status: int
) -> None:
    scene = Scene(server)
    scene.work()
    scene.proxy.rule = lambda url, headers, body: page(status) if "push" in url else None
    with pytest.raises(SyncError, match="stays pending"):
        scene.engine.sync()
    assert scene.pulled()
    assert (scene.engine.status().pending, scene.engine.discarded()) == (30, [])
    scene.proxy.rule = lambda url, headers, body: None
    scene.engine.sync()
    assert (scene.arrived(), scene.engine.status().pending) == (30, 0)


@pytest.mark.parametrize("status", [400, 403, 406, 413, 422, 451])
def test_a_firewall_that_dislikes_one_payload_keeps_that_one_back(
    server: SyncServer, status: int
) -> None:
    scene = Scene(server)
    scene.work(10, 10)
    scene.notes.add({"text": "<script>alert(1)</script>"})
    scene.work(10, 10)
    scene.proxy.rule = lambda url, headers, body: page(status) if b"<script>" in body else None
    result = scene.engine.sync()
    assert len(result.kept_back) == 1 and str(status) in result.kept_back[0].message
    assert scene.pulled() and scene.arrived() == 20
    assert (scene.engine.status().pending, scene.engine.discarded()) == (1, [])
    assert "kept back" in (scene.engine.status().last_error or "")


def test_a_proxy_that_refuses_packed_bodies_gets_plain_ones(server: SyncServer) -> None:
    scene = Scene(server, "gzip")
    scene.work()
    scene.proxy.rule = lambda url, headers, body: (
        page(415) if "Content-Encoding" in headers else None
    )
    result = scene.engine.sync()
    assert (result.pushed, result.kept_back, scene.proxy.answered) == (30, [], 1)
    assert scene.arrived() == 30


@pytest.mark.parametrize("status", [200, 302, 408, 429, 500, 502, 503, 504])
def test_an_answer_that_proves_nothing_keeps_the_batch_in_flight(
    server: SyncServer, status: int
) -> None:
    scene = Scene(server)
    scene.work()
    sent: list[bytes] = []

    def rule(url: str, headers: Mapping[str, str], body: bytes) -> HttpResponse | None:
        if "push" not in url:
            return None
        sent.append(body)
        return page(status)

    scene.proxy.rule = rule
    for _ in range(3):
        with pytest.raises(SyncError):
            scene.engine.sync()
    assert len(set(sent)) == 1
    scene.proxy.rule = lambda url, headers, body: None
    scene.engine.sync()
    assert (scene.arrived(), scene.engine.status().pending) == (30, 0)


def test_a_filter_that_hides_the_servers_answer_loses_and_doubles_nothing(
    server: SyncServer,
) -> None:
    """Some look at answers too, and refuse after the server has decided."""
    scene = Scene(server)
    scene.work(10, 10)
    send = LoopbackClient.request

    def rule(url: str, headers: Mapping[str, str], body: bytes) -> HttpResponse | None:
        if "push" not in url:
            return None
        send(scene.proxy, "POST", url, headers, body, 1.0)
        return page(403)

    scene.proxy.rule = rule
    for _ in range(3):
        with contextlib.suppress(SyncError):
            scene.engine.sync()
    assert (scene.arrived(), scene.engine.status().pending) == (10, 0)
    assert scene.engine.discarded() == []

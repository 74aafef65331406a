"""Load balancers that send all requests of one database to the same node, as docs/postgres.md
writes them.
"""

from __future__ import annotations

import contextlib
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from entidb import Database
from entidb.server import SyncServer
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncEngine
from entidb.sync.http.news import HttpNews
from entidb.types import SystemClock
from tests.scenarios.test_live_through_proxies import running
from tests.tools import free_port, program
from tests.waiting import until

GUIDE = Path(__file__).parents[2] / "docs" / "postgres.md"
DATABASES = [f"shop-{number}" for number in range(40)]
AROUND = {
    "haproxy": (
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 9s\n"
        "    timeout server 9s\nfrontend entidb\n    bind 127.0.0.1:{port}\n"
        "    default_backend entidb\n{snippet}"
    ),
    "nginx": (
        "daemon off; master_process off; pid {here}/pid; error_log stderr; events {{ }}\n"
        "http {{ access_log off; client_body_temp_path {here}; proxy_temp_path {here};\n"
        "fastcgi_temp_path {here}; uwsgi_temp_path {here}; scgi_temp_path {here};\n{snippet}\n"
        "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://entidb; }} }} }}\n"
    ),
    "caddy": (
        "{{\n    admin off\n    auto_https off\n    storage file_system {here}\n}}\n"
        "http://127.0.0.1:{port} {{\n{snippet}\n}}\n"
    ),
}


def snippet(name: str, ports: list[int]) -> str:
    """What the guide says for ``name``, with our nodes."""
    found = re.search(rf"^```{name}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    written = found[1]
    for number, port in enumerate(ports, start=1):
        assert f"10.0.0.{number}:4984" in written
        written = written.replace(f"10.0.0.{number}:4984", f"127.0.0.1:{port}")
    return written


@contextlib.contextmanager
def node(says: bytes) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(says)))
            self.end_headers()
            self.wfile.write(says)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def command(name: str, config: Path) -> list[str]:
    binary = str(program(name))
    return {
        "haproxy": [binary, "-db", "-f", str(config)],
        "nginx": [binary, "-p", str(config.parent), "-c", str(config)],
        "caddy": [binary, "run", "--adapter", "caddyfile", "--config", str(config)],
    }[name]


@pytest.mark.parametrize("name", ["haproxy", "nginx", "caddy"])
def test_all_requests_of_a_database_reach_the_same_node(name: str, tmp_path: Path) -> None:
    program(name)
    port, config = free_port(), tmp_path / "proxy.conf"
    with contextlib.ExitStack() as gone, node(b"two") as two:
        one = gone.enter_context(node(b"one"))
        given = {"port": port, "here": tmp_path, "snippet": snippet(name, [one, two])}
        config.write_text(AROUND[name].format(**given))
        with running(command(name, config), port) as url:

            def answered_by(database: str) -> bytes:
                headers = {"EntiDB-Database": database}
                with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as got:
                    return bytes(got.read())

            def all_answered_by(name: bytes) -> bool:
                with contextlib.suppress(urllib.error.HTTPError):
                    return {answered_by(database) for database in DATABASES} == {name}
                return False

            first = {database: answered_by(database) for database in DATABASES}
            assert set(first.values()) == {b"one", b"two"}
            for _ in range(3):
                assert {database: answered_by(database) for database in DATABASES} == first
            gone.close()
            # One request may meet the node that is not there any more.
            until(lambda: all_answered_by(b"two"))
            assert all_answered_by(b"two")


def test_every_request_of_a_device_names_its_database() -> None:
    class Watching(LoopbackClient):
        def request(self, method: str, url: str, headers: Any, *rest: Any) -> Any:
            named.append((url.rpartition("/")[2], headers.get("EntiDB-Database")))
            return super().request(method, url, headers, *rest)

    named: list[tuple[str, str | None]] = []
    with SyncServer.in_memory() as server, Database.in_memory() as db:
        transport = HttpTransport("http://localhost", client=Watching(server))
        with SyncEngine(SyncConfig(db_id="shop"), transport, db) as engine:
            for _ in range(2):
                db.collection("notes").add({"n": 1})
                engine.sync()
            engine.verify_with_server()
            transport._get("/v1/segments/00?db_id=shop", {}, None)
    assert {"handshake", "digest", "00?db_id=shop"} < {path for path, _ in named}
    assert {database for _, database in named} == {"shop"}


def test_a_stream_of_news_names_its_database() -> None:
    class Stops(Exception): ...

    class Client:
        def request(self, method: str, url: str, headers: Any, *rest: Any) -> Any:
            named.append(headers["EntiDB-Database"])
            raise Stops

        def stream(self, url: str, headers: Any, **how: Any) -> Any:
            return self.request("GET", url, headers)

    named: list[str] = []
    client: Any = Client()
    news = HttpNews(
        client,
        "http://localhost",
        db_id="shop",
        device_id=bytes(16),
        user_agent="x",
        request_id_prefix="x",
        token=None,
        clock=SystemClock(),
    )
    with pytest.raises(Stops):
        news.open(first_event_s=1, silence_s=1, refresh=False)
    with pytest.raises(Stops):
        news.poll(None, refresh=False)
    assert named == ["shop", "shop"]

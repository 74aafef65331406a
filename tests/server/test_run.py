"""Serving as a process: addresses, certificates, signals, and what survives a stop."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from entidb.errors import ConfigError
from entidb.protocol import PullResponse, PushResponse, Verdict
from entidb.server import ServerConfig, SyncServer, serve, serving
from tests.server.support import Client, pull, push
from tests.server.test_app import eventually

pytestmark = pytest.mark.process

WAIT_S = 60.0
#: As soon as it serves, what the collector leaves alone is counted, and the server is stopped.
WATCHING = """
def watch():
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.01)
    print(gc.get_freeze_count(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
"""
PROGRAM = """
import sys
from entidb.server import ServerConfig, serve
serve(ServerConfig(data_dir=sys.argv[1], insecure_no_auth=True), port=0, ready_file=sys.argv[2])
print("stopped", flush=True)
"""


@contextlib.contextmanager
def process(place: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, ended at the latest at the end of the block."""
    ready = place / "ready"
    ready.unlink(missing_ok=True)
    source = str(Path(__file__).parents[2] / "src")
    # A file and not a pipe: nobody reads the log meanwhile, and a full pipe stops its writer.
    with (place / "stderr").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(place / "data"), str(ready)],
            env={**os.environ, "PYTHONPATH": source},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    with started:
        try:
            deadline = time.monotonic() + WAIT_S
            while not ready.exists():
                assert started.poll() is None, (place / "stderr").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield started, ready.read_text().strip()
        finally:
            if started.poll() is None:
                started.kill()


@pytest.mark.slow
def test_what_was_acknowledged_before_sigterm_is_there_afterwards(tmp_path: Path):
    with process(tmp_path) as (server, url):
        with Client(url) as client:
            history = client.history()

        first = threading.Barrier(5)

        def device(number: int) -> set[int]:
            acknowledged = set[int]()
            with contextlib.suppress(OSError, HTTPException), Client(url) as own:
                for n in range(1, 100_000):
                    entity = number * 100_000 + n
                    answer = own.send(push(history, entity))
                    if answer.status != 200:
                        break
                    (result,) = answer.message(PushResponse).results
                    assert result.verdict == Verdict.ACCEPTED
                    acknowledged.add(entity)
                    if n == 1:
                        first.wait(WAIT_S)
            return acknowledged

        with ThreadPoolExecutor(4) as pool:
            devices = [pool.submit(device, number) for number in range(4)]
            first.wait(WAIT_S)  # each has had an answer, and goes on
            time.sleep(0.3)
            server.send_signal(signal.SIGTERM)
            acknowledged = set().union(*(each.result() for each in devices))
        assert server.wait(WAIT_S) == 0
        assert server.stdout is not None
        assert server.stdout.read() == "stopped\n"
    assert acknowledged
    assert acknowledged <= stored(tmp_path / "data", history)


def stored(data_dir: Path, history: bytes) -> set[int]:
    found = set()
    with SyncServer(ServerConfig(data_dir=data_dir, insecure_no_auth=True)) as server:
        cursor, more = 0, True
        while more:
            page = server.handle("/v1/pull", None, pull(history, cursor=cursor))
            assert isinstance(page, PullResponse)
            found |= {
                int.from_bytes(operation.entity_id, "big")
                for commit in page.commits
                for operation in commit.operations
            }
            cursor, more = page.cursor, page.has_more
        assert server.database("shop").verify() == []
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_the_collector_of_a_server_leaves_alone_what_was_there_before_it_served(tmp_path: Path):
    said = tmp_path / "said"
    program = PROGRAM.replace("import sys\n", "import gc, sys, threading, time, os, signal\n", 1)
    program = program.replace("serve(ServerConfig", WATCHING + "serve(ServerConfig", 1)
    program += "print(gc.get_freeze_count(), flush=True)\n"
    with said.open("wb") as output:
        arguments = [sys.executable, "-c", program, str(tmp_path / "data"), str(tmp_path / "ready")]
        subprocess.run(arguments, stdout=output, check=True, timeout=WAIT_S)
    while_serving, _, after = said.read_text().split()
    assert int(while_serving) > 10_000
    assert int(after) == 0


def test_a_hangup_ends_nothing_and_says_what_it_did(tmp_path: Path):
    with process(tmp_path) as (server, url):
        with Client(url) as client:
            history = client.history()
            server.send_signal(signal.SIGHUP)
            answer = client.send(push(history, 1)).message(PushResponse)
            assert answer.results[0].verdict == Verdict.ACCEPTED
        said = "SIGHUP: nothing to read again; other settings need a restart"
        while said not in (tmp_path / "stderr").read_text():
            assert server.poll() is None
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_and_it_has_said_where_it_listened(
    tmp_path: Path, number: signal.Signals
):
    with process(tmp_path) as (server, url):
        with Client(url) as client:
            assert client.request("GET", "/healthz").status == 200
        server.send_signal(number)
        out, _ = server.communicate(timeout=WAIT_S)
    err = (tmp_path / "stderr").read_text()
    assert server.returncode == 0
    assert out == "stopped\n"
    assert err.splitlines()[0] == f"entidb: serving on {url}"
    assert '"path":"/healthz"' in err


# ---------------------------------------------------------------- where to listen


@pytest.fixture
def open_config() -> ServerConfig:
    return ServerConfig(data_dir=None, insecure_no_auth=True)


def test_a_port_that_is_taken_is_said_in_one_line(open_config: ServerConfig):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            serve(open_config, port=port)
    assert caught.value.code == "cannot_bind"
    assert f"127.0.0.1:{port}" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("host", "port"),
    [("no such host", 0), ("203.0.113.7", 0), ("127.0.0.1", 70_000), ("127.0.0.1", -1), ("", 0)],
)
def test_an_address_that_cannot_be_is_a_config_error(host: str, port: int):
    with pytest.raises(ConfigError, match="cannot listen"):
        serve(ServerConfig(data_dir=None, authenticator=print), host=host, port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_authentication_only_loopback_is_served(open_config: ServerConfig, host: str):
    with pytest.raises(ConfigError, match="insecure_no_auth"):
        serve(open_config, host=host, port=0)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2"])
def test_loopback_may_be_served_without_authentication(open_config: ServerConfig, host: str):
    with serving(open_config, host=host) as url, Client(url) as client:
        assert client.request("GET", "/healthz").status == 200


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def make_certificate(place: Path, host: str = "localhost", days: int = 1) -> tuple[str, str]:
    """Paths of a new one for ``host`` and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (place / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (place / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return str(place / "cert.pem"), str(place / "key.pem")


def test_it_serves_https(open_config: ServerConfig, certificate: tuple[str, str]):
    cert, key = certificate
    trust = ssl.create_default_context(cafile=cert)
    with serving(open_config, tls_cert=cert, tls_key=key) as url:
        assert url.startswith("https://")
        named = url.replace("127.0.0.1", "localhost")
        with urllib.request.urlopen(named + "/healthz", context=trust, timeout=WAIT_S) as answer:
            assert answer.status == 200


def test_a_handshake_that_does_not_go_on_ends_and_holds_nobody(
    open_config: ServerConfig, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("entidb.server.run._HANDSHAKE_S", 0.5)
    cert, key = certificate
    with serving(open_config, tls_cert=cert, tls_key=key) as url, ExitStack() as stack:
        parts = urlsplit(url)
        place = parts.hostname, parts.port
        silent = [stack.enter_context(socket.create_connection(place)) for _ in range(300)]
        for each in silent[:100]:
            each.sendall(b"\x16\x03\x01\x02\x00")  # the beginning of a hello
        context = ssl.create_default_context(cafile=cert)

        def asks() -> bool:
            """Of one address only so many are let in at once."""
            client = http.client.HTTPSConnection("localhost", parts.port, context=context)
            with contextlib.closing(client), contextlib.suppress(OSError):
                client.request("GET", "/healthz")
                return client.getresponse().status == 200
            return False

        for _ in range(3):
            eventually(asks)
        for each in silent:
            each.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""


@pytest.mark.parametrize(
    "listen",
    [
        {"tls_cert": "/no/such/cert.pem", "tls_key": "/no/such/key.pem"},
        {"tls_cert": "/no/such/cert.pem"},
        {"tls_cert": __file__, "tls_key": __file__},
    ],
)
def test_a_certificate_that_cannot_be_used_is_a_config_error(
    open_config: ServerConfig, listen: dict[str, Any]
):
    with pytest.raises(ConfigError, match="cert"):
        serve(open_config, port=0, **listen)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_ready_file_takes_no_place_of_a_pipe_or_of_a_database(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "data.mdb").write_bytes(b"entities")
    settings = ServerConfig(data_dir=tmp_path / "srv", insecure_no_auth=True)
    for place in (tmp_path / "pipe", tmp_path / "shop" / "data.mdb"):
        with pytest.raises(ConfigError, match=f"ready_file {place}"):
            serve(settings, port=0, ready_file=place)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "shop" / "data.mdb").read_bytes() == b"entities"

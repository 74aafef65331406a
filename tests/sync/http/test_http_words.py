"""Everything wrong that can be given to the HTTP transport, by an environment, by a person who
types a URL, or by what stands at an address: an error of ours, in plain words, with a way out."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import ConfigError, SyncError, TransportError
from entidb.protocol import ErrorResponse, encode
from entidb.sync.http import HttpTransport
from tests.sync.http.test_http import (
    STALL,
    NoClient,
    RawServer,
    certificate,
    error_of,
    reply,
    server_tls,
)
from tests.sync.messages import PAGE, PULL

__all__ = ["certificate", "server_tls"]  # fixtures

#: Words of libraries, which help nobody who reads them.
LIBRARIES = ("httpx", "httpcore", "h11", "ssl.c", "Errno", "[SSL", "bytearray", "URL(", "idna")


def plain(error: SyncError | ConfigError) -> str:
    said = str(error)
    assert not [word for word in LIBRARIES if word in said], said
    assert said.isprintable() and len(said) < 1000
    return said


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def speaking(answer: bytes) -> Iterator[int]:
    """A port where whoever connects and says something gets ``answer``."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                _hear_all(connection)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def _hear_all(connection: socket.socket) -> None:
    """The whole request: who hangs up while more is coming sends a reset, which may overtake the
    answer."""
    heard = connection.recv(65536)
    if not heard.startswith(b"POST"):
        return  # TLS: nothing more comes before it is answered
    while b"\r\n\r\n" not in heard and (part := connection.recv(65536)):
        heard += part
    head, _, body = heard.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    missing = (0 if length is None else int(length[1])) - len(body)
    while missing > 0 and (part := connection.recv(65536)):
        missing -= len(part)


# -- URLs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https:/example.org",
        "htps://example.org",
        "https//example.org",
        "example.org:4984",
        "https://example..org",
        "https://.",
        "https://" + "a" * 64 + ".org",
        "https://" + "a" * 100_000,
        "https://example.org:1:2",
        "https://\ud800.org",
        "https://\ufdfa.com",
        "https://example.org\n",
        "https://me:hunter2@exa mple.org",
    ],
    ids=range(13),
)
def test_a_url_with_a_typo_is_refused_in_plain_words(url: str):
    with pytest.raises(ConfigError, match=r"write https://host") as caught:
        HttpTransport(url, client=NoClient())
    assert "hunter2" not in plain(caught.value)


def test_a_scheme_in_capitals_is_the_same_scheme():
    HttpTransport("HTTPS://example.org/", token="t", client=NoClient()).close()


# -- the environment --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        ("socks5://127.0.0.1:1", "pip install socksio"),
        ("socks5h://127.0.0.1:1", "pip install socksio"),
        ("socks4://127.0.0.1:1", "'socks4'"),
        ("ftp://127.0.0.1:1", "'ftp'"),
        ("not a url", "not a URL"),
        ("http://", "not a URL"),
        ("http://proxy:port", "not a URL"),
        ("http://proxy:99999", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://us er@proxy", "not a URL"),
        ("http://me:hunter2@proxy:port", "not a URL"),
        ("http://\x01", "not a URL"),
    ],
)
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "all_proxy"])
def test_a_proxy_of_the_environment_that_cannot_work_is_named(
    variable: str, proxy: str, says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, proxy)
    url = "https://entidb.invalid" if variable == "https_proxy" else "http://entidb.invalid"
    with pytest.raises(ConfigError) as caught:
        HttpTransport(url)
    said = plain(caught.value)
    assert variable.upper() in said and says in said
    assert "hunter2" not in said
    HttpTransport("http://localhost").close()


@pytest.mark.parametrize("prefix", ["", "//"])
def test_a_proxy_without_a_scheme_is_taken_as_others_take_it(
    prefix: str, monkeypatch: pytest.MonkeyPatch
):
    with RawServer(reply(encode(PAGE))) as proxy:
        monkeypatch.setenv("http_proxy", prefix + proxy.url.removeprefix("http://"))
        with HttpTransport("http://entidb.invalid/sync") as transport:
            assert transport.pull(PULL) == PAGE


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "403 No"])
def test_a_proxy_that_refuses_a_tunnel_is_a_transport_error(
    status: str, monkeypatch: pytest.MonkeyPatch
):
    with speaking(reply(b"", status)) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        transport = HttpTransport("https://entidb.invalid")
        with transport, pytest.raises(TransportError, match="the proxy refused") as caught:
            transport.pull(PULL)
    assert status[:3] in plain(caught.value)


@pytest.mark.parametrize("place", ["127.0.0.1:{port}", "proxy.invalid:1"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_cannot_be_reached_is_not_taken_for_the_server(
    scheme: str, place: str, monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        proxy = place.format(port=taken.getsockname()[1])
        monkeypatch.setenv(f"{scheme}_proxy", f"http://me:hunter2@{proxy}")
        transport = HttpTransport(f"{scheme}://entidb.invalid")
        with transport, pytest.raises(TransportError, match="the proxy of the environ") as caught:
            transport.pull(PULL)
    said = plain(caught.value)
    assert f"http://{proxy}," in said and "NO_PROXY" in said
    assert "hunter2" not in said and "whether the server runs" not in said


@pytest.mark.parametrize("content", [None, "", "no certificate", "a directory"])
def test_a_file_of_authorities_that_cannot_be_read_is_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "authorities.pem"
    if content == "a directory":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(ConfigError, match="SSL_CERT_FILE") as caught:
        HttpTransport("https://entidb.invalid")
    assert str(path) in plain(caught.value)
    HttpTransport("http://entidb.invalid").close()


def test_a_directory_of_authorities_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere/at/all")
    with pytest.raises(ConfigError, match="SSL_CERT_DIR"):
        HttpTransport("https://entidb.invalid")


# -- what stands at an address ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"\x15\x03\x01\x00\x02\x02\x46", "write https://"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "hung up without an answer"),
        (b"SSH\r\n\r\n", "not HTTP"),
        (b"", "hung up without an answer"),
        (
            reply(b"<html>The plain HTTP request was sent to HTTPS port", "400 Bad", "text/html"),
            "write https://",
        ),
        (reply(b"<html>Log in", "200 OK", "text/html; charset=utf-8"), "a web page"),
        (reply(b"<html>Log in", "200 OK", "text/html"), "log in to the network"),
        (reply(b"<html>Log in", "511 Login", "text/html"), "log in to the network"),
        (reply(b"<html>gone", "404 Not Found", "text/html"), "check the path of the URL"),
        (reply(b"\x1b[2J" * 500, "502 Bad", "text/" + "x" * 5000), "answered 502"),
    ],
    ids=range(10),
)
def test_what_else_may_stand_at_an_address_is_said_in_plain_words(answer: bytes, says: str):
    with speaking(answer) as port:
        transport = HttpTransport(f"http://127.0.0.1:{port}")
        with transport, pytest.raises(SyncError) as caught:
            transport.pull(PULL)
    assert says in plain(caught.value)


def test_a_host_that_is_not_there_is_said_in_plain_words(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        transport = HttpTransport(f"http://127.0.0.1:{bound.getsockname()[1]}")
        with transport, pytest.raises(TransportError) as caught:
            transport.pull(PULL)
        assert "nothing listens there" in plain(caught.value)

    def unknown(*arguments: Any, **named: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    transport = HttpTransport("http://entidb.invalid")
    with transport, pytest.raises(TransportError) as caught:
        transport.pull(PULL)
    assert "name of the host cannot be found" in plain(caught.value)


def test_silence_is_said_in_plain_words():
    assert "read_timeout_s" in plain(error_of([STALL], read_timeout_s=0.05))


@pytest.mark.parametrize("code", ["\x1b[2J\x1b[31m", "x" * 5000, "", "\u202e\u2066", "a b\nc"])
@pytest.mark.parametrize("status", ["500 No", "400 No", "418 No"])
def test_what_a_server_says_of_an_error_is_cut_and_cannot_steer_a_terminal(code: str, status: str):
    said = ErrorResponse(code=code, message="\x1b]0;mine\x07" * 5000, retryable=False)
    error = error_of(reply(encode(said), status))
    assert error.code and error.code.isprintable() and " " not in error.code
    assert len(error.code) <= 64
    assert str(error).isprintable() and len(str(error)) <= 1000


def test_https_at_a_port_of_plain_http_says_so():
    with speaking(reply(b"", "400 Bad Request")) as port:
        transport = HttpTransport(f"https://127.0.0.1:{port}")
        with transport, pytest.raises(TransportError) as caught:
            transport.pull(PULL)
    assert "for http://" in plain(caught.value)


def test_plain_http_at_a_port_of_tls_says_so(server_tls: ssl.SSLContext):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                server_tls.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        transport = HttpTransport(f"http://127.0.0.1:{listening.getsockname()[1]}")
        with transport, pytest.raises(TransportError) as caught:
            transport.pull(PULL)
        thread.join()
    assert "https://" in plain(caught.value)

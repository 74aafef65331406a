"""From where a request may come: Host, Origin, CORS, and headers that stand there twice."""

from __future__ import annotations

import functools
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from entidb.errors import ConfigError
from entidb.protocol import encode
from entidb.server import Grants, Rights, ServerConfig, SyncServer
from entidb.server.run import serving
from tests.server.support import Client, handshake

ALL = Grants("sue", {"*": Rights(read=True, write=True)})
APP = "https://app.example.org"


def serve(**settings: Any) -> Any:
    return serving(SyncServer.in_memory(**settings))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(allowed_hosts=("till-7.local",), cors_origins=(APP,)) as made:
        yield made


def ask(url: str, **headers: str) -> Any:
    with Client(url) as client:
        return client.send(handshake(), **headers)


def port(url: str) -> str:
    return str(urlsplit(url).port)


# ---------------------------------------------------------------- Host


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "app.localhost:80",
        "127.0.0.1:4984",
        "127.8.9.10",
        "[::1]:4984",
        "till-7.local:4984",
    ],
)
def test_without_tokens_the_names_of_this_machine_are_answered(url: str, host: str) -> None:
    assert ask(url, host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:4984",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.1.7",
        "[2001:db8::1]",
        "0.0.0.0",
        "user@localhost",
        "localhost:x",
        "local host",
        "till-7.local.evil",
    ],
)
def test_without_tokens_any_other_name_is_refused(url: str, host: str) -> None:
    """A page that has made its own name point at 127.0.0.1 asks by that name."""
    answer = ask(url, host=host)
    assert (answer.status, answer.code) == (403, "forbidden")
    assert "allowed_hosts" in answer.error.message
    with Client(url) as client:
        assert client.request("GET", "/v1/info", host=host).status == 403


def test_with_tokens_any_name_is_answered() -> None:
    with serve(authenticator=lambda token: ALL) as url:
        assert ask(url, host="sync.example.org").status == 200
        assert ask(url, host="sync.example.org", origin="https://evil.example").status == 200


# ---------------------------------------------------------------- Origin


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", APP + ":1", APP.upper()]
)
def test_without_tokens_a_page_from_elsewhere_is_refused(url: str, origin: str) -> None:
    answer = ask(url, origin=origin)
    assert (answer.status, answer.code) == (403, "forbidden")
    assert "cors_origins" in answer.error.message
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_of_the_server_itself_and_one_that_is_named_are_answered(url: str) -> None:
    assert ask(url, origin=f"http://127.0.0.1:{port(url)}").status == 200
    answer = ask(url, origin=APP)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == APP
    assert answer.headers["vary"] == "Origin"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


# ---------------------------------------------------------------- CORS


def preflight(url: str, origin: str) -> Any:
    with Client(url) as client:
        return client.request(
            "OPTIONS",
            "/v1/push",
            origin=origin,
            access_control_request_method="POST",
            access_control_request_headers="authorization,content-type",
            access_control_request_private_network="true",
        )


def test_a_preflight_of_a_named_page_says_what_it_may_send(url: str) -> None:
    answer = preflight(url, APP)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == APP
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(
        answer.headers["access-control-allow-headers"].split(", ")
    )
    assert answer.headers["access-control-allow-private-network"] == "true"


def test_with_tokens_too_only_named_pages_may_read_and_it_is_off_unless_asked_for() -> None:
    with serve(authenticator=lambda token: ALL, cors_origins=(APP,)) as url:
        assert preflight(url, APP).headers["access-control-allow-origin"] == APP
        other = preflight(url, "https://evil.example")
        assert "access-control-allow-origin" not in other.headers
        assert "access-control-allow-origin" not in ask(url, origin="https://evil.example").headers
    with serve(authenticator=lambda token: ALL) as url:
        answer = preflight(url, APP)
        assert answer.status == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_error_can_be_read_by_a_named_page_too() -> None:
    with serve(authenticator=lambda token: ALL, cors_origins=(APP,)) as url, Client(url) as client:
        answer = client.post("/v1/push", b"broken", origin=APP)
        assert answer.status == 400
        assert answer.headers["access-control-allow-origin"] == APP


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cors_origins", ("*",)),
        ("cors_origins", ("app.example.org",)),
        ("cors_origins", ("https://app.example.org/",)),
        ("cors_origins", "https://app.example.org"),
        ("cors_origins", (7,)),
        ("allowed_hosts", ("till:4984",)),
        ("allowed_hosts", ("http://till",)),
        ("allowed_hosts", ("",)),
        ("allowed_hosts", ["till"]),
    ],
)
def test_settings_that_name_no_origin_or_host_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        ServerConfig(data_dir=None, insecure_no_auth=True, **{setting: value})


# ---------------------------------------------------------------- twice


@pytest.mark.parametrize(
    "twice",
    [
        "Authorization: Bearer a\r\nAuthorization: Bearer b",
        "Authorization: Bearer a\r\nauthorization: Bearer a",
        "Host: localhost\r\nHost: localhost",
        "Content-Type: application/cbor\r\nContent-Type: text/plain",
        "Content-Encoding: gzip\r\nContent-Encoding: identity",
        "Origin: https://app.example.org\r\nOrigin: null",
    ],
)
def test_a_header_that_may_stand_once_and_stands_twice_is_refused(url: str, twice: str) -> None:
    body = encode(handshake())
    host = "" if twice.startswith("Host") else "Host: localhost\r\n"
    request = (
        f"POST /v1/handshake HTTP/1.1\r\n{host}{twice}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(port(url))), timeout=30) as line:
        line.sendall(request.encode() + body)
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_message" in answer and b"twice" in answer


# ---------------------------------------------------------------- functions and logs


async def later(*anything: Any) -> Any:
    return ALL


class Later:
    async def __call__(self, *anything: Any) -> Any:
        return ALL


@pytest.mark.parametrize("function", [later, Later(), functools.partial(later)])
@pytest.mark.parametrize("setting", ["authenticator", "validate"])
def test_an_async_function_is_refused_where_a_plain_one_is_called(
    setting: str, function: Any
) -> None:
    settings: dict[str, Any] = {setting: function, "insecure_no_auth": setting == "validate"}
    with pytest.raises(ConfigError, match=f"{setting} is an async function"):
        ServerConfig(data_dir=None, **settings)


@pytest.mark.parametrize("answered", [None, {"*": "all"}, True])
def test_an_authenticator_that_answers_no_grants_lets_nobody_in_and_is_logged(
    answered: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(authenticator=lambda token: answered) as url:
        answer = ask(url)
    assert (answer.status, answer.code) == (500, "server_error")
    assert "the authenticator answered" in caplog.text


@pytest.mark.parametrize(
    "subject", ["half \ud800", "line\nfeed", "x" * 10_000, '"}\r\n{"status": 200}', "\x1b[31m"]
)
def test_whatever_a_subject_is_called_its_request_has_one_line_in_the_log(
    subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    grants = Grants(subject, ALL.databases)
    with (
        caplog.at_level(logging.INFO, "entidb.access"),
        serve(authenticator=lambda token: grants) as url,
    ):
        assert ask(url).status == 200
    [line] = [r.getMessage() for r in caplog.records if r.name == "entidb.access"]
    assert line.isprintable()
    assert len(line) < 2000
    logged = json.loads(line)
    assert logged["status"] == 200
    assert logged["subject"] == subject[:500].encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------- addresses in two ways


def said(url: str, lines: str) -> tuple[int, bytes]:
    """Status and body of the answer to a request as it is written here."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(lines.replace("\n", "\r\n").encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    "origin", ["x://HOST", "://HOST", "moz-extension://HOST", "ws://HOST", "http://HOST/", "HOST"]
)
def test_only_a_page_over_http_is_a_page_of_this_server(url: str, origin: str) -> None:
    given = origin.replace("HOST", urlsplit(url).netloc)
    assert ask(url, origin=given).code == "forbidden"


@pytest.mark.parametrize("host", ["", "   "])
def test_an_empty_host_is_no_name_of_this_machine(url: str, host: str) -> None:
    status, body = said(url, f"GET /healthz HTTP/1.1\nHost:{host}\n\n")
    assert status == 403 and b"forbidden" in body


@pytest.mark.parametrize(
    "target",
    ["http://evil.example/healthz", "http://evil@HOST/healthz", "http://HOST.evil/healthz",
     "http://localhost/healthz", "x://evil.example/healthz"],
)  # fmt: skip
def test_an_address_that_names_another_host_than_host_is_refused(url: str, target: str) -> None:
    here = urlsplit(url).netloc
    status, body = said(
        url, f"GET {target.replace('HOST', here)} HTTP/1.1\nHost: {here}\nConnection: close\n\n"
    )
    assert status == 400 and b"invalid_message" in body


def test_an_address_that_names_the_same_host_is_answered(url: str) -> None:
    here = urlsplit(url).netloc
    for target in (f"http://{here}/healthz", f"HTTP://{here.upper()}/healthz?a=http://x"):
        status, _ = said(url, f"GET {target} HTTP/1.1\nHost: {here}\nConnection: close\n\n")
        assert status == 200
    # What looks like one further behind is none.
    assert (
        said(url, f"GET /healthz?a=http://x HTTP/1.1\nHost: {here}\nConnection: close\n\n")[0]
        == 200
    )


@pytest.mark.parametrize("line", ["GET /healthz", "GET /healthz HTTP/2.0", "GET /healthz HTTP/0.9"])
def test_a_version_that_is_not_spoken_is_not_answered_as_if_it_were(url: str, line: str) -> None:
    status, body = said(url, f"{line}\nHost: localhost\n\n")
    assert status == 505 and b"HTTP/1.1" in body

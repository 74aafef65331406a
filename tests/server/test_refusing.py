"""What is no request that the server takes is answered all the same: why, and that this was the
last answer on that connection."""

from __future__ import annotations

import re
import socket

import pytest

from entidb.protocol import encode
from tests.server.support import Client, handshake
from tests.server.test_connections import running, silent

pytestmark = pytest.mark.process

CLOSE = "Connection: close"


def said(url: str, data: bytes, *, half_close: bool = False) -> tuple[list[int], bytes]:
    """The statuses of all answers, and everything that came back until the server closed."""
    with silent(url) as line:
        line.sendall(data)
        if half_close:
            line.shutdown(socket.SHUT_WR)
        answer = b""
        while part := line.recv(65536):
            answer += part
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", answer)], answer


def request(*headers: str, line: str = "POST /v1/handshake HTTP/1.1") -> bytes:
    named = ("Host: localhost", "Content-Type: application/cbor", *headers)
    return "\r\n".join((line, *named, "", "")).encode("latin-1")


HELLO = encode(handshake())
REFUSED = {
    "no HTTP": (b"\x16\x03\x01" + bytes(100), 400, b"no known method"),
    "an unknown method": (request(line="BREW / HTTP/1.1"), 400, b"no known method"),
    "a method of others": (request(CLOSE, line="LINK /v1/pull HTTP/1.1"), 405, b"POST"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, b"HTTP/1.1"),
    "HTTP/9.9": (request(line="POST / HTTP/9.9"), 505, b"HTTP/1.1"),
    "no address": (request(line="POST /p\xf8 HTTP/1.1"), 400, b"address"),
    "a head of 65 KiB": (request("X: " + "a" * 65 * 1024), 431, b"65536"),
    "many headers": (request(*[f"X{n}: y" for n in range(10_000)]), 431, b"65536"),
    "a long address": (request(line=f"POST /{'a' * 2**20} HTTP/1.1"), 431, b"65536"),
    "a head of 2 MiB": (request("X: " + "a" * 2**21), 431, b"65536"),
    "a length that is none": (request("Content-Length: -1"), 400, b"Content-Length"),
    "two lengths": (request("Content-Length: 1", "Content-Length: 2"), 400, b"Content-Length"),
    "a length too large": (request("Content-Length: 999999999"), 413, b"limit"),
    "it expects to go on": (
        request("Content-Length: 999999999", "Expect: 100-continue"), 413, b"limit"),
    "a bad piece": (request("Transfer-Encoding: chunked") + b"xyz\r\n", 400, b"chunk size"),
    "a bad piece after a good one": (
        request("Transfer-Encoding: chunked") + b"1\r\na\r\n-\r\n", 400, b"chunk size"),
    "a long trailer": (
        request("Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\nX: " + b"a" * 2**20,
        431, b"65536"),
    "an encoding of others": (request("Transfer-Encoding: gzip"), 400, b"Transfer-Encoding"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_is_an_answer_that_says_why_and_the_last_one(name: str) -> None:
    data, status, words = REFUSED[name]
    with running() as url:
        codes, answer = said(url, data)
        assert codes == [status]
        assert words in answer
        assert b"connection: close" in answer.lower()
        with Client(url) as client:
            assert client.send(handshake()).status == 200


def test_what_is_refused_comes_after_what_was_asked_before() -> None:
    asked = request(f"Content-Length: {len(HELLO)}") + HELLO
    with running() as url:
        for refused, status in [
            (b"BREW / HTTP/1.1\r\n\r\n", 400),
            (request("Transfer-Encoding: chunked") + b"xyz\r\n", 400),
            (request("X: " + "a" * 65 * 1024), 431),
        ]:
            codes, _ = said(url, asked + asked + refused + asked)
            assert codes == [200, 200, status]


def test_too_many_requests_that_wait_are_answered_as_far_as_they_count() -> None:
    asked = request(f"Content-Length: {len(HELLO)}") + HELLO
    with running() as url:
        codes, answer = said(url, asked * 200)
        assert codes[-1] == 400 and b"requests wait on this connection" in answer
        assert codes[:-1] == [200] * (len(codes) - 1) and 60 < len(codes) < 80


def test_a_client_that_says_nothing_more_gets_its_answers() -> None:
    asked = request(f"Content-Length: {len(HELLO)}") + HELLO
    with running() as url:
        assert said(url, asked, half_close=True)[0] == [200]
        assert said(url, asked * 3, half_close=True)[0] == [200] * 3
        whole = request("Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (
            len(HELLO),
            HELLO,
        )
        assert said(url, whole, half_close=True)[0] == [200]
        for cut, words in [
            (asked[:-3], b"before its body"),
            (asked[:20], b"before its head"),
            (whole[:-10], b"before its body"),
        ]:
            codes, answer = said(url, cut, half_close=True)
            assert codes == [408] and words in answer
        assert said(url, b"", half_close=True) == ([], b"")
        codes, _ = said(url, asked + asked[:-3], half_close=True)
        assert codes == [200, 408]


def test_who_waits_for_news_and_hangs_up_waits_no_more() -> None:
    asked = request(CLOSE, line="GET /v1/live?db_id=shop&cursor=0 HTTP/1.1")
    with running() as url:
        with Client(url) as client:
            client.history()
        assert said(url, asked, half_close=True)[0] in ([], [200])


@pytest.mark.parametrize(
    "line", ["POST http://localhost/v1/handshake HTTP/1.1", "POST /v1/handshake HTTP/1.0"]
)
def test_an_absolute_address_and_an_older_version_are_answered(line: str) -> None:
    asked = request(f"Content-Length: {len(HELLO)}", CLOSE, line=line) + HELLO
    with running() as url:
        codes, answer = said(url, asked)
        assert codes == [200] and b"connection: close" in answer.lower()
        assert said(url, request(CLOSE, line="GET http://localhost HTTP/1.1"))[0] == [404]


def test_a_request_of_http_1_1_without_host_is_refused() -> None:
    head = b"%s\r\nConnection: close\r\n\r\n"
    with running() as url:
        codes, answer = said(url, head % b"GET /healthz HTTP/1.1")
        assert codes == [400] and b"needs the header Host" in answer
        assert said(url, head % b"GET /healthz HTTP/1.0")[0] == [200]

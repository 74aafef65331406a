"""The server as an object: a message in, a message out, without sockets or threads."""

from __future__ import annotations

import gzip
import logging
import threading
import uuid
from typing import Any

import pytest

from entidb import cbor
from entidb.db import Database
from entidb.errors import (
    ERROR_TABLE,
    AuthenticationError,
    PermissionDeniedError,
    StorageError,
    StorageFullError,
    SyncError,
    error_from_code,
)
from entidb.packing import ENCODINGS, compress
from entidb.protocol import (
    CONTENT_TYPE,
    ErrorResponse,
    HandshakeResponse,
    PullResponse,
    PushResponse,
    SyncRequest,
    Verdict,
    decode,
    encode,
    path_of,
)
from entidb.server import Grants, Refusal, Rights, SyncServer
from entidb.server.wire import ServerResponse, error_response, failure
from tests.server.support import ManualClock, handshake, number_id, pull, push

RIGHTS = {
    "rw": Rights(read=True, write=True),
    "r": Rights(read=True, write=False),
    "w": Rights(read=False, write=True),
}


def by_name(token: str | None) -> Grants:
    """Tokens for tests: ``shop=rw,catalog=r``."""
    if not token:
        raise AuthenticationError("a token is needed")
    pairs = (part.split("=") for part in token.split(","))
    return Grants("ada", {name: RIGHTS[rights] for name, rights in pairs})


@pytest.fixture
def server():
    with SyncServer.in_memory(authenticator=by_name) as made:
        yield made


def ask(server: SyncServer, request: SyncRequest, token: str | None = "shop=rw") -> Any:
    return server.handle(path_of(request), token, request)


def history_of(server: SyncServer, db_id: str = "shop") -> bytes:
    answer = ask(server, handshake(db_id), f"{db_id}=rw")
    assert isinstance(answer, HandshakeResponse)
    return answer.history


def http(server: SyncServer, request: SyncRequest, **headers: str) -> ServerResponse:
    named = {"content-type": CONTENT_TYPE, "authorization": "Bearer shop=rw"}
    named.update({name.replace("_", "-"): value for name, value in headers.items()})
    return server.handle_http("POST", path_of(request), named, encode(request))


def test_what_is_pushed_comes_back_in_a_pull(server: SyncServer):
    history = history_of(server)
    pushed = ask(server, push(history, 1, 2))
    assert [result.verdict for result in pushed.results] == [Verdict.ACCEPTED] * 2
    pulled = ask(server, pull(history))
    assert isinstance(pulled, PullResponse)
    assert [commit.operations[0].entity_id for commit in pulled.commits] == [
        number_id(1),
        number_id(2),
    ]


def test_no_thread_is_started(server: SyncServer):
    before = threading.active_count()
    ask(server, push(history_of(server), 1))
    assert threading.active_count() == before


def test_the_handshake_names_the_encodings_and_the_limits(server: SyncServer):
    answer = ask(server, handshake())
    assert set(ENCODINGS) <= set(answer.features)
    assert answer.limits == server.config.limits()


def test_a_program_on_the_server_writes_through_the_core_and_devices_pull_it(server: SyncServer):
    database = server.database("shop")
    assert isinstance(database, Database)
    key = uuid.UUID(int=7)
    database.collection("notes")[key] = "written here"
    pulled = ask(server, pull(history_of(server)))
    (operation,) = pulled.commits[0].operations
    assert (operation.entity_id, cbor.decode(operation.payload)) == (key.bytes, "written here")
    assert server.database("shop") is database


# ---------------------------------------------------------------- permissions


@pytest.mark.parametrize("exists", [True, False])
def test_a_database_that_is_not_granted_is_forbidden_whether_or_not_it_exists(exists: bool):
    with SyncServer.in_memory(authenticator=by_name) as server:
        if exists:
            history_of(server, "payroll")
        answer = ask(server, handshake("payroll"), "shop=rw")
    assert answer == ErrorResponse(
        code="forbidden", message="the token does not grant this database", retryable=False
    )


def test_a_token_that_may_only_read_makes_no_database(server: SyncServer):
    answer = ask(server, handshake(), "shop=r")
    assert answer.code == "unknown_database"


def test_a_token_that_may_only_read_cannot_push(server: SyncServer):
    history = history_of(server)
    [result] = ask(server, push(history, 1), "shop=r").results
    assert (result.verdict, result.code) == (Verdict.REJECTED, "forbidden")
    assert isinstance(ask(server, pull(history), "shop=r"), PullResponse)
    assert server.database("shop").sequence == 0


def test_a_token_that_may_only_write_cannot_pull(server: SyncServer):
    history = history_of(server)
    assert ask(server, pull(history), "shop=w").code == "forbidden"
    assert isinstance(ask(server, push(history, 1), "shop=w"), PushResponse)


def test_no_token_is_unauthorized(server: SyncServer):
    assert ask(server, handshake(), None).code == "unauthorized"


def test_databases_know_nothing_of_each_other(server: SyncServer):
    history = history_of(server)
    other = history_of(server, "log")
    ask(server, push(history, 1, value="a canary"))
    answer = ask(server, pull(other, db_id="log"), "log=rw")
    assert answer.commits == []
    assert other != history


# ---------------------------------------------------------------- HTTP without the wire


def test_http_answers_a_message_with_a_message(server: SyncServer):
    answer = http(server, handshake())
    assert (answer.status, answer.headers["content-type"]) == (200, CONTENT_TYPE)
    assert decode(HandshakeResponse, answer.body).head == 0


def test_a_request_id_is_kept_if_it_can_stand_in_a_log_and_else_made(server: SyncServer):
    assert http(server, handshake(), x_request_id="abc-1").headers["x-request-id"] == "abc-1"
    made = http(server, handshake(), x_request_id="a\nb" * 50).headers["x-request-id"]
    assert "\n" not in made
    assert made != http(server, handshake()).headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/v1/pull", {}, 405, "method_not_allowed"),
        ("POST", "/v2/pull", {}, 404, "not_found"),
        ("POST", "/v1/pull/", {}, 404, "not_found"),
        ("POST", "/v1/pull", {"authorization": ""}, 401, "unauthorized"),
        ("POST", "/v1/pull", {"authorization": "Basic shop=rw"}, 401, "unauthorized"),
        ("POST", "/v1/pull", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/v1/pull", {"content-encoding": "br"}, 415, "unsupported_media_type"),
        ("POST", "/v1/pull", {"content-length": "999999999"}, 413, "too_large"),
        ("POST", "/v1/pull", {"content-length": "-1"}, 400, "invalid_message"),
        ("POST", "/v1/pull", {}, 400, "codec_error"),
    ],
)
def test_a_refusal_has_its_status_and_its_code(
    server: SyncServer, method: str, path: str, headers: dict[str, str], status: int, code: str
):
    named = {"content-type": CONTENT_TYPE, "authorization": "Bearer shop=rw", **headers}
    answer = server.handle_http(method, path, named, b"\xff")
    assert (answer.status, decode(ErrorResponse, answer.body).code) == (status, code)
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert (answer.headers.get("allow") == "POST") == (status == 405)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_packed_request_is_unpacked_and_a_long_answer_packed(server: SyncServer, encoding: str):
    history = history_of(server)
    ask(server, push(history, 1, value="long " * 1000))
    request = pull(history)
    headers = {
        "content-type": CONTENT_TYPE,
        "authorization": "Bearer shop=rw",
        "content-encoding": encoding,
        "accept-encoding": encoding,
    }
    body = compress(encoding, encode(request))
    answer = server.handle_http("POST", "/v1/pull", headers, body)
    assert answer.status == 200
    assert answer.headers["content-encoding"] == encoding
    assert len(answer.body) < 1000


def test_an_answer_is_not_packed_for_who_did_not_ask(server: SyncServer):
    history = history_of(server)
    ask(server, push(history, 1, value="long " * 1000))
    for headers in ({}, {"accept_encoding": "gzip;q=0, br"}):
        answer = http(server, pull(history), **headers)
        assert "content-encoding" not in answer.headers
        assert len(answer.body) > 5000


def test_a_server_without_compression_says_so():
    with SyncServer.in_memory(compression=False) as server:
        answer = server.handle("/v1/handshake", None, handshake())
        assert isinstance(answer, HandshakeResponse)
        assert not set(ENCODINGS) & set(answer.features)
        packed = http(server, handshake(), content_encoding="gzip")
        assert packed.status == 415


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (gzip.compress(b"\0" * (21 << 20)), "too_large"),
        (gzip.compress(b"\0" * 100)[:-5], "codec_error"),
        (gzip.compress(b"") + gzip.compress(b"more"), "codec_error"),
        (b"not gzip", "codec_error"),
        (b"", "codec_error"),
    ],
    ids=["bomb", "cut", "two members", "not gzip", "empty"],
)
def test_a_packed_body_that_is_not_one_bounded_stream_is_refused(
    server: SyncServer, body: bytes, code: str
):
    headers = {
        "content-type": CONTENT_TYPE,
        "authorization": "Bearer shop=rw",
        "content-encoding": "gzip",
    }
    answer = server.handle_http("POST", "/v1/push", headers, body)
    assert decode(ErrorResponse, answer.body).code == code


@pytest.mark.skipif("zstd" not in ENCODINGS, reason="zstd is not installed")
def test_a_zstd_bomb_is_refused(server: SyncServer):
    headers = {
        "content-type": CONTENT_TYPE,
        "authorization": "Bearer shop=rw",
        "content-encoding": "zstd",
    }
    body = compress("zstd", b"\0" * (64 << 20))
    assert len(body) < 100_000
    answer = server.handle_http("POST", "/v1/push", headers, body)
    assert answer.status == 413


def test_a_body_over_the_limit_is_refused_before_it_is_decoded(server: SyncServer):
    headers = {"content-type": CONTENT_TYPE, "authorization": "Bearer shop=rw"}
    answer = server.handle_http("POST", "/v1/push", headers, b"\0" * (20 * 2**20 + 1))
    assert answer.status == 413


def test_a_message_sent_to_the_wrong_address_is_refused(server: SyncServer):
    answer = server.handle("/v1/pull", "shop=rw", handshake())
    assert isinstance(answer, ErrorResponse)
    assert answer.code == "invalid_message"


def test_a_device_is_never_sent_more_bytes_in_a_page_than_the_server_wants(server: SyncServer):
    assert server.front.bounded(pull(b"h" * 16, bytes_max=2**60)).bytes_max == 8 * 2**20
    assert server.front.bounded(pull(b"h" * 16, bytes_max=5)).bytes_max == 5


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("code", sorted(ERROR_TABLE))
def test_every_error_of_the_table_keeps_its_code_and_status(code: str):
    error = error_from_code(code, "why", retry_after=1.5, details={"n": 1})
    answer = failure(error, "rid")
    assert (answer.code, answer.message, answer.details) == (code, "why", {"n": 1})
    response = error_response(answer)
    assert response.status == ERROR_TABLE[code].status
    assert response.headers["retry-after"] == "2"
    assert decode(ErrorResponse, response.body) == answer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("/etc/secret is 42"), "server_error"),
        (StorageError("/data/shop.entidb is gone"), "storage_error"),
        (StorageFullError("/data is full"), "storage_full"),
        (SyncError("no code of the table"), "server_error"),
        (KeyError("secret"), "server_error"),
    ],
)
def test_what_was_not_said_on_purpose_does_not_leak(error: Exception, code: str):
    answer = failure(error, "rid-7")
    assert answer.code == code
    assert str(error.args[0]) not in answer.message
    assert "rid-7" in answer.message


def test_an_unexpected_error_is_answered_and_its_story_is_in_the_log(
    caplog: pytest.LogCaptureFixture,
):
    def broken(token: str | None) -> Grants:
        raise RuntimeError("a secret of the inside")

    with SyncServer.in_memory(authenticator=broken) as server, caplog.at_level(logging.ERROR):
        answer = http(server, handshake(), x_request_id="find-me")
    assert (answer.status, decode(ErrorResponse, answer.body).code) == (500, "server_error")
    assert b"secret" not in answer.body
    assert "find-me" in caplog.text
    assert "a secret of the inside" in caplog.text


def test_details_that_cannot_be_sent_do_not_keep_the_error_back():
    def refusing(token: str | None) -> Grants:
        raise PermissionDeniedError("no", details={"what": object()})

    with SyncServer.in_memory(authenticator=refusing) as server:
        answer = http(server, handshake())
    assert decode(ErrorResponse, answer.body).code == "forbidden"


def test_after_a_storage_error_the_next_request_works(tmp_path):
    from entidb.server import ServerConfig

    with SyncServer(ServerConfig(data_dir=tmp_path, insecure_no_auth=True)) as server:
        history = history_of(server)
        storage: Any = server.database("shop").storage

        def failing(batch: object, after: int | None = None) -> None:
            raise StorageError("/dev/sda is on fire")

        storage.commit = failing
        answer = ask(server, push(history, 1))
        assert answer.code == "storage_error"
        assert "sda" not in answer.message
        assert ask(server, push(history, 1)).results[0].verdict == Verdict.ACCEPTED


def test_a_validate_hook_refuses_one_transaction_and_lets_the_others_pass():
    def hook(context: Any, transaction: Any) -> Refusal | None:
        if transaction.transaction_id.int == 2:
            return Refusal("too_late", f"{context.subject} is late")
        return None

    with SyncServer.in_memory(validate=hook, clock=ManualClock()) as server:
        history = history_of(server)
        answer = ask(server, push(history, 1, 2, 3))
    verdicts = [result.verdict for result in answer.results]
    assert verdicts == [Verdict.ACCEPTED, Verdict.REJECTED, Verdict.ACCEPTED]
    assert answer.results[1].message == "anonymous is late"


def test_time_comes_from_the_clock_it_was_given():
    clock = ManualClock()
    with SyncServer.in_memory(clock=clock) as server:
        answer = server.handle("/v1/handshake", None, handshake())
    assert isinstance(answer, HandshakeResponse)
    assert answer.time == clock.now_ms()

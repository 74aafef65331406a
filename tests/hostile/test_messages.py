"""Broken messages against the decoder and the whole server in process: a refusal with a stable
code, nothing changed, and the next request is served."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from entidb import cbor
from entidb.cbor import decoding
from entidb.errors import ERROR_TABLE, ProtocolError
from entidb.protocol import (
    LIMITS,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    Limits,
    Manifest,
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushResponse,
    PushResult,
    PushTransaction,
    SegmentInfo,
    ServerState,
    SnapshotRequest,
    SyncRequest,
    SyncResponse,
    Verdict,
    decode,
    encode,
    path_of,
)
from entidb.server import SyncServer
from entidb.server.wire import ServerResponse
from entidb.testing.fuzz import dense, garbled, mutations, packed
from tests.hostile.support import store_hash

DEVICE = b"d" * 16
HISTORY = b"h" * 16
HEADERS = {"content-type": "application/cbor"}
RANDOM_BODIES = 2000

RESPONSES: list[SyncResponse] = [
    HandshakeResponse(
        major=1, minor=0, history=HISTORY, head=9, floor=1, limits=LIMITS, features=["x"], time=1
    ),
    PullResponse(
        collections=["a", "b"],
        commits=[
            PullCommit(3, DEVICE, 5, [PullOperation(0, b"1" * 16, b"\xa0")]),
            PullCommit(4, DEVICE, 6, [PullOperation(1, b"2" * 16, None)]),
        ],
        cursor=4,
        has_more=True,
        head=9,
        floor=1,
        time=1,
    ),
    PushResponse(
        results=[
            PushResult(Verdict.ACCEPTED, 5),
            PushResult(Verdict.CONFLICT, 0, 0, [ServerState(0, b"1" * 16, 4, b"\xa0")]),
            PushResult(Verdict.REJECTED, 0, 0, [], "no", "because"),
        ],
        collections=["a"],
        head=9,
        time=1,
    ),
    Manifest(
        history=HISTORY,
        head=9,
        floor=1,
        collections=["a", "b"],
        segments=[
            SegmentInfo(b"s" * 32, 0, 100, 2, b"1" * 16, b"2" * 16, "zstd"),
            SegmentInfo(b"t" * 32, 1, 90, 1, b"1" * 16, b"1" * 16, "gzip"),
        ],
        entities=3,
        ends=5,
        time=1,
    ),
    ErrorResponse(code="busy", message="m", retryable=True, retry_after=1.5, details={"a": [1]}),
]


def requests(history: bytes = HISTORY) -> list[SyncRequest]:
    return [
        HandshakeRequest(
            major=1, minor=0, db_id="shop", device_id=DEVICE, history=history, cursor=0
        ),
        PullRequest(
            db_id="shop",
            device_id=DEVICE,
            history=history,
            cursor=0,
            have=[(1, 1), (3, 3)],
            limit=10,
            bytes_max=1000,
            collections=["notes", "tags"],
        ),
        PushRequest(
            db_id="shop",
            device_id=DEVICE,
            history=history,
            cursor=0,
            collections=["notes", "tags"],
            transactions=[
                PushTransaction(
                    b"t" * 16,
                    1,
                    [
                        PushOperation(0, b"1" * 16, 0, cbor.encode({"a": 1})),
                        PushOperation(1, b"2" * 16, 0, None),
                    ],
                ),
                PushTransaction(b"u" * 16, 2, [PushOperation(0, b"3" * 16, 0, b"\xa0")]),
            ],
        ),
        SnapshotRequest(
            db_id="shop",
            device_id=DEVICE,
            history=history,
            collections=["notes", "tags"],
            packings=["zstd", "gzip"],
        ),
    ]


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with SyncServer.in_memory() as made:
        with made.database("shop").transaction() as tx:
            for number in range(5):
                tx.collection("notes").add({"number": number})
        yield made


def history_of(server: SyncServer) -> bytes:
    history = server.database("shop").history
    assert history is not None
    return history


def post(server: SyncServer, path: str, body: bytes, **headers: str) -> ServerResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.handle_http("POST", path, HEADERS | named, body)


def assert_well_behaved(server: SyncServer, path: str, body: bytes, what: str) -> None:
    before = store_hash(server.database("shop"))
    response = post(server, path, body)
    if response.status == 200:
        return
    answer = decode(ErrorResponse, response.body)
    assert 400 <= response.status < 500, (what, answer)
    assert ERROR_TABLE[answer.code].status == response.status, what
    assert store_hash(server.database("shop")) == before, what


def assert_still_serves(server: SyncServer) -> None:
    for request in requests(history_of(server)):
        fine = request
        if isinstance(request, PullRequest):
            fine = PullRequest(
                db_id="shop",
                device_id=DEVICE,
                history=request.history,
                cursor=0,
                limit=9,
                bytes_max=9,
            )
        assert post(server, path_of(fine), encode(fine)).status == 200
    assert server.database("shop").verify() == []


@pytest.mark.parametrize("message", [*requests(), *RESPONSES], ids=lambda m: type(m).__name__)
def test_the_decoder_answers_every_broken_message_with_its_own_error(
    message: SyncRequest | SyncResponse,
) -> None:
    kind = type(message)
    refused = taken = 0
    codes = set()
    for what, body in mutations(message):
        try:
            found = decode(kind, body)
        except ProtocolError as error:
            codes.add(error.code)
            refused += 1
            continue
        assert encode(decode(kind, encode(found))) == encode(found), what
        taken += 1
    assert refused > taken
    assert codes <= {"invalid_message", "codec_error", "too_large"}


@pytest.mark.parametrize("message", [*requests(), *RESPONSES], ids=lambda m: type(m).__name__)
def test_the_decoder_survives_random_bytes(message: SyncRequest | SyncResponse) -> None:
    rng = random.Random(f"{type(message).__name__}")
    data = encode(message)
    refused = 0
    for _ in range(RANDOM_BODIES):
        try:
            decode(type(message), garbled(data, rng))
        except ProtocolError:
            refused += 1
    assert refused > RANDOM_BODIES // 4


@pytest.mark.parametrize("index", range(3))
def test_a_broken_message_changes_nothing_on_the_server(server: SyncServer, index: int) -> None:
    request = requests(history_of(server))[index]
    for what, body in mutations(request):
        assert_well_behaved(server, path_of(request), body, what)
    assert_still_serves(server)


@pytest.mark.parametrize("index", range(3))
def test_random_bytes_change_nothing_on_the_server(server: SyncServer, index: int) -> None:
    rng = random.Random(index)
    request = requests(history_of(server))[index]
    data = encode(request)
    for _ in range(RANDOM_BODIES):
        body = garbled(data, rng)
        assert_well_behaved(server, path_of(request), body, body.hex())
    assert_still_serves(server)


@pytest.mark.parametrize("index", range(3))
def test_a_message_posted_to_another_address_is_refused(server: SyncServer, index: int) -> None:
    messages = requests(history_of(server))
    for request in messages:
        if request is not messages[index]:
            assert post(server, path_of(messages[index]), encode(request)).status == 400
    assert_still_serves(server)


@pytest.mark.parametrize("name", ["lists", "maps", "ranges", "texts"])
def test_what_is_huge_in_memory_is_refused_before_it_is_decoded(
    server: SyncServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = dense(server.config.body_bytes_max - 100)[name]
    with monkeypatch.context() as patch:
        for room in (cbor, decoding):
            patch.setattr(room, "decode_trusted", lambda data: pytest.fail("it was decoded"))
        response = post(server, "/v1/pull", body)
    answer = decode(ErrorResponse, encode_error(response))
    assert (response.status, answer.code) == (413, "too_large")
    assert_still_serves(server)


def encode_error(response: ServerResponse) -> bytes:
    assert response.headers["content-type"] == "application/cbor"
    return response.body


def test_the_largest_transaction_is_not_taken_for_a_bomb() -> None:
    limits = Limits(
        transaction_bytes_max=6 << 20,
        message_bytes_max=6 << 20,
        push_operations_max=1,
        pull_operations_max=1,
        collections_max=1,
    )
    operations = [
        PushOperation(0, number.to_bytes(16, "big"), 0, None) for number in range((6 << 20) // 64)
    ]
    request = PushRequest(
        db_id="shop",
        device_id=DEVICE,
        history=HISTORY,
        cursor=0,
        collections=["notes"],
        transactions=[PushTransaction(b"t" * 16, 1, operations)],
    )
    assert decode(PushRequest, encode(request), limits) == request


def test_a_value_of_too_many_lists_is_refused_and_one_below_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 5000
    monkeypatch.setattr(decoding, "CONTAINERS_MAX", most)
    fits = cbor.array_head(most - 1) + b"\x80" * (most - 1)
    assert len(cbor.check(fits)) == most - 1
    with pytest.raises(ValueError, match="maps and lists"):
        cbor.check(cbor.array_head(most) + b"\x80" * most)


def test_bytes_that_look_like_a_million_lists_are_a_value() -> None:
    value = {"image": b"\x80" * 2_000_000}
    assert cbor.check(cbor.encode(value)) == value


@pytest.mark.parametrize("size", [21 << 20, 300 << 20])
def test_bombs_are_refused_in_every_content_encoding(server: SyncServer, size: int) -> None:
    for encoding, body in packed(bytes(size)).items():
        assert len(body) < size // 500
        response = post(server, "/v1/push", body, content_encoding=encoding)
        assert response.status == 413, encoding
    assert_still_serves(server)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_packed_bodies_that_are_broken_are_refused(server: SyncServer, encoding: str) -> None:
    request = requests(history_of(server))[2]
    whole = packed(encode(request))[encoding]
    rng = random.Random(encoding)
    bodies = [
        b"",
        whole[:-1],
        whole + b"\x00",
        whole + whole,
        *(garbled(whole, rng) for _ in range(300)),
    ]
    before = store_hash(server.database("shop"))
    for body in bodies:
        response = post(server, "/v1/push", body, content_encoding=encoding)
        if response.status != 200:
            assert 400 <= response.status < 500
            assert store_hash(server.database("shop")) == before
        before = store_hash(server.database("shop"))
    assert_still_serves(server)


@pytest.mark.parametrize(
    "encoding", ["br", "deflate", "gzip, gzip", "zstd,gzip", "x" * 5000, "identity, gzip", "\x00"]
)
def test_unknown_content_encodings_are_refused(server: SyncServer, encoding: str) -> None:
    response = post(server, "/v1/push", b"", content_encoding=encoding)
    assert (response.status, decode(ErrorResponse, response.body).code) == (
        415,
        "unsupported_media_type",
    )

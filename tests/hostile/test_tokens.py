"""Tokens that somebody else made, and what a good token must not show of other databases."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from entidb import cbor
from entidb.errors import ERROR_TABLE
from entidb.protocol import (
    ErrorResponse,
    HandshakeRequest,
    PullRequest,
    PushOperation,
    PushRequest,
    PushResponse,
    PushTransaction,
    SyncRequest,
    Verdict,
    decode,
    encode,
    path_of,
)
from entidb.server import ServerConfig, SyncServer, mint_token
from entidb.server.wire import ServerResponse, decompress
from entidb.testing.fuzz import Canary, forged_tokens, leaks, mutations
from tests.hostile.support import store_hash
from tests.support import FakeClock, uid

SECRET = b"correct horse battery staple, twice over"
DEVICE = b"d" * 16
TENANTS = ("alpha", "beta", "gamma")


def private_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(b"k" * 32)


def public_pem() -> bytes:
    return (
        private_key()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def private_pem() -> bytes:
    return private_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.fixture(params=["secret", "ed25519"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[SyncServer, bytes, FakeClock]]:
    """A server, the key its tokens are made with, and its clock."""
    clock = FakeClock()
    if request.param == "secret":
        (tmp_path / "secret").write_bytes(SECRET)
        settings: dict[str, Any] = {"jwt_secret_file": tmp_path / "secret"}
        key = SECRET
    else:
        (tmp_path / "public.pem").write_bytes(public_pem())
        settings, key = {"jwt_public_key_file": tmp_path / "public.pem"}, private_pem()
    with SyncServer.in_memory(clock=clock, leeway_s=0.0, **settings) as server:
        for number, name in enumerate(TENANTS):
            canary = Canary(number)
            database = server.database(name)
            with database.transaction() as tx:
                tx.collection("notes")[uid(int.from_bytes(canary.entity_id, "big"))] = canary.value
                tx.collection(canary.text).add(1)
        yield server, key, clock


def token_for(key: bytes, clock: FakeClock, *names: str, **named: object) -> str:
    fields = {"subject": "ann", "databases": list(names), "clock": clock} | named
    return mint_token(key, **fields)  # type: ignore[arg-type]


def ask(server: SyncServer, token: str, body: bytes, path: str = "/v1/pull") -> ServerResponse:
    headers = {"content-type": "application/cbor", "authorization": f"Bearer {token}"}
    return server.handle_http("POST", path, headers, body)


def pull(server: SyncServer, name: str) -> PullRequest:
    history = server.database(name).history if name in TENANTS else b"?" * 16
    assert history is not None
    return PullRequest(
        db_id=name, device_id=DEVICE, history=history, cursor=0, limit=100, bytes_max=1 << 20
    )


def code_of(response: ServerResponse) -> str:
    return decode(ErrorResponse, response.body).code


def test_no_forged_token_is_believed(world: tuple[SyncServer, bytes, FakeClock]) -> None:
    server, key, clock = world
    good = token_for(key, clock, "alpha")
    body = encode(pull(server, "alpha"))
    assert ask(server, good, body).status == 200
    tried = 0
    for what, forged in forged_tokens(good, random.Random(1), public_key=public_pem()):
        response = ask(server, forged, body)
        assert response.status == 401, what
        assert code_of(response) == "unauthorized", what
        tried += 1
    assert tried > 100
    assert ask(server, good, body).status == 200


@pytest.mark.parametrize(
    "wrong",
    [{"expires_s": 1.0}, {"audience": "another"}, {"claims": {"nbf": 2**40}}],
    ids=["expired", "other audience", "not yet"],
)
def test_a_true_token_that_is_not_for_now_or_here_is_refused(
    world: tuple[SyncServer, bytes, FakeClock], wrong: dict[str, object]
) -> None:
    server, key, clock = world
    token = token_for(key, clock, "alpha", **wrong)
    clock.ms += 2000
    assert ask(server, token, encode(pull(server, "alpha"))).status == 401


def test_a_token_that_was_good_a_moment_ago_ends_with_its_time(
    world: tuple[SyncServer, bytes, FakeClock],
) -> None:
    server, key, clock = world
    token = token_for(key, clock, "alpha", expires_s=10.0)
    body = encode(pull(server, "alpha"))
    assert ask(server, token, body).status == 200
    clock.ms += 10_000
    assert ask(server, token, body).status == 401


def test_a_token_for_one_database_is_told_nothing_of_the_others(
    world: tuple[SyncServer, bytes, FakeClock],
) -> None:
    server, key, clock = world
    token = token_for(key, clock, "alpha")
    answers = {
        name: ask(server, token, encode(pull(server, name)))
        for name in (*TENANTS[1:], "nobody", "*", "../beta", "alpha/../beta", "ALPHA", "alpha.")
    }
    codes = {(answer.status, code_of(answer)) for answer in answers.values()}
    assert codes == {(403, "forbidden")}
    words = {decode(ErrorResponse, answer.body).message for answer in answers.values()}
    assert len(words) == 1, "an existing database is not told from one that is not there"


@pytest.mark.parametrize(
    "name",
    [
        "../beta",
        "..",
        ".",
        "/etc",
        "a/b",
        "a\\b",
        "beta\x00",
        "C:",
        "nul/",
        "*",
        "-rf",
        "é",
        "a" * 101,
    ],
)
def test_no_name_leads_out_of_the_data_directory(name: str, tmp_path: Path) -> None:
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with SyncServer(config) as server:
        request = HandshakeRequest(
            major=1, minor=0, db_id=name, device_id=DEVICE, history=None, cursor=0
        )
        response = ask(server, "", encode(request), "/v1/handshake")
        assert response.status in (400, 404)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert list((tmp_path / "data").iterdir()) == []


def hostile_requests(server: SyncServer) -> Iterator[tuple[str, bytes]]:
    """Everything a holder of alpha's token may try, whole and broken, against everybody."""
    for name in TENANTS:
        history = server.database(name).history
        assert history is not None
        canary = Canary(TENANTS.index(name))
        messages: list[SyncRequest] = [
            HandshakeRequest(
                major=1, minor=0, db_id=name, device_id=DEVICE, history=None, cursor=0
            ),
            pull(server, name),
            PushRequest(
                db_id=name,
                device_id=DEVICE,
                history=history,
                cursor=0,
                collections=["notes"],
                transactions=[
                    # Built on nothing: conflicts with the canary where it stands.
                    PushTransaction(
                        b"t" * 16, 1, [PushOperation(0, canary.entity_id, 0, cbor.encode(1))]
                    )
                ],
            ),
        ]
        for message in messages:
            yield path_of(message), encode(message)
            for _, body in mutations(message):
                yield path_of(message), body


def test_no_answer_holds_a_byte_of_another_database(
    world: tuple[SyncServer, bytes, FakeClock],
) -> None:
    server, key, clock = world
    token = token_for(key, clock, "alpha")
    others = [Canary(number) for number in (1, 2)]
    before = {name: store_hash(server.database(name)) for name in TENANTS[1:]}
    sung = 0
    for path, body in hostile_requests(server):
        headers = {
            "content-type": "application/cbor",
            "authorization": f"Bearer {token}",
            "accept-encoding": "gzip",
        }
        response = server.handle_http("POST", path, headers, body)
        plain = response.body
        if "content-encoding" in response.headers:
            plain = decompress(response.headers["content-encoding"], plain, 1 << 24)
        # What came in with the request may be said again; what only stands elsewhere may not.
        told = [canary for canary in others if not canary.sings_in(body)]
        assert leaks(plain, told) == []
        assert response.status < 500
        sung += Canary(0).sings_in(plain)
    assert sung > 3, "its own database is not hidden from it"
    for name in TENANTS[1:]:
        assert store_hash(server.database(name)) == before[name]


def test_a_token_that_only_writes_reads_nothing_out_of_conflicts(
    world: tuple[SyncServer, bytes, FakeClock],
) -> None:
    server, key, clock = world
    token = token_for(key, clock, databases={"alpha": "w"})
    history = server.database("alpha").history
    assert history is not None
    canary = Canary(0)
    request = PushRequest(
        db_id="alpha",
        device_id=DEVICE,
        history=history,
        cursor=0,
        collections=["notes"],
        transactions=[PushTransaction(b"t" * 16, 1, [PushOperation(0, canary.entity_id, 0, None)])],
    )
    response = ask(server, token, encode(request), "/v1/push")
    (result,) = decode(PushResponse, response.body).results
    assert result.verdict == Verdict.CONFLICT
    assert canary.text.encode() not in response.body


def test_a_token_for_some_collections_neither_sees_nor_touches_the_rest(
    world: tuple[SyncServer, bytes, FakeClock],
) -> None:
    server, key, clock = world
    rights = {"alpha": {"rights": "rw", "collections": ["tags"]}}
    token = token_for(key, clock, databases=rights)
    history = server.database("alpha").history
    assert history is not None
    before = store_hash(server.database("alpha"))
    canary = Canary(0)
    operations = [
        PushOperation(1, b"1" * 16, 0, b"\xa0"),
        PushOperation(0, canary.entity_id, 0, None),
    ]
    request = PushRequest(
        db_id="alpha",
        device_id=DEVICE,
        history=history,
        cursor=0,
        collections=["notes", "tags"],
        transactions=[PushTransaction(b"t" * 16, 1, operations)],
    )
    answers = [ask(server, token, encode(request), "/v1/push")]
    answers += [ask(server, token, encode(pull(server, "alpha")))]
    (result,) = decode(PushResponse, answers[0].body).results
    assert (result.verdict, result.code) == (Verdict.REJECTED, "forbidden")
    assert not any(canary.sings_in(answer.body) for answer in answers)
    assert store_hash(server.database("alpha")) == before


def test_a_token_in_the_address_or_the_body_is_no_token(
    world: tuple[SyncServer, bytes, FakeClock],
) -> None:
    server, key, clock = world
    good = token_for(key, clock, "alpha")
    body = encode(pull(server, "alpha"))
    headers = {"content-type": "application/cbor"}
    tries = [
        ("/v1/pull", headers | {"cookie": f"authorization={good}"}),
        ("/v1/pull", headers | {"authorization": good}),
        ("/v1/pull", headers | {"authorization": f"Basic {good}"}),
        ("/v1/pull", headers | {"proxy-authorization": f"Bearer {good}"}),
        (f"/v1/pull?token={good}", headers),
        (f"/v1/pull?access_token={good}", headers),
    ]
    for path, named in tries:
        response = server.handle_http("POST", path, named, body)
        assert response.status in (401, 404)
        assert ERROR_TABLE[code_of(response)].status == response.status

"""Keys of tokens: several at once, new ones without a restart, and an end for old ones."""

from __future__ import annotations

import json
import logging
import os
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from entidb.errors import AuthenticationError, ConfigError, ServerBusyError
from entidb.server import JwtAuthenticator, ServerConfig, SyncServer, mint_token, serving
from entidb.server import jwks as jwks_module
from entidb.server.auth import authenticator_for
from entidb.server.certificates import Certificate
from entidb.server.keys import key_of_jwk
from entidb.server.signals import read_again
from entidb.types import SystemClock
from tests.server.support import NOW_MS, SECRET, Client, ManualClock
from tests.server.test_auth import EC, ED25519, RSA, pem_pair
from tests.server.test_run import make_certificate

OLD, NEW = b"old " * 10, b"new " * 10
POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir(mode=0o700)
    (tmp_path / "keys" / "old.secret").write_bytes(OLD)
    return tmp_path / "keys"


def over(keys: Path, clock: ManualClock) -> JwtAuthenticator:
    made = authenticator_for(ServerConfig(data_dir=None, jwt_keys=keys), clock)
    assert isinstance(made, JwtAuthenticator)
    return made


def token(key: bytes, clock: ManualClock, kid: str | None = None, **fields: Any) -> str:
    return mint_token(key, subject="ada", databases=["shop"], clock=clock, kid=kid, **fields)


# ---------------------------------------------------------------- a directory


def test_each_file_of_a_directory_is_a_key_by_its_name(keys: Path, clock: ManualClock):
    (keys / "new.secret").write_bytes(NEW)
    (keys / "service.pem").write_bytes(ED25519[1])
    (keys / "curve.pem").write_bytes(EC[1])
    check = over(keys, clock)
    for key, kid in ((OLD, "old"), (NEW, "new"), (ED25519[0], "service"), (EC[0], "curve")):
        assert check(token(key, clock, kid)).subject == "ada"


def test_a_token_counts_only_for_the_key_it_names(keys: Path, clock: ManualClock):
    (keys / "new.secret").write_bytes(NEW)
    check = over(keys, clock)
    for key, kid in ((OLD, "new"), (NEW, "old"), (OLD, "another"), (OLD, "../keys/old")):
        with pytest.raises(AuthenticationError, match="not valid"):
            check(token(key, clock, kid))


def test_a_token_without_a_kid_is_tried_with_every_key(keys: Path, clock: ManualClock):
    (keys / "a-new.secret").write_bytes(NEW)
    check = over(keys, clock)
    assert check(token(OLD, clock)).subject == "ada"
    assert check(token(NEW, clock)).subject == "ada"
    with pytest.raises(AuthenticationError):
        check(token(SECRET, clock))


def test_a_public_key_in_a_directory_is_no_secret(keys: Path, clock: ManualClock):
    (keys / "service.pem").write_bytes(RSA[1])
    check = over(keys, clock)
    forged = jwt.api_jws.PyJWS()  # signing with it is refused by mint_token
    claims = {"sub": "eve", "aud": "entidb", "exp": NOW_MS, "databases": ["shop"]}
    with pytest.raises(jwt.InvalidKeyError):
        forged.encode(json.dumps(claims).encode(), RSA[1], algorithm="HS256")
    with pytest.raises(AuthenticationError):
        check(token(ED25519[0], clock, "service"))


def test_a_new_key_counts_without_a_restart(keys: Path, clock: ManualClock):
    check = over(keys, clock)
    made = token(NEW, clock, "new")
    with pytest.raises(AuthenticationError):
        check(made)
    (keys / "new.secret").write_bytes(NEW)
    clock.advance(1)
    assert check(made).subject == "ada"


def test_a_removed_key_takes_its_tokens_along_also_those_that_were_checked(
    keys: Path, clock: ManualClock
):
    (keys / "new.secret").write_bytes(NEW)
    check = over(keys, clock)
    made = token(OLD, clock, "old")
    assert check(made).subject == "ada"
    (keys / "old.secret").unlink()
    clock.advance(1)
    with pytest.raises(AuthenticationError):
        check(made)


def test_a_replaced_key_of_one_file_counts_without_a_restart(tmp_path: Path, clock: ManualClock):
    path = tmp_path / "secret"
    path.write_bytes(OLD)
    check = authenticator_for(ServerConfig(data_dir=None, jwt_secret_file=path), clock)
    assert check(token(OLD, clock)).subject == "ada"
    path.write_bytes(NEW)
    clock.advance(1)
    assert check(token(NEW, clock)).subject == "ada"
    with pytest.raises(AuthenticationError):
        check(token(OLD, clock))


def test_a_change_that_cannot_be_read_leaves_the_keys_as_they_were_and_says_so(
    keys: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
):
    check = over(keys, clock)
    (keys / "new.secret").write_bytes(b"short")
    with caplog.at_level(logging.ERROR, "entidb.server"):
        for _ in range(3):
            clock.advance(1)
            assert check(token(OLD, clock, "old")).subject == "ada"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "new.secret" in said and "32 are needed" in said
    (keys / "new.secret").write_bytes(NEW)
    clock.advance(1)
    assert check(token(NEW, clock, "new")).subject == "ada"


def test_when_the_last_key_is_taken_away_every_token_is_refused(keys: Path, clock: ManualClock):
    check = over(keys, clock)
    (keys / "old.secret").unlink()
    clock.advance(1)
    with pytest.raises(AuthenticationError):
        check(token(OLD, clock, "old"))


@pytest.mark.parametrize(
    ("ends", "left_s"),
    [("2026-05-28T20:27:40+00:00", 60.0), ("2026-05-28T22:27:40+02:00", 60.0)],
)
def test_a_key_ends_at_its_date_whatever_its_tokens_say(
    keys: Path, clock: ManualClock, ends: str, left_s: float
):
    (keys / "old.ends").write_text(ends + "\n")
    (keys / "new.secret").write_bytes(NEW)
    check = over(keys, clock)
    made = token(OLD, clock, "old", expires_s=1e6)
    clock.advance(left_s - 0.001)
    assert check(made).subject == "ada"
    clock.advance(0.001)
    with pytest.raises(AuthenticationError, match="expired"):
        check(made)
    with pytest.raises(AuthenticationError, match="expired"):
        check(token(OLD, clock, "old"))
    assert check(token(NEW, clock, "new")).subject == "ada"
    assert "until 2026-05-28T20:27:40+00:00" in check.keys.words()


def test_a_date_without_a_time_is_its_first_moment_in_utc(keys: Path, clock: ManualClock):
    (keys / "old.ends").write_text("2026-05-29")
    assert "until 2026-05-29T00:00:00+00:00" in over(keys, clock).keys.words()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("old.ends", b"tomorrow"),
        ("new.secret", b"short"),
        ("new.pem", RSA[0]),
        ("old.pem", RSA[1]),  # the same kid twice
        ("new.jwk", b"{"),
        ("new.jwk", b'{"kty": "RSA"}'),
        ("new.jwk", b'{"kty": "oct", "k": "c2hvcnQ"}'),
        ("new.secret", b""),
    ],
)
def test_a_directory_with_a_fault_is_refused_at_the_start_and_the_file_named(
    keys: Path, clock: ManualClock, name: str, content: bytes
):
    (keys / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        over(keys, clock)
    assert name in str(caught.value) or "same kid" in str(caught.value)


def test_what_tools_leave_beside_the_keys_does_not_count(keys: Path, clock: ManualClock):
    (keys / ".old.secret.swp").write_bytes(b"x")
    (keys / "old.secret~").write_bytes(b"x")
    (keys / "directory").mkdir()
    assert [key.kid for key in over(keys, clock).keys.keys] == ["old"]


@POSIX
@pytest.mark.parametrize("what", ["keys", "keys/old.secret"])
def test_keys_that_everybody_can_write_are_refused(tmp_path: Path, keys: Path, what: str):
    os.chmod(tmp_path / what, 0o777)
    with pytest.raises(ConfigError, match="everybody"):
        over(keys, ManualClock())


def test_there_is_a_largest_number_of_keys(keys: Path, clock: ManualClock):
    for number in range(32):
        (keys / f"{number}.secret").write_bytes(NEW + bytes([65 + number]))
    with pytest.raises(ConfigError, match="too many"):
        over(keys, clock)


def test_no_key_stands_in_what_is_logged_of_it(keys: Path, clock: ManualClock):
    made = over(keys, clock)
    assert "old old" not in repr(made.keys.keys) + made.keys.words()


# ---------------------------------------------------------------- JWKS


def jwk(key: Any, **members: Any) -> dict[str, Any]:
    if isinstance(key, bytes):
        made = jwt.algorithms.HMACAlgorithm.to_jwk(key, as_dict=True)
    elif isinstance(key, rsa.RSAPublicKey):
        made = jwt.algorithms.RSAAlgorithm.to_jwk(key, as_dict=True)
    elif isinstance(key, ec.EllipticCurvePublicKey):
        made = jwt.algorithms.ECAlgorithm.to_jwk(key, as_dict=True)
    else:
        made = jwt.algorithms.OKPAlgorithm.to_jwk(key, as_dict=True)
    return {**made, **members}


SIGNING = ed25519.Ed25519PrivateKey.generate()
CURVE = ec.generate_private_key(ec.SECP384R1())
PUBLIC = jwk(SIGNING.public_key(), kid="one")


def test_a_jwks_file_holds_several_keys_with_their_times(tmp_path: Path, clock: ManualClock):
    path = tmp_path / "keys.json"
    now = NOW_MS / 1000
    found = [
        {**PUBLIC, "exp": now + 60},
        jwk(CURVE.public_key(), kid="two", nbf=now + 30),
        jwk(OLD, kid="three", alg="HS256"),
        {"kty": "RSA", "use": "enc", "kid": "not for signing"},
    ]
    path.write_text(json.dumps({"keys": found}))
    check = over(path, clock)
    assert check(token(pem_pair(SIGNING)[0], clock, "one")).subject == "ada"
    assert check(token(OLD, clock, "three")).subject == "ada"
    later = token(pem_pair(CURVE)[0], clock, "two")
    with pytest.raises(AuthenticationError, match="not valid yet"):
        check(later)
    clock.advance(60)
    assert check(later).subject == "ada"
    with pytest.raises(AuthenticationError, match="expired"):
        check(token(pem_pair(SIGNING)[0], clock, "one"))


WEAK = rsa.generate_private_key(65537, 1024).public_key()
LARGE = rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize(
    "document",
    [
        b"[]",
        b"{}",
        b"\xff",
        b'{"keys": {}}',
        json.dumps({"keys": [7]}).encode(),
        json.dumps({"keys": [PUBLIC, PUBLIC]}).encode(),
        json.dumps({"keys": [PUBLIC, {**PUBLIC, "kid": 7}]}).encode(),
        json.dumps({"keys": [PUBLIC, jwk(CURVE.public_key())]}).encode(),
        json.dumps({"keys": [jwk(WEAK, kid="weak")]}).encode(),
        json.dumps({"keys": [{**PUBLIC, "exp": "tomorrow"}]}).encode(),
        json.dumps({"keys": [{**PUBLIC, "alg": "none"}]}).encode(),
        json.dumps({"keys": [jwk(LARGE.public_key(), kid="x", alg="HS256")]}).encode(),
        json.dumps({"keys": [jwk(OLD, kid="x", alg="HS512")]}).encode(),
        json.dumps({"keys": [{**PUBLIC, "d": "AAAA"}]}).encode(),
    ],
)
def test_a_jwks_file_that_cannot_be_trusted_is_refused(
    tmp_path: Path, clock: ManualClock, document: bytes
):
    path = tmp_path / "keys.json"
    path.write_bytes(document)
    with pytest.raises(ConfigError):
        over(path, clock)


# ---------------------------------------------------------------- JWKS by URL


class Provider:
    """An identity provider on this machine, which answers ``document`` and counts."""

    def __init__(self) -> None:
        self.document: bytes = json.dumps({"keys": [PUBLIC]}).encode()
        self.status = 200
        self.asked = 0
        self.gate = threading.Event()
        self.gate.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                provider.gate.wait(30)
                self.send_response(provider.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                try:
                    self.wfile.write(provider.document)
                except OSError:
                    return  # whoever asked has heard enough

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.close()


def remote(provider: Provider, clock: ManualClock) -> JwtAuthenticator:
    config = ServerConfig(data_dir=None, jwt_jwks_url=provider.url, jwks_refresh_s=100)
    made = authenticator_for(config, clock)
    assert isinstance(made, JwtAuthenticator)
    return made


def eventually(call: Callable[[], Any]) -> Any:
    """What ``call`` answers once nobody is told to come again any more."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return call()
        except ServerBusyError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_keys_are_fetched_while_who_asks_is_told_to_come_again(
    provider: Provider, clock: ManualClock
):
    provider.gate.clear()
    check = remote(provider, clock)
    made = token(pem_pair(SIGNING)[0], clock, "one")
    assert provider.asked == 0
    for _ in range(3):
        with pytest.raises(ServerBusyError) as told:
            check(made)
        assert told.value.retry_after == 1.0
    provider.gate.set()
    assert eventually(lambda: check(made)).subject == "ada"
    assert provider.asked == 1


def test_an_unknown_kid_has_them_fetched_again_but_not_at_everybodys_will(
    provider: Provider, clock: ManualClock
):
    check = remote(provider, clock)
    eventually(lambda: check(token(pem_pair(SIGNING)[0], clock, "one")))
    fresh = ed25519.Ed25519PrivateKey.generate()
    made = token(pem_pair(fresh)[0], clock, "two")
    for number in range(20):  # within the first ten seconds: no fetch
        with pytest.raises(AuthenticationError):
            check(token(pem_pair(fresh)[0], clock, f"made up {number}"))
    assert provider.asked == 1
    provider.document = json.dumps({"keys": [PUBLIC, jwk(fresh.public_key(), kid="two")]}).encode()
    clock.advance(10)
    assert eventually(lambda: check(made)).subject == "ada"
    for number in range(20):
        with pytest.raises(AuthenticationError):
            check(token(pem_pair(fresh)[0], clock, f"made up {number}"))
    assert provider.asked == 2


def test_keys_that_come_while_a_token_is_looked_at_count_for_it(
    provider: Provider, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    check = remote(provider, clock)
    eventually(lambda: check(token(pem_pair(SIGNING)[0], clock, "one")))
    fresh = ed25519.Ed25519PrivateKey.generate()
    provider.document = json.dumps({"keys": [PUBLIC, jwk(fresh.public_key(), kid="two")]}).encode()
    # Another token's fetch ends between the look at the keys and the question what is missing.
    monkeypatch.setattr(check._keys, "missing", lambda kid: check.reload())
    assert check(token(pem_pair(fresh)[0], clock, "two")).subject == "ada"
    monkeypatch.setattr(check._keys, "missing", lambda kid: None)
    with pytest.raises(AuthenticationError):
        check(token(pem_pair(fresh)[0], clock, "three"))


@pytest.mark.parametrize(
    ("name", "meant"), [("odl.ends", "old.ends"), ("old.pem.ends", "old.ends"), ("x.ends", None)]
)
def test_a_file_that_ends_no_key_is_warned_of_by_its_name(
    keys: Path, clock: ManualClock, name: str, meant: str | None, caplog: pytest.LogCaptureFixture
):
    (keys / name).write_text("2026-05-29")
    over(keys, clock)
    (said,) = [each.getMessage() for each in caplog.records]
    assert f"has {name}, which ends no key" in said
    assert meant is None or f"for example {meant}" in said


@pytest.mark.parametrize(("member", "meant"), [("expp", "exp"), ("expires", "exp"), ("nbF", "nbf")])
def test_a_member_of_a_key_that_nothing_reads_is_warned_of(
    member: str, meant: str, caplog: pytest.LogCaptureFixture
):
    key_of_jwk({**PUBLIC, member: 1_800_000_000, "x-label": "tills"}, "the file x")
    (said,) = [each.getMessage() for each in caplog.records]
    assert f"the file x has a member {member!r}" in said and f"is {meant!r} meant" in said


@pytest.mark.parametrize(
    ("status", "document"),
    [
        (500, b"{}"),
        (302, b""),
        (200, b"<html>"),
        (200, b'{"keys": []}'),
        (200, b" " * (256 * 1024 + 1)),
        (200, json.dumps({"keys": [jwk(OLD, kid="one")]}).encode()),
    ],
    ids=["broken", "redirect", "page", "empty", "large", "secret"],
)
def test_a_provider_that_answers_nonsense_changes_nothing(
    provider: Provider, clock: ManualClock, status: int, document: bytes,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    check = remote(provider, clock)
    made = token(pem_pair(SIGNING)[0], clock, "one")
    eventually(lambda: check(made))
    provider.status, provider.document = status, document
    with pytest.raises(ConfigError, match="jwt_jwks_url"):
        check.reload()
    clock.advance(200)
    asked = provider.asked
    assert check(made).subject == "ada"
    while provider.asked == asked or "last good keys stay" not in caplog.text:
        time.sleep(0.01)
    assert check(made).subject == "ada"


def test_what_a_provider_has_for_others_is_passed_over(provider: Provider, clock: ManualClock):
    others = [{"kty": "future"}, jwk(WEAK, kid="weak"), {"kty": "RSA", "use": "enc"}, 7]
    provider.document = json.dumps({"keys": [*others, PUBLIC]}).encode()
    assert [key.kid for key in remote(provider, clock).reload().keys] == ["one"]


def test_a_provider_that_drips_is_given_up(
    provider: Provider, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jwks_module, "FETCH_S", 0.05)
    provider.gate.clear()
    with pytest.raises(ConfigError, match="cannot be read"):
        remote(provider, clock).reload()


@pytest.mark.parametrize(
    "url",
    ["http://example.org/jwks", "ftp://127.0.0.1/", "https://", "file:///etc/passwd", "https://[x/",
     "https://ada:secret@example.org/"],
)  # fmt: skip
def test_keys_come_over_tls_or_from_this_machine(url: str, clock: ManualClock):
    with pytest.raises(ConfigError, match="jwt_jwks_url"):
        authenticator_for(ServerConfig(data_dir=None, jwt_jwks_url=url), clock)


# ---------------------------------------------------------------- in a running server


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_reload_says_which_keys_there_are_and_what_went_wrong(
    keys: Path, capfd: pytest.CaptureFixture[str]
):
    with SyncServer(ServerConfig(data_dir=None, jwt_keys=keys)) as server:
        (keys / "new.secret").write_bytes(NEW)
        read_again(server, None)
        (keys / "bad\x1b[31m.secret").write_bytes(b"short")
        read_again(server, None)
    first, second = capfd.readouterr().err.splitlines()
    assert first == (
        "entidb: SIGHUP: keys: new (HS256), old (HS256); other settings need a restart"
    )
    assert "the keys stay as they were" in second
    assert "\x1b" not in second


@pytest.mark.process
def test_a_running_server_takes_a_new_key_within_a_second(keys: Path, tmp_path: Path):
    config = ServerConfig(data_dir=tmp_path / "data", jwt_keys=keys)
    made = mint_token(NEW, subject="ada", databases=["shop"], kid="new")
    with serving(config) as url, Client(url, made) as client:
        assert client.request("POST", "/v1/handshake").status == 401
        (keys / "new.secret").write_bytes(NEW)
        began = time.monotonic()
        while client.request("POST", "/v1/handshake").status == 401:
            assert time.monotonic() - began < 10
            time.sleep(0.05)
        assert client.history()


# ---------------------------------------------------------------- certificates


def serial(url: str) -> bytes:
    host, _, port = url.removeprefix("https://").partition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=30).encode()


@pytest.mark.process
def test_a_new_certificate_is_shown_without_a_restart(tmp_path: Path):
    cert, key = make_certificate(tmp_path)
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with serving(config, tls_cert=cert, tls_key=key) as url:
        before = serial(url)
        assert before.split() == Path(cert).read_bytes().split()
        make_certificate(tmp_path)
        deadline = time.monotonic() + 30
        while serial(url) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert serial(url).split() == Path(cert).read_bytes().split()


def test_a_certificate_whose_key_has_not_come_yet_leaves_the_pair_before_it(tmp_path: Path):
    cert, key = make_certificate(tmp_path)
    pair = Certificate(cert, key, SystemClock())
    other = tmp_path / "other"
    other.mkdir()
    new_cert, new_key = make_certificate(other)
    Path(new_cert).replace(cert)
    with pytest.raises(ConfigError, match="do not belong together"):
        pair.reload()
    Path(new_key).replace(key)
    pair.reload()

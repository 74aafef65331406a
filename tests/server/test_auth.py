"""Tokens: what is believed, what is not, and what nobody is told."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from entidb.errors import AuthenticationError, ConfigError, PermissionDeniedError
from entidb.server import Grants, JwtAuthenticator, Rights, ServerConfig, mint_token
from entidb.server.auth import authenticator_for, databases_of
from entidb.server.keys import check_secret
from tests.server.support import NOW_MS, SECRET, ManualClock

NOW_S = NOW_MS // 1000
CLAIMS = {"sub": "ada", "aud": "entidb", "exp": NOW_S + 60, "databases": {"shop": "rw"}}


def sign(claims: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, key, algorithm=algorithm)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def check(clock: ManualClock) -> JwtAuthenticator:
    return JwtAuthenticator(SECRET, "HS256", audience="entidb", leeway_s=5, clock=clock)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CLAIMS.items() if key != name}


def test_a_good_token_grants_what_it_says(check: JwtAuthenticator):
    grants = check(sign({**CLAIMS, "databases": {"shop": "rw", "catalog": "r", "log": "w"}}))
    assert grants.subject == "ada"
    assert (grants.on("shop").read, grants.on("shop").write) == (True, True)
    assert (grants.on("catalog").read, grants.on("catalog").write) == (True, False)
    assert (grants.on("log").read, grants.on("log").write) == (False, True)
    assert grants.on("shop").claims["aud"] == "entidb"


def test_another_database_is_forbidden_in_words_that_do_not_name_it(check: JwtAuthenticator):
    with pytest.raises(PermissionDeniedError) as caught:
        check(sign(CLAIMS)).on("payroll")
    assert caught.value.code == "forbidden"
    assert "payroll" not in caught.value.message


def test_a_list_of_databases_grants_both_rights_on_each(check: JwtAuthenticator):
    grants = check(sign({**CLAIMS, "databases": ["shop", "log"]}))
    assert grants.on("log").write
    with pytest.raises(PermissionDeniedError):
        grants.on("other")


def test_only_a_star_stands_for_all_databases_and_a_name_goes_before_it(check: JwtAuthenticator):
    grants = check(sign({**CLAIMS, "databases": {"*": "r", "shop": "rw"}}))
    assert not grants.on("anything").write
    assert grants.on("shop").write


def test_a_token_can_be_held_to_some_collections(check: JwtAuthenticator):
    claim = {"shop": {"rights": "rw", "collections": ["notes"]}}
    grant = check(sign({**CLAIMS, "databases": claim})).on("shop")
    assert grant.collections == frozenset(["notes"])


@pytest.mark.parametrize(
    "databases",
    [
        *(None, "shop", 7, {"shop": "admin"}, {"shop": 1}, ["shop", 2]),
        {"shop": {"collections": []}},
        {"shop": {"rights": "rw", "colections": ["notes"]}},
    ],
)
def test_rights_that_cannot_be_read_grant_nothing(check: JwtAuthenticator, databases: object):
    with pytest.raises(AuthenticationError):
        check(sign({**CLAIMS, "databases": databases}))


def test_a_token_without_databases_is_refused(check: JwtAuthenticator):
    with pytest.raises(AuthenticationError):
        check(sign(without("databases")))


@pytest.mark.parametrize("claim", ["exp", "aud", "sub"])
def test_a_token_without_a_required_claim_is_refused(check: JwtAuthenticator, claim: str):
    with pytest.raises(AuthenticationError, match="not valid"):
        check(sign(without(claim)))


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": "another-service"},
        {"aud": ["a", "b"]},
        {"sub": ""},
        {"sub": 7},
        {"exp": "tomorrow"},
        {"exp": True},
        {"exp": 1e999},
        {"exp": None},
        {"exp": 10**400},
        {"nbf": "yesterday"},
    ],
)
def test_a_token_with_a_bad_claim_is_refused(check: JwtAuthenticator, changed: dict[str, Any]):
    with pytest.raises(AuthenticationError, match="not valid"):
        check(sign({**CLAIMS, **changed}))


def test_an_expired_token_is_told_so_and_the_leeway_counts(
    check: JwtAuthenticator, clock: ManualClock
):
    token = sign(CLAIMS)
    clock.advance(64)
    assert check(token).subject == "ada"
    clock.advance(1)
    with pytest.raises(AuthenticationError, match="expired"):
        check(token)


def test_a_token_from_the_future_is_refused_until_its_time_has_come(
    check: JwtAuthenticator, clock: ManualClock
):
    token = sign({**CLAIMS, "nbf": NOW_S + 30})
    with pytest.raises(AuthenticationError, match="not valid yet"):
        check(token)
    clock.advance(30)
    assert check(token).subject == "ada"


def encoded(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", ""])
def test_a_token_without_a_signature_is_refused(check: JwtAuthenticator, algorithm: str):
    token = f"{encoded({'alg': algorithm, 'typ': 'JWT'})}.{encoded(CLAIMS)}."
    with pytest.raises(AuthenticationError):
        check(token)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_only_the_one_algorithm_of_the_key_is_taken(check: JwtAuthenticator, algorithm: str):
    with pytest.raises(AuthenticationError):
        check(sign(CLAIMS, SECRET * 2, algorithm))


def test_a_token_signed_with_another_secret_is_refused(check: JwtAuthenticator):
    with pytest.raises(AuthenticationError):
        check(sign(CLAIMS, SECRET[::-1]))


def test_a_token_with_any_bit_flipped_is_refused(check: JwtAuthenticator):
    token = sign(CLAIMS).encode()
    refused = 0
    for at in range(len(token)):
        flipped = bytearray(token)
        flipped[at] ^= 1
        text = flipped.decode("latin-1")
        if _same_bytes(text, token.decode()):
            continue  # unused bits at the end of a part: the same token in another spelling
        with pytest.raises(AuthenticationError):
            check(text)
        refused += 1
    assert refused > len(token) - 4


def _same_bytes(one: str, other: str) -> bool:
    def parts(token: str) -> list[bytes]:
        return [base64.urlsafe_b64decode(part + "==") for part in token.split(".")]

    try:
        return parts(one) == parts(other)
    except ValueError:
        return False


@pytest.mark.parametrize("token", [None, "", " ", "x", "a.b.c", "....", "ä.b.c", "A" * 9000])
def test_what_is_no_token_is_refused(check: JwtAuthenticator, token: str | None):
    with pytest.raises(AuthenticationError):
        check(token)


def test_messages_do_not_say_which_check_failed(check: JwtAuthenticator):
    said = set()
    for token in (sign(CLAIMS, SECRET[::-1]), sign({**CLAIMS, "aud": "x"}), "a.b.c"):
        with pytest.raises(AuthenticationError) as caught:
            check(token)
        said.add(caught.value.message)
    assert len(said) == 1


def test_a_checked_token_is_remembered_but_not_the_token_itself(
    check: JwtAuthenticator, monkeypatch: pytest.MonkeyPatch
):
    token = sign(CLAIMS)
    first = check(token)
    monkeypatch.setattr(jwt, "decode", lambda *a, **k: pytest.fail("checked again"))
    assert check(token) is first
    assert token not in repr(check._cache)


def test_the_memory_of_tokens_is_bounded(clock: ManualClock):
    check = JwtAuthenticator(SECRET, "HS256", audience="entidb", clock=clock, cache_max=3)
    for number in range(10):
        check(sign({**CLAIMS, "sub": str(number)}))
    assert len(check._cache) == 3


def test_a_refused_token_is_not_remembered(check: JwtAuthenticator):
    with pytest.raises(AuthenticationError):
        check(sign(CLAIMS, SECRET[::-1]))
    assert not check._cache


# ---------------------------------------------------------------- keys


def pem_pair(private: Any) -> tuple[bytes, bytes]:
    return (
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


RSA = pem_pair(rsa.generate_private_key(65537, 2048))
EC = pem_pair(ec.generate_private_key(ec.SECP256R1()))
ED25519 = pem_pair(ed25519.Ed25519PrivateKey.generate())

Make = Callable[[bytes], JwtAuthenticator]


@pytest.fixture
def with_public_key(tmp_path: Path, clock: ManualClock) -> Make:
    def make(pem: bytes) -> JwtAuthenticator:
        (tmp_path / "key.pem").write_bytes(pem)
        config = ServerConfig(data_dir=None, jwt_public_key_file=tmp_path / "key.pem")
        made = authenticator_for(config, clock)
        assert isinstance(made, JwtAuthenticator)
        return made

    return make


@pytest.mark.parametrize("pair", [RSA, EC, ED25519], ids=["RS256", "ES256", "EdDSA"])
def test_a_public_key_checks_what_its_private_key_signed(
    with_public_key: Make, clock: ManualClock, pair: tuple[bytes, bytes]
):
    token = mint_token(pair[0], subject="ada", databases=["shop"], clock=clock)
    assert with_public_key(pair[1])(token).on("shop").write


@pytest.mark.parametrize("pair", [RSA, EC, ED25519], ids=["RS256", "ES256", "EdDSA"])
def test_a_public_key_is_never_taken_for_a_secret(with_public_key: Make, pair: tuple[bytes, bytes]):
    # Made by hand, because the library refuses to sign with such a key.
    signed = f"{encoded({'alg': 'HS256', 'typ': 'JWT'})}.{encoded(CLAIMS)}"
    mac = hmac.new(pair[1], signed.encode(), hashlib.sha256).digest()
    forged = f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    with pytest.raises(AuthenticationError):
        with_public_key(pair[1])(forged)


def test_a_token_of_another_kind_of_key_is_refused(with_public_key: Make, clock: ManualClock):
    token = mint_token(ED25519[0], subject="ada", databases=["shop"], clock=clock)
    with pytest.raises(AuthenticationError):
        with_public_key(RSA[1])(token)


@pytest.mark.parametrize(
    "pem",
    [
        pem_pair(rsa.generate_private_key(65537, 1024))[1],
        pem_pair(ec.generate_private_key(ec.SECP256K1()))[1],
        RSA[0],
        b"not a key",
    ],
    ids=["rsa-1024", "ec", "private", "text"],
)
def test_a_key_that_is_weak_or_of_another_kind_is_refused(with_public_key: Make, pem: bytes):
    with pytest.raises(ConfigError, match="key"):
        with_public_key(pem)


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 31, b"x" * 31 + b"\n\n", RSA[1]])
def test_a_secret_that_is_short_or_a_key_is_refused(secret: bytes):
    with pytest.raises(ConfigError):
        check_secret(secret)
    with pytest.raises(ConfigError):
        mint_token(secret, subject="ada", databases=["shop"])


def test_the_secret_comes_from_a_file_or_the_environment(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    token = mint_token(SECRET, subject="ada", databases=["shop"], clock=clock)
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    monkeypatch.setenv("SHOP_SECRET", SECRET.decode())
    for settings in ({"jwt_secret_file": tmp_path / "secret"}, {"jwt_secret_env": "SHOP_SECRET"}):
        config = ServerConfig(data_dir=None, **settings)
        assert authenticator_for(config, clock)(token).subject == "ada"


@pytest.mark.parametrize(
    "settings", [{"jwt_secret_file": "/no/such/file"}, {"jwt_secret_env": "NO_SUCH_SECRET"}]
)
def test_a_secret_that_is_not_there_is_named(settings: dict[str, Any], clock: ManualClock):
    with pytest.raises(ConfigError, match=r"(?i)no.such"):
        authenticator_for(ServerConfig(data_dir=None, **settings), clock)


# ---------------------------------------------------------------- minting


def test_a_minted_token_expires_when_it_was_asked_to(check: JwtAuthenticator, clock: ManualClock):
    token = mint_token(SECRET, subject="ada", databases={"*": "r"}, expires_s=60, clock=clock)
    assert not check(token).on("any").write
    clock.advance(66)
    with pytest.raises(AuthenticationError, match="expired"):
        check(token)


def test_claims_of_ones_own_reach_the_grant_and_cannot_replace_ours(
    check: JwtAuthenticator, clock: ManualClock
):
    token = mint_token(
        SECRET,
        subject="ada",
        databases=["shop"],
        claims={"role": "clerk", "sub": "eve"},
        clock=clock,
    )
    grant = check(token).on("shop")
    assert (grant.subject, grant.claims["role"]) == ("ada", "clerk")


@pytest.mark.parametrize(
    "arguments",
    [
        {"subject": ""},
        {"databases": {"shop": "everything"}},
        {"databases": {"../shop": "r"}},
        {"expires_s": 0},
        {"expires_s": float("inf")},
    ],
)
def test_a_token_that_no_server_would_take_is_not_made(arguments: dict[str, Any]):
    with pytest.raises((ConfigError, ValueError)):
        mint_token(SECRET, **{"subject": "ada", "databases": ["shop"], **arguments})


def test_a_program_can_bring_its_own_authenticator(clock: ManualClock):
    def mine(token: str | None) -> Grants:
        return Grants(token or "nobody", {"shop": Rights(read=True, write=False)})

    config = ServerConfig(data_dir=None, authenticator=mine)
    assert authenticator_for(config, clock)("ada").on("shop").subject == "ada"


def test_a_grant_with_half_a_surrogate_pair_is_no_token() -> None:
    for claim in ({"shop": "\udcff"}, {"\udcff": "x"}, ["\udcff", 5]):
        with pytest.raises(AuthenticationError, match="databases"):
            databases_of(claim)

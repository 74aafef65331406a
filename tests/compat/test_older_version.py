"""This version beside 0.3.1: on one wire, in both directions, and on the same files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from entidb import Database, Index
from entidb.server import mint_token
from tests.compat.versions import Device, device, environment, server, source_of

pytestmark = [pytest.mark.process, pytest.mark.slow]

BOTH = [("0.3.1", "now"), ("now", "0.3.1")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("old")
    return {version: source_of(version, folder) for version in ("0.3.1", "now")}


def test_the_old_version_is_the_old_one(sources: dict[str, Path], tmp_path: Path) -> None:
    with device(sources["0.3.1"], tmp_path / "d") as old:
        assert old.open(path=str(tmp_path / "e"))["version"] == "0.3.1"


@pytest.mark.parametrize(("on_devices", "on_server"), BOTH)
@pytest.mark.parametrize("policy", ["server_wins", "client_wins", "last_write_wins", "merge"])
def test_a_device_and_a_server_of_two_versions_keep_in_step(
    sources: dict[str, Path], tmp_path: Path, on_devices: str, on_server: str, policy: str
) -> None:
    source = sources[on_devices]
    with (
        server(sources[on_server], tmp_path / "srv") as url,
        device(source, tmp_path / "a", url, policy=policy) as a,
        device(source, tmp_path / "b", url, policy=policy) as b,
    ):
        a.put(*[("notes", n, {"text": "first", "by": "a"}) for n in range(50)])
        assert a.sync()["pushed"] == 1
        assert b.sync()["pulled"] == 50
        a.put(("notes", 1, {"text": "a", "by": "a"}), ("notes", 2, None))
        b.put(("notes", 1, {"text": "b", "by": "b"}), ("lists", 1, [1, 2]))
        b.put(("notes", 2, {"text": "kept", "by": "b"}))
        for one in (a, b, a, b, a):
            answer = one.sync()
            assert "error" not in answer
        assert answer["pending"] == 0
        assert a.read() == b.read()
        assert len(a.read()["notes"]) in (49, 50)
        assert a.care() == b.care() == []


def test_an_older_device_withdraws_what_is_not_unique(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    old, unique = sources["0.3.1"], ("--unique", "users=email")
    with (
        server(sources["now"], tmp_path / "srv", *unique) as url,
        device(old, tmp_path / "a", url) as a,
        device(old, tmp_path / "b", url) as b,
    ):
        a.put(("users", 1, {"email": "ada"}))
        b.put(("users", 2, {"email": "ada"}))
        b.put(("users", 3, {"email": "bob"}))
        assert a.sync()["pushed"] == 1
        answer = b.sync()
        assert (answer["discarded"], answer["pending"]) == (["not_unique"], 0)
        a.sync()
        assert a.read() == b.read()
        assert sorted(a.read()["users"]) == ["1", "3"]
        assert a.care() == b.care() == []


OPEN = """
import sys
from entidb import Database, EntiDBError
try:
    database = Database.open(sys.argv[1])
except EntiDBError as error:
    print(error.code, error, flush=True)
else:
    print("opened", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_an_older_version_and_this_one_do_not_have_a_database_open_together(
    sources: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    def opening(version: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", OPEN, str(tmp_path / "db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(sources[version]),
            text=True,
        )

    with opening(first) as one:
        assert one.stdout is not None and one.stdout.readline() == "opened\n"
        with opening(second) as two:
            said, _ = two.communicate()
            assert said.startswith("database_locked") and str(one.pid) in said
        one.communicate()
    with opening(second) as two:
        assert two.communicate()[0] == "opened\n"


def test_devices_of_both_versions_on_one_server_see_the_same(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    with (
        server(sources["now"], tmp_path / "srv") as url,
        device(sources["0.3.1"], tmp_path / "old", url, policy="client_wins") as old,
        device(sources["now"], tmp_path / "new", url, policy="client_wins") as new,
    ):
        for turn in range(5):
            for number, one in enumerate((old, new)):
                one.put(("notes", turn, {"by": number}), ("notes", 100 + turn, {"turn": turn}))
                one.put(("notes", 50 + number, None if turn % 2 else {"turn": turn}))
            for one in (old, new, old):
                assert "error" not in one.sync()
        new.sync()
        assert old.read() == new.read()


@pytest.mark.parametrize(("first", "then"), BOTH)
def test_the_files_of_a_device_go_from_one_version_to_the_other_and_back(
    sources: dict[str, Path], tmp_path: Path, first: str, then: str
) -> None:
    """With what is pending, discarded and overruled in them."""
    with server(sources["now"], tmp_path / "srv") as url:
        with device(sources["now"], tmp_path / "b", url) as b:
            b.put(("notes", 1, {"text": "base"}), ("notes", 2, {"text": "base"}))
            b.sync()
        expected = None
        for turn, version in enumerate((first, then, first, then)):
            policy = ("merge", "server_wins", "client_wins", "last_write_wins")[turn]
            with device(sources[version], tmp_path / "a", url, policy=policy) as a:
                assert a.care() == []
                assert expected is None or a.read() == expected
                assert "error" not in a.sync()
                a.put(("notes", 1, {"text": f"a {turn}"}))
                with device(sources["now"], tmp_path / "b", url) as b:
                    b.put(("notes", 1, {"text": f"b {turn}"}), ("notes", 3, {"turn": turn}))
                    b.sync()
                assert "error" not in a.sync()
                a.put(("notes", 2, {"text": f"pending {turn}"}))
                expected = a.read()
                assert a.care() == []


def test_an_older_version_stays_away_from_a_database_with_an_index_until_it_has_none(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """It would write without keeping the index in step."""
    path = tmp_path / "d"
    with device(sources["0.3.1"], path) as old:
        old.put(("notes", 1, {"text": "old"}))
    with Database.open(path) as db:
        db.collection("notes", indexes=[Index("text")])
        db.wait_for_indexes()
    before = (path / "data.mdb").read_bytes()
    process = Device(sources["0.3.1"])
    with pytest.raises(AssertionError, match="the process ended"):
        process.open(path=str(path))
    process.end()
    assert (path / "data.mdb").read_bytes() == before
    with Database.open(path) as db:
        assert db.collection("notes").where(text="old").explain().way == "index(text)"
        db.collection("notes", indexes=[])
        db.wait_for_indexes()
    with device(sources["0.3.1"], path) as old:
        assert old.care() == []
        old.put(("notes", 2, {"text": "old again"}))
    with Database.open(path) as db:
        assert db.verify() == []
        assert len(db.collection("notes")) == 2


@pytest.mark.parametrize(("first", "then"), BOTH)
def test_the_files_of_a_server_go_from_one_version_to_the_other_and_back(
    sources: dict[str, Path], tmp_path: Path, first: str, then: str
) -> None:
    for turn, version in enumerate((first, then, first)):
        with (
            server(sources[version], tmp_path / "srv") as url,
            device(sources["now"], tmp_path / "a", url, policy="client_wins") as a,
            device(sources["now"], tmp_path / f"fresh {turn}", url) as fresh,
        ):
            a.put(*[("notes", n, {"turn": turn}) for n in range(turn, 20)])
            assert "error" not in a.sync()
            assert "error" not in fresh.sync()
            assert a.read() == fresh.read()


@pytest.mark.parametrize(("on_devices", "on_server"), BOTH)
def test_a_token_that_may_only_read_stops_no_pull_whichever_side_is_older(
    sources: dict[str, Path], tmp_path: Path, on_devices: str, on_server: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 32)
    secret.chmod(0o600)
    tokens = {
        rights: mint_token(b"s" * 32, subject="somebody", databases={"shop": rights})
        for rights in ("r", "rw")
    }
    source = sources[on_devices]
    with (
        server(sources[on_server], tmp_path / "srv", "--jwt-secret-file", str(secret)) as url,
        device(source, tmp_path / "a", url, token=tokens["rw"]) as a,
        device(source, tmp_path / "b", url, token=tokens["r"]) as b,
    ):
        a.put(("notes", 1, "one"))
        a.sync()
        b.put(("notes", 7, "mine"))
        b.put(("notes", 8, "mine too"))
        for number in (2, 3, 4):
            a.put(("notes", number, "theirs"))
            a.sync()
            answer = b.sync()
            assert answer["discarded"] == ["forbidden", "forbidden"]
            assert answer["pending"] == 0
            assert str(number) in b.read()["notes"]
        assert a.read() == b.read()
        assert a.care() == b.care() == []


def test_collections_beyond_the_limit_of_an_older_server_stop_nothing(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    with (
        server(sources["0.3.1"], tmp_path / "srv") as url,
        device(sources["now"], tmp_path / "a", url) as a,
        device(sources["now"], tmp_path / "b", url) as b,
    ):
        for one, name in ((a, "a"), (b, "b")):
            for number in range(600):
                one.put((f"{name}{number}", 1, number))
            answer = one.sync()
            assert (answer["pending"], "error" in answer) == (0, False)
        assert set(answer["discarded"]) == {"forbidden"}
        a.put(("a1", 2, "later"))
        for one in (a, b):
            one.sync()
        assert b.read()["a1"] == {"1": 1, "2": "later"}

"""What people type that is not quite right, and what they read where something out of the ordinary
happened: each is one sentence that helps."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.cli.exits import Exit
from entidb.cli.summary import document as summary_document
from entidb.cli.summary import lines
from entidb.db import Database, Role
from entidb.errors import (
    CommitUnknownError,
    CorruptionError,
    EntiDBError,
    ProtocolError,
    ServerError,
    StorageError,
    StorageFullError,
    TlsError,
    TransactionError,
    TransportError,
)
from entidb.protocol import PushRequest
from entidb.server import Refusal, ServerConfig, mint_token, serving
from entidb.server.config import directory_name
from entidb.storage import LmdbStorage
from entidb.sync import SyncCycleResult, SyncStatus
from tests.cli.support import document, documents, done, entidb, failed, put
from tests.support import Device, World, lose

SECRET = "correct horse battery staple, twice over"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    put(tmp_path / "shop", "notes", 1, {"n": 1})
    return tmp_path / "shop"


# ---------------------------------------------------------------- values and rows


def test_a_value_file_that_is_not_there_is_as_one_of_rows(shop: Path, tmp_path: Path):
    said = failed(entidb("put", shop, "notes", f"@{tmp_path / 'none'}"), Exit.NOT_FOUND, "no_file")
    assert "cannot read" in said
    assert done("list", shop, "notes").count("\n") == 1


@pytest.mark.parametrize("where", ["file", "input"])
def test_a_value_that_is_not_utf8_says_where(shop: Path, tmp_path: Path, where: str):
    (tmp_path / "value").write_bytes(b'"\xff"')
    result = (
        entidb("put", shop, "notes", f"@{tmp_path / 'value'}")
        if where == "file"
        else entidb("put", shop, "notes", "-", stdin=b'"\xff"')
    )
    assert "not UTF-8 at byte 1" in failed(result, Exit.VALUE, "invalid_input")


@pytest.mark.parametrize("word", ["hello", "1.2.3", "True"])
def test_a_word_that_is_no_json_says_how_a_text_is_quoted(shop: Path, word: str):
    said = failed(entidb("put", shop, "notes", word), Exit.VALUE, "invalid_json")
    assert f"""'"{word}"'""" in said


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("a.ndjson", b'{"a":1}\n{"a":"\xff"}\n', (), "line 2 is not UTF-8"),
        ("a.ndjson", b"[1]\n[\n", (), "line 2"),
        ("a.ndjson", b"[{\n", (), "one line for each element"),
        ("a.csv", b"a,b\n1,2\n\xff,3\n", (), "not UTF-8"),
        ("a.csv", b"a,b\n1,2\n3\n", (), "row 2: it has 1 cell, the header 2"),
        ("a.csv", b"a,a\n1,2\n", (), "'a' twice"),
        ("a.csv", b"a\nx\n", ("--types", "a=int"), "'x' is no int"),
        ("a.csv", b"a\nmaybe\n", ("--types", "a=bool"), "'maybe' is no bool"),
        ("a.csv", b'a\n"x\n', (), "row 1"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    shop: Path, tmp_path: Path, name: str, content: bytes, options: tuple[str, ...], says: str
):
    (tmp_path / name).write_bytes(content)
    result = entidb("import", shop, "rows", tmp_path / name, *options)
    assert result.exit_code != 0
    assert says in result.stderr, result.stderr


def test_types_name_columns_that_are_there(shop: Path, tmp_path: Path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    result = entidb("import", shop, "rows", tmp_path / "a.csv", "--types", "c=int")
    assert "the columns are a, b" in failed(result, Exit.USAGE, "usage")


def test_a_csv_file_without_a_line_is_no_rows(shop: Path, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"")
    assert document(done("import", shop, "rows", tmp_path / "a.csv", "--json"))["rows"] == 0


def test_cells_that_look_like_json_and_are_none_stay_text(shop: Path, tmp_path: Path):
    (tmp_path / "a.csv").write_text("a,b\n{x,[1]\n", encoding="utf-8")
    done("import", shop, "rows", tmp_path / "a.csv", "--infer")
    [row] = documents(done("list", shop, "rows", "--json"))
    assert row["value"] == {"a": "{x", "b": [1]}


def test_an_export_into_a_pipe_or_device_writes_there(shop: Path):
    result = entidb("export", shop, "notes", "--output", "/dev/null")
    assert result.exit_code == 0 and "exported 1 row to /dev/null" in result.stderr


def test_the_summary_of_an_export_needs_a_file_for_the_rows(shop: Path, tmp_path: Path):
    failed(entidb("export", shop, "notes", "--json"), Exit.USAGE, "usage")
    found = document(done("export", shop, "notes", "--json", "--output", tmp_path / "out"))
    assert found == {"collection": "notes", "rows": 1, "output": str(tmp_path / "out")}


@pytest.mark.parametrize(
    ("options", "code"), [(("--limit", "-1"), "usage"), (("--start", "zz"), "invalid_id")]
)
def test_a_list_that_cannot_be_is_a_usage_error(shop: Path, options: tuple[str, ...], code: str):
    failed(entidb("list", shop, "notes", *options), Exit.USAGE, code)


@pytest.mark.parametrize("option", ["--dir", "--url"])
def test_an_option_that_belongs_before_the_command_is_told_its_place(option: str):
    said = failed(entidb("admin", "databases", option, "x"), Exit.USAGE, "usage")
    assert f"{option} comes before databases: `entidb admin {option} … databases`" in said


# ---------------------------------------------------------------- tokens and servers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--token", "a", "--token-file", "b"), "two tokens"),
        (("--token-file", "{tmp}/none"), "cannot read the token file"),
        (("--db", "shop", "http://127.0.0.1:1"), "which server?"),
    ],
)
def test_a_sync_that_cannot_begin_says_why(
    shop: Path, tmp_path: Path, options: tuple[str, ...], says: str
):
    words = [word.format(tmp=tmp_path) for word in options]
    result = entidb("sync", shop, "http://127.0.0.1:1", *words)
    assert says in failed(result, Exit.USAGE, "usage")


def test_a_token_file_is_read_again_when_its_token_is_refused(tmp_path: Path):
    (tmp_path / "secret").write_text(SECRET, encoding="utf-8")
    config = ServerConfig(
        data_dir=None, jwt_secret_file=tmp_path / "secret", access_log=False, leeway_s=0.0
    )
    good = mint_token(SECRET, subject="ann", databases=["shop"])
    with serving(config) as url:
        done("init", tmp_path / "a")
        (tmp_path / "token").write_text(mint_token(SECRET * 2, subject="ann", databases=["shop"]))
        words = ("sync", tmp_path / "a", url, "--db", "shop", "--token-file", tmp_path / "token")
        failed(entidb(*words), Exit.AUTHENTICATION, "unauthorized")
        (tmp_path / "token").write_text(good + "\n")
        assert entidb(*words).exit_code == Exit.OK


@pytest.mark.parametrize(
    "options",
    [("--claim", "novalue"), ("--claim", "=1"), ("--expires", "soon"), ("--database", "a=x")],
)
def test_parts_of_a_token_that_cannot_be_are_usage_errors(tmp_path: Path, options: tuple[str, ...]):
    (tmp_path / "secret").write_text(SECRET, encoding="utf-8")
    words = ("token", "--secret-file", tmp_path / "secret", "--subject", "a", "--database", "shop")
    failed(entidb(*words, *options), Exit.USAGE, "usage")


def test_serve_wants_a_directory_and_a_way_to_tell_who_may():
    assert "which directory?" in failed(entidb("serve"), Exit.USAGE, "usage")
    assert "who may sync?" in failed(entidb("serve", "somewhere"), Exit.USAGE, "usage")


def test_a_key_that_cannot_be_read_is_a_usage_error(tmp_path: Path):
    words = ("token", "--subject", "a", "--database", "shop")
    said = failed(entidb(*words, "--secret-file", tmp_path / "none"), Exit.USAGE, "usage")
    assert "cannot read" in said
    failed(entidb(*words), Exit.USAGE, "usage")
    failed(entidb(*words, "--secret-env", "NOT_SET_ANYWHERE"), Exit.USAGE, "invalid_config")


def test_a_secret_and_a_token_are_made_for_their_owner_alone(tmp_path: Path):
    secret, token = tmp_path / "secret", tmp_path / "token"
    assert done("secret", "--out", secret) == ""
    words = ("token", "--secret-file", secret, "--subject", "a", "--database", "shop")
    assert done(*words, "--out", token) == ""
    assert document(done(*words, "--out", token, "--json"))["token"] is None
    for path in (secret, token):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert len(secret.read_text().strip()) == 64
    said = failed(entidb("secret", "-o", secret), Exit.USAGE, "exists")
    assert "exists already" in said
    assert done("secret") != done("secret")


def test_a_secret_or_token_that_everybody_can_read_is_warned_of(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o644)
    words = ("token", "--secret-file", secret, "--subject", "a", "--database", "shop")
    result = entidb(*words)
    assert result.exit_code == 0 and f"chmod 600 {secret}" in result.stderr
    done("init", tmp_path / "a")
    config = ServerConfig(data_dir=None, insecure_no_auth=True, access_log=False)
    (tmp_path / "token").write_text("a-token")
    (tmp_path / "token").chmod(0o644)
    with serving(config) as url:
        result = entidb("sync", tmp_path / "a", url, "--db", "shop",
                        "--token-file", tmp_path / "token")  # fmt: skip
    assert result.exit_code == 0 and f"chmod 600 {tmp_path / 'token'}" in result.stderr


def test_a_watch_goes_on_over_what_passes_and_ends_at_what_cannot_pass_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A turn with the server, two while somebody else has the database, two with the server again,
    two while the token is not valid any more, one with a fresh one, and then the database is gone;
    where a database is open in one process at a time."""
    from entidb.cli import watching
    from entidb.types import SystemClock

    monkeypatch.setattr(watching, "stays_open", lambda database: False)

    done("init", tmp_path / "a")
    valid = {"good"}
    config = ServerConfig(data_dir=None, authenticator=_only(valid), access_log=False)
    (tmp_path / "token").write_text("good")
    turns: list[int] = []
    opened: list[Database] = []
    with serving(config) as url:
        real = SystemClock.wait

        def wait(clock: SystemClock, event: Any, seconds: float) -> bool:
            if seconds != 77.0:
                return real(clock, event, seconds)
            turns.append(1)
            if len(turns) == 1:
                opened.append(Database.open(tmp_path / "a"))
            elif len(turns) == 3:
                opened.pop().close()
            elif len(turns) == 4:
                put(tmp_path / "a", "notes", 1, "mine")
            elif len(turns) == 5:
                valid.clear()
            elif len(turns) == 7:
                valid.add("fresh")
                (tmp_path / "token").write_text("fresh")
            elif len(turns) == 8:
                shutil.rmtree(tmp_path / "a")
            assert len(turns) < 9
            return False

        monkeypatch.setattr(SystemClock, "wait", wait)
        result = entidb("sync", tmp_path / "a", url, "--db", "shop", "--watch", "--interval", "77",
                        "--token-file", tmp_path / "token")  # fmt: skip
    assert result.exit_code == Exit.NOT_FOUND, result.output
    assert len(turns) == 8
    # Twice the same is said once.
    assert result.stderr.count("waiting [database_locked]") == 1
    assert result.stderr.count("waiting [unauthorized]") == 1
    assert f"a fresh token into {tmp_path / 'token'}" in result.stderr
    assert result.stdout.count("synchronised shop with") == 2
    assert "4 cycles: 0 changes pulled, 1 transaction pushed" in result.stderr


@pytest.mark.parametrize("how", ["never good", "not in a file"])
def test_a_watch_ends_where_no_token_can_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    from entidb.cli import watching
    from entidb.types import SystemClock

    monkeypatch.setattr(watching, "stays_open", lambda database: False)
    done("init", tmp_path / "a")
    valid = set() if how == "never good" else {"good"}
    (tmp_path / "token").write_text("good")
    token = ("--token-file", tmp_path / "token") if how == "never good" else ("--token", "good")
    real = SystemClock.wait

    def wait(clock: SystemClock, event: Any, seconds: float) -> bool:
        if seconds != 77.0:
            return real(clock, event, seconds)
        assert valid, "the watch went on"
        valid.clear()
        return False

    monkeypatch.setattr(SystemClock, "wait", wait)
    with serving(ServerConfig(data_dir=None, authenticator=_only(valid), access_log=False)) as url:
        result = entidb(
            "sync", tmp_path / "a", url, "--db", "shop", "--watch", "--interval", "77", *token
        )
    assert result.exit_code == Exit.AUTHENTICATION, result.output


@pytest.mark.parametrize(
    "passing",
    [
        TlsError("certificate is not yet valid"),
        StorageFullError("no space left"),
        StorageError("input/output error"),
        CommitUnknownError("reopen and read"),
        ProtocolError("moved to a login page", code="redirected"),
        TransportError("no route"),
        TransactionError("another thread writes", code="busy"),
    ],
    ids=lambda error: error.code,
)
def test_a_watch_goes_on_over_every_error_that_passes(
    passing: EntiDBError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from entidb.cli import syncing, watching

    done("init", tmp_path / "a")
    errors: list[EntiDBError] = [passing, passing, CorruptionError("damaged")]

    def run(job: object, database: Database) -> Any:
        raise errors.pop(0)

    monkeypatch.setattr(syncing.Sync, "run", run)
    monkeypatch.setattr(watching, "stays_open", lambda database: False)
    result = entidb("sync", tmp_path / "a", "http://localhost", "--db", "shop", "--watch",
                    "--interval", "0")  # fmt: skip
    assert result.exit_code == Exit.STORAGE
    assert errors == []
    assert result.stderr.count(f"waiting [{passing.code}]") == 1


def test_the_line_of_a_watch_says_that_it_hears_nothing_where_one_process_may_have_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from entidb.cli import syncing, watching

    done("init", tmp_path / "a")
    written: list[str] = []
    real = syncing.Sync.run

    def run(job: syncing.Sync, database: Database) -> Any:
        if written:
            assert written[-1] == "\r\x1b[2K"  # nothing is in the way of what a cycle shows
            raise CorruptionError("the end")
        return real(job, database)

    monkeypatch.setattr(syncing.Sync, "run", run)
    monkeypatch.setattr(watching, "stays_open", lambda database: False)
    monkeypatch.setattr(watching, "_on_the_terminal", lambda: written.append)
    monkeypatch.setattr(watching, "fit", lambda text: text)
    config = ServerConfig(data_dir=None, insecure_no_auth=True, access_log=False)
    with serving(config) as url:
        entidb("sync", tmp_path / "a", url, "--db", "shop", "--watch", "--interval", "0.5")
    assert written[0] == (
        "\r\x1b[2Kno news while the database is closed (one process at a time may have it here), "
        "a cycle every 0.5 s, 0 pending, 0 conflicts"
    )


def test_the_line_of_a_watch_says_what_waits_though_news_come() -> None:
    from entidb.cli.watching import describe
    from entidb.sync import SyncState, SyncStatus

    status = SyncStatus(
        state=SyncState.ERROR,
        pending=3,
        held=0,
        conflicts=0,
        discarded=0,
        cursor=7,
        db_id="shop",
        history=None,
        last_success_ms=1,
        last_error="502",
        last_error_code="server_error",
        next_retry_s=42.0,
        live="live",
    )
    assert describe(status, None, None, 30.0) == (
        "live, waiting [server_error], next try in 42 s, 3 pending, 0 conflicts"
    )


def test_a_watch_whose_log_has_no_room_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from entidb.cli import syncing, watching

    done("init", tmp_path / "a")
    turns: list[int] = []

    def run(job: object, database: Database) -> Any:
        turns.append(1)
        raise TransportError("no route") if len(turns) < 3 else CorruptionError("damaged")

    def note(text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(syncing.Sync, "run", run)
    monkeypatch.setattr(watching, "stays_open", lambda database: False)
    monkeypatch.setattr(watching, "note", note)
    result = entidb("sync", tmp_path / "a", "http://localhost", "--db", "shop", "--watch",
                    "--interval", "0")  # fmt: skip
    assert len(turns) == 3
    assert result.exit_code == Exit.STORAGE and "corrupt_record" in result.stderr


def _only(valid: set[str]) -> Any:
    from entidb.errors import AuthenticationError
    from entidb.server import Grants, Rights

    def check(token: str | None) -> Grants:
        if token not in valid:
            raise AuthenticationError("not this one")
        return Grants("ann", {"shop": Rights(read=True, write=True)})

    return check


# ---------------------------------------------------------------- outbox and summaries


@pytest.fixture
def lived(tmp_path: Path) -> Iterator[tuple[World, Device, Path]]:
    """A device on disk whose engine the tests drive, to be looked at by commands afterwards."""

    def refuse(context: Any, transaction: Any) -> Refusal | None:
        bad = any(operation.value == "bad" for operation in transaction.operations)
        return Refusal("not_good", "no\x1b[2J good") if bad else None

    world = World(validate=refuse)
    device = world.device(LmdbStorage.open(tmp_path / "a"), default_policy="manual")
    yield world, device, tmp_path / "a"
    device.db.close()


def test_what_was_sent_without_an_answer_is_listed_as_sent(lived: Any):
    _, device, path = lived
    device.put(("notes", 1, "x"))
    device.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        device.sync()
    device.put(("notes", 2, "y"), ("notes", 3, "z"))
    device.db.close()
    assert [each["state"] for each in documents(done("pending", path, "--json"))] == [
        "sent",
        "ready",
    ]
    said = done("pending", path)
    assert "sent" in said and "2 written in notes" in said


def test_status_tells_what_is_held_and_what_the_scope_is(lived: Any):
    world, device, path = lived
    world.put(("notes", 1, "theirs"))
    device.db.set_scope(["notes"])
    device.put(("notes", 1, "mine"))
    device.sync()
    device.db.close()
    said = done("status", path)
    assert "1 transaction, by conflicts" in said
    assert "database shop, up to its commit 1" in said
    lines = dict(line.split(None, 1) for line in said.splitlines())
    assert lines["synchronises"] == "notes"
    assert lines["conflicts"] == "1 conflict: see `entidb conflicts`"


def test_deciding_for_the_server_says_that_something_was_withdrawn(lived: Any):
    world, device, path = lived
    world.put(("notes", 1, "theirs"), ("notes", 2, "theirs"))
    device.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    device.sync()
    device.db.close()
    wrong = entidb("resolve", path, "notes", uuid.UUID(int=3), "mine")
    failed(wrong, Exit.NOT_FOUND, "not_found")
    failed(entidb("resolve", path, "notes", uuid.UUID(int=1), "null"), Exit.USAGE, "usage")
    # Both conflicts are of one transaction, so deciding one settles the other.
    result = entidb("resolve", path, "--all", "theirs")
    assert (result.exit_code, result.stdout) == (0, "resolved 1 conflict; 0 conflicts left\n")
    assert "1 transaction withdrawn: see `entidb discarded`" in result.stderr


def test_what_was_refused_is_listed_with_its_values_and_nothing_steers_the_terminal(lived: Any):
    _, device, path = lived
    device.put(("notes", 1, "bad"), *[("notes", n, "with it") for n in range(2, 8)])
    device.put(("notes", 1, None))
    result = device.sync()
    status = device.engine.status()
    device.db.close()
    said = done("discarded", path)
    assert "[not_good]" in said and "[depends]" in said
    assert "\x1b" not in said and "[2J good" in said
    assert "… and 3 more, with --json" in said
    assert "deleted" in said
    refused, built_on = documents(done("discarded", path, "--json"))
    assert len(refused["operations"]) == 7
    assert built_on["operations"][0]["kind"] == "delete"
    failed(entidb("discarded", path, "--recommit-all", "--prune-all"), Exit.USAGE, "usage")
    assert document(done("discarded", path, "--prune-all", "--json"))["pruned"] == [
        refused["transaction"],
        built_on["transaction"],
    ]
    text = "\n".join(lines(result, status, "http://here"))
    assert "  withdrawn  2 transactions" in text
    assert "nothing is lost" in text and "\x1b" not in text
    assert [each["code"] for each in summary_document(result, status)["withdrawn"]] == [
        "not_good",
        "depends",
    ]


def summary_of(device: Device, result: SyncCycleResult) -> str:
    status: SyncStatus = device.engine.status()
    return "\n".join(lines(result, status, "http://here"))


def test_a_summary_tells_of_conflicts_and_of_how_the_policy_decided_them():
    world = World()
    a = world.device(policies={"mine": "client_wins", "both": "merge", "ours": "manual"})
    for name in ("notes", "mine", "both", "ours"):
        world.put((name, 1, {"n": 0}))
    a.sync()
    for name in ("notes", "mine", "both", "ours"):
        world.put((name, 1, {"n": 0, "theirs": 1}))
        a.put((name, 1, {"n": 0, "mine": 1}))
    a.put(("free", 1, "x"))
    said = summary_of(a, a.sync())
    assert "1 kept as on this device, 1 merged, 1 taken as on the server (by the policy)" in said
    assert "1 transaction held until you decide" in said
    assert "  unresolved  1 conflict" in said


def test_a_summary_tells_of_a_reset_of_retries_and_of_what_was_done_already():
    from entidb.db import purge_tombstones
    from entidb.protocol import PullRequest
    from entidb.sync import RetryConfig

    world = World()
    a = world.device(retry=RetryConfig(attempts_max=2))
    world.put(("notes", 1, "x"), ("notes", 2, "x"))
    a.sync()
    world.put(("notes", 1, None))
    purge_tombstones(world.server, world.server.sequence)
    a.put(("notes", 1, None))
    a.wire.before = lose(PullRequest)
    said = summary_of(a, a.sync())
    assert ", 2 attempts" in said
    assert "everything was fetched anew" in said
    assert "already so" in said and "the server had the same" in said


def test_a_summary_tells_of_a_twin_and_of_a_cycle_that_did_not_come_to_an_end():
    world = World()
    a = world.device(default_policy="client_wins", rounds_max=1)
    world.put(("notes", 1, {"n": 0}))
    a.sync()
    a.put(("notes", 1, {"n": 1}))
    world.put(("notes", 1, {"n": 0, "theirs": True}))
    twin = a.copy(default_policy="merge", rounds_max=5)
    twin.sync()
    a.wire.before = lambda request: (
        world.put(("notes", 2, len(a.wire.requests))) if isinstance(request, PushRequest) else None
    )
    a.put(("notes", 2, "mine"))
    result = a.sync()
    said = summary_of(a, result)
    assert result.incomplete
    assert "others kept changing the same entities" in said
    assert "still pending" in said


def test_a_summary_says_for_whom_what_is_pending_waits():
    world = World()
    a = world.device()
    a.sync()
    a.put(("notes", 1, "ann's"))
    a.engine.applier.sign_in("ann")
    a.engine.logout("keep")
    said = summary_of(a, a.sync())
    assert "  1 transaction still pending\n  1 transaction until ann syncs here" in said


def test_a_long_list_of_withdrawals_is_cut_with_their_number():
    world = World(validate=lambda context, transaction: Refusal("no", "never"))
    a = world.device()
    for n in range(14):
        a.put(("notes", n, "x"))
    said = summary_of(a, a.sync())
    assert said.count("[no]: never") == 10
    assert "… and 4 more" in said


# ---------------------------------------------------------------- ids by their end


def test_ids_that_were_made_together_are_told_apart_by_their_ends(tmp_path: Path):
    with Database.open(tmp_path / "db") as database, database.transaction() as tx:
        ids = [tx.collection("notes").add({"n": n}) for n in range(50)]
    line = failed(entidb("get", tmp_path / "db", "notes", ids[3].hex[:8]), 2, "ambiguous_id")
    offered = re.search(r"as in ([0-9a-f]+)", line)
    assert offered is not None and ids[0].hex.endswith(offered[1])
    end = ids[7].hex[-12:]
    for text in (end[-6:], str(ids[7])[-17:], f"…{end}", f"...{end[-7:]}"):
        assert json.loads(done("get", tmp_path / "db", "notes", text)) == {"n": 7}
    done("put", tmp_path / "db", "notes", ids[7].hex[-7:], '{"n":"seven"}')
    done("delete", tmp_path / "db", "notes", ids[8].hex[-12:])
    with Database.open(tmp_path / "db") as database:
        notes = database.collection("notes")
        assert notes[ids[7]] == {"n": "seven"} and ids[8] not in notes and len(notes) == 49


def test_a_text_that_begins_one_id_and_ends_another_is_ambiguous(tmp_path: Path):
    first, second = uuid.UUID("abcd" + "0" * 28), uuid.UUID("1" * 28 + "abcd")
    with Database.open(tmp_path / "db") as database:
        database.collection("notes").put_many({first: 1, second: 2})
    line = failed(entidb("delete", tmp_path / "db", "notes", "abcd"), 2, "ambiguous_id")
    assert str(first) in line and str(second) in line
    assert done("get", tmp_path / "db", "notes", "…abcd").strip() == "2"
    assert done("get", tmp_path / "db", "notes", "abcd0").strip() == "1"
    failed(entidb("get", tmp_path / "db", "notes", "…abcd0"), 3, "not_found")
    failed(entidb("get", tmp_path / "db", "notes", "…"), 2, "invalid_id")


# ---------------------------------------------------------------- what others wrote


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\r\n"


def test_what_a_server_says_cannot_steer_a_terminal_or_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done("init", tmp_path / "db")

    def refuse(*_: object) -> None:
        raise ServerError(HOSTILE * 2000, code=HOSTILE * 700)

    monkeypatch.setattr("entidb.cli.outbox.inspect", refuse)
    result = entidb("status", tmp_path / "db")
    assert len(result.stderr.splitlines()) == 1 and len(result.stderr) < 1200
    assert result.stderr.isprintable() or result.stderr.rstrip("\n").isprintable()
    assert result.stderr.startswith("error[\\u001b]0;owned")


def test_names_and_values_cannot_steer_a_terminal(tmp_path: Path):
    name = "a\u202eb"
    put(tmp_path / "db", name, 1, {HOSTILE: HOSTILE})
    path = tmp_path / "db"
    rows = f"k,v\nx,{chr(0x9B)}\nx,2\n"
    for words in (
        ("list", path),
        ("list", path, name),
        ("get", path, name, "1"),
        ("status", path),
        ("inspect", path),
        ("pending", path),
        ("import", path, name, "-", "--format", "csv", "--key", "k"),
        ("import", path, name, "-", "--format", "csv", "--key", HOSTILE),
        ("list", path, HOSTILE),
        ("get", tmp_path / HOSTILE, name, "1"),
        ("export", path, name, "--output", tmp_path / "no" / HOSTILE),
    ):
        result = entidb(*words, stdin=rows)
        for line in (result.stdout + result.stderr).split("\n"):
            assert line.isprintable(), (words, line)


@pytest.mark.skipif(sys.platform != "linux", reason="paths that are any bytes")
def test_a_path_that_is_not_utf8_is_a_path_like_any_other(tmp_path: Path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/b\xe4d")
    copy, file = f"{path} copy", f"{path}.ndjson"
    done("put", path, "notes", '{"a":1}')
    done("export", path, "notes", "-o", file)
    done("import", path, "more", file)
    done("backup", path, copy)
    done("compact", path)
    for each in (path, copy):
        assert "\\udce4" in done("verify", each).encode("ascii", "backslashreplace").decode()
        assert document(done("inspect", each, "--json"))["collections"]["notes"]["entities"] == 1


def test_certificates_and_keys_that_are_none_are_named_in_our_words(tmp_path: Path):
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    words = ("serve", tmp_path / "data", "--insecure-no-auth", "--port", 0)
    wrong = entidb(*words, "--tls-cert", empty, "--tls-key", empty)
    assert "PEM form" in failed(wrong, 2, "invalid_config")
    assert "SSL" not in wrong.stderr
    wrong = entidb(*words, "--tls-cert", empty, "--tls-key", tmp_path / "gone")
    assert f"cannot read {tmp_path / 'gone'}" in failed(wrong, 2, "invalid_config")


def test_a_variable_that_is_called_nearly_as_one_of_ours_is_warned_of(tmp_path: Path):
    answer = entidb("version", ENTIDB_TOKENFILE="x", ENTIDB_COLOURS="y", ENTIDB_TOKEN_FILE="z")
    assert answer.exit_code == 0
    assert answer.stderr == "warning: nothing reads ENTIDB_TOKENFILE: is ENTIDB_TOKEN_FILE meant?\n"


def test_a_setting_of_the_server_that_is_misspelt_in_the_environment_is_warned_of(tmp_path: Path):
    answer = entidb(
        "serve",
        tmp_path / "data",
        ENTIDB_SERVE_JWT_SECRETFILE="x",
        ENTIDB_SERVE_KEY="y",
        ENTIDB_SERVE_JWT_SECRET_ENV="ENTIDB_SERVE_KEY",
        ENTIDB_SERVE_PORT="70000",
    )
    assert answer.exit_code == 2
    warned = [line for line in answer.stderr.splitlines() if line.startswith("warning: ")]
    assert warned == [
        "warning: no option is called ENTIDB_SERVE_JWT_SECRETFILE: is "
        "ENTIDB_SERVE_JWT_SECRET_FILE meant?"
    ]


def test_a_file_without_a_private_key_is_not_taken_for_a_secret(tmp_path: Path):
    file = tmp_path / "key"
    done("secret", "--out", file)
    words = ("token", "--subject", "me", "--database", "d", "--private-key-file", file)
    assert "no private key" in failed(entidb(*words), 2, "usage")


@pytest.mark.parametrize("name", ["exp", "sub", "aud", "iat", "databases"])
def test_a_claim_that_the_token_has_anyway_is_not_dropped_in_silence(tmp_path: Path, name: str):
    done("secret", "--out", tmp_path / "secret")
    words = ("token", "--secret-file", tmp_path / "secret", "--subject", "me", "--database", "d")
    assert name in failed(entidb(*words, "--claim", f"{name}=1"), 2, "usage")


def test_a_value_from_an_empty_input_is_said_to_be_missing(tmp_path: Path):
    line = failed(entidb("put", tmp_path / "s", "c", "-", stdin=" \n"), 11, "invalid_input")
    assert "standard input is empty" in line


def test_a_limit_larger_than_any_list_is_no_limit(tmp_path: Path):
    done("put", tmp_path / "s", "c", "1")
    assert len(done("list", tmp_path / "s", "c", "--limit", 10**30).splitlines()) == 1


@pytest.mark.parametrize("kind", ["file", "directory", "dangling"])
@pytest.mark.parametrize(
    "command",
    [
        ("backup", "DEVICE", "TARGET"),
        ("backup", "SERVER", "TARGET"),
        ("copy", "DEVICE", "TARGET"),
        ("copy", "SERVERS", "TARGET"),
        ("snapshot", "SERVER", "TARGET"),
        ("logout", "DEVICE", "--pending", "export", "--file", "TARGET"),
        ("secret", "--out", "TARGET"),
    ],
    ids=lambda command: "-".join(command[:2]).lower(),
)
def test_nothing_is_written_over_and_one_code_says_so(
    tmp_path: Path, command: tuple[str, ...], kind: str
):
    done("put", tmp_path / "device", "stock", "1")
    server = tmp_path / "servers" / directory_name("shop")
    with Database.open(server, role=Role.SERVER) as database:
        database.collection("stock").add(1)
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    places = {
        "DEVICE": tmp_path / "device",
        "SERVER": server,
        "SERVERS": tmp_path / "servers",
        "TARGET": target,
    }
    said = failed(entidb(*(places.get(each, each) for each in command)), Exit.USAGE, "exists")
    assert "target exists already" in said
    assert target.is_symlink() or target.is_dir() or target.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()

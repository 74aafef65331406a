"""``sync`` and all around it, against a real server: what happened is said, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from msgspec.structs import replace

from entidb import cbor
from entidb.cli.exits import Exit
from entidb.cli.serving import LISTEN, SETTINGS
from entidb.db import Database
from entidb.server import Listen, ServerConfig, mint_token, serving
from tests.cli.support import (
    TIMEOUT_S,
    command,
    document,
    documents,
    done,
    entidb,
    environment,
    failed,
    process,
    put,
)

pytestmark = pytest.mark.process

SECRET = "correct horse battery staple, twice over"
NOTE = str(uuid.UUID(int=1 << 96 | 1))
OTHER = str(uuid.UUID(int=2 << 96 | 2))


@dataclass
class Scene:
    """A running server, and devices that know it by the environment."""

    home: Path
    url: str
    token: str

    def sync(self, name: str, *options: object) -> Result:
        return entidb("sync", self.home / name, self.url, *options, **self.env)

    def synced(self, name: str, *options: object) -> dict[str, Any]:
        result = self.sync(name, "--json", *options)
        assert result.exit_code in (Exit.OK, Exit.UNRESOLVED), result.output
        found: dict[str, Any] = document(result.stdout)
        return found

    def run(self, name: str, *words: object) -> str:
        return done(words[0], self.home / name, *words[1:])

    @property
    def env(self) -> dict[str, str]:
        return {"ENTIDB_DB": "shop", "ENTIDB_TOKEN": self.token}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    secret = tmp_path / "secret"
    secret.write_text(SECRET, encoding="utf-8")
    config = ServerConfig(data_dir=tmp_path / "srv", jwt_secret_file=secret, access_log=False)
    token = mint_token(SECRET, subject="tester", databases=["shop"])
    with serving(config) as url:
        for name in ("a", "b"):
            done("init", tmp_path / name)
        yield Scene(tmp_path, url, token)


@pytest.fixture
def disputed(scene: Scene) -> Scene:
    """Both devices changed two notes; device b found out, and waits for a person."""
    for note in (NOTE, OTHER):
        scene.run("a", "put", "notes", note, '{"by":"nobody"}')
    scene.synced("a")
    scene.synced("b")
    for name in ("a", "b"):
        for note in (NOTE, OTHER):
            scene.run(name, "put", "notes", note, json.dumps({"by": name}))
    scene.synced("a")
    result = scene.sync("b", "--policy", "manual")
    assert result.exit_code == Exit.UNRESOLVED
    assert "entidb conflicts" in result.stdout
    return scene


def value(scene: Scene, name: str, note: str = NOTE) -> Any:
    return json.loads(scene.run(name, "get", "notes", note))


def test_two_devices_get_what_the_other_wrote(scene: Scene):
    scene.run("a", "put", "notes", NOTE, '"from a"')
    first = scene.synced("a")
    second = scene.synced("b")
    assert (first["pushed"], first["pending"]) == (1, 0)
    assert (second["pulled"], second["pushed"]) == (1, 0)
    assert value(scene, "b") == "from a"
    quiet = scene.sync("b")
    assert quiet.exit_code == 0
    assert "pulled  nothing" in quiet.stdout and "pushed  nothing" in quiet.stdout


def test_the_summary_speaks_of_what_was_done(scene: Scene):
    scene.run("a", "put", "notes", NOTE, '"x"')
    said = scene.sync("a").stdout
    assert "synchronised shop with" in said
    assert "1 transaction of 1 change" in said


def test_what_is_pending_is_listed_until_it_is_synced(scene: Scene):
    scene.run("a", "put", "notes", NOTE, '{"b":{"$bytes":"AQ=="}}')
    scene.run("a", "delete", "notes", NOTE)
    written, deleted = documents(scene.run("a", "pending", "--json"))
    assert written["operations"] == [
        {"collection": "notes", "id": NOTE, "kind": "put", "value": {"b": {"$bytes": "AQ=="}}}
    ]
    assert deleted["operations"] == [{"collection": "notes", "id": NOTE, "kind": "delete"}]
    assert (written["state"], written["sequence"]) == ("ready", 1)
    assert scene.run("a", "pending").count("\n") == 2
    scene.synced("a")
    assert scene.run("a", "pending", "--json") == ""


def test_conflicts_are_shown_with_all_three_values(disputed: Scene):
    first, second = documents(disputed.run("b", "conflicts", "--json"))
    assert (first["id"], second["id"]) == (NOTE, OTHER)
    sides = [first[side]["value"] for side in ("base", "mine", "theirs")]
    assert sides == [{"by": "nobody"}, {"by": "b"}, {"by": "a"}]
    shown = disputed.run("b", "conflicts")
    assert f"entidb resolve notes {NOTE}" in shown
    status = document(disputed.run("b", "status", "--json"))
    assert (status["conflicts"], status["held"], status["pending"]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("choice", "expected", "withdrawn"),
    [
        ("mine", {"by": "b"}, 0),
        ("theirs", {"by": "a"}, 1),
        ('{"by":"both"}', {"by": "both"}, 0),
        ("delete", None, 0),
    ],
)
def test_a_conflict_can_be_decided_in_every_way(
    disputed: Scene, choice: str, expected: Any, withdrawn: int
):
    said = document(disputed.run("b", "resolve", "notes", NOTE[:8], choice, "--json"))
    assert said == {"resolved": 1, "withdrawn": withdrawn, "open_conflicts": 1}
    disputed.synced("b")
    disputed.synced("a")
    if expected is None:
        failed(entidb("get", disputed.home / "a", "notes", NOTE), 3, "not_found")
    else:
        assert value(disputed, "a") == expected
    gone = entidb("resolve", disputed.home / "b", "notes", NOTE, "mine")
    failed(gone, 3, "not_found")


def test_all_conflicts_can_be_decided_at_once(disputed: Scene):
    said = document(disputed.run("b", "resolve", "--all", "mine", "--json"))
    assert said == {"resolved": 2, "withdrawn": 0, "open_conflicts": 0}
    assert disputed.synced("b")["pushed"] == 2


def test_a_choice_that_is_none_is_refused(disputed: Scene):
    said = failed(
        entidb("resolve", disputed.home / "b", "notes", NOTE, "their"), 11, "invalid_json"
    )
    assert "mine, theirs or delete" in said
    failed(entidb("resolve", disputed.home / "b", "notes", NOTE, "null"), 2, "usage")


def lose_one(scene: Scene) -> str:
    """Let device b lose a change to device a; the id of its transaction."""
    scene.run("a", "put", "notes", NOTE, '"a"')
    scene.synced("a")
    scene.run("b", "put", "notes", NOTE, '"b"')
    result = scene.synced("b")
    (withdrawn,) = result["withdrawn"]
    assert (withdrawn["code"], result["pushed"], result["discarded"]) == ("conflict", 0, 1)
    found: str = withdrawn["transaction"]
    return found


def test_what_was_withdrawn_is_listed_with_what_it_lost_to(scene: Scene):
    identity = lose_one(scene)
    entry = document(scene.run("b", "discarded", "--json"))
    assert entry["transaction"] == identity
    assert entry["operations"][0]["value"] == "b"
    assert entry["lost_to"][0]["value"] == "a"
    shown = scene.run("b", "discarded")
    assert identity in shown and "wrote notes" in shown and "lost to notes" in shown


def test_what_was_withdrawn_can_be_committed_again(scene: Scene):
    identity = lose_one(scene)
    said = document(scene.run("b", "discarded", "--recommit", identity[:14], "--json"))
    assert said == {"recommitted": [identity]}
    assert scene.synced("b")["pushed"] == 1
    scene.synced("a")
    assert value(scene, "a") == "b"


@pytest.mark.parametrize("options", [("--prune",), ("--prune-all",), ("--all",)])
def test_what_was_withdrawn_can_be_forgotten(scene: Scene, options: tuple[str, ...]):
    identity = lose_one(scene)
    words = (*options, identity) if options == ("--prune",) else options
    assert document(scene.run("b", "discarded", *words, "--json")) == {"pruned": [identity]}
    assert scene.run("b", "discarded", "--json") == ""
    failed(entidb("discarded", scene.home / "b", "--recommit", identity), 3, "not_found")


def test_a_policy_can_be_chosen_for_each_collection(scene: Scene):
    for collection in ("notes", "other"):
        scene.run("a", "put", collection, NOTE, '"a"')
        scene.run("b", "put", collection, NOTE, '"b"')
    scene.synced("a")
    result = scene.synced("b", "--policy", "client_wins", "--policy", "other=manual")
    assert [each["collection"] for each in result["conflicts"]] == ["notes"]
    assert [each["collection"] for each in result["unresolved"]] == ["other"]
    assert (result["pushed"], result["open_conflicts"]) == (1, 1)


def test_the_scope_is_remembered_and_can_be_widened_again(scene: Scene):
    scene.run("a", "put", "notes", NOTE, '"n"')
    scene.run("a", "put", "private", NOTE, '"p"')
    # What is pending cannot leave the scope, so it goes out first.
    scene.synced("a")
    scene.synced("a", "--collections", "notes")
    assert document(scene.run("a", "status", "--json"))["scope"] == ["notes"]
    scene.run("a", "put", "private", OTHER, '"later"')
    assert scene.synced("a")["pushed"] == 0
    assert scene.synced("a", "--collections", "all")["pushed"] == 1
    assert document(scene.run("a", "status", "--json"))["scope"] is None


# ---------------------------------------------------------------- what goes wrong


def test_without_a_name_for_the_database_sync_asks_for_one(scene: Scene):
    result = entidb("sync", scene.home / "a", scene.url, ENTIDB_TOKEN=scene.token)
    assert "--db" in failed(result, 2, "usage")
    scene.synced("a")
    assert entidb("sync", scene.home / "a", scene.url, ENTIDB_TOKEN=scene.token).exit_code == 0


def test_the_environment_can_name_everything(scene: Scene):
    env = {**scene.env, "ENTIDB_DIR": str(scene.home / "a"), "ENTIDB_URL": scene.url}
    assert entidb("sync", **env).exit_code == 0
    failed(entidb("sync", scene.home / "a", **scene.env), 2, "usage")


@pytest.mark.parametrize(("token", "code"), [("nonsense", "unauthorized"), (None, "unauthorized")])
def test_a_token_that_is_not_valid_is_exit_code_six(scene: Scene, token: str | None, code: str):
    env = {"ENTIDB_DB": "shop", **({} if token is None else {"ENTIDB_TOKEN": token})}
    failed(entidb("sync", scene.home / "a", scene.url, **env), 6, code)


def test_a_token_for_another_database_is_exit_code_six(scene: Scene):
    failed(scene.sync("a", "--db", "other"), 6, "forbidden")


def test_a_token_file_wins_over_the_environment(scene: Scene):
    file = scene.home / "token"
    file.write_text(scene.token + "\n", encoding="utf-8")
    env = {"ENTIDB_DB": "shop", "ENTIDB_TOKEN": "nonsense"}
    words = ("sync", scene.home / "a", scene.url, "--token-file")
    assert entidb(*words, file, **env).exit_code == 0
    failed(entidb(*words, scene.home / "none", **env), 2, "usage")


def test_no_server_is_exit_code_five_and_loses_nothing(scene: Scene):
    scene.run("a", "put", "notes", NOTE, '"x"')
    words = ("sync", scene.home / "a", "http://127.0.0.1:1", "--attempts", 1)
    failed(entidb(*words, **scene.env), 5, "transport_error")
    assert document(scene.run("a", "status", "--json"))["pending"] == 1


def test_a_token_never_travels_readable_without_being_asked(scene: Scene):
    result = entidb("sync", scene.home / "a", "http://192.0.2.1", **scene.env)
    assert "--insecure-token" in failed(result, 2, "insecure_token")


@pytest.mark.parametrize(
    "options",
    [
        ("--policy", "nope"),
        ("--policy", "notes=nope"),
        ("--interval", "-1"),
        ("--timeout", "0"),
        ("--attempts", "0"),
        ("--collections", ""),
        ("ftp://example.org",),
        ("--db", ""),
    ],
)
def test_a_wrong_setting_is_a_usage_error(scene: Scene, options: tuple[str, ...]):
    assert scene.sync("a", *options).exit_code == Exit.USAGE


def test_another_history_is_exit_code_ten_and_reset_is_the_way_out(scene: Scene):
    scene.run("a", "put", "notes", NOTE, '"a"')
    scene.synced("a")
    config = ServerConfig(
        data_dir=scene.home / "srv2", jwt_secret_file=scene.home / "secret", access_log=False
    )
    with serving(config) as url:
        again = Scene(scene.home, url, scene.token)
        said = failed(again.sync("a"), 10, "history_changed")
        assert "this server has no database 'shop'" in said
        assert "`entidb reset --keep device`" in said
        assert "`entidb reset --keep server`" in said
        assert "reset(" not in said
        assert document(again.run("a", "reset", "--keep", "device", "--json")) == {
            "keep": "device",
            "pending": 0,
        }
        assert again.synced("a")["pushed"] == 1
        assert again.synced("b")["pulled"] == 1


def test_a_servers_database_can_be_read_and_not_synced(scene: Scene, tmp_path: Path):
    from entidb.db import Database, Role

    path = tmp_path / "server-copy"
    with Database.open(path, role=Role.SERVER) as database:
        database.collection("notes").add(1)
    assert document(done("status", path, "--json"))["role"] == "server"
    assert "server" in done("status", path)
    for words in (("pending", path), ("conflicts", path), ("sync", path, scene.url)):
        failed(entidb(*words, **scene.env), 2, "invalid_config")


# ---------------------------------------------------------------- watching


def test_a_watch_lets_others_at_the_database_and_takes_their_work_along(scene: Scene):
    running = subprocess.Popen(
        command("sync", scene.home / "a", scene.url, "--watch", "--interval", "0.2", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**scene.env),
    )
    assert running.stdout is not None
    first = json.loads(running.stdout.readline())
    written = _put_between_cycles(scene)
    second = json.loads(running.stdout.readline())
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=TIMEOUT_S)
    assert written and (first["pushed"], second["pushed"]) == (0, 1)
    assert running.returncode == Exit.INTERRUPTED
    assert "1 transaction pushed" in said and "Traceback" not in said


def _put_between_cycles(scene: Scene) -> bool:
    """A put that meets the database while a cycle has it is told so, and comes again."""
    for _ in range(100):
        result = entidb("put", scene.home / "a", "notes", NOTE, '"x"')
        if result.exit_code == 0:
            return True
        failed(result, 8, "database_locked")
        threading.Event().wait(0.05)
    return False


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_is_how_a_service_manager_ends_a_watch(scene: Scene):
    running = subprocess.Popen(
        command("sync", scene.home / "a", scene.url, "--watch", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**scene.env),
    )
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["db_id"] == "shop"
    running.terminate()
    _, said = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == Exit.OK
    assert "1 cycle" in said and "error" not in said


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("options", "code"), [(("--watch",), Exit.OK), ((), Exit.TERMINATED)])
def test_sigterm_waits_for_no_server_that_is_silent(
    scene: Scene, options: tuple[str, ...], code: Exit
):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        running = subprocess.Popen(
            command("sync", scene.home / "a", url, "--timeout", "3600", *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**scene.env),
        )
        connection, _ = silent.accept()
        assert connection.recv(1)
        running.terminate()
        running.communicate(timeout=TIMEOUT_S)
        assert running.returncode == code
        while connection.recv(65536):
            pass
        connection.close()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_is_heard_while_a_server_does_not_answer(scene: Scene):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        running = subprocess.Popen(
            command("sync", scene.home / "a", url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**scene.env),
        )
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == Exit.INTERRUPTED
    assert said.startswith("error[interrupted]") and said.count("\n") == 1


# ---------------------------------------------------------------- the server and its tokens


def test_serve_and_token_work_together_as_processes(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET, encoding="utf-8")
    secret.chmod(0o644)
    ready = tmp_path / "ready"
    server = subprocess.Popen(
        command("serve", tmp_path / "srv", "--port", 0, "--ready-file", ready),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(ENTIDB_SERVE_JWT_SECRET_FILE=str(secret)),
    )
    try:
        assert server.stderr is not None
        said, _, url = server.stderr.readline().strip().rpartition(" ")
        assert said == "entidb: serving on"
        assert f"chmod 600 {secret}" in server.stderr.readline()
        grant = ("--subject", "me", "--database", "shop")
        token = done("token", "--secret-file", secret, *grant).strip()
        put(tmp_path / "a", "notes", 1, "x")
        result = process("sync", tmp_path / "a", url, "--db", "shop", env={"ENTIDB_TOKEN": token})
        assert result.returncode == 0, result.stderr
    finally:
        server.terminate()
        server.communicate(timeout=TIMEOUT_S)
    assert server.returncode == Exit.OK
    assert ready.read_text(encoding="utf-8").strip() == url
    assert done("list", tmp_path / "srv" / "shop.entidb", "notes").count("\n") == 1


def test_a_token_says_what_it_grants(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET, encoding="utf-8")
    words = ("token", "--secret-file", secret, "--subject", "me", "--expires", "90s")
    said = document(done(*words, "--database", "shop=r", "--database", "x", "--json"))
    assert said["databases"] == {"shop": "r", "x": "rw"}
    assert said["token"].count(".") == 2 and said["expires_ms"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ("--expires", "soon"),
        ("--database", "shop=all"),
        ("--claim", "nothing"),
        ("--secret-env", "NOT_SET_ANYWHERE"),
        ("--secret-file", "/nowhere"),
        ("--secret-env", "PATH", "--private-key-file", "x"),
    ],
)
def test_a_token_that_cannot_be_made_is_a_usage_error(tmp_path: Path, options: tuple[str, ...]):
    secret = tmp_path / "secret"
    secret.write_text(SECRET, encoding="utf-8")
    words = ("token", "--secret-file", secret, "--subject", "me", "--database", "shop")
    assert entidb(*words, *options).exit_code == Exit.USAGE


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--secret-file", "/nowhere"),
        ("--insecure-no-auth", "--host", "0.0.0.0"),
        ("--insecure-no-auth", "--secret-env", "PATH"),
        ("--insecure-no-auth", "--connections-max", "0"),
        ("--insecure-no-auth", "--validate", "no.such:hook"),
    ],
)
def test_a_server_that_cannot_be_safe_does_not_start(tmp_path: Path, options: tuple[str, ...]):
    result = entidb("serve", tmp_path / "srv", "--port", 0, *options)
    assert result.exit_code == Exit.USAGE
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("given", ["users", "=email", "users=", "users=a,a", "users=a..b"])
def test_what_is_unique_is_given_as_collection_and_fields(tmp_path: Path, given: str):
    options = ("--insecure-no-auth", "--unique", given)
    result = entidb("serve", tmp_path / "srv", "--port", 0, *options)
    assert result.exit_code == Exit.USAGE
    assert len(result.stderr.splitlines()) == 1


def test_every_setting_of_the_server_is_an_option_of_serve():
    fields = {name for name in ServerConfig.__dataclass_fields__ if name != "data_dir"}
    assert set(SETTINGS) == fields - {"authenticator"}  # a function has no place on a command line
    assert set(LISTEN) == {*Listen.__dataclass_fields__, "ready_file"}
    for name, (default, _) in LISTEN.items():
        if name != "ready_file":
            assert default == Listen.__dataclass_fields__[name].default, name


# ---------------------------------------------------------------- verify --server


def spoil(path: Path, entity_id: str) -> None:
    """The device knows another value than the server has, without a change of its own."""
    with Database.open(path) as database, database.write() as writer:
        ref = writer.collection("notes").number, uuid.UUID(entity_id).bytes
        row = writer.entity(ref)
        assert row is not None
        wrong = replace(row, payload=cbor.encode({"wrong": True}))
        writer.show(ref, wrong, row, writer.next_sequence())


def verified(scene: Scene, name: str, *options: object) -> Result:
    return entidb("verify", scene.home / name, "--server", scene.url, *options, **scene.env)


def test_verify_with_a_server_names_what_differs_and_repairs_it(scene: Scene) -> None:
    put(scene.home / "one", "notes", 1, {"n": 1})
    put(scene.home / "one", "notes", 2, {"n": 2})
    scene.synced("one")
    assert "agrees with" in verified(scene, "one").stdout
    spoil(scene.home / "one", NOTE)
    result = verified(scene, "one")
    assert NOTE in result.stdout and OTHER not in result.stdout
    assert "--repair" in failed(result, Exit.FAULTS, "faults")
    result = verified(scene, "one", "--json")
    found = document(result.stdout)
    assert (result.exit_code, found["ok"], found["repaired"]) == (Exit.FAULTS, False, 0)
    assert [each["id"] for each in found["differences"]] == [NOTE]
    result = verified(scene, "one", "--repair")
    assert (result.exit_code, "1 entity put right" in result.stdout) == (Exit.OK, True)
    assert document(verified(scene, "one", "--json").stdout)["ok"] is True


def test_verify_with_a_server_needs_one_that_the_database_knows(scene: Scene) -> None:
    put(scene.home / "new", "notes", 1, {"n": 1})
    assert "entidb sync" in failed(verified(scene, "new"), Exit.USAGE, "usage")
    result = entidb("verify", scene.home / "new", "--repair")
    assert "--server" in failed(result, Exit.USAGE, "usage")

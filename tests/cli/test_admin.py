"""``entidb admin``: the same beside a server and from afar, and nothing steers a terminal."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb import Database, SyncConfig, SyncEngine
from entidb.server import Grants, Refusal, ServerConfig, SyncServer, mint_token, serving
from tests.cli.support import document, done, entidb, failed
from tests.server.support import DEVICE, SECRET, handshake

pytestmark = pytest.mark.process


class Place:
    """A running server, and the words that lead to it."""

    def __init__(self, root: Path, url: str, server: SyncServer, face: str) -> None:
        self.root, self.url, self.server = root, url, server
        token = mint_token(SECRET, subject="ada", databases={}, claims={"admin": True})
        (root / "token").write_text(token)
        (root / "token").chmod(0o600)
        afar = ("--url", url, "--token-file", root / "token")
        self.words: tuple[object, ...] = afar if face == "url" else ("--dir", root / "data")

    def __call__(self, *words: object, **named: Any) -> str:
        return done("admin", *self.words, *words, **named)

    def json(self, *words: object) -> Any:
        return document(self(*words, "--json"))

    def fails(self, code: int, name: str, *words: object) -> str:
        return failed(entidb("admin", *self.words, *words), code, name)


@pytest.fixture(params=["dir", "url"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "secret").write_bytes(SECRET)
    config = ServerConfig(
        data_dir=tmp_path / "data",
        jwt_secret_file=tmp_path / "secret",
        backup_dir=tmp_path / "backups",
    )
    with SyncServer(config) as server, serving(server) as url:
        yield Place(tmp_path, url, server, request.param)


def test_a_database_is_made_frozen_renamed_deleted_and_taken_back(place: Place):
    assert place("databases") == "none\n"
    assert place.json("create", "shop")["name"] == "shop"
    assert "moving" in place("freeze", "shop", "--reason", "moving")
    assert "frozen" in place("databases")
    assert "frozen" not in place("thaw", "shop")
    assert place.json("rename", "shop", "store")["name"] == "store"
    place.fails(2, "not_confirmed", "delete", "store", "--confirm", "shop")
    identity = place.json("delete", "store", "--confirm", "store")["id"]
    assert identity in place("deleted")
    assert "store" in place("undelete", identity)
    place.fails(3, "unknown_database", "show", "shop")
    place.fails(2, "invalid_name", "create", "../shop")
    place.fails(2, "exists", "create", "store")
    log = place("audit")
    for word in ("create", "freeze", "thaw", "rename", "delete", "undelete", "not_confirmed"):
        assert word in log


def test_a_delete_asks_for_the_name(place: Place):
    place("create", "shop")
    assert "undelete" in place("delete", "shop", stdin="shop\n")
    assert place("databases") == "none\n"
    assert "no deleted database" in place.fails(3, "unknown_database", "undelete", "shop")


def test_what_nobody_confirms_says_so_and_changes_nothing(place: Place):
    place("create", "shop")
    for words in (("delete", "shop"), ("restore", "shop", "20200101T000000Z")):
        ended = entidb("admin", *place.words, *words)
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert "error[usage]: nobody confirmed this: give --confirm NAME" in ended.stderr
    assert "shop" in place("databases")


def test_a_question_is_not_in_the_answer_for_programs(place: Place):
    place("create", "shop")
    assert document(place("delete", "shop", "--json", stdin="shop\n"))["name"] == "shop"


@pytest.mark.parametrize("days", ["nan", "inf", "-1", "1e400"])
def test_a_purge_takes_no_days_that_are_no_number(place: Place, days: str):
    """They would have become none, and so those of the server's retention."""
    place("create", "shop")
    place.fails(2, "usage", "purge", "shop", "--days", days)


def test_nobody_is_locked_out_of_a_database_that_is_not_there(place: Place):
    place("create", "shop")
    place.fails(3, "unknown_database", "revoke", "subject", "ada", "--database", "shpo")
    assert place("revoked") == "none\n"
    assert place("allow", "subject", "ada", "--database", "shpo") == "there was nothing to change\n"


def test_who_is_locked_out_is_listed_and_let_in_again(place: Place):
    place("create", "shop")
    assert "everywhere" in place("revoke", "device", DEVICE.hex(), "--reason", "stolen")
    assert "in shop" in place("revoke", "subject", "ada", "--database", "shop")
    assert "stolen" in place("revoked")
    assert {each["kind"] for each in place.json("revoked")} == {"device", "subject"}
    assert place("allow", "device", DEVICE.hex()) == "done\n"
    assert place("allow", "device", DEVICE.hex()) == "there was nothing to change\n"
    place.fails(2, "invalid_config", "revoke", "device", "xyz")
    place.fails(2, "usage", "revoke", "person", "xyz")


def test_devices_keys_and_tasks_are_shown(place: Place):
    place("create", "shop")
    assert place("devices", "shop") == "none\n"
    grants = Grants("bob\x1b[31m", {}, {"jti": "t1"})
    place.server.registry.heard(handshake(), grants, code="busy", client="entidb/9")
    shown = place("devices", "shop")
    assert DEVICE.hex() in shown and "busy" in shown
    assert "\x1b" not in shown
    (row,) = place.json("devices", "shop")
    assert (row["device"]["subject"], row["behind"]) == ("bob\x1b[31m", 0)
    assert "HS256" in place("keys")
    assert "HS256" in place("reload")
    assert place("tasks") == "none\n"
    place.fails(3, "not_found", "cancel", "7")


@pytest.mark.slow
def test_a_backup_is_made_listed_and_put_back(place: Place):
    place("create", "shop")
    place("create", "log")
    made = place.json("backup", "shop")
    assert (made["state"], made["kind"]) == ("done", "backup")
    identity = made["result"]["backup"]
    assert identity in place("backups")
    assert len(place.json("backup", "--all")) == 2
    place.fails(2, "usage", "backup")
    place.fails(2, "usage", "backup", "shop", "--all")
    place.fails(2, "not_confirmed", "restore", "shop", identity, "--confirm", "log")
    gone = ("restore", "shop", "20200101T000000Z", "--confirm", "shop")
    assert "no backup '20200101T000000Z'" in place.fails(3, "unknown_database", *gone)
    assert "done" in place("restore", "shop", identity, stdin="shop\n")
    assert "shop" in place("deleted")
    assert "restored" in place("audit")


@pytest.mark.slow
def test_tasks_are_waited_for_or_only_begun(place: Place):
    place("create", "shop")
    assert "done" in place("verify", "shop")
    assert place.json("compact", "shop")["state"] == "done"
    assert place.json("purge", "shop", "--days", "3")["result"]["purged"] == 0
    begun = place.json("verify", "shop", "--no-wait")
    assert begun.get("state", "waiting") == "waiting"
    assert str(begun["id"]) in place("tasks")
    place.fails(3, "unknown_database", "verify", "gone")


def test_a_person_is_erased_after_a_look(place: Place):
    place("create", "shop")
    place.fails(2, "usage", "erase", "shop", "--where", "people", "{")
    place.fails(3, "not_found", "erase", "shop", "--where", "people", '{"name": "grace"}')
    place.server.database("shop").collection("people")[uuid.UUID(int=1)] = {"name": "grace"}
    where = ("erase", "shop", "--where", "people", '{"name": "grace"}')
    place.fails(2, "usage", *where, "--where", "people", '{"name": "bob"}')
    seen = place.json(*where)
    assert (seen["entities"], seen["collections"]) == (1, {"people": 1})
    assert seen["confirm"] in place(*where)
    place.fails(2, "not_confirmed", *where, "--confirm", "1")
    done = place.json(*where, "--confirm", seen["confirm"])
    assert done["result"]["erased"] == {"people": 1}
    assert "grace" not in place("audit", "--json")


def test_a_server_that_is_not_there_is_named(tmp_path: Path):
    (tmp_path / "data").mkdir()
    said = failed(entidb("admin", "--dir", tmp_path / "data", "tasks"), 5, "transport_error")
    assert "no server of this machine serves" in said
    said = failed(entidb("admin", "--url", "http://127.0.0.1:9", "tasks"), 5, "transport_error")
    assert "cannot be reached" in said
    failed(entidb("admin", "tasks"), 2, "usage")
    failed(entidb("admin", "--url", "ftp://x", "tasks"), 2, "usage")


def test_a_token_does_not_cross_a_network_in_the_clear(tmp_path: Path):
    url = "http://sync.example.org"
    failed(entidb("admin", "--url", url, "tasks", ENTIDB_ADMIN_TOKEN="a.b.c"), 2, "insecure_token")


def test_a_token_that_does_not_administer_is_refused(tmp_path: Path):
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "secret").chmod(0o600)
    config = ServerConfig(data_dir=tmp_path / "data", jwt_secret_file=tmp_path / "secret")
    key = ("--secret-file", tmp_path / "secret", "--subject", "ada")
    with serving(config) as url:
        words = ("admin", "--url", url, "tasks")
        plain = done("token", *key, "--database", "shop").strip()
        failed(entidb(*words, ENTIDB_ADMIN_TOKEN=plain), 6, "forbidden")
        failed(entidb(*words), 6, "unauthorized")
        everything = done("token", *key, "--admin").strip()
        assert done(*words, ENTIDB_ADMIN_TOKEN=everything) == "none\n"
        some = done("token", *key, "--admin-of", "shop", "--admin-of", "log").strip()
        assert done(*words, ENTIDB_ADMIN_TOKEN=some) == "none\n"
        keys = ("admin", "--url", url, "keys")
        failed(entidb(*keys, ENTIDB_ADMIN_TOKEN=some), 6, "forbidden")
    failed(entidb("token", *key), 2, "usage")
    failed(entidb("token", *key, "--database", "shop", "--claim", "admin=true"), 2, "usage")


def test_what_answers_in_the_place_of_a_server_is_not_believed(tmp_path: Path):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen: list[str | None] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("authorization"))
            redirect = self.path.endswith("tasks")
            self.send_response(302 if redirect else 200)
            self.send_header("location", f"http://localhost:{self.server.server_port}/elsewhere")  # type: ignore[attr-defined]
            self.end_headers()
            self.wfile.write(b"<html>\x1b[31m")

        def log_message(self, format: str, *args: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{page.server_port}"
        for command in ("tasks", "databases"):
            result = entidb("admin", "--url", url, command, ENTIDB_ADMIN_TOKEN="a.b.c")
            failed(result, 5, "unexpected_answer")
        page.shutdown()
    assert len(seen) == 2  # the redirect was not followed


def test_json_is_what_the_server_answers(place: Place):
    place("create", "shop")
    (row,) = place.json("databases")
    assert set(row) >= {"name", "open", "bytes", "devices"}
    assert json.dumps(row)


def test_devices_of_all_databases_are_searched_and_one_is_told_of(place: Place):
    place("create", "shop")
    assert place("devices") == "none\n"
    grants = Grants("bob\x1b[31m", {}, {"jti": "t1"})
    place.server.registry.heard(handshake(), grants, code="busy", client="entidb/9")
    assert DEVICE.hex() in place("devices", "--search", "BOB shop", "--sort", "name")
    assert DEVICE.hex() not in place("devices", "--search", "bob log")
    (row,) = place.json("devices")["rows"]
    assert (row["database"], row["row"]["device"]["error"]) == ("shop", "busy")
    told = place("device", "shop", DEVICE.hex().upper())
    assert "entidb/9" in told and "busy, 20" in told and "t1" in told and "\x1b" not in told
    place.fails(3, "not_found", "device", "shop", "f" * 32)
    assert "'xyz'" in place.fails(2, "usage", "device", "shop", "xyz")
    place.fails(2, "usage", "devices", "--sort", "colour")


def test_the_server_is_shown_at_a_glance(place: Place):
    place("create", "shop")
    shown = place("overview")
    assert re.search(r"databases +1, 1 open", shown)
    assert place.json("overview")["fleet"]["databases"] == 1


def test_entities_are_found_listed_and_shown(place: Place):
    place("create", "shop")
    notes = place.server.database("shop").collection("notes")
    ids = [uuid.UUID(int=number) for number in range(1, 5)]
    for number, each in enumerate(ids):
        notes[each] = {"price": number, "name": f"n{number}\x1b[31m"}
    assert place("collections", "shop").split() == ["name", "entities", "notes", "4"]
    of = ("entities", "shop", "notes")
    dear = place.json(*of, "--where", "price>=1", "--where", "price<3", "--order=-price")["rows"]
    assert [row["value"]["price"] for row in dear] == [2, 1]
    first = place(*of, "--limit", 2)
    assert f"--after {ids[1]}" in first and "\x1b" not in first
    assert str(ids[2]) in place(*of, "--limit", 2, "--after", ids[1])
    assert "version  3" in place("entity", "shop", "notes", ids[2])
    place.fails(2, "usage", *of, "--where", '{"name": {"==": {"$bytes": "AA=="}}}')
    place.fails(2, "usage", *of, "--where", "price~1")
    place.fails(2, "usage", *of, "--after", "1")
    place.fails(2, "usage", "entity", "shop", "notes", "1")
    place.fails(3, "not_found", "entity", "shop", "notes", uuid.UUID(int=9))
    place.fails(3, "not_found", "entities", "shop", "nothing")


def test_what_happened_lately_is_told_where_the_console_keeps_it(place: Place):
    assert "--console" in place("happened")
    place.fails(2, "usage", "happened", "--what", "nothing")


def test_a_rejected_transaction_is_told_with_who_and_why(tmp_path: Path):
    config = ServerConfig(
        data_dir=tmp_path / "data",
        insecure_no_auth=True,
        console=True,
        validate=lambda context, transaction: Refusal("too_cheap", "no price below one\x1b[31m"),
    )
    with SyncServer(config) as server, serving(server) as url, Database.open(tmp_path / "d") as db:
        db.collection("notes")[uuid.UUID(int=1)] = {"price": 0}
        with SyncEngine(SyncConfig(db_id="shop"), url, db) as engine:
            engine.sync()
        told = done("admin", "--dir", tmp_path / "data", "happened", "--what", "rejected")
        for word in ("too_cheap", "no price below one", f"notes {uuid.UUID(int=1)}"):
            assert word in told
        assert "\x1b" not in told and "pushed" not in told
        assert "rejected" not in done("admin", "--url", url, "happened", "--what", "pushed")

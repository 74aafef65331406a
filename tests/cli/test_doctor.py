"""``entidb doctor``: each fault is planted, found by its name, and gone when it was mended."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from entidb.cli.doctor_findings import State
from entidb.cli.doctor_network import Visit, examine
from entidb.db import Database
from entidb.server import ServerConfig, SyncServer, mint_token, serving
from tests.cli.support import documents, done, entidb, failed
from tests.scenarios.test_live_through_proxies import haproxy, nginx
from tests.server.test_run import make_certificate
from tests.sync.test_live import served

BODY_MAX = 20 * 1024 * 1024
#: Seconds to wait for news where all is well: a busy machine has the first word within them.
WELL_S = 3.0


def asked(*words: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """What the doctor says, by check; of several the worst."""
    result = entidb("doctor", "--json", *words)
    assert result.exit_code == code, result.output
    order = ("skipped", "ok", "warning", "problem")
    found: dict[str, dict[str, Any]] = {}
    for each in documents(result.stdout):
        before = found.get(each["check"])
        if before is None or order.index(each["state"]) > order.index(before["state"]):
            found[each["check"]] = each
    return found


# ---------------------------------------------------------------- on the server's machine


@pytest.fixture
def place(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    with Database.open(made / "shop.entidb") as database:
        database.collection("notes").add({"text": "there"})
    done("secret", "--out", tmp_path / "secret")
    return made


def test_a_directory_that_is_well_kept_has_no_problem(place: Path, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    backups.mkdir()
    found = asked(place, "--", "--secret-file", tmp_path / "secret", "--backup-dir", backups,
                  "--ready-disk-bytes-min", 1)  # fmt: skip
    states = {name: each["state"] for name, each in found.items()}
    assert states["settings"] == states["permissions"] == states["clock"] == "ok"
    assert "1 database" in found["directory"]["says"]


def test_the_database_of_a_device_is_no_data_directory(tmp_path: Path) -> None:
    Database.open(tmp_path / "dev").close()
    found = asked(tmp_path / "dev", code=9)
    assert found["directory"]["state"] == "problem"
    assert "one database" in found["directory"]["says"]
    assert "entidb verify" in found["directory"]["change"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("name", ["secret", "token", "keys/2026-11.secret"])
def test_a_secret_that_others_can_read_is_found_and_mended(
    place: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("s" * 64)
    path.chmod(0o640)
    given = (place, "--", "--keys", tmp_path / "keys") if "keys" in name else (place,)
    found = asked(*given, code=9)["permissions"]
    assert found["state"] == "problem" and str(path) in found["says"] and "0640" in found["says"]
    assert f"chmod 600 {path}" in found["change"]
    assert path.stat().st_mode & 0o777 == 0o640
    asked("--mend", *given)
    assert path.stat().st_mode & 0o777 == 0o600
    assert asked(*given)["permissions"]["state"] == "ok"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_secret_that_others_could_write_is_mended_and_has_to_be_made_anew(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").chmod(0o666)
    found = asked(place, "--mend")["permissions"]
    assert found["state"] == "warning" and "new secret" in found["change"]


def test_settings_that_no_server_takes_are_a_problem(place: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("short")
    (tmp_path / "short").chmod(0o600)
    for wrong in (
        ("--secret-file", tmp_path / "nowhere"),
        ("--secret-file", tmp_path / "short"),
        ("--secret-file", tmp_path / "secret", "--body-bytes-max", 1),
        ("--secret-file", tmp_path / "secret", "--validate", "nowhere:nothing"),
        ("--secret-file", tmp_path / "secret", "--backup-every-s", 60),
        ("--secret-file", tmp_path / "secret", "--tls-cert", tmp_path / "certificate"),
    ):
        assert asked(place, "--", *wrong, code=9)["settings"]["state"] == "problem", wrong
    assert asked(place)["settings"]["state"] == "skipped"


def test_a_clock_that_went_back_a_full_disk_and_late_backups_are_problems(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(total=2**40, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    ahead = datetime.datetime.now().timestamp() + 3600
    os.utime(place / "shop.entidb" / "data.mdb", (ahead, ahead))
    backups = tmp_path / "backups"
    backups.mkdir()
    given = ("--secret-file", tmp_path / "secret", "--backup-dir", backups)
    found = asked(place, "--", *given, "--backup-every-s", 60, code=9)
    assert [found[each]["state"] for each in ("clock", "disk", "backups")] == ["problem"] * 3


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_too_few_open_files_for_the_settings_are_a_warning(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    given = ("--secret-file", tmp_path / "secret", "--ready-disk-bytes-min", 1)
    found = asked(place, "--", *given)["open files"]
    assert found["state"] == "warning" and "LimitNOFILE=2676" in found["change"]
    found = asked(place, "--", *given, "--connections-max", 336)["open files"]
    assert found["state"] == "ok" and "1,012" in found["says"]


def test_what_is_no_directory_and_mixed_up_words_are_said(tmp_path: Path) -> None:
    failed(entidb("doctor", tmp_path / "nowhere"), 3, "not_found")
    failed(entidb("doctor", "http://localhost:1", "--mend"), 2, "usage")
    failed(entidb("doctor", tmp_path, "--", "--no-such-setting"), 2, "usage")
    failed(entidb("doctor", "http://"), 2, "invalid_config")


def test_a_person_reads_what_is_wrong_and_what_to_change(place: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").chmod(0o644)
    result = entidb("doctor", place)
    assert result.exit_code == 9
    assert "PROBLEM  permissions: " in result.stdout
    assert "         change: chmod 600 " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 problem, ")


# ---------------------------------------------------------------- from afar


def test_a_server_without_a_proxy_is_in_order() -> None:
    with served() as (_, url):
        found = asked(url, "--db", "shop", "--wait", WELL_S)
    assert {each["state"] for each in found.values()} <= {"ok", "skipped"}, found
    assert {"server", "http", "clock", "body", "stream", "idle", "idle poll"} <= set(found)
    assert "20.0 MiB" in found["body"]["says"]


def test_a_token_is_tried_and_one_that_is_refused_is_a_problem(tmp_path: Path) -> None:
    secret = b"s" * 32
    (tmp_path / "secret").write_bytes(secret)
    config = ServerConfig(data_dir=None, jwt_secret_file=tmp_path / "secret")
    token = tmp_path / "token"
    with SyncServer(config) as server, serving(server) as url:
        server.database("shop")
        for signed, code in ((secret, 0), (b"t" * 32, 9)):
            token.write_text(mint_token(signed, subject="ada", databases={"shop": "r"}))
            wait = 0.5 if code else WELL_S
            found = asked(url, "--db", "shop", "--token-file", token, "--wait", wait, code=code)
            assert found["token"]["state"] == ("problem" if code else "ok")
        assert "Authorization" in found["token"]["change"]
        token.write_text(mint_token(secret, subject="ada", databases={"other": "r"}))
        found = asked(url, "--db", "shop", "--token-file", token, "--wait", 0.5, code=9)
        assert "forbidden" in found["token"]["says"]


def test_without_a_database_what_needs_one_is_said_not_to_be_tried() -> None:
    with served() as (_, url):
        found = asked(url)
    assert found["stream"]["state"] == found["idle"]["state"] == "skipped"
    assert "--db" in found["stream"]["says"]


def test_what_does_not_answer_and_what_is_another_server_are_problems() -> None:
    assert asked("http://127.0.0.1:9", code=9)["server"]["change"] is not None
    with served() as (_, url):
        assert "404" in asked(f"{url}/elsewhere", code=9)["server"]["says"]


@pytest.mark.process
@pytest.mark.parametrize("limit", [64 * 1024, 1024 * 1024])
def test_the_body_limit_of_nginx_is_found_by_trying(tmp_path: Path, limit: int) -> None:
    more = f"client_max_body_size {limit};"
    with served() as (_, url), nginx(url, tmp_path, more) as proxy:
        code = 9 if limit < 256 * 1024 else 0
        wait = 0.5 if code else WELL_S
        found = asked(proxy, "--db", "shop", "--wait", wait, code=code)["body"]
    assert found["state"] == ("problem" if code else "warning")
    assert "client_max_body_size 20m" in found["change"]
    assert "413" in found["says"]
    assert ("64." if limit < 256 * 1024 else "about 1.0 MiB") in found["says"]


@pytest.mark.process
def test_a_proxy_that_gathers_a_stream_is_found(tmp_path: Path) -> None:
    more = (
        "proxy_ignore_headers X-Accel-Buffering; client_max_body_size 20m; gzip on; "
        "gzip_proxied any; gzip_min_length 1; gzip_types text/event-stream;"
    )
    with served() as (_, url), nginx(url, tmp_path, more) as proxy:
        found = asked(proxy, "--db", "shop", "--wait", 1.5, code=9)
    assert found["stream"]["state"] == "problem"
    assert "proxy_buffering off" in found["stream"]["change"]
    assert found["body"]["state"] == "ok"


@pytest.mark.process
def test_timeouts_of_nginx_that_cut_what_is_idle_are_found(tmp_path: Path) -> None:
    more = "proxy_read_timeout 1s; client_max_body_size 20m;"
    with served() as (_, url), nginx(url, tmp_path, more) as proxy:
        found = asked(proxy, "--db", "shop", "--wait", 5, code=9)
    for check in ("idle", "idle poll"):
        assert found[check]["state"] == "problem"
        assert "proxy_read_timeout" in found[check]["change"]
    assert "504" in found["idle poll"]["says"]


@pytest.mark.process
def test_timeouts_of_haproxy_that_cut_what_is_idle_are_found(tmp_path: Path) -> None:
    with served() as (_, url), haproxy(url, tmp_path, "1s") as proxy:
        found = asked(proxy, "--db", "shop", "--wait", 5, code=9)
    assert found["idle"]["state"] == found["idle poll"]["state"] == "problem"
    assert "timeout server" in found["idle"]["change"]


@pytest.mark.process
def test_a_proxy_that_drops_headers_is_found(tmp_path: Path) -> None:
    more = 'proxy_set_header Content-Encoding ""; client_max_body_size 20m;'
    with served() as (_, url), nginx(url, tmp_path, more) as proxy:
        found = asked(proxy, "--db", "shop", "--wait", 0.5, code=9)
    assert found["packed requests"]["state"] == "problem"


@contextlib.contextmanager
def answering(
    headers: dict[str, str],
    version: str = "HTTP/1.1",
    document: bytes = b'{"name": "entidb", "limits": {"message_bytes_max": 1}}',
) -> Iterator[str]:
    """Something that says of itself that it is a server, and has strange ways."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = version

        def date_time_string(self, timestamp: float | None = None) -> str:
            return headers.get("Date") or super().date_time_string(timestamp)

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(document)))
            for name, value in headers.items():
                if name != "Date":
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(document)

        do_GET = do_POST = answer

        def log_message(self, format: str, *arguments: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_clock_that_differs_packing_nobody_asked_for_and_an_old_http_are_problems() -> None:
    strange = {"Date": "Thu, 01 Jan 2026 00:00:00 GMT", "Content-Encoding": "gzip"}
    with answering(strange, "HTTP/1.0") as url:
        found = asked(url, code=9)
    assert {found[each]["state"] for each in ("clock", "compression", "http")} == {"problem"}


@pytest.mark.parametrize("way", ["cut", "garbage"])
@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/v1/push/doctor", "/v1/live", "/v1/pull"])
def test_what_answers_some_addresses_and_not_others_is_a_problem(path: str, way: str) -> None:
    """A proxy that keeps some of them from the server, in whatever way."""
    with served() as (_, url), between(url, path, way) as proxy:
        wait_s = WELL_S if path == "/metrics" else 0.5
        found = {each.check: each for each in examine(Visit(proxy, db_id="shop", wait_s=wait_s))}
    assert found["server"].state is State.OK
    bad = {each.check for each in found.values() if each.state is State.PROBLEM}
    assert bool(bad) is (path != "/metrics"), found


@pytest.mark.parametrize(
    "document",
    [
        b'{"name": "entidb", "limits": 7}',
        b'{"name": "entidb", "limits": {"message_bytes_max": "much"}}',
        b'{"name": "entidb", "limits": {"message_bytes_max": 1e400}}',
        b'{"name": "entidb", "limits": {"message_bytes_max": -5}}',
        b'{"name": "entidb", "limits": {"message_bytes_max": 99999999999999}}',
    ],
)
def test_limits_that_no_server_has_are_not_believed(document: bytes) -> None:
    with answering({}, document=document) as url:
        found = examine(Visit(url))
    assert "body" in {each.check for each in found}


@contextlib.contextmanager
def between(url: str, path: str, way: str) -> Iterator[str]:
    """Passes requests on, but for those to ``path``."""
    target = urlsplit(url)
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.close_connection = True
            if self.path.startswith(path):
                if way == "garbage":
                    self.wfile.write(b"what?\r\n\r\n")
                return
            upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
            with contextlib.closing(upstream):
                upstream.request(self.command, self.path, body or None, dict(self.headers))
                answer = upstream.getresponse()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() != "date":
                        self.send_header(name, value)
                self.end_headers()
                if answer.chunked:
                    part = answer.read1(65536)
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                    ending.wait(60)
                else:
                    self.wfile.write(answer.read())

        do_GET = do_POST = answer

        def log_message(self, format: str, *arguments: object) -> None:
            """Nobody reads it."""

    Handler.protocol_version = "HTTP/1.1"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            ending.set()
            server.shutdown()
            thread.join()


@pytest.mark.process
def test_certificates_that_end_have_another_name_or_are_nobodys_are_found(tmp_path: Path) -> None:
    def made(folder: str, name: str, days: int) -> tuple[str, str]:
        (tmp_path / folder).mkdir()
        return make_certificate(tmp_path / folder, name, days)

    with served() as (_, plain):
        found = asked(plain.replace("http:", "https:"), code=9)
    assert "no TLS" in found["tls"]["says"]
    cert, key = made("good", "localhost", 90)
    soon, soon_key = made("soon", "localhost", 5)
    other, other_key = made("other", "elsewhere.example", 90)
    with SyncServer.in_memory() as server:
        for files, ca, state, words in (
            ((cert, key), cert, "ok", "good for"),
            ((soon, soon_key), soon, "warning", "good for"),
            ((other, other_key), other, "problem", "not accepted"),
            ((cert, key), other, "problem", "not accepted"),
        ):
            with serving(server, tls_cert=files[0], tls_key=files[1]) as url:
                here = url.replace("127.0.0.1", "localhost")
                found = asked(here, "--ca-file", ca, code=9 if state == "problem" else 0)
            assert found["tls"]["state"] == state, found
            assert words in found["tls"]["says"]


def test_authorities_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    line = failed(entidb("doctor", "https://localhost", "--ca-file", tmp_path), 2, "invalid_config")
    assert "--ca-file" in line


def test_a_directory_for_backups_that_is_not_there_yet_is_something_to_check(tmp_path: Path):
    place = tmp_path / "data"
    place.mkdir()
    secret = tmp_path / "secret"
    done("secret", "--out", secret)
    given = ("--", "--secret-file", secret)
    none = asked(place, *given)["backups"]
    assert (none["state"], "here" in none["change"]) == ("warning", True)
    new = tmp_path / "new" / "backups"
    found = asked(place, *given, "--backup-dir", new)["backups"]
    assert (found["state"], f"{new} is not there" in found["says"]) == ("warning", True)
    assert not new.parent.exists()
    (tmp_path / "file").write_text("mine")
    for wrong in (tmp_path / "file", tmp_path / "file" / "backups"):
        found = asked(place, *given, "--backup-dir", wrong, code=9)["backups"]
        assert found["state"] == "problem", wrong

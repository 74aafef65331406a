"""On a terminal: colours, lines cut to its width, and a bar while something takes time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entidb import HttpTransport, LoopbackClient, SyncConfig, SyncEngine
from entidb.cli.exits import Exit
from entidb.cli.output import one_line
from entidb.db import Database
from entidb.server import ServerConfig, SyncServer, serving
from tests.cli.support import TIMEOUT_S, command, done, environment, put

pty = pytest.importorskip("pty")
fcntl = pytest.importorskip("fcntl")
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX"),
]

WIDTH = 60
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(*words: object, width: int = WIDTH, **env: str) -> tuple[int, str]:
    """Run a command whose three streams are a terminal; its exit code and all it wrote."""
    import struct
    import termios

    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    plain = environment(**{"TERM": "xterm", **env})
    for name in {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"} - set(env):
        plain.pop(name, None)
    running = subprocess.Popen(command(*words), stdin=far, stdout=far, stderr=far, env=plain)
    os.close(far)
    parts = []
    with contextlib.suppress(OSError):  # how a terminal says that nobody has it open any more
        while part := os.read(near, 65536):
            parts.append(part)
    os.close(near)
    return running.wait(TIMEOUT_S), b"".join(parts).decode().replace("\r\n", "\n")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    put(tmp_path / "shop", "notes", 1, {"text": "long " * 40})
    put(tmp_path / "shop", "notes", 2, {"text": "世界" * 40})
    return tmp_path / "shop"


def test_long_lines_are_cut_to_the_width_of_the_terminal(shop: Path):
    from rich.cells import cell_len

    code, said = on_a_terminal("list", shop, "notes")
    lines = said.splitlines()
    assert code == 0 and len(lines) == 2
    assert all(line.endswith("…") for line in lines)
    assert all(cell_len(line) <= WIDTH for line in lines)


def test_heads_of_tables_are_bold_unless_nobody_wants_colours(shop: Path):
    _, coloured = on_a_terminal("list", shop)
    assert "\x1b[1m" in coloured
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        _, plain = on_a_terminal("list", shop, **{name: value})  # type: ignore[arg-type]
        assert ESCAPES.search(plain) is None
        assert plain == ESCAPES.sub("", coloured)


def test_a_long_import_and_export_show_how_far_they_are(tmp_path: Path):
    rows = tmp_path / "rows.ndjson"
    rows.write_text("".join(f'{{"n":{n}}}\n' for n in range(5000)), encoding="utf-8")
    done("init", tmp_path / "a")
    code, said = on_a_terminal("import", tmp_path / "a", "rows", rows, "--batch", "500")
    assert code == 0 and "importing" in said and "%" not in ESCAPES.sub("", said).split("\n")[-1]
    code, said = on_a_terminal("export", tmp_path / "a", "rows", "--output", tmp_path / "out")
    assert code == 0 and "exporting" in said and "/5000" in said
    assert (tmp_path / "out").read_text(encoding="utf-8").count("\n") == 5000


def test_a_sync_shows_what_it_is_doing_and_how_far_it_is(tmp_path: Path):
    with serving(ServerConfig(data_dir=None, insecure_no_auth=True, access_log=False)) as url:
        for name in ("a", "b"):
            with Database.open(tmp_path / name) as database:
                if name == "a":
                    for _ in range(4):
                        with database.transaction() as tx:
                            for n in range(3000):
                                tx.collection("notes").add({"n": n})
            code, said = on_a_terminal("sync", tmp_path / name, url, "--db", "shop")
            assert code == 0
            assert "12,000 changes" in said
            assert ("pushing" if name == "a" else "pulling") in said


def test_a_server_that_cannot_be_reached_is_waited_for_visibly(tmp_path: Path):
    done("init", tmp_path / "a")
    code, said = on_a_terminal(
        "sync", tmp_path / "a", "http://127.0.0.1:1", "--db", "shop", "--attempts", "2"
    )
    assert code == 5
    assert "waiting to try again" in said
    assert "error[transport_error]" in said


def test_a_token_on_a_terminal_says_for_whom_and_until_when(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("correct horse battery staple, twice over", encoding="utf-8")
    secret.chmod(0o600)
    words = ("token", "--secret-file", secret, "--subject", "ann", "--database", "shop=r")
    code, said = on_a_terminal(*words)
    assert code == 0 and "for ann, until " in said
    _, document = on_a_terminal(*words, "--json", "--expires", "90s")
    assert json.loads(document)["databases"] == {"shop": "r"}


@pytest.mark.parametrize("width", [40, 60])
def test_narrow_terminals_get_short_ids_and_no_line_that_is_too_wide(tmp_path: Path, width: int):
    from rich.cells import cell_len

    path = tmp_path / ("a directory with a long name " * 3).strip()
    entity_id = put(path, "notes " * 12, 1, {"text": "世界" * 40})
    lines = [("list", path), ("list", path, "notes " * 12), ("status", path), ("pending", path)]
    for words in lines:
        code, said = on_a_terminal(*words, width=width, NO_COLOR="1")
        assert code == 0
        assert all(cell_len(line) <= width for line in said.splitlines()), said
    assert f"…{entity_id.hex[-12:]}" in on_a_terminal("list", path, "notes " * 12, width=width)[1]
    code, said = on_a_terminal("get", path, "notes " * 12, f"…{entity_id.hex[-12:]}", width=width)
    assert code == 0 and "世界" in said
    code, said = on_a_terminal("status", path, width=width, NO_COLOR="1")
    assert "".join(str(path).split()) in "".join(said.split())


@pytest.mark.parametrize("width", [40, 80])
def test_conflicts_and_what_was_overruled_are_told_in_lines_that_fit(tmp_path: Path, width: int):
    config = SyncConfig(db_id="shop", policies={"stock": "manual", "notes": "client_wins"})
    with SyncServer.in_memory() as server, Database.in_memory() as other:
        here = Database.open(tmp_path / "shop")

        def engine(db: Database) -> SyncEngine:
            transport = HttpTransport("http://localhost", client=LoopbackClient(server))
            return SyncEngine(config, transport, db)

        with here, engine(here) as mine, engine(other) as theirs:
            ids = {name: here[name].add({"text": "before"}) for name in ("stock", "notes")}
            mine.sync(), theirs.sync()
            for db, word in ((here, "mine "), (other, "theirs ")):
                for name, id in ids.items():
                    db[name].patch(id, text=word * 15)
            theirs.sync(), mine.sync()
    for what, entity, whole in (
        ("conflicts", "stock", ("mine " * 15, "theirs " * 15)),
        ("discarded", "notes", ("the server's value was overruled by the policy.",)),
    ):
        code, said = on_a_terminal(what, tmp_path / "shop", width=width)
        assert code == 0
        flat = "".join(said.split())
        assert all("".join(part.split()) in flat for part in (str(ids[entity]), *whole))
        told = said.split("--recommit")[0].split("  entidb resolve")[0].splitlines()
        assert [line for line in told if len(line) > width] == []
    piped = done("conflicts", tmp_path / "shop")
    assert "mine " * 15 in piped and "theirs " * 15 in piped


@pytest.mark.parametrize("words", [(), ("admin",), ("list",)])
def test_help_fits_a_narrow_terminal_and_says_all(words: tuple[str, ...]):
    code, said = on_a_terminal(*words, "--help", width=40)
    assert code == 0
    assert [line for line in said.splitlines() if len(line) > 40] == []
    assert "..." not in said.replace("[ARGS]...", "")


def test_wide_terminals_and_pipes_get_whole_ids(shop: Path):
    whole = re.compile(r"^[0-9a-f-]{36}  ", re.MULTILINE)
    assert len(whole.findall(on_a_terminal("list", shop, "notes", width=120)[1])) == 2
    assert len(whole.findall(done("list", shop, "notes"))) == 2


def watched(path: Path, url: str, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    """A watch on a terminal, and the near end of that."""
    import struct
    import termios

    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    words = command("sync", path, url, "--db", "shop", "--watch", "--interval", "600", *options)
    env = environment(TERM="xterm", COLUMNS="120")
    running = subprocess.Popen(words, stdin=far, stdout=far, stderr=far, env=env)
    os.close(far)
    return running, near


def read_until(near: int, found: str, said: str = "") -> str:
    """All that was written, until ``found`` is on the last line."""
    while re.search(found, said.rpartition("\x1b[2K")[2]) is None:
        said += os.read(near, 65536).decode()
    return said


def test_the_last_line_of_a_watch_says_how_things_are(tmp_path: Path):
    done("init", tmp_path / "a")
    with SyncServer.in_memory() as server, serving(server) as url:
        shop = server.database("shop")
        running, near = watched(tmp_path / "a", url)
        try:
            said = read_until(near, r"^live since [0-9:]{8}, .*0 pending, 0 conflicts$")
            shop.collection("notes").add({"text": "by itself"})
            said = read_until(near, r"^live since .*last change [0-9:]{8}, 0 pending", said)
            assert "1 change (" in said
            # Another command has the database meanwhile, and what it commits is pushed.
            done("put", tmp_path / "a", "notes", "key:mine", '"mine"')
            said = ""
            while "pushed  1 transaction" not in said:
                said += os.read(near, 65536).decode()
            # The line is there again: only then it has to be wiped.
            said = read_until(near, r"^live since [0-9:]{8}, .*0 pending, 0 conflicts$", said)
        finally:
            running.send_signal(signal.SIGINT)
            parts = [b""]
            with contextlib.suppress(OSError):
                while part := os.read(near, 65536):
                    parts.append(part)
            os.close(near)
        assert running.wait(TIMEOUT_S) == Exit.INTERRUPTED
        # What it says at its end is on a line of its own.
        assert re.search(rb"\x1b\[2K(\x1b\[2m)?[0-9]+ cycles: 1 change pulled", b"".join(parts))


def test_the_lines_of_a_watch_for_programs_are_nothing_but_json(tmp_path: Path):
    done("init", tmp_path / "a")
    with SyncServer.in_memory() as server, serving(server) as url:
        server.database("shop")
        running, near = watched(tmp_path / "a", url, "--json")
        said = ""
        while "}" not in said:
            said += os.read(near, 65536).decode()
        running.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while os.read(near, 65536):
                continue
        os.close(near)
        running.wait(TIMEOUT_S)
    first = next(line for line in said.splitlines() if line.startswith("{"))
    row = json.loads(first)
    assert (row["live"], row["live_since_ms"], row["heard_ms"]) == ("offline", None, None)
    assert "\x1b[2K" not in said


def test_a_long_name_in_a_message_leaves_room_for_what_is_said_of_it():
    said = one_line(f"{'x' * 5000!r} is no collection, and {'y z ' * 900!r} neither: look again")
    assert len(said) < 400
    assert said.startswith("'xxx") and said.endswith(" neither: look again")
    assert "xxx' is no collection, and 'y z" in said
    path = "/" + "deep/" * 60
    assert one_line(f"cannot read {path}") == f"cannot read {path}"
    assert len(one_line("a b " * 50_000)) == 1000

"""The command line as a process: pipes, locks, signals, damage, and no traceback ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entidb.cli.exits import Exit
from entidb.db import Database, Role
from entidb.sync import others
from tests.cli.support import (
    ROOT,
    TIMEOUT_S,
    command,
    done,
    entidb,
    environment,
    failed,
    process,
    put,
)

pytestmark = pytest.mark.process


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop"
    with Database.open(path) as database, database.transaction() as tx:
        for number in range(5000):
            tx.collection("notes").add({"n": number, "text": "some text " * 5})
    return path


def one_error(ended: subprocess.CompletedProcess[bytes], code: Exit, name: str) -> str:
    text = ended.stderr.decode()
    assert (ended.returncode, text.count("\n")) == (code, 1), text
    assert text.startswith(f"error[{name}]: ")
    return text


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("words", [("list", "--limit", "0"), ("export",)])
def test_a_reader_that_stops_early_ends_the_command_quietly(shop: Path, words: tuple[str, ...]):
    running = subprocess.Popen(
        command(words[0], shop, "notes", *words[1:]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert running.stdout is not None and running.stderr is not None
    first = running.stdout.readline()
    running.stdout.close()
    said = running.stderr.read()
    running.stderr.close()
    assert running.wait(TIMEOUT_S) == Exit.BROKEN_PIPE
    assert b"some text" in first
    assert said == b""


@pytest.mark.skipif(os.name != "posix", reason="file descriptors of POSIX")
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("list", "DIR", "notes"), 0),
        (("export", "DIR", "notes", "--format", "csv"), 0),
        (("put", "DIR", "more", "1"), 0),
        (("--help",), 0),
        (("get", "DIR", "notes", "x"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_stream_that_is_closed_changes_nothing_but_what_is_shown(
    shop: Path, words: tuple[str, ...], code: int, number: int
):
    line = command(*(shop if word == "DIR" else word for word in words))
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {number}{"<" if number == 0 else ">"}&-', "sh", *line],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    assert b"internal" not in ended.stderr and b"Warning" not in ended.stderr
    assert code or b"error" not in ended.stderr
    with Database.open(shop) as database:
        assert database.verify() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_output_that_is_full_is_an_error(shop: Path):
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            command("export", shop, "notes"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=TIMEOUT_S,
            check=False,
        )
    line = one_error(ended, Exit.STORAGE, "os_error")
    assert "standard output" in line and "Errno" not in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one process at a time there")
@pytest.mark.parametrize(
    "words",
    [("status",), ("inspect",), ("verify",), ("list", "notes"), ("pending",), ("conflicts",),
     ("discarded",), ("export", "notes"), ("put", "more", "1"), ("import", "more", "-")],
    ids=" ".join,
)  # fmt: skip
def test_commands_work_beside_a_program_that_has_the_database_open(
    shop: Path, words: tuple[str, ...]
):
    with Database.open(shop) as database:
        database.collection("notes").add({"n": -1})
        line = command(words[0], shop, *words[1:])
        ended = subprocess.run(
            line,
            input=b'{"id": "0197a000-0000-7000-8000-000000000001", "n": 1}\n',
            capture_output=True,
            env=environment(),
            timeout=TIMEOUT_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        if words[0] in ("put", "import"):
            assert len(database.collection("more")) == 1
        database.collection("notes").add({"n": -2})
        assert database.verify() == []


def test_what_needs_the_database_alone_says_who_has_it(shop: Path):
    with Database.open(shop):
        said = one_error(process("compact", shop), Exit.LOCKED, "database_locked")
    assert f"process {os.getpid()}" in said
    assert process("compact", shop).returncode == 0


def test_a_damaged_database_is_told_apart_from_one_that_is_well(shop: Path, tmp_path: Path):
    assert process("verify", shop).returncode == Exit.OK
    file = shop / "data.mdb"
    file.write_bytes(file.read_bytes().replace(b"some text", b"some tezt"))
    found = process("verify", shop, "--json")
    assert found.returncode == Exit.FAULTS
    assert json.loads(found.stdout)["faults"]
    assert process("verify", shop).stderr.startswith(b"error[faults]: ")
    one_error(
        process("export", shop, "notes", "-o", tmp_path / "o"), Exit.STORAGE, "corrupt_record"
    )
    assert not (tmp_path / "o").exists()


def test_a_database_that_was_cut_short_is_not_opened(shop: Path):
    with (shop / "data.mdb").open("r+b") as raw:
        raw.truncate(9000)
    one_error(process("list", shop), Exit.STORAGE, "truncated")
    assert process("verify", shop).returncode == Exit.FAULTS


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    one_error(process("init", tmp_path), Exit.STORAGE, "not_a_database")
    assert [each.name for each in tmp_path.iterdir()] == ["letter.txt"]


_BREAK = """
import sys
from entidb.cli import main
import entidb.cli.words
def broken(*words, **options):
    raise ZeroDivisionError("first line\\nsecond line")
entidb.cli.words.Database.open = broken
sys.exit(main(["status", sys.argv[1]]))
"""


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_bug_is_one_line_and_a_traceback_only_where_it_is_asked_for(shop: Path, debug: str):
    ended = subprocess.run(
        [sys.executable, "-c", _BREAK, str(shop)],
        capture_output=True,
        env=environment(ENTIDB_DEBUG=debug),
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = ended.stderr.decode().splitlines()
    assert ended.returncode == Exit.FAILURE
    assert lines[-1].startswith("error[internal]: ZeroDivisionError: first line second line")
    assert "ENTIDB_DEBUG=1" in lines[-1]
    assert (len(lines) > 1) == bool(debug)


_WITHOUT = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "click" else real(name, *rest)
from entidb.cli import main
sys.exit(main(["status"]))
"""


def test_without_the_extra_the_error_names_it():
    ended = subprocess.run(
        [sys.executable, "-c", _WITHOUT],
        capture_output=True,
        env=environment(),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert 'pip install "entidb[cli]"' in one_error(ended, Exit.FAILURE, "missing_extra")


def test_without_the_server_extra_the_other_commands_work(tmp_path: Path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("uvicorn", "starlette", "jwt"):
        (hidden / f"{name}.py").write_text(
            f"raise ModuleNotFoundError('No module named {name}', name='{name}')", encoding="utf-8"
        )
    path = os.pathsep.join((str(hidden), str(ROOT / "src")))
    env = {"PYTHONPATH": path}
    assert process("init", tmp_path / "a", env=env).returncode == 0
    assert process("--help", env=env).returncode == 0
    served = process("serve", tmp_path / "srv", "--insecure-no-auth", env=env)
    assert "entidb[server]" in one_error(served, Exit.FAILURE, "missing_extra")


def test_output_is_plain_and_complete_where_it_is_no_terminal(tmp_path: Path):
    put(tmp_path / "a", "notes", 1, "wide " * 200)
    listed = process("list", tmp_path / "a", "notes", env={"COLUMNS": "40"}).stdout
    assert b"\x1b" not in listed and len(listed) > 1000
    assert b"\x1b" not in process("list", tmp_path / "a", env={"FORCE_COLOR": "1"}).stdout


def test_json_stays_json_where_standard_output_is_ascii(tmp_path: Path):
    put(tmp_path / "a", "notes", 1, {"t": "Größe 😀"})
    for words in (("get", "0"), ("get", "0", "--json"), ("list",)):
        env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        ended = process(words[0], tmp_path / "a", "notes", *words[1:], env=env)
        assert ended.returncode == 0, ended.stderr
        text = ended.stdout.decode("ascii")
        found = json.loads(text[text.index("{") :])
        assert found.get("value", found) == {"t": "Größe 😀"}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, Exit.INTERRUPTED),
        (signal.SIGTERM, Exit.TERMINATED),
        (signal.SIGHUP, Exit.HUNG_UP),
    ],
)
def test_a_signal_ends_an_import_with_what_was_committed(
    tmp_path: Path, number: signal.Signals, code: Exit
):
    done = process("init", tmp_path / "a")
    assert done.returncode == 0
    running = subprocess.Popen(
        command("import", tmp_path / "a", "t", "-", "--batch", "1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert running.stdin is not None
    # Larger than the reader's buffer, so that it has committed something when the write returns.
    running.stdin.write(b'{"a":"%s"}\n' % (b"x" * 1000) * 300)
    running.stdin.flush()
    running.send_signal(number)
    try:
        _, said = running.communicate(timeout=TIMEOUT_S)
    except BrokenPipeError:
        said = b""
    assert running.returncode == code
    assert b"Traceback" not in said
    assert process("verify", tmp_path / "a").returncode == Exit.OK


def test_verify_names_a_damaged_page_before_anything_maps_it(tmp_path: Path) -> None:
    with Database.open(tmp_path / "shop") as database:
        database.collection("notes").put_many({database.new_id(): "x" * 200 for _ in range(2000)})
    data = tmp_path / "shop" / "data.mdb"
    raw = bytearray(data.read_bytes())
    for page in range(2 * 4096, len(raw), 4096):
        if raw[page + 10] & 2:
            # The first node of a leaf claims two gigabytes: reading it would leave the map.
            node = page + int.from_bytes(raw[page + 16 : page + 18], "little")
            raw[node + 3] |= 0x80
    data.write_bytes(raw)
    found = process("verify", tmp_path / "shop", "--json")
    assert found.returncode == Exit.FAULTS
    assert "page" in json.loads(found.stdout)["faults"][0]


_IN_A_CYCLE = """
import sys
from entidb.db import Database
with Database.open(sys.argv[1]) as database:
    assert database.right("engine").take(0)
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "words",
    [
        ("reset", "{device}", "--keep", "server"),
        ("logout", "{device}", "--pending", "keep", "--subject", "ann"),
        ("init", "{device}", "--from", "{snapshot}"),
    ],
    ids=lambda words: words[0],
)
def test_what_changes_whose_a_device_is_waits_for_the_cycle_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    device, snapshot = tmp_path / "device", tmp_path / "shop.snapshot"
    with Database.open(tmp_path / "server", role=Role.SERVER) as server:
        server.collection("notes").add("there")
    done("snapshot", tmp_path / "server", snapshot)
    done("init", device)
    given = [word.format(device=device, snapshot=snapshot) for word in words]
    other = subprocess.Popen(
        [sys.executable, "-c", _IN_A_CYCLE, device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    with other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == b"there\n"
        monkeypatch.setattr(others, "OTHERS_S", 0.0)
        said = failed(entidb(*given), Exit.LOCKED, "database_locked")
        assert "sync cycle" in said
        other.stdin.close()
        assert other.wait(TIMEOUT_S) == 0
    done(*given)

"""What strangers typed, and what broke, misled or was silent before: each test one kind."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import pytest

from entidb.cli.exits import Exit
from tests.cli.support import documents, done, entidb, failed, process, put
from tests.cli.test_terminal import on_a_terminal

posix = pytest.mark.skipif(os.name != "posix", reason="command lines are bytes here")
#: As Python has it, of a byte that is no UTF-8.
BROKEN = "\udcff"


def rows(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------- files that are no rows


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b'{"a":', "it ends too early"),
        (b'{"a" 1}', "expecting ':' delimiter at column 6"),
        (b'{"a":1},', "extra data at column 8"),
        (b"{'a':1}", "expecting property name enclosed in double quotes at column 2"),
    ],
)
def test_a_line_that_is_no_json_is_counted_once(tmp_path: Path, bad: bytes, said: str) -> None:
    file = rows(tmp_path, "rows.ndjson", b'{"a":1}\n' * 6 + bad + b"\n")
    done("init", tmp_path / "db")
    line = failed(entidb("import", tmp_path / "db", "n", file), Exit.VALUE, "invalid_json")
    assert f"line 7: not JSON: {said};" in line
    assert "char" not in line and "line 1" not in line and "line 2" not in line


def test_a_value_of_several_lines_says_in_which_one_it_is_wrong(tmp_path: Path) -> None:
    value = rows(tmp_path, "value.json", b'{\n  "a": 1\n  "b": 2\n}\n')
    line = failed(entidb("put", tmp_path / "db", "n", f"@{value}"), Exit.VALUE, "invalid_json")
    assert "at line 3, column 3" in line


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a,b\n1,2\n".encode("utf-32"), "UTF-32: give --encoding utf-32"),
        (b"\x28\xb5\x2f\xfd" + bytes(range(200)), "packed with zstd"),
        (b"BZh91AY&SY" + bytes(range(200)), "packed with bzip2"),
        (b"\xfd7zXZ\0" + bytes(range(200)), "packed with xz"),
        (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF document"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x01", "the file is no text"),
        (b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\n", "the file is no text"),
        (b'<?xml version="1.0"?>\n<a/>\n', "the file is XML or HTML"),
        (b"<!DOCTYPE html>\n<p>no,table</p>\n", "the file is XML or HTML"),
        (b"\xef\xbb\xbf \r\n<html>\n", "the file is XML or HTML"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "ndjson"])
def test_a_file_that_is_no_table_is_called_what_it_is(
    tmp_path: Path, data: bytes, said: str, kind: str
) -> None:
    file = rows(tmp_path, "file", data)
    result = entidb("import", tmp_path / "db", "n", file, "--format", kind)
    line = failed(result, Exit.VALUE, "invalid_input")
    assert said in line and "cp1252" not in line
    assert not (tmp_path / "db").exists()


def test_utf32_is_read_as_the_error_says(tmp_path: Path) -> None:
    file = rows(tmp_path, "file.csv", "a,b\n1,ü\n".encode("utf-32"))
    done("import", tmp_path / "db", "n", file, "--encoding", "utf-32")
    (row,) = documents(done("export", tmp_path / "db", "n"))
    assert (row["a"], row["b"]) == ("1", "ü")


def test_one_control_character_in_a_cell_is_a_cell(tmp_path: Path) -> None:
    file = rows(tmp_path, "file.csv", b"a,b\n1,\x002\n")
    done("import", tmp_path / "db", "n", file)
    (row,) = documents(done("export", tmp_path / "db", "n"))
    assert row["b"] == "\x002"


# ---------------------------------------------------------------- words that are empty, or no words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("secret", "--out", ""), "the output is empty: name a file"),
        (("put", "DB", "n", "@"), "no name follows it"),
        (("discarded", "DB", "--recommit", ""), "'' is no id"),
        (("discarded", "DB", "--prune", ""), "'' is no id"),
        (("token", "--secret-file", "", "--subject", "a", "--admin"), "secret file is empty"),
        (("import", "DB", "n", "rows.csv", "--key", "a,a"), "--key names 'a' twice"),
    ],
)
def test_an_empty_or_repeated_word_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "DB", "n", 1, 1)
    rows(tmp_path, "rows.csv", b"a,b\n1,2\n")
    result = entidb(*words)
    assert result.exit_code == Exit.USAGE, result.output
    assert said in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["DB", "rows.csv"]


def test_nobody_is_told_to_remove_what_is_there(tmp_path: Path) -> None:
    for place in (os.devnull, tmp_path):
        line = failed(entidb("secret", "--out", place), Exit.USAGE, "exists")
        assert "name a new file" in line and "remove it" not in line


@posix
@pytest.mark.parametrize(
    "words",
    [
        ("get", "DB", "n", f"key:{BROKEN}"),
        ("export", "DB", "n", "--format", "csv", "--fields", BROKEN),
        ("token", "--secret-file", "secret", "--subject", BROKEN, "--database", "x"),
        ("token", "--secret-file", "secret", "--subject", "a", "--audience", BROKEN, "--admin"),
        ("token", "--secret-file", "secret", "--subject", "a", "--admin-of", BROKEN),
        ("logout", "DB", "--pending", "keep", "--subject", BROKEN),
    ],
)
def test_words_that_are_not_utf8_are_refused_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "DB", "n", 1, {"a": 1})
    done("secret", "--out", "secret")
    result = entidb(*words)
    assert result.exit_code == Exit.USAGE, result.output
    assert "surrogate" not in result.stderr and "$." not in result.stderr
    assert "not UTF-8" in result.stderr or "is no name for a database" in result.stderr


@posix
@pytest.mark.parametrize("command", ["token", "serve"])
def test_a_secret_in_the_environment_may_be_any_bytes(tmp_path: Path, command: str) -> None:
    words: tuple[object, ...] = ("token", "--subject", "a", "--admin")
    if command == "serve":
        # It gets as far as the port, which is none.
        words = ("serve", tmp_path / "data", "--port", "70000")
    ended = process(*words, "--secret-env", "SECRET", env={"SECRET": os.fsdecode(b"\xff" * 40)})
    assert ended.returncode == (Exit.NETWORK if command == "serve" else 0), ended.stderr


# ---------------------------------------------------------------- options that say two things


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--database", "x", "--database", "x=r"), "--database says two things of 'x'"),
        (("--admin", "--claim", "a=1", "--claim", "a=2"), "--claim says two things of 'a'"),
        (("--admin", "--claim", 'nbf="x"'), "the claim nbf is a number"),
        (("--admin", "--claim", "nbf=true"), "the claim nbf is a number"),
        (("--admin", "--claim", "a=NaN"), "--claim a: the value is JSON: NaN is not JSON"),
        (("--admin", "--claim", "a={"), "--claim a: the value is JSON: not JSON"),
        (("--admin", "--audience", ""), "audience is empty"),
        (("--admin-of", ""), "is no name for a database"),
        (("--admin", "--expires", "9999999d"), "up to the year 9999"),
        (("--admin", "--claim", f'a="{"x" * 8000}"'), "no server takes more than 8192"),
    ],
)
def test_no_token_is_made_that_no_server_takes_or_that_says_two_things(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    secret = tmp_path / "secret"
    done("secret", "--out", secret)
    result = entidb("token", "--secret-file", secret, "--subject", "a", *words)
    assert result.exit_code == Exit.USAGE, result.output
    assert said in result.stderr and not result.stdout


def test_the_same_said_twice_is_said_once(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    done("secret", "--out", secret)
    words = ("--database", "x=r", "--database", "x=r", "--claim", "a=1", "--claim", "a=1")
    done("token", "--secret-file", secret, "--subject", "a", *words)


@pytest.mark.parametrize("names", [("manual", "merge"), ("n=manual", "n=merge")])
def test_two_policies_for_one_thing_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    put(tmp_path / "db", "n", 1, 1)
    sync = ("sync", tmp_path / "db", "http://127.0.0.1:1", "--db", "x", "--attempts", 1)
    failed(entidb(*sync, "--policy", names[0], "--policy", names[1]), Exit.USAGE, "usage")


# ---------------------------------------------------------------- the words of a command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attempts", 0), "--attempts must be from 1"),
        (("--timeout", "nan"), "--timeout must be from"),
        (("--policy", "zz"), "--policy: no policy is named 'zz'"),
        (("--db", "\x1b"), "--db: the name"),
        (("--token", "a b"), "--token is no token"),
        (("--token", ""), "--token is no token"),
    ],
)
def test_an_error_of_sync_names_the_option(
    tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    put(tmp_path / "db", "n", 1, 1)
    given = ("sync", tmp_path / "db", "http://127.0.0.1:1", "--db", "x", "--attempts", 1, *words)
    result = entidb(*given)
    assert result.exit_code == Exit.USAGE, result.output
    assert said in result.stderr
    assert "_s must" not in result.stderr and "a function" not in result.stderr


def test_an_error_of_sync_names_a_way_to_give_the_token(tmp_path: Path) -> None:
    put(tmp_path / "db", "n", 1, 1)
    line = failed(
        entidb("sync", tmp_path / "db", "http://user:pw@127.0.0.1:1", "--db", "x"),
        Exit.USAGE,
        "invalid_config",
    )
    assert "--token-file" in line and "token=" not in line and "pw" not in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--live-max", "-1"), "--live-max is a whole number"),
        (("--body-bytes-max", "16777216"), "--body-bytes-max (16777216) has to be at least "
                                           "--transaction-bytes-max"),
        (("--keys", "x"), "--secret-file and --keys say who may sync"),
        (("--insecure-no-auth",), "--secret-file and --insecure-no-auth say who may sync"),
        (("--backup-dir", "FILE"), "FILE is no directory"),
        (("--segments-dir", "FILE/x"), "FILE is no directory"),
        (("--backup-dir", ""), "--backup-dir is empty"),
        (("--root-path", "x y"), "--root-path is a path like '/sync'"),
        (("--root-path", "/é"), "--root-path is a path like '/sync'"),
        (("--root-path", "/\x1b[31m"), "--root-path is a path like '/sync'"),
        (("--trusted-proxies", "10.0.0.0/33"), "--trusted-proxies: '10.0.0.0/33' is no address"),
        (("--trusted-proxies", "127.0.0.1,proxy"), "--trusted-proxies: 'proxy' is no address"),
    ],
)  # fmt: skip
def test_a_server_does_not_start_on_what_cannot_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path, "FILE", b"mine")
    done("secret", "--out", "secret")
    # A port that is none, so that a server that would start ends all the same.
    result = entidb("serve", "data", "--secret-file", "secret", "--port", 70000, *words)
    assert result.exit_code == Exit.USAGE, result.output
    assert said in result.stderr
    assert (tmp_path / "FILE").read_bytes() == b"mine"


def test_a_host_that_is_none_is_said_without_a_number(tmp_path: Path) -> None:
    done("secret", "--out", tmp_path / "secret")
    line = failed(
        entidb("serve", tmp_path / "data", "--secret-file", tmp_path / "secret",
               "--host", "999.1.1.1"),
        Exit.NETWORK,
        "cannot_bind",
    )  # fmt: skip
    assert "999.1.1.1" in line and "Errno" not in line


# ---------------------------------------------------------------- places and terminals


@pytest.mark.parametrize("command", ["backup", "copy", "snapshot", "logout"])
def test_nothing_is_written_into_the_directory_of_a_database(tmp_path: Path, command: str) -> None:
    shop = tmp_path / "shop"
    put(shop, "n", 1, 1)
    before = sorted(os.listdir(shop))
    words = {
        "backup": ("backup", shop, shop / "copy"),
        "copy": ("copy", shop, shop / "deep" / "copy"),
        "snapshot": ("snapshot", shop, shop / "file.tar"),
        "logout": ("logout", shop, "--pending", "export", "--file", shop / "file"),
    }[command]
    line = failed(entidb(*words), Exit.USAGE, "usage")
    assert f"would be inside the database {shop}" in line
    assert sorted(os.listdir(shop)) == before
    assert len(documents(done("pending", shop, "--json"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a terminal of its own")
def test_the_name_on_a_token_does_not_steer_the_terminal(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    done("secret", "--out", secret)
    words = ("token", "--secret-file", secret, "--subject", "a\x1b[31m\x07b", "--admin")
    _, shown = on_a_terminal(*words, width=80)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown.replace("\x1b[31m", "RAW"))
    assert "RAW" not in shown
    assert "\x1b" not in shown and "\x07" not in shown
    assert r"for a\u001b[31m\u0007b, until" in shown


def test_a_name_with_spaces_is_no_part_of_the_sentence(tmp_path: Path) -> None:
    """ "there are no tes, notes" said the opposite of what was there."""
    done("put", tmp_path / "db", "no tes", "1")
    done("put", tmp_path / "db", "notes", "1")
    line = failed(entidb("get", tmp_path / "db", "note", "a"), 3, "no_collection")
    assert "there are 'no tes', notes" in line


@pytest.mark.parametrize("port", ["0", "99999", "http"])
def test_a_port_that_is_none_is_called_one(tmp_path: Path, port: str) -> None:
    done("init", tmp_path / "db")
    line = failed(
        entidb("sync", tmp_path / "db", f"http://localhost:{port}", "--db", "x"),
        2,
        "invalid_config",
    )
    assert "has a port that is none of 1 to 65535" in line


def test_the_doctor_speaks_of_no_numbers_of_the_system(free_port: int) -> None:
    result = entidb("doctor", f"http://localhost:{free_port}")
    assert result.exit_code == 9, result.output
    assert "Connection refused" in result.output and "Errno" not in result.output


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port

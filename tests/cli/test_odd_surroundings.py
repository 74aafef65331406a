"""What a command does where its surroundings are odd: no end, no room, no directory, no UTF-8."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from entidb.cli import values
from entidb.cli.exits import Exit, InputError
from entidb.storage.partial import Partial
from tests.cli.support import command, done, dumped, entidb, environment, failed, put

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@linux
def test_a_value_without_an_end_is_refused_and_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "LINE_BYTES_MAX", 1 << 20)
    said = failed(
        entidb("put", tmp_path / "db", "notes", "@/dev/zero"), Exit.VALUE, "invalid_input"
    )
    assert "/dev/zero is longer than 1048576 bytes" in said
    big = b'"' + b"x" * (1 << 20) + b'"'
    said = failed(
        entidb("put", tmp_path / "db", "notes", "-", stdin=big), Exit.VALUE, "invalid_input"
    )
    assert "standard input is longer than" in said


@pytest.mark.parametrize("name", ["data.mdb", "entidb.lock", "rows.ndjson"])
def test_an_export_into_a_database_directory_is_refused_and_touches_nothing(
    tmp_path: Path, name: str
) -> None:
    shop = tmp_path / "shop"
    put(shop, "notes", 1, {"a": 1})
    before = sorted(os.listdir(shop))
    said = failed(entidb("export", shop, "notes", "-o", shop / name), Exit.USAGE, "usage")
    assert f"{shop / name} would be inside the database" in said
    assert sorted(os.listdir(shop)) == before
    assert len(dumped(shop, "notes")) == 1


@pytest.mark.parametrize("buffered", [True, False])
def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(
    tmp_path: Path, buffered: bool
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    around = {**environment(), "PYTHONUNBUFFERED": "" if buffered else "1"}
    with open("/dev/full", "wb") as full:
        missing = command("list", tmp_path / "none", "notes")
        ended = subprocess.run(missing, stderr=full, env=around, timeout=60)
        lost = subprocess.run(command("--help"), stdout=full, stderr=full, env=around, timeout=60)
    assert (ended.returncode, lost.returncode) == (Exit.NOT_FOUND, Exit.STORAGE)


@linux
def test_a_directory_that_is_gone_is_named_and_not_standard_output(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$1"; shift; exec "$@"'
    ended = subprocess.run(
        ["sh", "-c", script, "sh", str(gone), *command("init", "db")],
        cwd=gone,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == Exit.STORAGE
    assert "the directory in which this process runs is gone" in ended.stderr


def test_a_name_that_is_not_utf8_is_not_said_to_have_control_characters(tmp_path: Path) -> None:
    done("init", tmp_path / "db")
    said = failed(entidb("put", tmp_path / "db", "\udcff", "1"), Exit.USAGE, "invalid_name")
    assert "is not UTF-8" in said and "control" not in said


def test_two_types_of_one_column_are_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n1,2\n")
    said = failed(
        entidb("import", tmp_path / "db", "n", rows, "--types", "a=int,a=text"),
        Exit.USAGE,
        "usage",
    )
    assert "names 'a' twice: once int, once text" in said
    done("import", tmp_path / "db", "n", rows, "--types", "a=int,a=int")


class _Counted(str):
    """A name that counts how often names are compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        _Counted.compared += 1
        return str.__eq__(self, other)


def test_a_name_that_comes_twice_is_found_without_comparing_each_with_each() -> None:
    names = [_Counted(f"column {number}") for number in range(2000)]
    _Counted.compared = 0
    assert values.twice_in(names) is None
    assert _Counted.compared < 4 * len(names)
    assert values.twice_in([*names, _Counted("column 1999")]) == "column 1999"
    with pytest.raises(InputError, match="the key 'a' twice"):
        values.parse('{"b": 1, "a": 2, "a": 3}')


def test_an_export_that_finds_no_room_says_so_and_not_that_something_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "db", "notes", 1, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "rows.ndjson"
    words = ("export", tmp_path / "db", "notes", "-o", target)
    monkeypatch.setattr("entidb.storage.locks._write_start", full)
    said = failed(entidb(*words), Exit.STORAGE, "storage_full")
    assert f"writing {target}: the disk is full" in said
    monkeypatch.undo()
    monkeypatch.setattr(Partial, "finish", full)
    said = failed(entidb(*words), Exit.STORAGE, "storage_full")
    assert f"writing {target}: the disk is full" in said
    assert sorted(os.listdir(tmp_path)) == ["db"]


def test_an_export_that_the_disk_stops_is_not_said_to_be_in_the_wrong_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "db", "notes", 1, {"a": 1})

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Partial, "finish", broken)
    said = failed(
        entidb("export", tmp_path / "db", "notes", "-o", tmp_path / "rows.ndjson"),
        Exit.STORAGE,
        "storage_error",
    )
    assert "the disk reports an input/output error" in said and "may write to" not in said

"""Places that may not be written are refused at the start, with what to do and nothing made."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb import Database
from tests.cli.support import TIMEOUT_S, done, environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")

#: Somebody who may not write where root may. What is imported may lie where he may not read.
RUN_AS_SOMEBODY = """
    import csv, difflib, encodings.idna, importlib, os, resource, sys, tarfile
    import entidb.server.run, entidb.storage.lmdb
    from entidb.cli.app import COMMANDS, run
    for place in COMMANDS.values():
        importlib.import_module("entidb.cli." + place.partition(":")[0])
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(4711)
        os.setuid(4711)
    sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture
def place(open_path: Path) -> Iterator[Path]:
    """A directory with a database in it, ``shut`` that may not be written, and ``hidden`` that
    may not be looked into."""
    done("init", open_path / "db")
    done("put", open_path / "db", "notes", "1")
    for name, mode in (("shut", 0o555), ("hidden", 0o000)):
        (open_path / name).mkdir()
        (open_path / name).chmod(mode)
    if os.geteuid() == 0:
        for each in (open_path / "db", *(open_path / "db").iterdir()):
            os.chown(each, 4711, 4711)
    yield open_path
    for name in ("shut", "hidden"):
        (open_path / name).chmod(0o755)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("init PLACE/shut/db", 7, "no permission; check owner and mode"),
        ("init PLACE/hidden/db", 7, "no permission; check owner and mode"),
        ("list PLACE/hidden/db", 7, "no permission; check owner and mode"),
        ("verify PLACE/hidden/db", 7, "no permission; check owner and mode"),
        ("copy PLACE/hidden/db PLACE/new", 7, "no permission; check owner and mode"),
        ("admin --dir PLACE/hidden databases", 7, "as its own user or as root: no permission"),
        ("renew PLACE/hidden/db", 7, "no permission; check owner and mode"),
        ("import PLACE/db notes PLACE/hidden/rows.csv", 3, "check its owner and mode"),
        ("import PLACE/db notes PLACE/missing/rows.csv", 3, "check the path"),
        ("put PLACE/db notes @PLACE/hidden/value.json", 3, "check its owner and mode"),
        ("init PLACE/new --from PLACE/hidden/image", 3, "check its owner and mode"),
        ("backup PLACE/db PLACE/shut/copy", 7, "no permission; check owner and mode"),
        ("backup PLACE/db PLACE/missing/copy", 7, "check the path"),
        ("export PLACE/db notes -o PLACE/shut/x.csv", 7, "that you may write to"),
        ("export PLACE/db notes -o PLACE/missing/x.csv", 7, "that you may write to"),
        ("export PLACE/db notes -o PLACE/db", 7, "that you may write to"),
        ("serve PLACE/shut --insecure-no-auth", 2, "DIR cannot be used"),
        ("serve PLACE/shut/data --insecure-no-auth", 2, "DIR cannot be made"),
        ("serve PLACE/hidden/data --insecure-no-auth", 2, "DIR cannot be made"),
        ("serve PLACE/db/data.mdb --insecure-no-auth", 2, "DIR cannot be made"),
        (
            "serve PLACE/db --insecure-no-auth --ready-file PLACE/shut/ready",
            2,
            "--ready-file cannot be written",
        ),
    ],
)
def test_a_place_that_may_not_be_used_is_refused_at_the_start(
    place: Path, line: str, code: int, said: str
) -> None:
    before = sorted(os.listdir(place)), sorted(os.listdir(place / "db"))
    words = [word.replace("PLACE", str(place)) for word in line.split()]
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN_AS_SOMEBODY), *words],
        capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    (last,) = ended.stderr.splitlines()
    assert last.startswith("error[")
    assert said in last
    assert "Errno" not in last
    assert str(place) in last
    assert (sorted(os.listdir(place)), sorted(os.listdir(place / "db"))) == before


@pytest.mark.parametrize("command", ["status", "pending", "conflicts", "discarded"])
def test_what_only_reads_opens_a_database_only_to_read(tmp_path: Path, command: str) -> None:
    """So it works on files that may not be written, and beside others who only read."""
    with Database.open(tmp_path / "db") as db:
        db.collection("notes").add(1)
    with Database.open(tmp_path / "db", read_only=True):
        ended = subprocess.run(
            [sys.executable, "-m", "entidb", command, str(tmp_path / "db")],
            capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr

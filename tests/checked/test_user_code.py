"""What type checkers make of a program that uses EntiDB: nothing right is refused, and every
mistake is found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from entidb import Database

ROOT: Final = Path(__file__).parents[2]
#: No Python by its name, so that nobody checks it who is not to find its mistakes.
CODE: Final = (Path(__file__).parent / "user_code.txt").read_text(encoding="utf-8")
LINES: Final = CODE.splitlines()
WRONG: Final = {number for number, line in enumerate(LINES, 1) if line.endswith("# wrong")}
TIMEOUT_S: Final = 300


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "user_code.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def checked(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def compare(found: dict[int, str]) -> None:
    assert {number: said for number, said in found.items() if number not in WRONG} == {}
    missed = [f"{number}: {LINES[number - 1]}" for number in sorted(WRONG - found.keys())]
    assert missed == []


def test_the_program_has_mistakes_to_be_found() -> None:
    assert len(WRONG) >= 10
    assert (ROOT / "src" / "entidb" / "py.typed").exists()
    assert Database.collection.__annotations__


def test_mypy_finds_all_mistakes_and_nothing_else(program: Path) -> None:
    settings = "--no-incremental", "--strict", "--config-file=", "--no-error-summary"
    # One line for each, without the notes that say more.
    said = checked("mypy", *settings, "--hide-error-context", str(program)).splitlines()
    compare({int(line.split(":")[1]): line for line in said if ": error:" in line})


@pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None,
    reason="basedpyright is not installed: mypy alone reads the program of a user",
)
def test_pyright_finds_all_mistakes_and_nothing_else(program: Path, tmp_path: Path) -> None:
    settings = {
        "typeCheckingMode": "standard",
        "include": [str(program)],
        "extraPaths": [str(ROOT / "src")],
        "reportAttributeAccessIssue": "error",
    }
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps(settings), encoding="utf-8")
    said = checked("basedpyright", "--outputjson", "--project", str(project))
    faults = json.loads(said)["generalDiagnostics"]
    compare(
        {
            each["range"]["start"]["line"] + 1: each["message"]
            for each in faults
            if each["severity"] == "error"
        }
    )

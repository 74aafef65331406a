"""Every example runs, in a process of its own, and says what it is there to show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

#: What must be found in the output, in this order.
EXPECTED = {
    "todo": [
        "phone$ todo done 1",
        "phone$ todo show\n1. [x] buy milk\n2. [ ] write the report\n3. [ ] book a table",
        "laptop$ todo show\n1. [x] buy milk\n2. [ ] write the report\n3. [ ] book a table",
    ],
    "point_of_sale": [
        "'tea': was 5, here 4, on the server 4: together 3",
        "refused (out_of_stock): only 0 of 'cake' left",
        "On the server: tea 3, cake 0",
    ],
    "live_page": [
        "the page hears: data: 0",
        "the page hears: data: 1",
        "the page shows: [{'dish': 'soup of the day'}]",
    ],
    "mounted_app": [
        "GET /entries: [{'from': 'phone', 'text': 'hello from the phone'}]",
        "POST /entries: 201",
        "on the phone: {'from': 'web', 'text': 'hello from the web'}",
    ],
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_runs_and_shows_its_point(name: str):
    done = run(name)
    assert (done.returncode, done.stderr) == (0, "")
    rest = done.stdout
    for line in EXPECTED[name]:
        assert line in rest, f"{line!r} is not in what is left:\n{rest}"
        rest = rest.split(line, 1)[1]


@pytest.mark.process
def test_the_todo_list_is_a_command_line_that_keeps_what_it_was_told(tmp_path: Path):
    home = str(tmp_path / "list")
    assert run("todo", home, "add", "water the plants").returncode == 0
    assert run("todo", home, "done", "1").stdout == "done: water the plants\n"
    assert run("todo", home, "show").stdout == "1. [x] water the plants\n"


@pytest.mark.process
def test_the_todo_list_says_what_is_wrong_with_a_command(tmp_path: Path):
    home = str(tmp_path / "list")
    assert "there is no task number 7" in run("todo", home, "drop", "7").stderr
    assert "todo.py LIST add" in run("todo", home, "fly").stderr
    unreachable = run("todo", home, "sync", "ftp://127.0.0.1")
    assert unreachable.returncode == 1
    assert unreachable.stderr.startswith("todo: ")
    assert "Traceback" not in unreachable.stderr

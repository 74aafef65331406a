"""``scripts/mutate`` on a tiny project with one test that looks and one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mutation.operators import mutants, mutated_code

ROOT = Path(__file__).resolve().parent.parent

CODE = '''
"""Two functions."""


def larger(a, b):
    """The larger of two numbers."""
    if a > b:
        return a
    return b


class Box:
    @property
    def full(self):
        while self.size < 3:
            self.size += 1
        return self.size
'''

TESTS = """
from tiny import Box, larger


def test_larger():
    assert larger(2, 1) == 2
    assert larger(1, 2) == 2


def test_box():
    box = Box()
    box.size = 0
    assert box.full == 3
"""

SETTINGS = """
tests = ["test_tiny.py"]

[targets.tiny]
path = "src/tiny.py"
functions = ["larger", "Box.f*"]
"""

BOUNDARY = "tiny:larger:boundary:1"


def mutate(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "mutate"), "--root", str(project)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [*command, "--out", str(project / "out.jsonl"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in (
        ("src/tiny.py", CODE),
        ("test_tiny.py", TESTS),
        ("scripts/mutants.toml", SETTINGS),
        ("pyproject.toml", "[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\n"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def outcomes(project: Path) -> dict[str, str]:
    lines = (project / "out.jsonl").read_text(encoding="utf-8").splitlines()
    return {found["id"]: found["outcome"] for found in map(json.loads, lines)}


@pytest.mark.slow
def test_a_mutant_survives_only_if_no_test_notices_it(project: Path) -> None:
    result = mutate(project)
    found = outcomes(project)
    assert result.returncode == 1, result.stderr
    assert {name for name, outcome in found.items() if outcome == "survived"} == {BOUNDARY}
    assert found["tiny:larger:always:1"] == found["tiny:Box.full:boundary:1"] == "killed"
    assert f"survived: {BOUNDARY} (line 7)\n    a > b -> a >= b" in result.stdout
    assert (project / "src" / "tiny.py").read_text(encoding="utf-8") == CODE


@pytest.mark.slow
def test_an_explained_survivor_is_no_failure_until_its_code_changes(project: Path) -> None:
    settings = project / "scripts" / "mutants.toml"
    explained = f'[explained."{BOUNDARY}"]\nchange = "a > b -> a >= b"\nbecause = "the same"\n'
    settings.write_text(SETTINGS + explained, encoding="utf-8")
    assert mutate(project, "--only", "tiny:larger", "tiny").returncode == 1
    assert mutate(project).returncode == 0
    report = mutate(project, "--report")
    assert report.returncode == 0
    assert "| 0 | 100.0 % |" in report.stdout

    source = project / "src" / "tiny.py"
    source.write_text(CODE.replace("a > b", "a - b > 0"), encoding="utf-8")
    report = mutate(project, "--report")
    assert report.returncode == 1
    assert f"explains nothing any more: {BOUNDARY}" in report.stdout
    assert "were not tried yet" in report.stdout


@pytest.mark.slow
def test_an_explanation_of_what_a_test_notices_is_needless(project: Path) -> None:
    explained = '[explained."tiny:larger:return:2"]\nchange = "return b -> return None"\n'
    settings = project / "scripts" / "mutants.toml"
    settings.write_text(f'{SETTINGS}{explained}because = "wrong"\n', encoding="utf-8")
    result = mutate(project, "--only", "larger:return")
    assert "explained, but a test notices it: tiny:larger:return:2" in result.stdout


@pytest.mark.slow
def test_tests_that_fail_without_a_mutant_are_no_ground_to_judge_one(project: Path) -> None:
    (project / "test_tiny.py").write_text("def test_it():\n    assert 0\n", encoding="utf-8")
    result = mutate(project)
    assert result.returncode == 1
    assert "without a mutant: killed test_tiny.py::test_it" in result.stdout
    assert not (project / "out.jsonl").exists()


# ---------------------------------------------------------------- operators


def changes(body: str) -> list[str]:
    """``operator: change`` of every mutant of a function."""
    return [
        f"{mutant.id.split(':')[2]}: {mutant.change}"
        for mutant in mutants(f"def f(x, y):\n    {body}\n", "m")
    ]


CASES = [
    ("return x < y", ["return: return x < y -> return None", "boundary: x < y -> x <= y"]),
    ("x += 1", ["remove: x += 1 -> nothing", "arithmetic: x += 1 -> x -= 1"]),
    ("return x is None", ["negate: x is None -> x is not None"]),
    ("return not x", ["unary: not x -> x"]),
    ("return x and y", ["andor: x and y -> x or y", "operand: x and y -> y"]),
    ("return min(x, y)", ["twin: min(x, y) -> max(x, y)"]),
    ("return g(x, y)", ["swap: g(x, y) -> g(y, x)"]),
    ("return x[1:]", ["slice: 1: -> :", "constant: 1 -> 2", "constant: 1 -> 0"]),
    ("return 'gone'", ["code: 'gone' -> 'gone_'"]),
    ("while x: y()", ["never: x -> False", "remove: y() -> nothing"]),
    ("return x if y else 1", ["always: y -> True", "never: y -> False"]),
    ("return [z for z in x if z]", ["always: z -> True", "never: z -> False"]),
]


@pytest.mark.parametrize(("body", "expected"), CASES)
def test_each_operator_makes_its_mutants(body: str, expected: list[str]) -> None:
    assert set(expected) <= set(changes(body))


def test_errors_texts_assertions_and_annotations_are_left_alone() -> None:
    assert changes("'''Text of 1 line.'''; assert x > 1; y: list[int]") == []
    assert changes("raise ValueError(f'{x + 1} is too much')") == [
        "remove: raise ValueError(f'{x + 1} is too much') -> nothing"
    ]


def test_an_id_does_not_depend_on_other_functions() -> None:
    alone = [mutant.id for mutant in mutants("def f(x):\n    return x > 1\n", "m")]
    among = mutants("def g(x):\n    return x > 2\n\ndef f(x):\n    return x > 1\n", "m")
    assert [mutant.id for mutant in among if mutant.function == "f"] == alone


def test_the_code_of_a_mutant_has_the_change_in_it() -> None:
    source = "class C:\n    def f(self, x):\n        return x > 1\n"
    [boundary] = [m for m in mutants(source, "m") if ":boundary:" in m.id]

    def f(self: object, x: int) -> bool:
        raise NotImplementedError

    assert boundary.id == "m:C.f:boundary:1"
    f.__code__ = mutated_code(source, "m.py", boundary)
    assert f(None, 1) and not f(None, 0)

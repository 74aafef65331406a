"""The demo holds what it promises, says so with its exit code, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import httpx2
import pytest

from entidb.cli import demo, demo_data
from entidb.cli.demo_story import DemoStory
from entidb.errors import ConfigError

ROOT = Path(__file__).parent.parent


def start(directory: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "entidb", "demo", *options],
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"}
        | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def assert_nothing_is_left(output: str, directory: Path) -> None:
    assert list(directory.iterdir()) == []
    processes = [int(number) for number in re.findall(r"process (\d+)", output)]
    assert processes
    for number in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.process
@pytest.mark.slow
def test_the_demo_ends_by_itself_with_everything_the_same_everywhere(tmp_path: Path):
    output, _ = start(tmp_path).communicate(timeout=300)
    assert "NOT SO" not in output
    assert output.count("   ok: ") > 15
    rows = re.findall(r"│ (server|Ada|Ben|Cleo) +│.*│ ([0-9a-f]{16}) │", output)
    assert [who for who, _ in rows] == ["server", "Ada", "Ben", "Cleo"]
    assert len({digest for _, digest in rows}) == 1
    assert "\x1b" not in output, "colour codes where there is no terminal"
    assert_nothing_is_left(output, tmp_path)


@pytest.mark.process
def test_the_second_scene_prints_address_and_token_and_ends_when_it_should(tmp_path: Path):
    process = start(tmp_path, "--console", "--seconds", "3")
    assert process.stdout is not None
    lines: list[str] = []
    found: dict[str, str] = {}
    for line in process.stdout:
        lines.append(line)
        found.update(re.findall(r"(console|token): (\S+)", line))
        if "token" in found:
            break
    url, token = found["console"], found["token"]
    assert httpx2.get(url).headers["content-type"].startswith("text/html")
    asked = url.replace("/console", "/v1/admin/devices")
    seen = httpx2.get(asked, headers={"authorization": f"Bearer {token}"}).json()
    assert {each["row"]["device"]["subject"] for each in seen["rows"]} == {"ada", "ben", "cleo"}
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in rest
    assert_nothing_is_left("".join(lines) + rest, tmp_path)


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_demo_that_is_stopped_stops_what_it_started(
    number: signal.Signals, code: int, tmp_path: Path
):
    process = start(tmp_path)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("2. "):
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in rest
    assert_nothing_is_left("".join(lines), tmp_path)


@pytest.mark.process
def test_a_demo_whose_server_dies_says_so_and_leaves_nothing(tmp_path: Path):
    process = start(tmp_path)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("3. "):
            (server,) = re.findall(r"server: process (\d+)", "".join(lines))
            os.kill(int(server), signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error[failed]: Ada could not sync" in rest
    assert_nothing_is_left("".join(lines), tmp_path)


def test_a_check_that_does_not_hold_makes_the_demo_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def untrue(story: DemoStory) -> list[str]:
        return ["everything is the same"]

    monkeypatch.setattr(demo, "tell", untrue)
    with pytest.raises(click.ClickException, match="everything is the same"):
        demo.demo_command.callback(console=False, seconds=0.0)  # type: ignore[misc]


def test_without_its_tables_the_demo_names_the_group_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="dev group") as raised:
        demo.demo_command.callback(console=False, seconds=0.0)  # type: ignore[misc]
    assert raised.value.code == "demo_data_missing"
    assert "\n" not in raised.value.message


def test_every_table_is_read_whole_and_names_each_row_once():
    sizes = {name: demo_data.load_table(name) for name in ("airports", "cars", "weather", "stocks")}
    assert {name: len(rows) for name, rows in sizes.items()} == {
        "airports": 3376,
        "cars": 406,
        "weather": 1461,
        "stocks": 560,
    }
    for rows in sizes.values():
        assert len({key for key, _ in rows}) == len(rows)


def test_reading_the_tables_does_not_load_pandas():
    code = (
        "import sys; from entidb.cli.demo_data import load_table; load_table('airports');"
        "print('pandas' in sys.modules, 'vega_datasets' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["False", "False"]

"""The benchmark beside other databases, without them: what is missing is said, and what is there
is measured.

No timing is looked at.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import __main__ as program
from benchmarks.peers import __main__ as peers
from benchmarks.world import World

HERE = Path(peers.__file__).parent


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that alone is searched for programs."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.process
def test_without_node_one_line_says_so_and_entidb_is_measured_alone(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # Nothing is timed here, so a temporary directory in memory will do.
    monkeypatch.setattr("benchmarks.world.check_on_disk", lambda path: None)
    monkeypatch.setattr(peers, "_WARM", 1)
    place = tmp_path / "bench"
    peers.main(["--json", "--n", "2", "--rounds", "1", "--dir", str(place)])
    output, errors = capsys.readouterr()
    told = "peers: node is not installed, so there are no figures of RxDB and PouchDB\n"
    assert errors == told
    figures = [json.loads(line) for line in output.splitlines()]
    assert [each["figure"] for each in figures] == ["EntiDB, p50", "EntiDB, p99"]
    assert all(each["value"] > 0 and each["target"] is None for each in figures)
    assert list(place.iterdir()) == []


def test_a_package_that_is_not_installed_is_named_with_what_installs_it(path: Path, tmp_path: Path):
    node = path / "node"
    node.touch(0o755)
    for name, package in peers.PACKAGES.items():
        said = peers.what_is_missing(tmp_path)
        assert said is not None and said.startswith(f"{name} is not installed")
        assert said.endswith("run  npm ci --prefix benchmarks/peers") and "\n" not in said
        installed = tmp_path / "node_modules" / package
        installed.mkdir(parents=True)
        (installed / "package.json").touch()
    assert peers.what_is_missing(tmp_path) is None


def test_entidb_is_compared_with_each_peer_round_by_round(monkeypatch: pytest.MonkeyPatch):
    took = {peers.ENTIDB: 4.0, "RxDB": 1.0, "PouchDB": 10.0}
    order: list[str] = []

    @contextlib.contextmanager
    def pair(world: World, name: str = peers.ENTIDB) -> Iterator[Any]:
        def milliseconds(count: int) -> list[float]:
            order.append(name)
            return [took[name]] * count

        yield SimpleNamespace(milliseconds=milliseconds)

    monkeypatch.setattr(peers, "_entidb", pair)
    monkeypatch.setattr(peers, "_peer", pair)
    found = {
        each.figure: each for each in peers.run(cast(World, None), 3, 2, tuple(peers.PACKAGES))
    }
    # Once to warm up, and then in turns.
    assert order == list(took) * 3
    beside = found["EntiDB beside RxDB, p50"]
    assert (beside.ratio, beside.target, beside.met) == (4.0, "<= 4 x floor", True)
    beside = found["EntiDB beside PouchDB, p50"]
    assert (beside.ratio, beside.target, beside.met) == (0.4, "<= 0.3 x floor", False)
    assert found["PouchDB, p99"].values == [10.0, 10.0]


def test_a_process_that_ends_is_told_of_with_what_it_wrote(tmp_path: Path):
    command = ["/bin/sh", "-c", "echo '{\"ready\": true}'; echo no such peer >&2"]
    with peers.Process(command, tmp_path / "log") as process:
        assert process.hears() == {"ready": True}
        with pytest.raises(RuntimeError, match="no such peer"):
            process.hears()


def test_it_is_no_part_of_the_other_benchmarks():
    assert "peers" not in program.NAMES


@pytest.mark.parametrize("name", ["package.json", "package-lock.json", ".npmrc"])
def test_what_npm_reads_names_no_registry(name: str):
    text = (HERE / name).read_text()
    assert "://" not in text and '"resolved"' not in text


def test_the_lock_holds_what_is_asked_for_with_its_checksums():
    asked = json.loads((HERE / "package.json").read_text())["dependencies"]
    lock = json.loads((HERE / "package-lock.json").read_text())["packages"]
    assert lock[""]["dependencies"] == asked and set(peers.PACKAGES.values()) <= set(asked)
    assert all(lock[f"node_modules/{name}"]["version"] == asked[name] for name in asked)
    assert all(each.get("integrity") for name, each in lock.items() if name)

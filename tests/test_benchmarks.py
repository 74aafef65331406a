"""Every benchmark runs, with sizes that take no time, and prints what it promises.

No timing is looked at: whether a target is met is for a quiet machine and a person.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import __main__ as program
from benchmarks import single, stores
from benchmarks.compare import Pair, main, measured, sources_of, table
from benchmarks.figures import Figure, Target, figure, percentile
from benchmarks.world import World
from tests.storage.postgres_cluster import MISSING
from tests.tools import program as program_of

pytestmark = [pytest.mark.process, pytest.mark.slow]

N = 40
#: Where what grows with N takes long, and what it shows is there with fewer.
FEWER = {"beside": 20}
#: How often things are done of which once is enough here.
TIMES = {
    "indexes.FIELDS": ("title",),
    "local.OPENS": 2,
    "nodes.DATABASES": 4,
    "queries.PAGES": 5,
}
ROOT = Path(__file__).parent.parent

#: What each benchmark has to say at least.
FIGURES = {
    "local": {"get", "get, sqlite3", "iterate", "change feed", "single commits", "open"},
    "threads": {"32 threads, the disk as it is", "32 threads, sqlite3"},
    "queries": {
        "scan for a range",
        "find one, typed",
        "build of an index",
        "longest stop of an event loop",
    },
    "indexes": {"push, server: an index of title", "first sync, rows of an image: no index"},
    "push": {"v7 ids", "random ids"},
    "pull": {"first sync", "device memory, own", "server memory, own"},
    "first": {"first sync", "first sync by pages", "bytes when killed at half"},
    "incremental": {"push 100 changes", "pull 100 changes", "push growth with size"},
    "idle": {"cycle with nothing to do"},
    "latency": {"p50", "p99"},
    "live": {
        "from a commit to another's observer: p99",
        "live devices of 50 databases, 50 changes/s: p99",
        "live devices of 1 database, 50 changes/s: p99",
        "2,000 waiting streams: idle",
        "400 devices, server stopped: all back",
        "400 devices, server killed: other answers than 200, 503",
    },
    "many": {"push, 1 database: requests", "pull, 50 databases: p99", "mixed, 1 database: p50"},
    "workers": {"pull, 50 databases: requests", "push, 1 database: load generator"},
    "nodes": {
        "pull, 4 databases, each database to one node",
        "push, 4 databases, to any node",
        "push, 4 databases: all processors, each request",
    },
    "beside": {
        "from a commit to another's observer: p99",
        "from a commit to another's observer, after a rest: p50",
        "an idle observer",
        "takeover of a killed program's engine",
    },
    "noisy": {"quiet databases beside a flooded one: p99"},
    "operations": {
        "pushes of 50 devices during a backup: p99",
        "a device is locked out of 2 workers",
        "one difference among 4: found in",
        "noting a push's device",
    },
    "console": {"first view", "first view, answers", "longest task"},
    "conflicts": {"pull and rebase", "whole cycle, with the push"},
    "size": {"server after load", "push on the wire, zstd"},
    "standing": {"memory of an open database", "disk of a device that is known"},
    "stalled": {"until all are dropped"},
}
#: What is counted, or too little to be seen.
MAY_BE_NOTHING = {
    "2,000 waiting streams: idle",
    "longest task",
    "400 devices, server stopped: other answers than 200, 503",
    "400 devices, server killed: other answers than 200, 503",
}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # Nothing is timed here, so a temporary directory in memory will do.
    monkeypatch.setattr("benchmarks.world.check_on_disk", lambda path: None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user.
        world = World(Path(folder) / "bench")
        yield world
        world.close()


def test_every_benchmark_is_in_the_table_of_figures():
    assert set(FIGURES) == set(program.NAMES)


@pytest.mark.parametrize("name", program.NAMES)
def test_a_benchmark_prints_one_json_line_for_each_figure(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch
):
    if name == "console":
        program_of("chromium"), program_of("chromedriver")
    if name == "nodes" and MISSING is not None:
        pytest.skip(MISSING)
    for place, times in TIMES.items():
        monkeypatch.setattr(f"benchmarks.{place}", times)
    size = FEWER.get(name, N)
    lines = [item.to_json() for item in single.run(name, world, [size], 1)]
    figures = [json.loads(line) for line in lines]
    assert not any("\n" in line for line in lines)
    assert {item["figure"] for item in figures} >= FIGURES[name]
    for item in figures:
        check_shape(item, name, size)


def check_shape(item: dict[str, object], name: str, size: int) -> None:
    assert item["benchmark"] == name and item["n"] == size and item["unit"]
    assert isinstance(item["value"], int | float)
    assert item["value"] > 0 or (item["figure"] in MAY_BE_NOTHING and item["value"] == 0)
    assert isinstance(item["values"], list) and len(item["values"]) == item["rounds"]
    with_floor = item["floor"] is not None
    assert with_floor == bool(item["floor_is"]) == (item["ratio"] is not None)
    assert (item["target"] is None) == (item["met"] is None)
    assert with_floor or "floor" not in str(item["target"])


def test_the_command_prints_json_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.world.check_on_disk", lambda path: None)
    program.main(["idle", "--json", "--n", "5", "--rounds", "1", "--dir", str(tmp_path)])
    output, errors = capsys.readouterr()
    assert [json.loads(line)["benchmark"] for line in output.splitlines()] == ["idle"]
    assert errors == "" and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_store_in_postgresql_is_measured_beside_files_and_beside_postgresql_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("benchmarks.world.check_on_disk", lambda path: None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        world = World(Path(folder))
        world.closing(stores.begin(world))
        found = {each.figure: each for each in stores.run("push", world, [N], 1)}
        world.close()
    assert found["v7 ids, in PostgreSQL"].floor_is == stores.EMBEDDED
    assert "raw PostgreSQL, one commit of 1,000 entities" in found
    assert world.new_address is None


def test_what_is_compared_with_no_server_at_all_is_a_rate_where_stores_are_compared(
    monkeypatch: pytest.MonkeyPatch,
):
    def measured(name: str, *_: object) -> list[Figure]:
        names = ["push: requests", "push: against bare", "pull: against bare"]
        return [figure(name, each, N, "requests/s", [2.0]) for each in names]

    monkeypatch.setattr(single, "run", measured)
    monkeypatch.setattr(stores, "_raw_ms", lambda world, size: 1.0)
    found = [each.figure for each in stores.run("many", cast(World, SimpleNamespace()), [N], 1)]
    assert found[:-1] == ["push: requests, in PostgreSQL", "pull: requests, in PostgreSQL"]


def test_the_command_refuses_a_name_it_does_not_know(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        program.main(["pusch"])
    assert "pusch is none of local, " in capsys.readouterr().err


def test_figures_are_medians_and_the_ratio_is_that_of_each_round():
    item = figure("b", "f", 1, "/s", [10.0, 40.0, 30.0], floors=[20.0, 40.0, 40.0], floor_is="it")
    assert (item.value, item.floor, item.ratio) == (30.0, 40.0, 0.75)
    assert item.rounds == 3 and item.met is None


@pytest.mark.parametrize(
    ("target", "value", "ratio", "met"),
    [
        (Target("ratio", least=0.5), 9.0, 0.5, True),
        (Target("ratio", least=0.5), 9.0, 0.49, False),
        (Target("ratio", most=2.0), 9.0, 2.1, False),
        (Target("value", most=12.0), 12.0, None, True),
        (Target("value", most=12.0), 12.1, None, False),
    ],
)
def test_a_target_is_met_up_to_and_with_its_bound(
    target: Target, value: float, ratio: float | None, met: bool
):
    assert target.met(value, ratio) is met


def test_a_percentile_is_one_of_the_values_measured():
    values = [float(number) for number in range(1, 201)]
    assert percentile(values, 0.5) == 100.0
    assert percentile(values, 0.99) == 198.0
    assert percentile([7.0], 0.99) == 7.0


def test_two_versions_are_measured_in_turn_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measured(source: Path, name: str, size: int | None, directory: Path) -> Any:
        asked.append("new" if source.is_relative_to(ROOT) else "old")
        return {(name, "rate", 5): (50.0 if asked[-1] == "new" else 100.0, "entities/s")}

    monkeypatch.setattr("benchmarks.compare.measured", measured)
    (tmp_path / "checkout" / "src" / "entidb").mkdir(parents=True)
    main([str(tmp_path / "checkout"), "push:5", "--rounds", "2", "--dir", str(tmp_path)])
    assert asked == ["new", "old", "old", "new"]
    assert "| 100 entities/s | 50 entities/s | 2.00 (2.00 to 2.00) | 2 |" in capsys.readouterr().out


def test_a_benchmark_runs_on_the_sources_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "src"
    (source / "entidb").mkdir(parents=True)
    (source / "entidb" / "__init__.py").write_text("raise SystemExit('these sources')")
    assert measured(source, "idle", N, tmp_path) == {}
    assert capsys.readouterr().err == f"idle failed on {source}: these sources\n"


def test_the_sources_of_a_revision_are_unpacked_and_removed(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git history here: there is no revision to unpack")
    with sources_of("HEAD", tmp_path) as source:
        assert (source / "entidb" / "version.py").is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_takes_longer_is_above_one_for_rates_and_for_times() -> None:
    assert Pair(100, 50, "entities/s").times == Pair(100, 50, "transactions/CPU s").times == 2
    assert Pair(100, 50, "ms").times == Pair(100, 50, "MB").times == 0.5
    assert table({("push", "rate", 5): [Pair(1, 2, "ms"), Pair(1, 3, "ms")]}).count("2.50") == 1

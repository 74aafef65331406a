"""The simulator on the code as it is: many seeds, the same trace anywhere, and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import ConfigError
from entidb.server.front import Front
from entidb.server.group_commit import GroupCommitter
from entidb.server.stores import Store, Stores
from entidb.sync import Conflict, ConflictResolution, SyncEngine
from entidb.sync.attempts import Attempts
from entidb.sync.drive import Drive
from entidb.testing import knobs as knob
from entidb.testing.__main__ import main
from entidb.testing.batch import run_seeds, shrink
from entidb.testing.invariants import INVARIANTS
from entidb.testing.simulator import Options, simulate
from entidb.testing.watch.decisions import decisions_of
from tests.planted import BUGS, planted

SEEDS = int(os.environ.get("ENTIDB_SIMULATOR_SEEDS", "1000"))
#: So many tests share the seeds, so that several processes can be busy with them.
PARTS = 10
CALM = {"events": 150, "devices": 2, "keys": 5, "lmdb": 0}
#: The simulator has no copy of these.
RUN_BY_SEEDS: dict[type, tuple[str, ...]] = {
    SyncEngine: ("course", "cancel", "reset", "resolve", "_check_cancelled", "_enter"),
    Attempts: ("run", "_begin", "_forget", "_pause"),
    Drive: ("go_on",),
    Front: ("authenticate", "decode", "permit", "use", "read", "push", "explain"),
    Stores: ("use", "release", "_open", "_drop_broken", "housekeep", "_close"),
    Store: ("report", "close"),
    GroupCommitter: ("submit", "_take", "_commit", "stop"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_invariant_fails_and_every_fault_fires(part: int, together: Path):
    seeds = range(SEEDS)[part::PARTS]
    summary = run_seeds(seeds)
    failed = [f"seed {run.seed} {run.invariant}: {run.message}" for run in summary.failures]
    tell(together / f"{part}.json", {"seeds": summary.seeds, "faults": summary.faults})
    assert not failed
    assert summary.seeds == len(seeds)
    # Which part is the last one nobody knows before: it looks at all of them.
    told = [json.loads(file.read_text()) for file in together.glob("*.json")]
    if len(told) < PARTS:
        return
    assert sum(each["seeds"] for each in told) == SEEDS
    assert not rare_faults([each["faults"] for each in told])


def rare_faults(parts: list[dict[str, int]]) -> list[str]:
    """Faults that fired too seldom in all parts together, if that is seeds enough to tell."""
    fired = sum(map(Counter, parts), Counter[str]())
    rare = [name for name in knob.FAULTS if fired[name] < 8 * SEEDS // 1000]
    return rare if SEEDS >= 1000 else []


def test_a_fault_that_fires_too_seldom_in_all_parts_together_is_named(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("tests.testing.test_simulator.SEEDS", 1000)
    parts = [dict.fromkeys(knob.FAULTS, 4), dict.fromkeys(knob.FAULTS, 4)]
    assert rare_faults(parts) == []
    parts[0]["lost"] = 3
    assert rare_faults(parts) == ["lost"]


def test_several_processes_give_what_one_gives():
    one, two = run_seeds(range(21), settings=CALM), run_seeds(range(21), jobs=2, settings=CALM)
    assert (one.seeds, one.line()) == (21, two.line())
    assert (one.faults, one.checks) == (two.faults, two.checks)


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for all processes of this run of pytest, and for no other run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "simulator"
    folder.mkdir(exist_ok=True)
    return folder


def tell(path: Path, what: object) -> None:
    """Whoever sees the file sees all of it."""
    being_written = path.with_suffix(".new")
    being_written.write_text(json.dumps(what))
    being_written.rename(path)


def test_every_invariant_is_checked_by_ordinary_runs():
    summary = run_seeds(range(60))
    unchecked = {name for name in INVARIANTS if not summary.checks[name]}
    # SAME-SEED compares whole runs, below; floors that move while a device is on its way with an
    # image are rare.
    assert unchecked <= {"SAME-SEED", "PINNED"}
    images = run_seeds(range(30), settings={"images": 2, "purge": 80})
    assert images.checks["PINNED"]
    assert not images.failures


def test_a_few_seeds_run_what_ships_of_the_engine_and_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
):
    calls: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            calls[f"{owner.__name__}.{name}"] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    for owner, names in RUN_BY_SEEDS.items():
        for name in names:
            count(owner, name)
    for seed in range(8):
        assert simulate(seed).invariant is None
    for seed in (3, 4, 7):
        settings = {"server_disk_full": 300, "attempts": 3, "events": 600, "lmdb": 0}
        settings |= {"group_ms": 0, "server_crash_after": 0, "put_back": 0, "restore_server": 0}
        assert simulate(seed, Options(settings)).invariant is None
    expected = {
        f"{owner.__name__}.{name}" for owner, names in RUN_BY_SEEDS.items() for name in names
    }
    assert expected == set(calls)


@pytest.mark.parametrize("seed", [3, 17, 42])
def test_one_seed_gives_one_trace_in_another_process_with_another_hash_seed(seed: int):
    script = (
        "from entidb.testing.simulator import simulate\n"
        f"run = simulate({seed})\n"
        "print(run.digest, run.events)"
    )
    here = simulate(seed)
    source = Path(__file__).parents[2] / "src"
    for hash_seed in ("1", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(source)}
        there = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.split() == [here.digest, str(here.events)]


def test_a_run_on_lmdb_holds_the_same_invariants():
    run = simulate(5, Options(CALM | {"lmdb": 1, "crash_after": 20, "commit_unknown": 20}))
    assert run.invariant is None, run.message
    assert run.faults["lmdb"]


def test_a_store_on_lmdb_comes_back_after_a_commit_that_closed_it():
    run = simulate(0, Options(CALM | {"lmdb": 1, "commit_unknown": 200}))
    assert run.invariant is None, run.message
    assert run.faults["commit_unknown"]


def test_knobs_can_be_fixed_and_unknown_ones_are_refused():
    settings = knob.parse(["devices=5", "lost=0"])
    assert settings == {"devices": 5, "lost": 0}
    assert simulate(1, Options(settings | CALM | {"devices": 5})).knobs.devices == 5
    with pytest.raises(ConfigError):
        knob.parse(["devices"])
    with pytest.raises(ConfigError):
        knob.override(knob.Knobs(), {"no_such_knob": 1})


def test_a_failing_run_is_made_smaller_and_still_fails_the_same():
    with planted(BUGS["withdrawn-not-listed"]):
        before = next(run for run in map(simulate, range(20)) if run.invariant == "NO-SILENT-LOSS")
        small = shrink(before.seed, {})
    assert small is not None
    settings, run = small
    assert run.invariant == "NO-SILENT-LOSS"
    assert run.events < before.events
    assert run.knobs == knob.override(before.knobs, settings)


def test_the_command_prints_one_summary_line_and_fails_with_the_seed(capsys):
    knobs = [part for name, value in CALM.items() for part in ("--knob", f"{name}={value}")]
    assert main(["--seeds", "0:3", *knobs]) == 0
    assert "seeds=3 events=" in capsys.readouterr().out
    with planted(BUGS["base-version-ignored"]):
        assert main(["--seeds", "0:6", *knobs]) == 1
    printed = capsys.readouterr().out
    assert "FAILED seed=" in printed
    assert "replay: python -m entidb.testing --seed" in printed


def test_a_replay_tells_its_story_and_its_trace(capsys):
    knobs = [part for name, value in CALM.items() for part in ("--knob", f"{name}={value}")]
    assert main(["--seed", "2", "--trace", *knobs]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("seed 2\n")
    assert " commit d" in printed
    assert "the faults stop" in printed


def test_each_decision_of_a_commit_counts_and_the_question_that_begins_it_does_not():
    merged = ConflictResolution.merge({})
    newest, oldest = _asked(local=9), _asked(local=7)
    step = _asked(base=(3, 7), remote=(3, 7), local=9)
    # The server has another version by then, or the oldest write of the chain has left it.
    later = _asked(base=(3, 1), remote=(5, 2), local=9)
    shorter = _asked(base=(3, 7), remote=(3, 1), local=9, first=b"second")
    one, two = [(newest, merged), (oldest, merged), (step, merged)], [(later, merged)]
    assert decisions_of(one + two) == [one, two]
    assert decisions_of([*one, (shorter, merged)]) == [one, [(shorter, merged)]]
    # What is asked again after a withdrawal belongs to the same decision.
    again = (_asked(local=8), merged)
    assert decisions_of([*one, again]) == [[*one, again]]
    assert decisions_of([*one, (step, ConflictResolution.skip()), *two]) == [two]


def _asked(
    *,
    local: int,
    base: tuple[int, int] = (2, 1),
    remote: tuple[int, int] = (3, 1),
    first: bytes = b"first",
) -> Conflict:
    """A question about a chain that begins with ``first``; marks are version and time."""
    return Conflict(
        collection="notes",
        id_bytes=bytes(16),
        base_payload=b"base",
        local_payload=b"local",
        remote_payload=b"remote",
        base_version=base[0],
        remote_version=remote[0],
        base_device=bytes(16),
        local_device=bytes(16),
        remote_device=bytes(16),
        base_timestamp=base[1],
        local_timestamp=local,
        remote_timestamp=remote[1],
        transaction_id=first,
    )

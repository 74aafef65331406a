"""An acknowledged commit is on disk: it survives losing everything that was not synced.

Killing a process cannot show that, because the kernel keeps what the process has written. Here a
shim records every write and every sync of a process that commits, and a model of a disk turns the
record into files as a power cut may leave them, at every moment of the run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import entidb
from entidb.db import Database
from entidb.db.outbox import read_pending
from entidb.db.records import accepted_key
from entidb.errors import EntiDBError
from entidb.storage.lmdb.pages import closed_file_faults
from tests.powerloss.journal import SYNC, WRITE, Disk, Event, read_events
from tests.powerloss.worker import COMMITS, parts, shared, transaction_id

HERE = Path(__file__).parent
SEED = int(os.environ.get("ENTIDB_POWERLOSS_SEED", "7"))
#: Images for each moment between two calls.
IMAGES = int(os.environ.get("ENTIDB_POWERLOSS_IMAGES", "1"))
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="the shim is written for Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler to make the shim with (cc, or CC)"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shim") / "record_io.so"
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [*command, "-o", str(made), str(HERE / "record_io.c"), "-ldl", "-lpthread"], check=True
    )
    return made


def record(shim: Path, tmp_path: Path, role: str, how: str) -> list[Event]:
    """What a process of that role did to its files, with its acknowledgements among it."""
    root, log = tmp_path / "root", tmp_path / "log"
    root.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(entidb.__file__).parents[1]),
        "LD_PRELOAD": str(shim),
        "POWERLOSS_ROOT": str(root),
        "POWERLOSS_LOG": str(log),
    }
    if how in ("failing", "unsettled"):
        environment["POWERLOSS_FAIL_HEADERS"] = "4"
    subprocess.run(
        [sys.executable, "-m", "tests.powerloss.worker", str(root), role, how],
        cwd=HERE.parents[1], env=environment, check=True,
    )  # fmt: skip
    return read_events(log, root)


@dataclass
class Moment:
    """Files as they may be found, and what had been acknowledged by then."""

    files: dict[str, bytes]
    commits: int
    backups: dict[int, int]


def moments(events: list[Event], seed: str) -> Iterator[Moment]:
    source = random.Random(f"{SEED} {seed}")
    disk, commits, backups = Disk(), 0, dict[int, int]()
    created = False
    for event, following in zip(events, [*events[1:], None], strict=True):
        if event.path == "acknowledged":
            line = json.loads(event.data)
            commits = line["commit"]
            if "backup" in line:
                backups[line["backup"]] = commits
        else:
            disk.happen(event)
        created = created or commits > 0
        if created:
            for _ in range(IMAGES):
                yield Moment(disk.crash(following, source), commits, dict(backups))


def losses(moment: Moment, directory: Path) -> list[str]:
    """What is wrong with the files of this moment; empty if every promise was kept."""
    if directory.exists():
        shutil.rmtree(directory)
    for name, content in moment.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = _check(directory / "db", moment.commits)
    for number, commits in moment.backups.items():
        where = directory / f"backup-{number}"
        found += [f"backup {number}: {line}" for line in _check(where, commits)]
    return found


def _check(path: Path, acknowledged: int) -> list[str]:
    if not (path / "data.mdb").exists():
        return ["there is no database"]
    # First without mapping it: an image that is damaged must not end this process.
    faults = closed_file_faults(str(path / "data.mdb"))
    if faults:
        return faults
    try:
        with Database.open(path, create=False, map_bytes=1 << 24) as database:
            return [*database.verify(), *_missing(database, acknowledged)]
    except EntiDBError as error:
        return [f"{type(error).__name__}: {error}"]


def _missing(database: Database, acknowledged: int) -> Iterator[str]:
    """Commits that are not there though they were acknowledged, or that are there in part."""
    notes = database.collection("notes")
    newest = notes.get(uuid.UUID(int=0), {"newest": 0})["newest"]
    if newest < acknowledged:
        yield f"commit {newest} is the newest, {acknowledged} was acknowledged"
    if len(notes) != (len(parts(1)) * newest + 1 if newest else 0):
        yield f"{len(notes)} entities at commit {newest}"
    for number in range(1, newest + 1):
        if any(notes.get(each) != content for each, content in parts(number).items()):
            yield f"commit {number} is not whole"
    if newest and notes[uuid.UUID(int=0)] != shared(newest):
        yield "the shared entity is of no commit"
    yield from _not_remembered(database, newest)


def _not_remembered(database: Database, newest: int) -> Iterator[str]:
    """Beside its entities a commit has its row in the outbox, or its id on the server (R1, R12)."""
    with database.storage.snapshot() as snapshot:
        if database.history is None:
            pending = [entry.sequence for entry in read_pending(snapshot)]
            if pending != list(range(1, newest + 1)):
                yield f"the outbox holds {pending}"
            return
        for number in range(1, newest + 1):
            if snapshot.get(accepted_key(transaction_id(number))) is None:
                yield f"transaction {number} is not remembered"


@pytest.mark.parametrize("role", ["device", "server"])
def test_an_acknowledged_commit_survives_losing_what_was_not_synced(
    shim: Path, tmp_path: Path, role: str
) -> None:
    events = record(shim, tmp_path, role, "safe")
    data = [event for event in events if event.path.endswith("data.mdb")]
    # The shim really sits between LMDB and the disk: each commit writes, syncs, and writes a
    # header through a descriptor that syncs by itself.
    assert sum(event.kind == SYNC for event in data) >= COMMITS
    assert sum(event.kind == WRITE and event.durable for event in data) >= COMMITS
    assert sum(event.kind == WRITE and not event.durable for event in data) >= 2 * COMMITS
    tried = newest = 0
    for moment in moments(events, role):
        assert losses(moment, tmp_path / "image") == [], f"seed {SEED}, moment {tried}"
        tried, newest = tried + 1, moment.commits
    assert tried > 4 * COMMITS and newest == COMMITS


@pytest.mark.parametrize("role", ["device", "server"])
def test_without_syncs_acknowledged_commits_would_be_lost(
    shim: Path, tmp_path: Path, role: str
) -> None:
    events = record(shim, tmp_path, role, "unsynced")
    found = [losses(moment, tmp_path / "image") for moment in moments(events, role)]
    assert any("was acknowledged" in line for lines in found for line in lines)


def test_without_syncing_directories_a_compaction_would_lose_commits(
    shim: Path, tmp_path: Path
) -> None:
    events = record(shim, tmp_path, "device", "unnamed")
    found = [losses(moment, tmp_path / "image") for moment in moments(events, "device")]
    # Not only the whole database: an old file under the name of the compacted one.
    assert any("was acknowledged" in line for lines in found for line in lines)


def test_a_header_that_was_written_and_said_it_was_not_does_no_harm(
    shim: Path, tmp_path: Path
) -> None:
    events = record(shim, tmp_path, "device", "failing")
    tried = newest = 0
    for moment in moments(events, "failing"):
        assert losses(moment, tmp_path / "image") == [], f"seed {SEED}, moment {tried}"
        tried, newest = tried + 1, moment.commits
    assert newest == COMMITS


def test_without_a_sync_after_a_failed_commit_half_a_transaction_would_be_found(
    shim: Path, tmp_path: Path
) -> None:
    events = record(shim, tmp_path, "device", "unsettled")
    assert any(losses(moment, tmp_path / "image") for moment in moments(events, "unsettled"))

"""An EntiDB device in a process of its own, with its engine in the background.

Arguments: ``one`` (commits) or ``other`` (observes), directory, URL, file with the token. It speaks
as ``lines.mjs`` does.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from benchmarks.payloads import COLLECTION
from entidb.db import CommitEvent, Database
from entidb.sync import SyncConfig, SyncEngine

_START_S = 30.0


def main(role: str, directory: str, url: str, token_file: str) -> None:
    token = Path(token_file).read_text()
    with (
        Database.open(directory) as database,
        SyncEngine(SyncConfig(db_id="peers"), url, database, token=token) as engine,
    ):
        if role == "other":
            database.observe(_seen)
        synced = threading.Event()
        engine.on_result(lambda result: synced.set())
        engine.start()
        deadline = time.monotonic() + _START_S
        while not (synced.is_set() and engine.status().live == "live"):
            if time.monotonic() > deadline:
                raise SystemExit(f"the device is not live: {engine.status()}")
            time.sleep(0.01)
        _say({"ready": True})
        notes = database.collection(COLLECTION)
        # Until the driver is gone.
        for line in sys.stdin:
            change = json.loads(line)
            at = time.monotonic_ns()
            notes[uuid.UUID(change["id"])] = change["value"]
            _say({"id": change["id"], "at": at})


def _seen(event: CommitEvent) -> None:
    at = time.monotonic_ns()
    for change in event.events:
        if change.entity_id is not None:
            _say({"id": str(change.entity_id), "at": at})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])

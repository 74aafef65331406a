"""A device in a process of its own, whose engine runs in the background.

Arguments: URL, database name, directory, file with the token. Prints ``live`` as soon as the server
tells it of news and nothing is pending. Then, after each line that it reads:

    load N      commits N entities, and prints ``live`` again when they are pushed
    commit N    commits N entities one by one, with pauses, and prints when, by id
    seen        prints when its observer was called with which entities of others, by id

Times are those of the system's monotonic clock, which is the same in all processes.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.payloads import COLLECTION, entities, value
from benchmarks.world import load
from entidb.db import Collection, Database
from entidb.db.observers import CommitEvent
from entidb.sync import SyncConfig, SyncEngine

#: Seconds between two commits: a server tells the same device at most every fiftieth of a second,
#: and what waits for that is no longer one change.
PAUSE_S = (0.06, 0.07)


def main(url: str, db_id: str, path: str, token_file: str) -> None:
    token = Path(token_file).read_text()
    config = SyncConfig(db_id=db_id)
    seen: dict[str, float] = {}

    def observer(commit: CommitEvent) -> None:
        now = time.monotonic()
        for event in commit.events:
            if event.origin == "remote":
                seen[str(event.entity_id)] = now

    with Database.open(path) as database, SyncEngine(config, url, database, token=token) as engine:
        database.observe(observer)
        engine.start()
        _say_live(database, engine)
        for line in sys.stdin:
            word, _, number = line.partition(" ")
            if word == "load":
                load(database, entities(int(number)))
                _say_live(database, engine)
            elif word == "commit":
                print(json.dumps(_commit(database, int(number))), flush=True)
            else:
                print(json.dumps(seen), flush=True)


def _say_live(database: Database, engine: SyncEngine) -> None:
    engine.wake()
    while engine.status().live != "live" or engine.status().pending:
        time.sleep(0.01)
    print("live", flush=True)


def _commit(database: Database, count: int) -> dict[str, float]:
    notes: Collection[Any] = database.collection(COLLECTION)
    began = {}
    for number in range(count):
        time.sleep(random.uniform(*PAUSE_S))
        now = time.monotonic()
        began[str(notes.add(value(number)))] = now
    return began


if __name__ == "__main__":
    main(*sys.argv[1:5])

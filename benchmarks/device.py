"""A device in a process of its own, for figures of memory: syncs once and prints what it took.

Arguments: URL, database name, directory, file with the token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.figures import timed
from benchmarks.payloads import COLLECTION
from entidb.db import Database
from entidb.sync import SyncConfig, SyncEngine


def main(url: str, db_id: str, path: str, token_file: str) -> None:
    token = Path(token_file).read_text()
    with (
        Database.open(path) as database,
        SyncEngine(SyncConfig(db_id=db_id), url, database, token=token) as engine,
    ):
        seconds = timed(engine.sync)
        print(json.dumps({"seconds": seconds, "entities": len(database.collection(COLLECTION))}))


if __name__ == "__main__":
    main(*sys.argv[1:5])

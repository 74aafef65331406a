"""A device in a process of its own, for figures of memory: syncs once and prints what it took.

Arguments: URL, database name, directory, file with the token, and whether it comes in ``segments``
or ``pages``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import timed
from benchmarks.payloads import COLLECTION
from entidb.db import Database
from entidb.sync import SyncConfig, SyncEngine


def main(url: str, db_id: str, path: str, token_file: str, how: str = "segments") -> None:
    token = Path(token_file).read_text()
    # Older versions, which are compared with this one, do not know of segments.
    settings: dict[str, Any] = {} if how == "segments" else {"segments": False}
    with (
        Database.open(path) as database,
        SyncEngine(SyncConfig(db_id=db_id, **settings), url, database, token=token) as engine,
    ):
        seconds = timed(engine.sync)
        print(json.dumps({"seconds": seconds, "entities": len(database.collection(COLLECTION))}))


if __name__ == "__main__":
    main(*sys.argv[1:6])

"""One device, told by lines of JSON what to do. Runs with whatever version of EntiDB is found.

    {"do": "open", "path": …, "url": …, "policy": …}     answers {"device": …}
    {"do": "write", "writes": [[collection, id number, value or null], …]}
    {"do": "sync"}       answers what the cycle says, or {"error": code}
    {"do": "read"}       answers every entity: {collection: {id number: value}}
    {"do": "care"}       answers the faults that verify finds
    {"do": "close"}

Only names that 0.3.1 has may be used here.
"""

from __future__ import annotations

import json
import sys
import uuid
from typing import Any

from entidb import Database, RetryConfig, SyncConfig, SyncEngine, SyncError
from entidb.version import VERSION


class Peer:
    database: Database
    engine: SyncEngine

    def open(
        self,
        path: str,
        url: str = "",
        policy: str = "server_wins",
        token: str | None = None,
        **more: Any,
    ) -> Any:
        self.database = Database.open(path)
        if url:
            config = SyncConfig(
                db_id="shop", default_policy=policy, retry=RetryConfig.none(), **more
            )
            self.engine = SyncEngine(config, url, self.database, token=token)
        return {"version": VERSION}

    def write(self, writes: list[Any]) -> Any:
        with self.database.transaction() as tx:
            for name, number, value in writes:
                if value is None:
                    del tx.collection(name)[uuid.UUID(int=number)]
                else:
                    tx.collection(name)[uuid.UUID(int=number)] = value
        return {}

    def sync(self) -> Any:
        try:
            result = self.engine.sync()
        except SyncError as error:
            return {"error": error.code}
        status = self.engine.status()
        codes = [entry.code for entry in self.engine.discarded()]
        return {"discarded": codes, **self._counts(result, status)}

    def _counts(self, result: Any, status: Any) -> dict[str, Any]:
        return {"pulled": result.pulled, "pushed": result.pushed, "pending": status.pending}

    def read(self) -> Any:
        with self.database.snapshot() as snapshot:
            names = snapshot.collections()
            found = {n: {i.int: v for i, v in snapshot.collection(n).items()} for n in names}
        return {name: rows for name, rows in found.items() if rows}

    def care(self) -> Any:
        return list(self.database.verify())

    def close(self) -> Any:
        if hasattr(self, "engine"):
            self.engine.close()
        self.database.close()
        return {}


def main() -> None:
    peer = Peer()
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(peer, order.pop("do"))(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

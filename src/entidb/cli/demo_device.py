"""One device of the demo, in a process of its own: a database, an engine, and a line protocol.

Its parent writes one JSON command a line to its standard input and reads one JSON answer a line
from its standard output. The process ends when its input does, so it never outlives its parent.
``demo`` says what is done in which order, and what it means.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from entidb import cbor
from entidb.cli.demo_data import entity_id, load_table
from entidb.db import Database, DiscardedTransaction, dump
from entidb.errors import EntiDBError
from entidb.sync import (
    Conflict,
    HttpClient,
    HttpResponse,
    HttpTransport,
    HttpxClient,
    Merge,
    RetryConfig,
    SyncConfig,
    SyncCycleResult,
    SyncEngine,
)

DB_ID = "field-office"
#: Small on purpose: the tables are to need several batches, so that one can be cut in half.
PUSH_OPERATIONS_MAX = 100

Answer = dict[str, Any]


class SwitchedClient:
    """An ``HttpClient`` with a plug: while ``online`` is false every request fails as it does
    without a network. ``hold_push`` keeps the answer to that push from reaching the engine."""

    def __init__(self, inner: HttpClient, hold: TextIO, report: TextIO) -> None:
        self.online = True
        self.hold_push = 0
        self._inner = inner
        self._hold = hold
        self._report = report

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        if not self.online:
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        response = self._inner.request(method, url, headers, body, timeout_s)
        if self.hold_push and url.endswith("/v1/push"):
            self.hold_push -= 1
            if not self.hold_push:
                self._wait_for_the_end()
        return response

    def close(self) -> None:
        self._inner.close()

    def _wait_for_the_end(self) -> None:
        """The server has answered; this process will be killed before it reads the answer."""
        say(self._report, {"held": True})
        self._hold.read()
        raise SystemExit("the demo ended while an answer was being held back")


class DemoDevice:
    """What the commands do. Each method is one command; its answer is what it returns."""

    def __init__(self, settings: dict[str, Any], commands: TextIO, answers: TextIO) -> None:
        config = SyncConfig(
            db_id=DB_ID,
            client="entidb-demo",
            push_operations_max=PUSH_OPERATIONS_MAX,
            policies={
                "airports": Merge("server_wins", counters=("visits",), sets=("tags",)),
                "cars": "server_wins",
                "weather": "last_write_wins",
                "notes": "manual",
            },
            retry=RetryConfig.none(),
        )
        self._client = SwitchedClient(HttpxClient(config), commands, answers)
        transport = HttpTransport(
            settings["url"], token=settings["token"], client=self._client, config=config
        )
        self._db = Database.open(settings["path"])
        self._engine = SyncEngine(config, transport, self._db)

    def close(self) -> None:
        self._engine.close()
        self._db.close()

    def load(self, table: str, rows: int) -> Answer:
        """Load ``table``, ``rows`` of it in each transaction."""
        everything = load_table(table)
        committed = []
        for start in range(0, len(everything), rows):
            with self._db.transaction() as tx:
                collection = tx.collection(table)
                for key, value in everything[start : start + rows]:
                    collection[entity_id(table, key)] = value
            committed.append(tx.transaction_id.hex())
        return {"committed": committed, "entities": len(everything)}

    def edit(self, changes: list[dict[str, Any]]) -> Answer:
        """One transaction over all of ``changes``."""
        with self._db.transaction() as tx:
            for change in changes:
                where = tx.collection(change["in"])
                key = entity_id(change["in"], change["key"])
                if change.get("delete"):
                    del where[key]
                    continue
                value = where.get(key, {})
                value.update(change.get("set", {}))
                for field, by in change.get("add", {}).items():
                    value[field] = value.get(field, 0) + by
                for tag in change.get("tags", ()):
                    value["tags"] = [*value.get("tags", ()), tag]
                where[key] = value
        return {"committed": [tx.transaction_id.hex()]}

    def network(self, online: bool) -> Answer:
        self._client.online = online
        return {}

    def sync(self, hold_push: int = 0) -> Answer:
        """One cycle. With ``hold_push``, the engine never gets the answer to that push."""
        self._client.hold_push = hold_push
        return _result(self._engine.sync(), self._engine.discarded())

    def status(self) -> Answer:
        status = self._engine.status()
        return {
            "pending": status.pending,
            "held": status.held,
            "discarded": status.discarded,
            "cursor": status.cursor,
            "inflight": sum(len(batch.keys) for batch in self._engine.applier.inflight()),
        }

    def get(self, collection: str, key: str) -> Answer:
        return {"value": self._db.collection(collection).get(entity_id(collection, key))}

    def resolve(self, choice: str) -> Answer:
        conflicts = self._engine.conflicts()
        explained = [conflict.explain() for conflict in conflicts]
        for conflict in conflicts:
            self._engine.resolve(conflict, choice)
        return {"explained": explained}

    def discarded(self) -> Answer:
        return {"discarded": [_discarded(entry) for entry in self._engine.discarded()]}

    def recommit(self, transaction_id: str) -> Answer:
        """Commit a discarded transaction again."""
        for entry in self._engine.discarded():
            if entry.transaction_id.hex() == transaction_id:
                sequence = self._engine.recommit(entry)
                pending = self._engine.applier.pending()
                made = next(t for t in pending if t.sequence == sequence)
                return {"committed": [made.transaction_id.hex()]}
        raise LookupError(f"transaction {transaction_id} is not in the discarded list")

    def fingerprint(self) -> Answer:
        return fingerprint(self._db)


def fingerprint(database: Database) -> Answer:
    """What has to be the same everywhere: ``sha256`` over every entity's collection, id, version
    and bytes, in order; and how many there are, and the faults that ``verify`` finds."""
    digest = hashlib.sha256()
    count = 0
    for name, raw_id, version, payload in dump(database):
        digest.update(cbor.encode([name, raw_id, version, payload]))
        count += 1
    return {"sha256": digest.hexdigest(), "entities": count, "faults": database.verify()}


def _result(result: SyncCycleResult, discarded: list[DiscardedTransaction]) -> Answer:
    withdrawn = {entry.transaction_id for entry in result.withdrawn}
    return {
        "pulled": result.pulled,
        "pushed": result.pushed,
        "operations": result.pushed_operations,
        "requests": result.requests,
        "bytes_pulled": result.bytes_pulled,
        "bytes_pushed": result.bytes_pushed,
        "conflicts": [
            _conflict(r.conflict, r.resolution.action.value, r.resolution.value)
            for r in result.conflicts
        ],
        "unresolved": [_conflict(c, "skip", None) for c in result.unresolved],
        "withdrawn": [_discarded(e) for e in discarded if e.transaction_id in withdrawn],
        "done": [raw.hex() for raw in result.done],
    }


def _conflict(conflict: Conflict, action: str, merged: Any) -> Answer:
    base, local, remote = conflict.base, conflict.local, conflict.remote
    outcome = {"merge": merged, "keep_local": local, "accept_remote": remote}.get(action)
    return {
        "entity": label(conflict.collection, local or remote or base),
        "kind": conflict.kind,
        "action": action,
        "fields": [] if local is None or remote is None else _fields(base, local, remote, outcome),
    }


def _fields(base: Any, local: Any, remote: Any, outcome: Any) -> list[list[Any]]:
    """(field, before, here, on the server, outcome) of the fields that differ."""
    before, after = base or {}, outcome or {}
    return [
        [field, before.get(field), local.get(field), remote.get(field), after.get(field)]
        for field in sorted(local.keys() | remote.keys())
        if local.get(field) != remote.get(field)
    ]


def _discarded(entry: DiscardedTransaction) -> Answer:
    lost = [
        label(name, cbor.decode_trusted(payload)) if payload is not None else f"{name} (deleted)"
        for name, _, _, _, _, payload in entry.lost_to
    ]
    return {
        "id": entry.transaction_id.hex(),
        "code": entry.code,
        "message": entry.message,
        "puts": [label(name, value) for name, _, value in entry.values() if value is not None],
        "deletes": sum(value is None for _, _, value in entry.values()),
        "lost_to": lost,
    }


def label(collection: str, value: Any) -> str:
    """What a person calls the entity."""
    for field in ("iata", "no", "symbol", "title", "date"):
        if field in value:
            return f"{collection}/{value[field]}"
    return collection


def say(stream: TextIO, answer: Answer) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def serve_commands(commands: TextIO, answers: TextIO) -> None:
    """Read settings, then answer commands until the input ends."""
    device = DemoDevice(json.loads(commands.readline()), commands, answers)
    say(answers, {"pid": os.getpid(), **device.status()})
    try:
        while line := commands.readline():
            command = json.loads(line)
            try:
                say(answers, getattr(device, command.pop("do"))(**command))
            except EntiDBError as error:
                say(answers, {"error": error.code, "message": error.message})
    finally:
        device.close()


if __name__ == "__main__":
    serve_commands(sys.stdin, sys.stdout)

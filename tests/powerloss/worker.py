"""The process whose writes are recorded: commits, and says so in a file after each has returned.

    python -m tests.powerloss.worker ROOT device|server safe|unsynced|unnamed|failing|unsettled

``unsynced`` opens LMDB without its syncs, ``unnamed`` never syncs a directory: both are there to
show that what they leave out is needed. ``failing`` expects commits to fail, and tries each again
with other content beside it, in the same pages; ``unsettled`` leaves out what follows a failure.
"""

from __future__ import annotations

import json
import os
import random
import sys
import uuid
from pathlib import Path
from typing import Any

import lmdb

from entidb import cbor
from entidb.db import Database, Role
from entidb.errors import StorageError
from entidb.protocol import LIMITS, PushOperation, PushRequest, PushTransaction
from entidb.server.hooks import Grant
from entidb.server.service import DatabaseService
from entidb.storage import directories
from entidb.storage.lmdb import doubt, folder, open_file

COMMITS = 24
DB_ID = "shop"
_PARTS = 5


def entity_id(commit: int, part: int) -> uuid.UUID:
    return uuid.UUID(int=commit * 1000 + part)


def transaction_id(commit: int) -> bytes:
    return commit.to_bytes(16, "big")


def value(commit: int, part: int) -> dict[str, Any]:
    source = random.Random(commit * 1000 + part)
    size = 9000 if part == 0 and commit % 5 == 0 else 300
    return {"commit": commit, "part": part, "text": source.randbytes(size)}


def parts(commit: int) -> dict[uuid.UUID, dict[str, Any]]:
    """What commit number ``commit`` writes, all of it or nothing."""
    return {entity_id(commit, part): value(commit, part) for part in range(_PARTS)}


def shared(commit: int) -> dict[str, Any]:
    """Written again by every commit."""
    return {"newest": commit}


class _Worker:
    def __init__(self, root: Path, role: str, failing: bool) -> None:
        self._root = root
        self._failing = failing
        self._acks = os.open(root / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._role = role
        self._commits = 0
        self._backups = 0
        kind = Role.SERVER if role == "server" else Role.DEVICE
        self._database = Database.open(root / "db", role=kind)
        self._service = DatabaseService(self._database, db_id=DB_ID, limits=LIMITS)

    def run(self) -> None:
        for step in range(4):
            for _ in range(COMMITS // 4):
                self._commit()
            if step == 1 and not self._failing:
                self._database.compact()
            if step == 2 and not self._failing:
                self._back_up()
        self._database.close()

    def _commit(self) -> None:
        number = self._commits = self._commits + 1
        if self._role == "server":
            self._push(number)
        elif self._failing:
            while not self._try(number):
                continue
        else:
            self._write(number, {})
        self._acknowledge(commit=number)

    def _try(self, number: int) -> bool:
        try:
            self._write(number, {uuid.uuid4(): {"tried": os.urandom(4000)} for _ in range(5)})
        except StorageError:
            return False
        return True

    def _write(self, number: int, beside: dict[uuid.UUID, Any]) -> None:
        with self._database.transaction() as tx:
            for each, content in beside.items():
                tx.collection("beside")[each] = content
            for each, content in parts(number).items():
                tx.collection("notes")[each] = content
            tx.collection("notes")[uuid.UUID(int=0)] = shared(number)

    def _push(self, number: int) -> None:
        writes = {**parts(number), uuid.UUID(int=0): shared(number)}
        operations = [
            PushOperation(0, each.bytes, number - 1, cbor.encode(content))
            for each, content in writes.items()
        ]
        request = PushRequest(
            db_id=DB_ID,
            device_id=bytes(16),
            history=self._database.history or b"",
            cursor=number - 1,
            collections=["notes"],
            transactions=[PushTransaction(transaction_id(number), number, operations)],
        )
        (answer,) = self._service.push_many([(request, Grant("tester", True, True))])
        assert not isinstance(answer, Exception), answer
        assert answer.results[0].version == number, answer

    def _back_up(self) -> None:
        self._backups += 1
        self._database.backup(self._root / f"backup-{self._backups}")
        self._acknowledge(backup=self._backups, commit=self._commits)

    def _acknowledge(self, **line: int) -> None:
        os.write(self._acks, json.dumps(line).encode() + b"\n")


def weaken(how: str) -> None:
    real = lmdb.open
    if how == "unsynced":

        def open_unsynced(*arguments: Any, **options: Any) -> Any:
            if "sync" in options:
                options |= {"sync": False, "metasync": False}
            return real(*arguments, **options)

        setattr(lmdb, "open", open_unsynced)  # noqa: B010
    elif how == "unnamed":
        for module in (directories, folder):
            setattr(module, "sync_directory", lambda descriptor: None)  # noqa: B010
    elif how == "unsettled":
        for module in (doubt, open_file):
            setattr(module, "write_headers_again", lambda descriptor, path: None)  # noqa: B010


if __name__ == "__main__":
    weaken(sys.argv[3])
    _Worker(Path(sys.argv[1]), sys.argv[2], sys.argv[3] in ("failing", "unsettled")).run()

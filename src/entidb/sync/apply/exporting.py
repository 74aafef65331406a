"""Pending transactions as a file that people and programs can read: one line of JSON for each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

from entidb import cbor
from entidb.db.json_values import dump
from entidb.db.outbox import read_pending
from entidb.db.pending import PendingTransaction
from entidb.errors import StorageError
from entidb.storage.base import Snapshot
from entidb.storage.directories import absolute
from entidb.storage.disk_errors import disk_error
from entidb.storage.partial import Partial, remove_dead
from entidb.types import ms_from_timestamp, path_text, uuid_from_bytes


class Exported:
    """What writes transactions to the new file ``path``, durably, for nobody else to read; it is
    not there at all if that fails. Raises ``ConfigError`` for what is no path; called,
    ``StorageError``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._where = absolute(path_text(path))
        #: The transactions that were written, once they were.
        self._sequences: frozenset[int] | None = None

    def __call__(
        self, pending: list[PendingTransaction], names: dict[int, str], who: str | None
    ) -> None:
        try:
            _write(self._where, (dump(_line(each, names, who)) for each in pending))
        except OSError as error:
            raise disk_error(error.errno or 0, f"writing {self._where}") from error
        self._sequences = frozenset(each.sequence for each in pending)

    def take_back(self, snapshot: Snapshot) -> None:
        """Remove the file after an error, so that it is not in the way of the next try; but not
        where it has what is pending no more in ``snapshot``, and only it may have."""
        if self._sequences is None:
            return
        if self._sequences <= {each.sequence for each in read_pending(snapshot)}:
            with contextlib.suppress(OSError):
                os.unlink(self._where)


def _write(where: str, lines: Iterable[str]) -> None:
    if os.path.lexists(where):
        raise _exists(where)
    remove_dead(os.path.dirname(where))  # with what somebody wrote in it
    with Partial(where, "export") as partial:
        descriptor = os.open(partial.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if os.path.lexists(where):
            raise _exists(where)
        partial.finish()


def _exists(where: str) -> StorageError:
    return StorageError(
        f"{where} exists already, perhaps from an export that was killed; look whether what it has "
        "is pending still, and remove it, or name a new file. Nothing was changed",
        code="exists",
    )


def _line(pending: PendingTransaction, names: dict[int, str], who: str | None) -> dict[str, Any]:
    return {
        "transaction": str(uuid_from_bytes(pending.transaction_id)),
        "time_ms": ms_from_timestamp(pending.timestamp),
        "subject": who,
        "writes": [
            {
                "collection": names[op.collection],
                "id": str(uuid_from_bytes(op.entity_id)),
                "value": None if op.payload is None else cbor.decode_trusted(op.payload),
            }
            for op in pending.operations
        ],
    }


__all__ = ["Exported"]

"""Pending transactions as a file that people and programs can read: one line of JSON for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from entidb import cbor
from entidb.db.json_values import dump
from entidb.db.pending import PendingTransaction
from entidb.errors import StorageError
from entidb.storage.directories import absolute
from entidb.storage.disk_errors import disk_error
from entidb.storage.partial import Partial, remove_dead
from entidb.types import ms_from_timestamp, path_text, uuid_from_bytes


def to_file(
    path: str | os.PathLike[str],
) -> Callable[[list[PendingTransaction], dict[int, str], str | None], None]:
    """What writes transactions to the new file ``path``, durably, for nobody else to read; not
    there at all if that fails. The function raises ``StorageError``, and this ``ConfigError`` for
    what is no path."""
    where = absolute(path_text(path))

    def write(pending: list[PendingTransaction], names: dict[int, str], who: str | None) -> None:
        try:
            _write(where, (dump(_line(each, names, who)) for each in pending))
        except OSError as error:
            raise disk_error(error.errno or 0, f"writing {where}") from error

    return write


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
        f"{where} exists already; name a new file. Nothing was changed", code="exists"
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


__all__ = ["to_file"]

"""UNIQUE: no two entities of a server's database share what is unique in it, at any step.

Looked at are the stored entities after every durable commit, whoever made it, and never the
indexes by which the server finds out. A refusal must have had a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from entidb import cbor
from entidb.db.catalogue import decode_catalogue
from entidb.db.records import ENTITY, META_CATALOGUE, payload_of
from entidb.protocol import PushTransaction
from entidb.testing.knobs import Knobs
from entidb.testing.oracle import History
from entidb.testing.workload import NOTES
from entidb.testing.world import World

#: The field that no two notes may share.
FIELD: Final = "only"
NOT_UNIQUE: Final = "not_unique"


def settings(knobs: Knobs) -> dict[str, list[str]]:
    """``ServerConfig.unique`` of a run."""
    return {NOTES: [FIELD]} if knobs.unique else {}


class UniqueWatch:
    """What the notes of one server's database have in their field, entity by entity."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._prefix: bytes | None = None
        self._values: dict[bytes, Any] = {}
        self._holders: dict[Any, bytes] = {}

    def opened(self) -> None:
        """It may be an older copy: all of it is looked at with the next commit."""
        self._prefix = None

    def stored(self, batch: Mapping[bytes, bytes | None], records: Mapping[bytes, bytes]) -> None:
        """A commit is durable."""
        if not self._world.knobs.unique:
            return
        changed = batch if self._prefix is not None else self._begin(records)
        prefix = self._prefix
        if prefix is None:
            return
        notes = {key: row for key, row in changed.items() if key[:5] == prefix}
        for key in notes:
            value = self._values.pop(key, None)
            if value is not None and self._holders.get(value) == key:
                del self._holders[value]
        for key, row in notes.items():
            value = value_of(None if row is None else payload_of(row))
            if value is not None:
                holder = self._holders.setdefault(value, key)
                self._values[key] = value
                self._world.checks.that(
                    holder == key,
                    "UNIQUE",
                    f"{self._name} has two notes with {FIELD}={value!r}: {holder.hex()} and "
                    f"{key.hex()}",
                )

    def _begin(self, records: Mapping[bytes, bytes]) -> Mapping[bytes, bytes | None]:
        self._values, self._holders = {}, {}
        raw = records.get(META_CATALOGUE)
        info = None if raw is None else decode_catalogue(raw).by_name.get(NOTES)
        self._prefix = None if info is None else info.prefix
        return {key: row for key, row in records.items() if key[:1] == ENTITY}

    def refused(
        self, names: list[str], transaction: PushTransaction, history: History, head_before: int
    ) -> None:
        """A transaction was ``not_unique``: another note had its value before the group or in it,
        or two of its own have."""
        self._world.fired("unique")
        ids = {op.entity_id for op in transaction.operations if names[op.collection] == NOTES}
        wanted = [
            value
            for op in transaction.operations
            if names[op.collection] == NOTES and (value := value_of(op.payload)) is not None
        ]
        before = [
            history.state_at(ref, head_before)[1]
            for ref in history.refs()
            if ref[0] == NOTES and ref[1] not in ids
        ]
        meanwhile = [
            payload
            for version in range(head_before + 1, history.head + 1)
            for ref in history.commits[version]
            if ref[0] == NOTES and ref[1] not in ids
            for payload in (history.state_at(ref, version)[1],)
        ]
        there = set(map(value_of, before + meanwhile))
        self._world.checks.that(
            len(set(wanted)) < len(wanted) or bool(there.intersection(wanted)),
            "UNIQUE",
            f"{transaction.transaction_id.hex()} was refused for {FIELD} in {wanted}, which "
            "nobody had",
        )


def value_of(payload: bytes | None) -> Any:
    """What a note has in the field; None if it has nothing there."""
    value = None if payload is None else cbor.decode_trusted(payload)
    return value.get(FIELD) if isinstance(value, dict) else None


__all__ = ["NOT_UNIQUE", "UniqueWatch", "settings", "value_of"]

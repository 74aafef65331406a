"""One storage commit of a device, taken apart for the checkers."""

from __future__ import annotations

from collections.abc import Mapping

from entidb.db.catalogue import CollectionInfo
from entidb.db.pending import PendingTransaction, decode_pending
from entidb.db.records import (
    BASE,
    CONFLICT,
    DISCARDED,
    ENTITY,
    HELD,
    META_SYNC,
    READY,
    sequence_of,
    split_numbered_key,
)
from entidb.storage.base import Batch

Records = Mapping[bytes, bytes]
_E, _B, _O, _H, _D, _C = ENTITY[0], BASE[0], READY[0], HELD[0], DISCARDED[0], CONFLICT[0]


class DeviceCommit:
    """One storage commit of a device, taken apart."""

    __slots__ = (
        "bases",
        "conflicts",
        "discards",
        "entities",
        "outbox",
        "pending",
        "records",
        "sync",
    )

    def __init__(
        self,
        batch: Batch,
        old: Mapping[bytes, bytes | None],
        records: Records,
        prefixes: Mapping[bytes, CollectionInfo],
    ) -> None:
        self.records = records
        self.entities: list[tuple[CollectionInfo, bytes]] = []
        self.bases: list[tuple[int, bytes]] = []
        #: By sequence: what the outbox held before and holds now.
        self.outbox: dict[int, list[PendingTransaction | None]] = {}
        #: Other rows of the outbox, as they are looked up.
        self.pending: dict[int, PendingTransaction | None] = {}
        self.discards: list[tuple[int, bytes | None, bytes | None]] = []
        self.conflicts: list[tuple[int, bytes, bytes | None]] = []
        self.sync = META_SYNC in batch
        for key, new in batch.items():
            kind = key[0]
            if kind == _E:
                info = prefixes.get(key[:5])
                if info is not None:
                    self.entities.append((info, key[5:]))
            elif kind == _B:
                self.bases.append(split_numbered_key(key))
            elif kind in (_O, _H):
                pair = self.outbox.setdefault(sequence_of(key), [None, None])
                was = old[key]
                if was is not None:
                    pair[0] = decode_pending(key, was)
                if new is not None:
                    pair[1] = decode_pending(key, new)
            elif kind == _D:
                self.discards.append((sequence_of(key), old[key], new))
            elif kind == _C:
                self.conflicts.append((*split_numbered_key(key), new))

"""Conflicts as they are stored: an open one, and what a ``discarded`` record says of one."""

from __future__ import annotations

from typing import Any

from entidb import cbor
from entidb.db.records import NO_DEVICE, BaseRow
from entidb.db.writer import Ref
from entidb.sync.conflict import Conflict


def encode_conflict(conflict: Conflict) -> bytes:
    return cbor.encode_message(
        {
            "base": _state(
                conflict.base_version,
                conflict.base_device,
                conflict.base_timestamp,
                conflict.base_payload,
            ),
            "remote": _state(
                conflict.remote_version,
                conflict.remote_device,
                conflict.remote_timestamp,
                conflict.remote_payload,
            ),
            "local_timestamp": conflict.local_timestamp,
            "transaction_id": conflict.transaction_id,
            "error": conflict.error,
        }
    )


def decode_conflict(raw: bytes, collection: str, ref: Ref, local: bytes | None) -> Conflict:
    """A stored conflict; ``local`` is what the view has now, which later commits may change."""
    record = cbor.decode_trusted(raw)
    base, remote = record["base"], record["remote"]
    return Conflict(
        collection=collection,
        id_bytes=ref[1],
        base_payload=base[3],
        local_payload=local,
        remote_payload=remote[3],
        base_version=base[0],
        remote_version=remote[0],
        base_device=base[1],
        local_device=NO_DEVICE,
        remote_device=remote[1],
        base_timestamp=base[2],
        local_timestamp=record["local_timestamp"],
        remote_timestamp=remote[2],
        transaction_id=record["transaction_id"],
        error=record["error"],
    )


def decode_conflict_base(raw: bytes) -> BaseRow:
    version, device, timestamp, payload = cbor.decode_trusted(raw)["base"]
    return BaseRow(version, device, timestamp, payload)


def lost_to(conflict: Conflict) -> list[Any]:
    """How a ``discarded`` record names the server state a transaction lost to."""
    return [
        conflict.collection,
        conflict.id_bytes,
        conflict.remote_version,
        conflict.remote_device,
        conflict.remote_timestamp,
        conflict.remote_payload,
    ]


def lost_to_holder(
    collection: str, entity_id: bytes, version: int, payload: bytes | None
) -> list[Any]:
    """The same of an entity that the server has named; who wrote it, and when, it has not said."""
    return [collection, entity_id, version, NO_DEVICE, 0, payload]


def _state(version: int, device: bytes, timestamp: int, payload: bytes | None) -> list[Any]:
    return [version, device, timestamp, payload]

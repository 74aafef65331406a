"""The digest of what a transaction wrote (R14)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from entidb import cbor
from entidb.protocol.heads import ID, NULL, array_head, bytes_head
from entidb.protocol.messages import PushOperation


def operations_digest(collections: Sequence[str], operations: Sequence[PushOperation]) -> bytes:
    """SHA-256 of what a transaction writes (R14): the canonical CBOR array of
    ``[collection name, entity_id, payload or null]`` in order.

    Base versions and timestamps are left out: a transaction that was rebased onto an equal state
    still writes the same, and its second coming is the same transaction.
    """
    return digest_operations(digest_heads(collections), operations)


def digest_stored_newer(digest: bytes) -> bytes:
    """What a server remembers in the place of ``digest`` where it has stored something else than
    was pushed (R33). To a server before 0.5 it is the digest of other content, as it should be."""
    return hashlib.sha256(b"entidb stored newer" + digest).digest()


def digest_heads(collections: Sequence[str]) -> list[bytes]:
    """What every operation on a collection begins with in a digest; once for a whole message."""
    return [b"\x83" + cbor.text(name) + ID for name in collections]


def digest_operations(heads: Sequence[bytes], operations: Sequence[PushOperation]) -> bytes:
    """As ``operations_digest``, with the ``digest_heads`` of the message."""
    if len(operations) == 1:
        (operation,) = operations
        payload = operation.payload
        if payload is not None:
            head = b"\x81" + heads[operation.collection] + operation.entity_id
            return hashlib.sha256(head + bytes_head(len(payload)) + payload).digest()
    parts = [array_head(len(operations))]
    for operation in operations:
        payload = operation.payload
        parts += (heads[operation.collection], operation.entity_id)
        parts += (NULL,) if payload is None else (bytes_head(len(payload)), payload)
    return hashlib.sha256(b"".join(parts)).digest()


def digests_of_single(
    heads: Sequence[bytes], places: Iterable[int], ids: Iterable[bytes], payloads: Iterable[bytes]
) -> list[bytes]:
    """As ``digest_operations`` of transactions that store one entity each, in columns: which of
    ``heads``, which entity, and what."""
    begins = [b"\x81" + head for head in heads]
    sha256 = hashlib.sha256
    return [
        sha256(begins[place] + entity_id + bytes_head(len(payload)) + payload).digest()
        for place, entity_id, payload in zip(places, ids, payloads, strict=True)
    ]

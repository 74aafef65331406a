"""Ids made from natural keys, and facts about an entity beside its value."""

from __future__ import annotations

import hashlib
import uuid
from datetime import datetime

from msgspec import Struct

from entidb import cbor
from entidb.errors import ValueTypeError
from entidb.types import uuid_from_bytes


def natural_id(name: str, key: tuple[object, ...]) -> uuid.UUID:
    """See ``ReadCollection.id_for``."""
    parts: list[object] = [name]
    for part in key:
        if isinstance(part, uuid.UUID):
            parts.append(part.bytes)
        elif isinstance(part, str | bytes) or (
            isinstance(part, int) and not isinstance(part, bool)
        ):
            parts.append(part)
        else:
            raise ValueTypeError(
                f"a natural key is made of text, integers, bytes and UUIDs, not of {part!r}"
            )
    if not key:
        raise ValueTypeError('id_for needs a key: id_for("sku-123")')
    digest = bytearray(hashlib.sha256(cbor.encode(parts)).digest()[:16])
    digest[6] = 0x80 | digest[6] & 0x0F
    digest[8] = 0x80 | digest[8] & 0x3F
    return uuid_from_bytes(bytes(digest))


class EntityInfo(Struct, frozen=True, kw_only=True):
    """What a database knows about an entity beside its value.

    ``version`` is the server's commit that wrote what this builds on, 0 if the server never had
    it. ``pending`` says that changes made here wait for the server's decision. ``device_id`` made
    the newest change, at ``changed_at``, which is a hybrid clock's time and decides nothing
    (R27). ``payload_bytes`` is the size of the value.
    """

    id: uuid.UUID
    version: int
    pending: bool
    device_id: bytes
    changed_at: datetime
    payload_bytes: int

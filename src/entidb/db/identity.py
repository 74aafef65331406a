"""The identity record: which database this is, and on which side.

Not here: writing it (``core``).
"""

from __future__ import annotations

from entidb import cbor
from entidb.db.records import (
    META_IDENTITY,
)
from entidb.db.transaction import Role
from entidb.errors import (
    CorruptionError,
    StorageError,
)
from entidb.storage import Storage


def stored_role(storage: Storage) -> Role:
    with storage.snapshot() as snapshot:
        raw = snapshot.get(META_IDENTITY)
    if raw is None:
        return Role.DEVICE
    try:
        return Role(cbor.decode_trusted(raw)["role"])
    except (KeyError, TypeError, ValueError) as error:
        raise no_identity() from error


def no_identity() -> StorageError:
    return CorruptionError("the identity record cannot be read; restore a backup")

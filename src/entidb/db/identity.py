"""The identity record: which database this is, on which side, and of a server's, which history.

Not here: when it is read and written, and who has the turn then (``core``).
"""

from __future__ import annotations

from typing import Any, cast

from entidb import cbor
from entidb.db.local import Role
from entidb.db.records import (
    META_BEGUN,
    META_FORMAT,
    META_IDENTITY,
    SPACED,
    decode_format,
    encode_format,
    format_of,
    is_spacer,
)
from entidb.db.writer import Writer
from entidb.errors import (
    CorruptionError,
    StorageError,
)
from entidb.storage import Storage
from entidb.storage.regions import spacers_of
from entidb.types import Entropy


def stored_role(storage: Storage) -> Role:
    with storage.snapshot() as snapshot:
        raw = snapshot.get(META_IDENTITY)
    if raw is None:
        return Role.DEVICE
    try:
        return Role(cbor.decode_trusted(raw)["role"])
    except (KeyError, TypeError, ValueError) as error:
        raise no_identity() from error


def identity_fields(identity: dict[str, Any]) -> tuple[Role, bytes, int, bytes | None]:
    """Role, ``device_id``, when it was made in milliseconds, and a server's history."""
    try:
        role = Role(identity["role"])
        return role, identity["device_id"], identity["created_ms"], identity["history"]
    except (KeyError, TypeError, ValueError) as error:
        raise no_identity() from error


def no_identity() -> StorageError:
    return CorruptionError("the identity record cannot be read; restore a backup")


def read_identity(storage: Storage) -> tuple[bytes | None, bytes | None, bool]:
    """The records of format and identity, and whether there is nothing at all."""
    with storage.snapshot() as snapshot:
        raw_format = snapshot.get(META_FORMAT)
        empty = raw_format is None and not any(
            not is_spacer(key) for key in snapshot.scan_keys(b"\0", b"\xff", limit=100)
        )
        return raw_format, snapshot.get(META_IDENTITY), empty


def make_identity(storage: Storage, role: Role, entropy: Entropy, now_ms: int) -> dict[str, Any]:
    """That of a new database in an empty ``storage``, in two commits; the store stays an empty one
    until the last of them."""
    identity = {
        "role": role.value,
        "device_id": entropy(16),
        "created_ms": now_ms,
        "history": entropy(16) if role is Role.SERVER else None,
    }
    first, rows = spacers_of(storage, SPACED)
    storage.commit(first)
    rows |= {META_FORMAT: encode_format(), META_IDENTITY: cbor.encode(identity)}
    storage.commit(rows)
    return identity


def end_backup(storage: Storage, role: Role, entropy: Entropy, where: str) -> dict[str, Any]:
    """A copy comes to life: a server's begins a new history, so that devices notice (R29)."""
    raw_format, raw_identity, _ = read_identity(storage)
    assert raw_identity is not None, "it had one a moment ago"
    identity: dict[str, Any] = cbor.decode_trusted(raw_identity)
    if decode_format(raw_format, where):
        if role is Role.SERVER:
            identity["history"] = entropy(16)
        version = format_of(raw_format or b"")
        rows = {META_FORMAT: encode_format(version), META_IDENTITY: cbor.encode(identity)}
        storage.commit(rows)
    return identity


def another_history(
    writer: Writer, times_max: int, within_ms: int, entropy: Entropy, past: bytes | None
) -> dict[str, Any] | None:
    """The identity with a new history, staged in ``writer``; None, and nothing staged, if that was
    done ``times_max`` times within ``within_ms``. As it is, where its history is not ``past``: two
    who have the same proof end one history once."""
    stored = writer.get(META_IDENTITY)
    assert stored is not None, "a database that is open has an identity"
    identity = cbor.decode_trusted(stored)
    if past is not None and identity["history"] != past:
        return cast("dict[str, Any]", identity)
    since, now = writer.now_ms - within_ms, writer.now_ms
    raw = writer.get(META_BEGUN)
    times = [] if raw is None else cbor.decode_trusted(raw)
    # One from beyond the present is a wrong clock's.
    times = [time for time in times if since < time <= now]
    if len(times) >= times_max:
        return None
    identity = {**identity, "history": entropy(16)}
    writer.put(META_IDENTITY, cbor.encode(identity))
    writer.put(META_BEGUN, cbor.encode([*times, now]))
    return identity


def history_in(writer: Writer) -> bytes:
    """The history of a server's database as of the snapshot of ``writer``."""
    raw = writer.get(META_IDENTITY)
    history = None if raw is None else cbor.decode_trusted(raw).get("history")
    if not isinstance(history, bytes):
        raise no_identity()
    return history

"""Every key and record on disk, as in docs/storage-format.md; an OutboxRow is in ``pending``.

    key                                  record
    m format                             magic, format version, flags
    m head                               commit sequence, clock, counters           (Head)
    m identity                           role, device id, creation                  (CBOR map)
    m catalogue                          collections, tables, scope                 (CBOR map)
    m sync                               server's database, history, cursor, have   (CBOR map)
    m inflight                           the push batches that have no answer yet   (CBOR map)
    m stage                              a pull that is being staged                (CBOR map)
    m adopt                              entities that are being made pending       (CBOR map)
    m floor                              tombstones at or below may be gone         (u64)
    m stale                              how many feed rows are listed as stale     (u64)
    m columns                            order of the columns of imported files     (CBOR map)
    m begun                              when histories began by a proof (R29)    (CBOR list)
    m overruled                          values decided against: next, count, oldest (Overruled)
    m whose                              whose overruled values are (R36)           (CBOR list)
    m images                             images of a server's database (R35)      (CBOR map)
    m fullness                           bytes under a quota of them, measured and added (u64)
    m opening                            in which opening a term began last (R29) (u64)
    n collection:u32                     live entities of a collection              (u64)
    e table:u32 id:16                    an entity as readers see it                (EntityRow)
    b collection:u32 id:16               base of an entity with pending changes     (BaseRow)
    f sequence:u64 collection:u32 id:16  feed: this entity changed last here        (empty)
    f sequence:u64 0:u32 0:16            feed: collections were replaced as a whole (CBOR list)
    s sequence:u64                       feed rows that this commit left stale      (FeedKeys)
    o sequence:u64                       outbox: transaction ready to be pushed     (OutboxRow)
    h sequence:u64                       outbox: transaction held by a conflict     (OutboxRow)
    c collection:u32 id:16               unresolved conflict                        (CBOR map)
    d sequence:u64                       discarded transaction                      (CBOR map)
    l number:u64                         values that a policy decided against       (OverruledRow)
    t transaction:16                     accepted transaction: version, digest      (AcceptedRow)
    a group:u64 collection:u32 id:16     index of entities to be made pending       (empty)
    k time:u64                           server's clock at a commit sequence        (u64)
    r sequence:u64                       the term that begins with this commit (R29) (8 bytes)
    i index:u32 table:u32 fields id:16   an entity's place in an index               (empty)
    j index:u32 table:u32                how many entities of a table are in it      (u64)
    0 0:u64 0:u32 n:16                   spacer before everything                   (empty)
    f 0:u64 0:u32 n:16                   spacer between entities and feed           (empty)
    g 0:u64 0:u32 n:16                   spacer behind the feed                     (empty)

Numbers are big-endian: keys sort by them. A collection's *number* is for life; its *table* changes
when a first sync or a reset built a new one beside it (R20). The storage layer adds checksums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from struct import Struct as Packer
from struct import error as UnpackError
from typing import Any, Final

from msgspec import Struct

from entidb.errors import CorruptionError, FormatError

FORMAT_MAGIC: Final = b"EntiDB\x00\x01"
#: Read here. A database has it from its first index on, which an older EntiDB would let drift.
FORMAT_VERSION: Final = 3
FORMAT_PLAIN: Final = 2

META_FORMAT: Final = b"mformat"
META_HEAD: Final = b"mhead"
META_IDENTITY: Final = b"midentity"
META_CATALOGUE: Final = b"mcatalogue"
META_SYNC: Final = b"msync"
META_INFLIGHT: Final = b"minflight"
META_STAGE: Final = b"mstage"
META_ADOPT: Final = b"madopt"
META_FLOOR: Final = b"mfloor"
META_STALE: Final = b"mstale"
META_BEGUN: Final = b"mbegun"
META_COLUMNS: Final = b"mcolumns"
META_OVERRULED: Final = b"moverruled"
META_WHOSE: Final = b"mwhose"
META_IMAGES: Final = b"mimages"
META_FULLNESS: Final = b"mfullness"
META_OPENING: Final = b"mopening"

ENTITY: Final = b"e"
BASE: Final = b"b"
FEED: Final = b"f"
STALE: Final = b"s"
READY: Final = b"o"
HELD: Final = b"h"
CONFLICT: Final = b"c"
DISCARDED: Final = b"d"
OVERRULED: Final = b"l"
ACCEPTED: Final = b"t"
COUNT: Final = b"n"
ADOPT: Final = b"a"
CLOCK_MARK: Final = b"k"
TERM: Final = b"r"
INDEX: Final = b"i"
INDEX_COUNT: Final = b"j"

NO_ID: Final = bytes(16)
NO_DEVICE: Final = bytes(16)

_U32 = Packer(">I")
_U64 = Packer(">Q")
_NUMBERED = Packer(">cI16s")
_FEED = Packer(">cQI16s")
_FEED_PLACES = Packer(">xQI16s")
_FEED_LENGTHS = {_FEED.size}
pack_u64 = _U64.pack
#: As ``feed_key`` with FEED before the rest, for hot paths.
pack_feed_key = _FEED.pack


#: What unpacking raises for bytes that are not a record of the kind expected.
NOT_ONE: Final = (UnpackError, IndexError)


def unreadable(what: str, raw: bytes) -> CorruptionError:
    """The error for a record whose checksum is right and that is none of its kind all the same: a
    damaged page can lead to another, and a bug can write one."""
    found = f"{len(raw)} bytes are stored where {what} should be"
    return CorruptionError(f"{found}; run verify, and restore a backup")


def unpack_u64(raw: bytes) -> int:
    try:
        number: int = _U64.unpack(raw)[0]
    except NOT_ONE as error:
        raise unreadable("a number", raw) from error
    return number


# ---------------------------------------------------------------- keys


def table_prefix(table: int) -> bytes:
    """Entity keys of a table are this prefix and the id; joining beats packing on hot paths."""
    return ENTITY + _U32.pack(table)


def base_key(collection: int, entity_id: bytes) -> bytes:
    return _NUMBERED.pack(BASE, collection, entity_id)


def conflict_key(collection: int, entity_id: bytes) -> bytes:
    return _NUMBERED.pack(CONFLICT, collection, entity_id)


def feed_key(sequence: int, collection: int, entity_id: bytes) -> bytes:
    return _FEED.pack(FEED, sequence, collection, entity_id)


def split_feed_key(key: bytes) -> tuple[int, int, bytes]:
    """(sequence, collection, entity_id)

    Raises ``CorruptionError``: feed rows are read without their checksums, so their keys have to
    prove themselves."""
    try:
        _, sequence, collection, entity_id = _FEED.unpack(key)
    except UnpackError as error:
        raise CorruptionError(f"{key.hex()} is not the key of a feed row; run verify") from error
    return sequence, collection, entity_id


def split_feed_keys(keys: Sequence[bytes]) -> list[tuple[int, int, bytes]]:
    """As ``split_feed_key``, for many."""
    if set(map(len, keys)) <= _FEED_LENGTHS:
        return list(_FEED_PLACES.iter_unpack(b"".join(keys)))
    return list(map(split_feed_key, keys))


def encode_stale(keys: Sequence[bytes]) -> bytes:
    """The list of these feed keys, without what all begin with."""
    return b"".join([key[1:] for key in keys])


def decode_stale(raw: bytes) -> list[bytes]:
    """The feed keys of a list. Raises ``CorruptionError``."""
    length = _FEED.size - 1
    if len(raw) % length:
        raise CorruptionError(f"a list of stale feed rows has {len(raw)} bytes; run verify")
    return [FEED + raw[at : at + length] for at in range(0, len(raw), length)]


def sequence_key(kind: bytes, sequence: int) -> bytes:
    return kind + _U64.pack(sequence)


def sequence_of(key: bytes) -> int:
    try:
        number: int = _U64.unpack_from(key, 1)[0]
    except NOT_ONE as error:
        raise unreadable("a key with a sequence", key) from error
    return number


def accepted_key(transaction_id: bytes) -> bytes:
    return ACCEPTED + transaction_id


def count_key(collection: int) -> bytes:
    return COUNT + _U32.pack(collection)


def adopt_key(group: int, collection: int, entity_id: bytes) -> bytes:
    return _FEED.pack(ADOPT, group, collection, entity_id)


def is_spacer(key: bytes) -> bool:
    """Whether ``key`` is of a row that a store wants between regions (``SPACED``)."""
    return key[:13] in SPACED


def split_numbered_key(key: bytes) -> tuple[int, bytes]:
    """(collection or table, entity_id) of an entity, base or conflict key."""
    try:
        _, number, entity_id = _NUMBERED.unpack(key)
    except NOT_ONE as error:
        raise unreadable("a key with an entity's id", key) from error
    return number, entity_id


def end_of(prefix: bytes) -> bytes:
    """The first key behind all keys that start with ``prefix``."""
    number = int.from_bytes(prefix, "big") + 1
    return number.to_bytes(len(prefix), "big")


#: Where regions begin that grow at their ends: entities, feed, the rest. No commit has the sequence
#: 0, so no reader of the feed comes across the rows in it.
SPACED: Final = tuple(kind + bytes(12) for kind in (b"0", FEED, b"g"))

# ---------------------------------------------------------------- format and head


def encode_format(version: int = FORMAT_PLAIN, *, backup: bool = False) -> bytes:
    return FORMAT_MAGIC + version.to_bytes(2, "big") + bytes((int(backup),))


def format_of(raw: bytes) -> int:
    """The format version of a store, from its ``m format`` row."""
    return int.from_bytes(raw[8:10], "big")


def decode_format(raw: bytes | None, where: str) -> bool:
    """Whether the store is a backup copy that was never opened.

    Raises ``FormatError`` (``not_a_database``, ``newer_format``)."""
    if raw is None or len(raw) < 11 or raw[:8] != FORMAT_MAGIC:
        raise FormatError(
            f"{where} holds data of another program, not an EntiDB database; "
            "it was left as it is. Give an empty or new directory."
        )
    version = format_of(raw)
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where} was written by a newer EntiDB (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); it was left as it is. Update EntiDB to open it.",
            code="newer_format",
        )
    return raw[10] == 1


_HEAD = Packer(">QQIIII")


class Head(Struct, gc=False):
    """``sequence`` is the newest commit sequence, ``timestamp`` the last tick of the hybrid
    clock; the rest counts rows, because a key-value store cannot."""

    sequence: int = 0
    timestamp: int = 0
    ready: int = 0
    held: int = 0
    conflicts: int = 0
    discarded: int = 0

    def encode(self) -> bytes:
        return _HEAD.pack(
            self.sequence, self.timestamp, self.ready, self.held, self.conflicts, self.discarded
        )


def decode_head(raw: bytes) -> Head:
    try:
        return Head(*_HEAD.unpack(raw))
    except NOT_ONE as error:
        raise unreadable("the head", raw) from error


# ---------------------------------------------------------------- entities

TOMBSTONE: Final = 1
#: Has pending changes; ``version`` is then its base's.
DIRTY: Final = 2
#: A pending change is held by a conflict, so later ones must be held too.
IS_HELD: Final = 4
#: The view came from the server, not from a local transaction.
REMOTE: Final = 8
#: The base row exists (otherwise the base is "absent" at ``version``).
HAS_BASE: Final = 16

_ENTITY = Packer(">BQQ16sQ")
_PENDING = Packer(">BQQ16sQQ")
_SHOWN = Packer(">xQQ16sQ")
ENTITY_HEAD: Final = _ENTITY.size
PENDING_HEAD: Final = _PENDING.size
pack_entity = _ENTITY.pack
unpack_entity = _ENTITY.unpack_from
pack_pending = _PENDING.pack
unpack_pending = _PENDING.unpack_from
#: (sequence, version, device id, timestamp) of a row of either kind.
unpack_shown = _SHOWN.unpack_from
#: (sequence,) of a row of either kind.
unpack_sequence = Packer(">xQ").unpack_from
_unpack_version = Packer(">9xQ").unpack_from


class EntityRow(Struct, gc=False):
    """An entity as readers see it.

    ``sequence`` is the local commit that changed the view last (0: came with a bulk publication
    and has no feed row). ``version`` is the server's; of a dirty row its base's. ``pending`` is
    the newest outbox transaction that touches it (0: clean).
    """

    flags: int
    sequence: int
    version: int
    device_id: bytes
    timestamp: int
    pending: int
    payload: bytes | None

    def encode(self) -> bytes:
        body = self.payload if self.payload is not None else b""
        flags = self.flags | TOMBSTONE if self.payload is None else self.flags & ~TOMBSTONE
        if self.pending:
            return (
                pack_pending(
                    flags | DIRTY,
                    self.sequence,
                    self.version,
                    self.device_id,
                    self.timestamp,
                    self.pending,
                )
                + body
            )
        flags &= ~(DIRTY | IS_HELD | HAS_BASE)
        return (
            pack_entity(flags, self.sequence, self.version, self.device_id, self.timestamp) + body
        )

    @property
    def dirty(self) -> bool:
        return self.pending != 0


def decode_entity(raw: bytes) -> EntityRow:
    try:
        flags = raw[0]
        if flags & DIRTY:
            flags, sequence, version, device, timestamp, pending = unpack_pending(raw)
            payload = None if flags & TOMBSTONE else raw[PENDING_HEAD:]
            return EntityRow(flags, sequence, version, device, timestamp, pending, payload)
        flags, sequence, version, device, timestamp = unpack_entity(raw)
        payload = None if flags & TOMBSTONE else raw[ENTITY_HEAD:]
        return EntityRow(flags, sequence, version, device, timestamp, 0, payload)
    except NOT_ONE as error:
        raise unreadable("an entity", raw) from error


def version_of(raw: bytes) -> int:
    """The version in an encoded ``EntityRow``; of a dirty one its base's."""
    try:
        version: int = _U64.unpack_from(raw, 9)[0]
    except NOT_ONE as error:
        raise unreadable("an entity", raw) from error
    return version


def versions_of(rows: Sequence[bytes]) -> list[int]:
    """As ``version_of``, for many."""
    try:
        return list(chain.from_iterable(map(_unpack_version, rows)))
    except NOT_ONE as error:
        raise unreadable("an entity", min(rows, key=len)) from error


def timestamp_of(raw: bytes) -> int:
    """The time in an encoded ``EntityRow``."""
    return decode_entity(raw).timestamp


def payload_of(raw: bytes) -> bytes | None:
    """The payload of an encoded ``EntityRow``, None for a tombstone: what a plain read needs."""
    try:
        flags = raw[0]
    except IndexError as error:
        raise unreadable("an entity", raw) from error
    if flags & TOMBSTONE:
        return None
    return raw[PENDING_HEAD:] if flags & DIRTY else raw[ENTITY_HEAD:]


@functools.lru_cache(maxsize=64)
def _shown_rows(count: int) -> Packer:
    return Packer(">" + "9xQ16sQ" * count)


def shown_fields(rows: Sequence[bytes]) -> tuple[Any, ...]:
    """Version, device id and time of each of some encoded rows that are clean, one after another;
    of at most a hundred rows or so at a time."""
    try:
        return _shown_rows(len(rows)).unpack(b"".join([row[:ENTITY_HEAD] for row in rows]))
    except NOT_ONE as error:
        raise unreadable("an entity", min(rows, key=len)) from error


def payloads_of(rows: Sequence[bytes]) -> list[bytes | None]:
    """As ``payload_of``, for many that are clean. No value is nothing in CBOR, so that what has no
    bytes is a tombstone."""
    return [row[ENTITY_HEAD:] or None for row in rows]


_BASE = Packer(">Q16sQ")


class BaseRow(Struct, gc=False):
    """The last server state the device knows of a dirty entity."""

    version: int
    device_id: bytes
    timestamp: int
    payload: bytes | None

    def encode(self) -> bytes:
        assert self.payload is not None, "an absent base is the version in the entity row"
        return _BASE.pack(self.version, self.device_id, self.timestamp) + self.payload


def decode_base(raw: bytes) -> BaseRow:
    try:
        version, device, timestamp = _BASE.unpack_from(raw)
    except NOT_ONE as error:
        raise unreadable("a base", raw) from error
    return BaseRow(version, device, timestamp, raw[_BASE.size :])


def absent_base(version: int) -> BaseRow:
    return BaseRow(version, NO_DEVICE, 0, None)


# ---------------------------------------------------------------- overruled values

_OVERRULED_HEAD = Packer(">QQQ")
#: Number, whether it was the server's, who decided; id; device, time and version of the value's
#: writer, and of the other side; transaction; lengths of collection, path, value, what won, base
#: (-1: there is none).
_OVERRULED = Packer(">QBB16s16sQQ16sQQ16sHIiii")
pack_overruled = _OVERRULED.pack
unpack_overruled = _OVERRULED.unpack_from
OVERRULED_FIXED: Final = _OVERRULED.size


class OverruledHead(Struct, gc=False):
    """Of the values that policies decided against: the number the next one gets, how many are
    kept, and when the first of them was decided about (milliseconds; 0: none is kept). Not in
    ``Head``: an older EntiDB knows nothing of them."""

    next: int = 1
    count: int = 0
    oldest_ms: int = 0

    def encode(self) -> bytes:
        return _OVERRULED_HEAD.pack(self.next, self.count, self.oldest_ms)


def decode_overruled_head(raw: bytes | None) -> OverruledHead:
    if raw is None:
        return OverruledHead()
    try:
        return OverruledHead(*_OVERRULED_HEAD.unpack(raw))
    except NOT_ONE as error:
        raise unreadable("the head of overruled values", raw) from error


# ---------------------------------------------------------------- accepted transactions

_ACCEPTED = Packer(">Q32s")
pack_accepted = _ACCEPTED.pack


def decode_accepted(raw: bytes) -> tuple[int, bytes]:
    """(version, SHA-256 digest of the operations)"""
    try:
        version, digest = _ACCEPTED.unpack(raw)
    except NOT_ONE as error:
        raise unreadable("an accepted transaction", raw) from error
    return version, digest

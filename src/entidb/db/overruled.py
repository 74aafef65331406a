"""Values that a policy, or a person, decided against (R4): kept, listed, put back, pruned.

The decisions of one commit are together in a few rows, because a rebase may decide about thousands;
each value keeps its number for life. ``sync`` decides who is overruled.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence, Set
from typing import Any, Final

from msgspec import Struct

from entidb import cbor
from entidb.db.fields import LostField, Overruled, Path, Side, lost_fields, shown, when_by
from entidb.db.records import (
    META_OVERRULED,
    OVERRULED,
    OVERRULED_FIXED,
    OverruledHead,
    decode_overruled_head,
    end_of,
    pack_overruled,
    pack_u64,
    sequence_key,
    unpack_overruled,
    unpack_u64,
)
from entidb.db.writer import Ref, Writer
from entidb.storage import Snapshot
from entidb.types import uuid_from_bytes

#: How many values are kept, and for how long, unless set.
OVERRULED_MAX: Final = 10_000
OVERRULED_DAYS: Final = 90.0
#: Values in one row, and about how many bytes of them: to put back or prune one value costs as
#: much.
_ROW_VALUES = 200
_ROW_BYTES = 64 * 1024
#: Rows looked at by one step of pruning.
PRUNE_ROWS = 100
_PAGE_ROWS = 100


#: Who wrote something: device, time (a hybrid logical clock), version on the server.
Origin = tuple[bytes, int, int]


class OverruledValue(Struct, frozen=True, kw_only=True):
    """A value that a policy or a person decided against, from either side (R4).

    It was in the entity ``id_bytes`` of ``collection`` at ``path``, the keys on the way to the
    field; an empty path is the entity itself. ``payload`` is the value in canonical CBOR, None if
    what lost was a removal; ``won_payload`` is what was there after the decision, and, where the
    path is empty, ``base_payload`` what both sides were made from. ``fields()`` says which fields
    of an entity are concerned.

    ``side`` says whose it was: ``local``, this device's, written by its transaction
    ``transaction_id``; or ``remote``, the server's state of ``version``. ``device_id`` and
    ``timestamp`` (a hybrid logical clock) name its writer, ``lost_to_device``,
    ``lost_to_timestamp`` and ``lost_to_version`` (0: not on the server then) the other side.
    ``decided_by`` is ``policy``, ``person`` (``resolve``) or ``reset``; ``at_ms`` when, in
    milliseconds since 1970. ``number`` names the entry for as long as it is kept.
    """

    number: int
    collection: str
    id_bytes: bytes
    path: Path
    side: str
    payload: bytes | None
    won_payload: bytes | None
    device_id: bytes
    timestamp: int
    version: int
    lost_to_device: bytes
    lost_to_timestamp: int
    lost_to_version: int
    transaction_id: bytes
    decided_by: str
    at_ms: int
    base_payload: bytes | None = None

    @property
    def code(self) -> str:
        """``overruled``: as the ``code`` of a discarded transaction says why it is listed."""
        return "overruled"

    @property
    def entity_id(self) -> uuid.UUID:
        return uuid_from_bytes(self.id_bytes)

    @property
    def value(self) -> Any:
        """A fresh copy of the value; None also where what lost was a removal."""
        return None if self.payload is None else cbor.decode_trusted(self.payload)

    @property
    def won(self) -> Any:
        """A fresh copy of the value there after the decision; None also if there was none."""
        return None if self.won_payload is None else cbor.decode_trusted(self.won_payload)

    def fields(self) -> list[LostField]:
        """Path, value and what won, as payloads, of each field that was changed and is not in
        what won. Of values that are not both maps it is the path, value and winner there is."""
        if self.path:
            return [(self.path, self.payload, self.won_payload)]
        return lost_fields(self.base_payload, self.payload, self.won_payload)

    def explain(self) -> str:
        """Several plain lines for a person: what lost, whose it was, and what won."""
        field = f", field {'.'.join(self.path)!r}" if self.path else ""
        whose = "this device's" if self.side == "local" else "the server's"
        lost = when_by(self.timestamp, self.device_id)
        other = when_by(self.lost_to_timestamp, self.lost_to_device)
        absent = "removed" if self.path else "deleted"
        return "\n".join(
            (
                f"Entity {self.entity_id} in {self.collection!r}{field}: {whose} value was "
                f"overruled by {_DECIDED[self.decided_by]}.",
                f"  lost    {shown(self.payload, absent)}   ({lost})",
                f"  won     {shown(self.won_payload, absent)}   (against {other})",
            )
        )


SIDES: Final = (Side.LOCAL.value, Side.REMOTE.value)
_REMOTE: Final = Side.REMOTE
#: Who can decide, by the number in a record.
DECIDED_BY: Final = ("policy", "person", "reset")
BY_POLICY, BY_PERSON, BY_RESET = range(len(DECIDED_BY))
_DECIDED: Final = {
    "policy": "the policy",
    "person": "a person's decision",
    "reset": "a reset that kept this device's side",
}


# ---------------------------------------------------------------- keeping


class Keeper:
    """What one commit decides against: ``add`` it as it is decided, ``store`` it at the end."""

    def __init__(self, writer: Writer, at_ms: int) -> None:
        self._writer = writer
        self._at_ms = at_ms
        self._next = 0
        #: Whether it was the server's, collection, entity, and the value as a row holds it.
        self._values: list[tuple[bool, int, bytes, bytes]] = []
        self._names: dict[int, bytes] = {}
        self._places: dict[Path, bytes] = {}

    def add(
        self,
        ref: Ref,
        mine: Origin,
        theirs: Origin,
        transaction_id: bytes,
        lost: Sequence[Overruled],
        decided_by: int = BY_POLICY,
    ) -> None:
        """Keep what this device (``mine``) or the server (``theirs``) lost about one entity."""
        # Thousands may be decided in one commit, so there is no object for each.
        collection, entity_id = ref
        name = self._names.get(collection) or self._encoded_name(collection)
        number = self._next or read_head(self._writer).next
        for side, path, payload, won, base in lost:
            place = self._places.get(path) or self._encoded_path(path)
            remote = side is _REMOTE
            head = pack_overruled(
                number,
                remote,
                decided_by,
                entity_id,
                *(theirs + mine if remote else mine + theirs),
                transaction_id,
                len(name),
                len(place),
                -1 if payload is None else len(payload),
                -1 if won is None else len(won),
                -1 if base is None else len(base),
            )
            value = b"".join((head, name, place, payload or b"", won or b"", base or b""))
            self._values.append((remote, collection, entity_id, value))
            number += 1
        self._next = number

    def _encoded_name(self, collection: int) -> bytes:
        name = self._names[collection] = self._writer.catalogue.by_number[collection].name.encode()
        return name

    def _encoded_path(self, path: Path) -> bytes:
        place = self._places[path] = cbor.encode(list(path))
        return place

    def drop_remote(self, refs: Set[Ref]) -> None:
        """The server's side of these entities has not lost after all."""
        self._values = [
            each for each in self._values if not (each[0] and (each[1], each[2]) in refs)
        ]

    def store(self) -> int:
        """Put everything into the commit; returns how many values."""
        values, self._values = [each[3] for each in self._values], []
        if not values:
            return 0
        row: list[bytes] = []
        size = 0
        for value in values:
            row.append(value)
            size += len(value)
            if len(row) >= _ROW_VALUES or size >= _ROW_BYTES:
                self._put_row(row)
                row, size = [], 0
        if row:
            self._put_row(row)
        head = read_head(self._writer)
        if not head.count:
            head.oldest_ms = self._at_ms
        head.next = self._next
        head.count += len(values)
        _put_head(self._writer, head)
        return len(values)

    def _put_row(self, values: list[bytes]) -> None:
        key = sequence_key(OVERRULED, unpack_u64(values[0][:8]))
        self._writer.put(key, pack_u64(self._at_ms) + b"".join(values))


def read_head(view: Writer) -> OverruledHead:
    return decode_overruled_head(view.get(META_OVERRULED))


def _put_head(writer: Writer, head: OverruledHead) -> None:
    writer.put(META_OVERRULED, head.encode())


# ---------------------------------------------------------------- listing


def read_overruled(snapshot: Snapshot) -> list[OverruledValue]:
    """Every value that is kept, oldest first."""
    found = []
    start = OVERRULED
    while page := snapshot.scan(start, end_of(OVERRULED), limit=_PAGE_ROWS):
        for _, raw in page:
            found += values_of(raw)
        start = page[-1][0] + b"\0"
    return found


def values_of(raw: bytes) -> list[OverruledValue]:
    """The values in one row."""
    at_ms = unpack_u64(raw[:8])
    return [_value(raw, at, at_ms) for at, _ in _places(raw)]


def _places(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where each value of a row begins and ends."""
    at = 8
    while at < len(raw):
        lengths = unpack_overruled(raw, at)[-5:]
        stop = at + OVERRULED_FIXED + sum(max(0, length) for length in lengths)
        yield at, stop
        at = stop


def _value(raw: bytes, at: int, at_ms: int) -> OverruledValue:
    (number, remote, decided_by, entity_id, device, timestamp, version, *other) = unpack_overruled(
        raw, at
    )
    lost_to_device, lost_to_timestamp, lost_to_version, transaction_id, *sizes = other
    at += OVERRULED_FIXED
    parts: list[bytes | None] = []
    for size in sizes:
        parts.append(None if size < 0 else raw[at : at + size])
        at += max(0, size)
    name, path, payload, won, base = parts
    assert name is not None and path is not None, "only values can be missing"
    place = tuple(cbor.decode_trusted(path))
    decider = DECIDED_BY[decided_by]
    return OverruledValue(
        number=number,
        collection=name.decode(),
        id_bytes=entity_id,
        path=place,
        side=SIDES[remote],
        payload=payload,
        won_payload=won,
        device_id=device,
        timestamp=timestamp,
        version=version,
        lost_to_device=lost_to_device,
        lost_to_timestamp=lost_to_timestamp,
        lost_to_version=lost_to_version,
        transaction_id=transaction_id,
        decided_by=decider,
        at_ms=at_ms,
        base_payload=base,
    )


# ---------------------------------------------------------------- forgetting


def forget(writer: Writer, number: int) -> bool:
    """Take one value off the list; whether it was there."""
    stop = sequence_key(OVERRULED, number) + b"\0"
    found = writer.snapshot.scan(OVERRULED, stop, limit=1, reverse=True)
    if not found:
        return False
    key, raw = found[0]
    if not _cut_row(writer, key, raw, {number}):
        return False
    _settle_oldest(writer)
    return True


def prune(writer: Writer, *, count_max: int, before_ms: int) -> bool:
    """Forget the oldest values that are more than ``count_max``, and those decided before
    ``before_ms``, in a bounded part; whether there may be more."""
    spare = read_head(writer).count - count_max
    rows = writer.snapshot.scan(OVERRULED, end_of(OVERRULED), limit=PRUNE_ROWS)
    for key, raw in rows:
        numbers = _numbers(raw)
        if unpack_u64(raw[:8]) >= before_ms:
            if spare <= 0:
                _settle_oldest(writer)
                return False
            numbers = numbers[:spare]
        spare -= _cut_row(writer, key, raw, set(numbers))
    _settle_oldest(writer)
    return len(rows) == PRUNE_ROWS


def _numbers(raw: bytes) -> list[int]:
    return [unpack_u64(raw[at : at + 8]) for at, _ in _places(raw)]


def _cut_row(writer: Writer, key: bytes, raw: bytes, gone: set[int]) -> int:
    """Take the values with the numbers ``gone`` out of a row; how many of them it had."""
    places = list(_places(raw))
    left = [raw[at:stop] for at, stop in places if unpack_u64(raw[at : at + 8]) not in gone]
    if len(left) == len(places):
        return 0
    if left:
        writer.put(key, raw[:8] + b"".join(left))
    else:
        writer.delete(key)
    head = read_head(writer)
    head.count -= len(places) - len(left)
    _put_head(writer, head)
    return len(places) - len(left)


def _settle_oldest(writer: Writer) -> None:
    """Store when the first value that is left was decided about."""
    head = read_head(writer)
    start = OVERRULED
    while page := writer.snapshot.scan(start, end_of(OVERRULED), limit=_PAGE_ROWS):
        for key, _ in page:
            raw = writer.get(key)
            if raw is not None:
                head.oldest_ms = unpack_u64(raw[:8])
                _put_head(writer, head)
                return
        start = page[-1][0] + b"\0"
    head.oldest_ms = 0
    _put_head(writer, head)


__all__ = ["Keeper", "OverruledValue", "forget", "prune", "read_head", "read_overruled"]

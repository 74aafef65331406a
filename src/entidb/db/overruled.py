"""Values that a policy, or a person, decided against (R4): kept, listed, put back, pruned.

The decisions of one commit are together in a few rows, because a rebase may decide about thousands;
each value keeps its number for life. ``sync`` decides who is overruled.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence, Set
from typing import Any, Final

from msgspec import Struct, ValidationError, convert
from msgspec.structs import replace

from entidb import cbor
from entidb.db.fields import LostField, Overruled, Path, Side, lost_fields, shown, when_by
from entidb.db.notebook import payload_text, table
from entidb.db.records import (
    META_OVERRULED,
    META_WHOSE,
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
    unreadable,
)
from entidb.db.replica import OtherWork
from entidb.db.subjects import subject_of
from entidb.db.writer import Ref, Writer
from entidb.errors import CborDecodeError
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
    milliseconds since 1970. ``number`` names the entry for as long as it is kept. ``subject`` is
    the person or account that wrote this device's side (R36): the value itself where ``side`` is
    ``local``, what it lost to where that is ``remote``. It is None where no server had named
    anybody. Of the server's side only the device is known.
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
    subject: str | None = None  # not of its row: see ``Whose``

    @property
    def code(self) -> str:
        """``overruled``: as the ``code`` of a discarded transaction says why it is listed."""
        return "overruled"

    @property
    def entity_id(self) -> uuid.UUID:
        """The entity in which the value was."""
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
        if self.payload is None and self.won_payload is not None:
            return [((), None, self.won_payload)]  # whatever it deleted
        return lost_fields(self.base_payload, self.payload, self.won_payload)

    def __repr__(self) -> str:
        field = f", field {'.'.join(self.path)!r}" if self.path else ""
        return (
            f"<OverruledValue {self.number} in {self.collection!r}, {self.entity_id}{field}: "
            f"{self.side} {payload_text(self.payload)} lost to {payload_text(self.won_payload)}>"
        )

    def _repr_html_(self) -> str:
        rows = [("lost", payload_text(self.payload)), ("won", payload_text(self.won_payload))]
        return table(repr(self).partition(": ")[0][1:], ("", "value"), rows)

    def explain(self) -> str:
        """Several plain lines for a person: what lost, whose it was, and what won."""
        field = f", field {'.'.join(self.path)!r}" if self.path else ""
        whose = "this device's" if self.side == "local" else "the server's"
        lost = when_by(self.timestamp, self.device_id)
        other = when_by(self.lost_to_timestamp, self.lost_to_device)
        if self.subject is not None:
            # repr escapes control characters: a name must not be able to steer a terminal.
            of = f", of {self.subject!r}"
            lost, other = (lost + of, other) if self.side == "local" else (lost, other + of)
        absent = "removed" if self.path else "deleted"
        return "\n".join(
            (
                f"Entity {self.entity_id} in {self.collection!r}{field}: {whose} value was "
                f"overruled by {_DECIDED[self.decided_by, self.side]}.",
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
    ("policy", "local"): "the policy",
    ("policy", "remote"): "the policy",
    ("person", "local"): "a person's decision",
    ("person", "remote"): "a person's decision",
    ("reset", "local"): "a reset: the server had a newer one",
    ("reset", "remote"): "a reset that kept this device's side",
}


# ---------------------------------------------------------------- keeping


#: As ``OverruledKeeper.add`` takes it.
_Decided = tuple[Ref, Origin, Origin, bytes, Sequence[Overruled], int, int]


class OverruledKeeper:
    """What one commit decides against: ``add`` it as it is decided, ``store`` it at the end."""

    def __init__(self, writer: Writer, at_ms: int) -> None:
        self._writer = writer
        self._at_ms = at_ms
        #: As they came. One commit may decide thousands: ``store`` encodes them together.
        self._values: list[_Decided] = []

    def add(
        self,
        ref: Ref,
        mine: Origin,
        theirs: Origin,
        transaction_id: bytes,
        lost: Sequence[Overruled],
        decided_by: int = BY_POLICY,
        sequence: int = 0,
    ) -> None:
        """Keep what this device (``mine``) or the server (``theirs``) lost about one entity.
        ``sequence`` is the local commit of this device's side; 0: it is not known any more."""
        self._values.append((ref, mine, theirs, transaction_id, lost, decided_by, sequence))

    def drop_remote(self, refs: Set[Ref]) -> None:
        """The server's side of these entities has not lost after all."""
        for at, (ref, mine, theirs, transaction_id, lost, *rest) in enumerate(self._values):
            if ref in refs:
                own = [each for each in lost if each[0] is not _REMOTE]
                decided_by, sequence = rest
                self._values[at] = (ref, mine, theirs, transaction_id, own, decided_by, sequence)

    def store(self) -> int:
        """Put everything into the commit; returns how many values."""
        decided, self._values = self._values, []
        if not any(lost for *_, lost, _, _ in decided):
            return 0
        head = read_head(self._writer)
        self._store_whose(decided, head.next)
        if not head.count:
            head.oldest_ms = self._at_ms
        count_before = head.count
        row: list[bytes] = []
        size = 0
        for value in self._encoded(decided, head.next):
            row.append(value)
            size += len(value)
            if size >= _ROW_BYTES or len(row) >= _ROW_VALUES:
                self._put_row(head, row)
                row, size = [], 0
        if row:
            self._put_row(head, row)
        made = head.count - count_before
        _put_head(self._writer, head)
        return made

    def _store_whose(self, decided: list[_Decided], number: int) -> None:
        """Remember who wrote this device's sides; the first value gets ``number``."""
        state = self._writer.sync_state
        if state.subject is None and not state.others:
            return
        whose = read_whose(self._writer)
        if not state.others and all(each[-1] for each in decided):
            # One person's, as mostly: a rebase may decide thousands.
            runs = [(sum([len(each[4]) for each in decided]), state.subject)]
        else:
            runs = [
                (len(lost), subject_of(state, sequence) if sequence else None)
                for *_, lost, _, sequence in decided
                if lost
            ]
        for count, subject in runs:
            last = number + count - 1
            if whose and (whose[-1].last, whose[-1].subject) == (number - 1, subject):
                whose[-1] = OtherWork(whose[-1].first, last, whose[-1].subject)
            elif subject is not None:
                whose.append(OtherWork(number, last, subject))
            number = last + 1
        _put_whose(self._writer, whose)

    def _encoded(self, decided: list[_Decided], number: int) -> Iterator[bytes]:
        """Each value as a row holds it; the first gets ``number``."""
        by_number = self._writer.catalogue.by_number
        names: dict[int, bytes] = {}
        places: dict[Path, bytes] = {}
        for (collection, entity_id), mine, theirs, transaction_id, lost, decided_by, _ in decided:
            name = names.get(collection)
            if name is None:
                name = names[collection] = by_number[collection].name.encode()
            for side, path, payload, won, base in lost:
                place = places.get(path)
                if place is None:
                    place = places[path] = cbor.encode(list(path))
                remote = side is _REMOTE
                device, timestamp, version = theirs if remote else mine
                lost_to_device, lost_to_timestamp, lost_to_version = mine if remote else theirs
                fixed = pack_overruled(
                    number,
                    remote,
                    decided_by,
                    entity_id,
                    device,
                    timestamp,
                    version,
                    lost_to_device,
                    lost_to_timestamp,
                    lost_to_version,
                    transaction_id,
                    len(name),
                    len(place),
                    -1 if payload is None else len(payload),
                    -1 if won is None else len(won),
                    -1 if base is None else len(base),
                )
                yield b"".join((fixed, name, place, payload or b"", won or b"", base or b""))
                number += 1

    def _put_row(self, head: OverruledHead, values: list[bytes]) -> None:
        row = b"".join((pack_u64(self._at_ms), *values))
        self._writer.put(sequence_key(OVERRULED, head.next), row)
        head.next += len(values)
        head.count += len(values)


def read_head(view: Writer) -> OverruledHead:
    return decode_overruled_head(view.get(META_OVERRULED))


def _put_head(writer: Writer, head: OverruledHead) -> None:
    writer.put(META_OVERRULED, head.encode())


# ---------------------------------------------------------------- whose they are

# Under which subject this device's sides were written, as ranges of the values' numbers. Beside the
# rows and not in them, because an EntiDB before 0.8 reads the rows, and goes on counting.


def read_whose(view: Writer) -> list[OtherWork]:
    raw = view.get(META_WHOSE)
    if raw is None:
        return []
    try:
        return convert(cbor.decode_trusted(raw), list[OtherWork])
    except (CborDecodeError, ValidationError) as error:
        raise unreadable("whose the overruled values are", raw) from error


def _put_whose(writer: Writer, whose: list[OtherWork]) -> None:
    if whose:
        writer.put(
            META_WHOSE,
            cbor.encode_message([[each.first, each.last, each.subject] for each in whose]),
        )
    elif writer.get(META_WHOSE) is not None:
        writer.delete(META_WHOSE)


# ---------------------------------------------------------------- listing


def read_overruled(view: Writer) -> list[OverruledValue]:
    """Every value that is kept, oldest first, each with whose it is."""
    found = []
    start = OVERRULED
    while page := view.snapshot.scan(start, end_of(OVERRULED), limit=_PAGE_ROWS):
        for _, raw in page:
            found += values_of(raw)
        start = page[-1][0] + b"\0"
    whose = iter(read_whose(view))
    work = next(whose, None)
    for at, value in enumerate(found):
        while work is not None and work.last < value.number:
            work = next(whose, None)
        if work is not None and work.first <= value.number:
            found[at] = replace(value, subject=work.subject)
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
    """Store when the first value that is left was decided about, and forget whose those before it
    were."""
    raw = _oldest_row(writer)
    head = read_head(writer)
    head.oldest_ms = 0 if raw is None else unpack_u64(raw[:8])
    _put_head(writer, head)
    first = head.next if raw is None else unpack_u64(raw[8:16])
    _put_whose(writer, [each for each in read_whose(writer) if each.last >= first])


def _oldest_row(writer: Writer) -> bytes | None:
    start = OVERRULED
    while page := writer.snapshot.scan(start, end_of(OVERRULED), limit=_PAGE_ROWS):
        for key, _ in page:
            raw = writer.get(key)
            if raw is not None:
                return raw
        start = page[-1][0] + b"\0"
    return None


__all__ = [
    "LostField",
    "OverruledKeeper",
    "OverruledValue",
    "forget",
    "prune",
    "read_head",
    "read_overruled",
]

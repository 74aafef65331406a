"""What a device remembers about its server: three small records, each read and written whole.

``ReplicaState`` is the cursor and what belongs to it, ``Inflight`` the push batches without an
answer (R5), ``Stage`` a pull that is still coming in (R20). No decisions are made here.
"""

from __future__ import annotations

import functools
from typing import TypeVar

from msgspec import Struct, ValidationError, convert, field, to_builtins

from entidb import cbor
from entidb.db.records import unreadable
from entidb.errors import CborDecodeError
from entidb.types import SeenCommit

T = TypeVar("T", bound=Struct)

#: More ranges than this cost more than they save; the rest is pulled again and skipped (R21).
HAVE_RANGES_MAX = 1024


def encode_record(record: Struct) -> bytes:
    return cbor.encode_message(to_builtins(record, builtin_types=(bytes,)))


def decode_record(kind: type[T], raw: bytes) -> T:
    try:
        return convert(cbor.decode_trusted(raw), kind, builtin_types=(bytes,))
    except (ValidationError, CborDecodeError) as error:
        raise unreadable(f"the record {kind.__name__}", raw) from error


@functools.lru_cache(maxsize=16)
def decode_state(raw: bytes) -> ReplicaState:
    """The ``ReplicaState`` of ``raw``: read with every local commit, and changed by few of them. No
    code changes what is in it; ``replace`` makes another."""
    return decode_record(ReplicaState, raw)


class OtherWork(Struct, frozen=True, array_like=True):
    """The local commits from ``first`` to ``last`` were made under ``subject``, who is not the one
    that this device syncs as now (R36)."""

    first: int
    last: int
    subject: str


class ReplicaState(Struct, frozen=True):
    """``cursor`` is the last server commit applied, inclusive; ``have`` the inclusive ranges of
    versions above it that are the device's own (R21).

    ``full`` asks for everything from 0: a first sync, a reset, or a widening to all collections.
    ``uncovered`` names collections in scope that the cursor does not speak of yet (R31).
    ``foreign`` says the entities' versions belong to another history (R29), so that only bytes
    can be compared; ``keep_device`` that newer entities of this device are committed again.
    ``foreign_names`` are collections that were not in scope when that ended, so that the versions
    of their entities are of another history still (``outdated`` in the record). ``granted`` names
    what the token grants of the database, sorted, as the server has said it; None is everything
    (R31).
    ``unsettled`` are ranges of outbox sequences, (first, last, cursor): transactions that were in
    flight when the device was at ``cursor``, got no answer, and may have been accepted (R28).
    ``subject`` is who the server has last said that this device syncs as; None: it has not, or they
    have signed out. ``others`` are the commits of other subjects, ascending, without a
    commit in two of them; all others are of ``subject`` (R36). ``seen`` is the newest of the heads
    that the server has named with a term, and that term (R29).
    """

    db_id: str | None = None
    history: bytes | None = None
    cursor: int = 0
    have: list[list[int]] = []
    full: bool = True
    uncovered: list[str] = []
    foreign: bool = False
    keep_device: bool = False
    foreign_names: list[str] = field(default_factory=list, name="outdated")
    granted: list[str] | None = None
    unsettled: list[list[int]] = []
    subject: str | None = None
    others: list[OtherWork] = []
    seen: SeenCommit | None = None

    def grants(self, collection: str) -> bool:
        return self.granted is None or collection in self.granted

    @property
    def reached(self) -> int:
        """Up to which server commit the device has everything: the cursor, and what follows it
        without a gap of its own (R21)."""
        if self.have and self.have[0][0] <= self.cursor + 1:
            return self.have[0][1]
        return self.cursor

    def base_version_of_absent(self, collection: str) -> int:
        """What the device knows about an entity it has no row of: absent at the cursor, if the
        cursor speaks of the collection at all."""
        if self.full or collection in self.uncovered or not self.grants(collection):
            return 0
        return self.cursor


class Inflight(Struct, frozen=True):
    """``ranges`` are the inclusive ranges of outbox sequences in the batch that was sent,
    ``after`` those of the one that goes out when its answer is there; empty if there is none."""

    ranges: list[list[int]]
    after: list[list[int]] = []


class ImageSegment(Struct, frozen=True, array_like=True):
    """One segment of an image that is still to be staged: the file named ``sha256``, of ``size``
    bytes, with ``rows`` entities of ``collection`` from the id ``first`` to ``last``."""

    sha256: bytes
    collection: str
    size: int
    rows: int
    first: bytes
    last: bytes


class StagedImage(Struct, frozen=True):
    """An image of the server's database as of ``head``, that comes in segments (R35). ``left`` are
    those that are not staged yet, in order; of the first of them ``done`` rows are. ``history`` is
    the server's, ``entities`` counts those of all segments, ``failures`` how often in a row nothing
    came of fetching."""

    history: bytes
    head: int
    entities: int
    left: list[ImageSegment]
    done: int = 0
    failures: int = 0


class Stage(Struct, frozen=True):
    """A pull of several pages (R20). The collections in ``full`` (None: all in scope) come in
    from nothing up to ``full_cursor``, each in a new table (``tables``, by collection number);
    then, unless that was everything, what changed in the others after ``cursor``, up to
    ``delta_cursor``, in ``deltas``. When both have reached the head it is published.

    ``history`` and ``cursor`` are those the stage belongs to (R22), ``floor`` the server's when
    it began (R28). ``first_head`` is the head at its first page: below it every entity comes
    once, so that ``counts`` (live entities per new table) need no look-ups. ``operations`` counts
    what went into new tables; the others are counted when they are applied. ``time_ms`` is the
    server's clock with the newest page. ``size`` is about how many bytes it takes; a program before
    0.4 did not count them.

    ``image`` is there while it begins with segments (R35). Until all are staged ``history`` is
    empty, and that of the image counts: a program that knows of no segments takes the stage for one
    of another history then, and forgets it. ``image_head`` is the commit of the image that it began
    with; 0 if it did not.
    """

    history: bytes
    cursor: int
    floor: int
    first_head: int
    full: list[str] | None
    full_cursor: int = 0
    full_done: bool = False
    delta_cursor: int = 0
    tables: dict[str, int] = {}
    deltas: dict[str, int] = {}
    counts: dict[str, int] = {}
    operations: int = 0
    time_ms: int = 0
    size: int = 0
    image: StagedImage | None = None
    image_head: int = 0

    def fits(self, state: ReplicaState) -> bool:
        """Whether it belongs where the device stands (R22)."""
        history = self.history if self.image is None else self.image.history
        return history == state.history and self.cursor == state.cursor


class Adopt(Struct, frozen=True):
    """Entities that are being made pending in bounded commits. ``sources`` are
    (collection number, table, compare); with ``compare`` 1 only that is adopted which is newer
    than what the collection has now (R29). ``after`` is the last key indexed, ``indexed`` says
    all are. ``compare`` of the record is that of sources which name none (before 0.2)."""

    sources: list[list[int]]
    after: bytes
    indexed: bool
    compare: bool = False


def ranges_of(numbers: list[int]) -> list[list[int]]:
    """The inclusive ranges of ascending ``numbers``."""
    if numbers and numbers[-1] - numbers[0] + 1 == len(numbers):
        return [[numbers[0], numbers[-1]]]
    ranges: list[list[int]] = []
    for number in numbers:
        add_to_ranges(ranges, number)
    return ranges


def add_to_ranges(ranges: list[list[int]], number: int) -> None:
    """Put ``number`` into ascending inclusive ``ranges``; numbers mostly come in order."""
    if ranges and ranges[-1][1] + 1 == number:
        ranges[-1][1] = number
        return
    for index in range(len(ranges) - 1, -1, -1):
        first, last = ranges[index]
        if first <= number <= last:
            return
        if last < number:
            ranges.insert(index + 1, [number, number])
            _join(ranges, index + 1)
            return
    ranges.insert(0, [number, number])
    _join(ranges, 0)


def _join(ranges: list[list[int]], index: int) -> None:
    if index + 1 < len(ranges) and ranges[index][1] + 1 == ranges[index + 1][0]:
        ranges[index][1] = ranges.pop(index + 1)[1]
    if index > 0 and ranges[index - 1][1] + 1 == ranges[index][0]:
        ranges[index - 1][1] = ranges.pop(index)[1]


def ranges_above(ranges: list[list[int]], cursor: int) -> list[list[int]]:
    """The part of ``ranges`` above ``cursor``."""
    return [[max(first, cursor + 1), last] for first, last in ranges if last > cursor]

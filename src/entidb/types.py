"""Ids, names and clocks, and the few words that every layer shares. No I/O, no records, no
messages.

Time and randomness enter here as parameters (``Clock``, ``Entropy``), so that the simulator can
run the real code: nothing below the command line reads the clock or calls ``random`` by itself.
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import repeat
from typing import Annotated, Final, NewType, Protocol, cast

from msgspec import Meta, Struct

from entidb.errors import ConfigError, InvalidNameError, ValueTypeError

_log = logging.getLogger("entidb")

#: Commit sequence of a database: 1 is the first commit, 0 means "never".
Sequence = NewType("Sequence", int)
#: Hybrid logical clock: milliseconds since 1970 in the upper 48 bits, a counter in the lower 16.
Timestamp = NewType("Timestamp", int)
#: Source of random bytes: called with a length, returns that many bytes.
Entropy = Callable[[int], bytes]

ID_BYTES: Final = 16
TERM_BYTES: Final = 8
SEQUENCE_MAX: Final = 2**63 - 1
#: Default and lower bound every server must accept (rules, "Limits").
TRANSACTION_BYTES_MAX: Final = 16 * 1024 * 1024
#: Collections of a database that synchronise, and as many again that are local. What it costs is
#: the list of them: it is one record, which is read with every snapshot, and a new collection
#: writes it again.
COLLECTIONS_MAX: Final = 65_536
#: Collections that one transaction writes to: its commit goes whole into one page, and older
#: devices take 4,096 names in one.
TRANSACTION_COLLECTIONS_MAX: Final = 2048
#: Names in a scope: every pull carries all of them.
SCOPE_NAMES_MAX: Final = 4096
#: Bytes that one entity write counts in addition to its payload, in ``transaction_bytes_max``: more
#: than its id, versions and heads take on the wire, so that what fits here also fits there.
OPERATION_OVERHEAD_BYTES: Final = 64
#: UTF-8 bytes. Short enough for any index, long enough for a path-like name.
COLLECTION_NAME_BYTES_MAX: Final = 255
#: Arrays and maps inside each other in one entity value.
NESTING_MAX: Final = 64
#: Arrays and maps in one entity value that is read: decoded, each takes seventy bytes or more,
#: however few it takes in CBOR. Versions before 0.4 wrote as many.
CONTAINERS_MAX: Final = 1024 * 1024
#: Arrays and maps, and items of any kind (each key, each value, each container), in one entity
#: value that is written. Decoding is one step that nothing interrupts, so this is how long one
#: value can hold up everything else in a process: some hundredths of a second.
VALUE_CONTAINERS_MAX: Final = 128 * 1024
VALUE_ITEMS_MAX: Final = 1024 * 1024
#: Arrays and maps in all values of one transaction: how long it can hold up its database.
TRANSACTION_CONTAINERS_MAX: Final = 2 * 1024 * 1024
_HLC_COUNTER_BITS: Final = 16
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# C0, DEL and C1: they would forge lines in logs and terminals.
_NAME_FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f]")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


class Term(Struct, frozen=True, array_like=True, gc=False):
    """The commits between one opening of a server's files and the next, of which ``first`` is the
    first, under a random ``name`` (R29)."""

    first: Annotated[int, Meta(ge=0, le=SEQUENCE_MAX)]
    name: Annotated[bytes, Meta(min_length=TERM_BYTES, max_length=TERM_BYTES)]


class SeenCommit(Struct, frozen=True, array_like=True, gc=False):
    """A server's commit that a device has seen, and the name of its term (R29)."""

    version: Annotated[int, Meta(ge=0, le=SEQUENCE_MAX)]
    term: Annotated[bytes, Meta(min_length=TERM_BYTES, max_length=TERM_BYTES)]


def check_name(name: str) -> str:
    """``name`` itself, if a collection or a database may have it as its name: 1 to 255 bytes of
    UTF-8, without control characters; else ``InvalidNameError``. Names are compared byte by byte
    and never normalised."""
    if not isinstance(name, str):
        raise InvalidNameError(f"a name is text, not {type(name).__name__}")
    if _NAME_FORBIDDEN.search(name) is not None:
        raise InvalidNameError(f"the name {name!r} contains a control character: remove it")
    if _SURROGATES.search(name) is not None:
        raise InvalidNameError(f"the name {name!r} is not UTF-8: give one that is")
    if not 0 < len(name.encode()) <= COLLECTION_NAME_BYTES_MAX:
        raise InvalidNameError(
            f"a name has 1 to {COLLECTION_NAME_BYTES_MAX} bytes of UTF-8, "
            f"{name[:40]!r} has {len(name.encode())}"
        )
    return name


class Clock(Protocol):
    """Where time comes from. ``now_ms`` may jump; ``monotonic`` (seconds) never goes back."""

    def now_ms(self) -> int: ...

    def monotonic(self) -> float: ...

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Sleep up to ``seconds``, or until ``event`` is set; returns whether it is set."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    monotonic = staticmethod(time.monotonic)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)


#: The last millisecond that a date can name: that of the year 9999.
_MS_MAX: Final = 253_402_300_799_999


class _BoundedClock:
    """A clock that was given, believed as long as it names a time that can be stored: a wrong word
    of it would stay above all that is written later. Until then it is the time of before."""

    __slots__ = ("_given", "_known", "_wrong", "monotonic", "wait")

    def __init__(self, given: Clock, known: int) -> None:
        self._given = given
        self._known = known
        self._wrong = False
        self.monotonic = given.monotonic
        self.wait = given.wait

    def now_ms(self) -> int:
        now: object = self._given.now_ms()
        if isinstance(now, int) and 0 <= now <= _MS_MAX:
            self._known, self._wrong = now, False
        elif not self._wrong:
            self._wrong = True
            _log.warning(
                "now_ms() of the clock gives %.60r, which is no time from 1970 to 9999 in "
                "milliseconds; until it gives one, the time is taken to be that of before",
                now,
            )
        return self._known


def check_clock(given: object) -> Clock:
    """``given``, or the machine's clock for None; what it says later is believed within bounds.
    Raises ``ConfigError`` where it is no clock, or counts in another unit."""
    if given is None:
        return SystemClock()
    if type(given) is SystemClock or isinstance(given, _BoundedClock):
        return given
    calls = ("now_ms", "monotonic", "wait")
    if isinstance(given, type) or not all(callable(getattr(given, name, None)) for name in calls):
        raise ConfigError(
            "clock must be an object with now_ms(), monotonic() and wait(), not "
            f"{repr_of(given, 60)}"
        )
    clock = cast("Clock", given)
    now: object = clock.now_ms()
    if not isinstance(now, int) or isinstance(now, bool) or now > _MS_MAX:
        raise ConfigError(
            f"now_ms() of the clock gives {repr_of(now, 60)}: it must give whole milliseconds "
            "since 1970, as time.time_ns() // 1_000_000 does"
        )
    return _BoundedClock(clock, max(now, 0))


# ---------------------------------------------------------------- what a setting may be


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raises ``ConfigError``, which names the setting."""
    # bool is an int to Python, and a mistake to a reader.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a whole number, not {kind_name(value)}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be from {low} to {high}, not {value}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises ``ConfigError``, which names the setting."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a number, not {kind_name(value)}")
    if not (low <= value <= high) or math.isnan(value):
        raise ConfigError(f"{name} must be from {low:g} to {high:g}, not {value}")


def check_bool(name: str, value: object) -> None:
    """Raises ``ConfigError``, which names the setting."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {repr_of(value, 80)}")


def kind_name(value: object) -> str:
    """What ``value`` is, for a message."""
    return "None" if value is None else type(value).__name__


def repr_of(value: object, most: int) -> str:
    """``value`` as Python writes it, cut after ``most`` characters, for a message; what it is where
    that cannot be written, as of what is nested too deep."""
    try:
        return repr(value)[:most]
    except Exception:
        return f"<{kind_name(value)}>"


class Uncopied:
    """What stands for something that is open once: files, locks, threads. A copy would close them
    under the original when it goes."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> str:
        """What ``copy``, ``deepcopy`` and ``pickle`` call."""
        raise ValueTypeError(
            f"{type(self).__name__} objects are not copied or pickled: what they have open is open "
            "once. Pass the object itself; another process opens the database by its path"
        )


def path_text(path: str | os.PathLike[str]) -> str:
    """``path`` as text. Raises ``ConfigError`` for a name that no file of this system can have, and
    ``ValueTypeError`` (a ``TypeError``, as from ``open``) for an object that is no path."""
    try:
        text = os.fsdecode(os.fspath(path))
    except TypeError as error:
        raise ValueTypeError(f"a path is text or a Path, not {kind_name(path)}") from error
    if not text:
        raise ConfigError("the path is empty: name a directory")  # and not the current one
    try:
        taken = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        taken = False
    if not taken:
        raise ConfigError(f"{repr_of(text, 200)} cannot be the path of a file here: name another")
    return text


#: The machine's randomness.
system_entropy: Final[Entropy] = os.urandom


def timestamp_from_ms(milliseconds: int) -> Timestamp:
    return Timestamp(milliseconds << _HLC_COUNTER_BITS)


def ms_from_timestamp(timestamp: int) -> int:
    return timestamp >> _HLC_COUNTER_BITS


def datetime_of(timestamp: int) -> datetime:
    """The wall clock's part of a hybrid timestamp, in UTC, to the millisecond."""
    return _EPOCH + timedelta(milliseconds=ms_from_timestamp(timestamp))


def next_timestamp(now_ms: int, last: int) -> Timestamp:
    """The hybrid logical clock's next tick: never below the wall clock, always above ``last``."""
    return Timestamp(max(now_ms << _HLC_COUNTER_BITS, last + 1))


_from_bytes: Callable[[bytes], int] = int.from_bytes
# The halves of an id: milliseconds, version, counter; variant, random bits.
_HALVES = struct.Struct(">QQ")
_pack_halves = _HALVES.pack
_unpack_halves = struct.Struct(">QQ").unpack
_pack_quarters = struct.Struct(">QQQQ").pack
_VERSION_7: Final = 7 << 12
_VARIANT: Final = 0b10 << 62
_RANDOM_BITS: Final = (1 << 62) - 1


class IdSource:
    """Makes UUIDv7 ids (RFC 9562, section 5.7) that sort in the order they were made.

    Within a millisecond, and when the clock goes back, the 12 bits of ``rand_a`` are a counter
    (method 1 of section 6.2), so new entities land at the end of the tree, where writing is cheap.
    Thread-safe.
    """

    def __init__(self, clock: Clock, entropy: Entropy = system_entropy) -> None:
        self._clock = clock
        self._entropy = entropy
        # Knows its thread, so that giving it back twice is an error and does not free another
        # thread's.
        self._lock = threading.RLock()
        self._last = 0

    def new_bytes(self) -> bytes:
        tick, random = self._ticks(self._clock.now_ms(), 1), _from_bytes(self._entropy(8))
        high = (tick >> 12) << 16 | _VERSION_7 | tick & 0xFFF
        return _pack_halves(high, _VARIANT | random & _RANDOM_BITS)

    def new_pair(self, now_ms: int) -> tuple[bytes, bytes]:
        """Two, as two calls of ``new_bytes`` make them at ``now_ms``, for less."""
        last = self._ticks(now_ms, 2)
        tick, (one, other) = last - 1, _unpack_halves(self._entropy(16))
        both = _pack_quarters(
            (tick >> 12) << 16 | _VERSION_7 | tick & 0xFFF,
            _VARIANT | one & _RANDOM_BITS,
            (last >> 12) << 16 | _VERSION_7 | last & 0xFFF,
            _VARIANT | other & _RANDOM_BITS,
        )
        return both[:16], both[16:]

    def _ticks(self, now_ms: int, many: int) -> int:
        """The last of ``many`` that nobody else gets: 48 bits of milliseconds and 12 bits of
        counter, as one growing number."""
        try:
            self._lock.acquire()
            tick = max(now_ms << 12, self._last + 1) + many - 1
            self._last = tick
            self._lock.release()
        except BaseException:
            # Not ``with``: Ctrl-C on the way into its end would leave the lock taken.
            with suppress(RuntimeError):
                self._lock.release()
            raise
        return tick

    def new(self) -> uuid.UUID:
        return uuid_from_bytes(self.new_bytes())


# The slots of ``UUID`` themselves: its ``__setattr__`` refuses, and looking the enum member up at
# every call costs more than the rest.
_set_int = uuid.UUID.__dict__["int"].__set__
_set_is_safe = uuid.UUID.__dict__["is_safe"].__set__
_UNKNOWN: Final = uuid.SafeUUID.unknown
_new_object = object.__new__


def uuids_from_bytes(raws: Collection[bytes]) -> list[uuid.UUID]:
    """As ``uuid_from_bytes`` of each, in less than half the time: no step of it runs in Python."""
    made = list(map(_new_object, repeat(uuid.UUID, len(raws))))
    deque(map(_set_int, made, map(_from_bytes, raws)), maxlen=0)
    deque(map(_set_is_safe, made, repeat(_UNKNOWN)), maxlen=0)
    return made


def uuid_from_bytes(raw: bytes) -> uuid.UUID:
    """``uuid.UUID(bytes=raw)`` without its argument checks, which cost more than reading the
    entity; ``raw`` must be 16 bytes."""
    made = _new_object(uuid.UUID)
    _set_int(made, int.from_bytes(raw, "big"))
    _set_is_safe(made, _UNKNOWN)
    return made


_PLACE: Final = re.compile(r"^(?P<what>.*) - at `(?P<place>.*)`$", re.DOTALL)
#: What that library calls a list, a map, and how dates and times are written.
_OUR_WORD: Final = {"array": "list", "object": "map", "rfc3339 encoded": "ISO 8601"}
_FOREIGN: Final = re.compile(r"\b(?:array|object|RFC3339 encoded)\b", re.IGNORECASE)
_MISSING: Final = re.compile(r"^Object missing required field `(?P<name>.*)`$")


def reason_of_msgspec(text: str) -> tuple[str | None, str]:
    """Field and reason out of the text of a ``msgspec.ValidationError``, in our words: people who
    read it know fields, and not that library."""
    found = _PLACE.match(text)
    what, place = (found["what"], found["place"]) if found else (text, "$")
    place = place.replace("key` in `", "").removeprefix("$").lstrip(".").replace("[...]", "[]")
    missing = _MISSING.match(what)
    if missing is not None:
        return f"{place}.{missing['name']}".lstrip("."), "it is missing"
    what = " ".join(what.replace("`", "").split())
    what = _FOREIGN.sub(lambda found: _OUR_WORD[found[0].lower()], what)
    return place or None, what[:1].lower() + what[1:]

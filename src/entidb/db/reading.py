"""How a collection reads what another version of the program wrote: ``upgrade``, which makes the
new shape of an old one, and ``on_invalid``, which says what happens to what does not fit all the
same. Both belong to one opening of a collection and change nothing that is stored.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any, Final, Generic, Literal

from entidb import cbor
from entidb.db.listeners import check_arguments
from entidb.db.plain import Keep, PlainCodec, V, ValueCodec
from entidb.errors import CborEncodeError, ConfigError, ValueTypeError
from entidb.types import repr_of, uuid_from_bytes, uuids_from_bytes

#: From a stored value of any age to one of the newest shape.
Upgrade = Callable[[Any], Any]
#: Given the error and the stored value: what to read in its place, or None to leave it out.
Instead = Callable[[ValueTypeError, Any], Any]
OnInvalid = Literal["raise", "skip"] | Instead

_PLAIN: Final = PlainCodec()


class ReadingCodec(Generic[V]):
    """``codec``, behind ``upgrade`` for everything that is read, and with ``on_invalid``."""

    def __init__(
        self, codec: ValueCodec[V], upgrade: Upgrade | None, instead: Instead | None
    ) -> None:
        self.kind, self.stored_names = codec.kind, codec.stored_names
        self.instead = instead
        self.encode, self.make = codec.encode, codec.make
        self.keep: Keep | None = codec.keep
        self.upgraded: Callable[[bytes], bytes] | None = None
        self._codec = codec
        if upgrade is not None:
            self._upgrade = upgrade
            self.upgraded = self._upgraded
            if codec.keep is not None:
                self._keep_below, self.keep = codec.keep, self._keep

    def decode(self, payload: bytes) -> V:
        if self.upgraded is not None:
            payload = self.upgraded(payload)
        return self._codec.decode(payload)

    def patch(self, stored: bytes, changes: Mapping[str, Any]) -> bytes:
        if self.upgraded is not None:
            stored = self.upgraded(stored)
        return self._codec.patch(stored, changes)

    def _keep(self, payload: bytes, stored: bytes) -> bytes:
        # What ``upgrade`` takes out of the old shape is not unknown, it is gone.
        return self._keep_below(payload, self._upgraded(stored))

    def _upgraded(self, payload: bytes) -> bytes:
        return upgraded(self._upgrade, payload)


def upgraded(upgrade: Upgrade, payload: bytes) -> bytes:
    """The payload that ``upgrade`` makes of ``payload``. Raises ``ValueTypeError``."""
    try:
        made = upgrade(cbor.decode_trusted(payload))
    except Exception as error:
        raise _cannot_be_upgraded(f"upgrade raised {type(error).__name__}: {error}") from error
    if made is None:
        reason = "upgrade returned None: return the value, also one that stays as it is"
        raise _cannot_be_upgraded(reason)
    try:
        return _PLAIN.encode(made)
    except CborEncodeError as error:
        raise _cannot_be_upgraded(f"upgrade made what cannot be stored: {error}") from error


def _cannot_be_upgraded(reason: str) -> ValueTypeError:
    return ValueTypeError(f"the stored entity cannot be upgraded: {reason}", reason=reason)


def codec_reading(
    codec: ValueCodec[V], on_invalid: OnInvalid, upgrade: Upgrade | None
) -> ValueCodec[V]:
    """``codec`` for an opening with these two. Raises ``ConfigError`` for what they cannot be."""
    check_function("upgrade", upgrade, "the stored value")
    instead: Instead | None = None
    if on_invalid == "skip":
        instead = _nothing
    elif on_invalid != "raise":
        if not callable(on_invalid):
            raise ConfigError(
                f'on_invalid is "raise", "skip" or a function of the error and the stored value, '
                f"not {repr_of(on_invalid, 60)}"
            )
        check_function("on_invalid", on_invalid, "the error", "the stored value")
        instead = on_invalid
    if upgrade is None and instead is None:
        return codec
    return ReadingCodec(codec, upgrade, instead)


def check_function(name: str, given: object, *arguments: str) -> None:
    """Raises ``ConfigError`` for what is neither None nor a plain function of ``arguments``."""
    if given is None:
        return
    if not callable(given):
        raise ConfigError(f"{name} is a function, not {repr_of(given, 60)}")
    if inspect.iscoroutinefunction(given):
        raise ConfigError(f"{name} is an async function: give a plain one")
    check_arguments(given, name, arguments)


def _nothing(error: ValueTypeError, value: Any) -> None:
    return None


# ---------------------------------------------------------------- many at once

Pair = tuple[bytes, bytes]


def plain_values(
    ids: Sequence[uuid.UUID], payloads: Sequence[bytes | None]
) -> dict[uuid.UUID, Any]:
    """The plain values of the entities that have a payload, by their ids."""
    there: Sequence[bytes] = [payload for payload in payloads if payload is not None]
    if len(there) < len(payloads):
        ids = [one for one, payload in zip(ids, payloads, strict=True) if payload is not None]
    return dict(zip(ids, cbor.decode_all_trusted(there), strict=True))


def plain_pair(raw: bytes, payload: bytes) -> tuple[uuid.UUID, Any]:
    """The id and the plain value of one entity."""
    return uuid_from_bytes(raw), cbor.decode_trusted(payload)


def plain_pairs(page: Sequence[Pair]) -> Iterator[tuple[uuid.UUID, Any]]:
    """As ``plain_pair`` of each; a value is decoded when it is asked for, because it may be large,
    and one that cannot be decoded does not end the iterator."""
    ids = uuids_from_bytes([raw for raw, _ in page])
    return zip(ids, map(cbor.decode_trusted, [payload for _, payload in page]), strict=False)


class First(Generic[V]):
    """At most ``count`` of ``items``; unlike ``islice`` it goes on behind an error."""

    def __init__(self, items: Iterator[V], count: int) -> None:
        self._items = items
        self._left = count

    def __iter__(self) -> Iterator[V]:
        return self

    def __next__(self) -> V:
        if self._left <= 0:
            raise StopIteration
        item = next(self._items)
        self._left -= 1
        return item


def read_many(
    find: Callable[[int | None], Iterator[Pair]],
    limit: int | None,
    make: Callable[[bytes, bytes], V],
    make_or_none: Callable[[bytes, bytes], V | None] | None,
) -> Iterator[V]:
    """What ``make`` makes of each of ``find(limit)``. An iterator and no generator: one entity that
    raises does not end it, and ``next`` goes on behind that. With ``make_or_none`` instead, those
    it answers None for are left out, and do not count for ``limit``."""
    if make_or_none is None:
        return starmap(make, find(limit))
    found = filter(None, starmap(make_or_none, find(None)))
    return found if limit is None else First(found, limit)

"""Canonical CBOR: the one place that knows which bytes and values the project accepts.

The profile is DAG-CBOR without links: RFC 8949 deterministic encoding (section 4.2.1), text keys
sorted by length and then bytewise, shortest integers in -2^64 … 2^64-1, floats always 64 bits, no
NaN, no infinities, no -0.0, no tags, no indefinite lengths. One value has exactly one encoding, so
comparing bytes is comparing values (R24).

libipld does the work; this package closes the gaps between it (3.5.0) and the profile:

* a byte string that happens to parse as a content identifier (every twentieth UUIDv7 does) is
  written as a link, tag 42, and links are read as byte strings;
* -0.0 is written as 0.0 in silence;
* integers and lengths in a longer form than needed, and 32-bit floats, are read;
* libipld refuses a value that it cannot write, but does not say which part of it is at fault.

Each is looked for at the speed of C (a byte pattern, a comparison with the re-encoding), and only
a hit pays for a walk in Python. ``encoding`` writes, ``decoding`` reads, ``weight`` counts before
anything is built, ``faults`` says what is wrong and where, ``heads`` is for code that joins encoded
parts by hand. Records and messages are laid out elsewhere.
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from entidb.cbor.decoding import all_pass, check, decode, decode_all_trusted, decode_trusted
from entidb.cbor.encoding import encode, encode_message
from entidb.cbor.heads import array_head, bytes_head, map_head, text, uint
from entidb.cbor.weight import (
    ITEMS,
    containers_at_most,
    containers_in,
    containers_over,
    containers_together,
    heavier,
    too_much,
    weigh,
)


@runtime_checkable
class CborEncode(Protocol):
    """Something that turns itself into canonical CBOR."""

    def to_cbor(self) -> bytes:
        """One canonical item; raises ``CborEncodeError`` where the profile cannot say it."""
        ...


@runtime_checkable
class CborDecode(Protocol):
    """Something that can be made from canonical CBOR."""

    @classmethod
    def from_cbor(cls, data: bytes) -> Self:
        """The object that ``data`` encodes; raises ``CborDecodeError`` for anything that is not one
        canonical item of the right shape."""
        ...


__all__ = [
    "ITEMS",
    "CborDecode",
    "CborEncode",
    "all_pass",
    "array_head",
    "bytes_head",
    "check",
    "containers_at_most",
    "containers_in",
    "containers_over",
    "containers_together",
    "decode",
    "decode_all_trusted",
    "decode_trusted",
    "encode",
    "encode_message",
    "heavier",
    "map_head",
    "text",
    "too_much",
    "uint",
    "weigh",
]

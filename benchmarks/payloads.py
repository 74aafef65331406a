"""The entities that are measured: about 200 bytes of canonical CBOR, the same in every run."""

from __future__ import annotations

import random
import uuid
from typing import Any

from entidb import cbor
from entidb.types import IdSource, SystemClock

COLLECTION = "notes"

# fmt: off
_WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "juniper",
    "kelp", "lagoon", "maple", "north", "ochre", "pine", "quartz", "ridge", "slate", "tundra",
    "umber", "vale", "willow", "yarrow", "zephyr",
)
# fmt: on


def value(number: int) -> dict[str, Any]:
    """Entity number ``number``."""
    pick = random.Random(number)
    return {
        "title": f"{' '.join(pick.choices(_WORDS, k=5))} {number}",
        "done": bool(number & 1),
        "n": number,
        "tags": pick.sample(_WORDS, 3),
        "body": " ".join(pick.choices(_WORDS, k=20))[:100],
    }


def payload(number: int) -> bytes:
    return cbor.encode(value(number))


def ids(count: int, kind: str = "v7") -> list[bytes]:
    """``count`` ids: ``"v7"`` in the order they were made, ``"random"`` (version 4) in none."""
    if kind == "v7":
        source = IdSource(SystemClock())
        return [source.new_bytes() for _ in range(count)]
    pick = random.Random(count)
    return [uuid.UUID(int=pick.getrandbits(128), version=4).bytes for _ in range(count)]


def entities(count: int, kind: str = "v7") -> list[tuple[bytes, bytes]]:
    """``count`` pairs of id and payload."""
    return [(entity_id, payload(number)) for number, entity_id in enumerate(ids(count, kind))]

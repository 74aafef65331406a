"""How full a database of a server may get: in entities, and in bytes of its store.

What would go beyond it is refused, transaction by transaction, with the code ``over_quota``;
whatever takes no more room than there was before is accepted, so that a full database can be
emptied. It is asked for every push where it is configured, and costs nothing where it is not.

How large a store is is measured once a minute, because that may mean to read all of it. What pushes
add in between is counted in the store itself, in the commit that adds it: so it counts whichever
process or node of the server made that commit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Final

from entidb.db import Database
from entidb.db.records import META_FULLNESS, count_key, pack_u64, payload_of, unpack_u64
from entidb.db.writer import Writer
from entidb.server.config import ServerConfig
from entidb.server.work import Fault
from entidb.types import Clock

CODE: Final = "over_quota"
#: Seconds for which a measured size counts, with what was added since.
MEASURED_S: Final = 60.0

#: A write: the new payload, and what is stored now.
Write = tuple[bytes | None, bytes | None]


class Room:
    """What is left in one database for one commit. Negative: it is over its quota already."""

    def __init__(self, entities: int | None, size: int | None) -> None:
        self.entities = entities
        self.size = size

    def take(self, writes: Iterable[Write]) -> str | None:
        """Count what these add; the quota that has no room for it, and then nothing is counted."""
        added = grown = 0
        for payload, stored in writes:
            was = None if stored is None else payload_of(stored)
            added += (payload is not None) - (was is not None)
            grown += len(payload or b"") - len(was or b"")
        if self.entities is not None and added > 0 and added > self.entities:
            return "database_entities_max"
        if self.size is not None and grown > 0 and grown > self.size:
            return "database_bytes_max"
        if self.entities is not None:
            self.entities -= added
        if self.size is not None:
            self.size -= grown
        return None

    def take_each(self, writes: Iterable[Write]) -> bool:
        """Whether there is room for each of these transactions of one write, one after the other;
        then they count, else none does. What a later one frees makes no room for an earlier one."""
        after = Room(self.entities, self.size)
        if any(after.take([write]) is not None for write in writes):
            return False
        self.entities, self.size = after.entities, after.size
        return True


class Fullness:
    """Of one database. Called by its one writer only."""

    def __init__(self, config: ServerConfig, database: Database, clock: Clock) -> None:
        self._entities_max = config.database_entities_max
        self._bytes_max = config.database_bytes_max
        self._database = database
        self._clock = clock
        #: Whose commit the room is for; it goes with its commit.
        self._writer: Callable[[], Writer | None] = _nobody
        self._room = Room(None, None)
        #: The newest measure: on which head, what the store said of itself then, and what it was.
        self._measured: tuple[int, bytes | None, int] | None = None
        self._measured_at = 0.0
        #: Whether that was for the commit of now.
        self._is_new = False

    def room(self, writer: Writer) -> Room:
        """What is left for the commit of ``writer``, all of its pushes together."""
        if writer is not self._writer():
            self._writer, self._is_new = weakref.ref(writer), False
            self._room = Room(self._entities(writer), self._size(writer))
        return self._room

    def note(self, writer: Writer) -> None:
        """Have the commit of ``writer`` say how full the database is after it. What was measured is
        said in any case: others must not go by what was known before."""
        left, mine = self._room.size, writer is self._writer()
        if left is not None and mine and (self._is_new or not writer.is_empty):
            writer.put(META_FULLNESS, pack_u64(max(0, self._bytes_max - left)))

    def fault(self, quota: str) -> Fault:
        most = self._entities_max if quota == "database_entities_max" else self._bytes_max
        unit = "entities" if quota == "database_entities_max" else "bytes"
        return CODE, f"the database is full: it may hold {most:,} {unit} ({quota})"

    def _entities(self, writer: Writer) -> int | None:
        if not self._entities_max:
            return None
        numbers = [info.number for info in writer.catalogue.by_name.values() if info.synced]
        rows = writer.get_many([count_key(number) for number in numbers])
        return self._entities_max - sum(unpack_u64(row) for row in rows if row is not None)

    def _size(self, writer: Writer) -> int | None:
        if not self._bytes_max:
            return None
        head, said = writer.first_sequence, writer.get(META_FULLNESS)
        now, measured = self._clock.monotonic(), self._measured
        if measured is not None and now - self._measured_at < MEASURED_S:
            if measured[0] == head:
                return self._bytes_max - measured[2]  # nobody has committed since
            if said is not None and said != measured[1]:
                return self._bytes_max - unpack_u64(said)
        # Also where something was committed that counts nothing.
        used = self._database.storage.info().used_bytes
        self._measured, self._measured_at, self._is_new = (head, said, used), now, True
        return self._bytes_max - used


def _nobody() -> None:
    return None


def fullness_of(config: ServerConfig, database: Database, clock: Clock) -> Fullness | None:
    """None where a database may get as full as it likes."""
    if config.database_entities_max or config.database_bytes_max:
        return Fullness(config, database, clock)
    return None


__all__ = ["Fullness", "Room", "fullness_of"]

"""The storage seam: ordered bytes, one writer, snapshot readers. Promises only, no code.

A backend stores a sorted map from keys (1 to 511 bytes) to values (any bytes), and knows nothing
of entities. The seam speaks in batches, so that a backend can be fast without the layer above
knowing how. There is deliberately no write transaction that can be aborted: the layer above
stages everything in memory, decides there, and commits one finished batch. (Aborting an LMDB
write transaction waits for every reader of the process; and a batch that can be applied again is
what growing the map needs.)

Promises, each walked by ``entidb.testing.contracts.StorageContract``:

* ``commit`` is atomic and durable: after it returns, every change of the batch survives power
  loss; if it raises ``StorageFullError`` or ``StorageError``, none of them is visible, now or
  after a restart. ``CommitUnknownError`` is the one exception: the store is closed by it and the
  outcome is found out by opening it again.
* A snapshot never changes, whatever is committed after it was taken, and never blocks a commit.
* Commits are ordered: a snapshot that contains a commit contains all earlier ones.
* A value that cannot be proved to be the one written raises ``CorruptionError`` with its key; it
  is never returned.
* Snapshots may be taken from any thread; ``commit`` is called by one thread at a time (the
  database above holds its writer lock).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

KEY_BYTES_MAX: Final = 511

#: Changes of one commit: key to new value, or to None for "delete" (deleting what is not there
#: is allowed and does nothing).
Batch = Mapping[bytes, bytes | None]


class Snapshot(Protocol):
    """One unchanging view. Close it soon: an open snapshot keeps old pages from being reused."""

    def get(self, key: bytes) -> bytes | None:
        """The value at ``key`` or None."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values at ``keys``, position by position. Fastest when ``keys`` ascend."""
        ...

    def scan(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Up to ``limit`` pairs with ``start <= key < stop``, ascending, or descending from the
        end when ``reverse``. Callers page by the last key; nothing is held between calls."""
        ...

    def scan_keys(
        self,
        start: bytes,
        stop: bytes,
        *,
        limit: int | None = None,
        reverse: bool = False,
        proved: bool = False,
    ) -> list[bytes]:
        """As ``scan``, keys only. Their checksums are read only when ``proved``, which is fastest
        for empty values."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...

    def __enter__(self) -> Snapshot: ...

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class StorageInfo:
    """What ``inspect`` shows: sizes in bytes. ``used_bytes`` is what live records take, with all
    that the store needs to find them."""

    kind: str
    path: str | None
    file_bytes: int
    used_bytes: int
    map_bytes: int
    records: int
    readers: int


class Storage(Protocol):
    """An open store. See the module's promises."""

    def snapshot(self) -> Snapshot:
        """A view of everything committed so far.

        Raises ``DatabaseClosedError`` after ``close``, ``DatabaseForkedError`` in a forked child.
        """
        ...

    def commit(self, batch: Batch) -> None:
        """Apply ``batch`` atomically and durably. An empty batch does nothing.

        Raises ``StorageFullError`` (nothing changed), ``StorageError`` (nothing changed),
        ``CommitUnknownError`` (reopen to find out), ``DatabaseClosedError``,
        ``DatabaseForkedError``.
        """
        ...

    def verify(self) -> Iterator[str]:
        """Walk everything and yield one line per fault found; nothing when all is well."""
        ...

    def compact(self) -> None:
        """Give unused room back to the file system. Waits for open snapshots to close."""
        ...

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        """Write a consistent copy to the new directory ``path`` with ``changes`` applied to the
        copy only. Writers go on meanwhile. Raises ``StorageError`` if ``path`` exists."""
        ...

    def info(self) -> StorageInfo: ...

    def close(self) -> None:
        """Idempotent. Everything after it raises ``DatabaseClosedError``."""
        ...

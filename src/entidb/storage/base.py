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

Several **openers** may have one store open at once: processes, on some backends threads or nodes.
What one of them commits, all read. Three words and a fence keep them apart, and what is promised
of them is promised between all openers:

* **turn**: the exclusive right to commit. One opener has it; it is taken with a time limit, and
  ends by itself when its owner closes the store or is killed, in whatever way. Inside it the newest
  commit is visible: a snapshot taken in the turn stays the newest state until its owner commits.
* **mark**: a number of the state. A commit makes it greater by one; it never names two states, and
  no state has two. What the store does to its own files (``compact``) may make it greater too, and
  where the newest state may lack what was committed before, the mark is of another ``opening``. A
  snapshot knows the mark of what it shows. ``Storage.mark`` is read in microseconds, is never
  behind a commit that has returned, and may be ahead by one that is under way: then, and when
  that one fails, what was remembered counts as old for a moment and is read again. So what was
  read in a snapshot is the newest for as long as ``storage.mark() == snapshot.mark``.
* **wait**: comes back when the mark is another one.
* The **fence**: a commit that says after which mark it was decided is refused by the store itself,
  with ``CommitStaleError``, where another has come since. It is compared inside the commit, so
  that a turn which was lost without noticing does no harm.
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

    @property
    def mark(self) -> int:
        """The mark of the state that it shows; also when it is closed."""
        ...

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


#: Where the number of the opening begins in a mark: the bits below count commits.
OPENING_SHIFT: Final = 32


def opening_of(mark: int) -> int:
    """Which opening of a store ``mark`` is of. It is another one where the newest state may lack
    what was committed before, although the store stayed open here."""
    return mark >> OPENING_SHIFT


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


class StoreTurn(Protocol):
    """The turn of one opener, among all that have the store open. One thread of the opener at a
    time uses it (the database above holds its writer lock)."""

    def take(self, timeout_s: float | None = None) -> bool:
        """Wait until it is this opener's turn, without a bound when ``timeout_s`` is None; whether
        it is. Does nothing for the opener that has it. Call ``give_back`` whatever this raises."""
        ...

    def give_back(self) -> None:
        """Idempotent, and may be repeated when it was interrupted."""
        ...

    @property
    def mine(self) -> bool:
        """Whether this opener has the turn."""
        ...

    def holder(self) -> str:
        """Who has it, in words for a message: ``process 4711``; empty if it is unknown."""
        ...


class Storage(Protocol):
    """An open store. See the module's promises."""

    @property
    def turn(self) -> StoreTurn: ...

    def claim(self, name: str) -> StoreTurn:
        """As ``turn``, for another right that one opener has at a time: ``name`` says which, in
        letters. Each call makes an object of its own, and one of them has the right. Unlike the
        turn it may be used by several threads at the same time."""
        ...

    @property
    def shared(self) -> bool:
        """Whether others may commit to it while it is open here."""
        ...

    def mark(self) -> int:
        """The mark of the newest state; see the module. Raises ``DatabaseClosedError``,
        ``DatabaseForkedError``."""
        ...

    def wait(self, mark: int, timeout_s: float) -> bool:
        """Wait until the mark is not ``mark``, at most ``timeout_s``; whether it is another one.
        Raises as ``mark``."""
        ...

    def snapshot(self) -> Snapshot:
        """A view of everything committed so far.

        Raises ``DatabaseClosedError`` after ``close``, ``DatabaseForkedError`` in a forked child.
        """
        ...

    def commit(self, batch: Batch, after: int | None = None) -> int:
        """Apply ``batch`` atomically and durably, in this opener's turn, which is taken for it
        if it has not got it; the mark of the state that this makes. An empty batch does nothing.

        ``after`` is the mark of the state on which ``batch`` was decided: ``CommitStaleError``
        (nothing changed) if that is not the newest. Raises ``StorageFullError`` (nothing changed),
        ``StorageError`` (nothing changed), ``CommitUnknownError`` (reopen to find out),
        ``DatabaseClosedError``, ``DatabaseForkedError``.
        """
        ...

    def verify(self) -> Iterator[str]:
        """Walk everything and yield one line per fault found; nothing when all is well."""
        ...

    def compact(self) -> None:
        """Give unused room back to the file system. Waits for open snapshots to close, and for
        other openers; ``DatabaseLockedError`` says who they are if they stay. Afterwards no bytes
        of what was deleted are left, but in what the store names in ``left_by_compact``, where it
        has that."""
        ...

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        """Write a consistent copy to the new directory ``path`` with ``changes`` applied to the
        copy only. Writers go on meanwhile. Raises ``StorageError`` if ``path`` exists."""
        ...

    def info(self) -> StorageInfo: ...

    def close(self) -> None:
        """Idempotent. Everything after it raises ``DatabaseClosedError``."""
        ...

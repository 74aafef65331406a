"""Reading: one read transaction, each value proved by its checksum before it is returned.

Not here: beginning and ending a transaction (``store``, ``gate``).
"""

from __future__ import annotations

import contextlib
import struct
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final, NoReturn

import lmdb
from msgspec import Struct

from entidb.errors import CorruptionError, DatabaseClosedError, StorageError
from entidb.storage.base import KEY_BYTES_MAX
from entidb.storage.checksums import RESIDUE, U32
from entidb.storage.crc import crc32
from entidb.storage.lmdb.failures import storage_error
from entidb.storage.lmdb.gate import CLOSED, DRAINING, SHED_EVERY_ROWS, Gate, Reader
from entidb.storage.picking import Picked, Picks

#: Records between two looks at ``stop``: small ranges do not read far over their end.
_SCAN_CHUNK_FIRST: Final = 32
SCAN_CHUNK_MAX: Final = 4096
#: So many keys that are looked up together may be neighbours, which costs one look to find out.
_WALK_FROM: Final = 32
#: What an empty value takes with its checksum.
_LENGTHS_OF_NOTHING: Final = {U32.size}


class LmdbSnapshot(Struct, eq=False, weakref=True):
    """A read transaction. May be used and closed from any thread, by one thread at a time."""

    #: A store that is forgotten closes itself, which it must not while this is in use.
    _store: object
    _gate: Gate
    _reader: Reader
    mark: int

    def get(self, key: bytes) -> bytes | None:
        reader = self._reader
        try:
            reader.busy = True
            if self._gate.level > DRAINING:
                self._step_aside()
            stored: bytes | None = reader.txn.get(key)
            reader.busy = False
        except BaseException as error:
            reader.busy = False
            if isinstance(error, lmdb.BadValsizeError):
                return None  # A key that LMDB refuses cannot be there.
            self._explain(error)
            raise
        if stored is None:
            return None
        if crc32(key + stored) != RESIDUE:
            raise self._corrupt(key)
        return stored[:-4]

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        reader = self._reader
        try:
            reader.busy = True
            if self._gate.level > DRAINING:
                self._step_aside()
            txn = reader.txn
            found: list[Any] = _walk(txn.cursor(), keys) if len(keys) >= _WALK_FROM else []
            # One by one takes less than ``getmulti``, which makes a pair of each.
            found.extend(map(txn.get, keys[len(found) :] if found else keys))
            reader.busy = False
        except BaseException as error:
            reader.busy = False
            if isinstance(error, lmdb.BadValsizeError):
                return [self.get(key) for key in keys]
            self._explain(error)
            raise
        self._gate.touched += len(found)
        return [
            None
            if stored is None
            else stored[:-4]
            if crc32(key + stored) == RESIDUE
            else self._raise_corrupt(key)
            for key, stored in zip(keys, found, strict=True)
        ]

    def scan(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        pairs = self.entries(start, stop, limit, reverse, values=True)
        return [
            (
                key,
                stored[:-4] if crc32(key + stored) == RESIDUE else self._raise_corrupt(key),
            )
            for key, stored in pairs
        ]

    def pick(self, start: bytes, stop: bytes, limit: int, picks: Picks) -> Picked:
        """See ``PickingSnapshot``. ``picks`` sees values that end with their checksums."""
        pairs = self.entries(start, stop, limit, False, values=True)
        if list(map(crc32, map(b"".join, pairs))).count(RESIDUE) != len(pairs):
            self.scan(start, stop, limit=limit)  # raises, and says which
        found = [pairs[at] for at in picks([stored for _, stored in pairs])]
        last = pairs[-1][0] if len(pairs) == limit else None
        return [(key, stored[:-4]) for key, stored in found], last

    def scan_keys(
        self,
        start: bytes,
        stop: bytes,
        *,
        limit: int | None = None,
        reverse: bool = False,
        proved: bool = False,
    ) -> list[bytes]:
        found = self.entries(start, stop, limit, reverse, values=proved)
        if not proved:
            return found
        keys = [key for key, _ in found]
        stored = [value for _, value in found]
        # Of an empty value nothing is stored but its checksum, so all are compared at once.
        if set(map(len, stored)) != _LENGTHS_OF_NOTHING or (
            struct.pack(f"<{len(keys)}I", *map(crc32, keys)) != b"".join(stored)
        ):
            for key, value in found:
                if crc32(key + value) != RESIDUE:
                    raise self._corrupt(key)
        return keys

    def close(self) -> None:
        reader = self._reader
        try:
            if reader.txn is not None:
                self._gate.end(reader)
        except BaseException:
            self._gate.end(reader)
            raise

    def __enter__(self) -> LmdbSnapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._reader.txn is not None:
            self.close()

    def entries(
        self, start: bytes, stop: bytes, limit: int | None, reverse: bool, *, values: bool
    ) -> list[Any]:
        if start >= stop or (limit is not None and limit <= 0):
            return []
        reader = self._reader
        left = sys.maxsize if limit is None else limit
        found: list[Any] = []
        chunk_size = _SCAN_CHUNK_FIRST
        entries: Iterator[Any] | None = None
        while left > 0:
            # Between two chunks, so that a long scan does not keep a waiting writer out.
            asked = min(left, chunk_size)
            try:
                reader.busy = True
                if self._gate.level > DRAINING:
                    self._step_aside()
                if entries is None:
                    entries = _entries(reader.txn.cursor(), start, stop, reverse, values)
                chunk = list(islice(entries, asked))
                reader.busy = False
            except BaseException as error:
                reader.busy = False
                self._explain(error)
                raise
            if chunk and not found:
                first = chunk[0][0] if values else chunk[0]
                if first >= stop if reverse else first < start:
                    # A damaged page can lead to an older copy of another, sound in itself.
                    self._gate.doubtful = True
                    raise CorruptionError(
                        f"looking for {start.hex()} in {self._gate.path} finds {first.hex()}: the "
                        "file is damaged; run verify, and restore a backup"
                    )
            inside = _count_inside(chunk, start, stop, reverse, values)
            found += chunk if inside == len(chunk) else chunk[:inside]
            if inside < asked:
                break
            self._gate.touched += inside
            if self._gate.touched > SHED_EVERY_ROWS:
                # A snapshot may be read from for long, as ``verify`` does.
                with self.inside():
                    self._gate.shed()
            left -= inside
            chunk_size = min(chunk_size * 4, SCAN_CHUNK_MAX)
        return found

    def _corrupt(self, key: bytes) -> CorruptionError:
        self._gate.doubtful = True
        return CorruptionError(
            f"the record at key {key.hex()} fails its checksum; it was not returned. "
            "Run verify, and restore a backup"
        )

    def _raise_corrupt(self, key: bytes) -> NoReturn:
        raise self._corrupt(key)

    @contextlib.contextmanager
    def inside(self) -> Iterator[Any]:
        """For calls off the hot paths: the transaction, marked as in use."""
        reader = self._reader
        try:
            reader.busy = True
            if self._gate.level > DRAINING:
                self._step_aside()
            yield reader.txn
        except lmdb.Error as error:
            reader.busy = False
            self._explain(error)
            raise
        finally:
            reader.busy = False

    def transaction_number(self) -> int:
        with self.inside() as txn:
            number: int = txn.id()
        return number

    def _step_aside(self) -> None:
        """Out of LMDB until the gate allows it again, and then marked as in it."""
        while self._gate.level > DRAINING:
            self._reader.busy = False
            self._gate.wait_for()
            self._reader.busy = True

    def _explain(self, error: BaseException) -> None:
        """Raise ours for what LMDB raised. Anything else is the caller's to raise: from here it
        would keep itself alive, and everything it came through."""
        if not isinstance(error, (lmdb.Error, AttributeError)):
            return
        if self._reader.txn is None and self._gate.level < CLOSED:
            raise DatabaseClosedError("this snapshot is closed; take a new one") from error
        if self._gate.level >= CLOSED:
            self._gate.wait_for()
        if isinstance(error, AttributeError):
            return
        if "closed/deleted/dropped" in str(error):
            raise StorageError(
                "the store was opened again after a failed commit; take a new snapshot"
            ) from error
        self._gate.doubtful = True
        raise storage_error(error, f"reading {self._gate.path}") from error


def _entries(cursor: Any, start: bytes, stop: bytes, reverse: bool, values: bool) -> Iterator[Any]:
    if not reverse:
        if not _seek(cursor, start):
            return iter(())
        forward: Iterator[Any] = cursor.iternext(keys=True, values=values)
        return forward
    # The cursor goes one before the first key that is not below ``stop``.
    if not (cursor.prev() if _seek(cursor, stop) else cursor.last()):
        return iter(())
    backward: Iterator[Any] = cursor.iterprev(keys=True, values=values)
    return backward


def _walk(cursor: Any, keys: Sequence[bytes]) -> list[Any]:
    """The values of ``keys`` as far as they follow each other, as those do that were written in
    the order of their keys: going on costs less than looking up. Ends at the first entry that is
    another, because those behind it may be many and large."""
    found: list[Any] = []
    if cursor.set_key(keys[0]):
        for key, (there, value) in zip(keys, cursor.iternext(), strict=False):
            if there != key:
                break
            found.append(value)
    return found


def _seek(cursor: Any, bound: bytes) -> bool:
    """Put the cursor on the first key that is not below ``bound``, which may be of any length."""
    if not cursor.set_range(bound[:KEY_BYTES_MAX]):
        return False
    if len(bound) > KEY_BYTES_MAX and cursor.key() == bound[:KEY_BYTES_MAX]:
        return bool(cursor.next())
    return True


def _count_inside(chunk: list[Any], start: bytes, stop: bytes, reverse: bool, values: bool) -> int:
    """How many entries of ``chunk`` lie in the range: all, or those up to its far end."""
    if not chunk:
        return 0
    last = chunk[-1][0] if values else chunk[-1]
    if start <= last < stop:
        return len(chunk)
    keys = [entry[0] for entry in chunk] if values else chunk
    if reverse:
        keys = keys[::-1]
        return len(keys) - bisect_left(keys, start)
    return bisect_left(keys, stop)


def record_faults(snapshot: LmdbSnapshot) -> Iterator[str]:
    """Walk all records of ``snapshot``, whose pages are sound; a line for each fault."""
    start, stop = b"", b"\xff" * (KEY_BYTES_MAX + 1)
    count = 0
    while page := snapshot.entries(start, stop, SCAN_CHUNK_MAX, False, values=True):
        with snapshot.inside() as txn:
            looked_up = dict(txn.cursor().getmulti([key for key, _ in page]))
        previous = b""
        for key, stored in page:
            if crc32(key + stored) != RESIDUE:
                yield f"record {key.hex()}: checksum does not match"
            if key <= previous or key < start:
                yield f"record {key.hex()}: out of order, the walk ended early"
                return
            if looked_up.get(key) != stored:
                yield f"record {key.hex()}: found by walking, not by looking it up"
            previous = key
        count += len(page)
        start = previous + b"\0"
    with snapshot.inside() as txn:
        entries = txn.stat()["entries"]
    if entries != count:
        yield f"the file counts {entries} records, walking finds {count}"

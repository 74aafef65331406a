"""The store on disk: LMDB, with its traps closed.

A store is a directory with ``data.mdb`` (the records), ``lock.mdb`` (LMDB's table of readers) and
``entidb.lock``. That one process, and one object in it, has it is ``place``'s. Each record's value
ends with a CRC-32 over key and value, because LMDB does not notice a flipped bit.

Python's LMDB makes aborting a write transaction wait until no thread is inside an LMDB call, and
growing the map, or closing, takes the ground from under every open snapshot. So a batch is complete
before its transaction begins, and the few things that need readers out of the way go through the
*gate*: a level that every reader looks at (one attribute) before it calls LMDB.

Not here: what keys and values mean, and the record with EntiDB's own format version (``db``).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import sys
import time
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NoReturn
from zlib import crc32

import lmdb

from entidb.errors import (
    CommitUnknownError,
    CorruptionError,
    DatabaseClosedError,
    DatabaseForkedError,
    DatabaseMovedError,
    EntiDBError,
    FormatError,
    StorageError,
    StorageFullError,
)
from entidb.storage.base import KEY_BYTES_MAX, Batch, StorageInfo
from entidb.storage.disk_errors import address_space_limit, disk_error, short_write_error
from entidb.storage.lmdb_file import check_data_file, write_headers_again
from entidb.storage.lmdb_pages import (
    check_headers,
    closed_file_faults,
    damaged_file,
    page_faults,
    read_header,
    read_raw_headers,
)
from entidb.storage.partial import Partial, remove_dead
from entidb.storage.place import DATA as _DATA
from entidb.storage.place import (
    LMDB_LOCK,
    LOCK,
    TEMPORARY,
    Place,
    is_closed,
    make_directory,
    restrict,
    sync_names,
    sync_path,
    take_place,
)
from entidb.storage.resident import shed
from entidb.storage.turns import Turn, Turns

#: Room in a new map beside twice the file: virtual, but of 2**47 bytes that a process has. So many
#: databases can be open, and the map of few has to grow while somebody reads.
MAP_ROOM_BYTES: Final = 4 * 2**30
#: Of a limit on address space, the part that one database takes to begin with.
_MAP_SHARE: Final = 2048
MAP_BYTES_MAX: Final = 2**46
_MAP_BYTES_MIN: Final = 2**20
#: LMDB's own bound on a value is 4 GiB; this one leaves room for the checksum on any system.
_VALUE_BYTES_MAX: Final = 2**31 - 16
_READERS_MAX: Final = 512
#: Seconds a commit waits for open snapshots when the map must grow.
_DRAIN_SECONDS: Final = 5.0
#: Seconds a reader waits at the gate; longer than any drain, so that a drain ends first.
_GATE_SECONDS: Final = 60.0
#: Seconds between two looks at the gate, or at who is still before it.
_GATE_LOOK_SECONDS: Final = 0.001
#: Rows read or written between two looks at how much of the file is resident.
_SHED_EVERY_ROWS: Final = 20_000
#: Commits, and rows of one, between two looks at whether the map should grow.
_ROOM_EVERY_COMMITS: Final = 64
_ROOM_EVERY_ROWS: Final = 1000
#: How to ask for address space and nothing else.
_ASIDE: Final[dict[str, int]] = (
    {}
    if sys.platform == "win32"
    else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, "prot": mmap.PROT_READ}
)
#: Doublings of the map within one commit.
_GROWTHS_MAX: Final = 26
#: Records between two looks at ``stop``: small ranges do not read far over their end.
_SCAN_CHUNK_FIRST: Final = 32
_SCAN_CHUNK_MAX: Final = 4096
#: So many keys that are looked up together may be neighbours, which costs one look to find out.
_WALK_FROM: Final = 32

#: What a row takes of a page beside key and value: LMDB's head of a row (8) and its place (2), our
#: checksum (4), and half of the page's own head (8).
_ROW_OVERHEAD_BYTES: Final = 22

#: CRC-32 of anything followed by its own CRC-32, little-endian: one call proves a record.
_RESIDUE: Final = 0x2144DF1C

# Levels of the gate. Readers compare with these, so their order matters.
_OPEN: Final = 0
_DRAINING: Final = 1  # no new snapshots; open ones go on
_FROZEN: Final = 2  # no call into LMDB
_CLOSED: Final = 3
_FORKED: Final = 4

_U32: Final = struct.Struct("<I")
#: Files that were looked at and not opened since, as they were then, and their faults.
_LOOKED: Final[dict[str, tuple[tuple[int, ...], list[str]]]] = {}
_LOOKED_MAX: Final = 4096
_FAULTS_KEPT: Final = 10

#: What an empty value takes with its checksum.
_LENGTHS_OF_NOTHING: Final = {_U32.size}

#: How LMDB's errors leave this module; the first match counts. Others are the system's.
_ERRORS: Final[tuple[tuple[type[Exception], type[StorageError], str], ...]] = (
    (lmdb.MapFullError, StorageFullError, "the map is full; open with a larger map_bytes"),
    (lmdb.ReadersFullError, StorageError, "too many open snapshots; close them sooner"),
    (lmdb.CorruptedError, CorruptionError, "the file is damaged; restore a backup"),
    (lmdb.PageNotFoundError, CorruptionError, "the file is damaged; restore a backup"),
    (lmdb.InvalidError, FormatError, "not a database; check the path"),
    (lmdb.VersionMismatchError, FormatError, "another LMDB format; check the path"),
)
#: What LMDB's errors for what the system says are called where they carry no number.
_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (lmdb.DiskError, errno.ENOSPC),
    (lmdb.ReadonlyError, errno.EACCES),
    (lmdb.MemoryError, errno.ENOMEM),
)


def _storage_error(error: Exception, doing: str) -> StorageError:
    """Ours for what LMDB or the system raised. Their words do not go with it: they stand in what
    it is raised from."""
    if isinstance(error, EntiDBError):
        kind_of = type(error) if isinstance(error, StorageError) else StorageError
        return kind_of(f"{doing}: {error}", code=error.code)
    for kind, ours, hint in _ERRORS:
        if isinstance(error, kind):
            return ours(f"{doing}: {hint}")
    code = _code(error)
    if code:
        return disk_error(code, doing)
    return StorageError(
        f"{doing}: this failed inside LMDB; run verify, and report it if all is well"
    )


def _code(error: Exception) -> int:
    """The system's number for ``error``, 0 if it has none."""
    number = getattr(error, "errno", None) or getattr(error, "code", None)
    if isinstance(number, int) and number > 0:
        return number
    return next((code for kind, code in _CODES if isinstance(error, kind)), 0)


# ---------------------------------------------------------------- snapshots


@contextlib.contextmanager
def _foreign_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except (OSError, lmdb.Error) as error:
        raise _storage_error(error, doing) from error


class _Reader:
    """What the store knows of an open snapshot. ``busy`` is set around every call into LMDB:
    closing an environment under a thread that is inside one is a segmentation fault. It is taken
    back in an ``except`` clause and not in ``finally``, which an interrupt can keep from starting:
    a reader that stayed busy would be waited for without end."""

    __slots__ = ("busy", "txn")

    def __init__(self) -> None:
        self.busy = False
        self.txn: Any = None


class LmdbSnapshot:
    """A read transaction. May be used and closed from any thread, by one thread at a time."""

    __slots__ = ("__weakref__", "_reader", "_store")

    def __init__(self, store: LmdbStorage, reader: _Reader) -> None:
        self._store = store
        self._reader = reader

    def get(self, key: bytes) -> bytes | None:
        reader = self._reader
        try:
            reader.busy = True
            if self._store._gate > _DRAINING:
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
        if crc32(stored, crc32(key)) != _RESIDUE:
            raise self._corrupt(key)
        return stored[:-4]

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        reader = self._reader
        try:
            reader.busy = True
            if self._store._gate > _DRAINING:
                self._step_aside()
            cursor = reader.txn.cursor()
            found = _walk(cursor, keys) if len(keys) >= _WALK_FROM else []
            if len(found) < len(keys):
                found += cursor.getmulti(keys[len(found) :] if found else keys)
            reader.busy = False
        except BaseException as error:
            reader.busy = False
            if isinstance(error, lmdb.BadValsizeError):
                return [self.get(key) for key in keys]
            self._explain(error)
            raise
        self._store._touched += len(found)
        if not found:
            return [None] * len(keys)
        # LMDB leaves out what is not there, so positions agree only when nothing is missing.
        if len(found) == len(keys):
            return [
                stored[:-4] if crc32(stored, crc32(key)) == _RESIDUE else self._raise_corrupt(key)
                for key, stored in found
            ]
        values = {
            key: stored[:-4] if crc32(stored, crc32(key)) == _RESIDUE else self._raise_corrupt(key)
            for key, stored in found
        }
        return list(map(values.get, keys))

    def scan(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        pairs = self._range(start, stop, limit, reverse, values=True)
        return [
            (
                key,
                stored[:-4] if crc32(stored, crc32(key)) == _RESIDUE else self._raise_corrupt(key),
            )
            for key, stored in pairs
        ]

    def scan_keys(
        self,
        start: bytes,
        stop: bytes,
        *,
        limit: int | None = None,
        reverse: bool = False,
        proved: bool = False,
    ) -> list[bytes]:
        found = self._range(start, stop, limit, reverse, values=proved)
        if not proved:
            return found
        keys = [key for key, _ in found]
        stored = [value for _, value in found]
        # Of an empty value nothing is stored but its checksum, so all are compared at once.
        if set(map(len, stored)) != _LENGTHS_OF_NOTHING or (
            struct.pack(f"<{len(keys)}I", *map(crc32, keys)) != b"".join(stored)
        ):
            for key, value in found:
                if crc32(value, crc32(key)) != _RESIDUE:
                    raise self._corrupt(key)
        return keys

    def close(self) -> None:
        reader = self._reader
        if reader.txn is not None:
            self._store._release(reader)

    def __enter__(self) -> LmdbSnapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            reader = self._reader
        except AttributeError:
            return  # Interrupted while it was made.
        if reader.txn is not None:
            self._store._release(reader)

    def _range(
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
                if self._store._gate > _DRAINING:
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
                    self._store._doubtful = True
                    raise CorruptionError(
                        f"looking for {start.hex()} in {self._store.path} finds {first.hex()}: the "
                        "file is damaged; run verify, and restore a backup"
                    )
            inside = _count_inside(chunk, start, stop, reverse, values)
            found += chunk if inside == len(chunk) else chunk[:inside]
            if inside < asked:
                break
            self._store._touched += inside
            left -= inside
            chunk_size = min(chunk_size * 4, _SCAN_CHUNK_MAX)
        return found

    def _corrupt(self, key: bytes) -> CorruptionError:
        self._store._doubtful = True
        return CorruptionError(
            f"the record at key {key.hex()} fails its checksum; it was not returned. "
            "Run verify, and restore a backup"
        )

    def _raise_corrupt(self, key: bytes) -> NoReturn:
        raise self._corrupt(key)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[Any]:
        """For calls off the hot paths: the transaction, marked as in use."""
        reader = self._reader
        try:
            reader.busy = True
            if self._store._gate > _DRAINING:
                self._step_aside()
            yield reader.txn
        except lmdb.Error as error:
            reader.busy = False
            self._explain(error)
            raise
        finally:
            reader.busy = False

    def _transaction_number(self) -> int:
        with self._inside() as txn:
            number: int = txn.id()
        return number

    def _step_aside(self) -> None:
        """Out of LMDB until the gate allows it again, and then marked as in it."""
        while self._store._gate > _DRAINING:
            self._reader.busy = False
            self._store._pass_gate()
            self._reader.busy = True

    def _explain(self, error: BaseException) -> None:
        """Raise ours for what LMDB raised. Anything else is the caller's to raise: from here it
        would keep itself alive, and everything it came through."""
        if not isinstance(error, (lmdb.Error, AttributeError)):
            return
        if self._reader.txn is None and self._store._gate < _CLOSED:
            raise DatabaseClosedError("this snapshot is closed; take a new one") from error
        if self._store._gate >= _CLOSED:
            self._store._pass_gate()
        if isinstance(error, AttributeError):
            return
        if "closed/deleted/dropped" in str(error):
            raise StorageError(
                "the store was opened again after a failed commit; take a new snapshot"
            ) from error
        self._store._doubtful = True
        raise _storage_error(error, f"reading {self._store.path}") from error


def _is_over(txn: Any) -> bool:
    try:
        txn.id()
    except lmdb.Error:
        return True
    return False


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


def _walk(cursor: Any, keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The entries of ``keys`` as far as they stand one behind the other, as those do that were
    written in the order of their keys: going on costs less than looking up. Ends at the first
    entry that is another, because those behind it may be many and large."""
    found: list[tuple[bytes, bytes]] = []
    if cursor.set_key(keys[0]):
        for key, entry in zip(keys, cursor.iternext(keys=True, values=True), strict=False):
            if entry[0] != key:
                break
            found.append(entry)
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


# ---------------------------------------------------------------- the store


class LmdbStorage:
    """An open store on disk. Made by ``open``."""

    #: Contracts ask this: it has files, so ``backup`` works and it can be opened again.
    supports_files: Final = True

    def __init__(
        self,
        path: str,
        place: Place,
        map_bytes: int,
        drain_seconds: float,
        read_only: bool = False,
    ) -> None:
        self._made = False
        self.path = path
        self._place = place
        self._read_only = read_only
        self._drain_seconds = drain_seconds
        self._turns = Turns()
        self._gate = _OPEN
        #: Open snapshots. Adding to a set and discarding from it is atomic; a lock would cost
        #: more than LMDB does.
        self._readers: set[_Reader] = set()
        #: Transactions of snapshots that were closed while LMDB was out of bounds.
        self._orphans: list[Any] = []
        #: 0 until the file has been looked at.
        self._map_bytes = map_bytes
        self._commits = 0
        #: Rows read and written since it was looked how much of the file is resident.
        self._touched = 0
        #: Whether something came up that may come from a damaged page: then the next one looks.
        self._doubtful = False
        self._env: Any = None
        self._begin: Callable[[], Any] = self._refuse_begin
        self._open_environment()
        _STORES.add(self)
        #: Whether somebody has to close it.
        self._made = True

    @staticmethod
    def closed_faults(path: str | os.PathLike[str]) -> list[str]:
        """What is wrong with the pages of the store in ``path``, found without mapping it: a
        damaged page can end the process that reads it through LMDB. Empty when all is well, or
        when there is no store.

        Raises ``DatabaseLockedError`` if it is open, here or in another process, ``FormatError``
        if the file is not a store at all."""
        where = os.path.abspath(os.fspath(path))
        data = os.path.join(where, _DATA)
        if not os.path.exists(data):
            return []
        try:
            place = take_place(where, read_only=True)
        except OSError as error:
            raise _storage_error(error, f"checking {where}") from error
        try:
            check_data_file(data)
            faults = closed_file_faults(data)
            if not faults:
                place.leave_as_found()
            return faults
        finally:
            place.release()

    @staticmethod
    def doubtful_bytes(path: str | os.PathLike[str]) -> int:
        """How many bytes opening the store in ``path`` would read to see that it is well; 0 if
        none, or if there is no store. Cheap, and a hint: nothing is locked."""
        where = os.path.abspath(os.fspath(path))
        data = os.path.join(where, _DATA)
        try:
            known = _LOOKED.get(data)
            if known is not None and known[0] == _state_of(data):
                return 0
            return 0 if is_closed(where, read_raw_headers(data)[0]) else os.path.getsize(data)
        except OSError:
            return 0

    @staticmethod
    def look(path: str | os.PathLike[str]) -> None:
        """Read the store in ``path`` as opening it would, so that opening need not: for doing it
        somewhere else. What is found is what opening raises, as long as the file is the same."""
        where = os.path.abspath(os.fspath(path))
        with contextlib.suppress(OSError):
            _known_faults(os.path.join(where, _DATA))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        map_bytes: int | None = None,
        drain_seconds: float = _DRAIN_SECONDS,
        salvage: bool = False,
        read_only: bool = False,
    ) -> LmdbStorage:
        """Open the store in the directory ``path``, for this object alone.

        With ``create`` a missing or empty directory becomes an empty store (directory 0700,
        files 0600). ``map_bytes`` bounds the size until a commit doubles it, by default what the
        file has and as much again, and some GiB where address space has no limit; less is mapped
        where the system allows less. ``drain_seconds`` is how long a commit that must grow the map
        waits for open snapshots.

        A file that was not closed, or was changed since, is looked at before it is mapped: every
        page that can be reached is read once. ``salvage`` opens one with damaged pages too, to
        save what can still be read; a damaged page may end the process.

        ``read_only`` makes and changes no file, so it also works where nothing can be written, and
        beside others who only read (not on Windows).

        Raises ``DatabaseLockedError`` if it is open already, here or in another process;
        ``FormatError`` (``not_a_database``, ``truncated``) if something else stands there, which
        is not touched; ``CorruptionError`` for damaged pages, likewise; ``StorageError``. Not for
        network file systems.
        """
        where = os.path.abspath(os.fspath(path))
        data = os.path.join(where, _DATA)
        _check_directory(where, create and not read_only)
        try:
            if os.path.exists(data):
                check_data_file(data)
            place = take_place(where, read_only)
        except OSError as error:
            raise _storage_error(error, f"opening {where}") from error
        try:
            if not read_only:
                place.remove_temporary()
            if os.path.exists(data):
                place.hold_data()
                check_data_file(data)
                _check_closed(place, salvage, read_only)
            else:
                _create(place)
            size = 0 if map_bytes is None else max(map_bytes, _MAP_BYTES_MIN)
            store = cls(where, place, size, drain_seconds, read_only)
            store._doubtful = salvage
            return store
        except OSError as error:
            place.release()
            raise _storage_error(error, f"opening {where}") from error
        except BaseException:
            place.release()
            raise

    # ---- reading

    def snapshot(self) -> LmdbSnapshot:
        reader = _Reader()
        try:
            while True:
                if self._gate:
                    self._pass_gate(_OPEN)
                # Announced first, then looked again: either this reader sees the gate move, or
                # who moves it sees this reader.
                reader.busy = True
                self._readers.add(reader)
                if self._gate == _OPEN:
                    break
                reader.busy = False
                self._readers.discard(reader)
            reader.txn = self._begin()
            reader.busy = False
            return LmdbSnapshot(self, reader)
        except BaseException as error:
            self._end(reader)
            if not isinstance(error, lmdb.Error):
                raise
            if self._gate >= _CLOSED:
                self._pass_gate()
            raise _storage_error(error, f"reading {self.path}") from error

    def _release(self, reader: _Reader) -> None:
        # In a forked child the transaction is the parent's, and is kept alive for good.
        if self._gate == _FORKED:
            return
        try:
            self._end(reader)
        except BaseException:
            self._end(reader)
            raise

    def _end(self, reader: _Reader) -> None:
        """May be repeated, and has to be when it was interrupted."""
        reader.busy = True
        if self._touched > _SHED_EVERY_ROWS and self._gate <= _DRAINING:
            # The map cannot move while a reader is open and busy.
            self._touched = 0
            shed(os.path.join(self.path, _DATA))
        txn = reader.txn
        if txn is not None:
            if self._gate > _DRAINING:
                # Whoever froze the gate ends it; waiting here could be waiting for this very
                # thread, because the collector closes forgotten snapshots wherever it runs.
                self._orphans.append(txn)
            else:
                txn.abort()
            reader.txn = None
        reader.busy = False
        self._readers.discard(reader)

    # ---- writing

    def commit(self, batch: Batch) -> None:
        puts, deletes = _stage(batch)
        if self._gate >= _CLOSED:
            self._pass_gate()
        if not batch:
            return
        # As ``hold``, and faster than a block.
        turn = Turn()
        try:
            self._turns.take(turn)
            self._commit(puts, deletes)
            self._turns.give_back(turn)
        except BaseException:
            self._turns.give_back(turn)
            raise

    def _commit(self, puts: list[tuple[bytes, bytes]], deletes: list[bytes]) -> None:
        if self._gate:
            self._find_gate_open()
        if self._read_only:
            raise self._no_writing()
        self._place.check()
        for _ in range(_GROWTHS_MAX):
            try:
                self._write(puts, deletes)
                break
            except lmdb.MapFullError:
                self._grow(sum(len(key) + len(value) for key, value in puts))
            except lmdb.Error as error:
                self._doubtful = True
                raise self._commit_failure(error, f"writing {self.path}") from error
        else:
            raise StorageFullError(f"the batch does not fit into {self.path}; make it smaller")
        rows = len(puts) + len(deletes)
        self._touched += rows
        self._commits += 1
        if self._commits % _ROOM_EVERY_COMMITS == 0 or rows > _ROOM_EVERY_ROWS:
            self._grow_early()

    def _write(self, puts: list[tuple[bytes, bytes]], deletes: list[bytes]) -> None:
        txn, committed_before = None, None
        try:
            txn = self._env.begin(write=True)
            for key in deletes:
                txn.delete(key)
            txn.cursor().putmulti(puts)
            committed_before = txn.id() - 1
            txn.commit()
        except BaseException as error:
            failed = isinstance(error, lmdb.Error) and not isinstance(error, lmdb.MapFullError)
            if failed and committed_before is not None:
                self._settle(error, committed_before, txn)
                return
            if txn is not None and not _is_over(txn):
                self._abort(txn)
            raise

    def _abort(self, txn: Any) -> None:
        """Abort a write transaction with the readers held back: py-lmdb waits in it until no
        thread is inside LMDB, which with a few busy readers can be never."""
        with self._gate_at(_FROZEN):
            self._wait_until_idle()
            txn.abort()

    def _grow(self, batch_bytes: int) -> None:
        """Make the map larger by more than a batch of ``batch_bytes`` can need, and twice as large
        where the system gives that. Open snapshots would not survive it, so they are waited for."""
        now = self._map_bytes
        if now >= MAP_BYTES_MAX:
            raise StorageFullError(f"{self.path} has reached {now} bytes; nothing was changed")
        with self._gate_at(_DRAINING):
            if not self._drain():
                raise StorageFullError(
                    f"{self.path} has to grow over {now} bytes, and "
                    f"{len(self._readers)} snapshots stay open; nothing was changed. "
                    "Close snapshots sooner, or open with a larger map_bytes"
                )
            for more in (max(now, 4 * batch_bytes), max(now // 4, 2 * batch_bytes)):
                if self._map_more(more):
                    return
        raise StorageFullError(
            f"the system gives this process no address space for {self.path} to grow beyond "
            f"{now} bytes (ulimit -v, RLIMIT_AS); nothing was changed. Raise the limit"
        )

    def _grow_early(self) -> None:
        """Make room while there is still some, if nobody would have to be waited for."""
        if self._readers or self._map_bytes >= MAP_BYTES_MAX:
            return
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if used * 2 < self._map_bytes:
            return
        # The commit is durable, whatever becomes of this: a store that it shuts says so later.
        with contextlib.suppress(StorageError), self._gate_at(_DRAINING):
            if not self._readers:
                self._map_more(self._map_bytes)

    def _map_more(self, more: int) -> bool:
        """Map up to ``more`` bytes more; whether the system gives them. Without readers only.

        LMDB gives up the old map before it asks for the new one, and reads through neither if it
        does not get that; so the system is asked first."""
        size = min(self._map_bytes + more, MAP_BYTES_MAX)
        try:
            mmap.mmap(-1, size - self._map_bytes, **_ASIDE).close()
            self._env.set_mapsize(size)
        except (OSError, ValueError, OverflowError):
            return False
        except lmdb.Error as error:
            # Somebody else took it meanwhile. What was mapped a moment ago can be mapped again.
            self._gate = _FROZEN
            self._env.close()
            try:
                self._open_environment()
            except (OSError, lmdb.Error, EntiDBError) as second:
                self._shut()
                raise _storage_error(second, f"mapping {self.path}") from error
            return False
        self._map_bytes = size
        return True

    def _settle(self, error: BaseException, committed_before: int, txn: Any) -> None:
        """Find out what a failed commit did: close, open again, compare transaction numbers.

        Returns if the commit is there after all and durable; raises otherwise.
        """
        self._doubtful = True
        doing = f"committing to {self.path}"
        assert isinstance(error, Exception)
        reason = self._commit_failure(error, doing)
        with self._gate_at(_DRAINING):
            # Politeness: snapshots that are closed in time never notice.
            self._drain()
            self._gate = _FROZEN
            self._wait_until_idle()
            try:
                txn.abort()
                self._env.close()
                self._readers.clear()
                self._place.check()
                check_data_file(os.path.join(self.path, _DATA))
                # Whatever the outcome: what is read now has to be what a power cut leaves.
                with self._place.data_file() as descriptor:
                    write_headers_again(descriptor, self._place.data_path)
                self._open_environment()
                committed = self._env.info()["last_txnid"]
            except (lmdb.Error, OSError, EntiDBError) as second:
                self._shut()
                after = _storage_error(second, "opening it again")
                raise CommitUnknownError(
                    f"{_storage_error(error, doing)}. Then: {after}. The store is closed; open it "
                    "again and read to find out whether the commit is there"
                ) from error
        if committed == committed_before:
            raise reason from error

    def _commit_failure(self, error: Exception, doing: str) -> StorageError:
        # LMDB reports a write that stopped half-way as EIO, whatever stopped it.
        if _code(error) == errno.EIO:
            reason = short_write_error(self.path, self._place.data_bytes(), doing)
        else:
            reason = _storage_error(error, doing)
        return type(reason)(f"{reason}; nothing was changed", code=reason.code)

    # ---- the gate

    def _pass_gate(self, level: int = _DRAINING) -> None:
        """Wait until the gate is at ``level`` or lower; raise if it never will be."""
        deadline = time.monotonic() + _GATE_SECONDS
        while self._gate > level:
            if self._gate == _FORKED:
                raise DatabaseForkedError(
                    f"{self.path} was opened before this process was forked; open databases "
                    "after the fork, or start processes with the spawn method"
                )
            if self._gate == _CLOSED:
                raise DatabaseClosedError(f"{self.path} is closed; open it again")
            if self._turns.idle():
                # Nobody holds it: an interrupt kept them from opening it.
                with self._turns.hold(0) as ours:
                    if ours:
                        self._find_gate_open()
                continue
            time.sleep(_GATE_LOOK_SECONDS)
            if time.monotonic() > deadline:
                raise StorageError(f"{self.path} was busy for {_GATE_SECONDS:g} s; try again")

    @contextlib.contextmanager
    def _gate_at(self, level: int) -> Iterator[None]:
        """Hold the gate at ``level``; only the thread that has the turn does this."""
        try:
            self._gate = level
            yield
        finally:
            self._open_gate()

    def _open_gate(self) -> None:
        if self._gate < _CLOSED:
            self._gate = _OPEN
        while self._orphans:
            self._orphans.pop().abort()

    def _find_gate_open(self) -> None:
        """At the beginning of a turn: what the one before was kept from opening is opened; raise
        if the store is closed."""
        if self._gate < _CLOSED:
            self._open_gate()
        else:
            self._pass_gate()

    def _drain(self) -> bool:
        """Wait for open snapshots to close, at most ``drain_seconds``; whether they have."""
        deadline = time.monotonic() + self._drain_seconds
        while self._readers:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_GATE_LOOK_SECONDS)
        return True

    def _wait_until_idle(self) -> None:
        """With the gate frozen: wait until no thread is inside LMDB. Each leaves at the end of
        its call, so this takes as long as one page of a scan, or as a backup under way."""
        while any(reader.busy for reader in list(self._readers)):
            time.sleep(0.0001)

    # ---- care

    def verify(self) -> Iterator[str]:
        data = os.path.join(self.path, _DATA)
        # The pages come first and are not mapped for it: a damaged one can make LMDB itself run
        # out of the file, or in circles.
        with self._turns.hold():
            if self._gate:
                self._find_gate_open()
            self._place.check()
            snapshot = self.snapshot()
            with _foreign_errors(f"verifying {self.path}"):
                header = read_header(data, snapshot._transaction_number())
        with snapshot:
            if header is None:
                yield "the header of the newest commit cannot be found"
                return
            damaged = False
            for fault in page_faults(data, header):
                damaged = self._doubtful = True
                yield fault
            if damaged:
                return
            try:
                yield from self._verify(snapshot)
            except StorageError as error:
                self._doubtful = True
                yield f"the walk ended early: {error}"

    def _verify(self, snapshot: LmdbSnapshot) -> Iterator[str]:
        start, stop = b"", b"\xff" * (KEY_BYTES_MAX + 1)
        count = 0
        while page := snapshot._range(start, stop, _SCAN_CHUNK_MAX, False, values=True):
            with snapshot._inside() as txn:
                looked_up = dict(txn.cursor().getmulti([key for key, _ in page]))
            previous = b""
            for key, stored in page:
                if crc32(stored, crc32(key)) != _RESIDUE:
                    yield f"record {key.hex()}: checksum does not match"
                if key <= previous or key < start:
                    yield f"record {key.hex()}: out of order, the walk ended early"
                    return
                if looked_up.get(key) != stored:
                    yield f"record {key.hex()}: found by walking, not by looking it up"
                previous = key
            count += len(page)
            start = previous + b"\0"
        with snapshot._inside() as txn:
            entries = txn.stat()["entries"]
        if entries != count:
            yield f"the file counts {entries} records, walking finds {count}"

    def compact(self) -> None:
        """Raises ``StorageError`` when snapshots stay open longer than ``drain_seconds``, or the
        disk has no room for the copy; ``DatabaseMovedError`` when another database stands at the
        path by now. The store is as before then."""
        if self._gate >= _CLOSED:
            self._pass_gate()
        with self._turns.hold():
            if self._gate:
                self._find_gate_open()
            if self._read_only:
                raise self._no_writing()
            self._place.check()
            try:
                self._copy_to(self._make_temporary())
                self._swap()
            finally:
                self._place.remove_temporary()

    def _no_writing(self) -> StorageError:
        return StorageError(f"{self.path} was opened only to read; open it without read_only")

    def _make_temporary(self) -> str:
        try:
            return self._place.make_temporary()
        except OSError as error:
            raise _storage_error(error, f"compacting {self.path}") from error

    def _swap(self) -> None:
        with self._gate_at(_DRAINING):
            if not self._drain():
                raise StorageError(
                    f"{len(self._readers)} snapshots of {self.path} stay open; close them and "
                    "compact again"
                )
            self._gate = _FROZEN
            self._wait_until_idle()
            self._env.close()
            try:
                self._place.swap()
                self._open_environment()
            except (OSError, lmdb.Error, EntiDBError) as error:
                self._reopen_or_shut()
                if isinstance(error, DatabaseMovedError):
                    raise
                raise _storage_error(error, f"compacting {self.path}") from error

    def _reopen_or_shut(self) -> None:
        try:
            self._open_environment()
        except (OSError, lmdb.Error, EntiDBError):
            self._shut()
            raise

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        where = os.path.abspath(os.fspath(path))
        if os.path.lexists(where):
            raise _exists(where)
        try:
            remove_dead(os.path.dirname(where))
            with Partial(where, "backup") as partial:
                self._copy_for_backup(partial.path, changes)
                # Meanwhile another backup to the same place may have come to its end.
                if os.path.lexists(where):
                    raise _exists(where)
                partial.finish()
        except OSError as error:
            raise _storage_error(error, f"writing the backup {where}") from error

    def _copy_for_backup(
        self, directory: str, changes: Iterable[tuple[bytes, bytes | None]]
    ) -> None:
        os.mkdir(directory, 0o700)
        with self.snapshot() as snapshot, snapshot._inside():
            self._copy_to(directory)
        with contextlib.closing(LmdbStorage.open(directory)) as copy:
            copy.commit(dict(changes))
        for name in (LMDB_LOCK, LOCK):
            os.unlink(os.path.join(directory, name))
        self._place.give(directory)
        sync_path(directory)

    def _copy_to(self, directory: str) -> None:
        """A compacted, consistent and synced copy in the empty ``directory``; ``env.copy`` reads
        one snapshot."""
        try:
            self._env.copy(_as_bytes(directory), compact=True)
            restrict(os.path.join(directory, _DATA))
            sync_path(os.path.join(directory, _DATA))
        except (OSError, lmdb.Error) as error:
            raise _storage_error(error, f"copying {self.path} to {directory}") from error

    def info(self) -> StorageInfo:
        with self.snapshot() as snapshot:
            with snapshot._inside() as txn:
                stat = txn.stat()
            pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
            return StorageInfo(
                kind="lmdb",
                path=self.path,
                file_bytes=self._place.data_bytes(),
                used_bytes=(pages + 2) * stat["psize"],
                map_bytes=self._map_bytes,
                records=stat["entries"],
                readers=len(self._readers) - 1,
                half_page_bytes=stat["psize"] // 2 - _ROW_OVERHEAD_BYTES,
            )

    def close(self) -> None:
        """Idempotent; waits for a commit that is under way. Open snapshots raise afterwards.
        In a forked child it does nothing, and the parent's store is untouched."""
        if self._gate >= _CLOSED:
            return
        with self._turns.hold():
            if self._gate >= _CLOSED:
                return
            with self._gate_at(_FROZEN):
                self._wait_until_idle()
                self._shut()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # Nobody refers to it any more, so nobody is inside LMDB and nobody waits for a turn.
        if not getattr(self, "_made", False) or self._gate >= _CLOSED:
            return
        try:
            _warn(
                f"unclosed database {self.path}, opened at {self._place.opened_at}",
                ResourceWarning,
                source=self,
            )
        finally:
            self._shut()

    def _shut(self) -> None:
        """Close everything: the gate is frozen, nobody inside LMDB, the turn ours."""
        try:
            self._close_all()
        except BaseException:
            self._close_all()  # Each step may be repeated.
            raise

    def _close_all(self) -> None:
        self._gate = _CLOSED
        self._readers.clear()
        if self._env is not None:
            self._env.close()
            if not self._doubtful and not self._read_only:
                self._leave()
        self._place.release()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            headers, transaction = read_raw_headers(self._place.data_path)
            if headers:
                self._place.leave(headers, transaction)

    def _open_environment(self) -> None:
        self._place.check()
        if not self._read_only:
            self._place.make_lock_table()
        data_bytes = self._place.data_bytes()
        floor = max(_MAP_BYTES_MIN, data_bytes)
        size = self._map_bytes or _map_bytes_for(data_bytes)
        while True:
            try:
                env = self._map(size)
                break
            except lmdb.Error as error:
                if getattr(error, "code", 0) not in (0, errno.ENOMEM) and not isinstance(
                    error, lmdb.MemoryError
                ):
                    raise _storage_error(error, f"opening {self.path}") from error
                if size // 2 < floor:
                    raise _storage_error(error, f"mapping {self.path}") from error
                # An address-space limit (ulimit -v, a 32-bit system): take what there is.
                size //= 2
        try:
            self._place.check()  # LMDB went by the path.
            if not self._read_only:
                env.reader_check()
        except BaseException:
            env.close()
            raise
        self._map_bytes = max(size, env.info()["map_size"])
        self._env = env
        self._begin = env.begin
        if not self._read_only:
            restrict(os.path.join(self.path, _DATA))

    def _map(self, size: int) -> Any:
        return lmdb.open(
            _as_bytes(self.path),
            map_size=size,
            create=False,
            mode=0o600,
            max_readers=_READERS_MAX,
            sync=True,
            metasync=True,
            writemap=False,
            readonly=self._read_only,
            # Nobody writes meanwhile, so there is no need of a table of readers.
            lock=not self._read_only,
        )

    def _refuse_begin(self) -> Any:
        raise DatabaseClosedError(f"{self.path} is closed; open it again")

    def _leave_to_parent(self) -> None:
        """In a forked child: never touch LMDB again, not even to free it. Ending an inherited
        transaction would clear the parent's slot in the shared table of readers."""
        _INHERITED.append((self._env, self._begin, [r.txn for r in self._readers]))
        self._gate = _FORKED
        self._place.forget()


# ---------------------------------------------------------------- fork

#: Open stores, so that a fork finds them; and what a child must keep alive without using it.
_STORES: weakref.WeakSet[LmdbStorage] = weakref.WeakSet()
_INHERITED: list[Any] = []


def _after_fork() -> None:
    for store in list(_STORES):
        if store._gate < _CLOSED:
            store._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------- batches and files


def _map_bytes_for(data_bytes: int) -> int:
    """How much to map of a file of that size, so that it can grow for a while."""
    limit = address_space_limit()
    room = MAP_ROOM_BYTES if limit is None else min(MAP_ROOM_BYTES, limit // _MAP_SHARE)
    steps = (2 * data_bytes + room) // _MAP_BYTES_MIN + 1
    return min(steps * _MAP_BYTES_MIN, MAP_BYTES_MAX)


def _stage(batch: Batch) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The batch in key order with its checksums, and the keys to delete. Everything LMDB would
    refuse is refused here, where no transaction has to be aborted for it."""
    keys = sorted(batch)
    longest = max(map(len, keys), default=1)
    if longest > KEY_BYTES_MAX or (keys and not keys[0]):
        raise StorageError(
            f"a key of {longest if keys[0] else 0} bytes cannot be stored; keys have 1 to "
            f"{KEY_BYTES_MAX} bytes"
        )
    if max(map(len, filter(None, batch.values())), default=0) > _VALUE_BYTES_MAX:
        raise StorageError(f"a value of over {_VALUE_BYTES_MAX} bytes cannot be stored; split it")
    pack = _U32.pack
    puts = [
        (key, value + pack(crc32(value, crc32(key))))
        for key in keys
        if (value := batch[key]) is not None
    ]
    if len(puts) == len(keys):
        return puts, []
    return puts, [key for key in keys if batch[key] is None]


def _exists(where: str) -> StorageError:
    return StorageError(f"{where} exists; a backup needs a new directory")


def _check_directory(where: str, create: bool) -> None:
    """Make the directory, or refuse one that holds something else."""
    try:
        if not _is_there(where):
            if not create:
                raise FormatError(f"there is no database at {where}; check the path")
            make_directory(where)
            return
        names = set(os.listdir(where))
    except NotADirectoryError as error:
        raise FormatError(
            f"{where} is a file and not a database directory; it was not touched"
        ) from error
    except OSError as error:
        raise _storage_error(error, f"opening {where}") from error
    if _DATA in names:
        return
    others = names - {LMDB_LOCK, LOCK, TEMPORARY}
    if others:
        raise FormatError(
            f"{where} holds other things ({', '.join(sorted(others)[:3])}) and no database; it "
            "was not touched. Choose an empty or a new directory"
        )
    if not create:
        raise FormatError(f"there is no database in {where}; check the path")


def _check_closed(place: Place, salvage: bool, read_only: bool) -> None:
    """Raise ``CorruptionError`` unless LMDB can use the data file without harm: it stops the
    process where a page is not what it must be.

    The file that was closed here, untouched since, is what it was then. Any other is looked at,
    and brought onto the disk as it is read: whoever had it open may have died after a write that
    failed and before the sync that has to follow."""
    left = place.left()
    check_headers(place.data_path, 0 if left is None else left.transaction)
    if place.is_as_left(read_raw_headers(place.data_path)[0]) or salvage:
        return
    faults = _known_faults(place.data_path)
    if faults:
        raise damaged_file(place.data_path, faults)
    # From now on it can change within a tick of the system's clock.
    _LOOKED.pop(place.data_path, None)
    if not read_only:
        with place.data_file() as descriptor:
            write_headers_again(descriptor, place.data_path)


def _known_faults(data: str) -> list[str]:
    """As ``closed_file_faults``. A file is read once, and a damaged one not at each try to open
    it."""
    file = _state_of(data)
    known = _LOOKED.get(data)
    if known is not None and known[0] == file:
        return known[1]
    _LOOKED.pop(data, None)
    faults = closed_file_faults(data)
    if len(_LOOKED) < _LOOKED_MAX and _state_of(data) == file:
        _LOOKED[data] = (file, faults[:_FAULTS_KEPT])
    return faults


def _state_of(data: str) -> tuple[int, ...]:
    found = os.stat(data)
    return found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _as_bytes(path: str) -> str | bytes:
    """``path`` as LMDB's binding takes it: text it would encode as UTF-8, which not every path
    is."""
    return path if sys.platform == "win32" else os.fsencode(path)


def _is_there(path: str) -> bool:
    """Unlike ``os.path.lexists``, which also takes what may not be looked at for missing."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _create(place: Place) -> None:
    """Put an empty data file in place in one step: a crash leaves none, never half of one."""
    try:
        where = _as_bytes(place.make_temporary())
        lmdb.open(where, map_size=_MAP_BYTES_MIN, mode=0o600, lock=False).close()
        place.swap()
        sync_names(place.path)
    except lmdb.Error as error:
        raise _storage_error(error, f"creating {place.path}") from error
    finally:
        place.remove_temporary()

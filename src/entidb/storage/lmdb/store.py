"""An open store on LMDB: what ``base`` promises, told by its verbs: open, snapshot, commit, verify,
compact, back up, close.

A batch is complete before its transaction begins, because aborting one waits for every reader.

Not here: what is done to the file and its map (``open_file``), how readers are kept out meanwhile
(``gate``), reading (``snapshot``), and what keys and values mean (``db``).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import lmdb

from entidb.errors import StorageError, StorageFullError
from entidb.storage.base import Batch, StorageInfo
from entidb.storage.directories import restrict, sync_path
from entidb.storage.lmdb.batches import stage
from entidb.storage.lmdb.doubt import (
    check_closed,
    check_directory,
    closed_faults,
    doubtful_bytes,
    known_faults,
)
from entidb.storage.lmdb.failures import foreign_errors, storage_error
from entidb.storage.lmdb.gate import CLOSED, FROZEN, OPEN, Gate, Reader
from entidb.storage.lmdb.open_file import MAP_BYTES_MIN, OpenFile, as_bytes, create_file
from entidb.storage.lmdb.pages import page_faults, read_header
from entidb.storage.lmdb.place import DATA, LMDB_LOCK, LOCK, Place, take_place
from entidb.storage.lmdb.snapshot import LmdbSnapshot, record_faults
from entidb.storage.lmdb.spacers import spacers
from entidb.storage.partial import Partial, remove_dead
from entidb.storage.turns import Turn

#: Seconds a commit waits for open snapshots when the map must grow.
_DRAIN_SECONDS: Final = 5.0
#: Commits, and rows of one, between two looks at whether the map should grow.
_ROOM_EVERY_COMMITS: Final = 64
_ROOM_EVERY_ROWS: Final = 1000
#: Doublings of the map within one commit.
_GROWTHS_MAX: Final = 26


def _is_over(txn: Any) -> bool:
    try:
        txn.id()
    except lmdb.Error:
        return True
    return False


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
        self._gate = Gate(path, drain_seconds)
        self._file = OpenFile(place, self._gate, map_bytes, read_only)
        self._commits = 0
        #: Whether somebody has to close it.
        self._made = True

    @staticmethod
    def closed_faults(path: str | os.PathLike[str]) -> list[str]:
        """What is wrong with the pages of the store in ``path``, found without mapping it: a
        damaged page can end the process that reads it through LMDB. Empty when all is well, or
        when there is no store.

        Raises ``DatabaseLockedError`` if it is open, here or in another process, ``FormatError``
        if the file is not a store at all."""
        return closed_faults(os.path.abspath(os.fspath(path)))

    @staticmethod
    def doubtful_bytes(path: str | os.PathLike[str]) -> int:
        """How many bytes opening the store in ``path`` would read to see that it is well; 0 if
        none, or if there is no store. Cheap, and a hint: nothing is locked."""
        return doubtful_bytes(os.path.abspath(os.fspath(path)))

    @staticmethod
    def look(path: str | os.PathLike[str]) -> None:
        """Read the store in ``path`` as opening it would, so that opening need not: for doing it
        somewhere else. What is found is what opening raises, as long as the file is the same."""
        with contextlib.suppress(OSError):
            known_faults(os.path.join(os.path.abspath(os.fspath(path)), DATA))

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
        check_directory(where, create and not read_only)
        try:
            place = take_place(where, read_only)
        except OSError as error:
            raise storage_error(error, f"opening {where}") from error
        try:
            if not read_only:
                place.remove_temporary()
            if place.headers is None:
                create_file(place)
            else:
                check_closed(place, place.headers, salvage, read_only)
            size = 0 if map_bytes is None else max(map_bytes, MAP_BYTES_MIN)
            store = cls(where, place, size, drain_seconds, read_only)
            store._gate.doubtful = salvage
            return store
        except OSError as error:
            place.release()
            raise storage_error(error, f"opening {where}") from error
        except BaseException:
            place.release()
            raise

    # ---- reading

    def snapshot(self) -> LmdbSnapshot:
        reader = Reader()
        try:
            while True:
                if self._gate.level:
                    self._gate.wait_for(OPEN)
                # Announced first, then looked again: either this reader sees the gate move, or
                # who moves it sees this reader.
                reader.busy = True
                self._gate.readers.add(reader)
                if self._gate.level == OPEN:
                    break
                reader.busy = False
                self._gate.readers.discard(reader)
            reader.txn = self._file.begin()
            reader.busy = False
            return LmdbSnapshot(self, self._gate, reader)
        except BaseException as error:
            self._gate.end(reader)
            if not isinstance(error, lmdb.Error):
                raise
            if self._gate.level >= CLOSED:
                self._gate.wait_for()
            raise storage_error(error, f"reading {self.path}") from error

    # ---- writing

    def commit(self, batch: Batch) -> None:
        puts, deletes = stage(batch)
        if self._gate.level >= CLOSED:
            self._gate.wait_for()
        if not batch:
            return
        # As ``hold``, and faster than a block.
        turn = Turn()
        try:
            self._gate.turns.take(turn)
            self._commit(puts, deletes)
            self._gate.turns.give_back(turn)
        except BaseException:
            self._gate.turns.give_back(turn)
            raise

    def _commit(self, puts: list[tuple[bytes, bytes]], deletes: list[bytes]) -> None:
        if self._gate.level:
            self._gate.find_open()
        if self._read_only:
            raise self._no_writing()
        self._place.check()
        for _ in range(_GROWTHS_MAX):
            try:
                self._write(puts, deletes)
                break
            except lmdb.MapFullError:
                self._file.grow(sum(len(key) + len(value) for key, value in puts))
            except lmdb.Error as error:
                self._gate.doubtful = True
                raise self._file.commit_failure(error, f"writing {self.path}") from error
        else:
            raise StorageFullError(f"the batch does not fit into {self.path}; make it smaller")
        rows = len(puts) + len(deletes)
        self._gate.touched += rows
        self._commits += 1
        if self._commits % _ROOM_EVERY_COMMITS == 0 or rows > _ROOM_EVERY_ROWS:
            self._file.grow_early()

    def _write(self, puts: list[tuple[bytes, bytes]], deletes: list[bytes]) -> None:
        txn, committed_before = None, None
        try:
            txn = self._file.env.begin(write=True)
            for key in deletes:
                txn.delete(key)
            txn.cursor().putmulti(puts)
            committed_before = txn.id() - 1
            txn.commit()
        except BaseException as error:
            failed = isinstance(error, lmdb.Error) and not isinstance(error, lmdb.MapFullError)
            if failed and committed_before is not None:
                self._file.settle(error, committed_before, txn)
                return
            if txn is not None and not _is_over(txn):
                self._abort(txn)
            raise

    def _abort(self, txn: Any) -> None:
        """Abort a write transaction with the readers held back: py-lmdb waits in it until no
        thread is inside LMDB, which with a few busy readers can be never."""
        with self._gate.at(FROZEN):
            self._gate.wait_until_idle()
            txn.abort()

    # ---- care

    def verify(self) -> Iterator[str]:
        data = os.path.join(self.path, DATA)
        # The pages come first and are not mapped for it: a damaged one can make LMDB itself run
        # out of the file, or in circles.
        with self._gate.turns.hold():
            if self._gate.level:
                self._gate.find_open()
            self._place.check()
            snapshot = self.snapshot()
            with foreign_errors(f"verifying {self.path}"):
                header = read_header(data, snapshot.transaction_number())
        with snapshot:
            if header is None:
                yield "the header of the newest commit cannot be found"
                return
            damaged = False
            for fault in page_faults(data, header):
                damaged = self._gate.doubtful = True
                yield fault
            if damaged:
                return
            try:
                yield from record_faults(snapshot)
            except StorageError as error:
                self._gate.doubtful = True
                yield f"the walk ended early: {error}"

    def compact(self) -> None:
        """Raises ``StorageError`` when snapshots stay open longer than ``drain_seconds``, or the
        disk has no room for the copy; ``DatabaseMovedError`` when another database stands at the
        path by now. The store is as before then."""
        if self._gate.level >= CLOSED:
            self._gate.wait_for()
        with self._gate.turns.hold():
            if self._gate.level:
                self._gate.find_open()
            if self._read_only:
                raise self._no_writing()
            self._place.check()
            try:
                self._copy_to(self._make_temporary())
                self._file.swap()
            finally:
                self._place.remove_temporary()

    def _no_writing(self) -> StorageError:
        return StorageError(f"{self.path} was opened only to read; open it without read_only")

    def _make_temporary(self) -> str:
        try:
            return self._place.make_temporary()
        except OSError as error:
            raise storage_error(error, f"compacting {self.path}") from error

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
            raise storage_error(error, f"writing the backup {where}") from error

    def _copy_for_backup(
        self, directory: str, changes: Iterable[tuple[bytes, bytes | None]]
    ) -> None:
        os.mkdir(directory, 0o700)
        with self.snapshot() as snapshot, snapshot.inside():
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
            self._file.env.copy(as_bytes(directory), compact=True)
            restrict(os.path.join(directory, DATA))
            sync_path(os.path.join(directory, DATA))
        except (OSError, lmdb.Error) as error:
            raise storage_error(error, f"copying {self.path} to {directory}") from error

    def info(self) -> StorageInfo:
        with self.snapshot() as snapshot:
            with snapshot.inside() as txn:
                stat = txn.stat()
            pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
            return StorageInfo(
                kind="lmdb",
                path=self.path,
                file_bytes=self._place.data_bytes(),
                used_bytes=(pages + 2) * stat["psize"],
                map_bytes=self._file.map_bytes,
                records=stat["entries"],
                readers=len(self._gate.readers) - 1,
            )

    def spacers(self, regions: Sequence[bytes]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        with self.snapshot() as snapshot, snapshot.inside() as txn:
            page_bytes = txn.stat()["psize"]
        return spacers(regions, page_bytes)

    def close(self) -> None:
        """Idempotent; waits for a commit that is under way. Open snapshots raise afterwards.
        In a forked child it does nothing, and the parent's store is untouched."""
        if self._gate.level >= CLOSED:
            return
        with self._gate.turns.hold():
            if self._gate.level >= CLOSED:
                return
            with self._gate.at(FROZEN):
                self._gate.wait_until_idle()
                self._file.shut()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # Nobody refers to it any more, so nobody is inside LMDB and nobody waits for a turn.
        if not getattr(self, "_made", False) or self._gate.level >= CLOSED:
            return
        try:
            _warn(
                f"unclosed database {self.path}, opened at {self._place.opened_at}",
                ResourceWarning,
                source=self,
            )
        finally:
            self._file.shut()


def _exists(where: str) -> StorageError:
    return StorageError(f"{where} exists; a backup needs a new directory")

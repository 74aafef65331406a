"""An open store on LMDB: what ``base`` promises, by its verbs: open, snapshot, commit, verify,
compact, back up, close.

A batch is complete before its transaction begins, because aborting one waits for every reader.

Not here: what is done to the file and its map (``open_file``), how readers are kept out meanwhile
(``gate``), reading (``snapshot``), what is wrong with it (``verifying``), and what keys and values
mean (``db``).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import get_ident
from typing import Any, Final

import lmdb

from entidb.errors import CommitStaleError, StorageError, StorageFullError
from entidb.storage.base import Batch, StorageInfo, StoreTurn
from entidb.storage.checksums import Puts, stage
from entidb.storage.directories import absolute, restrict, sync_path
from entidb.storage.lmdb.copying import copy_file, resting
from entidb.storage.lmdb.doubt import (
    check_closed,
    check_directory,
    closed_faults,
    doubtful_bytes,
    known_faults,
)
from entidb.storage.lmdb.failures import storage_error
from entidb.storage.lmdb.gate import CLOSED, FROZEN, OPEN, Gate, Reader
from entidb.storage.lmdb.left import DATA, LOCK
from entidb.storage.lmdb.open_file import (
    MAP_BYTES_MIN,
    NUMBER_AT,
    OpenFile,
    create_file,
)
from entidb.storage.lmdb.place import Place, take_place
from entidb.storage.lmdb.readers import LMDB_LOCK
from entidb.storage.lmdb.resident import shedding
from entidb.storage.lmdb.snapshot import LmdbSnapshot
from entidb.storage.lmdb.spacers import spacers
from entidb.storage.lmdb.turn import COMMITTING, TURN
from entidb.storage.lmdb.verifying import faults_of, snapshot_with_header
from entidb.storage.lmdb.waiting import MarkWaiting
from entidb.storage.partial import Partial, remove_dead
from entidb.storage.turns import Turn
from entidb.types import Uncopied

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


class LmdbStorage(Uncopied):
    """An open store on disk. Made by ``open``."""

    #: Contracts ask this: it has files, so ``backup`` works and it can be opened again.
    supports_files: Final = True
    #: A server asks this: who reads waits for a page of a file, or for nothing.
    reads_mapped_files: Final = True

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
        self.turn = self._file.turn
        #: Of the newest commit, or of one under way.
        self.mark = self._file.mark
        self._turn_in_turn = Turn()
        self._commits = 0
        self._waiting = MarkWaiting(self._file)
        #: Who waits keeps the file's object alive and not this one: what a program has lost goes at
        #: once.
        self.wait = self._waiting.wait
        #: Whether it has to be closed.
        self._made = True

    @staticmethod
    def closed_faults(path: str | os.PathLike[str]) -> list[str]:
        """What is wrong with the pages of the store in ``path``, found without mapping it: a
        damaged page can end the process that reads it through LMDB. Empty when all is well, or
        when there is no store.

        Raises ``DatabaseLockedError`` if it is open, here or in another process, ``FormatError``
        if the file is not a store at all."""
        return closed_faults(absolute(path))

    @staticmethod
    def doubtful_bytes(path: str | os.PathLike[str]) -> int:
        """How many bytes opening the store in ``path`` would read to see that it is well; 0 if
        none, or if there is no store. Cheap, and a hint: nothing is locked."""
        return doubtful_bytes(absolute(path))

    @staticmethod
    def look(path: str | os.PathLike[str]) -> None:
        """Read the store in ``path`` as opening it would, so that opening need not: for doing it
        somewhere else. What is found is what opening raises, as long as the file is the same."""
        with contextlib.suppress(OSError):
            known_faults(os.path.join(absolute(path), DATA))

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
        """Open the store in the directory ``path``. Other processes may have it open too, on
        Linux; in this one it is open once.

        With ``create`` a missing or empty directory becomes an empty store (directory 0700,
        files 0600). ``map_bytes`` bounds the size until a commit doubles it, by default what the
        file has and as much again, and some GiB where address space has no limit; less is mapped
        where the system allows less. ``drain_seconds`` is how long a commit that must grow the map
        waits for open snapshots.

        A file that was not closed, or was changed since, is looked at before it is mapped: every
        page that can be reached is read once. ``salvage`` opens one with damaged pages too, to
        save what can still be read, for this process alone; a damaged page may end it.

        ``read_only`` makes and changes no file where no process writes, so it also works where
        nothing can be written; and keeps those who would write out, but not others who only read.
        Where a process writes already, it reads beside that one, and notes itself in LMDB's table
        of readers.

        Raises ``DatabaseLockedError`` if it is open already in this process, or in another that has
        it alone; ``FormatError`` (``not_a_database``, ``truncated``) if something else stands
        there, which is not touched; ``CorruptionError`` for damaged pages, likewise;
        ``StorageError``. Not for network file systems.
        """
        where = absolute(path)
        check_directory(where, create and not read_only)
        try:
            place = take_place(where, read_only, alone=salvage)
        except OSError as error:
            raise storage_error(error, f"opening {where}") from error
        try:
            if place.first:
                if not read_only:
                    place.folder.remove_temporary()
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
        reader, gate = Reader(), self._gate
        try:
            while True:
                if gate.level:
                    gate.wait_for(OPEN)
                # Announced first, then looked again: either this reader sees the gate move, or
                # who moves it sees this reader.
                reader.busy = True
                gate.readers.add(reader)
                if gate.level == OPEN:
                    break
                reader.busy = False
                gate.readers.discard(reader)
            reader.txn = txn = self._file.begin()
            reader.busy = False
            return LmdbSnapshot(self, gate, reader, self._file.marks + txn.id())
        except BaseException as error:
            gate.end(reader)
            if not isinstance(error, lmdb.Error):
                raise
            if gate.level >= CLOSED:
                gate.wait_for()
            if not isinstance(error, lmdb.MapResizedError):
                raise storage_error(error, f"reading {self.path}") from error
        self._follow()
        return self.snapshot()

    def _follow(self) -> None:
        """Map what another process has made the file grow to."""
        turns = self._gate.turns
        if turns.mine() is not None:
            self._file.follow()
            return
        with turns.hold():
            self._gate.find_open()
            self._file.follow()

    def claim(self, name: str) -> StoreTurn:
        return self._place.claim(name)

    @property
    def shared(self) -> bool:
        return self._place.shared

    # ---- writing

    def commit(self, batch: Batch, after: int | None = None) -> int:
        puts, deletes = stage(batch)
        if self._gate.level >= CLOSED:
            self._gate.wait_for()
        if not batch:
            return self.mark()
        if not self.turn.mine:
            try:
                self.turn.take()
                return self._commit_in_turn(puts, deletes, after, Turn())
            finally:
                self.turn.give_back()
        # One thread at a time has that turn, so one object of this kind is enough.
        turn = self._turn_in_turn
        turn.thread = get_ident()
        return self._commit_in_turn(puts, deletes, after, turn)

    def _commit_in_turn(
        self, puts: Puts, deletes: list[bytes], after: int | None, turn: Turn
    ) -> int:
        # As ``hold``, and faster than a block.
        gate, memory = self._gate, self.turn.memory
        turns = gate.turns
        try:
            turns.take(turn)
            if gate.level:
                gate.find_open()
            if self._read_only:
                raise self._no_writing()
            self._place.check()
            memory[COMMITTING] = 1
            # No ``try`` stands in this one: an interrupt at its first line would pass by this one's
            # handler (CPython 3.11), and the turn would be taken for ever.
            mark = self._write(puts, deletes, after)
            memory[COMMITTING] = 0
            rows = len(puts) + len(deletes)
            gate.touched += rows
            self._commits += 1
            if self._commits % _ROOM_EVERY_COMMITS == 0 or rows > _ROOM_EVERY_ROWS:
                self._file.grow_early()
            turns.give_back(turn)
        except BaseException as error:
            # If its outcome is unknown, the next process finds out.
            if gate.level < CLOSED:
                memory[COMMITTING] = 0
            turns.give_back(turn)
            if not isinstance(error, lmdb.Error):
                raise
            gate.doubtful = True
            raise self._file.commit_failure(error, f"writing {self.path}") from error
        return mark

    def _write(self, puts: Puts, deletes: list[bytes], after: int | None) -> int:
        file = self._file
        for _ in range(_GROWTHS_MAX):
            txn: Any = None
            number, mark, written = 0, 0, False
            try:
                txn = file.env.begin(write=True)
                number = txn.id()
                # LMDB's two headers take turns, and the other one is not touched by this. They are
                # in memory, which LMDB reads too: looking costs no call of the system.
                if (
                    file.headers is not None
                    and file.numbers.unpack_from(file.headers, NUMBER_AT)[(number - 1) % 2]
                    != number - 1
                ):
                    raise file.written_over()
                mark = file.marks + int(number)
                if after is not None and mark != after + 1:
                    raise CommitStaleError.of(self.path, after, mark - 1)
                for key in deletes:
                    txn.delete(key)
                txn.cursor().putmulti(puts)
                # Ahead and never behind, wherever an interrupt comes.
                written, file.newest = True, mark
                txn.commit()
                return mark
            except BaseException as error:
                failed = isinstance(error, lmdb.Error) and not isinstance(error, lmdb.MapFullError)
                if failed and written:
                    file.settle(error, number - 1, txn)
                    return mark
                if txn is not None and not _is_over(txn):
                    self._abort(txn)
                if isinstance(error, lmdb.MapFullError):
                    file.grow(sum(len(key) + len(value) for key, value in puts))
                elif isinstance(error, lmdb.MapResizedError):
                    file.follow()
                else:
                    raise
        raise StorageFullError(f"the batch does not fit into {self.path}; make it smaller")

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
            snapshot, header = snapshot_with_header(self.snapshot, data, self.path, self.shared)
        with snapshot:
            yield from faults_of(snapshot, header, data, self._gate)

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
            self._place.folder.check_link()
            with self._place.to_itself():
                try:
                    self._copy_to(self._place.folder.make_temporary())
                    self._file.swap()
                except OSError as error:
                    raise storage_error(error, f"compacting {self.path}") from error
                finally:
                    self._place.folder.remove_temporary()

    def give_back(self) -> bool:
        """As ``SpareStorage.give_back``."""
        if self._read_only:
            return False
        try:
            with self._gate.turns.hold(0) as ours:
                if not ours:
                    return True
                self._gate.find_open()
                self._place.check()
                return self._file.give_back()
        except (OSError, lmdb.Error) as error:
            raise storage_error(error, f"giving back room of {self.path}") from error

    def _no_writing(self) -> StorageError:
        return StorageError(f"{self.path} was opened only to read; open it without read_only")

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        where = absolute(path)
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
            self._copy_to(directory, self._gate.check_wanted)
        # Opening it would look, too, and keep the interpreter for as long.
        known_faults(os.path.join(directory, DATA), resting(self.mark))
        with contextlib.closing(LmdbStorage.open(directory)) as copy:
            copy.commit(dict(changes))
        for name in (LMDB_LOCK, LOCK, TURN):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))
        self._place.give(directory)
        sync_path(directory)

    def _copy_to(self, directory: str, go_on: Callable[[], None] | None = None) -> None:
        """A compacted, consistent and synced copy in the empty ``directory``."""
        try:
            with shedding(self._place.data_path):
                copy_file(self._file.env, directory, go_on)
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
        self._waiting.end()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # Nothing refers to it any more, so no thread is inside LMDB and none waits for a turn.
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
            self._waiting.end()


def _exists(where: str) -> StorageError:
    return StorageError(f"{where} exists already; name a new directory", code="exists")

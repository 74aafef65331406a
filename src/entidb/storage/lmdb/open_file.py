"""The data file as LMDB has it open: mapping it, growing the map, finding out what a failed commit
did, putting a copy in its place, and shutting it.

All that moves the ground under open snapshots is here, and goes through the gate. What a fork does
to open files is here too.

Not here: what is read and written through it (``snapshot``, ``store``), and looking at files that
are closed (``doubt``).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final

import lmdb

from entidb.errors import (
    CommitUnknownError,
    DatabaseClosedError,
    DatabaseMovedError,
    EntiDBError,
    StorageError,
    StorageFullError,
)
from entidb.storage.directories import restrict, sync_names
from entidb.storage.disk_errors import address_space_limit, short_write_error
from entidb.storage.lmdb.closed_file import check_data_file, write_headers_again
from entidb.storage.lmdb.failures import code_of, storage_error
from entidb.storage.lmdb.gate import CLOSED, DRAINING, FORKED, FROZEN, Gate
from entidb.storage.lmdb.headers import UNREADABLE, read_headers
from entidb.storage.lmdb.holes import Holes
from entidb.storage.lmdb.layout import META_BYTES, META_END, open_to_read
from entidb.storage.lmdb.place import Place
from entidb.storage.lmdb.readers import READERS_MAX
from entidb.storage.lmdb.turn import COMMITTING, FileTurn, SoleTurn

#: Room in a new map beside twice the file: virtual, but of 2**47 bytes that a process has. So many
#: databases can be open, and the map of few has to grow while a reader is open.
MAP_ROOM_BYTES: Final = 4 * 2**30
#: Of a limit on address space, the part that one database takes to begin with.
_MAP_SHARE: Final = 2048
MAP_BYTES_MAX: Final = 2**46
MAP_BYTES_MIN: Final = 2**20
_U64_BYTES: Final = 8
#: Where a header names its commit.
NUMBER_AT: Final = META_BYTES - META_END.size + 8
#: How to ask for address space and nothing else.
_ASIDE: Final[dict[str, int]] = (
    {}
    if sys.platform == "win32"
    else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, "prot": mmap.PROT_READ}
)


class OpenFile:
    """The data file of a store as LMDB has it open, and everything that moves the ground under
    snapshots. Only the thread that has the turn calls this."""

    def __init__(self, place: Place, gate: Gate, map_bytes: int, read_only: bool) -> None:
        """``map_bytes`` of 0: as many as the file asks for."""
        self.place = place
        self.gate = gate
        self.read_only = read_only
        self.map_bytes = map_bytes
        self.env: Any = None
        self.begin: Callable[[], Any] = self._refuse_begin
        #: What is added to LMDB's number of a commit to get its mark: a copy that is put in place
        #: counts from one again, and is the same state.
        self.marks = 0
        #: The mark after the newest commit of this process; the newest there is, if it is alone.
        self.newest = 0
        self.turn: FileTurn | SoleTurn = SoleTurn()
        self._holes = Holes()
        #: The two headers as all processes have them; nothing where they are not looked at.
        self.headers: mmap.mmap | None = None
        self._open()
        self.newest = self._number()
        try:
            self.turn = place.turn()
            place.let_in()
        except BaseException:
            self.turn.forget()
            self._close_env()
            raise
        self.turn.recover_by(self._recover)
        _FILES.add(self)

    def give_back(self) -> bool:
        """As ``SpareStorage.give_back``; LMDB's lock of the writer keeps other processes out."""
        if self.turn.memory[COMMITTING]:
            return True
        try:
            with self.place.data_file() as descriptor:
                return self._holes.step(descriptor, self._begin_to_look, self.env.readers)
        except (BlockingIOError, lmdb.MapResizedError):
            return True  # A commit is under way, or the next one maps more.

    def _begin_to_look(self) -> Any:
        """Raises ``BlockingIOError`` where the newest commit may not be durable yet."""
        self.env.reader_check()
        transaction = self.env.begin(write=True)
        if self.turn.memory[COMMITTING]:
            transaction.commit()
            raise BlockingIOError(errno.EAGAIN, "a commit is under way in another process")
        return transaction

    def mark(self) -> int:
        """The mark of the newest commit, or of one under way; what ``Storage`` promises of it."""
        gate = self.gate
        if gate.level >= CLOSED:
            gate.wait_for()
        if not self.place.shared:
            return self.newest
        # Read in the file itself: LMDB must not be asked while it is being shut. A descriptor that
        # is closed meanwhile, and even given to another file, leads to no mark that was seen.
        try:
            # Both headers with one call, and what is between them: two take longer.
            raw = os.pread(self.place.descriptor, self.numbers.size, NUMBER_AT)
            if len(raw) < self.numbers.size:
                raise OSError(errno.EBADF, "this is not the data file any more")
        except OSError as error:
            if gate.level >= CLOSED:
                gate.wait_for()
            raise storage_error(error, f"reading {gate.path}") from error
        return self.marks + int(max(self.numbers.unpack(raw)))

    def written_over(self) -> DatabaseMovedError:
        """The error where somebody has written another file over this one, which is open."""
        self.gate.doubtful = True
        return DatabaseMovedError(
            f"{self.place.data_path} is not what was written there: another file was written over "
            "it since it was opened. Nothing was written to it now; close this database, and put "
            "what is to be there in its place before it is opened again"
        )

    def _close_env(self) -> None:
        headers, self.headers = self.headers, None
        if headers is not None:
            headers.close()
        if self.env is not None:
            self.env.close()

    def _number(self) -> int:
        number: int = self.env.info()["last_txnid"]
        return number

    def _recover(self) -> None:
        """See to a commit whose owner died in it: whether it is there is decided by LMDB, when
        the next one takes its lock of the writer; and then it has to be durable, as it will be
        shown."""
        with self.gate.turns.hold():
            self.gate.find_open()
            try:
                self._begin_to_write().commit()  # nothing
                with self.place.data_file() as descriptor:
                    write_headers_again(descriptor, self.place.data_path)
            except (OSError, lmdb.Error) as error:
                raise storage_error(error, f"writing {self.place.path}") from error

    def _begin_to_write(self) -> Any:
        while True:
            try:
                return self.env.begin(write=True)
            except lmdb.MapResizedError:
                self.follow()

    def follow(self) -> None:
        """Map what another process has made the file grow to. Open snapshots would not survive
        it, so they are waited for."""
        with self.gate.at(DRAINING):
            if not self.gate.drain():
                raise StorageFullError(
                    f"{self.place.path} has grown in another process over the "
                    f"{self.map_bytes} bytes that are mapped here, and {len(self.gate.readers)} "
                    "snapshots stay open. Close snapshots sooner, or open with a larger map_bytes"
                )
            if not self._map_more(max(self.map_bytes, 2 * self.place.data_bytes())):
                raise StorageFullError(
                    f"the system gives this process no address space for {self.place.path}, which "
                    "has grown in another process (ulimit -v, RLIMIT_AS). Raise the limit"
                )

    def grow(self, batch_bytes: int) -> None:
        """Make the map larger by more than a batch of ``batch_bytes`` can need, and twice as large
        where the system gives that. Open snapshots would not survive it, so they are waited for."""
        now = self.map_bytes
        if now >= MAP_BYTES_MAX:
            raise StorageFullError(
                f"{self.place.path} has reached {now} bytes; nothing was changed"
            )
        # A reader that died with its snapshot open keeps room from being used again.
        self.env.reader_check()
        with self.gate.at(DRAINING):
            if not self.gate.drain():
                raise StorageFullError(
                    f"{self.place.path} has to grow over {now} bytes, and "
                    f"{len(self.gate.readers)} snapshots stay open; nothing was changed. "
                    "Close snapshots sooner, or open with a larger map_bytes"
                )
            for more in (max(now, 4 * batch_bytes), max(now // 4, 2 * batch_bytes)):
                if self._map_more(more):
                    return
        raise StorageFullError(
            f"the system gives this process no address space for {self.place.path} to grow beyond "
            f"{now} bytes (ulimit -v, RLIMIT_AS); nothing was changed. Raise the limit"
        )

    def grow_early(self) -> None:
        """Make room while there is still some, if that needs no waiting for readers."""
        self.env.reader_check()
        if self.gate.readers or self.map_bytes >= MAP_BYTES_MAX:
            return
        used = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        if used * 2 < self.map_bytes:
            return
        # The commit is durable, whatever becomes of this: a store that it shuts says so later.
        with contextlib.suppress(StorageError), self.gate.at(DRAINING):
            if not self.gate.readers:
                self._map_more(self.map_bytes)

    def _map_more(self, more: int) -> bool:
        """Map up to ``more`` bytes more; whether the system gives them. Without readers only.

        LMDB gives up the old map before it asks for the new one, and reads through neither if it
        does not get that; so the system is asked first."""
        size = min(self.map_bytes + more, MAP_BYTES_MAX)
        try:
            mmap.mmap(-1, size - self.map_bytes, **_ASIDE).close()
            self.env.set_mapsize(size)
        except (OSError, ValueError, OverflowError):
            return False
        except lmdb.Error as error:
            # Something else took it meanwhile. What was mapped a moment ago can be mapped again.
            self.gate.level = FROZEN
            self._close_env()
            try:
                self._open()
            except (OSError, lmdb.Error, EntiDBError) as second:
                self.shut()
                raise storage_error(second, f"mapping {self.place.path}") from error
            return False
        self.map_bytes = size
        return True

    def settle(self, error: BaseException, committed_before: int, txn: Any) -> None:
        """Find out what a failed commit did: close, open again, compare transaction numbers.

        Returns if the commit is there after all and durable; raises otherwise.
        """
        self.gate.doubtful = True
        doing = f"committing to {self.place.path}"
        assert isinstance(error, Exception)
        reason = self.commit_failure(error, doing)
        with self.gate.at(DRAINING):
            # Politeness: snapshots that are closed in time never notice.
            self.gate.drain()
            self.gate.level = FROZEN
            self.gate.wait_until_idle()
            try:
                txn.abort()
                self._close_env()
                self.gate.readers.clear()
                self.place.check()
                with self.place.data_file() as descriptor:
                    check_data_file(descriptor, self.place.data_path)
                    # Whatever the outcome: what is read now has to be what a power cut leaves.
                    write_headers_again(descriptor, self.place.data_path)
                self._open()
                committed = self.env.info()["last_txnid"]
            except (lmdb.Error, OSError, EntiDBError) as second:
                self.shut()
                after = storage_error(second, "opening it again")
                unknown = CommitUnknownError(
                    f"{storage_error(error, doing)}. Then: {after}. The store is closed; open it "
                    "again and read to find out whether the commit is there"
                )
                unknown.failed = storage_error(error, doing)
                raise unknown from error
        if committed == committed_before:
            raise reason from error

    def commit_failure(self, error: Exception, doing: str) -> StorageError:
        """The error for a commit that changed nothing."""
        # LMDB reports a write that stopped half-way as EIO, whatever stopped it.
        if code_of(error) == errno.EIO:
            reason = short_write_error(self.place.path, self.place.data_bytes(), doing)
        else:
            reason = storage_error(error, doing)
        return type(reason)(f"{reason}; nothing was changed", code=reason.code)

    def swap(self) -> None:
        """Put the copy in the temporary directory in the place of the file."""
        with self.gate.at(DRAINING):
            if not self.gate.drain():
                raise StorageError(
                    f"{len(self.gate.readers)} snapshots of {self.place.path} stay open; close "
                    "them and compact again"
                )
            self.gate.level = FROZEN
            self.gate.wait_until_idle()
            mark = self.marks + self._number()
            self._close_env()
            try:
                self.place.swap()
                self._open()
                # The same state: whatever is remembered of it stays true.
                self.marks = mark - self._number()
            except (OSError, lmdb.Error, EntiDBError) as error:
                self._reopen_or_shut()
                if isinstance(error, DatabaseMovedError):
                    raise
                raise storage_error(error, f"compacting {self.place.path}") from error

    def _reopen_or_shut(self) -> None:
        try:
            self._open()
        except (OSError, lmdb.Error, EntiDBError):
            self.shut()
            raise

    def shut(self) -> None:
        """Close everything: the gate is frozen, no thread inside LMDB, the turn ours."""
        try:
            self._close_all()
        except BaseException:
            self._close_all()  # Each step may be repeated.
            raise

    def _close_all(self) -> None:
        self.gate.level = CLOSED
        self.gate.readers.clear()
        self.turn.close()
        if self.env is not None:
            self._close_env()
            if self.gate.doubtful:
                self.place.doubt()
            elif self.place.is_last():
                self._leave()
        self.place.release()

    def _leave(self) -> None:
        with (
            contextlib.suppress(OSError, *UNREADABLE),
            self.place.data_file() as descriptor,
        ):
            self.place.leave(read_headers(descriptor))

    def _open(self) -> None:
        self.env, self.map_bytes = map_store(self.place, self.map_bytes, self.read_only)
        between = self.env.stat()["psize"] - _U64_BYTES
        self.numbers = struct.Struct(f"=Q{between}xQ")
        try:
            self.headers = self._map_headers()
        except BaseException:
            self._close_env()
            raise
        self.begin = self.env.begin

    def _map_headers(self) -> mmap.mmap | None:
        # Windows keeps a file that is mapped from being replaced; and who only reads need not ask.
        if self.read_only or sys.platform == "win32":
            return None
        # Of a descriptor of its own: a child of this process that keeps the map for a moment keeps
        # no lock with it.
        descriptor = open_to_read(self.place.data_path)
        try:
            with self.place.data_file() as held:
                if not os.path.samestat(os.fstat(descriptor), os.fstat(held)):
                    self.place.check()
                    return None
            return mmap.mmap(descriptor, 2 * self.env.stat()["psize"], access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def _refuse_begin(self) -> Any:
        raise DatabaseClosedError(f"{self.place.path} is closed; open it again")

    def leave_to_parent(self) -> None:
        """In a forked child: never touch LMDB again, not even to free it. Ending an inherited
        transaction would clear the parent's slot in the shared table of readers."""
        _INHERITED.append((self.env, self.begin, [r.txn for r in self.gate.readers]))
        if self.headers is not None:
            self.headers.close()
        self.gate.level = FORKED
        self.turn.forget()
        self.place.forget()


# ---------------------------------------------------------------- fork

#: Open files, so that a fork finds them; and what a child must keep alive without using it.
_FILES: weakref.WeakSet[OpenFile] = weakref.WeakSet()
_INHERITED: list[Any] = []


def _after_fork() -> None:
    for file in list(_FILES):
        if file.gate.level < CLOSED:
            file.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def map_store(place: Place, map_bytes: int, read_only: bool) -> tuple[Any, int]:
    """The environment of the store in ``place``, and how many bytes are mapped: ``map_bytes``, by
    default (0) what the file asks for, or less where the system gives less."""
    place.check()
    place.share_lock()
    if not read_only:
        place.make_lock_table()
    data_bytes = place.data_bytes()
    floor = max(MAP_BYTES_MIN, data_bytes)
    size = map_bytes or _map_bytes_for(data_bytes)
    while True:
        try:
            env = _map(place, size, read_only)
            break
        except lmdb.Error as error:
            if getattr(error, "code", 0) not in (0, errno.ENOMEM) and not isinstance(
                error, lmdb.MemoryError
            ):
                raise storage_error(error, f"opening {place.path}") from error
            if size // 2 < floor:
                raise storage_error(error, f"mapping {place.path}") from error
            # An address-space limit (ulimit -v, a 32-bit system): take what there is.
            size //= 2
    try:
        place.check()  # LMDB went by the path.
        if not read_only:
            env.reader_check()
            if place.first:
                restrict(place.data_path)
    except BaseException:
        env.close()
        raise
    return env, max(size, env.info()["map_size"])


def _map(place: Place, size: int, read_only: bool) -> Any:
    return lmdb.open(
        as_bytes(place.path),
        map_size=size,
        create=False,
        mode=0o600,
        max_readers=READERS_MAX,
        sync=True,
        metasync=True,
        writemap=False,
        readonly=read_only,
        # Where no process writes meanwhile, a table of readers is not needed.
        lock=place.shared or not read_only,
    )


def _map_bytes_for(data_bytes: int) -> int:
    """How much to map of a file of that size, so that it can grow for a while."""
    limit = address_space_limit()
    room = MAP_ROOM_BYTES if limit is None else min(MAP_ROOM_BYTES, limit // _MAP_SHARE)
    steps = (2 * data_bytes + room) // MAP_BYTES_MIN + 1
    return min(steps * MAP_BYTES_MIN, MAP_BYTES_MAX)


def as_bytes(path: str) -> str | bytes:
    """``path`` as LMDB's binding takes it: text it would encode as UTF-8, which not every path
    is."""
    return path if sys.platform == "win32" else os.fsencode(path)


def create_file(place: Place) -> None:
    """Put an empty data file in place in one step: a crash leaves none, never half of one."""
    try:
        where = as_bytes(place.folder.make_temporary())
        lmdb.open(where, map_size=MAP_BYTES_MIN, mode=0o600, lock=False).close()
        place.swap()
        sync_names(place.path)
    except lmdb.Error as error:
        doing = f"creating {place.path}"
        if code_of(error) == errno.ENOSPC:
            # LMDB says so whatever has stopped it.
            raise short_write_error(place.path, 0, doing) from error
        raise storage_error(error, doing) from error
    finally:
        place.folder.remove_temporary()

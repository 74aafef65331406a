"""The place of a store: its directory, the owner of the files, and that no other process uses them.

A path can come to mean another thing than what is open: a person deletes a lock file, or moves the
directory and puts a copy in its place. So two files are locked, ``entidb.lock`` and the data file
itself, and the data file is known by its number in the file system (its inode), which is compared
before something is written.

On Windows a file or directory that is open cannot be deleted, moved or replaced, so there one lock
is enough and nothing is compared.

Not here: what has to be true of the data file (``closed_file``), what is made or replaced in the
directory (``folder``), and the locks themselves (``locks``).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Final

from entidb.errors import DatabaseLockedError, StorageError
from entidb.storage.directories import NO_FOLLOW, give_as, give_owner, is_at, open_file
from entidb.storage.lmdb.closed_file import check_data_file
from entidb.storage.lmdb.company import (
    SHARING,
    holders,
    nobody_else,
    open_note,
    take_door,
    why_not_join,
    written_holder,
)
from entidb.storage.lmdb.folder import Folder
from entidb.storage.lmdb.headers import Headers
from entidb.storage.lmdb.left import DATA, LOCK, Left, left_line, read_left, signature
from entidb.storage.lmdb.readers import LMDB_LOCK, make_table
from entidb.storage.lmdb.standing import Standing
from entidb.storage.lmdb.turn import CLAIM, TURN, FileClaim, FileTurn, SoleTurn
from entidb.storage.locks import TRIES, FileLock, HeldError

#: Looks at a data file that another process has for a moment, and seconds between them.
_LOOKS: Final = 10
_LOOK_SECONDS: Final = 0.005
_LOOKS_OF_LOOKERS: Final = 3
_LOOKS_FOR_LOST: Final = 40
#: For those who come or have the store alone, when this one leaves; not worth waiting longer: the
#: next who comes first reads the file once more.
_LAST_SECONDS: Final = 1.0
#: The note in the lock file after an error that may come from a damaged page.
DOUBT: Final = b"doubt .\n"


#: What is told whom nobody has let in for as long as one waits.
_AT_THE_DOOR: Final = ", or try again if it is only being opened, closed or compacted"


class Place:
    """A store's directory, in use by this object alone; or, ``read_only``, by several processes
    of which none changes or makes anything."""

    def __init__(self, path: str, read_only: bool = False, alone: bool = False) -> None:
        """Ends with the door held, until ``let_in``; ``alone`` for good. Raises
        ``DatabaseLockedError``, ``FormatError`` (as ``check_data_file``), ``OSError``."""
        self.path = path
        self.read_only = read_only and sys.platform != "win32"
        self.data_path = os.path.join(path, DATA)
        #: File and line of the program that opened it.
        self.opened_at = _caller()
        #: What its data file said when it was taken; None if there was none, or if others had it.
        self.headers: Headers | None = None
        #: The note in the lock file since the store was last closed; None if it was not closed, or
        #: by a version that leaves nothing.
        self.left: Left | None = None
        #: Whether no other process had it when it was taken, and whether none gets in meanwhile.
        self.first = True
        self.alone = alone or not SHARING
        #: Of the data file, where it is locked; -1 when it is closed. Not asked of the lock: it is
        #: needed for every look at the mark.
        self.descriptor = -1
        self._data: FileLock | None = None
        self._lock: FileLock | None = None
        self._door: FileLock | None = None
        self._claims: list[FileClaim] = []
        self._standing = Standing(path, self.data_path)
        #: Raises ``DatabaseMovedError`` if the path no longer leads to the file that is open.
        self.check: Callable[[], None] = self._standing.check
        self.folder = Folder(path)
        try:
            if find_here(path) is not None:
                raise HeldError("")  # LMDB opens a file once in a process, for reading too.
            while not self._enter():
                continue
            #: Whether others may commit to it while this object has it: not to files that are
            #: looked at by those alone who only read.
            self.shared = not self.alone and not (self.read_only and self.first)
        except HeldError as error:
            at_the_door = SHARING and self._door is None
            self.release()
            said = self._held_by(error.holder, at_the_door=at_the_door)
            raise DatabaseLockedError(said) from error
        except BaseException:
            self.release()
            raise
        _PLACES.add(self)

    def _enter(self) -> bool:
        """False: those whom this one was to join have left meanwhile."""
        if SHARING:
            self._door = take_door(self.folder.descriptor, look=self.read_only)
        if os.path.exists(self.data_path):
            # First, because it makes nothing where another process is at work, or where something
            # else is.
            self._take_data()
        if self.read_only and not self.first and not self._go_inside():
            return False
        self._take_lock()
        if self._lock is not None:
            self.left = read_left(self._lock.found)
        # The process that had that lock may have written until it gave it back.
        if os.path.exists(self.data_path):
            self._take_data()
        if not self.first:
            why = why_not_join(b"" if self._lock is None else self._lock.found, self._files())
            if why is not None:
                raise DatabaseLockedError(self._held_by("", why))
        return True

    def _go_inside(self) -> bool:
        """A process writes here, so this one reads like those that write, and is counted."""
        assert self._data is not None
        self._close_door()
        self._door = take_door(self.folder.descriptor)
        if not self._data.have_alone():
            self._data.share()
            return True
        self._data.release()
        self._data, self.descriptor, self.first = None, -1, True
        self._close_door()
        return False

    def _take_lock(self) -> None:
        lock = os.path.join(self.path, LOCK)
        if self.read_only:
            self._lock = FileLock.look(lock)
        else:
            # Who is the first has it alone: the data file may not be the one that others have.
            self._lock = FileLock.take(lock, self._like(), shared=not self.first)

    def _files(self) -> tuple[str, ...]:
        """What all who are inside share, beside the data file."""
        return os.path.join(self.path, LMDB_LOCK), os.path.join(self.path, TURN)

    def _take_data(self) -> None:
        """Lock the data file that is here now, and know from now on which one it is and what it
        says. Raises as the constructor."""
        if sys.platform != "win32" and self._data is None:
            self._hold_data()
        if not self.first:
            return  # The process that came first has looked, and by now it may be written.
        with self.data_file() as descriptor:
            if self.headers is None or not self.headers.are_in(descriptor):
                self.headers = check_data_file(descriptor, self.data_path)

    def _hold_data(self) -> None:
        for _ in range(TRIES):
            held = self._held_data()
            if is_at(self.data_path, held.descriptor):
                self._know(held)
                return
            held.release()
            self.first = True
        raise StorageError(f"{self.data_path} is replaced again and again; see by whom")

    def _held_data(self) -> FileLock:
        """The data file: alone if no other process has it, or else with the others, if this one
        may."""
        kind = os.O_RDONLY if self.read_only else os.O_RDWR
        shared = self.read_only and not SHARING
        for look in range(_LOOKS):
            try:
                held = FileLock(open_file(self.data_path, kind), shared=shared)
            except HeldError as error:
                holder = error.holder
            else:
                if self.read_only and SHARING:
                    # A process that looks at the same time must see that no process is inside.
                    held.unlock()
                return held
            # Another who looks has it for a moment.
            if look >= (_LOOKS_OF_LOOKERS if self.read_only else 0) and not self.alone:
                with contextlib.suppress(HeldError):
                    held = FileLock(open_file(self.data_path, kind), shared=True)
                    self.first = False
                    return held
            if not SHARING:
                break
            time.sleep(_LOOK_SECONDS)
        raise HeldError(holder)

    def let_in(self) -> None:
        """Open the door to others, unless this is for one alone; from now on the store is open.
        Raises ``OSError``."""
        if self.alone:
            self._close_door()
            return
        if self.read_only:
            if not self.first:
                self._close_door()
            return  # Together with others that look, and with no other process.
        assert self._data is not None and self._lock is not None
        if self.first:
            self._lock.write(open_note(self._files()))
            self._data.share()
        self._close_door()

    def share_lock(self) -> None:
        """Before the file is mapped: an older EntiDB may come between. Raises
        ``DatabaseLockedError``."""
        if self.first and not self.alone and not self.read_only and self._lock is not None:
            try:
                self._lock.share()
            except HeldError as error:
                raise DatabaseLockedError(self._held_by(error.holder)) from error

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.release()
            self._door = None

    def is_last(self) -> bool:
        """On the way out, with nothing mapped any more: whether no other process has it open. From
        then on no process comes in until ``release``."""
        if self.alone or not self.shared:
            return not self.read_only
        if self._data is None or self._lock is None or self.read_only or self._data.descriptor < 0:
            return False
        try:
            self._door = take_door(self.folder.descriptor, timeout_s=_LAST_SECONDS)
        except (HeldError, OSError):
            return False
        return self._data.have_alone() and DOUBT not in self._lock.read()

    def doubt(self) -> None:
        """Note for the last process to leave that the file has to be looked at."""
        if self._lock is not None and not self.read_only:
            with contextlib.suppress(OSError):
                _, _, note = self._lock.read().partition(b"\n")
                self._lock.write(note + DOUBT)

    @contextlib.contextmanager
    def to_itself(self) -> Iterator[None]:
        """No other process has the store open while the block runs. Raises
        ``DatabaseLockedError``."""
        if self.alone or self._data is None:
            yield
            return
        with nobody_else(self.folder.descriptor, self._data, self.path):
            try:
                yield
            finally:
                # By now it may be another file, or closed.
                if self._data.descriptor >= 0:
                    self._data.share()

    def turn(self) -> FileTurn | SoleTurn:
        """The turn to commit, for this process. With the door held."""
        if not self.shared or self.read_only:
            return SoleTurn()
        return FileTurn(os.path.join(self.path, TURN), self._like(), self.first)

    def claim(self, name: str) -> FileClaim | SoleTurn:
        """As ``Storage.claim``."""
        if not self.shared or self.read_only:
            return SoleTurn()
        made = FileClaim(os.path.join(self.path, CLAIM + name), self._like())
        self._claims.append(made)
        return made

    def _know(self, held: FileLock) -> None:
        before, self._data, self.descriptor = self._data, held, held.descriptor
        self._standing.know(held.descriptor)
        if before is not None:
            before.release()

    def make_lock_table(self) -> None:
        """LMDB's file, before LMDB makes it with an owner of its own."""
        make_table(os.path.join(self.path, LMDB_LOCK), self._like(), self.first)

    @contextlib.contextmanager
    def data_file(self) -> Iterator[int]:
        """A descriptor of the data file that is locked, whatever the path leads to."""
        if self._data is not None:
            yield self._data.descriptor
            return
        descriptor = open_file(self.data_path, os.O_RDWR)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def data_bytes(self) -> int:
        """The size of the data file."""
        if self._data is None:
            return os.path.getsize(self.data_path)
        return os.fstat(self._data.descriptor).st_size

    # ---- what the last one left

    def is_as_left(self, headers: bytes) -> bool:
        """Whether the data file is the very one that was closed last, untouched since. What a
        disk changes by itself does not show here."""
        return self.left is not None and self.left.file == self._signature(headers)

    def leave(self, headers: Headers) -> None:
        """Note that the data file is sound as it is now. Call it when no process has it mapped.

        Where the file's own times are too coarse to show a later change, or are not ours to set,
        nothing is noted and the next one looks for himself."""
        if self._lock is None or self._data is None:
            return
        with contextlib.suppress(OSError):
            if self.is_as_left(headers.raw):
                # Nothing was written: a program that copies what has changed need not copy this.
                self.leave_as_found()
                return
            found = os.fstat(self._data.descriptor)
            # A time that no later write leaves behind, however soon it comes: those are of the
            # system's clock, which ticks.
            times = (found.st_atime_ns, found.st_mtime_ns + 1)
            os.utime(self._data.descriptor, ns=times)
            if os.fstat(self._data.descriptor).st_mtime_ns == times[1]:
                left = Left(headers.transaction, self._signature(headers.raw))
                self._lock.write(left_line(left))

    def leave_as_found(self) -> None:
        """Note again what the last one left: nothing was changed."""
        if self._lock is not None and not self.read_only:
            _, _, note = self._lock.found.partition(b"\n")
            with contextlib.suppress(OSError):
                self._lock.write(note)

    def _signature(self, headers: bytes) -> tuple[int, ...]:
        return () if self._data is None else signature(os.fstat(self._data.descriptor), headers)

    # ---- replacing the data file

    def swap(self) -> None:
        """Put the data file of the temporary directory in the place of the present one, durably,
        with owner and permissions of the old one; the lock goes over without a gap. Nobody may
        have either of them mapped."""
        self.check()
        if sys.platform == "win32":
            self.folder.put_new()
            return
        held = FileLock(self.folder.open_new())
        try:
            give_as(held.descriptor, self._like())
            os.fsync(held.descriptor)
            self.folder.put_new()
        except BaseException:
            held.release()
            raise
        self._know(held)
        self.folder.sync()

    def give(self, copy: str) -> None:
        """Give the directory ``copy`` and the data file in it to the owner of this one."""
        if sys.platform == "win32":
            return
        for path in (os.path.join(copy, DATA), copy):
            made = os.open(path, os.O_RDONLY | NO_FOLLOW)
            try:
                give_owner(made, self._like())
            finally:
                os.close(made)

    def _like(self) -> os.stat_result:
        """Whose files these are."""
        if self._data is not None:
            return os.fstat(self._data.descriptor)
        return os.stat(self.path)

    # ---- the end

    def release(self) -> None:
        """Idempotent; every step of it too."""
        for claim in self._claims:
            # A right to a store that is closed would keep others from it.
            claim.give_back()
            claim.forget()
        self.descriptor = -1
        if self._data is not None:
            self._data.release()
        if self._lock is not None:
            self._lock.release()
        self._close_door()
        self._leave_folder()

    def forget(self) -> None:
        """In a forked child: the locks are the parent's."""
        self.descriptor = -1
        if self._data is not None:
            self._data.forget()
        if self._lock is not None:
            self._lock.forget()
        if self._door is not None:
            self._door.forget()
        for claim in self._claims:
            claim.forget()
        self._leave_folder()

    def _leave_folder(self) -> None:
        self.folder.close()
        _PLACES.discard(self)

    def _held_by(self, holder: str, why: str = "", *, at_the_door: bool = False) -> str:
        here = find_here(self.path)
        if here is not None:
            return (
                f"{self.path} is already open in this process{_as(here, self)}, since "
                f"{here.opened_at}: use that "
                "object, or end it with close() or a `with` block before opening again. If no "
                "name is left for it, the traceback of the last uncaught exception keeps it "
                "(sys.last_value, sys.last_traceback), until the next one"
            )
        pids = [holder] if holder else holders(self.path)
        pids = pids or [written_holder(os.path.join(self.path, LOCK))]
        process = f"process {pids[0]}" if pids[0] else "another process"
        if why:
            return f"{self.path} is open in {process}; close it there. {why}"
        said = f"{self.path} is open in {process}; close it there"
        return said + (_AT_THE_DOOR if at_the_door else "")


_PLACES: weakref.WeakSet[Place] = weakref.WeakSet()


def _as(other: Place, place: Place) -> str:
    linked = other.path != place.path and not os.path.samefile(other.path, place.path)
    return f" as {other.path}, whose data file is linked here" if linked else ""


def find_here(path: str) -> Place | None:
    """The open place of this process in the directory at ``path``, or of its data file, which may
    be linked into another directory: LMDB opens a file once in a process."""
    with contextlib.suppress(OSError):
        here = [os.stat(path)]
        with contextlib.suppress(OSError):
            here.append(os.stat(os.path.join(path, DATA)))
        for place in list(_PLACES):
            theirs = [place.folder.stat()]
            if place.descriptor >= 0:
                theirs.append(os.fstat(place.descriptor))
            if any(os.path.samestat(one, other) for one in here for other in theirs):
                return place
    return None


def take_place(path: str, read_only: bool = False, alone: bool = False) -> Place:
    """The directory at ``path``, for the caller. Raises as ``Place``."""
    try:
        return Place(path, read_only, alone)
    except DatabaseLockedError:
        if find_here(path) is None:
            raise
    # An object without references may still wait for the collector, or for a thread that looks
    # at it for a moment.
    gc.collect()
    for _ in range(_LOOKS_FOR_LOST):
        if find_here(path) is None:
            break
        time.sleep(_LOOK_SECONDS)
    return Place(path, read_only, alone)


def _caller() -> str:
    """File and line of the innermost frame that is not EntiDB's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith("entidb."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"

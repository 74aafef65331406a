"""A store in memory: a dict, and its keys in order. The backend to read first.

It keeps every promise of ``base`` except durability: nothing survives the process, and there are
no files to back up. A commit changes the dict in place, unless a snapshot of the current state is
open: then it changes a copy, and the snapshot keeps the original.

Several openers may have one: ``another`` makes one more, for another thread, or for the simulator
another process.
"""

from __future__ import annotations

import time
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from entidb.errors import CommitStaleError, DatabaseClosedError, StorageError
from entidb.storage.base import KEY_BYTES_MAX, Batch, StorageInfo
from entidb.storage.turns import Turn, Turns

#: Below this many new or deleted keys each is put in or taken out by itself; above, the list of
#: keys is built again, which sorting makes cheap because it is almost sorted.
_SINGLE_KEYS_MAX: Final = 8
#: Seconds between two looks at whose turn it is, or at the mark.
_LOOK_SECONDS: Final = 0.001


class _State:
    """One version of the store: never changed while there are ``readers``. Adding to a set and
    discarding from it is atomic, so that it needs no lock."""

    __slots__ = ("keys", "mark", "readers", "values")

    def __init__(self, values: dict[bytes, bytes], keys: list[bytes], mark: int) -> None:
        self.values = values
        self.keys = keys
        self.mark = mark
        self.readers: set[object] = set()


class _Shared:
    """What the openers of a store have in common."""

    __slots__ = ("claims", "line", "state", "turns")

    def __init__(self, state: _State) -> None:
        self.state = state
        #: Whose thread may look at the state without being announced, or change it.
        self.turns = Turns()
        #: Which opener may commit: the first. Weak, because one that is forgotten is dead.
        self.line: list[weakref.ref[MemoryStorage]] = []
        #: The same for other rights.
        self.claims: dict[str, list[weakref.ref[MemoryStorage]]] = {}


class MemoryTurn:
    """The turn of one opener: first come, first served."""

    __slots__ = ("_line", "_me")

    def __init__(self, line: list[weakref.ref[MemoryStorage]], me: MemoryStorage) -> None:
        self._line = line
        self._me = weakref.ref(me)

    def take(self, timeout_s: float | None = None) -> bool:
        line, me = self._line, self._me
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.mine:
            if me not in line:
                line.append(me)
            # Another thread may give it back meanwhile.
            first = next(iter(line[:1]), me)
            if first is me:
                continue
            owner = first()
            if owner is None or owner._closed:
                _leave(line, first)
                continue
            if deadline is not None and time.monotonic() >= deadline:
                self.give_back()
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def give_back(self) -> None:
        _leave(self._line, self._me)

    @property
    def mine(self) -> bool:
        return self._line[:1] == [self._me]

    def holder(self) -> str:
        return "another opener" if self._line and not self.mine else ""


def _leave(line: list[weakref.ref[MemoryStorage]], one: weakref.ref[MemoryStorage]) -> None:
    try:
        line.remove(one)
    except ValueError:
        return


class MemorySnapshot:
    """A view of one state."""

    __slots__ = ("_reader", "_state", "_store", "mark")

    def __init__(self, store: MemoryStorage, state: _State) -> None:
        self._reader = reader = object()
        self._store = store
        self.mark = state.mark
        self._state: _State | None = state
        state.readers.add(reader)

    def get(self, key: bytes) -> bytes | None:
        return self._open_state().values.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return list(map(self._open_state().values.get, keys))

    def scan(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        values = self._open_state().values
        keys = self.scan_keys(start, stop, limit=limit, reverse=reverse)
        return [(key, values[key]) for key in keys]

    def scan_keys(
        self,
        start: bytes,
        stop: bytes,
        *,
        limit: int | None = None,
        reverse: bool = False,
        proved: bool = False,
    ) -> list[bytes]:
        keys = self._open_state().keys
        first = bisect_left(keys, start)
        end = max(first, bisect_left(keys, stop))
        count = end - first if limit is None else max(0, min(limit, end - first))
        if reverse:
            return keys[end - count : end][::-1]
        return keys[first : first + count]

    def close(self) -> None:
        state = self._state
        if state is not None:
            state.readers.discard(self._reader)
            self._state = None

    def __enter__(self) -> MemorySnapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            state = self._state
        except AttributeError:
            return  # Interrupted while it was made.
        if state is not None:
            state.readers.discard(self._reader)

    def _open_state(self) -> _State:
        state = self._state
        if state is None:
            raise DatabaseClosedError("this snapshot is closed; take a new one")
        if self._store._closed:
            raise DatabaseClosedError("the store of this snapshot is closed; open it again")
        return state


class MemoryStorage:
    """A store that lives as long as the object. Same promises as on disk, without the disk."""

    #: Contracts ask this: no files, so no ``backup``, and nothing to open again.
    supports_files: Final = False

    def __init__(self, _shared: _Shared | None = None) -> None:
        self._shared = _Shared(_State({}, [], 0)) if _shared is None else _shared
        self._turns = self._shared.turns
        self.turn = MemoryTurn(self._shared.line, self)
        self._closed = False

    def another(self) -> MemoryStorage:
        """One more opener of the same store; what either commits, both read."""
        self._check_open()
        return MemoryStorage(self._shared)

    def claim(self, name: str) -> MemoryTurn:
        return MemoryTurn(self._shared.claims.setdefault(name, []), self)

    @property
    def shared(self) -> bool:
        """False: the code that made another opener tells this one's database when to look."""
        return False

    @property
    def _state(self) -> _State:
        return self._shared.state

    def snapshot(self) -> MemorySnapshot:
        self._check_open()
        # Announced first, then looked: either this reader sees the turn of a commit, or the
        # commit sees this reader and changes a copy.
        made = MemorySnapshot(self, self._shared.state)
        if not self._turns.taken:
            return made
        made.close()
        with self._turns.hold():
            self._check_open()
            return MemorySnapshot(self, self._shared.state)

    def mark(self) -> int:
        self._check_open()
        return self._shared.state.mark

    def wait(self, mark: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.mark() == mark:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def commit(self, batch: Batch, after: int | None = None) -> int:
        for key, value in batch.items():
            _check_record(key, value)
        if not self.turn.mine:
            self._check_open()
            try:
                self.turn.take()
                return self._commit_in_turn(batch, after)
            finally:
                self.turn.give_back()
        return self._commit_in_turn(batch, after)

    def _commit_in_turn(self, batch: Batch, after: int | None) -> int:
        turn = Turn()
        try:
            self._turns.take(turn)
            mark = self._commit(batch, after)
            self._turns.give_back(turn)
        except BaseException:
            self._turns.give_back(turn)
            raise
        return mark

    def _commit(self, batch: Batch, after: int | None) -> int:
        self._check_open()
        state = self._shared.state
        if after is not None and after != state.mark:
            raise CommitStaleError.of("this store", after, state.mark)
        if not batch:
            return state.mark
        mark = state.mark + 1
        if state.readers:
            state = _State(state.values.copy(), state.keys.copy(), state.mark)
            self._shared.state = state
        # Ahead and never behind, wherever an interrupt comes.
        state.mark = mark
        try:
            _apply(state, batch)
        except BaseException:
            # Interrupted: all of it or nothing, and here all of it is the shorter way.
            _apply_again(state, batch)
            raise
        return mark

    def copy(self, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> MemoryStorage:
        """An independent store with the same records and ``changes`` applied to it only: what
        a backup, a restored or a copied device is made of."""
        made = MemoryStorage()
        with self._turns.hold():
            self._check_open()
            state = self._shared.state
            made._shared.state = _State(state.values.copy(), state.keys.copy(), 0)
        made.commit(dict(changes))
        return made

    def verify(self) -> Iterator[str]:
        with self.snapshot() as snapshot:
            state = snapshot._open_state()
            if any(a >= b for a, b in zip(state.keys, state.keys[1:], strict=False)):
                yield "keys are out of order"
            if set(state.keys) != state.values.keys():
                yield f"{len(state.keys)} keys in order stand for {len(state.values)} records"

    def compact(self) -> None:
        """Nothing to give back: what is deleted is gone."""
        with self._turns.hold():
            self._check_open()

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        raise StorageError(
            f"a database in memory has no files, and none was written to {path}: only one in a "
            "directory can be backed up"
        )

    def info(self) -> StorageInfo:
        with self._turns.hold():
            self._check_open()
            values = self._state.values
            used = sum(len(key) + len(value) for key, value in values.items())
            return StorageInfo("memory", None, 0, used, 0, len(values), len(self._state.readers))

    def close(self) -> None:
        self._closed = True
        self.turn.give_back()

    def _check_open(self) -> None:
        if self._closed:
            raise DatabaseClosedError("the store is closed; open it again")


def _check_record(key: bytes, value: bytes | None) -> None:
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise StorageError(
            f"a key of {len(key)} bytes cannot be stored; keys have 1 to {KEY_BYTES_MAX} bytes"
        )
    for part in (key, value):
        if part is not None and type(part) is not bytes:
            raise TypeError(f"keys and values are bytes, not {type(part).__name__}")


def _apply_again(state: _State, batch: Batch) -> None:
    for key, value in batch.items():
        if value is None:
            state.values.pop(key, None)
        else:
            state.values[key] = value
    state.keys[:] = sorted(state.values)


def _apply(state: _State, batch: Batch) -> None:
    values, keys = state.values, state.keys
    new = [key for key, value in batch.items() if value is not None and key not in values]
    gone = [key for key, value in batch.items() if value is None and key in values]
    for key, value in batch.items():
        if value is not None:
            values[key] = value
    for key in gone:
        del values[key]
    if len(new) + len(gone) > _SINGLE_KEYS_MAX:
        keys.extend(new)
        keys.sort()
        if gone:
            keys[:] = [key for key in keys if key in values]
        return
    for key in new:
        keys.insert(bisect_left(keys, key), key)
    for key in gone:
        del keys[bisect_left(keys, key)]

"""What was read or written lately, good for one mark: readers of the newest state find it in
memory, after the one question that says which state that is.

What another node commits moves the mark, and everything is forgotten. What this opener commits is
known, so that it moves on with the commit: what one device has pushed is there for all that pull
it. Where a connection was lost the server may be another one, with another past; nothing that was
known before it counts then.

Not here: who asks (``snapshot``), and which marks there are (``store``).
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from entidb.storage.base import Batch

#: Bytes that one store remembers, and all stores of a node together.
STORE_BYTES: Final = 1 << 20
NODE_BYTES: Final = 32 << 20
#: Of a value that is remembered.
VALUE_BYTES_MAX: Final = 8 << 10
#: What a record takes in memory beside its bytes, roughly.
_OVERHEAD: Final = 150
#: Keys of ranges that are known whole; with more of them all ranges are forgotten.
_KEYS_MAX: Final = 10_000
#: Ranges that lie apart.
_RANGES_MAX: Final = 64
#: Records of a commit that is followed; after a larger one everything is read anew.
_BATCH_MAX: Final = 2000
#: No state. So it stands here while what is remembered is changed: a thread that is interrupted in
#: the middle, by Ctrl-C for one, leaves nothing that anybody believes.
_NOWHERE: Final = -1, 0


class Memory:
    """What the stores of one node remember together: the one that was read longest ago forgets
    first. Thread-safe."""

    def __init__(self, most: int = NODE_BYTES) -> None:
        #: Guards this and everything that is remembered; nothing is waited for meanwhile.
        self.lock: Final = threading.Lock()
        self._most = most
        self._used = 0
        self._stores: OrderedDict[int, Remembered] = OrderedDict()

    def used(self, store: Remembered, change: int) -> None:
        """Under the lock: what ``store`` takes has changed by so many bytes."""
        self._used += change
        self._stores[id(store)] = store
        self._stores.move_to_end(id(store))
        while self._used > self._most and self._stores:
            next(iter(self._stores.values())).forget()

    def gone(self, store: Remembered, size: int) -> None:
        """Under the lock: it has forgotten everything."""
        self._used -= size
        self._stores.pop(id(store), None)


class Remembered:
    """See the module. Of one opener of a store; thread-safe."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = memory.lock
        #: The state that is remembered, and how many connections had been lost when it was read.
        self._at = _NOWHERE
        self._values: dict[bytes, bytes] = {}
        self._size = 0
        #: What ``memory`` counts of it.
        self._told = 0
        #: Ranges of keys that are known whole: where each begins and ends, ascending and apart, and
        #: all keys in them.
        self._starts: list[bytes] = []
        self._ends: list[bytes] = []
        self._keys: list[bytes] = []
        self._committing = 0

    # ------------------------------------------------------------ states

    def begin(self, mark: int, losses: int) -> None:
        """Somebody reads the state ``mark``."""
        with self._lock:
            if self._at == (mark, losses):
                return
            if self._at[1] == losses and self._at[0] >= mark - self._committing:
                return  # an older state; or one that a commit of this opener is about to bring
            self.forget()
            self._at = mark, losses

    @contextlib.contextmanager
    def commit(self) -> Iterator[None]:
        """Around a commit of this opener, and ``committed``."""
        with self._lock:
            self._committing += 1
        try:
            yield
        finally:
            with self._lock:
                self._committing -= 1

    def committed(self, mark: int, losses: int, batch: Batch) -> None:
        """The state ``mark`` is the one before it with ``batch``."""
        with self._lock:
            if self._at != (mark - 1, losses):
                return
            if len(batch) > _BATCH_MAX:
                self.forget()
                return
            self._at = _NOWHERE
            for key, value in batch.items():
                self._drop(key)
                if value is not None:
                    self._keep(key, value)
                self._move_key(key, there=value is not None)
            self._settle()
            self._at = mark, losses

    def end(self) -> None:
        """The opener has closed the store."""
        with self._lock:
            self.forget()

    def forget(self) -> None:
        """Under the lock: everything."""
        self._at = _NOWHERE
        told, self._told, self._size = self._told, 0, 0
        self._values = {}
        self._starts, self._ends, self._keys = [], [], []
        self._memory.gone(self, told)

    # ------------------------------------------------------------ values

    def values(self, mark: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """What is remembered of ``keys`` in the state ``mark``; None: nothing."""
        with self._lock:
            if self._at[0] != mark:
                return [None] * len(keys)
            return [self._values.get(key) for key in keys]

    def read(self, mark: int, pairs: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Values that were found in the state ``mark``."""
        with self._lock:
            if self._at[0] == mark:
                for key, value in pairs:
                    if value is not None and key not in self._values:
                        self._keep(key, value)
                self._settle()

    def _keep(self, key: bytes, value: bytes) -> None:
        if len(value) <= VALUE_BYTES_MAX:
            self._values[key] = value
            self._size += _size(key, value)

    def _drop(self, key: bytes) -> None:
        old = self._values.pop(key, None)
        if old is not None:
            self._size -= _size(key, old)

    def _settle(self) -> None:
        """Forget the oldest values beyond the most that is remembered."""
        while self._size > STORE_BYTES:
            self._drop(next(iter(self._values)))
        change, self._told = self._size - self._told, self._size
        self._memory.used(self, change)

    # ------------------------------------------------------------ ranges of keys

    def keys(self, mark: int, start: bytes, stop: bytes, limit: int) -> list[bytes] | None:
        """The first ``limit`` keys of a range in the state ``mark``, if they are known."""
        with self._lock:
            if self._at[0] != mark:
                return None
            place = self._range_of(start)
            if place is None:
                return None
            end = self._ends[place]
            first = bisect_left(self._keys, start)
            last = bisect_left(self._keys, min(stop, end), first)
            found = self._keys[first : min(last, first + limit)]
            return found if len(found) == limit or stop <= end else None

    def read_keys(self, mark: int, start: bytes, stop: bytes, keys: Sequence[bytes]) -> None:
        """All keys from ``start`` to before ``stop`` in the state ``mark``."""
        with self._lock:
            if self._at[0] != mark or start >= stop:
                return
            at, self._at = self._at, _NOWHERE
            if len(self._keys) + len(keys) > _KEYS_MAX or len(self._starts) >= _RANGES_MAX:
                self._starts, self._ends, self._keys = [], [], []
            # Those that it touches become one with it; what they know of it is the same.
            first = bisect_left(self._ends, start)
            last = first
            low, high = start, stop
            while last < len(self._starts) and self._starts[last] <= stop:
                low, high = min(low, self._starts[last]), max(high, self._ends[last])
                last += 1
            self._starts[first:last], self._ends[first:last] = [low], [high]
            self._keys[bisect_left(self._keys, start) : bisect_left(self._keys, stop)] = keys
            self._at = at

    def _range_of(self, key: bytes) -> int | None:
        """The place of the range that ``key`` lies in."""
        place = bisect_left(self._ends, key)
        if place < len(self._ends) and self._ends[place] == key:
            place += 1  # it ends before this key
        if place < len(self._starts) and self._starts[place] <= key:
            return place
        return None

    def _move_key(self, key: bytes, *, there: bool) -> None:
        if self._range_of(key) is None:
            return
        place = bisect_left(self._keys, key)
        has = place < len(self._keys) and self._keys[place] == key
        if has and not there:
            del self._keys[place]
        elif there and not has:
            self._keys.insert(place, key)


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + _OVERHEAD


__all__ = ["NODE_BYTES", "STORE_BYTES", "Memory", "Remembered"]

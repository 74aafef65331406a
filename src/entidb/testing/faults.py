"""Things that break on purpose: a store that crashes and fills up, a network that loses messages.

The random streams that are given in decide what breaks, and when; ``checkers`` checks what comes of
it. Both classes are for the simulator and for users' own tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from entidb.errors import CommitUnknownError, StorageFullError
from entidb.storage import MemoryStorage, Storage
from entidb.storage.base import Batch, Snapshot, StorageInfo, StoreTurn
from entidb.storage.regions import spacers_of


class Crash(BaseException):
    """The power went out. Not an ``Exception``: no code under test may catch it."""


#: What can happen to one storage commit, in the order in which it is drawn.
COMMIT_FAULTS: Final = ("crash_before", "crash_after", "commit_unknown", "disk_full", "map_full")

Observe = Callable[[Batch, Mapping[bytes, bytes | None], Mapping[bytes, bytes]], None]


class FaultyStorage:
    """A store whose commits can fail as ``entidb.storage.base`` allows, and the process with them.

    ``rates`` maps names of ``COMMIT_FAULTS`` to chances per thousand; ``fired`` is called each
    time. ``observe`` is called after every commit that became durable, with the batch, what its
    keys held before, and all records as they are now, before the committer goes on. ``armed`` False
    switches all faults off.
    """

    def __init__(
        self,
        inner: Storage,
        rng: random.Random,
        rates: Mapping[str, int],
        *,
        fired: Callable[[str], None] = lambda name: None,
        observe: Observe | None = None,
    ) -> None:
        self.inner = inner
        self.armed = True
        self.commits = 0
        self._rng = rng
        self._rates = [(name, rates[name]) for name in COMMIT_FAULTS if rates.get(name)]
        self._fired = fired
        self._observe = observe
        # A store on disk is shadowed, so that its content can be read at memory speed, and
        # compared with what comes back when it is opened again.
        self._shadow = None if isinstance(inner, MemoryStorage) else read_records(inner)
        #: These go straight to the store: they are the hot path and never fail.
        self.snapshot: Callable[[], Snapshot] = inner.snapshot
        self.mark: Callable[[], int] = inner.mark
        #: Called with every ``info``.
        self.measured: Callable[[StorageInfo], None] = lambda info: None

    @property
    def records(self) -> Mapping[bytes, bytes]:
        """Everything that is durable now. Valid until the next commit."""
        if isinstance(self.inner, MemoryStorage):
            return self.inner._state.values
        assert self._shadow is not None
        return self._shadow

    @property
    def turn(self) -> StoreTurn:
        return self.inner.turn

    def claim(self, name: str) -> StoreTurn:
        return self.inner.claim(name)

    @property
    def shared(self) -> bool:
        return self.inner.shared

    def wait(self, mark: int, timeout_s: float) -> bool:
        return self.inner.wait(mark, timeout_s)

    def commit(self, batch: Batch, after: int | None = None) -> int:
        fault = self._draw() if self.armed and self._rates else None
        if fault is None:
            return self._apply(batch, after)
        self._fired(fault)
        if fault == "crash_before":
            raise Crash
        if fault == "disk_full":
            raise StorageFullError("the simulated disk is full")
        if fault == "map_full":
            raise StorageFullError("the simulated map is full")
        if fault == "crash_after":
            self._apply(batch, after)
            raise Crash
        if self._rng.random() < 0.5:
            self._apply(batch, after)
        self.inner.close()
        raise CommitUnknownError("the simulated disk did not say whether it has written")

    def copy(self, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> MemoryStorage:
        """What a restart, a backup or a copied device finds: the durable records only."""
        made = MemoryStorage()
        made.commit(dict(self.records))
        made.commit(dict(changes))
        return made

    def verify(self) -> Iterator[str]:
        return self.inner.verify()

    def compact(self) -> None:
        self.inner.compact()

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        self.inner.backup(path, changes)

    def info(self) -> StorageInfo:
        info = self.inner.info()
        self.measured(info)
        return info

    def spacers(self, regions: Sequence[bytes]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        return spacers_of(self.inner, regions)

    def close(self) -> None:
        self.inner.close()

    def _draw(self) -> str | None:
        chance = self._rng.random() * 1000
        for name, rate in self._rates:
            if chance < rate:
                return name
            chance -= rate
        return None

    def _apply(self, batch: Batch, after: int | None) -> int:
        observe = self._observe
        if observe is None:
            return self._put(batch, after)
        get = self.records.get
        old = {key: get(key) for key in batch}
        mark = self._put(batch, after)
        self.commits += 1
        observe(batch, old, self.records)
        return mark

    def _put(self, batch: Batch, after: int | None) -> int:
        mark = self.inner.commit(batch, after)
        if self._shadow is None:
            return mark
        for key, value in batch.items():
            if value is None:
                self._shadow.pop(key, None)
            else:
                self._shadow[key] = value
        return mark


def read_records(storage: Storage) -> dict[bytes, bytes]:
    """Everything in a store."""
    with storage.snapshot() as snapshot:
        return dict(snapshot.scan(b"\0", b"\xff" * 512))


class Network:
    """Decides what happens to each message. ``blocked`` holds (device, direction) of partitions."""

    def __init__(
        self, rng: random.Random, rates: Mapping[str, int], fired: Callable[[str], None]
    ) -> None:
        self.armed = True
        self.blocked: dict[tuple[str, str], int] = {}
        self._rng = rng
        self._rates = rates
        self._fired = fired
        self._latency = rates["latency_ms"]

    def deliveries(
        self, device: str, direction: str, data: bytes, now: int
    ) -> list[tuple[int, bytes]]:
        """(delay in ms, bytes) of each arrival of ``data``; none when it is lost."""
        rng = self._rng
        delay = 1 + int(rng.random() * self._latency)
        if not self.armed:
            return [(delay, data)]
        until = self.blocked.get((device, direction))
        if until is not None and until > now:
            return []
        if self._chance("lost"):
            return []
        if self._chance("late"):
            delay += 2000 + int(rng.random() * 20_000)
        if self._chance("reordered"):
            delay += int(rng.random() * 50 * self._latency)
        if self._chance("cut"):
            data = data[: int(rng.random() * len(data))]
        if self._chance("repeated"):
            return [(delay, data), (delay + 1 + int(rng.random() * 5000), data)]
        return [(delay, data)]

    def partition(self, device: str, until: int, *, one_way: bool) -> None:
        directions = [self._rng.choice(("up", "down"))] if one_way else ["up", "down"]
        for direction in directions:
            self.blocked[device, direction] = until

    def _chance(self, name: str) -> bool:
        rate = self._rates[name]
        if rate and self._rng.random() * 1000 < rate:
            self._fired(name)
            return True
        return False

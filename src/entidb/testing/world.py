"""What a run of the simulator happens in: virtual time, chance by the seed, the trace, the stores.

``simulator`` decides who lives in it, and what happens to them; the network and the faults of a
store are in ``faults``.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Final, Protocol

from entidb.server.hooks import ValidateHook
from entidb.storage import MemoryStorage, Storage, open_storage
from entidb.sync import ConflictPolicy
from entidb.testing import knobs as knob
from entidb.testing.faults import FaultyStorage, Network, Observe, read_records
from entidb.testing.invariants import Checks

#: Faults that turn a run: part of its story, where the others are part of the trace only.
_TOLD: Final = frozenset(
    (
        "partition",
        "partition_one_way",
        "clock_jump",
        "scope",
        "scope_in_cycle",
        "grants",
        "people",
        "local_collection",
        "crash_before",
        "crash_after",
        "commit_unknown",
        "server_crash_before",
        "server_crash_after",
        "server_commit_unknown",
        "node_pause",
        "turn_lost",
        "standby_away",
        "store_restart",
        "failover",
    )
)
#: Faults that hold nobody up.
_HARMLESS: Final = frozenset(
    (
        *("ahead", "bulk", "clock_jump", "clock_offset_ms", "group", "indexes", "live"),
        *("local_in_cycle", "person", "policy_raises", "reader", "refuse", "refuse_raises"),
        *("round", "round_behind", "server_writes", "unique", "upcast"),
        *("quota_entities", "quota_bytes", "pages"),
    )
)
_MAP_BYTES: Final = 1 << 16
EPOCH_MS = 1_750_000_000_000
STORY_LINES_MAX = 400


@dataclass(frozen=True)
class Options:
    """What a run gets beside its seed. ``policy`` replaces every collection's, ``validate`` the
    server's hook; what is written has the fields of one of ``values`` beside its own; ``trace`` is
    called with every event."""

    settings: Mapping[str, int] = field(default_factory=dict)
    policy: ConflictPolicy | None = None
    validate: ValidateHook | None = None
    values: Sequence[Mapping[str, Any]] = ()
    trace: Callable[[str], None] | None = None


class Owner(Protocol):
    """The owner of a store: a device, or a database of the server."""

    name: str
    storage: FaultyStorage
    #: What the names of its storage faults begin with, and the invariant of its restarts.
    faults_begin: str
    durable: str

    def rates(self) -> dict[str, int]: ...

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Mapping[bytes, bytes],
    ) -> None: ...


class World:
    """Time, chance, the trace, the network and the stores of one run."""

    def __init__(self, seed: int, options: Options) -> None:
        self.seed = seed
        self.options = options
        self.knobs = knob.override(knob.draw(seed), dict(options.settings))
        #: Processes of the server. A file on disk is opened once in a process such as this.
        self.nodes = 1 if self.knobs.lmdb else max(1, self.knobs.nodes)
        self.now = 0
        self.epoch_ms = EPOCH_MS
        self.quiet = False
        self.events = 0
        self.digest = hashlib.sha256(f"{seed} {self.knobs}".encode())
        self.faults: Counter[str] = Counter()
        #: When something last went wrong that may hold somebody up.
        self.disturbed_at = 0
        self.checks = Checks()
        self.story: list[str] = []
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._directory: str | None = None
        self._stores = count()
        #: Stores on disk, and where they are: one that failed is closed, and cannot be asked any
        #: more.
        self._on_disk: dict[Storage, str] = {}
        self.rng = self.stream("world")
        self._crashes = self.stream("crashes")
        self.server_clock = WorldClock(self)
        self.network = Network(self.stream("network"), asdict(self.knobs), self.fired)

    # ------------------------------------------------------------ time, chance, trace

    def stream(self, name: str) -> random.Random:
        return knob.stream(self.seed, name)

    def after(self, delay_ms: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_ms, next(self._order), action))

    def run_until(self, end: int) -> None:
        """Every event that is due by then; those at the very end too."""
        while self._heap and self._heap[0][0] <= end:
            self.step()
        self.now = max(self.now, end)

    def step(self) -> bool:
        """The next event; False if there is none."""
        if not self._heap:
            return False
        self.now, _, action = heapq.heappop(self._heap)
        action()
        return True

    def trace(self, *parts: object) -> None:
        """One event: part of what makes two runs the same."""
        self.events += 1
        line = f"{self.now} {' '.join(map(str, parts))}\n"
        self.digest.update(line.encode())
        if self.options.trace is not None:
            self.options.trace(line[:-1])

    def fired(self, fault: str) -> None:
        self.faults[fault] += 1
        if fault not in _HARMLESS:
            self.disturbed_at = self.now
        self.trace("fault", fault)
        if fault in _TOLD:
            self.tell(fault.replace("_", " "))

    def tell(self, line: str) -> None:
        if len(self.story) < STORY_LINES_MAX:
            self.story.append(f"{self.now:>8} ms  {line}")

    # ------------------------------------------------------------ stores

    def new_store(self, owner: Owner, records: Mapping[bytes, bytes] | None) -> FaultyStorage:
        """A store for ``owner`` with these records in it."""
        inner = self._inner()
        inner.commit(dict(records or {}))
        return self.store_over(owner, inner)

    def reopen_store(self, owner: Owner) -> FaultyStorage:
        """What a new process finds: the durable state, and nothing else."""
        store = owner.storage
        if isinstance(store.inner, MemoryStorage):
            return self.store_over(owner, store.copy())
        path = self._on_disk[store.inner]
        store.inner.close()
        inner = self._open_on_disk(path)
        self.checks.that(
            read_records(inner) == dict(store.records),
            owner.durable,
            f"the store of {owner.name} came back with other records than were committed",
        )
        return self.store_over(owner, inner)

    def _inner(self) -> Storage:
        if not self.knobs.lmdb:
            return MemoryStorage()
        if self._directory is None:
            self._directory = tempfile.mkdtemp(prefix="entidb-simulator-")
            self.fired("lmdb")
        return self._open_on_disk(f"{self._directory}/{next(self._stores)}")

    def _open_on_disk(self, path: str) -> Storage:
        """With a map that soon has to grow. No other thread closes snapshots meanwhile, so waiting
        for them is useless: a reader that stays makes the commit fail as "full" instead."""
        made = open_storage(path, map_bytes=_MAP_BYTES, drain_seconds=0.0)
        self._on_disk[made] = path
        return made

    def observer(self, owner: Owner) -> Observe:
        """What a store of ``owner`` tells its commits."""

        def observe(
            batch: Mapping[bytes, bytes | None],
            old: Mapping[bytes, bytes | None],
            records: Mapping[bytes, bytes],
        ) -> None:
            self.trace("stored", owner.name, len(batch))
            owner.stored(batch, old, records)

        return observe

    def store_over(self, owner: Owner, inner: Storage) -> FaultyStorage:
        """``inner``, with the faults of ``owner``."""
        rates = owner.rates()
        prefix = owner.faults_begin
        return FaultyStorage(
            inner,
            self._crashes,
            rates,
            fired=lambda fault: self.fired(prefix + fault),
            observe=self.observer(owner),
        )

    def close(self) -> None:
        for store in self._on_disk:
            store.close()
        if self._directory is not None:
            shutil.rmtree(self._directory)


class WorldClock:
    """Simulated time, off by ``offset_ms``. ``wait`` never sleeps."""

    def __init__(self, world: World, offset_ms: int = 0) -> None:
        self._world = world
        self.offset_ms = offset_ms

    def now_ms(self) -> int:
        return self._world.epoch_ms + self._world.now + self.offset_ms

    def monotonic(self) -> float:
        return self._world.now / 1000

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.is_set()

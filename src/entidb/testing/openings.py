"""The store of one database of a simulated server, as its processes open it: files that the one
node of a server has open alone, or a store between several nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from entidb.storage import MemoryStorage
from entidb.testing.checkers import ServerWatch
from entidb.testing.faults import FaultyStorage, Observe
from entidb.testing.node_store import NodeStorage, SharedStore
from entidb.testing.world import Owner, World


class OpenedNode(Owner, Protocol):
    """The database whose store it is."""

    watch: ServerWatch

    def pause(self, storage: NodeStorage) -> None:
        """A node comes to a place where it may be paused."""
        ...

    def seen_later(self) -> Observe:
        """``stored``, for a commit of now, when that becomes durable."""
        ...


class Openings:
    """See the module."""

    def __init__(self, world: World, owner: OpenedNode) -> None:
        self._world = world
        self._owner = owner
        self._rng = world.stream(f"store of {owner.name}")
        #: Files that no process has opened yet.
        self._placed: FaultyStorage | None = None
        self._shared: SharedStore | None = None
        #: How often another server has led: no two openings have one number.
        self._promotions = 0
        self.place(None)
        owner.storage = self.present

    @property
    def present(self) -> FaultyStorage:
        """What lies there, whether or not a process has opened it since."""
        return self._owner.storage if self._placed is None else self._placed

    @property
    def in_step(self) -> bool:
        """Whether what lies there is what was told of it."""
        return self._shared is None or self._shared.in_step

    def place(self, records: Mapping[bytes, bytes] | None) -> None:
        """Something else lies there now."""
        if self._world.nodes == 1:
            self._placed = self._world.new_store(self._owner, records)
            return
        if self._shared is not None:
            self._shared.drop()
        self._shared = SharedStore(self._world, self._rng, records or {}, self._look_at)
        self._look_at(self._shared.base)

    @property
    def between_nodes(self) -> bool:
        return self._shared is not None

    def promote(self, records: Mapping[bytes, bytes]) -> None:
        """Of a store between nodes, which go on: a standby leads that has only ``records``."""
        assert self._shared is not None
        self._promotions += 1
        self._shared.promote(records, self._promotions)

    def open(self, opened: list[NodeStorage]) -> FaultyStorage:
        """What a process finds: only what is durable is left. ``opened`` is what it has open
        between several. Raises ``StorageError``."""
        storage, self._placed = self._placed, None
        if storage is None:
            self._world.trace("server opens again", self._owner.name)
            if self._shared is not None:
                opened.append(self._opener(self._shared))
                return opened[-1]
            storage = self._world.reopen_store(self._owner)
        self._owner.storage = storage
        return storage

    def heal(self) -> None:
        self.present.armed = False
        if self._shared is not None:
            self._shared.settle()

    def _look_at(self, base: MemoryStorage) -> None:
        self._owner.storage = self._world.store_over(self._owner, base)
        if self._owner.watch.quota is not None:
            self._owner.watch.quota.moved()

    def _opener(self, shared: SharedStore) -> NodeStorage:
        world, owner = self._world, self._owner
        knobs = world.knobs
        return NodeStorage(
            shared,
            self._rng,
            owner.rates(),
            fired=lambda fault: world.fired(owner.faults_begin + fault),
            observe=world.observer(owner),
            pause=owner.pause,
            begins=owner.watch.begins,
            seen_later=owner.seen_later,
            standby=lambda: self._chance("standby_away", knobs.standby_away),
            late=lambda: self._chance("news_late", knobs.news_late),
        )

    def _chance(self, fault: str, rate: int) -> bool:
        if self._world.quiet or self._rng.random() * 1000 >= rate:
            return False
        self._world.fired(fault)
        return True


__all__ = ["Openings"]

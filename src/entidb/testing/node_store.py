"""One store, and the nodes of a simulated server that have it open, each over a connection of its
own: a model of a PostgreSQL primary with its synchronous standby.

A commit is durable when the standby has it. One that the primary has alone *waits*: nobody sees it,
and nobody else commits. Then the standby answers after all, or the primary is restarted and shows
it, or the standby takes the primary's place and the commit is gone. A connection that is opened
commits before it reads, so that it waits for the standby (``bar``): what a restarted primary shows,
nobody sees before it is as durable as the rest. An operator may also let a standby lead that lacks
what was acknowledged (``promote``), while the nodes stay.

The mechanisms here are those of ``entidb.storage.postgres``, said again; that module is tested
against a real server, and not here. What is real here is all that is above the seam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Protocol

from entidb.errors import CommitUnknownError, StorageError
from entidb.storage import MemoryStorage
from entidb.storage.base import OPENING_SHIFT, Batch, Snapshot, StoreTurn
from entidb.storage.memory import _Shared, _State
from entidb.testing.faults import FaultyStorage, Observe

#: Milliseconds that a standby does not answer, at most.
STANDBY_AWAY_MS: Final = 1_500
#: What an opening is in a mark: the next one is where another server leads that may lack commits.
OPENING: Final = 1 << OPENING_SHIFT
#: What becomes of a commit that the standby has not confirmed.
ENDS: Final = ("confirmed", "restarted", "restarted and lost", "lost")


class Surroundings(Protocol):
    """What a store needs of the run: see ``World``."""

    knobs: Any
    quiet: bool

    def after(self, delay_ms: int, action: Callable[[], None]) -> None: ...

    def fired(self, fault: str) -> None: ...

    def tell(self, line: str) -> None: ...


class NodeTurn:
    """The turn of one node."""

    def __init__(self, storage: NodeStorage) -> None:
        self._storage = storage
        #: Whether the node goes by having it.
        self.taken = False

    def take(self, timeout_s: float | None = None) -> bool:
        """Never waits: who could give it back does not run meanwhile."""
        self._storage.connect()
        if self._storage.store.waiting is None and self._storage.inner.turn.take(0.0):
            self.taken = True
            return True
        return False

    def give_back(self) -> None:
        self.taken = False
        self.lose()

    def lose(self) -> None:
        """Without noticing it."""
        self._storage.inner.turn.give_back()

    @property
    def mine(self) -> bool:
        return self._storage.inner.turn.mine

    def holder(self) -> str:
        return "another node"


@dataclass
class WaitingCommit:
    """A commit that the primary has and the standby has not. ``seen`` tells the run of it, when it
    is durable."""

    batch: Batch
    seen: Observe
    #: What the primary held before, where it shows the commit by now.
    before: MemoryStorage | None = None


class SharedStore:
    """What the nodes have in common. ``moved`` is called with another ``base`` after a failover."""

    def __init__(
        self,
        world: Surroundings,
        rng: Random,
        records: Mapping[bytes, bytes],
        moved: Callable[[MemoryStorage], None],
    ) -> None:
        self.base = MemoryStorage()
        self.base.commit(dict(records))
        #: Another one after each loss of all connections.
        self.epoch = 0
        self.waiting: WaitingCommit | None = None
        self._world = world
        self._rng = rng
        self._moved = moved

    @property
    def in_step(self) -> bool:
        """Whether the primary shows nothing that the standby lacks."""
        return self.waiting is None or self.waiting.before is None

    def connect(self) -> MemoryStorage:
        """One more connection, after the barrier. Raises ``StorageError``."""
        self.bar()
        return self.base.another()

    def bar(self) -> None:
        """A commit, which waits for the standby and with it for all that is visible."""
        if self.waiting is not None:
            raise StorageError("the simulated standby does not answer")

    def wait(self, batch: Batch, seen: Observe) -> None:
        """A commit waits for the standby, and something becomes of it."""
        self.waiting = WaitingCommit(dict(batch), seen)
        end = self._rng.choice(ENDS)
        self._later({"confirmed": self._confirm, "lost": self._lose}.get(end, self._restart), end)

    def drop(self) -> None:
        """Another store takes its place: nothing becomes of it any more."""
        self.waiting = None

    def promote(self, records: Mapping[bytes, bytes], opening: int) -> None:
        """A standby leads that has only ``records``; but for the opening, it comes to the very mark
        that the nodes know."""
        self.drop()
        values = dict(records)
        mark = self.base._state.mark % (1 << OPENING_SHIFT) + opening * OPENING
        self._move(MemoryStorage(_Shared(_State(values, sorted(values), mark))))

    def settle(self) -> None:
        """The standby answers again."""
        if self.waiting is not None:
            self._confirm()

    def _later(self, action: Callable[[], None], end: str) -> None:
        waiting = self.waiting

        def act() -> None:
            if self.waiting is not waiting:
                return
            self._world.tell(f"a commit that waited for the standby: {end}")
            action()
            if action == self._restart:
                lost = end == "restarted and lost"
                self._later(self._lose if lost else self._confirm, end)

        self._world.after(1 + self._rng.randrange(STANDBY_AWAY_MS), act)

    def _confirm(self) -> None:
        waiting, self.waiting = self.waiting, None
        assert waiting is not None
        values: Mapping[bytes, bytes] = self.base._state.values
        held = values if waiting.before is None else waiting.before._state.values
        old = {key: held.get(key) for key in waiting.batch}
        if waiting.before is None:
            self.base.commit(waiting.batch)
        waiting.seen(waiting.batch, old, self.base._state.values)

    def _restart(self) -> None:
        """The primary shows what nobody was told of; every connection is lost."""
        waiting = self.waiting
        assert waiting is not None
        self._world.fired("store_restart")
        waiting.before = _copy(self.base)
        self._move(_copy(self.base))
        self.base.commit(waiting.batch)

    def _lose(self) -> None:
        """The standby is the primary now, and does not have it."""
        waiting, self.waiting = self.waiting, None
        assert waiting is not None
        self._world.fired("failover")
        self._move(_copy(self.base if waiting.before is None else waiting.before))

    def _move(self, base: MemoryStorage) -> None:
        self.base = base
        self.epoch += 1
        self._moved(base)


class NodeStorage(FaultyStorage):
    """One node's opener. ``pause`` is called where the node may be paused; ``begins`` where it has
    taken the snapshot on which it decides in its turn. ``seen_later`` makes what is told of a
    commit of now when that is durable."""

    def __init__(
        self,
        store: SharedStore,
        rng: Random,
        rates: Mapping[str, int],
        *,
        fired: Callable[[str], None],
        observe: Observe,
        pause: Callable[[NodeStorage], None],
        begins: Callable[[], None],
        seen_later: Callable[[], Observe],
        standby: Callable[[], bool],
        late: Callable[[], bool],
    ) -> None:
        """Raises ``StorageError`` while the standby does not answer. ``standby``: whether a commit
        finds it gone; ``late``: whether news is late."""
        self.store = store
        self._epoch = store.epoch
        super().__init__(store.connect(), rng, rates, fired=fired, observe=observe)
        self._turn = NodeTurn(self)
        self._pause, self._begins = pause, begins
        self._seen_later = seen_later
        self._standby, self._late = standby, late
        self._ended = False
        self.snapshot = self._take_snapshot
        self.mark = self._read_mark

    @property
    def turn(self) -> StoreTurn:
        return self._turn

    def lose_turn(self) -> None:
        """The node does not notice."""
        self._turn.lose()

    def connect(self) -> None:
        """Another connection in the place of one that was lost. Raises ``StorageError``."""
        if self._epoch != self.store.epoch and not self._ended:
            self.inner.close()
            self.inner = self.store.connect()
            self._epoch = self.store.epoch

    def wait(self, mark: int, timeout_s: float) -> bool:
        """Looks once, and does not wait."""
        return not self._late() and self.mark() != mark

    def commit(self, batch: Batch, after: int | None = None) -> int:
        self._pause(self)
        if self._epoch != self.store.epoch:
            raise StorageError("the connection that had the turn was lost; nothing was written")
        if self.store.waiting is not None:
            raise StorageError("another node's commit waits for the standby")
        with self._in_turn():
            if batch and self.armed and self._standby():
                return self._commit_alone(batch, after)
            try:
                mark = super().commit(batch, after)
            except CommitUnknownError:
                self.close()
                raise
        self._pause(self)
        return mark

    def close(self) -> None:
        self._ended = True
        self.inner.close()

    def _take_snapshot(self) -> Snapshot:
        self._pause(self)
        self.connect()
        made = self.inner.snapshot()
        if self._turn.taken:
            self._begins()
        else:
            self._pause(self)
        return made

    def _read_mark(self) -> int:
        self.connect()
        return self.inner.mark()

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """As any store, it takes the turn for a commit that has not got it; and never waits."""
        turn = self.inner.turn
        if turn.mine:
            yield
            return
        if not turn.take(0.0):
            raise StorageError("another node has the turn; nothing was written")
        try:
            yield
        finally:
            turn.give_back()

    def _commit_alone(self, batch: Batch, after: int | None) -> int:
        """The standby is gone. PostgreSQL says of the commit that it worked, with the warning that
        it was cancelled while it waited, or the connection ends before it says anything."""
        mark = self.inner.commit({}, after)  # the fence comes first
        self.store.wait(batch, self._seen_later())
        answered = self._rng.random() < 0.5
        if is_unknown(answered=answered, warned=True):
            self.close()
            raise CommitUnknownError("the simulated standby did not answer")
        return mark + 1


def is_unknown(*, answered: bool, warned: bool) -> bool:
    """Whether nobody knows what became of a COMMIT."""
    return not answered or warned


def _copy(store: MemoryStorage) -> MemoryStorage:
    """As it is, with its mark."""
    state = store._state
    return MemoryStorage(_Shared(_State(dict(state.values), list(state.keys), state.mark)))


__all__ = ["NodeStorage", "NodeTurn", "SharedStore", "Surroundings"]

"""The nodes of a simulated server: processes that serve the same databases beside each other, each
with stores, databases and memory of its own.

A node is paused inside what it does: others go on meanwhile, on its stack, and may take its turn.
It is killed there, or at any other moment, and begins again with nothing but what is durable.
Requests go to whichever node runs. A server of one node is a process that is never paused.

Not here: what a request becomes (``host``, ``tenant``), and the store between the nodes
(``node_store``).
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol

from msgspec.structs import replace

from entidb.db import Database
from entidb.errors import ResetRequiredError, SyncError, UpgradeRequiredError
from entidb.protocol import PullRequest, PushRequest, RoundRequest
from entidb.server.front import Front
from entidb.server.hooks import Grant
from entidb.testing.ages import ServerAge
from entidb.testing.faults import Crash
from entidb.testing.hands import Authors
from entidb.testing.invariants import Violation
from entidb.testing.keeper import Keeper
from entidb.testing.node_store import NodeStorage
from entidb.testing.world import World

#: Called with the answer to a request: whether it worked, and the bytes.
Reply = Callable[[bool, bytes], None]
#: A push that waits to be decided.
Member = tuple[PushRequest | RoundRequest, Grant, Reply]
#: Nodes that are paused at once, each inside what the one before it does not do meanwhile.
PAUSED_MAX: Final = 2
#: Events of one pause.
PAUSES: Final = (1, 2, 5, 15, 60)
#: Milliseconds until a node that was killed is back.
DOWN_MS: Final = (0, 0, 300, 4_000)


class SimulatedNode:
    """One process of the server, again and again."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: How many processes there have been.
        self.life = 0
        self.paused = False
        #: What has come while it was paused.
        self.deferred: list[Callable[[], None]] = []
        self.up_at = 0
        self.front: Front
        #: The database to which it is being pushed.
        self.pushed_to = ""
        #: Pushes that wait to be decided, by database.
        self.queues: dict[str, list[Member]] = {}
        #: Commits and histories of this node, by database; and commits that belong to opening it.
        self.commits: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()
        self.prepared: Counter[str] = Counter()
        #: What this process has open.
        self.storages: list[NodeStorage] = []
        #: The newest commit that it has heard of, and the mark up to which it has listened.
        self.heard: dict[str, int] = {}
        self.marks: dict[str, int] = {}

    def effects(self, db_id: str) -> tuple[int, int]:
        """What an error must not change; but for a history that begins, which has to be durable
        before the error that says so."""
        return self.commits[db_id] - self.prepared[db_id], self.begun[db_id]


class SimulatedNodes:
    """All of them. ``begin`` gives a new process its front."""

    def __init__(self, world: World, begin: Callable[[SimulatedNode], Front]) -> None:
        self.all = [SimulatedNode(f"n{index}") for index in range(world.nodes)]
        self._world = world
        self._begin = begin
        self._rng: random.Random = world.stream("nodes")
        #: Which one does something, and whether it can be paused there: innermost last.
        self._running: list[tuple[SimulatedNode, bool]] = []
        self._depth = 0

    # ------------------------------------------------------------ processes

    def start(self, node: SimulatedNode) -> None:
        """Another process begins, with nothing but what is durable. Whatever the one before it
        was at, nobody will hear of it."""
        node.life += 1
        self._wake(node)
        node.up_at = 0
        node.queues.clear()
        node.heard.clear()
        node.marks.clear()
        storages, node.storages = node.storages, []
        for storage in storages:
            storage.close()
        node.front = self._begin(node)

    def start_all(self) -> None:
        for node in self.all:
            self.start(node)

    def life(self) -> None:
        """A look at whether one of them is killed."""
        if self._rng.random() * 1000 < self._world.knobs.node_kill:
            self._world.fired("node_kill")
            self._kill(self._rng.choice(self.all))

    def _kill(self, node: SimulatedNode) -> None:
        self._world.tell(f"{node.name} is killed")
        self.start(node)
        node.up_at = self._world.now + self._rng.choice(DOWN_MS)

    def runs(self, node: SimulatedNode) -> bool:
        return not node.paused and node.up_at <= self._world.now

    def pick(self) -> SimulatedNode | None:
        """The node that gets a request, a paused one too; None if none is up."""
        if len(self.all) == 1:
            return self.all[0]
        up = [node for node in self.all if node.up_at <= self._world.now]
        return self._rng.choice(up) if up else None

    def pick_running(self) -> SimulatedNode | None:
        """One for a program, which runs there."""
        if len(self.all) == 1:
            return self.all[0]
        running = [node for node in self.all if self.runs(node)]
        return self._rng.choice(running) if running else None

    def heal(self) -> None:
        for node in self.all:
            node.up_at = 0
            for storage in node.storages:
                storage.armed = False

    # ------------------------------------------------------------ what one of them does

    @property
    def running(self) -> SimulatedNode | None:
        """The node that does something."""
        return self._running[-1][0] if self._running else None

    @property
    def waits(self) -> bool:
        """Whether a node is paused inside what it does."""
        return self._depth > 0

    @contextmanager
    def within(self, node: SimulatedNode, crashes: str) -> Iterator[None]:
        """``node`` does something; a crash in it ends its process, and the block. ``crashes`` is
        what is told then."""
        life = node.life
        try:
            with self.on(node):
                yield
        except Crash:
            self._world.tell(crashes)
            if node.life == life:
                self.start(node)

    @contextmanager
    def on(self, node: SimulatedNode, *, pausable: bool = False) -> Iterator[None]:
        """What is done inside this block is done by ``node``, which may be paused in it if it has
        no lock there that others need."""
        self._running.append((node, pausable))
        try:
            yield
        finally:
            self._running.pop()

    def later(self, node: SimulatedNode, delay_ms: int, work: Callable[[], None]) -> None:
        """Do ``work`` after what else is due then, if the process has not ended by then."""
        life = node.life

        def do() -> None:
            if node.life != life:
                return
            if node.paused:
                node.deferred.append(do)
                return
            work()

        self._world.after(delay_ms, do)

    # ------------------------------------------------------------ pauses

    def pause(self, storage: NodeStorage) -> None:
        """A node comes to a place where it may be paused: others go on, and then it does. Raises
        ``Crash`` if it does not."""
        world = self._world
        if world.quiet or not storage.armed or self._depth >= PAUSED_MAX or not self._running:
            return
        node, pausable = self._running[-1]
        if not pausable or node.paused or self._rng.random() * 1000 >= world.knobs.node_pause:
            return
        world.fired("node_pause")
        life = node.life
        if storage.turn.mine and self._rng.random() < 0.6:
            world.fired("turn_lost")
            storage.lose_turn()
        node.paused = True
        running, self._running = self._running, []
        self._depth += 1
        try:
            self._others_go_on()
        finally:
            self._depth -= 1
            self._running = running
        if node.life != life:
            raise Crash
        self._wake(node)
        if self._rng.random() * 1000 < world.knobs.node_kill:
            world.fired("node_kill")
            raise Crash

    def _wake(self, node: SimulatedNode) -> None:
        node.paused = False
        deferred, node.deferred = node.deferred, []
        for work in deferred:
            self._world.after(0, work)

    def _others_go_on(self) -> None:
        for _ in range(self._rng.choice(PAUSES)):
            try:
                if not self._world.step():
                    return
            except Exception as error:
                # Not into the code of the node that is paused.
                raise Violation("UNEXPECTED", traceback.format_exc()) from error


class Named(Protocol):
    """A database, by name."""

    db_id: str
    canary: str


class SimulatedServer(Protocol):
    """The server that a database belongs to."""

    world: World
    age: ServerAge
    keeper: Keeper
    ledger: Authors
    nodes: SimulatedNodes

    def start(self) -> None:
        """Other processes take the place of all there are."""
        ...

    def token(
        self,
        tenant: Named,
        granted: tuple[str, ...] | None = None,
        *,
        write: bool = True,
        subject: str = ...,
    ) -> str: ...

    def using(self, tenant: Named, *, create: bool) -> AbstractContextManager[Database]:
        """The database, as a program on the server has it. Raises ``ServerBusyError`` where no
        node runs."""
        ...

    def check_canaries(self, tenant: Named | None, data: bytes) -> None:
        """That nothing of another database is in what leaves this one."""
        ...

    def answer(self, tenant: Named, reply: Reply, data: bytes) -> None: ...

    def refuse(self, node: SimulatedNode, reply: Reply, error: Exception) -> None: ...


def pushed(request: PushRequest | RoundRequest) -> PushRequest:
    return request.push if isinstance(request, RoundRequest) else request


def asked(request: PushRequest | RoundRequest, error: SyncError) -> PullRequest | PushRequest:
    """The half of a round that ``error`` is about."""
    if not isinstance(request, RoundRequest):
        return request
    pulls = isinstance(error, ResetRequiredError | UpgradeRequiredError)
    return request.pull if pulls else replace(request.push, seen=request.pull.seen)


__all__ = [
    "Member",
    "Named",
    "SimulatedNode",
    "SimulatedNodes",
    "Reply",
    "SimulatedServer",
    "asked",
    "pushed",
]

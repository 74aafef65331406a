"""One database of a simulated run's server: what befalls its files, and what it may answer.

Requests come to it through ``host``; what it holds is opened and closed by the real ``Stores``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from entidb import cbor, protocol
from entidb.db import Database, Role
from entidb.db.index_care import declare_all
from entidb.db.maintenance import purge_tombstones
from entidb.db.records import META_FORMAT, META_IDENTITY, encode_format
from entidb.errors import (
    DatabaseClosedError,
    EntiDBError,
    NotUniqueError,
    ServerBusyError,
    StorageError,
    SyncError,
    TransactionError,
)
from entidb.protocol import (
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    RoundRequest,
)
from entidb.server.declared import declared
from entidb.server.front import Reading
from entidb.server.hooks import Grant
from entidb.server.pages import unseen
from entidb.server.service import BehindError
from entidb.server.unique import waits_for
from entidb.storage import MemoryStorage
from entidb.testing.checkers import ServerWatch
from entidb.testing.faults import COMMIT_FAULTS, FaultyStorage, Observe, read_records
from entidb.testing.indexes import IndexLife
from entidb.testing.node_store import NodeStorage
from entidb.testing.nodes import Member, Reply, SimulatedNode, SimulatedServer, asked, pushed
from entidb.testing.older_files import OlderFiles
from entidb.testing.openings import Openings
from entidb.testing.oracle import Histories, History
from entidb.testing.quota import QuotaWatch, has_quota
from entidb.testing.shelf import SimulatedShelf
from entidb.testing.unique import UniqueWatch
from entidb.testing.unique import settings as unique_settings
from entidb.testing.watch import DeviceWatch
from entidb.testing.workload import INDEXED, NUMBERS, Workload


class Tenant:
    """One database of the server, with its oracle."""

    #: What the names of its storage faults begin with.
    faults_begin = "server_"
    durable = "SERVER-DURABLE"

    def __init__(self, host: SimulatedServer, index: int) -> None:
        self.host = host
        self.world = world = host.world
        self.name = self.db_id = f"tenant{index}"
        #: In every payload of this database, and never in an answer for another.
        self.canary = f"<{'alpha' if index == 0 else 'omega'}>"
        self.histories = Histories()
        self.entropy = world.stream(f"entropy of {self.db_id}").randbytes
        self.workload = Workload(
            world.stream(f"work on {self.db_id}"), world.knobs, self.canary, world.options.values
        )
        #: Pushes of the group that is being decided which have been refused.
        self._refused = 0
        #: How often the files had been put back when that group began.
        self._put_back = 0
        #: Codes for which transactions were truly refused, each with a push of which nothing was
        #: decided.
        self.refused: dict[bytes, set[str]] = {}
        #: As ``files``, made with ``entidb backup``.
        self.backup: tuple[MemoryStorage, History, int, int] | None = None
        self.restores = 0
        #: Of the devices that synchronise with it.
        self.device_watches: list[DeviceWatch] = []
        self.watch = ServerWatch(world.checks, History(b""), world.server_clock)
        self.indexes = IndexLife(world, self.db_id, INDEXED, NUMBERS)
        self.unique = UniqueWatch(world, self.db_id)
        self.shelf = SimulatedShelf(world, self.db_id)
        self.watch.unique = self.unique if world.knobs.unique else None
        if has_quota(world.knobs):
            self.watch.quota = QuotaWatch(world, self.db_id, host.age.newest)
        self.watch.any_refusal = world.options.validate is not None
        self.watch.newest = host.age.newest
        self.storage: FaultyStorage
        self.openings = Openings(world, self)
        self.older = OlderFiles(self)

    def open(self, node: SimulatedNode) -> Database:
        """What a process finds that opens this database: only what is durable is left."""
        storage = self.openings.open(node.storages)
        storage.armed = False
        self.indexes.opened()
        self.unique.opened()
        self.watch.opened(storage)
        database = Database(
            storage,
            role=Role.SERVER,
            clock=self.world.server_clock,
            entropy=self.entropy,
            stale_rows_max=self.world.knobs.stale_rows,
            busy_timeout_s=60.0 if self.world.nodes == 1 else 0.0,
        )
        if self.world.knobs.unique:
            before = node.commits[self.db_id]
            declare_all(database, declared({}, unique_settings(self.world.knobs)))
            database.wait_for_indexes()
            node.prepared[self.db_id] += node.commits[self.db_id] - before
        storage.armed = not self.world.quiet
        return database

    def begin(self) -> None:
        """The first process has opened it."""
        history = self.database.history
        assert history is not None
        self.watch.history = self.histories.begin(history)

    @property
    def database(self) -> Database:
        """For what looks at it from outside; opened if need be."""
        with self.host.using(self, create=True) as database:
            return database

    def _place(self, records: Mapping[bytes, bytes]) -> None:
        """Other files lie there now: no process of before has them open."""
        self.openings.place(records)
        self.host.start()

    def pause(self, storage: NodeStorage) -> None:
        """A node may be paused here: what others do meanwhile is theirs."""
        refused, put_back = self._refused, self._put_back
        with self.watch.aside():
            self.host.nodes.pause(storage)
        self._refused, self._put_back = refused, put_back

    def seen_later(self) -> Observe:
        stored, watch = self.world.observer(self), self.watch
        members, program, decided_ms = watch.members, watch.program, watch.decided_ms

        def observe(
            batch: Mapping[bytes, bytes | None],
            old: Mapping[bytes, bytes | None],
            records: Mapping[bytes, bytes],
        ) -> None:
            with watch.aside():
                watch.members, watch.program, watch.decided_ms = members, program, decided_ms
                stored(batch, old, records)

        return observe

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Mapping[bytes, bytes],
    ) -> None:
        node = self.host.nodes.running
        if node is not None:
            node.commits[self.db_id] += 1
        if self.older.unproven and META_IDENTITY in batch:
            identity = cbor.decode_trusted(records[META_IDENTITY])["history"]
            self._begin(identity)
        self.watch.on_commit(batch, old, records)
        self.indexes.stored(batch, old, records)
        self.unique.stored(batch, records)

    def _begin(self, identity: bytes) -> None:
        """The server has begun another history, as it is (R29)."""
        old = self.watch.history
        self.world.checks.that(
            self.histories.get(identity) is None,
            "ORDER",
            f"{self.db_id} began a history that devices know",
        )
        self.world.trace("history begins", self.db_id, old.head)
        self.watch.history = old.fork(identity, old.head, old.floor)
        self.histories.add(self.watch.history)
        self.older.unproven = False
        node = self.host.nodes.running
        if node is not None:
            node.begun[self.db_id] += 1

    def rates(self) -> dict[str, int]:
        knobs = self.world.knobs
        return {name: getattr(knobs, f"server_{name}", 0) for name in COMMIT_FAULTS}

    # ------------------------------------------------------------ backup, restore, care

    def make_backup(self) -> None:
        if not self.openings.in_step:
            return
        self.world.trace("backup", self.db_id)
        copy = self.openings.present.copy([(META_FORMAT, encode_format(backup=True))])
        history = self.watch.history
        self.backup = copy, history, history.head, history.floor

    def restore(self) -> None:
        """The backup comes to life, with a history of its own (R29)."""
        assert self.backup is not None
        copy, old, head, floor = self.backup
        seen = self.watch.history.head
        self.older.unproven = False
        self._place(read_records(copy))
        identity = self.database.history
        assert identity is not None
        self.restores += 1
        self.world.checks.that(
            self.histories.get(identity) is None,
            "ORDER",
            f"{self.db_id} came back from a backup under a history that devices know",
        )
        self.world.trace("restored", self.db_id, head)
        self.world.tell(
            f"{self.db_id} is restored from the backup at {head}; devices had seen {seen}"
        )
        self.watch.history = old.fork(identity, head, floor)
        self.histories.add(self.watch.history)

    # ------------------------------------------------------------ care

    def copy_files(self) -> None:
        if self.openings.in_step:
            self.older.copy(self.openings.present.copy())

    def put_back(self, promoted: bool = False) -> None:
        """Older files lie there; or, ``promoted``, under nodes that stay, as where a standby leads
        that had only those."""
        place = self.openings.promote if promoted else self._place
        self.older.put_back(lambda copy: place(read_records(copy)))
        self.shelf.put_back(self.watch.history.head)
        # A process that opens the files looks anew; those that stay have to be told.
        self.unique.opened()

    def purge(self, up_to: int) -> None:
        up_to = self.shelf.purge_limit(up_to)
        self.world.trace("purge", self.db_id, up_to)
        self.world.tell(f"{self.db_id} purges tombstones up to {up_to}")
        self._guarded(lambda database: purge_tombstones(database, up_to))
        self.shelf.check_floor(self.watch.history)

    def keep_indexes(self) -> None:
        """A program on the server declares indexes, builds them, asks by them."""
        self._guarded(self.indexes.act)

    def build_indexes(self) -> None:
        """What is to be built is built."""
        self._guarded(lambda database: database.wait_for_indexes())

    def program_writes(self) -> None:
        """A program on the server commits a transaction (R11)."""
        self._guarded(self._write)
        self.watch.program = None

    def _write(self, database: Database) -> None:
        with database.transaction() as tx:
            for name, key, value in self.workload.transaction():
                collection = tx.collection(name)
                if value is None:
                    collection.discard(key)
                else:
                    collection[key] = value
            writes = [
                ((name, entity_id), payload)
                for name, ids in tx.writes.items()
                for entity_id, payload in ids.items()
            ]
            self.world.trace("program", self.db_id, len(writes))
            self.watch.program = writes
            tx.commit()

    def _guarded(self, action: Callable[[Database], object]) -> None:
        nodes = self.host.nodes
        node = nodes.pick_running()
        if node is None:
            return
        try:
            with (
                nodes.within(node, f"{node.name} crashes while a program works"),
                node.front.stores.using(self.db_id, create=False) as store,
                nodes.on(node, pausable=True),
            ):
                action(store.database)
        except (
            StorageError,
            DatabaseClosedError,
            ServerBusyError,
            NotUniqueError,
            TransactionError,
        ) as error:
            # Nothing was changed, or that is unknown; the program tries again another day.
            self.world.trace("program refused", self.db_id, error.code)

    # ------------------------------------------------------------ requests

    def read(
        self,
        node: SimulatedNode,
        answer: Callable[[], bytes],
        request: Reading,
        grant: Grant,
    ) -> bytes:
        """The answer of the front, which is checked before it leaves."""
        before, put_back = self.watch.now(), self.older.times
        try:
            with self.host.nodes.on(node, pausable=True):
                data = answer()
        except SyncError as error:
            if self.older.times != put_back:
                raise
            if isinstance(request, PullRequest):
                self.watch.on_refusal(request, error)
            self.host.age.check_refusal(self.world.checks, request, error)
            if error.code != "busy":
                self.older.answered(request, grant)
            raise
        self.host.check_canaries(self, data)
        if self.older.times != put_back:
            return data
        self.older.answered(request, grant)
        if isinstance(request, PullRequest):
            response = protocol.decode(PullResponse, data)
            self.watch.on_pull(request, response, grant.collections, before)
        elif isinstance(request, HandshakeRequest):
            self.watch.on_handshake(protocol.decode(HandshakeResponse, data), before)
        return data

    def push(
        self,
        node: SimulatedNode,
        submit: Callable[[Callable[[PushResponse | SyncError], None]], None],
        request: PushRequest | RoundRequest,
        grant: Grant,
        reply: Reply,
    ) -> None:
        member = request, grant, reply
        node.queues.setdefault(self.db_id, []).append(member)
        try:
            submit(partial(self._decided, node, member))
        except SyncError:
            node.queues[self.db_id].pop()
            raise

    def decide(self, node: SimulatedNode, work: Callable[[], None]) -> None:
        """Have what has queued up decided as one group (R16)."""
        world, queue = self.world, node.queues.get(self.db_id, [])
        count = len(queue)
        self.watch.members = [pushed(request) for request, _, _ in queue]
        self.watch.begins()
        if count > 1:
            world.fired("group")
        before, unknown = node.effects(self.db_id), world.faults["server_commit_unknown"]
        self._refused, self._put_back = 0, self.older.times
        try:
            with (
                self.host.nodes.within(node, f"{self.db_id} crashes while deciding {count} pushes"),
                self.host.nodes.on(node, pausable=True),
            ):
                work()
                if self._refused == count and world.faults["server_commit_unknown"] == unknown:
                    self.unchanged(node, before)
        finally:
            self.watch.members = []

    def _waits(self, node: SimulatedNode, request: RoundRequest) -> bool:
        """Whether its push waits for something else than a pull."""
        if self.host.keeper.is_frozen(self.db_id):
            return True
        stores = node.front.stores
        with stores.using(self.db_id, create=False) as store, store.database.view() as view:
            return waits_for(view, request.push) is not None

    def _decided(
        self, node: SimulatedNode, member: Member, answer: PushResponse | SyncError
    ) -> None:
        """The group commit says what became of a push."""
        queue = node.queues[self.db_id]
        node.queues[self.db_id] = [other for other in queue if other is not member]
        request, grant, reply = member
        current = self.older.times == self._put_back
        if isinstance(request, RoundRequest):
            decided = isinstance(answer, PushResponse)
            behind = isinstance(answer, BehindError) and not self._waits(node, request)
            # If not, it was decided in a state that is gone; a node is paused even here.
            here = request.pull.history == self.watch.history.identity
            if current and (decided or (behind and here)):
                self.watch.on_round(request, grant.collections, decided=decided)
            if isinstance(answer, BehindError):
                self._refused += 1
                self._rest_later(node, request, None, grant, reply)
                return
        if isinstance(answer, SyncError):
            self._refused += 1
            if answer.code == "storage_full" and self.watch.quota is not None:
                self.watch.quota.failed(pushed(request))
            if current and answer.code not in ("storage_error", "storage_full", "busy"):
                self.older.answered(request, grant)
                self.watch.on_refusal(asked(request, answer), answer)
                self.host.age.check_refusal(self.world.checks, asked(request, answer), answer)
            self.host.refuse(node, reply, answer)
            return
        push, records = pushed(request), self.storage.records
        self.host.ledger.check(push, answer, grant.subject)
        if current:
            self.older.answered(request, grant)
            self.watch.on_push(push, answer, records, grant.collections, may_write=grant.write)
        if isinstance(request, RoundRequest):
            self._rest_later(node, request, answer, grant, reply)
        else:
            self.host.answer(self, reply, protocol.encode(answer))

    def _rest_later(
        self,
        node: SimulatedNode,
        request: RoundRequest,
        answer: PushResponse | None,
        grant: Grant,
        reply: Reply,
    ) -> None:
        rest = partial(self._rest, node, request, answer, grant, reply)
        self.host.nodes.later(node, 0, rest)

    def _rest(
        self,
        node: SimulatedNode,
        request: RoundRequest,
        answer: PushResponse | None,
        grant: Grant,
        reply: Reply,
    ) -> None:
        """The page that belongs to a round, as it is when the group is through."""
        pull, front = unseen(request, answer), node.front
        with self.host.nodes.within(node, "the server crashes while it reads"):
            try:
                with front.using(pull, grant) as store:
                    page = self.read(node, partial(front.read, store, pull, grant), pull, grant)
            except EntiDBError as error:
                self.host.refuse(node, reply, error)
            else:
                self.host.answer(self, reply, protocol.encode_round(page, answer))

    def unchanged(self, node: SimulatedNode, before: tuple[int, int]) -> None:
        """``node`` has stored nothing since."""
        stored, begun = node.effects(self.db_id)
        self.world.checks.that(
            stored - before[0] == begun - before[1],
            "NO-EFFECT",
            f"{self.db_id} changed its store and answered with an error",
        )

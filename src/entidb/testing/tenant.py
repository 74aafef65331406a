"""One database of a simulated run's server: what befalls its files, and what it may answer.

Requests come to it through ``host``; what it holds is opened and closed by the real ``Stores``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from entidb import cbor, protocol
from entidb.db import Database, Role
from entidb.db.index_care import declare_all
from entidb.db.maintenance import purge_tombstones
from entidb.db.records import META_FORMAT, META_IDENTITY, encode_format
from entidb.errors import (
    NotUniqueError,
    ResetRequiredError,
    ServerBusyError,
    StorageError,
    SyncError,
    TransactionError,
    UpgradeRequiredError,
)
from entidb.protocol import (
    DigestRequest,
    HandshakeRequest,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    RoundRequest,
    SyncRequest,
)
from entidb.server.declared import declared
from entidb.server.front import Front
from entidb.server.hooks import Grant
from entidb.server.pages import unseen
from entidb.server.service import HISTORIES_MAX, BehindError
from entidb.storage import MemoryStorage
from entidb.testing.ages import ServerAge, note_forbidden
from entidb.testing.checkers import ServerWatch
from entidb.testing.faults import COMMIT_FAULTS, Crash, FaultyStorage, read_records
from entidb.testing.indexes import IndexLife
from entidb.testing.keeper import Keeper
from entidb.testing.oracle import Histories, History
from entidb.testing.unique import UniqueWatch
from entidb.testing.unique import settings as unique_settings
from entidb.testing.watch import DeviceWatch
from entidb.testing.workload import INDEXED, NUMBERS, Workload
from entidb.testing.world import World

#: As many as a server believes in an hour, and one less.
PUT_BACKS_MAX = HISTORIES_MAX - 1

#: Called with the answer to a request: whether it worked, and the bytes.
Reply = Callable[[bool, bytes], None]
#: A push that waits to be decided.
Member = tuple[PushRequest | RoundRequest, Grant, Reply]


def pushed(request: PushRequest | RoundRequest) -> PushRequest:
    return request.push if isinstance(request, RoundRequest) else request


def asked(request: PushRequest | RoundRequest, error: SyncError) -> PullRequest | PushRequest:
    """The half of a round that ``error`` is about."""
    if not isinstance(request, RoundRequest):
        return request
    pulls = isinstance(error, ResetRequiredError | UpgradeRequiredError)
    return request.pull if pulls else request.push


class SimulatedServer(Protocol):
    """The server that a database belongs to."""

    world: World
    age: ServerAge
    keeper: Keeper
    front: Front

    def later(self, work: Callable[[], None]) -> None:
        """Do ``work`` soon, in this life of the server."""
        ...

    def token(
        self, tenant: Tenant, granted: tuple[str, ...] | None = None, *, write: bool = True
    ) -> str: ...

    def using(self, tenant: Tenant, *, create: bool) -> AbstractContextManager[Database]:
        """The database, as a program on the server has it."""
        ...

    def start(self) -> None:
        """Another process takes the place of this one."""
        ...

    def check_canaries(self, tenant: Tenant | None, data: bytes) -> None:
        """That nothing of another database is in what leaves this one."""
        ...

    def answer(self, tenant: Tenant, reply: Reply, data: bytes) -> None: ...

    def refuse(self, reply: Reply, error: Exception) -> None: ...


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
        self.workload = Workload(world.stream(f"work on {self.db_id}"), world.knobs, self.canary)
        #: Pushes that wait for their group, and how many of it have been refused.
        self.queue: list[Member] = []
        self._refused = 0
        #: Codes for which transactions were truly refused, each with a push of which nothing was
        #: decided.
        self.refused: dict[bytes, set[str]] = {}
        #: As ``files``, made with ``entidb backup``.
        self.backup: tuple[MemoryStorage, History, int, int] | None = None
        self.restores = 0
        #: That became durable, of whatever process.
        self.commits = 0
        #: Of these, such as belong to opening it: they are no effect of the request that did.
        self.prepared = 0
        #: Files that an operator has copied, with what they are a copy of: history, head, floor.
        self.files: tuple[MemoryStorage, History, int, int] | None = None
        self.put_backs = 0
        #: The files were put back, and no device has proved that yet (R29).
        self.unproven = False
        #: Of the devices that synchronise with it.
        self.device_watches: list[DeviceWatch] = []
        self.watch = ServerWatch(world.checks, History(b""), world.server_clock)
        self.indexes = IndexLife(world, self.db_id, INDEXED, NUMBERS)
        self.unique = UniqueWatch(world, self.db_id)
        self.watch.unique = self.unique if world.knobs.unique else None
        self.watch.any_refusal = world.options.validate is not None
        self.watch.newest = host.age.newest
        #: Files that no process has opened yet.
        self._placed: FaultyStorage | None = world.new_store(self, None)
        self.storage = self._placed

    def open(self) -> Database:
        """What a process finds that opens this database: only what is durable is left."""
        storage, self._placed = self._placed, None
        if storage is None:
            self.world.trace("server opens again", self.db_id)
            storage = self.world.reopen_store(self)
        storage.armed = False
        self.storage = storage
        self.indexes.opened()
        self.unique.opened()
        database = Database(
            storage,
            role=Role.SERVER,
            clock=self.world.server_clock,
            entropy=self.entropy,
            stale_rows_max=self.world.knobs.stale_rows,
        )
        if self.world.knobs.unique:
            before = self.commits
            declare_all(database, declared({}, unique_settings(self.world.knobs)))
            database.wait_for_indexes()
            self.prepared += self.commits - before
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
        self._placed = self.world.new_store(self, records)
        self.host.start()

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Mapping[bytes, bytes],
    ) -> None:
        self.commits += 1
        if self.unproven and META_IDENTITY in batch:
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
        self.unproven = False

    def rates(self) -> dict[str, int]:
        knobs = self.world.knobs
        return {name: getattr(knobs, f"server_{name}", 0) for name in COMMIT_FAULTS}

    # ------------------------------------------------------------ backup, restore, care

    def _present(self) -> FaultyStorage:
        """The files that lie there, whether or not a process has opened them since."""
        return self.storage if self._placed is None else self._placed

    def make_backup(self) -> None:
        self.world.trace("backup", self.db_id)
        copy = self._present().copy([(META_FORMAT, encode_format(backup=True))])
        history = self.watch.history
        self.backup = copy, history, history.head, history.floor

    def restore(self) -> None:
        """The backup comes to life, with a history of its own (R29)."""
        assert self.backup is not None
        copy, old, head, floor = self.backup
        seen = self.watch.history.head
        self.unproven = False
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

    # ------------------------------------------------------------ files put back by hand (R29)

    def copy_files(self) -> None:
        """An operator copies the files, instead of using ``entidb backup``."""
        self.world.trace("copied", self.db_id)
        history = self.watch.history
        self.files = self._present().copy(), history, history.head, history.floor

    def may_be_put_back(self) -> bool:
        """Whether some device would notice. Where none has seen more than the files hold, they are
        the present state, as far as any device knows."""
        if self.files is None or self.put_backs >= PUT_BACKS_MAX:
            return False
        _, history, head, _ = self.files
        return self._provers(history.identity, head)

    def _provers(self, identity: bytes, head: int) -> bool:
        return any(
            watch.history is not None
            and watch.history.identity == identity
            and watch.cursor > head
            and not watch.resetting
            for watch in self.device_watches
        )

    def put_back(self) -> None:
        """The copy is back, under the history it had. Devices that have seen more keep to the
        oracle of that history as it was; the server goes on from another, which ends earlier."""
        assert self.files is not None
        copy, history, head, floor = self.files
        self.files = None
        self.put_backs += 1
        self.watch.history = history.fork(history.identity, head, floor)
        self._place(read_records(copy))
        self.world.trace("put back", self.db_id, head)
        self.world.tell(f"the files of {self.db_id} are put back to {head}")
        self.unproven = True

    def hears(self, request: SyncRequest) -> bool:
        """After the files were put back, the first that gets through is one that proves it. (If
        another did, nothing could show that it and those with the other past have parted.)"""
        if not self.unproven:
            return True
        identity, head = self.watch.history.identity, self.watch.history.head
        if request.history == identity and request.cursor > head:
            return True
        if not self._provers(identity, head):
            # Those that could have were reset or restored meanwhile: the operator sees to it.
            self._guarded(lambda database: database.begin_history(10**6, 1))
        return False

    def proved(self, grant: Grant) -> None:
        """A request that proves it was answered."""
        believed = grant.read and grant.write and grant.collections is None
        self.world.checks.that(
            not (self.unproven and believed),
            "ORDER",
            f"{self.db_id} was shown a commit above its head, and kept its history",
        )

    def purge(self, up_to: int) -> None:
        self.world.trace("purge", self.db_id, up_to)
        self.world.tell(f"{self.db_id} purges tombstones up to {up_to}")
        self._guarded(lambda database: purge_tombstones(database, up_to))

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
        try:
            with self.host.using(self, create=False) as database:
                action(database)
        except Crash:
            self.host.start()
        except (StorageError, ServerBusyError, NotUniqueError, TransactionError) as error:
            # Nothing was changed, or that is unknown; the program tries again another day.
            self.world.trace("program refused", self.db_id, error.code)

    # ------------------------------------------------------------ requests

    def read(
        self,
        answer: Callable[[], bytes],
        request: HandshakeRequest | PullRequest | DigestRequest,
        grant: Grant,
    ) -> bytes:
        """The answer of the front, which is checked before it leaves."""
        try:
            data = answer()
        except SyncError as error:
            if isinstance(request, PullRequest):
                self.watch.on_refusal(request, error)
            self.host.age.check_refusal(self.world.checks, request, error)
            self.proved(grant)
            raise
        self.proved(grant)
        self.host.check_canaries(self, data)
        if isinstance(request, PullRequest):
            response = protocol.decode(PullResponse, data)
            self.watch.on_pull(request, response, grant.collections)
        return data

    def push(
        self,
        submit: Callable[[Callable[[PushResponse | SyncError], None]], None],
        request: PushRequest | RoundRequest,
        grant: Grant,
        reply: Reply,
    ) -> None:
        member = request, grant, reply
        self.queue.append(member)
        try:
            submit(partial(self._decided, member))
        except SyncError:
            self.queue.pop()
            raise

    def decide(self, work: Callable[[], None]) -> None:
        """Have what has queued up decided as one group (R16)."""
        world, count = self.world, len(self.queue)
        self.watch.members = [pushed(request) for request, _, _ in self.queue]
        self.watch.head_before = self.watch.history.head
        if count > 1:
            world.fired("group")
        before, unknown = self.effects(), world.faults["server_commit_unknown"]
        self._refused = 0
        try:
            work()
        except Crash:
            world.tell(f"{self.db_id} crashes while deciding {count} pushes")
            self.host.start()
            return
        finally:
            self.watch.members = []
        if self._refused == count and world.faults["server_commit_unknown"] == unknown:
            self.unchanged(before)

    def _decided(self, member: Member, answer: PushResponse | SyncError) -> None:
        """The group commit says what became of a push."""
        self.queue = [other for other in self.queue if other is not member]
        request, grant, reply = member
        if isinstance(request, RoundRequest):
            decided = isinstance(answer, PushResponse)
            frozen = self.host.keeper.is_frozen(self.db_id)
            if decided or (isinstance(answer, BehindError) and not frozen):
                self.watch.on_round(request, grant.collections, decided=decided)
            if isinstance(answer, BehindError):
                self._refused += 1
                self.host.later(partial(self._rest, request, None, grant, reply))
                return
        if isinstance(answer, SyncError):
            self._refused += 1
            if answer.code not in ("storage_error", "storage_full"):
                self.proved(grant)
                self.watch.on_refusal(asked(request, answer), answer)
                self.host.age.check_refusal(self.world.checks, asked(request, answer), answer)
            self.host.refuse(reply, answer)
            return
        self.proved(grant)
        self.watch.on_push(
            pushed(request), answer, self.storage.records, grant.collections, may_write=grant.write
        )
        if isinstance(request, RoundRequest):
            self.host.later(partial(self._rest, request, answer, grant, reply))
        else:
            self.host.answer(self, reply, protocol.encode(answer))

    def _rest(
        self, request: RoundRequest, answer: PushResponse | None, grant: Grant, reply: Reply
    ) -> None:
        """The page that belongs to a round, as it is when the group is through."""
        pull, front = unseen(request, answer), self.host.front
        try:
            with front.using(pull, grant) as store:
                page = self.read(partial(front.read, store, pull, grant), pull, grant)
        except Crash:
            self.host.start()
        except (SyncError, StorageError) as error:
            self.host.refuse(reply, error)
        else:
            self.host.answer(self, reply, protocol.encode_round(page, answer))

    def forbid(self, request: PushRequest) -> None:
        note_forbidden(self.refused, request)

    def effects(self) -> tuple[int, bytes]:
        """What an error must not change; but for a history that begins, which has to be durable
        before the error that says so."""
        return self.commits - self.prepared, self.watch.history.identity

    def unchanged(self, before: tuple[int, bytes]) -> None:
        commits, identity = before
        begun = self.watch.history.identity != identity
        self.world.checks.that(
            self.commits - self.prepared == commits + begun,
            "NO-EFFECT",
            f"{self.db_id} changed its store and answered with an error",
        )

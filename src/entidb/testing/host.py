"""The server of a simulated run: the real services, tokens and rights over stores that can fail.

Messages come in and go out as bytes. What a server does about errors is the same as in the real
one: an error answer, and after a storage error everything is opened again (R17).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from entidb import cbor, protocol
from entidb.db import Database, Role
from entidb.db.maintenance import purge_tombstones
from entidb.db.records import META_FORMAT, META_IDENTITY, encode_format
from entidb.errors import (
    CommitUnknownError,
    EntiDBError,
    PermissionDeniedError,
    ServerError,
    StorageError,
    SyncError,
)
from entidb.protocol import (
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PushRequest,
    SyncRequest,
)
from entidb.server.auth import JwtAuthenticator
from entidb.server.hooks import Grant, Refusal, ValidateContext, ValidateTransaction
from entidb.server.minting import mint_token
from entidb.server.service import HISTORIES_MAX, DatabaseService
from entidb.storage import MemoryStorage
from entidb.testing.ages import ServerAge, note_forbidden, refuse_as_before
from entidb.testing.checkers import ServerWatch
from entidb.testing.faults import COMMIT_FAULTS, Crash, FaultyStorage, read_records
from entidb.testing.oracle import Histories, History
from entidb.testing.watch import DeviceWatch
from entidb.testing.workload import PolicyFailure, Workload, validate
from entidb.testing.world import World

SECRET = b"a secret of the simulator, long enough for HS256"
AUDIENCE = "simulator"
TOKEN_S = 30.0
#: As many as a server believes in an hour, and one less.
PUT_BACKS_MAX = HISTORIES_MAX - 1

#: Told how a request was answered: whether it worked, and the bytes.
Reply = Callable[[bool, bytes], None]


class Tenant:
    """One database of the server, with its oracle."""

    #: What the names of its storage faults begin with.
    faults_begin = "server_"
    durable = "SERVER-DURABLE"

    def __init__(self, host: Host, index: int) -> None:
        self.host = host
        self.world = world = host.world
        self.name = self.db_id = f"tenant{index}"
        #: In every payload of this database, and never in an answer for another.
        self.canary = f"<{'alpha' if index == 0 else 'omega'}>"
        self.histories = Histories()
        self.entropy = world.stream(f"entropy of {self.db_id}").randbytes
        self.workload = Workload(world.stream(f"work on {self.db_id}"), world.knobs, self.canary)
        self.queue: list[tuple[PushRequest, Grant, Reply]] = []
        #: Codes for which transactions were truly refused, each with a push of which nothing was
        #: decided.
        self.refused: dict[bytes, set[str]] = {}
        #: As ``files``, made with ``entidb backup``.
        self.backup: tuple[MemoryStorage, History, int, int] | None = None
        self.restores = 0
        #: Files that somebody has copied, with what they are a copy of: history, head, floor.
        self.files: tuple[MemoryStorage, History, int, int] | None = None
        self.put_backs = 0
        #: The files were put back, and nobody has shown that yet (R29).
        self.unproven = False
        #: Of the devices that synchronise with it.
        self.device_watches: list[DeviceWatch] = []
        self.age = ServerAge(world, self.db_id)
        self.watch = ServerWatch(world.checks, History(b""), world.server_clock)
        self._open(world.new_store(self, None))
        assert self.database.history is not None
        self.watch.history = self.histories.begin(self.database.history)
        self.watch.any_refusal = world.options.validate is not None
        self.watch.newest = self.age.newest

    def _open(self, storage: FaultyStorage) -> None:
        storage.armed = False
        self.storage = storage
        self.database = Database(
            storage,
            role=Role.SERVER,
            clock=self.world.server_clock,
            entropy=self.entropy,
            stale_rows_max=self.world.knobs.stale_rows,
        )
        knobs = self.world.knobs
        hook = self.world.options.validate
        if hook is None and (knobs.refuse or knobs.refuse_raises):
            hook = self._refuse
        self.service = DatabaseService(
            self.database,
            db_id=self.db_id,
            limits=protocol.LIMITS,
            validate=hook,
            schema=self.age.schema(),
        )
        storage.armed = not self.world.quiet

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Mapping[bytes, bytes],
    ) -> None:
        if self.unproven and META_IDENTITY in batch:
            identity = cbor.decode_trusted(records[META_IDENTITY])["history"]
            self._begin(identity)
        self.watch.on_commit(batch, old, records)

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

    def _refuse(self, context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
        try:
            refusal = validate(context, transaction)
        except PolicyFailure:
            self.world.fired("refuse_raises")
            raise
        if refusal is not None:
            self.world.fired("refuse")
        return refusal

    def rates(self) -> dict[str, int]:
        knobs = self.world.knobs
        return {name: getattr(knobs, f"server_{name}", 0) for name in COMMIT_FAULTS}

    def reopen(self) -> None:
        """After a crash or a storage error: only what is durable is left."""
        self.world.trace("server opens again", self.db_id)
        self._open(self.world.reopen_store(self))

    # ------------------------------------------------------------ backup, restore, care

    def make_backup(self) -> None:
        self.world.trace("backup", self.db_id)
        copy = self.storage.copy([(META_FORMAT, encode_format(backup=True))])
        history = self.watch.history
        self.backup = copy, history, history.head, history.floor

    def restore(self) -> None:
        """The backup comes to life, with a history of its own (R29)."""
        assert self.backup is not None
        copy, old, head, floor = self.backup
        seen = self.watch.history.head
        self.queue.clear()
        self.unproven = False
        self._open(self.world.new_store(self, read_records(copy)))
        assert self.database.history is not None
        self.restores += 1
        self.world.checks.that(
            self.histories.get(self.database.history) is None,
            "ORDER",
            f"{self.db_id} came back from a backup under a history that devices know",
        )
        self.world.trace("restored", self.db_id, head)
        self.world.tell(
            f"{self.db_id} is restored from the backup at {head}; devices had seen {seen}"
        )
        self.watch.history = old.fork(self.database.history, head, floor)
        self.histories.add(self.watch.history)

    # ------------------------------------------------------------ files put back by hand (R29)

    def copy_files(self) -> None:
        """Somebody copies the files, who does not know of ``entidb backup``."""
        self.world.trace("copied", self.db_id)
        history = self.watch.history
        self.files = self.storage.copy(), history, history.head, history.floor

    def may_be_put_back(self) -> bool:
        """Whether some device would notice. Where none has seen more than the files hold, they
        are the present state, as far as anybody knows."""
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
        self.queue.clear()
        self.watch.history = history.fork(history.identity, head, floor)
        self._open(self.world.new_store(self, read_records(copy)))
        self.world.trace("put back", self.db_id, head)
        self.world.tell(f"the files of {self.db_id} are put back to {head}")
        self.unproven = True

    def hears(self, request: SyncRequest) -> bool:
        """After the files were put back, the first that gets through is one that proves it. (If
        another did, nobody could know that it and those with the other past have parted.)"""
        if not self.unproven:
            return True
        identity, head = self.watch.history.identity, self.watch.history.head
        if request.history == identity and request.cursor > head:
            return True
        if not self._provers(identity, head):
            # Those that could have were reset or restored meanwhile: the operator sees to it.
            self._guarded(lambda: self.database.begin_history(10**6, 1))
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
        self._guarded(lambda: purge_tombstones(self.database, up_to))

    def program_writes(self) -> None:
        """A program on the server commits a transaction (R11)."""
        with self.database.transaction() as tx:
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
            self._guarded(tx.commit)
            self.watch.program = None

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Crash, CommitUnknownError):
            self.reopen()
        except StorageError:
            # Nothing was changed; the program tries again another day.
            self.world.trace("storage error", self.db_id)

    # ------------------------------------------------------------ requests

    def handshake(self, request: HandshakeRequest, grant: Grant) -> HandshakeResponse:
        answer = self.service.handshake(request, grant)
        self.proved(grant)
        return answer

    def pull(self, request: PullRequest, grant: Grant) -> bytes:
        try:
            response = self.service.idle_pull(request, grant)
            if response is None:
                response = self.service.pull(request, grant)
        except SyncError as error:
            self.watch.on_refusal(request, error)
            self.age.check_refusal(self.world.checks, request, error)
            self.proved(grant)
            raise
        self.proved(grant)
        data = protocol.encode(response)
        self.host.check_canaries(self, data)
        self.watch.on_pull(request, response, grant.collections)
        return data

    def push(self, members: list[tuple[PushRequest, Grant, Reply]]) -> None:
        """Decide pushes as group commit does (R16)."""
        world = self.world
        self.watch.members = [request for request, _, _ in members]
        self.watch.head_before = self.watch.history.head
        if len(members) > 1:
            world.fired("group")
        commits = self.effects()
        try:
            answers = self.service.push_many([(request, grant) for request, grant, _ in members])
        except Crash:
            world.tell(f"{self.db_id} crashes while deciding {len(members)} pushes")
            self.reopen()
            return
        except EntiDBError as error:
            unknown = isinstance(error, CommitUnknownError)
            if not unknown:
                self.unchanged(commits)
            self.reopen()
            for _, _, reply in members:
                self.host.refuse(reply, ServerError("storage failed", code="storage_error"))
            return
        finally:
            self.watch.members = []
        if all(isinstance(answer, SyncError) for answer in answers):
            self.unchanged(commits)
        for (request, grant, reply), answer in zip(members, answers, strict=True):
            self.proved(grant)
            if isinstance(answer, SyncError):
                self.watch.on_refusal(request, answer)
                self.age.check_refusal(self.world.checks, request, answer)
                self.host.refuse(reply, answer)
                continue
            self.watch.on_push(
                request,
                answer,
                self.storage.records,
                grant.collections,
                may_write=grant.write,
            )
            self.host.answer(self, reply, protocol.encode(answer))

    def forbid(self, request: PushRequest) -> None:
        note_forbidden(self.refused, request)

    def flush(self) -> None:
        members, self.queue = self.queue, []
        if members:
            self.push(members)

    def effects(self) -> tuple[int, bytes]:
        """What an error must not change; but for a history that begins, which has to be durable
        before the error that says so."""
        return self.storage.commits, self.watch.history.identity

    def unchanged(self, before: tuple[int, bytes]) -> None:
        commits, identity = before
        begun = self.watch.history.identity != identity
        self.world.checks.that(
            self.storage.commits == commits + begun,
            "NO-EFFECT",
            f"{self.db_id} changed its store and answered with an error",
        )


class Host:
    """The server's front: tokens, rights, and which database a request is for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tenants = [Tenant(self, index) for index in range(world.knobs.tenants)]
        #: Which database each token was made for.
        self._issued: dict[str, Tenant] = {}
        self._authenticator = JwtAuthenticator(
            SECRET, "HS256", audience=AUDIENCE, clock=world.server_clock
        )

    def token(
        self, tenant: Tenant, granted: tuple[str, ...] | None = None, *, write: bool = True
    ) -> str:
        """A token for a database, or for some of its collections."""
        may = "rw" if write else "r"
        rights = {"rights": may, "collections": None if granted is None else list(granted)}
        made = mint_token(
            SECRET,
            subject="a device",
            databases={tenant.db_id: may if granted is None else rights},
            expires_s=TOKEN_S if self.world.knobs.expired_token else 10_000_000,
            audience=AUDIENCE,
            claims={"jti": str(len(self._issued))},  # the same in every run of this seed
            clock=self.world.server_clock,
        )
        self._issued[made] = tenant
        return made

    def receive(self, path: str, token: str, body: bytes, reply: Reply) -> None:
        """One request, as bytes."""
        before = [tenant.effects() for tenant in self.tenants]
        try:
            self._receive(path, token, body, reply)
        except SyncError as error:
            for tenant, effects in zip(self.tenants, before, strict=True):
                tenant.unchanged(effects)
            self.refuse(reply, error)

    def _receive(self, path: str, token: str, body: bytes, reply: Reply) -> None:
        grants = self._authenticator(token)
        request = protocol.decode_request(path, body)
        try:
            grant = grants.on(request.db_id)
        except PermissionDeniedError:
            self._forbidden(request)
            raise
        tenant = next(t for t in self.tenants if t.db_id == request.db_id)
        self.world.checks.that(
            self._issued.get(token) is tenant,
            "TENANT",
            f"a token for another database opened {tenant.db_id}",
        )
        self.world.trace("server", type(request).__name__, request.device_id[:2].hex())
        if not tenant.hears(request):
            return
        if not isinstance(request, PushRequest):
            self._read(tenant, request, grant, reply)
            return
        if self.world.knobs.older_server or self.world.knobs.invalid:
            refuse_as_before(self.world, tenant.refused, request, grant)
        if self.world.knobs.group_ms:
            if not tenant.queue:
                self.world.after(self.world.knobs.group_ms, tenant.flush)
            tenant.queue.append((request, grant, reply))
        else:
            tenant.push([(request, grant, reply)])

    def _forbidden(self, request: SyncRequest) -> None:
        """A token that grants nothing on this database; it may be another's."""
        for tenant in self.tenants:
            if isinstance(request, PushRequest) and tenant.db_id == request.db_id:
                tenant.forbid(request)

    def _read(
        self,
        tenant: Tenant,
        request: HandshakeRequest | PullRequest,
        grant: Grant,
        reply: Reply,
    ) -> None:
        """Reading stores nothing, but for a history that begins (R29)."""
        try:
            if isinstance(request, HandshakeRequest):
                answer = protocol.encode(tenant.handshake(request, grant))
            else:
                answer = tenant.pull(request, grant)
        except Crash:
            self.world.tell(f"{tenant.db_id} crashes while it begins a history")
            tenant.reopen()
        except StorageError:
            tenant.reopen()
            self.refuse(reply, ServerError("storage failed", code="storage_error"))
        else:
            self.answer(tenant, reply, answer)

    def answer(self, tenant: Tenant, reply: Reply, data: bytes) -> None:
        self.check_canaries(tenant, data)
        reply(True, data)

    def refuse(self, reply: Reply, error: SyncError) -> None:
        response = ErrorResponse(
            code=error.code,
            message=error.message,
            retryable=error.retryable,
            retry_after=error.retry_after,
        )
        self.world.trace("refused", error.code)
        data = protocol.encode(response)
        self.check_canaries(None, data)
        reply(False, data)

    def check_canaries(self, tenant: Tenant | None, data: bytes) -> None:
        for other in self.tenants:
            if other is not tenant:
                self.world.checks.that(
                    other.canary.encode() not in data,
                    "TENANT",
                    f"bytes of {other.db_id} left in an answer for another",
                )

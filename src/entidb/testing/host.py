"""The server of a simulated run: the real services, tokens and rights over stores that can fail.

Messages come in and go out as bytes. What a server does about errors is the same as in the real
one: an error answer, and after a storage error everything is opened again (R17).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from entidb import protocol
from entidb.db import Database, Role
from entidb.db.maintenance import purge_tombstones
from entidb.db.records import META_FORMAT, encode_format
from entidb.errors import (
    CommitUnknownError,
    EntiDBError,
    ServerError,
    StorageError,
    SyncError,
)
from entidb.protocol import ErrorResponse, HandshakeRequest, PullRequest, PushRequest
from entidb.server.auth import JwtAuthenticator, mint_token
from entidb.server.service import (
    DatabaseService,
    Grant,
    Refusal,
    ValidateContext,
    ValidateTransaction,
)
from entidb.storage import MemoryStorage
from entidb.testing.checkers import ServerWatch
from entidb.testing.faults import COMMIT_FAULTS, Crash, FaultyStorage, read_records
from entidb.testing.oracle import Histories, History
from entidb.testing.workload import PolicyFailure, Workload, validate

if TYPE_CHECKING:
    from entidb.testing.simulator import World

SECRET = b"a secret of the simulator, long enough for HS256"
AUDIENCE = "simulator"
TOKEN_S = 30.0

#: Told how a request was answered: whether it worked, and the bytes.
Reply = Callable[[bool, bytes], None]


class Tenant:
    """One database of the server, with its oracle."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.name = self.db_id = f"tenant{index}"
        #: In every payload of this database, and never in an answer for another.
        self.canary = f"<{'alpha' if index == 0 else 'omega'}>"
        self.histories = Histories()
        self.entropy = world.stream(f"entropy of {self.db_id}").randbytes
        self.workload = Workload(world.stream(f"work on {self.db_id}"), world.knobs, self.canary)
        self.queue: list[tuple[PushRequest, Grant, Reply]] = []
        self.backup: tuple[MemoryStorage, int, int] | None = None
        self.restores = 0
        self.watch = ServerWatch(world.checks, History(b""), world.server_clock)
        self._open(world.new_store(self, None))
        assert self.database.history is not None
        self.watch.history = self.histories.begin(self.database.history)
        self.watch.any_refusal = world.options.validate is not None

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
            self.database, db_id=self.db_id, limits=protocol.LIMITS, validate=hook
        )
        storage.armed = not self.world.quiet

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Mapping[bytes, bytes],
    ) -> None:
        self.watch.on_commit(batch, old, records)

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
        self.backup = copy, self.watch.history.head, self.watch.history.floor

    def restore(self) -> None:
        """The backup comes to life, with a history of its own (R29)."""
        assert self.backup is not None
        copy, head, floor = self.backup
        old = self.watch.history
        self.queue.clear()
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
            f"{self.db_id} is restored from the backup at {head}; devices had seen {old.head}"
        )
        self.watch.history = old.fork(self.database.history, head, floor)
        self.histories.add(self.watch.history)

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

    def pull(self, request: PullRequest, grant: Grant) -> bytes:
        try:
            response = self.service.idle_pull(request, grant)
            if response is None:
                response = self.service.pull(request, grant)
        except SyncError as error:
            self.watch.on_refusal(request, error)
            raise
        data = protocol.encode(response)
        self.world.host.check_canaries(self, data)
        self.watch.on_pull(request, response)
        return data

    def push(self, members: list[tuple[PushRequest, Grant, Reply]]) -> None:
        """Decide pushes as group commit does (R16)."""
        world = self.world
        self.watch.members = [request for request, _, _ in members]
        self.watch.head_before = self.watch.history.head
        if len(members) > 1:
            world.fired("group")
        commits = self.storage.commits
        try:
            answers = self.service.push_many([(request, grant) for request, grant, _ in members])
        except Crash:
            world.tell(f"{self.db_id} crashes while deciding {len(members)} pushes")
            self.reopen()
            return
        except EntiDBError as error:
            unknown = isinstance(error, CommitUnknownError)
            if not unknown:
                self._unchanged(commits)
            self.reopen()
            for _, _, reply in members:
                world.host.refuse(reply, ServerError("storage failed", code="storage_error"))
            return
        finally:
            self.watch.members = []
        if all(isinstance(answer, SyncError) for answer in answers):
            self._unchanged(commits)
        for (request, _, reply), answer in zip(members, answers, strict=True):
            if isinstance(answer, SyncError):
                self.watch.on_refusal(request, answer)
                world.host.refuse(reply, answer)
                continue
            self.watch.on_push(request, answer, self.storage.records)
            world.host.answer(self, reply, protocol.encode(answer))

    def flush(self) -> None:
        members, self.queue = self.queue, []
        if members:
            self.push(members)

    def _unchanged(self, commits: int) -> None:
        self.world.checks.that(
            self.storage.commits == commits,
            "NO-EFFECT",
            f"{self.db_id} changed its store and answered with an error",
        )


class Host:
    """The server's front: tokens, rights, and which database a request is for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tenants = [Tenant(world, index) for index in range(world.knobs.tenants)]
        #: Which database each token was made for.
        self._issued: dict[str, Tenant] = {}
        self._authenticator = JwtAuthenticator(
            SECRET, "HS256", audience=AUDIENCE, clock=world.server_clock
        )

    def token(self, tenant: Tenant) -> str:
        made = mint_token(
            SECRET,
            subject="a device",
            databases=[tenant.db_id],
            expires_s=TOKEN_S if self.world.knobs.expired_token else 10_000_000,
            audience=AUDIENCE,
            clock=self.world.server_clock,
        )
        self._issued[made] = tenant
        return made

    def receive(self, path: str, token: str, body: bytes, reply: Reply) -> None:
        """One request, as bytes."""
        commits = [tenant.storage.commits for tenant in self.tenants]
        try:
            self._receive(path, token, body, reply)
        except SyncError as error:
            self.world.checks.that(
                commits == [tenant.storage.commits for tenant in self.tenants],
                "NO-EFFECT",
                f"a request answered with {error.code} changed the store",
            )
            self.refuse(reply, error)

    def _receive(self, path: str, token: str, body: bytes, reply: Reply) -> None:
        grants = self._authenticator(token)
        request = protocol.decode_request(path, body)
        grant = grants.on(request.db_id)
        tenant = next(t for t in self.tenants if t.db_id == request.db_id)
        self.world.checks.that(
            self._issued.get(token) is tenant,
            "TENANT",
            f"a token for another database opened {tenant.db_id}",
        )
        self.world.trace("server", type(request).__name__, request.device_id[:2].hex())
        if isinstance(request, HandshakeRequest):
            self.answer(tenant, reply, protocol.encode(tenant.service.handshake(request)))
        elif isinstance(request, PullRequest):
            self.answer(tenant, reply, tenant.pull(request, grant))
        elif self.world.knobs.group_ms:
            if not tenant.queue:
                self.world.after(self.world.knobs.group_ms, tenant.flush)
            tenant.queue.append((request, grant, reply))
        else:
            tenant.push([(request, grant, reply)])

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

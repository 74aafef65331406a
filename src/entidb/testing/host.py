"""The server of a simulated run: the real front, stores, tokens and group commit, over stores that
can fail and with virtual time.

Messages come in and go out as bytes. Nothing that a server does with them is written a second time
here: an error is explained by the front, and after a storage error the stores open the database
again (R17). A crash is a front that is dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from entidb import protocol
from entidb.db import Database
from entidb.errors import PermissionDeniedError, SyncError
from entidb.protocol import PushRequest, RoundRequest, SyncRequest, push_in
from entidb.server.auth import JwtAuthenticator
from entidb.server.config import ServerConfig
from entidb.server.front import FEATURES, Front
from entidb.server.group_commit import Done
from entidb.server.hooks import NO_SCHEMA, Refusal, ValidateContext, ValidateTransaction
from entidb.server.minting import mint_token
from entidb.server.stores import Stores
from entidb.testing.ages import ServerAge, refuse_as_before
from entidb.testing.faults import Crash
from entidb.testing.keeper import Keeper
from entidb.testing.tenant import Reply, Tenant
from entidb.testing.unique import settings as unique_settings
from entidb.testing.workload import PolicyFailure, validate
from entidb.testing.world import World

SECRET = b"a secret of the simulator, long enough for HS256"
AUDIENCE = "simulator"
TOKEN_S = 30.0
#: A database that was not used for so long is closed at the next look.
IDLE_S = 2.0


class Host:
    """The server's process, again and again, and who has a token for it."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: Which database each token was made for.
        self._issued: dict[str, Tenant] = {}
        knobs = world.knobs
        hook = world.options.validate
        if hook is None and (knobs.refuse or knobs.refuse_raises):
            hook = self._validate
        self._authenticator = JwtAuthenticator(
            SECRET, "HS256", audience=AUDIENCE, clock=world.server_clock
        )
        self.keeper = Keeper(world, world.stream("keeper"))
        self.age = ServerAge(world, "the server")
        self._config = ServerConfig(
            data_dir=None,
            authenticator=self._authenticator,
            validate=hook,
            idle_close_s=IDLE_S,
            unique=unique_settings(knobs),
        )
        #: How many processes there have been.
        self._life = 0
        self._pushed_to: Tenant | None = None
        self.tenants = [Tenant(self, index) for index in range(knobs.tenants)]
        self.start()
        for tenant in self.tenants:
            tenant.begin()

    def start(self) -> None:
        """Another process begins, with nothing but what is durable. Whatever the one before it
        was at, nobody will hear of it."""
        self._life += 1
        for tenant in self.tenants:
            tenant.queue.clear()
        config = self._configured()
        stores = Stores(
            config,
            clock=self.world.server_clock,
            open_database=self._open,
            schedule=self._schedule,
        )
        knows = self.world.knobs.rounds and not self.world.knobs.older_server
        self.front = Front(
            config,
            authenticator=self._authenticator,
            stores=stores,
            features=FEATURES if knows else (),
            control=self.keeper.control,
        )

    def _configured(self) -> ServerConfig:
        schema = self.age.schema()
        if schema is NO_SCHEMA:
            return self._config
        return replace(
            self._config, schema=schema.number, schema_min=schema.least, upcast=schema.upcast
        )

    def _open(self, db_id: str, create: bool) -> Database:
        return self._tenant(db_id).open()

    def _tenant(self, db_id: str) -> Tenant:
        return next(tenant for tenant in self.tenants if tenant.db_id == db_id)

    def housekeep(self) -> None:
        try:
            self.front.stores.housekeep()
        except Crash:
            self.world.tell("the server crashes while it tidies up")
            self.start()

    def _validate(
        self, context: ValidateContext, transaction: ValidateTransaction
    ) -> Refusal | None:
        try:
            refusal = validate(context, transaction)
        except PolicyFailure:
            self.world.fired("refuse_raises")
            raise
        if refusal is not None:
            self.world.fired("refuse")
        return refusal

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

    def any_token(self, rng: random.Random) -> str:
        return self.token(rng.choice(self.tenants))

    @contextmanager
    def using(self, tenant: Tenant, *, create: bool) -> Iterator[Database]:
        with self.front.stores.using(tenant.db_id, create=create) as store:
            yield store.database

    def receive(self, path: str, token: str, body: bytes, reply: Reply) -> None:
        """One request, as bytes."""
        before = [tenant.effects() for tenant in self.tenants]
        try:
            self._receive(path, token, body, reply)
        except Crash:
            self.world.tell("the server crashes while it begins a history")
            self.start()
        except Exception as error:
            if isinstance(error, SyncError):
                for tenant, effects in zip(self.tenants, before, strict=True):
                    tenant.unchanged(effects)
            self.refuse(reply, error)

    def _receive(self, path: str, token: str, body: bytes, reply: Reply) -> None:
        front = self.front
        grants = front.authenticate(token)
        request = front.decode(path, body)
        try:
            grant = front.permit(request, grants)
        except SyncError as error:
            kept_out = self.keeper.refused(request)
            if isinstance(error, PermissionDeniedError) and not kept_out:
                self._forbidden(request)
            raise
        self.keeper.permitted(request)
        tenant = self._tenant(request.db_id)
        self.world.checks.that(
            self._issued.get(token) is tenant,
            "TENANT",
            f"a token for another database opened {tenant.db_id}",
        )
        self.world.trace("server", type(request).__name__, request.device_id[:2].hex())
        if not tenant.hears(request):
            return
        if isinstance(request, PushRequest | RoundRequest):
            if self.world.knobs.older_server or self.world.knobs.invalid:
                pushed = push_in(request)
                assert pushed is not None
                refuse_as_before(self.world, tenant.refused, pushed, grant)
            self._pushed_to = tenant
            store = front.use(request, grant)

            def submit(done: Done) -> None:
                front.push(store, request, grant, self.keeper.judging(request, done))

            tenant.push(submit, request, grant, reply)
            return
        # Reading stores nothing, but for a history that begins (R29).
        with front.using(request, grant) as store:
            data = tenant.read(partial(front.read, store, request, grant), request, grant)
        self.answer(tenant, reply, data)

    def _schedule(self, work: Callable[[], None]) -> None:
        """The group commit of the database that is being pushed to has something to do."""
        tenant, life = self._pushed_to, self._life
        assert tenant is not None

        def decide() -> None:
            if life == self._life:
                tenant.decide(work)

        if self.world.knobs.group_ms:
            self.world.after(self.world.knobs.group_ms, decide)
        else:
            decide()

    def _forbidden(self, request: SyncRequest) -> None:
        """A token that grants nothing on this database; it may be another's."""
        for tenant in self.tenants:
            pushed = push_in(request)
            if pushed is not None and tenant.db_id == request.db_id:
                tenant.forbid(pushed)

    def later(self, work: Callable[[], None]) -> None:
        """Do ``work`` after what else is due now, if the server has not crashed by then."""
        life = self._life
        self.world.after(0, lambda: work() if life == self._life else None)

    def answer(self, tenant: Tenant, reply: Reply, data: bytes) -> None:
        self.check_canaries(tenant, data)
        reply(True, data)

    def refuse(self, reply: Reply, error: Exception) -> None:
        answer = self.front.explain(error, "simulated")
        self.world.trace("refused", answer.code)
        data = protocol.encode(answer)
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

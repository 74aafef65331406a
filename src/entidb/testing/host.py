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
from entidb.errors import (
    DatabaseClosedError,
    EntiDBError,
    PermissionDeniedError,
    ServerBusyError,
    StorageError,
    SyncError,
    TransactionError,
)
from entidb.protocol import (
    Manifest,
    PushRequest,
    RoundRequest,
    SnapshotRequest,
    SyncRequest,
    push_in,
)
from entidb.server.auth import JwtAuthenticator
from entidb.server.config import ServerConfig
from entidb.server.front import FEATURES, Front
from entidb.server.group_commit import Done
from entidb.server.hooks import NO_SCHEMA, Grant, Refusal, ValidateContext, ValidateTransaction
from entidb.server.minting import mint_token
from entidb.server.newcomers import newcomers_of
from entidb.server.registry import Registry
from entidb.server.segments.cutting import Sizes
from entidb.server.segments.keeping import ImageKeeper
from entidb.server.stores import Holding, Store, Stores
from entidb.testing.ages import ServerAge, note_forbidden, refuse_as_before
from entidb.testing.carrying import CarriedWatch
from entidb.testing.channels import SimulatedChannels
from entidb.testing.hands import PEOPLE, Authors
from entidb.testing.keeper import Keeper
from entidb.testing.nodes import Named, Reply, SimulatedNode, SimulatedNodes
from entidb.testing.quota import ANY_NUMBER, DevicesWatch, RecordsInMemory
from entidb.testing.quota import settings as quota_settings
from entidb.testing.shelf import SERVER_LIVES_MS
from entidb.testing.tenant import Tenant
from entidb.testing.unique import settings as unique_settings
from entidb.testing.workload import PolicyFailure, validate
from entidb.testing.world import World

SECRET = b"a secret of the simulator, long enough for HS256"
AUDIENCE = "simulator"
LIVE = "live"
PAGES = "pages"
TOKEN_S = 30.0
#: A database that was not used for so long is closed at the next look.
IDLE_S = 2.0
#: Entities from which on a database gets an image; what one of them takes of it, roughly.
_IMAGE_LEAST = 2
_ROW_BYTES = 90


class Host:
    """The server's process, again and again, and who has a token for it."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: Which database each token was made for.
        self._issued: dict[str, Named] = {}
        knobs = world.knobs
        hook = world.options.validate
        if hook is None and (knobs.refuse or knobs.refuse_raises):
            hook = self._validate
        self._authenticator = JwtAuthenticator(
            SECRET, "HS256", audience=AUDIENCE, clock=world.server_clock
        )
        self.keeper = Keeper(world, world.stream("keeper"))
        self.ledger = Authors(world.checks)
        self.let_in = DevicesWatch(world, self.keeper)
        self._records = RecordsInMemory()
        self.age = ServerAge(world, "the server")
        self._config = ServerConfig(
            data_dir=None,
            authenticator=self._authenticator,
            validate=hook,
            idle_close_s=IDLE_S,
            unique=unique_settings(knobs),
            **quota_settings(knobs),
            segments_min_entities=_IMAGE_LEAST if knobs.images else 0,
        )
        self._image_names = world.stream("names of images").randbytes
        #: How long the manifests of this server hold.
        self._life_ms = world.stream("life of images").choice(SERVER_LIVES_MS)
        #: Of the process that each node is now.
        self._images: dict[str, ImageKeeper] = {}
        pages = CarriedWatch(
            world,
            self._tenant,
            lambda db_id, data: self.check_canaries(self._tenant(db_id), data),
            self.keeper.locks,
        )
        self.channels = SimulatedChannels(world, lambda: self.nodes, self.keeper.locked_ms, pages)
        self.nodes = SimulatedNodes(world, self._begin)
        self.tenants = [Tenant(self, index) for index in range(knobs.tenants)]
        self.start()
        for tenant in self.tenants:
            tenant.begin()

    def start(self) -> None:
        """Other processes begin, with nothing but what is durable."""
        self.nodes.start_all()

    def _begin(self, node: SimulatedNode) -> Front:
        """What a process begins with."""
        config, clock = self._configured(), self.world.server_clock
        stores = Stores(
            config,
            clock=self.world.server_clock,
            open_database=partial(self._open, node),
            schedule=partial(self._schedule, node),
        )
        if self.world.nodes > 1:
            stores.on_commit = stores.on_open = node.heard.__setitem__
        knobs = self.world.knobs
        images = self._images[node.name] = ImageKeeper(
            config,
            stores,
            self.world.server_clock,
            self._image_names,
            lambda db_id: self._tenant(db_id).shelf.files,
        )
        images.background = False
        images.offers_all = True  # who asks for one that there cannot be is met too
        images.sizes = Sizes(1, _ROW_BYTES * knobs.images)
        images.life_ms = self._life_ms
        features = list(FEATURES) if knobs.rounds else []
        features += ["segments"] if knobs.images else []
        features += [LIVE] if knobs.live else []
        features += [PAGES] if knobs.live and knobs.pages else []
        front = Front(
            config,
            authenticator=self._authenticator,
            stores=stores,
            features=() if knobs.older_server else features,
            control=self.keeper.control,
            newcomers=newcomers_of(config, self._registry(), self.keeper.control, clock),
            images=images,
        )
        if knobs.live:
            live = self.channels.begin(node, front).live

            def told(db_id: str, head: int) -> None:
                node.heard[db_id] = head
                live.told(db_id, head)

            def opened(db_id: str, head: int) -> None:
                node.heard[db_id] = head
                live.opened(db_id, head)

            stores.on_commit, stores.on_open = told, opened
        return front

    def _registry(self) -> Registry:
        retention = self._config.tombstone_retention_days
        clock = self.world.server_clock
        return Registry(self._records, clock, retention_days=retention)

    def let_everybody_in(self) -> None:
        """The operator allows any number of devices."""
        if self.world.knobs.quota_devices:
            self._config = replace(
                self._config, database_devices_max=ANY_NUMBER, subject_devices_max=ANY_NUMBER
            )
            self.let_in.everybody()
            self.start()

    def _configured(self) -> ServerConfig:
        schema = self.age.schema()
        if schema is NO_SCHEMA:
            return self._config
        return replace(
            self._config, schema=schema.number, schema_min=schema.least, upcast=schema.upcast
        )

    def _open(self, node: SimulatedNode, db_id: str, create: bool) -> Database:
        return self._tenant(db_id).open(node)

    def _tenant(self, db_id: str) -> Tenant:
        return next(tenant for tenant in self.tenants if tenant.db_id == db_id)

    def housekeep(self) -> None:
        for node in filter(self.nodes.runs, self.nodes.all):
            with self.nodes.within(node, "the server crashes while it tidies up"):
                node.front.stores.housekeep()

    def hear(self) -> None:
        """Nodes listen for what others have committed, where they have a database open (HEARD)."""
        for node in filter(self.nodes.runs, self.nodes.all):
            for tenant in self.tenants:
                with self.nodes.within(node, f"{node.name} crashes while it listens"):
                    self._hear(node, tenant)

    def _hear(self, node: SimulatedNode, tenant: Tenant) -> None:
        late, due = self.world.faults["news_late"], tenant.watch.history.head
        put_back = tenant.older.times
        with node.front.stores.looking(tenant.db_id) as store:
            if store is None:
                if self.world.knobs.live:
                    self.channels.look(node, tenant.db_id, tenant.openings.present.records)
                return
            mark = node.marks.get(tenant.db_id, -1)
            try:
                with self.nodes.on(node, pausable=True):
                    node.marks[tenant.db_id] = store.database._hearing.step(mark)
            except EntiDBError as error:
                store.report(error)
                return
        heard = node.heard.get(tenant.db_id, 0)
        other = self.world.faults["news_late"] > late or tenant.older.times != put_back
        self.world.checks.that(
            heard >= due or other,
            "HEARD",
            f"{node.name} has heard of commit {heard} of {tenant.db_id} when it is at {due}",
        )

    def make_image(self, tenant: Tenant) -> None:
        """A node makes an image of the database, where one is due."""
        node = self.nodes.pick_running()
        if node is None:
            return
        try:
            with (
                self.nodes.within(node, f"{node.name} crashes while it makes an image"),
                node.front.stores.using(tenant.db_id, create=False),
                self.nodes.on(node, pausable=True),
            ):
                tenant.shelf.make(self._images[node.name])
        except (StorageError, DatabaseClosedError, ServerBusyError, TransactionError) as error:
            self.world.trace("no image", tenant.db_id, error.code)

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
        self,
        tenant: Named,
        granted: tuple[str, ...] | None = None,
        *,
        write: bool = True,
        subject: str = PEOPLE[0],
    ) -> str:
        """A token of somebody for a database, or for some of its collections."""
        may = "rw" if write else "r"
        rights = {"rights": may, "collections": None if granted is None else list(granted)}
        made = mint_token(
            SECRET,
            subject=subject,
            databases={tenant.db_id: may if granted is None else rights},
            expires_s=TOKEN_S if self.world.knobs.expired_token else 10_000_000,
            audience=AUDIENCE,
            claims={"jti": str(len(self._issued))},  # the same in every run of this seed
            clock=self.world.server_clock,
        )
        self._issued[made] = tenant
        return made

    def any_token(self, rng: random.Random, subject: str) -> str:
        return self.token(rng.choice(self.tenants), subject=subject)

    @contextmanager
    def using(self, tenant: Named, *, create: bool) -> Iterator[Database]:
        node = self.nodes.pick_running()
        if node is None:
            raise ServerBusyError("no node runs")
        with (
            self.nodes.on(node),
            node.front.stores.using(tenant.db_id, create=create) as store,
        ):
            yield store.database

    def receive(self, path: str, token: str, body: bytes, reply: Reply) -> None:
        """One request, as bytes, for whichever node gets it."""
        node = self.nodes.pick()
        if node is None:
            self.world.trace("no node is up")
        else:
            self._receive(node, path, token, body, reply)

    def _receive(
        self, node: SimulatedNode, path: str, token: str, body: bytes, reply: Reply
    ) -> None:
        if node.paused:
            node.deferred.append(partial(self._receive, node, path, token, body, reply))
            return
        before = [node.effects(tenant.db_id) for tenant in self.tenants]
        with self.nodes.within(node, "the server crashes while it begins a history"):
            try:
                self._take(node, path, token, body, reply)
            except Exception as error:
                if isinstance(error, SyncError):
                    for tenant, effects in zip(self.tenants, before, strict=True):
                        tenant.unchanged(node, effects)
                self.refuse(node, reply, error)

    def _take(self, node: SimulatedNode, path: str, token: str, body: bytes, reply: Reply) -> None:
        front = node.front
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
        if isinstance(request, PushRequest | RoundRequest):
            if self.world.knobs.older_server or self.world.knobs.invalid:
                pushed = push_in(request)
                assert pushed is not None
                refuse_as_before(self.world, tenant.refused, pushed, grant)
            node.pushed_to = tenant.db_id
            store = self._use(front, request, grant)

            def submit(done: Done) -> None:
                front.push(store, request, grant, self.keeper.judging(request, done))

            tenant.push(node, submit, request, grant, reply)
            return
        # Reading stores nothing, but for a history that begins (R29).
        with Holding(front.stores, self._use(front, request, grant)) as store:
            data = tenant.read(node, partial(front.read, store, request, grant), request, grant)
            if isinstance(request, SnapshotRequest):
                told = protocol.decode(Manifest, data)
                data = tenant.shelf.answer(tenant.watch.history, store, request, grant, told)
        self.answer(tenant, reply, data)

    def _use(self, front: Front, request: SyncRequest, grant: Grant) -> Store:
        try:
            store = front.use(request, grant)
        except SyncError as error:
            self.let_in.kept_out(request, grant.subject, error)
            raise
        self.let_in.let_in(request, grant.subject)
        return store

    def receive_fetch(
        self, sha: bytes, begin: int, end: int, device_id: bytes, token: str, reply: Reply
    ) -> None:
        """A request for a part of a segment."""
        node = self.nodes.pick_running()
        if node is None:
            return
        try:
            issued = self._issued.get(token)
            grants = node.front.authenticate(token)
            assert issued is not None, "who has a token that counts got it here"
            tenant = self._tenant(issued.db_id)
            request = SnapshotRequest(db_id=tenant.db_id, device_id=device_id, packings=[])
            grant = node.front.permit(request, grants)
            images, part = self._images[node.name], range(begin, end)
            with node.front.stores.using(tenant.db_id, create=False) as store:
                data = tenant.shelf.segment(images, store, sha, part, grant)
        except EntiDBError as error:
            self.refuse(node, reply, error)
        else:
            self.answer(tenant, reply, data)

    def _schedule(self, node: SimulatedNode, work: Callable[[], None]) -> None:
        """The group commit of the database that is being pushed to has something to do."""
        decide = partial(self._tenant(node.pushed_to).decide, node, work)
        if self.world.knobs.group_ms:
            self.nodes.later(node, self.world.knobs.group_ms, decide)
        else:
            decide()

    def _forbidden(self, request: SyncRequest) -> None:
        """A token that grants nothing on this database; it may be another's."""
        for tenant in self.tenants:
            pushed = push_in(request)
            if pushed is not None and tenant.db_id == request.db_id:
                note_forbidden(tenant.refused, pushed)

    def answer(self, tenant: Named, reply: Reply, data: bytes) -> None:
        self.check_canaries(tenant, data)
        reply(True, data)

    def refuse(self, node: SimulatedNode, reply: Reply, error: Exception) -> None:
        answer = node.front.explain(error, "simulated")
        self.world.trace("refused", answer.code)
        data = protocol.encode(answer)
        self.check_canaries(None, data)
        reply(False, data)

    def check_canaries(self, tenant: Named | None, data: bytes) -> None:
        for other in self.tenants:
            if other is not tenant:
                self.world.checks.that(
                    other.canary.encode() not in data,
                    "TENANT",
                    f"bytes of {other.db_id} left in an answer for another",
                )

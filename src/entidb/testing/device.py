"""One device of a simulated run: the real database, applier and cycle, and the people who use them.

The cycle is driven step by step, so that messages of several devices interleave and local commits
fall between any two of its requests. A crash drops the generator and opens the store again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from entidb import protocol
from entidb.db import Database, OverruledValue
from entidb.db.maintenance import verify
from entidb.errors import (
    AuthenticationError,
    CommitUnknownError,
    ConflictError,
    CorruptionError,
    EntiDBError,
    HistoryChangedError,
    PermissionDeniedError,
    ResetRequiredError,
    ScopeError,
    StorageError,
    SyncCancelledError,
    SyncError,
    SyncTimeoutError,
    TransportError,
    error_from_code,
)
from entidb.protocol import ErrorResponse, PushRequest, PushResponse, SyncRequest, SyncResponse
from entidb.sync import (
    Conflict,
    ConflictResolution,
    SyncConfig,
    SyncCycleResult,
)
from entidb.sync.cycle import Cycle
from entidb.sync.exchange import Ahead, Connection, Flow
from entidb.testing.ages import DeviceAge
from entidb.testing.between import BetweenApplier
from entidb.testing.checkers import GROUP_COLLECTION
from entidb.testing.faults import COMMIT_FAULTS, Crash, FaultyStorage
from entidb.testing.gateway import Gateway
from entidb.testing.host import Host
from entidb.testing.losers import Limits
from entidb.testing.tenant import Tenant
from entidb.testing.watch import Context, DeviceWatch
from entidb.testing.workload import COLLECTIONS, DRAFTS, combined_fields, policies
from entidb.testing.world import World, WorldClock

#: A copy of a device: its records, and what its bases belong to.
Saved = tuple[dict[bytes, bytes], Context]
TIMEOUT_MS = 1500
TIDY_STEPS = 3
#: What a device may be told to synchronise.
SCOPES = (None, COLLECTIONS[:2], COLLECTIONS[:3], COLLECTIONS[1:3])
#: What the token of a device may be for.
GRANTS = (None, None, COLLECTIONS[:1], COLLECTIONS[:2], COLLECTIONS[1:3], COLLECTIONS[2:], ())


class Exchange:
    """One request on its way. ``outcome`` is the answer or the error, once there is one."""

    def __init__(self, request: SyncRequest) -> None:
        self.request = request
        self.outcome: SyncResponse | SyncError | None = None
        self.renewed = False
        self.sent = False


class Device:
    """See the module."""

    #: What the names of its storage faults begin with.
    faults_begin = ""
    durable = "LOCAL-DURABLE"

    def __init__(
        self,
        world: World,
        name: str,
        host: Host,
        tenant: Tenant,
        records: Mapping[bytes, bytes] | None,
    ) -> None:
        self.world = world
        self.name = name
        self.host = host
        self.tenant = tenant
        self.rng = world.stream(f"device {name}")
        self.entropy = world.stream(f"entropy of {name}").randbytes
        knobs = world.knobs
        offset = self.rng.randint(-knobs.clock_offset_ms, knobs.clock_offset_ms)
        if offset:
            world.fired("clock_offset_ms")
        self.clock = WorldClock(world, offset)
        self.watch = DeviceWatch(world.checks, name, tenant.histories, world.server_clock)
        tenant.device_watches.append(self.watch)
        losers = self.watch.losers
        losers.limits = Limits(knobs.overruled_max, knobs.overruled_s / 86_400)
        losers.combined = combined_fields(knobs)
        losers.judges = world.options.policy is None
        self.saved: Saved | None = None
        self.restarts = 0
        self.reader: tuple[Any, list[tuple[bytes, bytes]]] | None = None
        self.config = SyncConfig(
            db_id=tenant.db_id,
            push_operations_max=knobs.push_operations_max,
            push_bytes_max=knobs.push_bytes_max,
            pull_operations_max=knobs.pull_operations_max,
            pull_bytes_max=knobs.pull_bytes_max,
            rounds_max=knobs.rounds_max,
        )
        self.policies = policies(knobs, self._on_policy, world.options.policy)
        #: The collections its tokens are for; None: all.
        self.granted: tuple[str, ...] | None = None
        self.age = DeviceAge(world, name)
        self.gateway = Gateway(world.stream(f"way of {name}"), knobs, world.fired)
        self.watch.refused = tenant.refused
        self.renew_token()
        self.flow: Flow | None = None
        self.cycle: Cycle | None = None
        self.waiting: Exchange | None = None
        #: Transactions whose answer got lost: the server may have accepted them (R28).
        self.watch.unanswered = {}
        #: Requests known ahead of time, in order; one is sent when the one before it is answered.
        self.ahead: list[Exchange] = []
        self.hints_ignored = False
        self.last: SyncCycleResult | None = None
        self.last_error: EntiDBError | None = None
        self.needs_choice = False
        #: A conflict somebody has seen and not decided yet.
        self.looked_at: Conflict | None = None
        self.was_connected = False
        self._open(world.new_store(self, records))

    def renew_token(self) -> None:
        write = not self.gateway.read_only
        self.token = self.host.token(self.tenant, self.granted, write=write)

    def rates(self) -> dict[str, int]:
        return {name: getattr(self.world.knobs, name) for name in COMMIT_FAULTS}

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Mapping[bytes, bytes],
    ) -> None:
        self.watch.on_commit(batch, old, records)

    # ------------------------------------------------------------ opening, crashing

    def _open(self, storage: FaultyStorage) -> None:
        storage.armed = False
        self.storage = storage
        self.database = Database(
            storage,
            clock=self.clock,
            entropy=self.entropy,
            stale_rows_max=self.world.knobs.stale_rows,
        )
        self.applier = BetweenApplier(
            self.database,
            policies=self.policies,
            overruled_max=self.watch.losers.limits.count_max,
            overruled_days=self.watch.losers.limits.days,
            between=self._others_act,
            adopt_rows=self.world.knobs.adopt_rows,
        )
        self.connection = Connection()
        self.flow = self.cycle = self.waiting = None
        self.ahead = []
        self.reader = None
        storage.armed = not self.world.quiet

    def restart(self) -> None:
        """The process is gone; another one opens what is durable."""
        for exchange in (self.waiting, *self.ahead):
            self._unanswered(exchange)
        self.world.trace("restart", self.name)
        self.restarts += 1
        self._open(self.world.reopen_store(self))
        self.watch.compare_after_restart(self.storage.records)
        if self.rng.random() < 0.1:
            self.check_store()

    def save(self) -> Saved:
        return dict(self.storage.records), self.watch.context()

    def replace_store(self, saved: Saved) -> None:
        """An older copy of the device comes back."""
        self._open(self.world.new_store(self, saved[0]))
        # Of what this device has sent since that copy was made it knows nothing any more (R30).
        self.watch.unanswered = {}
        self.watch.adopt(self.storage.records, saved[1])

    def check_store(self) -> None:
        faults = verify(self.database)
        self.world.checks.that(not faults, "CONVERGE", f"verify of {self.name}: {faults[:3]}")
        self.watch.check_everything(self.storage.records)

    def guarded(self, action: Callable[[], object]) -> bool:
        """Do something local; whether it worked. Crashes restart the device."""
        try:
            action()
        except (Crash, CommitUnknownError):
            self.restart()
            return False
        except StorageError as error:
            self.world.trace("refused locally", self.name, error.code)
            return False
        return True

    # ------------------------------------------------------------ the application

    def transact(self) -> None:
        """One local transaction; what it acknowledged is checked."""
        self.guarded(self._transact)

    def _transact(self) -> None:
        with self.database.transaction() as tx:
            for name, key, value in self.tenant.workload.transaction():
                collection = tx.collection(name)
                if value is None:
                    collection.discard(key)
                else:
                    collection[key] = value
            tx.commit()
        writes = {
            (name, entity_id): payload
            for name, ids in tx.writes.items()
            for entity_id, payload in ids.items()
        }
        if len(writes) > 50:
            self.world.fired("bulk")
        self.world.trace("commit", self.name, tx.sequence, len(writes))
        if writes:
            self.watch.on_acknowledged(self.storage.records, tx.transaction_id, writes)

    def read(self) -> None:
        """Take a snapshot, or look at the one that was taken some events ago: it must not have
        changed (R2)."""
        if self.reader is None:
            self.world.fired("reader")
            snapshot = self.database.snapshot()
            self.reader = snapshot, self._content(snapshot)
            return
        snapshot, content = self.reader
        self.reader = None
        same = content == self._content(snapshot)
        snapshot.close()
        self.world.checks.that(same, "WHOLE", f"a snapshot of {self.name} changed under its reader")

    def close_reader(self) -> None:
        if self.reader is not None:
            self.reader[0].close()
            self.reader = None

    def _content(self, snapshot: Any) -> list[tuple[bytes, bytes]]:
        return list(snapshot.collection(GROUP_COLLECTION).payloads())

    # ------------------------------------------------------------ the person

    def person(self) -> None:
        """Somebody works through conflicts and discarded transactions."""
        restarts = self.restarts
        kept = self.watch.unreported, self.watch.unreported_conflicts
        losers = self.watch.losers.set_aside()
        self.watch.unreported, self.watch.unreported_conflicts = {}, {}
        self.guarded(self._decide_something)
        if restarts == self.restarts:
            self.watch.unreported, self.watch.unreported_conflicts = kept
            self.watch.losers.take_back(losers)
        self.watch.by_person_ids = ()
        self.watch.by_person = {}
        self.watch.losers.by_person = None

    def _decide_something(self) -> None:
        conflicts, discarded = self.applier.conflicts(), self.applier.discarded()
        overruled = self.applier.overruled()
        self.world.checks.that(
            overruled == [kept for _, kept in sorted(self.watch.losers.kept.items())],
            "SURFACED-ONCE",
            f"{self.name} lists other overruled values than it keeps",
        )
        listed = [_place(conflict) for conflict in conflicts]
        self.world.checks.that(
            sorted(listed) == sorted(self.watch.open_conflicts)
            and [entry.transaction_id for entry in discarded]
            == [self.watch.discarded[key] for key in sorted(self.watch.discarded)],
            "SURFACED-ONCE",
            f"{self.name} lists other conflicts or discarded transactions than it has",
        )
        if conflicts and (not discarded or self.rng.random() < 0.7):
            conflict = self.rng.choice(conflicts)
            if self._decide_late():
                return
            self.looked_at = self.rng.choice(conflicts)
            choices = [ConflictResolution.keep_local(), ConflictResolution.accept_remote()]
            if conflict.collection != GROUP_COLLECTION:
                choices.append(ConflictResolution.merge(self.tenant.workload.value()))
            resolution = self.rng.choice(choices)
            self.world.trace("resolve", self.name, resolution.action.value)
            self._decide(conflict, resolution)
            self.world.fired("person")
        elif overruled and (not discarded or self.rng.random() < 0.5):
            self._deal_with(self.rng.choice(overruled))
            self.world.fired("person")
        elif discarded:
            entry = self.rng.choice(discarded)
            self.watch.by_person_ids = (entry.transaction_id,)
            again = self.rng.random() < 0.3
            self.world.trace("recommit" if again else "prune", self.name)
            if again:
                self.applier.recommit(entry)
                self.watch.on_recommitted(self.storage.records, entry)
            else:
                self.applier.prune(entry)
            self.world.fired("person")

    def _deal_with(self, value: OverruledValue) -> None:
        """Somebody writes an overruled value back, or forgets it."""
        self.watch.losers.by_person = value.number
        again = value.collection != GROUP_COLLECTION and self.rng.random() < 0.3
        self.world.trace("write back" if again else "forget", self.name)
        if not again:
            self.applier.prune(value)
            return
        try:
            self.applier.recommit(value)
        except ConflictError as error:
            self.world.trace("refused", error.code)
            return
        self.watch.on_written_back(self.storage.records, value)

    def _decide_late(self) -> bool:
        """Now and then somebody decides about a conflict as they saw it some time ago; whether
        they did. It counts only if the server's side is still the same."""
        seen, self.looked_at = self.looked_at, None
        if seen is None or self.world.quiet or self.rng.random() < 0.5:
            return False
        now = [c.remote_version for c in self.applier.conflicts() if _place(c) == _place(seen)]
        self.world.trace("resolve late", self.name)
        try:
            self._decide(seen, ConflictResolution.keep_local())
        except ConflictError as error:
            self.world.trace("refused", error.code)
            return True
        self.world.fired("person")
        self.world.checks.that(
            now == [seen.remote_version],
            "SURFACED-ONCE",
            f"{self.name} took a decision on another state of the server than it was made on",
        )
        return True

    def _decide(self, conflict: Conflict, resolution: ConflictResolution) -> None:
        """Whoever decides about one of a group decides the same about all of it, and is not cut
        off in between: a policy that looks at the base would merge what is decided and what is
        not into different values, as it should, and the group would not be whole any more."""
        if conflict.collection != GROUP_COLLECTION:
            self._resolve(conflict, resolution)
            return
        armed, self.storage.armed = self.storage.armed, False
        try:
            self._resolve(conflict, resolution)
            for other in self.applier.conflicts():
                if _group(other) == _group(conflict):
                    self._resolve(other, resolution)
        finally:
            self.storage.armed = armed

    def _resolve(self, conflict: Conflict, resolution: ConflictResolution) -> None:
        self.watch.by_person = {_place(conflict): None}
        self.watch.on_report(self.applier.resolve(conflict, resolution))

    def change_scope(self) -> None:
        chosen = self._another_scope()
        self._scoped(lambda: self.database.set_scope(chosen), "scope")

    def _another_scope(self) -> tuple[str, ...] | None:
        """Mostly one that is not refused: nothing may leave the scope while it is pending."""
        now = self.database.scope
        others = [names for names in SCOPES if names is None or now != frozenset(names)]
        if self.watch.outbox and now is not None:
            others = [names for names in others if names is None or now <= frozenset(names)]
        return self.rng.choice(others)

    def change_local(self) -> None:
        local = self.rng.random() < 0.5
        self._scoped(lambda: self.database.declare_local(DRAFTS, local), "local_collection")

    def _scoped(self, change: Callable[[], None], fault: str) -> None:
        before = self.storage.commits
        try:
            self.guarded(change)
        except ScopeError as error:
            # A collection with pending changes cannot leave: the person tries again later.
            self.world.trace("scope refused", self.name, error.code)
            return
        if self.storage.commits != before:
            self.world.trace(fault, self.name)
            self.world.fired(fault)

    def change_grant(self) -> None:
        """Somebody gives this device a token for other collections."""
        self.granted = self.rng.choice([names for names in GRANTS if names != self.granted])
        self.renew_token()
        self.world.trace("grant", self.name, self.granted)
        self.world.tell(f"{self.name} gets a token for {self.granted or 'nothing'}")
        self.world.fired("grants")

    def choose_history(self) -> None:
        """The person's answer to ``HistoryChangedError`` (R29)."""
        keep = self.rng.choice(("server", "device"))
        self.world.trace("reset", self.name, keep)
        self.world.tell(f"{self.name} resets, keep={keep}")
        self.flow = self.waiting = None
        self.ahead = []
        self.connection.forget()
        if self.guarded(lambda: self.applier.reset(keep)):
            self.needs_choice = False
            if keep == "device":
                self.watch.unanswered = {}  # then it is the person who brings it back
            # What is withdrawn from now on is reported as on a new server.
            self.watch.reported = {}

    # ------------------------------------------------------------ cycles

    def begin_cycle(self, *, keep_connection: bool = False) -> None:
        if self.flow is not None:
            return
        if self.needs_choice:
            self.choose_history()
        if not keep_connection and self.rng.random() < 0.1:
            self.connection.forget()
        self.was_connected = self.connection.made
        self.last = self.last_error = None
        self.config = self.age.config(self.config, self.database.read_head().ready)
        self.cycle = Cycle(self.applier, self.config, self.connection, check=self._between_steps)
        self.flow = self.cycle.run()
        self.world.trace("cycle", self.name)
        self.advance(None)

    def advance(self, outcome: SyncResponse | SyncError | None) -> None:
        """Drive the cycle to its next request."""
        flow = self.flow
        assert flow is not None
        self.watch.forget_questions()
        try:
            while True:
                step = flow.throw(outcome) if isinstance(outcome, SyncError) else flow.send(outcome)
                outcome = None
                if isinstance(step, Ahead):
                    self._send_ahead(step.request)
                    continue
                outcome = self._ask(step)
                if outcome is None:
                    return
        except StopIteration as end:
            self._ended(end.value, None)
        except (Crash, CommitUnknownError):
            self.world.tell(f"{self.name} crashes in a cycle")
            self.restart()
        except (SyncError, StorageError) as error:
            self._ended(None, error)

    def _ended(self, result: SyncCycleResult | None, error: EntiDBError | None) -> None:
        assert self.cycle is not None
        self.watch.forget_questions()
        self.world.trace("ended", self.name, "" if error is None else error.code)
        self.watch.on_report(self.cycle.result)
        self.flow = self.waiting = None
        self.ahead = []
        self.last, self.last_error = result, error
        self.age.check_end(self.watch, error, self.database, self.connection.path)
        if isinstance(error, CorruptionError):
            self.world.checks.fail("CONVERGE", f"{self.name} finds its own store damaged: {error}")
        if isinstance(error, HistoryChangedError):
            self.needs_choice = True
        if isinstance(error, PermissionDeniedError) and self.watch.resetting:
            # The token is too narrow for a reset that keeps the device's side; so somebody gives
            # it a wider one.
            self.granted = None
            self.renew_token()
        if error is not None:
            self.connection.forget()
            return
        for _ in range(TIDY_STEPS if not self.world.quiet else 1000):
            more = False

            def tidy() -> None:
                nonlocal more
                more = self.applier.tidy()

            if not self.guarded(tidy) or not more:
                return

    def _between_steps(self) -> None:
        """The cycle is between two steps: people may cancel it, and others go on writing."""
        world = self.world
        if world.quiet:
            return
        chance = self.rng.random() * 1000
        if chance < world.knobs.cancel:
            world.fired("cancel")
            raise SyncCancelledError("cancelled by the simulator")
        self._others_act()

    def _others_act(self) -> None:
        """What other threads of the application do between two steps of a cycle."""
        world, knobs = self.world, self.world.knobs
        if world.quiet or not (knobs.local_in_cycle or knobs.scope_in_cycle):
            return
        chance = self.rng.random() * 1000
        try:
            if chance < knobs.local_in_cycle:
                world.fired("local_in_cycle")
                self._transact()
            elif chance < knobs.local_in_cycle + knobs.scope_in_cycle:
                before = self.storage.commits
                self.database.set_scope(self._another_scope())
                if self.storage.commits != before:
                    world.fired("scope_in_cycle")
        except CommitUnknownError:
            raise Crash from None
        except (ScopeError, StorageError) as error:
            world.trace("refused locally", self.name, error.code)

    def _on_policy(self, conflict: Any, answer: ConflictResolution | None) -> None:
        if answer is None:
            self.world.fired("policy_raises")
        self.world.trace("policy", self.name, "raised" if answer is None else answer.action.value)
        equal = conflict.local_payload == conflict.remote_payload
        several = equal and self._pending_writes(conflict.id_bytes) > 1
        self.watch.on_policy(conflict, answer, several=several)

    def _pending_writes(self, entity_id: bytes) -> int:
        return sum(
            op.entity_id == entity_id
            for transaction in self.applier.pending()
            for op in transaction.operations
        )

    # ------------------------------------------------------------ messages

    def _ask(self, request: SyncRequest) -> SyncResponse | SyncError | None:
        """Send ``request``; its outcome if that is known already, because it was sent ahead."""
        self.hints_ignored = False
        if self.ahead and self.ahead[0].sent and self.ahead[0].request == request:
            ahead = self.ahead.pop(0)
            if ahead.outcome is not None:
                return self._taken(ahead)
            self.waiting = ahead
            return None
        self.ahead = []
        self.waiting = Exchange(request)
        self._send(self.waiting)
        return None

    def _send_ahead(self, request: SyncRequest) -> None:
        willing = self.rng.random() * 1000 < self.world.knobs.ahead and not self.world.quiet
        if willing and not self.hints_ignored:
            self.world.fired("ahead")
            self.ahead.append(Exchange(request))
            if len(self.ahead) == 1 or self.ahead[-2].outcome is not None:
                self._send(self.ahead[-1])
        else:
            # What comes after a request that was not sent ahead must not be either.
            self.hints_ignored = True

    def _send(self, exchange: Exchange) -> None:
        exchange.sent = True
        world, request = self.world, exchange.request
        if isinstance(request, PushRequest):
            self.age.pushed = True
            self.watch.on_push(self.storage.records, request)
        path, body = protocol.path_of(request), protocol.encode(request)
        if isinstance(request, PushRequest) and (world.knobs.body_limit or world.knobs.firewall):
            self._check_built_on(request)
        token = self.token
        if not world.quiet and self.rng.random() * 1000 < world.knobs.wrong_token:
            world.fired("wrong_token")
            token = self.host.token(self.rng.choice(self.host.tenants))
            if self.rng.random() < 0.3:
                token = token[:-3]
        for delay, data in world.network.deliveries(self.name, "up", body, world.now):
            whole = len(data) == len(body)
            world.after(delay, partial(self._arrive, exchange, path, token, data, whole))
        world.after(TIMEOUT_MS, lambda: self._timeout(exchange))

    def _check_built_on(self, request: PushRequest) -> None:
        """ORDER: nothing is pushed without what it was built on."""
        sent = {transaction.transaction_id for transaction in request.transactions}
        left_out: set[tuple[int, bytes]] = set()
        for transaction in self.applier.pending():
            refs = {(op.collection, op.entity_id) for op in transaction.operations}
            if transaction.transaction_id not in sent:
                left_out |= refs
                continue
            self.world.checks.that(
                left_out.isdisjoint(refs),
                "ORDER",
                f"{self.name} pushes {transaction.transaction_id.hex()} without what it was built "
                "on",
            )

    def _arrive(self, exchange: Exchange, path: str, token: str, data: bytes, whole: bool) -> None:
        host = self.host
        refusal = self.gateway.refusal(path, data)
        if refusal is not None:
            self.world.after(1, lambda: self._heard(exchange, refusal))
            return
        if not whole:
            # Whatever the server makes of half a body, its connection is closed by then.
            host.receive(path, token, data, lambda ok, body: None)
            cut_off = TransportError("the connection was cut off")
            self.world.after(1, lambda: self._heard(exchange, cut_off))
            return
        host.receive(path, token, data, lambda ok, body: self._reply(exchange, ok, body))

    def _reply(self, exchange: Exchange, ok: bool, body: bytes) -> None:
        world = self.world
        for delay, data in world.network.deliveries(self.name, "down", body, world.now):
            world.after(delay, partial(self._received, exchange, ok, data))

    def _timeout(self, exchange: Exchange) -> None:
        if exchange.outcome is None:
            if exchange is self.waiting:
                self._unanswered(exchange)
            self._settle(exchange, SyncTimeoutError("no answer in time"))

    def _unanswered(self, exchange: Exchange | None) -> None:
        if exchange is None or not exchange.sent or exchange.outcome is not None:
            return
        if isinstance(exchange.request, PushRequest):
            for transaction in exchange.request.transactions:
                self.watch.unanswered[transaction.transaction_id] = None

    def _received(self, exchange: Exchange, ok: bool, data: bytes) -> None:
        if exchange.outcome is not None or (
            exchange is not self.waiting and exchange not in self.ahead
        ):
            return
        outcome: SyncResponse | SyncError
        try:
            if ok:
                outcome = protocol.decode_response(exchange.request, data)
            else:
                said = protocol.decode(ErrorResponse, data)
                outcome = error_from_code(
                    said.code, said.message, retry_after=said.retry_after, details=said.details
                )
        except SyncError as error:
            outcome = error
        if (
            isinstance(outcome, AuthenticationError)
            and not isinstance(outcome, PermissionDeniedError)
            and not exchange.renewed
        ):
            # 401: one fresh token, and the same request again.
            exchange.renewed = True
            self.world.fired("expired_token")
            self.renew_token()
            self._send(exchange)
            return
        self._settle(exchange, outcome)

    def _heard(self, exchange: Exchange, refusal: SyncError) -> None:
        """Something else than the server has answered."""
        waiting = exchange is self.waiting or exchange in self.ahead
        if waiting and exchange.outcome is None:
            self._settle(exchange, refusal)

    def _settle(self, exchange: Exchange, outcome: SyncResponse | SyncError) -> None:
        exchange.outcome = outcome
        if not isinstance(outcome, SyncError):
            self._send_next()
        if exchange is self.waiting and self.flow is not None:
            self.waiting = None
            self.advance(self._taken(exchange))

    def _send_next(self) -> None:
        """What was waiting for this answer leaves by itself."""
        for exchange in self.ahead:
            if not exchange.sent:
                self._send(exchange)
                return
            if exchange.outcome is None:
                return

    def _taken(self, exchange: Exchange) -> SyncResponse | SyncError:
        """The outcome, as it is handed to the cycle."""
        outcome, request = exchange.outcome, exchange.request
        assert outcome is not None
        self.world.trace("answer", self.name, type(outcome).__name__)
        if isinstance(outcome, PushResponse):
            assert isinstance(request, PushRequest)
            ids = [transaction.transaction_id for transaction in request.transactions]
            self.watch.answers = dict(zip(ids, outcome.results, strict=True))
            self.watch.answered_by = self.tenant.histories.get(request.history)
        if isinstance(outcome, ResetRequiredError):
            self._check_reset_ends()
        return outcome

    def _check_reset_ends(self) -> None:
        history = self.tenant.watch.history
        self.world.checks.that(
            self.watch.cursor < history.floor or self.watch.history is not history,
            "RESET-ENDS",
            f"{self.name} at {self.watch.cursor} is told to reset, and is above the floor "
            f"{history.floor}",
        )


def _place(conflict: Conflict) -> tuple[str, bytes]:
    return conflict.collection, conflict.id_bytes


def _group(conflict: Conflict) -> tuple[str, bytes]:
    """What the ids of a group have in common: all but the number of the member."""
    return conflict.collection, conflict.id_bytes[:-1]

"""One device of a simulated run: the real database, engine and cycle, and the people who use them.

The engine's course is driven step by step, so that messages of several devices interleave and local
commits fall between any two of its requests; ``way`` carries them. A crash drops the course and
opens the store again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from entidb.db import Database
from entidb.db.verifying import verify
from entidb.errors import (
    CommitUnknownError,
    CorruptionError,
    EntiDBError,
    HistoryChangedError,
    ResetRequiredError,
    ScopeError,
    StorageError,
    SyncError,
)
from entidb.protocol import (
    HandshakeResponse,
    PushRequest,
    PushResponse,
    RoundResponse,
    SyncRequest,
    SyncResponse,
    push_in,
)
from entidb.sync import (
    ConflictResolution,
    SyncConfig,
    SyncCycleResult,
)
from entidb.sync.drive import Drive
from entidb.sync.segment_files import SegmentFiles
from entidb.testing.ages import DeviceAge
from entidb.testing.between import BetweenApplier, BetweenEngine, configured
from entidb.testing.ends import check_end
from entidb.testing.faults import COMMIT_FAULTS, Crash, FaultyStorage
from entidb.testing.gateway import Gateway
from entidb.testing.hands import Hands
from entidb.testing.indexes import IndexLife
from entidb.testing.invariants import GROUP_COLLECTION
from entidb.testing.listener import INTERVALS_S, Listener
from entidb.testing.losers import KeepLimits
from entidb.testing.scoped import Scoped
from entidb.testing.shelf import damage_files
from entidb.testing.tenant import Tenant
from entidb.testing.watch import Context, DeviceWatch
from entidb.testing.way import Server, Way
from entidb.testing.workload import INDEXED, NUMBERS, combined_fields, policies
from entidb.testing.world import World, WorldClock

#: A copy of a device: its records, what its bases belong to, and who had it.
Saved = tuple[dict[bytes, bytes], Context, str]
TIDY_STEPS = 3


class Device(Scoped):
    """See the module."""

    #: What the names of its storage faults begin with.
    faults_begin = ""
    durable = "LOCAL-DURABLE"

    def __init__(
        self,
        world: World,
        name: str,
        server: Server,
        tenant: Tenant,
        records: Mapping[bytes, bytes] | None,
    ) -> None:
        self.world = world
        self.name = name
        self.server = server
        self.tenant = tenant
        self.workload = tenant.workload
        self.rng = world.stream(f"device {name}")
        self.entropy = world.stream(f"entropy of {name}").randbytes
        #: What the engine draws its waits from.
        self.chance = world.stream(f"waits of {name}")
        knobs = world.knobs
        offset = self.rng.randint(-knobs.clock_offset_ms, knobs.clock_offset_ms)
        if offset:
            world.fired("clock_offset_ms")
        self.clock = WorldClock(world, offset)
        self.watch = DeviceWatch(world.checks, name, tenant.histories, world.server_clock)
        tenant.device_watches.append(self.watch)
        self.indexes = IndexLife(world, name, INDEXED, NUMBERS)
        losers = self.watch.losers
        losers.limits = KeepLimits(knobs.overruled_max, knobs.overruled_s / 86_400)
        losers.combined = combined_fields(knobs)
        losers.judges = world.options.policy is None
        self.saved: Saved | None = None
        self.restarts = 0
        self.reader: tuple[Any, list[tuple[bytes, bytes]]] | None = None
        #: Where it runs in the background.
        self.listener: Listener | None = None
        self._news = world.stream(f"news at {name}")
        self.listens = self._news.randrange(1000) < knobs.live
        self.config = configured(knobs, tenant.db_id)
        if self.listens:
            self.config = replace(self.config, interval_s=self._news.choice(INTERVALS_S))
        self.policies = policies(knobs, self._on_policy, world.options.policy)
        #: The collections its tokens are for; None: all.
        self.granted: tuple[str, ...] | None = None
        self.age = DeviceAge(world, name)
        self.hands = Hands(
            world.checks, tenant.host.ledger, name, world.stream(f"people at {name}")
        )
        self.gateway = Gateway(world.stream(f"way of {name}"), knobs, world.fired)
        self.watch.refused = tenant.refused
        self.renew_token()
        self.stepping = False
        self.drive: Drive | None = None
        #: What a sync that works has to settle, and whether it was cancelled.
        self.due: frozenset[bytes] = frozenset()
        self.cancelled = False
        #: Transactions whose answer got lost: the server may have accepted them (R28).
        self.watch.unanswered = {}
        self.last: SyncCycleResult | None = None
        self.last_error: EntiDBError | None = None
        self.needs_choice = False
        self.was_connected = False
        #: Segments on their way; a process that ends leaves them to the next.
        self.files = SegmentFiles(None)
        self._open(world.new_store(self, records))

    @property
    def device_id(self) -> bytes:
        return self.database.device_id

    def renew_token(self) -> None:
        write = not self.gateway.read_only
        self.token = self.tenant.host.token(
            self.tenant, self.granted, write=write, subject=self.hands.who
        )

    def rates(self) -> dict[str, int]:
        return {name: getattr(self.world.knobs, name) for name in COMMIT_FAULTS}

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Mapping[bytes, bytes],
    ) -> None:
        self.watch.on_commit(batch, old, records)
        self.indexes.stored(batch, old, records)
        self.hands.on_commit(batch, records)

    # ------------------------------------------------------------ opening, crashing

    def _open(self, storage: FaultyStorage) -> None:
        storage.armed = False
        self.storage = storage
        self.hands.found(storage.records)
        self.indexes.opened()
        self.database = Database(
            storage,
            clock=self.clock,
            entropy=self.entropy,
            stale_rows_max=self.world.knobs.stale_rows,
        )
        self.watch.device_id = self.database.device_id
        self.database.marks_commits = bool(self.world.knobs.marks)
        self.applier = BetweenApplier(
            self.database,
            policies=self.policies,
            overruled_max=self.watch.losers.limits.count_max,
            overruled_days=self.watch.losers.limits.days,
            between=self._others_act,
            takes=self.watch.follow,
            adopt_rows=self.world.knobs.adopt_rows,
            files=self.files,
            chunk_rows=max(1, self.world.knobs.images // 2),
        )
        self._make_engine()
        self.reader = None
        storage.armed = not self.world.quiet

    def _make_engine(self) -> None:
        self.way = Way(self.world, self.server, self)
        self.engine = BetweenEngine(
            self.config,
            self.way,
            self.applier,
            between=self._between_steps,
            clock=self.clock,
            random_source=self.chance,
        )
        self.drive = None
        self.end_listening()
        if self.listens and not self.world.quiet:
            self.listener = Listener(self, self.server.channels, self.tenant.db_id, self._news)
            self.listener.start(self.world.knobs.pause_ms)

    def end_listening(self) -> None:
        """From now on it syncs when it is told to."""
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.stop()

    @property
    def in_cycle(self) -> bool:
        return self.drive is not None

    def _update(self, config: SyncConfig) -> None:
        """The program becomes one of this configuration."""
        if config is not self.config:
            self.config = config
            self.engine.close()
            self._make_engine()

    def restart(self) -> None:
        """The process is gone; another one opens what is durable."""
        self.way.end()
        self.world.trace("restart", self.name)
        self.restarts += 1
        if self.world.knobs.image_faults:
            damage_files(self.files, self.rng, self.world.fired, self.world.knobs.image_faults)
        self._open(self.world.reopen_store(self))
        self.watch.compare_after_restart(self.storage.records)
        if self.rng.random() < 0.1:
            self.check_store()

    def save(self) -> Saved:
        return dict(self.storage.records), self.watch.context(), self.hands.who

    def replace_store(self, saved: Saved) -> None:
        """An older copy of the device comes back."""
        self.way.close()
        self._open(self.world.new_store(self, saved[0]))
        # Of what this device has sent since that copy was made it knows nothing any more (R30).
        self.watch.unanswered = {}
        self.watch.adopt(self.storage.records, saved[1])
        self.held_by(saved[2])

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
        if self.world.knobs.indexes:
            self.guarded(lambda: self.indexes.act(self.database))

    def _transact(self) -> None:
        with self.database.transaction() as tx:
            for name, key, value in self.workload.transaction():
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

    # ------------------------------------------------------------ cycles

    def choose_history(self) -> None:
        """The person's answer to ``HistoryChangedError`` (R29)."""
        keep = self.rng.choice(("server", "device"))
        self.world.trace("reset", self.name, keep)
        self.world.tell(f"{self.name} resets, keep={keep}")
        if self.guarded(lambda: self.engine.reset(keep)):
            self.needs_choice = False
            if keep == "device":
                self.watch.unanswered = {}  # then it is the person who brings it back
            # What is withdrawn from now on is reported as on a new server.
            self.watch.reported = {}

    def begin_cycle(self, *, keep_connection: bool = False) -> None:
        if self.drive is not None:
            return
        if self.needs_choice:
            self.choose_history()
        self._update(self.age.config(self.config, self.database))
        if not keep_connection and self.rng.random() < 0.1:
            self.way.connected = False
        self.was_connected = self.way.connected and self.engine.connection.made
        self.last = self.last_error = None
        self.engine.tidy_at_most(TIDY_STEPS if not self.world.quiet else 1000)
        self.due = frozenset(self.watch.outbox)
        self.cancelled = False
        self.drive = Drive(self.engine.course(threading.Event()), self.way)
        self.world.trace("cycle", self.name)
        self.go_on(None)

    def go_on(self, outcome: SyncResponse | SyncError | None) -> None:
        """Drive the cycle to its next request."""
        drive = self.drive
        assert drive is not None
        if isinstance(outcome, HandshakeResponse):
            self.hands.named = outcome.subject
        self.watch.forget_questions()
        try:
            self.stepping = True
            try:
                result = drive.go_on(outcome)
            finally:
                self.stepping = False
        except (Crash, CommitUnknownError):
            self.world.tell(f"{self.name} crashes in a cycle")
            self.restart()
        except (SyncError, StorageError) as error:
            self._ended(None, error)
        else:
            if result is not None:
                self._ended(result, None)

    def waits(self) -> None:
        """An attempt is over."""
        self.watch.forget_questions()
        self.watch.on_report(self.engine.cycle_result)

    def _ended(self, result: SyncCycleResult | None, error: EntiDBError | None) -> None:
        self.world.trace("ended", self.name, "" if error is None else error.code)
        self.waits()
        self.drive = None
        self.way.begin()
        self.last, self.last_error = result, error
        check_end(self, result, error)
        self.age.check_end(self.watch, error, self.database, self.engine.connection.path)
        if isinstance(error, CorruptionError):
            self.world.checks.fail("CONVERGE", f"{self.name} finds its own store damaged: {error}")
        if isinstance(error, HistoryChangedError):
            self.needs_choice = True
        if error is not None and error.code == "forbidden" and self.watch.resetting:
            # The token is too narrow for a reset that keeps the device's side; so somebody gives
            # it a wider one.
            self.granted = None
            self.renew_token()
        if self.listener is not None:
            self.listener.ended(result, error)

    def _between_steps(self) -> None:
        """The cycle is between two steps: people may cancel it, and others go on writing."""
        world = self.world
        if world.quiet:
            return
        chance = self.rng.random() * 1000
        if chance < world.knobs.cancel:
            world.fired("cancel")
            self.cancelled = True
            self.engine.cancel()
            return
        self._others_act()

    def _others_act(self) -> None:
        """What other threads of the application do between two steps of a cycle."""
        world, knobs = self.world, self.world.knobs
        if world.quiet or not (knobs.local_in_cycle or knobs.scope_in_cycle):
            return
        chance = self.rng.random() * 1000
        stepping, self.stepping = self.stepping, False
        try:
            if chance < knobs.local_in_cycle:
                world.fired("local_in_cycle")
                self._transact()
            elif chance < knobs.local_in_cycle + knobs.scope_in_cycle:
                before = self.storage.commits
                self.database.set_scope(self.another_scope())
                if self.storage.commits != before:
                    world.fired("scope_in_cycle")
        except CommitUnknownError:
            raise Crash from None
        except (ScopeError, StorageError) as error:
            world.trace("refused locally", self.name, error.code)
        finally:
            self.stepping = stepping

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

    def leaves(self, request: PushRequest) -> None:
        self.age.pushed = True
        self.watch.on_push(self.storage.records, request)
        if self.world.knobs.body_limit or self.world.knobs.firewall:
            self._check_built_on(request)

    def unanswered(self, request: PushRequest) -> None:
        for transaction in request.transactions:
            self.watch.unanswered[transaction.transaction_id] = None

    def takes(self, request: SyncRequest, outcome: SyncResponse | SyncError) -> None:
        if isinstance(outcome, RoundResponse):
            self.world.fired("round_behind" if outcome.push is None else "round")
        self.watch.follow(request, outcome)
        verdicts = outcome.push if isinstance(outcome, RoundResponse) else outcome
        pushed = push_in(request)
        if isinstance(verdicts, PushResponse) and pushed is not None:
            ids = [transaction.transaction_id for transaction in pushed.transactions]
            self.watch.answers = dict(zip(ids, verdicts.results, strict=True))
            self.watch.answered_by = self.watch.history
        if isinstance(outcome, ResetRequiredError):
            self._check_reset_ends()

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

    def _check_reset_ends(self) -> None:
        history = self.tenant.watch.history
        self.world.checks.that(
            self.watch.cursor < history.floor or self.watch.history is not history,
            "RESET-ENDS",
            f"{self.name} at {self.watch.cursor} is told to reset, and is above the floor "
            f"{history.floor}",
        )

"""What the tests of hostile input share: hashes of stores, and devices whose server lies."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from entidb.db import Database
from entidb.db.pending import PendingTransaction
from entidb.db.records import ACCEPTED, end_of
from entidb.errors import EntiDBError, HistoryChangedError, SyncError
from entidb.protocol import ErrorResponse, PushRequest, PushResponse, SyncRequest, SyncResponse
from entidb.storage import MemoryStorage
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from entidb.sync.transport import MockTransport
from entidb.testing.fuzz import Honest
from tests.support import DB_ID, GRANT, FakeClock, World, uid

CYCLES = 3
ATTEMPTS = 3


def store_hash(database: Database) -> str:
    """Of every record there is, in order."""
    digest = hashlib.sha256()
    with database.storage.snapshot() as snapshot:
        for key, value in snapshot.scan(b"", b"\xff" * 64):
            digest.update(len(key).to_bytes(4, "big") + key + value)
    return digest.hexdigest()


def honest_server(world: World) -> Honest:
    """The real service, with its refusals as messages."""

    def answer(request: SyncRequest) -> SyncResponse:
        try:
            return world.answer(request, GRANT)
        except SyncError as error:
            return ErrorResponse(
                code=error.code,
                message=error.message,
                retryable=error.retryable,
                details=error.details,
            )

    return answer


class Victim:
    """A device database that meets one server after another."""

    def __init__(self, seed: int, *, attempts_max: int = ATTEMPTS, **config: object) -> None:
        self.retry = RetryConfig(attempts_max=attempts_max)
        self.clock = FakeClock()
        self.db = Database(MemoryStorage(), clock=self.clock, entropy=random.Random(seed).randbytes)
        self.db.declare_local("drafts")
        self.config = {"db_id": DB_ID, "pull_operations_max": 20} | config
        #: Transaction ids by what a believable answer has said of them; "pending" otherwise.
        self.ledger: dict[bytes, str] = {}

    def write(self, *numbers: int) -> None:
        """Transactions that build on each other: an insert, an update, two at once, a delete."""
        for number in numbers:
            for writes in (
                {number: {"n": number}},
                {number: {"n": number, "again": True}},
                {number: {"n": 0}, number + 1000: "other"},
                {number + 1000: None},
            ):
                with self.db.transaction() as tx:
                    notes = tx.collection("notes")
                    for at, value in writes.items():
                        if value is None:
                            del notes[uid(at)]
                        else:
                            notes[uid(at)] = value
                self.ledger[tx.id.bytes] = "pending"

    def engine(self, answer: Callable[[SyncRequest], SyncResponse]) -> SyncEngine:
        def listening(request: SyncRequest) -> SyncResponse:
            response = answer(request)
            if isinstance(request, PushRequest) and isinstance(response, PushResponse):
                self._believe(request, response)
            return response

        return SyncEngine(
            SyncConfig(**self.config, retry=self.retry),  # type: ignore[arg-type]
            MockTransport(listening),
            self.db,
            clock=self.clock,
            random_source=random.Random(1),
        )

    def _believe(self, request: PushRequest, response: PushResponse) -> None:
        taken = [result.version for result in response.results if result.verdict <= 1]
        believable = (
            len(response.results) == len(request.transactions)
            and all(0 < version <= response.head for version in taken)
            and len(set(taken)) == len(taken)
        )
        if not believable:
            return
        taken_entities: set[bytes] = set()
        pairs = zip(request.transactions, response.results, strict=True)
        for transaction, result in reversed(list(pairs)):
            entities = {operation.entity_id for operation in transaction.operations}
            # What a taken one has replaced is done with too, whatever was said of it (R30).
            if result.verdict <= 1 or entities & taken_entities:
                self.ledger[transaction.transaction_id] = "taken"
            if result.verdict <= 1:
                taken_entities |= entities

    def suffer(self, answer: Callable[[SyncRequest], SyncResponse]) -> None:
        """Some cycles with a server that may do anything. Only errors of ours may come out."""
        with self.engine(answer) as engine:
            for _ in range(CYCLES):
                try:
                    engine.sync()
                except EntiDBError:
                    continue

    def recover(self, answer: Callable[[SyncRequest], SyncResponse]) -> None:
        """Meet an honest server again; a history that is not its own is the person's choice."""
        with self.engine(answer) as engine:
            for _ in range(6):
                try:
                    result = engine.sync()
                except HistoryChangedError:
                    engine.reset("device")
                    continue
                if not result.incomplete and not self.db.read_head().ready:
                    return
        raise AssertionError("the device does not find back")

    def take_the_servers_side(self, answer: Callable[[SyncRequest], SyncResponse]) -> None:
        with self.engine(answer) as engine:
            engine.reset("server")
            engine.sync()

    def pending(self) -> list[PendingTransaction]:
        with self.engine(_unreachable) as engine:
            return list(engine.applier.pending())

    def lost(self, world: World) -> list[str]:
        """Transactions that are nowhere, and that no server has claimed to have."""
        there = {transaction.transaction_id for transaction in self.pending()}
        there |= accepted(world.server)
        with self.engine(_unreachable) as engine:
            there |= {withdrawn.transaction_id for withdrawn in engine.discarded()}
        return [
            transaction_id.hex()
            for transaction_id, where in self.ledger.items()
            if where == "pending" and transaction_id not in there
        ]


def _unreachable(request: SyncRequest) -> SyncResponse:
    raise AssertionError("nobody was to be asked")


def accepted(server: Database) -> set[bytes]:
    """Ids of the transactions a server has accepted (R14)."""
    with server.storage.snapshot() as snapshot:
        return {key[len(ACCEPTED) :] for key in snapshot.scan_keys(ACCEPTED, end_of(ACCEPTED))}


def waited_s(clock: FakeClock) -> float:
    return sum(clock.waits)

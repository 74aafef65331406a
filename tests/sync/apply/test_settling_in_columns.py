"""Answers settled in columns: rows and reports are those of settling one by one (R18, R21, R27).

Every test lives the same life twice, the second time without columns, and compares all there is.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db.replica import Inflight
from entidb.protocol import PushResponse, PushResult, Verdict
from entidb.sync.apply.seam import BatchLimits, PushBatch, Settled
from entidb.sync.apply.settle import Settling
from entidb.types import timestamp_from_ms
from tests.support import START_MS, Columns, Device, World, assert_sound

ACCEPTED, SUPERSEDED, CONFLICT = Verdict.ACCEPTED, Verdict.SUPERSEDED, Verdict.CONFLICT
REJECTED = PushResult(Verdict.REJECTED, code="no")
NOW = timestamp_from_ms(START_MS)
Step = tuple[Any, list[tuple[bytes, bytes]]]


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Columns:
    return Columns(monkeypatch, Settling, "_settle_all", False)


def start(**config: Any) -> Device:
    """A device at cursor 6: notes and tasks 0 to 5 have version 1, but note 4 has 5, and note 5
    was deleted in 6."""
    world = World()
    world.put(*[(name, n, "old") for name in ("tasks", "notes") for n in range(6)])
    for n in range(3):
        world.put(("other", n, "old"))
    a = world.device(**config)
    a.sync()
    world.put(("notes", 4, "newer"))
    world.put(("notes", 5, None))
    a.sync()
    assert (a.state.cursor, a.state.have) == (6, [])
    return a


def settle(device: Device, batch: PushBatch, *results: PushResult, **options: Any) -> Step:
    """What settling reports, and every row that is stored then."""
    return step_of(device, settled_by(device, batch, *results, **options))


def settled_by(device: Device, batch: PushBatch, *results: PushResult, **options: Any) -> Settled:
    answer = PushResponse(results=list(results), collections=[], head=1000, time=START_MS)
    rest = {"limits": None} | options
    return device.engine.applier.settle(batch, answer, **rest)


def step_of(device: Device, settled: Settled) -> Step:
    assert_sound(device.db)
    following = settled.next_batch
    if following is not None:
        # When its rows were read is another moment in each life.
        assert following.moment.is_current()
        settled = replace(settled, next_batch=replace(following, moment=None))
    with device.storage.snapshot() as snapshot:
        return settled, snapshot.scan(b"\0", b"\xff")


def prepared(device: Device, operations_max: int = 5000) -> PushBatch:
    batch = device.engine.applier.prepare(BatchLimits(operations_max=operations_max))
    assert batch is not None
    return batch


def accepted(*versions: int, timestamp: int = 0) -> list[PushResult]:
    return [PushResult(ACCEPTED, version, timestamp) for version in versions]


# ---------------------------------------------------------------- one answer

#: On a version, on nothing, on a tombstone; written and deleted.
USUAL: list[tuple[str, int, Any]] = [
    ("notes", 0, "mine"),
    ("tasks", 1, None),
    ("notes", 5, "mine"),
    ("fresh", 9, "mine"),
    ("tasks", 4, "mine"),
]


@pytest.mark.parametrize("timestamp", [0, NOW - 1, NOW + 10**9])
@pytest.mark.parametrize(
    "versions", [(7, 8, 9, 10, 11), (9, 8, 20, 7, 10), (50, 40, 30, 20, 10)], ids=str
)
def test_r18_an_answer_that_accepts_all_is_settled_in_columns(
    versions: tuple[int, ...], timestamp: int, columns: Columns
) -> None:
    def life() -> list[Step]:
        a = start()
        for write in USUAL:
            a.put(write)
        # One more stays in the outbox.
        a.put(("notes", 3, "later"))
        steps = [settle(a, prepared(a, 5), *accepted(*versions, timestamp=timestamp))]
        return [*steps, settle(a, prepared(a), *accepted(12))]

    columns.compare(life)
    assert columns.taken == 2


@pytest.mark.parametrize(
    ("odd", "result"),
    [
        pytest.param([("notes", 1, "a")], PushResult(ACCEPTED, 3), id="R18 under the cursor"),
        pytest.param([("notes", 1, "a")], PushResult(ACCEPTED, 6), id="R18 at the cursor"),
        pytest.param([("notes", 1, "a")], PushResult(SUPERSEDED, 99), id="R14 superseded"),
        pytest.param([("notes", 1, "a")], PushResult(CONFLICT), id="R13 a conflict"),
        pytest.param([("notes", 1, "a")], REJECTED, id="R15 rejected"),
        pytest.param([("notes", 1, "a"), ("tasks", 2, None)], accepted(99)[0], id="R3 two writes"),
        pytest.param([("notes", 0, "on top")], PushResult(ACCEPTED, 99), id="R18 a chain"),
        pytest.param([("tasks", 1, "back")], PushResult(ACCEPTED, 9), id="R18 a chain backwards"),
    ],
)
def test_r18_one_odd_transaction_has_the_answer_settled_one_by_one(
    odd: list[Any], result: PushResult, columns: Columns
) -> None:
    def life() -> list[Step]:
        a = start()
        for write in USUAL:
            a.put(write)
        a.put(*odd)
        return [settle(a, prepared(a), *accepted(10, 11, 12, 13, 14), result)]

    columns.compare(life)
    assert columns.taken == 0


@pytest.mark.parametrize(("version", "taken"), [(19, 1), (20, 1), (21, 2)])
def test_r18_a_base_that_is_newer_already_stays(version: int, taken: int, columns: Columns) -> None:
    def life() -> list[Step]:
        a = start()
        a.put(("notes", 0, "mine"))
        steps = [settle(a, prepared(a), *accepted(20))]
        a.put(("notes", 0, "again"))
        a.put(("notes", 1, "mine"))
        return [*steps, settle(a, prepared(a), *accepted(version, 30))]

    columns.compare(life)
    assert columns.taken == taken


@pytest.mark.parametrize(
    ("number", "before", "taken"), [(0, True, 0), (0, False, 0), (3, True, 2), (3, False, 1)]
)
def test_r8_what_was_written_on_top_or_beside_meanwhile_stays_pending(
    number: int, before: bool, taken: int, columns: Columns
) -> None:
    def life() -> list[Step]:
        a = start()
        a.put(("notes", 0, "mine"))
        a.put(("notes", 1, "mine"))
        if before:
            a.put(("notes", number, "later"))
        batch = prepared(a, 2)
        if not before:
            a.put(("notes", number, "later"))
        step = settle(a, batch, *accepted(10, 11))
        assert (a.values()[number], a.pending) == ("later", 1)
        return [step, settle(a, prepared(a), *accepted(12))]

    columns.compare(life)
    # What was built on something that is settled by now, or read again, goes one by one.
    assert columns.taken == taken


def test_r30_what_it_was_built_on_leaves_the_outbox_with_it(columns: Columns) -> None:
    def life() -> list[Step]:
        a = start()
        a.put(("notes", 0, "first"))
        a.put(("notes", 0, "second"))
        # No batch has it without the first; a record in the database can.
        with a.db.write() as writer:
            writer.set_inflight(Inflight([[a.db.sequence] * 2]))
        [batch] = a.engine.applier.inflight()
        return [settle(a, batch, *accepted(10))]

    columns.compare(life)


# ---------------------------------------------------------------- any life


class Life:
    """Writes and answers by chance, mostly as most are, on one device."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        policy = self.chance.choice(["server_wins", "client_wins", "manual"])
        self.device = start(default_policy=policy)
        self.batches: list[PushBatch] = []

    def run(self) -> list[Step]:
        return [self.step() for _ in range(20)]

    def step(self) -> Step:
        chance, applier = self.chance, self.device.engine.applier
        for _ in range(chance.randint(2, 6)):
            self.write(chance.choice([1] * 14 + [2]))
        limits = BatchLimits(operations_max=chance.choice([2, 4, 50]))
        if not self.batches:
            self.add(applier.prepare(limits))
        if len(self.batches) == 1 and chance.random() < 0.3:
            self.add(applier.prepare_after(self.batches[0], limits))
        if chance.random() < 0.15:
            self.write(1)
        if chance.random() < 0.1:
            self.device.restart()
            self.batches = self.device.engine.applier.inflight()
        if not self.batches:
            return None, []
        batch = self.batches.pop(0)
        following = self.batches[0] if self.batches else None
        more = chance.choice([None, limits])
        results = self.results(len(batch.keys))
        settled = settled_by(self.device, batch, *results, limits=more, following=following)
        self.add(settled.next_batch)
        return step_of(self.device, settled)

    def add(self, batch: PushBatch | None) -> None:
        if batch is not None:
            self.batches.append(batch)

    def write(self, count: int) -> None:
        chance = self.chance
        places = chance.sample(
            [(c, n) for c in ("notes", "tasks", "new") for n in range(40)], count
        )
        here = {name: self.device.values(name) for name, _ in places}
        self.device.put(
            *[
                (name, n, None if n in here[name] and chance.random() < 0.2 else chance.random())
                for name, n in places
            ]
        )

    def results(self, count: int) -> list[PushResult]:
        chance, cursor = self.chance, self.device.state.cursor
        low = chance.choice([cursor + 1] * 9 + [1])
        versions = sorted(chance.sample(range(low, cursor + 80), count))
        if chance.random() < 0.3:
            chance.shuffle(versions)
        results = [PushResult(ACCEPTED, v, chance.choice([0, 0, NOW + v])) for v in versions]
        if chance.random() < 0.15:
            at = chance.randrange(count)
            odd = [PushResult(SUPERSEDED, versions[at]), PushResult(CONFLICT), REJECTED]
            results[at] = chance.choice(odd)
        return results


@pytest.mark.parametrize("seed", range(40))
def test_any_life_is_the_same_in_columns_and_one_by_one(seed: int, columns: Columns) -> None:
    columns.compare(lambda: Life(seed).run())
    assert columns.taken

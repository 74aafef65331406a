"""Pushes decided in columns: answers and rows are those of deciding one by one (R12 to R15, R27).

Every test lives the same life twice, the second time without columns, and compares all there is.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db import purge_tombstones
from entidb.protocol import LIMITS, PushOperation, PushRequest, PushResponse, PushTransaction
from entidb.server.decide import Deciding
from entidb.server.hooks import Grant, Refusal, Schema
from entidb.server.service import DatabaseService
from entidb.types import timestamp_from_ms
from tests.server.test_service import NOW, op, request, tx
from tests.support import GRANT, Columns, World, assert_sound, uid

#: "here" is local on the server, and ``COVERED`` leaves out "closed".
NAMES = ["notes", "tasks", "here", "closed"]
NOTES, TASKS, HERE, CLOSED = range(4)
COVERED = Grant("someone", True, True, frozenset({"notes", "tasks", "here", "fresh"}))
SECOND = timestamp_from_ms(1000)


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Columns:
    return Columns(monkeypatch, Deciding, "_accept_all", None)


def refuse(context: Any, transaction: Any) -> Refusal | None:
    bad = any(operation.value == "bad" for operation in transaction.operations)
    return Refusal("bad", "no") if bad else None


def start(**options: Any) -> World:
    """A server that has notes 0 to 7 at version 1, of which 6 and 7 were deleted in 2."""
    world = World(**options)
    world.server.declare_local("here")
    world.put(*[("notes", n, "old") for n in range(8)])
    world.put(("notes", 6, None), ("notes", 7, None))
    return world


def told(world: World, *members: tuple[PushRequest, Grant]) -> tuple[list[Any], list[Any]]:
    """The answers to a group of pushes, and every row that is stored then."""
    answers: list[Any] = world.service.push_many(members)
    assert_sound(world.server)
    with world.server.storage.snapshot() as snapshot:
        rows = snapshot.scan(b"\0", b"\xff")
    return [each if isinstance(each, PushResponse) else repr(each) for each in answers], rows


# ---------------------------------------------------------------- one batch


def usual() -> list[PushTransaction]:
    """What is decided in columns: one write each, on what is here, under or above it."""
    return [
        tx(1, op(0, "new", base=1)),
        tx(2, op(1, "new", base=2), timestamp=NOW + SECOND),
        tx(3, op(6, "new", base=2), timestamp=NOW - SECOND),
        tx(4, op(20, "new")),
        tx(5, op(0, "new", collection=TASKS), timestamp=NOW | 0xFFFF),
    ]


@pytest.mark.parametrize("timestamp", [NOW - SECOND, NOW, NOW + SECOND])
def test_r27_a_batch_of_one_write_each_is_decided_in_columns(
    timestamp: int, columns: Columns
) -> None:
    def life() -> list[Any]:
        world = start()
        some = [replace(transaction, timestamp=timestamp) for transaction in usual()]
        pushes = (usual(), [tx(6 + n, op(30 + n, "x"), timestamp=timestamp) for n in range(4)])
        steps = [told(world, (request(world, *each, collections=NAMES), GRANT)) for each in pushes]
        return [*steps, told(start(), (request(world, *some, collections=NAMES), COVERED))]

    columns.compare(life)
    assert columns.taken == 3


def test_the_fewest_that_are_decided_in_columns_are_four(columns: Columns) -> None:
    for count, taken in ((3, 0), (4, 1)):
        world = start()
        told(world, (request(world, *usual()[:count], collections=NAMES), GRANT))
        assert columns.taken == taken


def test_an_id_that_comes_twice_beside_what_is_not_covered_is_decided_one_by_one(
    columns: Columns,
) -> None:
    def life() -> list[Any]:
        world = start()
        batch = [*usual()[:3], tx(3, op(4, "a", base=1)), tx(9, op(1, "a", collection=CLOSED))]
        return [told(world, (request(world, *batch, collections=NAMES), COVERED))]

    columns.compare(life)
    assert columns.taken == 0


#: Each keeps the batch it is in from being decided in columns, and nothing else about it does.
ODD = {
    "R3 two writes": tx(9, op(3, "a", base=1), op(4, "a", base=1)),
    "R13 an older base": tx(9, op(3, "a")),
    "R13 a base below the tombstone": tx(9, op(7, "a", base=1)),
    "R13 an entity twice": tx(9, op(0, "a", base=1)),
    "R13 a new entity twice": tx(9, op(20, "a")),
    "R14 accepted before": tx(100, op(2, "known", base=3)),
    "R14 accepted before with other content": tx(100, op(2, "else", base=3)),
    "R15 a deletion": tx(9, op(3, None, base=1)),
    "R15 not covered": tx(9, op(1, "a", collection=CLOSED)),
    "R15 one of two not covered": tx(9, op(1, "a", collection=CLOSED), op(30, "a")),
    "R15 not canonical": tx(9, PushOperation(NOTES, uid(30).bytes, 0, b"\x18\x01")),
    "R15 refused by the hook": tx(9, op(30, "bad")),
    "R15 too large": tx(9, op(30, "x" * 400)),
    "R31 local on the server": tx(9, op(1, "a", collection=HERE)),
}
OPTIONS: dict[str, Any] = {
    "R15 refused by the hook": {"validate": refuse},
    "R15 too large": {"limits": replace(LIMITS, transaction_bytes_max=300)},
}


@pytest.mark.parametrize("place", [0, 2, 5])
@pytest.mark.parametrize("name", ODD)
def test_r15_one_odd_transaction_has_its_batch_decided_one_by_one(
    name: str, place: int, columns: Columns
) -> None:
    def life() -> list[Any]:
        world = start(**OPTIONS.get(name, {}))
        told(world, (request(world, tx(100, op(2, "known", base=1)), collections=NAMES), GRANT))
        batch = usual()
        batch.insert(place, ODD[name])
        return [told(world, (request(world, *batch, collections=NAMES), COVERED))]

    columns.compare(life)
    assert columns.taken == 0


@pytest.mark.parametrize(("schema", "taken"), [(0, 1), (1, 0), (2, 1)])
def test_r33_a_batch_with_something_stored_instead_is_not_accepted_in_columns(
    schema: int, taken: int, columns: Columns
) -> None:
    newer = Schema(2, 1, lambda collection, value, said: "newer" if value == "old" else value)

    def life() -> list[Any]:
        world = start()
        world.service = DatabaseService(world.server, db_id="shop", limits=LIMITS, schema=newer)
        batch = [*usual(), tx(9, op(30, "old"))]
        return [told(world, (request(world, *batch, schema=schema, collections=NAMES), GRANT))]

    columns.compare(life)
    assert columns.taken == taken


@pytest.mark.parametrize(("cursor", "taken"), [(1, 0), (2, 1)])
def test_r28_a_batch_from_below_the_floor_is_not_accepted_in_columns(
    cursor: int, taken: int, columns: Columns
) -> None:
    def life() -> list[Any]:
        world = start()
        purge_tombstones(world.server, 2)
        return [told(world, (request(world, *usual(), cursor=cursor, collections=NAMES), GRANT))]

    columns.compare(life)
    assert columns.taken == taken


def test_r16_a_group_is_decided_in_columns_on_what_its_earlier_members_wrote(
    columns: Columns,
) -> None:
    def life() -> list[Any]:
        world = start()
        others = [tx(20 + n, op(30 + n, "first")) for n in range(4)]
        # On the same entities, by the same transactions, and in collections made a moment ago.
        again = [tx(30 + n, op(29 + n, "second", base=2)) for n in range(4)]
        beside = [tx(40 + n, op(n, "x", collection=TASKS)) for n in range(1, 5)]
        batches = (usual(), others, again, usual(), beside)
        names: list[Any] = [NAMES, ["notes"], ["fresh"], NAMES, NAMES]
        members = [
            (request(world, *batch, collections=each), GRANT)
            for batch, each in zip(batches, names, strict=True)
        ]
        return [told(world, *members), told(world, (request(world, *again), GRANT))]

    columns.compare(life)
    assert columns.taken == 4


# ---------------------------------------------------------------- any life


class Life:
    """Pushes by chance, mostly as most are, on one server."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        small = replace(LIMITS, transaction_bytes_max=1200)
        self.world = start(
            limits=chance.choice([LIMITS, small]), validate=chance.choice([None] * 4 + [refuse])
        )
        self.sent: list[PushTransaction] = []

    def run(self) -> list[Any]:
        steps = []
        for _ in range(12):
            steps.append(told(self.world, *[self.push() for _ in range(self.chance.randint(1, 3))]))
            self.world.clock.ms += self.chance.choice([0, 1, 10**7])
            if self.chance.random() < 0.1:
                purge_tombstones(self.world.server, self.chance.randrange(9))
        return steps

    def push(self) -> tuple[PushRequest, Grant]:
        chance, world = self.chance, self.world
        names = ["notes", *chance.sample(["tasks", "fresh"], 2), "here", "closed"]
        stored = {(e.collection, e.entity_id): e.sequence for e in world.server.changes()}
        places = chance.sample([(c, n) for c in range(3) for n in range(20)], chance.randint(2, 12))
        late = chance.choice([-3600, 0, 0, 3600])
        batch = []
        for collection, number in places:
            base = stored.get((names[collection], uid(number)), 0) + chance.choice([0, 0, 1, 9])
            write = op(number, chance.randrange(9), min(base, world.server.sequence), collection)
            stamp = NOW + (late + chance.randint(-9, 9)) * SECOND
            batch.append(tx(chance.randrange(10**6), write, timestamp=stamp))
        if chance.random() < 0.4:
            self.make_odd(batch)
        self.sent += batch
        cursor = chance.choice([0, world.server.sequence, world.server.sequence])
        made = request(world, *batch, cursor=cursor, collections=names)
        return made, chance.choice([GRANT, COVERED])

    def make_odd(self, batch: list[PushTransaction]) -> None:
        chance, at = self.chance, self.chance.randrange(len(batch))
        [write] = batch[at].operations
        odd = [
            [replace(write, payload=None)],
            [replace(write, payload=op(0, chance.choice(["bad", "x" * 1500])).payload)],
            [replace(write, base_version=max(0, write.base_version - chance.randint(1, 3)))],
            [replace(write, collection=chance.choice([3, 4]))],
            [replace(write, entity_id=batch[0].operations[0].entity_id, collection=0)],
            [write, op(chance.randint(20, 30), "beside")],
        ]
        batch[at] = replace(batch[at], operations=chance.choice(odd))
        again = chance.choice([*self.sent, batch[at]])
        if all(each.transaction_id != again.transaction_id for each in batch):
            batch.append(again)


@pytest.mark.parametrize("seed", range(40))
def test_any_life_is_the_same_in_columns_and_one_by_one(seed: int, columns: Columns) -> None:
    columns.compare(lambda: Life(seed).run())
    # Where a hook is asked nothing is decided in columns.
    assert columns.taken or Life(seed).world.validate

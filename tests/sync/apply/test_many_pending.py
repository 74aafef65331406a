"""What it costs to withdraw, hold, let go or merge many pending edits: work grows with their number
and no faster. Counted, not timed: links followed, rows read, operations encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from entidb.db.pending import PendingTransaction
from entidb.db.writer import Writer
from entidb.server.hooks import Refusal, ValidateContext, ValidateTransaction
from entidb.sync.apply.rebase import Rebase
from entidb.sync.merging import Merge
from tests.support import Device, World, assert_in_step, assert_sound, uid

SMALL, LARGE = 40, 160


class Work:
    """Counts what a rebase does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done = 0
        for owner, name in ((Rebase, "_step"), (Writer, "entity"), (Writer, "pending")):
            patch.setattr(owner, name, self._counting(getattr(owner, name), lambda *_: 1))
        encode = self._counting(PendingTransaction.encode, lambda each: len(each.operations))
        patch.setattr(PendingTransaction, "encode", encode)

    def _counting(self, original: Any, weight: Callable[..., int]) -> Any:
        def counted(*rest: Any) -> Any:
            self.done += weight(*rest)
            return original(*rest)

        return counted

    def of(self, action: Callable[[], object]) -> int:
        before = self.done
        action()
        return self.done - before


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def edited(count: int, entities: int = 1, **config: Any) -> tuple[World, Device]:
    """``count`` pending transactions, each on the same ``entities`` entities, which the server has
    changed as well."""
    world = World()
    a = world.device(**config)
    numbers = range(entities)
    world.put(*[("notes", n, {"n": 0, "m": 0}) for n in numbers])
    a.sync()
    for edit in range(count):
        a.put(*[("notes", n, {"n": edit + 1, "m": 0}) for n in numbers])
    world.put(*[("notes", n, {"n": -1, "m": 1}) for n in numbers])
    return world, a


def refusing_the_first() -> World:
    def validate(context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
        first = any(op.value == {"n": 1, "m": 0} for op in transaction.operations)
        return Refusal("no", "not the first one") if first else None

    return World(validate=validate)


def withdrawing(count: int, work: Work) -> int:
    _, a = edited(count)
    done = work.of(a.sync)
    assert len(a.engine.discarded()) == count
    return done


def withdrawing_of_several(count: int, work: Work) -> int:
    _, a = edited(count // 4, entities=20)
    done = work.of(a.sync)
    assert len(a.engine.discarded()) == count // 4
    return done


def refused(count: int, work: Work) -> int:
    world = refusing_the_first()
    a = world.device()
    for edit in range(count):
        a.put(("notes", 1, {"n": edit + 1, "m": 0}))
    done = work.of(a.sync)
    assert [gone.code for gone in a.engine.discarded()] == ["no"] + ["depends"] * (count - 1)
    return done


def holding(count: int, work: Work) -> int:
    _, a = edited(count, default_policy="manual")
    done = work.of(a.sync)
    assert a.engine.status().held == count
    return done


def holding_of_several(count: int, work: Work) -> int:
    _, a = edited(count // 4, entities=20, default_policy="manual")
    done = work.of(a.sync)
    assert (a.engine.status().held, a.engine.status().conflicts) == (count // 4, 20)
    return done


def letting_go(count: int, work: Work) -> int:
    _, a = edited(count, default_policy="manual")
    a.sync()
    done = work.of(lambda: a.engine.resolve(a.engine.conflicts()[0], "mine"))
    assert (a.engine.status().held, a.pending) == (0, count)
    return done


def taking_theirs(count: int, work: Work) -> int:
    _, a = edited(count, default_policy="manual")
    a.sync()
    done = work.of(lambda: a.engine.resolve(a.engine.conflicts()[0], "theirs"))
    assert (a.engine.status().held, len(a.engine.discarded())) == (0, count)
    return done


def deciding_one_by_one(count: int, work: Work) -> int:
    world = World()
    a = world.device(default_policy="manual")
    numbers = range(count)
    world.put(*[("notes", n, "old") for n in numbers])
    a.sync()
    for n in numbers:
        a.put(("notes", n, "mine"))
    world.put(*[("notes", n, "theirs") for n in numbers])
    a.sync()
    found = a.engine.conflicts()
    done = work.of(lambda: [a.engine.resolve(conflict, "mine") for conflict in found])
    assert (a.engine.status().held, a.pending) == (0, count)
    return done


def merging_one_of_many(count: int, work: Work) -> int:
    _, a = edited(1, entities=count, default_policy=Merge("client_wins"))
    done = work.of(a.sync)
    assert a.pending == 0
    return done


def dropping_every_other(count: int, work: Work) -> int:
    world = World()
    a = world.device(default_policy="client_wins")
    numbers = range(count)
    world.put(*[("notes", n, "old") for n in numbers])
    a.sync()
    a.put(*[("notes", n, "new") for n in numbers])
    world.put(*[("notes", n, "new" if n % 2 else "theirs") for n in numbers])
    done = work.of(a.sync)
    assert set(world.values().values()) == {"new"}
    assert_in_step(world, a)
    return done


def starting_over(count: int, work: Work) -> int:
    world = World()
    a = world.device()
    world.put(("notes", 1, "old"))
    backup = world.backup_server()
    world.put(("notes", 1, "older"))
    a.sync()
    for edit in range(count):
        a.put(("notes", 1, edit))
    world.open_server(backup)
    world.put(("notes", 1, "theirs"))
    a.engine.reset("server")
    done = work.of(a.sync)
    assert len(a.engine.discarded()) == count
    return done


def committing_again(count: int, work: Work) -> int:
    _, a = edited(count)
    a.sync()
    found = a.engine.discarded()
    done = work.of(lambda: [a.engine.recommit(each) for each in found])
    assert (a.pending, a.engine.discarded()) == (count, [])
    return done


def forgetting(count: int, work: Work) -> int:
    _, a = edited(count)
    a.sync()
    found = a.engine.discarded()
    before = a.storage.commits
    done = work.of(lambda: [a.engine.prune(each) for each in found])
    assert a.storage.commits - before == count
    return done


@pytest.mark.parametrize(
    "kind",
    [
        withdrawing,
        withdrawing_of_several,
        refused,
        holding,
        holding_of_several,
        letting_go,
        taking_theirs,
        deciding_one_by_one,
        merging_one_of_many,
        dropping_every_other,
        starting_over,
        committing_again,
        forgetting,
    ],
    ids=lambda kind: kind.__name__,
)
def test_four_times_as_many_are_four_times_the_work(kind: Callable[[int, Work], int], work: Work):
    small, large = kind(SMALL, work), kind(LARGE, work)
    # Some steps are there once, whatever the number.
    assert large <= 4 * small + 20


def test_a_transaction_that_loses_its_only_conflicting_entity_is_let_go():
    """Held for one entity, which the server then has as it was written here; the other is free."""
    world = World()
    a = world.device(default_policy="manual")
    world.put(("notes", 1, "old"), ("notes", 2, "old"))
    a.sync()
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    world.put(("notes", 1, "theirs"))
    a.sync()
    assert a.engine.status().held == 1
    world.put(("notes", 1, "mine"))
    a.settle()
    assert (a.engine.status().held, world.values()) == (0, {1: "mine", 2: "mine"})
    assert_in_step(world, a)


def test_what_is_held_by_two_conflicts_waits_for_both():
    world = World()
    a = world.device(default_policy="manual")
    world.put(*[("notes", n, "old") for n in (1, 2, 3)])
    a.sync()
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    a.put(("notes", 2, "later"), ("notes", 3, "later"))
    world.put(("notes", 1, "theirs"), ("notes", 3, "theirs"))
    a.sync()
    first, second = a.engine.conflicts()
    assert (first.entity_id, second.entity_id) == (uid(1), uid(3))
    a.engine.resolve(second, "mine")
    assert a.engine.status().held == 2
    a.engine.resolve(first, "mine")
    assert (a.engine.status().held, a.pending) == (0, 2)
    assert_sound(a.db)


def test_a_large_transaction_that_loses_operations_keeps_the_others_as_they_were():
    world = World()
    a = world.device(default_policy="client_wins")
    numbers = range(30)
    a.put(*[("notes", n, "new") for n in numbers])
    world.put(*[("notes", n, "new") for n in numbers if n % 3])
    a.sync()
    assert world.values() == dict.fromkeys(numbers, "new")
    assert_in_step(world, a)

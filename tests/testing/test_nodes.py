"""The simulator with several nodes on one store."""

from __future__ import annotations

from collections import Counter

import pytest

from entidb.errors import CommitStaleError, CommitUnknownError, StorageError
from entidb.testing import knobs as knob
from entidb.testing.batch import run_seeds
from entidb.testing.node_store import NodeStorage, SharedStore, _copy
from entidb.testing.simulator import Options, Run, simulate
from entidb.testing.world import World

FAULTS = ("node_pause", "turn_lost", "node_kill", "standby_away", "news_late")
EVERYTHING = {
    "nodes": 3,
    "node_pause": 80,
    "node_kill": 60,
    "standby_away": 50,
    "news_late": 200,
    "events": 250,
    "lmdb": 0,
}


def test_with_several_nodes_every_invariant_holds_and_each_fault_of_theirs_fires() -> None:
    fired: Counter[str] = Counter()
    checked: Counter[str] = Counter()
    failed: list[str] = []

    def tell(run: Run) -> None:
        fired.update(run.faults)
        checked.update(run.checks)
        if run.invariant is not None:
            failed.append(f"seed {run.seed}: {run.invariant}: {run.message}")

    run_seeds(range(12), settings=EVERYTHING, tell=tell)
    assert failed == []
    assert [name for name in FAULTS if not fired[name]] == []
    assert checked["FRESH"] and checked["HEARD"]


def test_a_seed_with_several_nodes_is_one_run() -> None:
    once, again = (simulate(5, Options(EVERYTHING)) for _ in range(2))
    assert once.digest == again.digest


def test_one_node_more_or_less_is_the_same_run_where_there_is_one() -> None:
    """A server of one node takes nothing from the chance of its nodes."""
    lines: list[list[str]] = [[], []]
    for number, nodes in enumerate((0, 1)):
        settings = {"nodes": nodes, "node_pause": 500 * nodes, "events": 120}
        simulate(3, Options(settings, trace=lines[number].append))
    assert lines[0] == lines[1] != []


def test_about_one_run_in_seven_has_several_nodes_and_none_of_them_is_on_disk() -> None:
    drawn = [knob.draw(seed) for seed in range(1000)]
    several = [knobs for knobs in drawn if knobs.nodes > 1]
    assert 100 < len(several) < 200
    assert all(not knobs.lmdb for knobs in several)
    alone = [knobs for knobs in drawn if knobs.nodes <= 1]
    assert not any(getattr(knobs, name) for knobs in alone for name in knob.NODE_LEVELS)


# ---------------------------------------------------------------- the store between them


class Rig:
    """A store, and openers that are paused and lose their standby when the test says so."""

    def __init__(self) -> None:
        self.world = World(1, Options({"nodes": 2, "lmdb": 0}))
        self.moved = 0
        self.standby_is_away = False
        self.seen: list[dict[bytes, bytes | None]] = []
        self.store = SharedStore(self.world, self.world.stream("store"), {b"a": b"1"}, self._move)

    def _move(self, base: object) -> None:
        self.moved += 1

    def opener(self) -> NodeStorage:
        def see(batch: object, old: object, records: object) -> None:
            assert isinstance(batch, dict)
            self.seen.append(batch)

        return NodeStorage(
            self.store,
            self.world.stream("opener"),
            {},
            fired=self.world.fired,
            observe=see,
            pause=lambda storage: None,
            begins=lambda: None,
            seen_later=lambda: see,
            standby=lambda: self.standby_is_away,
            late=lambda: False,
        )

    def commit_alone(self, one: NodeStorage) -> None:
        self.standby_is_away = True
        with pytest.raises(CommitUnknownError):
            one.commit({b"a": b"2"}, one.mark())
        self.standby_is_away = False


def value(storage: NodeStorage) -> bytes | None:
    with storage.snapshot() as snapshot:
        return snapshot.get(b"a")


def test_a_commit_that_waits_for_the_standby_is_seen_by_nobody_and_nobody_else_commits() -> None:
    rig = Rig()
    one, two = rig.opener(), rig.opener()
    rig.commit_alone(one)
    assert value(two) == b"1" and rig.seen == []
    assert not two.turn.take(1.0)
    with pytest.raises(StorageError, match="waits for the standby"):
        two.commit({b"a": b"3"}, two.mark())
    with pytest.raises(StorageError, match="standby does not answer"):
        rig.opener()
    rig.store.settle()
    assert value(two) == value(rig.opener()) == b"2"
    assert rig.seen == [{b"a": b"2"}]


def test_after_a_restart_a_commit_is_shown_when_the_standby_has_it_and_not_before() -> None:
    rig = Rig()
    one, two = rig.opener(), rig.opener()
    mark = two.mark()
    rig.commit_alone(one)
    rig.store._restart()
    assert rig.moved == 1 and not rig.store.in_step
    for look in (two.mark, two.snapshot, rig.opener):
        with pytest.raises(StorageError, match="standby does not answer"):
            look()
    rig.store.settle()
    assert (value(two), two.mark(), rig.store.in_step) == (b"2", mark + 1, True)


def test_after_a_failover_a_commit_that_the_standby_had_not_is_gone() -> None:
    rig = Rig()
    one, two = rig.opener(), rig.opener()
    mark = two.mark()
    rig.commit_alone(one)
    rig.store._restart()
    rig.store._lose()
    assert (value(two), two.mark(), rig.seen) == (b"1", mark, [])
    assert two.commit({b"a": b"3"}, mark) == mark + 1
    assert rig.seen == [{b"a": b"3"}]


def test_a_turn_is_lost_with_the_connection_and_nothing_is_written() -> None:
    rig = Rig()
    one, two = rig.opener(), rig.opener()
    mark = two.mark()
    assert two.turn.take(1.0)
    with pytest.raises(StorageError, match="another node has the turn"):
        one.commit({b"a": b"2"}, mark)
    rig.store._move(_copy(rig.store.base))
    with pytest.raises(StorageError, match="connection that had the turn"):
        two.commit({b"a": b"3"}, mark)
    assert value(one) == b"1"


def test_a_zombie_commits_nothing() -> None:
    rig = Rig()
    one, two = rig.opener(), rig.opener()
    mark = one.mark()
    assert one.turn.take(1.0)
    one.lose_turn()
    assert two.turn.take(1.0)
    two.commit({b"a": b"2"}, mark)
    two.turn.give_back()
    with pytest.raises(CommitStaleError):
        one.commit({b"a": b"3"}, mark)
    assert value(one) == b"2"

"""A dict beside a database: whatever is done, both say the same, also after opening it again."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from entidb.db import Database, Snapshot
from tests.support import uid

NUMBERS = st.integers(0, 12)
NAMES = st.sampled_from(["a", "b"])
VALUES = (
    st.integers(-(2**64), 2**64 - 1) | st.text(max_size=5) | st.lists(st.booleans(), max_size=2)
)
WRITES = st.lists(st.tuples(NAMES, NUMBERS, st.none() | VALUES), max_size=8)
BOUNDS = st.none() | st.integers(0, 14)

Model = dict[str, dict[int, Any]]


def check(view: Any, model: Model) -> None:
    """``view`` has ``collection(name)``; everything it says is what ``model`` says."""
    for name, expected in model.items():
        collection = view.collection(name)
        assert [(i.int, v) for i, v in collection.items()] == sorted(expected.items())
        assert len(collection) == len(expected)
        assert {i.int: v for i, v in collection.get_many(map(uid, range(13))).items()} == expected


class DatabaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.db = self.open()
        self.model: Model = {"a": {}, "b": {}}
        self.snapshots: list[tuple[Snapshot, Model]] = []
        self.changes: dict[tuple[str, int], Any] = {}
        self.cursor = 0

    def open(self) -> Database:
        raise NotImplementedError

    def copy(self) -> Model:
        return {name: dict(values) for name, values in self.model.items()}

    @rule(name=NAMES, number=NUMBERS, value=VALUES)
    def put(self, name: str, number: int, value: Any) -> None:
        self.db.collection(name)[uid(number)] = value
        self.model[name][number] = value

    @rule(name=NAMES, number=NUMBERS)
    def delete(self, name: str, number: int) -> None:
        there = self.db.collection(name).discard(uid(number))
        assert there == (number in self.model[name])
        self.model[name].pop(number, None)

    @rule(writes=WRITES, commit=st.booleans())
    def transact(self, writes: list[tuple[str, int, Any]], commit: bool) -> None:
        after = self.copy()
        tx = self.db.transaction()
        for name, number, value in writes:
            collection = tx.collection(name)
            if value is None:
                assert collection.discard(uid(number)) == (number in after[name])
                after[name].pop(number, None)
            else:
                collection[uid(number)] = value
                after[name][number] = value
            check(tx, after)
        if commit:
            tx.commit()
            self.model = after
        else:
            tx.abort()

    @rule(name=NAMES, start=BOUNDS, stop=BOUNDS, reverse=st.booleans(), limit=BOUNDS)
    def read_range(
        self, name: str, start: int | None, stop: int | None, reverse: bool, limit: int | None
    ) -> None:
        expected = sorted(
            (n, v)
            for n, v in self.model[name].items()
            if (start is None or n >= start) and (stop is None or n < stop)
        )
        got = self.db.collection(name).range(
            None if start is None else uid(start),
            None if stop is None else uid(stop),
            reverse=reverse,
            limit=limit,
        )
        expected = (expected[::-1] if reverse else expected)[:limit]
        assert [(i.int, v) for i, v in got] == expected

    @rule()
    def take_snapshot(self) -> None:
        if len(self.snapshots) > 2:
            self.snapshots.pop(0)[0].close()
        self.snapshots.append((self.db.snapshot(), self.copy()))

    @rule()
    def follow_the_feed(self) -> None:
        feed = self.db.changes(self.cursor)
        for event in feed:
            assert event.entity_id is not None
            self.changes[event.collection, event.entity_id.int] = event.value
        self.cursor = feed.cursor
        followed = {key: value for key, value in self.changes.items() if value is not None}
        assert followed == {
            (name, number): value
            for name, values in self.model.items()
            for number, value in values.items()
        }

    @rule()
    def reopen(self) -> None:
        for snapshot, _ in self.snapshots:
            snapshot.close()
        self.snapshots = []
        self.db = self.open_again()

    def open_again(self) -> Database:
        raise NotImplementedError

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        check(self.db, self.model)
        for snapshot, model in self.snapshots:
            check(snapshot, model)

    def teardown(self) -> None:
        assert self.db.verify() == []
        for snapshot, _ in self.snapshots:
            snapshot.close()
        self.db.close()


class MemoryMachine(DatabaseMachine):
    def open(self) -> Database:
        return Database.in_memory()

    def open_again(self) -> Database:
        return Database(self.db.storage)


class LmdbMachine(DatabaseMachine):
    def open(self) -> Database:
        self.folder = tempfile.mkdtemp()
        return Database.open(self.folder)

    def open_again(self) -> Database:
        self.db.close()
        return Database.open(self.folder, create=False)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestMemoryAgainstADict = MemoryMachine.TestCase
TestMemoryAgainstADict.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestLmdbAgainstADict = LmdbMachine.TestCase
TestLmdbAgainstADict.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)

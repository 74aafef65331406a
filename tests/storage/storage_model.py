"""A dict beside a store: whatever sequence of commits and snapshots, both say the same."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from entidb.storage import Storage

KEYS = st.binary(min_size=1, max_size=3) | st.binary(min_size=500, max_size=511)
BOUNDS = st.binary(max_size=3) | st.binary(min_size=505, max_size=520)
BATCHES = st.dictionaries(KEYS, st.none() | st.binary(max_size=5000), max_size=20)


class StorageMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.storage = self.make_storage()
        self.model: dict[bytes, bytes] = {}
        self.open: list[tuple[Any, dict[bytes, bytes]]] = []

    def make_storage(self) -> Storage:
        raise NotImplementedError

    @rule(batch=BATCHES)
    def commit(self, batch: dict[bytes, bytes | None]) -> None:
        self.storage.commit(batch)
        for key, value in batch.items():
            self.model.pop(key, None)
            if value is not None:
                self.model[key] = value

    @rule()
    def take_snapshot(self) -> None:
        if len(self.open) > 3:
            self.open.pop(0)[0].close()
        self.open.append((self.storage.snapshot(), dict(self.model)))

    @rule()
    def close_snapshot(self) -> None:
        if self.open:
            self.open.pop()[0].close()

    @rule(start=BOUNDS, stop=BOUNDS, limit=st.none() | st.integers(0, 50), reverse=st.booleans())
    def scan(self, start: bytes, stop: bytes, limit: int | None, reverse: bool) -> None:
        with self.storage.snapshot() as now:
            for snapshot, model in [*self.open, (now, self.model)]:
                expected = sorted((k, v) for k, v in model.items() if start <= k < stop)
                expected = expected[::-1] if reverse else expected
                got = snapshot.scan(start, stop, limit=limit, reverse=reverse)
                assert got == expected[:limit]
                keys = snapshot.scan_keys(start, stop, limit=limit, reverse=reverse)
                assert keys == [key for key, _ in got]

    @rule(keys=st.lists(KEYS, max_size=10))
    def get_many(self, keys: list[bytes]) -> None:
        with self.storage.snapshot() as now:
            for snapshot, model in [*self.open, (now, self.model)]:
                wanted = keys + sorted(model)[:5]
                assert snapshot.get_many(wanted) == [model.get(key) for key in wanted]

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert list(self.storage.verify()) == []

    def teardown(self) -> None:
        for snapshot, _ in self.open:
            snapshot.close()
        self.storage.close()


StorageMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)

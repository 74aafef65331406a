"""What a store in PostgreSQL remembers: never anything but what is in the state that is read."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from entidb.storage.postgres import PostgresStorage
from entidb.storage.postgres.line import Line
from entidb.storage.postgres.remembered import (
    NODE_BYTES,
    STORE_BYTES,
    VALUE_BYTES_MAX,
    Memory,
    Remembered,
)
from tests.storage.postgres_cluster import MISSING, Cluster

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


def key(number: int) -> bytes:
    return b"k%03d" % number


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_read_and_committed_it_knows_nothing_that_is_not_so(seed: int) -> None:
    """Against every state that there was; commits of others, lost connections, readers of older
    states, and a commit that is read before its opener hears that it worked."""
    pick = random.Random(seed)
    states: dict[int, dict[bytes, bytes]] = {0: {}}
    mark, losses, known = 0, 0, 0
    remembered = Remembered(Memory())
    for _ in range(400):
        what = pick.random()
        if what < 0.25:
            batch = {
                key(pick.randrange(60)): b"%d" % pick.randrange(9) if pick.random() < 0.7 else None
                for _ in range(pick.randrange(1, 5))
            }
            after = states[mark] | batch
            states[mark + 1] = {k: v for k, v in after.items() if v is not None}
            mine = pick.random() < 0.7
            if mine:
                with remembered.commit():
                    if pick.random() < 0.5:
                        remembered.begin(mark + 1, losses)
                    remembered.committed(mark + 1, losses, batch)
            mark += 1
        elif what < 0.28:
            losses += 1
        seen = mark if pick.random() < 0.8 else pick.randrange(mark + 1)
        truth = states[seen]
        remembered.begin(seen, losses)
        if pick.random() < 0.5:
            keys = [key(pick.randrange(60)) for _ in range(5)]
            for each, value in zip(keys, remembered.values(seen, keys), strict=True):
                assert value is None or value == truth[each]
                known += value is not None
            remembered.read(seen, [(each, truth.get(each)) for each in keys])
            continue
        start, stop = sorted((key(pick.randrange(60)), key(pick.randrange(61))))
        limit = pick.randrange(1, 20)
        right = sorted(each for each in truth if start <= each < stop)[:limit]
        found = remembered.keys(seen, start, stop, limit)
        assert found is None or found == right
        known += found is not None
        end = stop if len(right) < limit else right[-1] + b"\0"
        remembered.read_keys(seen, start, end, right)
    assert known > 40, "it remembers something"


def test_what_is_remembered_is_bounded_for_a_store_and_for_a_node() -> None:
    memory = Memory()
    stores = [Remembered(memory) for _ in range(NODE_BYTES // STORE_BYTES + 8)]
    for store in stores:
        store.begin(1, 0)
        store.read(1, ((b"large", bytes(VALUE_BYTES_MAX + 1)),))
        for number in range(2 * STORE_BYTES // VALUE_BYTES_MAX):
            store.read(1, ((key(number), bytes(VALUE_BYTES_MAX)),))
        assert store.values(1, (b"large",)) == [None]
        assert store.values(1, (key(0),)) == [None], "the oldest is forgotten"
        assert store.values(1, (key(number),)) == [bytes(VALUE_BYTES_MAX)]
        assert memory._used <= NODE_BYTES
    assert stores[0].values(1, (key(number),)) == [None], "the one that was read longest ago"
    for store in stores:
        store.end()
    assert memory._used == 0


@pytest.fixture
def openers(postgres: Cluster) -> Iterator[tuple[PostgresStorage, PostgresStorage]]:
    """Two, with connections of their own, as of two processes."""
    first = PostgresStorage.open(postgres.address, "remembered")
    second = PostgresStorage.open(postgres.address, "remembered", connections_max=15)
    yield first, second
    first.close()
    second.close()


def test_what_was_committed_or_read_is_not_asked_for_again_until_another_one_commits(
    openers: tuple[PostgresStorage, PostgresStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = openers
    asked: list[bytes] = []
    ask = Line.ask

    def noted(self: Line, statement: object, *values: object) -> object:
        asked.append(statement.name)  # type: ignore[attr-defined]
        return ask(self, statement, *values)  # type: ignore[arg-type]

    monkeypatch.setattr(Line, "ask", noted)

    def read(store: PostgresStorage) -> tuple[list[bytes | None], list[bytes]]:
        asked.clear()
        with store.snapshot() as snapshot:
            return (
                snapshot.get_many([b"a", b"b"]),
                snapshot.scan_keys(b"a", b"z", limit=10, proved=True),
            )

    first.commit({b"a": b"1", b"b": b"2"})
    assert read(first) == ([b"1", b"2"], [b"a", b"b"]) and len(asked) <= 2
    assert read(first) == ([b"1", b"2"], [b"a", b"b"]) and not asked
    first.commit({b"a": b"3", b"c": b"4"})
    assert read(first) == ([b"3", b"2"], [b"a", b"b", b"c"]) and not asked
    second.commit({b"a": None, b"b": b"5"})
    assert read(first) == ([None, b"5"], [b"b", b"c"]) and asked
    with first.snapshot() as older:
        second.commit({b"b": b"6"})
        assert read(first)[0] == [None, b"6"]
        assert older.get_many([b"b", b"c"]) == [b"5", b"4"]


def test_threads_that_read_while_others_commit_see_one_state_each(
    openers: tuple[PostgresStorage, PostgresStorage],
) -> None:
    """Two records always have the same value."""
    first, second = openers
    first.commit({b"x": b"0", b"y": b"0"})
    wrong: list[object] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            with first.snapshot() as snapshot:
                x, y = snapshot.get_many([b"x", b"y"])
                if x != y or snapshot.get(b"x") != x:
                    wrong.append((x, y))

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(60):
        value = b"%d" % number
        (first if number % 3 else second).commit({b"x": value, b"y": value})
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


@pytest.mark.parametrize("what", ["commit", "range"])
def test_who_is_interrupted_leaves_nothing_that_anybody_believes(what: str) -> None:
    remembered = Remembered(Memory())
    remembered.begin(1, 0)
    remembered.read(1, [(key(1), b"old"), (key(2), b"old")])
    remembered.read_keys(1, key(0), key(9), [key(1), key(2)])

    class Interrupted(dict[bytes, bytes | None]):
        def items(self) -> Any:
            yield key(1), b"new"
            raise KeyboardInterrupt

    class NoKeys(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            raise KeyboardInterrupt

    def work() -> None:
        if what == "commit":
            remembered.committed(2, 0, Interrupted({key(1): b"new", key(2): None}))
        else:
            remembered.read_keys(1, key(20), key(30), NoKeys([key(21)]))

    with pytest.raises(KeyboardInterrupt):
        work()
    mark = 2 if what == "commit" else 1
    remembered.begin(mark, 0)
    assert remembered.values(mark, [key(1), key(2)]) == [None, None]
    assert remembered.keys(mark, key(0), key(9), 9) is None
    assert remembered.keys(mark, key(20), key(30), 9) is None
    remembered.read(mark, [(key(1), b"new")])
    assert remembered.values(mark, [key(1)]) == [b"new"]

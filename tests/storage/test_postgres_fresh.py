"""What PostgreSQL is told of a large commit and of a large read, to do them in less time: a guess,
which may be wrong."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entidb.errors import CommitStaleError, CorruptionError
from entidb.storage.postgres import PostgresStorage
from entidb.storage.postgres.fresh import Fresh
from entidb.storage.postgres.line import Line, Statement, Value
from entidb.storage.postgres.store import ROWS_AT_ONCE
from tests.storage.postgres_cluster import Cluster
from tests.storage.test_postgres import asked


@pytest.fixture
def store(postgres: Cluster) -> Iterator[PostgresStorage]:
    with contextlib.closing(PostgresStorage.open(postgres.address, uuid.uuid4().hex)) as opened:
        yield opened


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The names of those that commits make, as they come."""
    made: list[bytes] = []
    to_the_end, all_of = Line.ask_to_the_end, Line.ask_all

    def ask_to_the_end(line: Line, statement: Statement, *values: Value) -> object:
        made.append(statement.name)
        return to_the_end(line, statement, *values)

    def ask_all(line: Line, questions: Sequence[tuple[Statement, Sequence[Value]]]) -> object:
        listed = list(questions)
        made.extend(statement.name for statement, _ in listed)
        return all_of(line, listed)

    monkeypatch.setattr(Line, "ask_to_the_end", ask_to_the_end)
    monkeypatch.setattr(Line, "ask_all", ask_all)
    return made


def key_of(number: int) -> bytes:
    return b"e" + number.to_bytes(16, "big")


def rows_of(numbers: range, value: bytes) -> dict[bytes, bytes | None]:
    return {key_of(number): value + b"%d" % number for number in numbers}


def everything(store: PostgresStorage) -> dict[bytes, bytes]:
    with store.snapshot() as snapshot:
        return dict(snapshot.scan(b"", b"\xff"))


@pytest.mark.parametrize("count", [150, 2 * ROWS_AT_ONCE + 50])
def test_a_large_commit_that_replaces_what_nobody_has_read_is_made_all_the_same(
    store: PostgresStorage, statements: list[bytes], count: int
) -> None:
    new = b"put_new" if count > ROWS_AT_ONCE else b"commit_new"
    first = rows_of(range(count), b"first")
    mark = store.commit({b"mhead": b"1"} | first)
    assert new in statements
    del statements[:]
    # Half of them are there, and some go; nobody has looked.
    gone = dict.fromkeys(map(key_of, range(10)))
    second = rows_of(range(count // 2, 3 * count // 2), b"second")
    assert store.commit({b"mhead": b"2"} | second | gone, mark) == mark + 1
    assert {new, b"commit_all"} & set(statements)
    left = {key: value for key, value in first.items() if key not in gone}
    assert everything(store) == {b"mhead": b"2"} | left | second
    # It guesses no more for a while, and is right again.
    del statements[:]
    assert store.commit({b"mhead": b"3"} | first, mark + 1) == mark + 2
    assert not {new, b"commit_all"} & set(statements)
    assert everything(store) == {b"mhead": b"3"} | second | first


@pytest.mark.parametrize("count", [150, 2 * ROWS_AT_ONCE + 50])
def test_what_was_read_in_the_turn_of_a_commit_is_replaced_at_the_first_try(
    store: PostgresStorage, statements: list[bytes], count: int
) -> None:
    rows = rows_of(range(count), b"first")
    store.commit(rows)
    assert store.turn.take()
    try:
        with store.snapshot() as snapshot:
            known = list(rows)[: count // 2]
            assert snapshot.get_many(known) == [rows[key] for key in known]
            assert snapshot.get_many([key_of(count)] * 100) == [None] * 100
            mark = snapshot.mark
        fresh = store.opened.fresh
        changed = rows_of(range(count // 2), b"second") | rows_of(range(count, 2 * count), b"new")
        old, new = fresh.guess([(key, value or b"") for key, value in sorted(changed.items())])
        assert [key for key, _ in old] == known
        assert len(new) == count
        del statements[:]
        assert store.commit(changed, mark) == mark + 1
    finally:
        store.turn.give_back()
    tries = [name for name in statements if name.startswith(b"commit") or name == b"begin_commit"]
    assert len(tries) == 1
    assert everything(store) == rows | changed


@pytest.mark.parametrize("count", [150, 2 * ROWS_AT_ONCE + 50])
def test_a_stale_commit_is_refused_whatever_it_guesses(store: PostgresStorage, count: int) -> None:
    mark = store.commit({b"k": b"v"})
    store.commit({b"k": b"w"})
    with pytest.raises(CommitStaleError):
        store.commit(rows_of(range(count), b"new"), mark)
    assert everything(store) == {b"k": b"w"}


def test_what_is_short_may_be_there_and_few_are_not_worth_a_guess() -> None:
    fresh = Fresh()
    pairs = [(key_of(number), b"v") for number in range(200)]
    assert fresh.guess(pairs) == (pairs, [])  # not in a turn
    fresh.turn_begins()
    assert fresh.guess(pairs[:20]) == (pairs[:20], [])
    assert fresh.guess([(b"mhead", b"v"), *pairs]) == ([(b"mhead", b"v")], pairs)
    fresh.note([key for key, _ in pairs], [b"v"] * 100 + [None] * 100)
    assert fresh.guess(pairs) == (pairs[:100], pairs[100:])
    fresh.turn_ends()
    assert fresh.guess(pairs) == (pairs, [])
    fresh.turn_begins()
    assert fresh.guess(pairs) == ([], pairs)
    # Who reads a great deal in its turn is not guessed for.
    fresh.note([key_of(number) for number in range(50_000)], [b"v"] * 50_000)
    assert fresh.guess(pairs) == (pairs, [])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    there=st.sets(st.integers(0, 700), max_size=700),
    first=st.integers(0, 600),
    step=st.integers(1, 4),
    others=st.lists(st.integers(0, 10_000), max_size=3),
    seed=st.randoms(use_true_random=False),
)
def test_many_keys_are_found_wherever_they_lie(
    store: PostgresStorage,
    there: set[int],
    first: int,
    step: int,
    others: list[int],
    seed: object,
) -> None:
    with store.snapshot() as snapshot:
        before = dict(snapshot.scan(b"e", b"f"))
    rows = {key_of(number): b"%d" % number for number in there}
    store.commit(dict.fromkeys(before.keys() - rows.keys()) | rows)
    keys = [key_of(first + step * number) for number in range(130)] + list(map(key_of, others))
    seed.shuffle(keys)  # type: ignore[attr-defined]
    with store.snapshot() as snapshot:
        assert snapshot.get_many(keys) == [rows.get(key) for key in keys]
        weight = snapshot.weigh(keys)
        stored = sum(len(rows.get(key, b"")) + 4 for key in set(keys) if key in rows)
        assert weight is None or weight >= stored


def test_a_damaged_record_among_many_is_not_returned(
    store: PostgresStorage, postgres: Cluster
) -> None:
    rows = rows_of(range(300), b"value")
    store.commit(rows)
    asked(
        postgres.address,
        "UPDATE entidb_kv SET v = 'other'::bytea WHERE store = "
        "(SELECT id FROM entidb_store WHERE name = %s) AND k = %s",
        store.name,
        key_of(77),
    )
    with store.snapshot() as snapshot, pytest.raises(CorruptionError):
        snapshot.get_many(list(rows))

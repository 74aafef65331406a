"""Passing over entities undecoded: never one that meets the condition, and most that do not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb import F, cbor
from entidb.db import Condition, Database
from entidb.db.byte_ranges import number_pattern
from entidb.db.sieve import Sieve
from entidb.storage import MemoryStorage
from tests.support import uid

EDGES = [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**63, 2**64 - 1]
INTEGERS = st.integers(-(2**64), 2**64 - 1) | st.sampled_from(
    [*EDGES, *[-n for n in EDGES], *[-1 - n for n in EDGES]]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)
NUMBERS = INTEGERS | FLOATS | st.sampled_from([float(n) for n in EDGES])


def fits(pattern: bytes | None, number: Any) -> bool:
    return pattern is not None and re.match(pattern, cbor.encode(number), re.DOTALL) is not None


@given(st.none() | NUMBERS, st.none() | NUMBERS, NUMBERS)
def test_the_encoding_of_every_number_between_two_bounds_fits_their_pattern(
    low: Any, high: Any, number: Any
) -> None:
    if (low is None or low <= number) and (high is None or number <= high):
        assert fits(number_pattern(low, high), number)


@given(NUMBERS, NUMBERS)
def test_a_bound_fits_its_own_pattern(one: Any, other: Any) -> None:
    low, high = sorted([one, other])
    for number in (low, high):
        assert fits(number_pattern(low, high), number)
        assert fits(number_pattern(number, number), number)
    assert (number_pattern(high, low) is None) is (low < high)


@pytest.mark.parametrize(
    ("low", "high", "others"),
    [
        (50_000, 51_000, [0, 49_000, 52_000, 50_000 + 2**16, -50_000, 49_000.0, 5e9, "text", None]),
        (-7, -3, [-8, -2, 0, 3, 7, -70, 0.5, 100.0, True]),
        (2.5, 3, [2, 4, -3, 2.0, 3.5, 100.0]),
        (2**40, None, [2**31, 7, -(2**41), 1.0, -1e300]),
        (None, -1, [0, 1, 2.5, 2**64 - 1]),
    ],
)
def test_what_is_far_from_the_bounds_does_not_fit(low: Any, high: Any, others: list[Any]) -> None:
    pattern = number_pattern(low, high)
    assert [number for number in others if fits(pattern, number)] == []


VALUES = st.sampled_from([0, 1, 5, 5.0, 300, -4, "a", "ab", "tea", None, True, ["a", 5], {"n": 5}])
ROWS = st.lists(st.dictionaries(st.sampled_from(["n", "kind", "x"]), VALUES), max_size=40)
CONDITIONS = st.sampled_from(
    [
        F.n == 5,
        F.n > 4,
        F.n.between(1, 300),
        F.kind == "tea",
        F.kind.in_(["tea", "a"]),
        F.n.in_([0, 1, 5, 300, "ab", -4]),
        (F.kind == "tea") & (F.n < 5),
        (F.kind == "tea") | (F.n < 0),
        (F.kind == "tea") | F.x.exists(),
        F.x.contains("a"),
        F.x.startswith(""),
        F.x.n == 5,
        F.n.in_(range(200)),
        F.n.in_([]),
        ~(F.n == 5),
    ]
)


@given(CONDITIONS, st.lists(ROWS, max_size=20))
def test_rows_together_are_let_through_as_each_alone_or_more(
    condition: Condition, pages: list[list[Any]]
) -> None:
    sieve, meets = Sieve(condition), condition.test()
    for page in pages:
        rows = [b"head" + cbor.encode(value) for value in page]
        through = list(sieve.through(rows))
        assert through == sorted(set(through))
        wanted = {at for at, value in enumerate(page) if meets(value)}
        assert wanted <= {at for at, row in enumerate(rows) if sieve.lets(row)} <= set(through)


def test_a_sieve_that_stops_little_rests_and_begins_again() -> None:
    sieve = Sieve(F.kind == "tea")
    tea, cup = cbor.encode({"kind": "tea"}), cbor.encode({"kind": "cup"})
    assert list(sieve.through([tea] * 10)) == list(range(10))
    rests = 0
    while len(sieve.through([cup] * 10)):
        rests += 1
    assert 0 < rests < 100
    assert list(sieve.through([cup, tea, cup])) == [1]


def test_rows_too_long_to_lay_end_to_end_are_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("entidb.db.sieve._JOINED_BYTES_MAX", 10)
    rows = [cbor.encode({"kind": kind}) for kind in ("tea", "cup", "tea")]
    assert list(Sieve(F.kind == "tea").through(rows)) == [0, 2]


@pytest.mark.parametrize(
    ("condition", "meets"),
    [
        (F.n.between(700, 1300), lambda value: 700 <= value["n"] <= 1300),
        (F.kind == "tea", lambda value: value.get("kind") == "tea"),
        (F.n >= 10, lambda value: value["n"] >= 10),
        (F.n.in_([3, 900, 1999, 2000]), lambda value: value["n"] in (3, 900, 1999, 2000)),
    ],
)
def test_many_entities_are_found_as_a_loop_finds_them(
    condition: Condition, meets: Callable[[Any], bool]
) -> None:
    """More than one page, what is alike together, some deleted, and a transaction's own among
    them."""
    with Database(MemoryStorage()) as db:
        with db.transaction() as tx:
            for n in range(2000):
                kind = {"kind": "tea"} if n // 400 % 2 else {}
                tx.collection("stock")[uid(n + 1)] = {"n": n, **kind}
        stock = db.collection("stock")
        stock.where(F.n.between(800, 850)).delete()
        for descending in (False, True):
            query = stock.where(condition)
            loop = [key for key, value in stock.items() if meets(value)]
            if descending:
                query, loop = query.order_by("-n"), loop[::-1]
            assert list(query.ids()) == loop
            assert query.explain().found == len(loop)
        with db.transaction() as tx:
            inside = tx.collection("stock")
            inside[uid(1)] = {"n": 900, "kind": "tea"}
            inside[uid(1300)] = {"n": 5}
            inside[uid(5000)] = {"n": 2000, "kind": "tea"}
            del inside[uid(901)]
            loop = [key for key, value in inside.items() if meets(value)]
            assert list(inside.where(condition).ids()) == loop

"""The bytes of an index sort as the values do."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb.db.looking import order_key
from entidb.db.sort_keys import sort_key, sort_keys, text_start

NUMBERS = st.one_of(
    st.integers(-(2**64), 2**64 - 1),
    st.floats(allow_nan=False).map(lambda number: number or 0.0),
    st.sampled_from([2**53, 2**53 + 1, 2.0**53, 2**63, 2.0**63, 2**64 - 1, -(2**53) - 1, 1, 1.0]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(), st.binary())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def sign(one: Any, other: Any) -> int:
    return int(one > other) - int(one < other)


@given(one=VALUES, other=VALUES)
def test_bytes_sort_as_values_do(one: Any, other: Any) -> None:
    assert sign(sort_key(one), sort_key(other)) == sign(order_key(one), order_key(other))


@given(one=NUMBERS, other=NUMBERS)
def test_integers_and_floats_are_ordered_together_and_exactly(one: Any, other: Any) -> None:
    assert sign(sort_key(one), sort_key(other)) == sign(one, other)


@given(base=st.integers(2**53, 2**64 - 3000), step=st.integers(0, 2100))
def test_neighbours_beyond_2_53_are_told_apart(base: int, step: int) -> None:
    for one, other in product((base, -base, float(base)), (base + step, -base - step)):
        assert sign(sort_key(one), sort_key(other)) == sign(one, other)


@given(one=st.lists(VALUES, max_size=3), other=st.lists(VALUES, max_size=3), last=st.binary())
def test_several_values_stand_one_behind_the_other(
    one: list[Any], other: list[Any], last: bytes
) -> None:
    """What ends by itself is ordered first by the first, whatever follows."""
    if len(one) == len(other):
        keys = [b"".join(map(sort_key, each)) + last for each in (one, other)]
        assert sign(*keys) == sign(*[list(map(order_key, each)) for each in (one, other)])


@given(text=st.text(), start=st.text(max_size=3))
def test_text_that_begins_with_another_is_found_by_its_first_bytes(text: str, start: str) -> None:
    assert sort_key(text).startswith(text_start(start)) is text.startswith(start)


@pytest.mark.parametrize("pair", [("a", "a\0"), ("a\0", "a\1"), ("", "\0"), ("a\0b", "ab")])
def test_a_zero_in_text_sorts_where_it_belongs(pair: tuple[str, str]) -> None:
    """Also where an id follows that begins with the highest byte."""
    assert sort_key(pair[0]) + b"\xff" * 16 < sort_key(pair[1]) + b"\x00" * 16


ALIKE = st.sampled_from(
    [st.text(), st.text(st.characters(max_codepoint=2)), st.integers(0, 2**53), NUMBERS, SCALARS]
)


@given(values=ALIKE.flatmap(lambda kind: st.lists(kind, max_size=12)))
def test_many_values_have_the_keys_that_each_of_them_has(values: list[Any]) -> None:
    assert sort_keys(values) == list(map(sort_key, values))


def test_zero_is_the_least_of_integers_that_are_made_at_once() -> None:
    values = [2**53, 0, 1, 255, 2**32]
    assert sort_keys(values) == list(map(sort_key, values))
    assert sort_keys([True, False, True, True]) == list(map(sort_key, [True, False, True, True]))

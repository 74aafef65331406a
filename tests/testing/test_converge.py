"""``assert_converges``: policies and hooks that are pure pass, those that are not are found."""

from __future__ import annotations

import itertools
import random
import time
from datetime import UTC, datetime

import pytest

from entidb.errors import CborEncodeError, ConfigError
from entidb.server import Refusal
from entidb.sync import Conflict, ConflictResolution, Merge
from entidb.testing import assert_converges

SEEDS = range(4)


def by_length(conflict: Conflict) -> ConflictResolution:
    mine, theirs = conflict.local_payload or b"", conflict.remote_payload or b""
    return (
        ConflictResolution.keep_local()
        if (len(mine), mine) > (len(theirs), theirs)
        else ConflictResolution.accept_remote()
    )


def by_wall_clock(conflict: Conflict) -> ConflictResolution:
    even = int(time.time()) % 2 == 0
    return ConflictResolution.keep_local() if even else ConflictResolution.accept_remote()


def by_datetime(conflict: Conflict) -> ConflictResolution:
    if datetime.now(UTC).year > 2020:
        return ConflictResolution.keep_local()
    return ConflictResolution.accept_remote()


def by_chance(conflict: Conflict) -> ConflictResolution:
    if random.random() < 0.5:
        return ConflictResolution.keep_local()
    return ConflictResolution.accept_remote()


_turns = itertools.count()


def by_turns(conflict: Conflict) -> ConflictResolution:
    if next(_turns) % 2:
        return ConflictResolution.keep_local()
    return ConflictResolution.accept_remote()


@pytest.mark.parametrize("policy", ["server_wins", "last_write_wins", "merge", by_length])
def test_a_pure_policy_converges(policy):
    assert_converges(policy, seeds=SEEDS)


def test_a_merge_with_options_converges():
    assert_converges(Merge("client_wins", counters=["n"], sets=["s"]), seeds=SEEDS)


@pytest.mark.parametrize("policy", [by_wall_clock, by_datetime, by_chance, by_turns])
def test_a_policy_that_depends_on_more_than_the_conflict_is_found(policy):
    with pytest.raises(AssertionError, match="not a pure function"):
        assert_converges(policy, seeds=range(20))


def test_a_hook_that_refuses_by_what_it_sees_converges():
    def hook(context, transaction):
        too_many = len(transaction.operations) > 6
        return Refusal("too_many", "at most six writes") if too_many else None

    assert_converges(validate=hook, seeds=SEEDS)


def test_a_hook_that_asks_the_clock_is_found():
    def hook(context, transaction):
        return Refusal("late", "come back later") if time.time() > 1_600_000_000 else None

    with pytest.raises(AssertionError, match="clocks and randomness"):
        assert_converges(validate=hook, seeds=SEEDS)


def test_a_hook_that_raises_is_found():
    def hook(context, transaction):
        raise KeyError("nobody thought of this")

    with pytest.raises(AssertionError, match="KeyError"):
        assert_converges(validate=hook, seeds=SEEDS)


def test_nothing_to_prove_is_an_error():
    with pytest.raises(ConfigError):
        assert_converges(seeds=SEEDS)


def dearer(conflict: Conflict) -> ConflictResolution:
    """Of an application's own entities, in all kinds of conflicts."""
    if conflict.local is None or conflict.remote is None:
        return ConflictResolution.accept_remote()
    if conflict.local["price"] > conflict.remote["price"]:
        return ConflictResolution.keep_local()
    return ConflictResolution.accept_remote()


def dearer_for_changes(conflict: Conflict) -> ConflictResolution:
    """It has forgotten deletions."""
    assert conflict.local is not None and conflict.remote is not None, "forgotten"
    return dearer(conflict)


VALUES = [{"name": "tea", "price": 3}, {"name": "cup", "price": 12, "tags": ["new"]}]


def test_a_policy_of_own_fields_is_asked_about_values_of_the_application():
    seen = []

    def policy(conflict):
        if conflict.local is not None:
            seen.append(conflict.local["price"])
        return dearer(conflict)

    assert_converges(policy, seeds=SEEDS, values=VALUES)
    assert {3, 12} == set(seen)


def dearer_of_all(conflict: Conflict) -> ConflictResolution:
    sides = [conflict.local or {}, conflict.remote or {}]
    mine, theirs = (side["price"] for side in sides)
    return ConflictResolution.keep_local() if mine > theirs else dearer(conflict)


def test_a_policy_that_always_raises_is_not_proved():
    told = r"(?s)raised in each of \d+ conflicts.*'price'.*values="
    with pytest.raises(AssertionError, match=told):
        assert_converges(dearer_of_all, seeds=SEEDS)


def test_a_policy_that_raises_sometimes_is_told_of():
    told = r"raised in \d+ of \d+ conflicts.*AssertionError: forgotten"
    with pytest.warns(UserWarning, match=told):
        assert_converges(dearer_for_changes, seeds=SEEDS, values=VALUES)


@pytest.mark.parametrize("answer", ["mine", None, True])
def test_an_answer_that_is_no_resolution_is_found(answer):
    with pytest.raises(AssertionError, match=rf"answered {answer!r}, which is no ConflictRes"):
        assert_converges(lambda conflict: answer, seeds=SEEDS)


def test_a_policy_that_is_never_asked_is_not_proved():
    with pytest.raises(AssertionError, match="never asked: give more seeds"):
        assert_converges("merge", seeds=())


def test_what_a_policy_answered_is_told_in_words():
    with pytest.raises(AssertionError) as caught:
        assert_converges(by_turns, seeds=range(20))
    assert "it answered accept_remote, and answered keep_local when clocks" in str(caught.value)
    assert "call assert_converges with seeds=[0]" in str(caught.value)


@pytest.mark.parametrize("value", [3, "tea", {"n": 1}, {"price": {1, 2}}])
def test_values_that_cannot_be_are_refused(value):
    with pytest.raises((ConfigError, CborEncodeError)):
        assert_converges("merge", seeds=SEEDS, values=[value])

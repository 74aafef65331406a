"""``assert_converges``: policies and hooks that are pure pass, those that are not are found."""

from __future__ import annotations

import itertools
import random
import time
from datetime import UTC, datetime

import pytest

from entidb.errors import ConfigError
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

"""Whose pending transactions are whose on a device (R36): the ranges, and what is built on what."""

from __future__ import annotations

from typing import Any, cast

import pytest

from entidb.db import Database
from entidb.db.pending import PendingOp, PendingTransaction
from entidb.db.replica import OtherWork, ReplicaState
from entidb.db.subjects import (
    Behind,
    count_others,
    has_pending,
    is_others,
    own_gaps,
    sendable,
    subject_of,
)
from entidb.db.writer import Writer
from tests.support import uid

BOB = OtherWork(3, 5, "bob")
CAROL = OtherWork(8, 8, "carol")
STATE = ReplicaState(subject="alice", others=[BOB, CAROL])


def test_a_commit_is_theirs_in_whose_range_it_is_and_else_of_who_syncs_now() -> None:
    found = [subject_of(STATE, sequence) for sequence in range(1, 10)]
    assert found == ["alice"] * 2 + ["bob"] * 3 + ["alice"] * 2 + ["carol", "alice"]
    assert [is_others(STATE, sequence) for sequence in (2, 3, 5, 6, 8, 9)] == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]
    assert subject_of(ReplicaState(others=[BOB]), 2) is None
    assert not is_others(ReplicaState(others=[]), 1)


@pytest.mark.parametrize(
    ("others", "last", "gaps"),
    [
        ([], 5, [(1, 5)]),
        ([], 0, []),
        ([BOB, CAROL], 9, [(1, 2), (6, 7), (9, 9)]),
        ([BOB, CAROL], 8, [(1, 2), (6, 7)]),
        ([BOB, CAROL], 6, [(1, 2), (6, 6)]),
        ([BOB, CAROL], 4, [(1, 2)]),
        ([BOB, CAROL], 2, [(1, 2)]),
        ([BOB, CAROL], 1, [(1, 1)]),
        ([OtherWork(1, 2, "bob"), OtherWork(3, 3, "carol")], 3, []),
        ([OtherWork(1, 2, "bob"), OtherWork(3, 3, "carol")], 4, [(4, 4)]),
    ],
)
def test_the_gaps_between_others_are_ones_own(
    others: list[OtherWork], last: int, gaps: list[tuple[int, int]]
) -> None:
    assert own_gaps(others, last) == gaps


def device(*writes: int) -> Database:
    """With a pending transaction for each of ``writes``, on the entity of that number."""
    database = Database.in_memory()
    for number, entity in enumerate(writes):
        with database.transaction() as tx:
            tx.collection("notes")[uid(entity)] = number
    return database


def test_what_waits_is_found_and_counted() -> None:
    database = device(1, 2, 3, 4)
    state = ReplicaState(others=[OtherWork(1, 2, "bob"), OtherWork(4, 4, "carol")])
    with database.view() as view:
        assert count_others(view.snapshot, state) == {"bob": 2, "carol": 1}
        assert has_pending(view.snapshot, 4, 9)
        assert has_pending(view.snapshot, 1, 1)
        assert not has_pending(view.snapshot, 5, 9)
        assert not has_pending(view.snapshot, 0, 0)


def test_a_transaction_waits_for_what_it_was_built_on_and_no_other() -> None:
    def waits(behind: Behind, sequence: int, *previous: int) -> bool:
        operations = [
            PendingOp(1, uid(number).bytes, before, b"\x01")
            for number, before in enumerate(previous)
        ]
        made = PendingTransaction(sequence, bytes(16), 1, operations)
        return behind.waits(made.key, made.encode())

    class View:
        """An outbox without the commit 4."""

        def pending(self, sequence: int) -> Any:
            return None if sequence == 4 else sequence

    behind = Behind(cast(Writer, View()), STATE.others)
    assert not waits(behind, 6, 0)
    assert not waits(behind, 7, 6)  # one's own
    assert not waits(behind, 9, 4)  # bob's, which is out of the outbox
    assert waits(behind, 10, 0, 3)
    assert waits(behind, 11, 10)  # by way of one's own that waits
    assert not waits(behind, 12, 7)


def test_something_can_be_sent_if_one_transaction_waits_for_nobody() -> None:
    database = device(1, 1, 2)  # the second is built on the first
    state = ReplicaState(subject="alice", others=[OtherWork(1, 1, "bob")])
    with database.view() as view:
        assert not sendable(view, state, 1)
        assert not sendable(view, state, 2)
        assert sendable(view, state, 3)
        assert sendable(view, state)

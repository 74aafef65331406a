"""Who a device syncs as, in terms of what is stored (R36). What people see of it is in
``tests/sync/test_persons.py``."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from entidb.db import Database
from entidb.db.replica import Inflight, OtherWork, ReplicaState
from entidb.errors import SyncStateError
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.signing import sent_by_others
from tests.support import uid


def device(*commits: int) -> DatabaseApplier:
    """With a pending transaction for each of ``commits``, on the entity of that number."""
    applier = DatabaseApplier(Database.in_memory())
    for entity in commits:
        with applier.database.transaction() as tx:
            tx.collection("notes")[uid(entity)] = "x"
    return applier


def make(applier: DatabaseApplier, inflight: Inflight | None = None, **fields: object) -> None:
    with applier.database.write() as writer:
        writer.set_sync_state(replace(writer.sync_state, **fields))
        writer.set_inflight(inflight)


def pending(applier: DatabaseApplier) -> list[int]:
    return [transaction.sequence for transaction in applier.pending()]


def test_ranges_in_which_nothing_waits_are_not_kept() -> None:
    applier = device(1, 2, 3)
    # What bob has committed as 2 was accepted since; carol's 5 is from before a restore.
    make(applier, subject="alice", others=[OtherWork(2, 2, "bob"), OtherWork(7, 9, "carol")])
    applier.sign_in("dave")
    assert applier.state().others == [
        OtherWork(1, 1, "alice"),
        OtherWork(2, 2, "bob"),
        OtherWork(3, 3, "alice"),
    ]
    make(applier, others=[OtherWork(1, 1, "alice"), OtherWork(7, 9, "carol")])
    applier.sign_in("erin")
    assert applier.state().others == [OtherWork(1, 1, "alice"), OtherWork(2, 3, "dave")]
    applier.sign_in("dave")
    assert applier.state().others == [OtherWork(1, 1, "alice")]


def test_who_nobody_has_named_cannot_keep_what_is_pending() -> None:
    applier = device(1, 2, 3)
    # Bob and carol have signed out, and in between somebody has gone on.
    make(applier, others=[OtherWork(1, 1, "bob"), OtherWork(3, 9, "carol")])
    before = applier.state()
    with pytest.raises(SyncStateError, match="subject="):
        applier.sign_out(None)
    assert applier.state() == before
    make(applier, others=[OtherWork(1, 2, "bob")])
    with pytest.raises(SyncStateError, match="subject="):
        applier.sign_out(None)
    assert applier.sign_out("carol") == 1
    assert applier.state().others == [OtherWork(1, 2, "bob"), OtherWork(3, 3, "carol")]


def test_r28_what_another_has_in_flight_stays_in_doubt_when_one_leaves() -> None:
    """A crash between the handshake that named alice and the rest of that cycle leaves it so."""
    applier = device(1, 2)
    others = [OtherWork(1, 1, "bob")]
    make(applier, Inflight([[1, 1]]), subject="alice", others=others, cursor=7, full=False)
    assert applier.withdraw_own(None) == 1
    state = applier.state()
    assert (state.unsettled, state.subject, state.others) == ([[1, 1, 7]], None, others)
    assert applier.look().inflight is None
    assert pending(applier) == [1]


def test_a_batch_is_anothers_if_any_of_it_is() -> None:
    state = ReplicaState(subject="alice", others=[OtherWork(3, 5, "bob")])
    assert sent_by_others(state, [[1, 2], [3, 3]])
    assert sent_by_others(state, [[4, 5], [6, 6]])
    assert not sent_by_others(state, [[1, 2], [6, 6]])
    assert not sent_by_others(state, [])

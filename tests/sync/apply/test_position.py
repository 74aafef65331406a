"""Whether an answer still fits where the device is (R22), and what it remembers of where a server
stands (R29)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db.records import META_ADOPT
from entidb.db.replica import ReplicaState
from entidb.errors import HistoryChangedError, SyncStateError
from entidb.protocol import PullRequest, PullResponse
from entidb.sync.apply.position import (
    check_belongs,
    foreign_in_scope,
    is_unasked,
    remember_doubt,
    see_image,
    seen_in,
)
from entidb.types import SEQUENCE_MAX, SeenCommit, Term

THIS, OTHER = b"the term", b"another1"


@pytest.mark.parametrize(
    ("seen", "term", "head", "remembered"),
    [
        (None, Term(1, THIS), 1, True),
        (None, Term(1, THIS), SEQUENCE_MAX, True),
        # No decoder lets such a number through, and there is no commit 0.
        (None, Term(1, THIS), SEQUENCE_MAX + 1, False),
        (None, Term(0, THIS), 0, False),
        # A server that says no term.
        (None, None, 9, False),
        (SeenCommit(9, THIS), None, 10, False),
        # The image is older than what was seen, or just as old.
        (SeenCommit(9, THIS), Term(1, THIS), 8, False),
        (SeenCommit(9, THIS), Term(1, THIS), 9, False),
        (SeenCommit(9, THIS), Term(1, THIS), 10, True),
        # A later opening of the same files, and files that others went on from.
        (SeenCommit(9, THIS), Term(10, OTHER), 10, True),
        (SeenCommit(9, THIS), Term(9, OTHER), 10, False),
    ],
)
def test_r29_the_head_of_an_image_is_remembered_where_it_is_news_of_the_same_past(
    seen: SeenCommit | None, term: Term | None, head: int, remembered: bool
) -> None:
    stored: list[ReplicaState] = []
    writer: Any = SimpleNamespace(set_sync_state=stored.append)
    state = ReplicaState(history=b"h" * 16, seen=seen)
    manifest: Any = SimpleNamespace(term=term, head=head)
    see_image(writer, state, manifest)
    found = [each.seen for each in stored]
    assert found == ([SeenCommit(head, term.name)] if remembered and term else [])


HISTORY = b"h" * 16
STANDS = ReplicaState(history=HISTORY, cursor=7, full=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"sync_state": replace(STANDS, history=b"o" * 16)}, "history changed"),
        ({"inflight": object()}, "in flight"),
        ({"sync_state": replace(STANDS, cursor=8)}, "cursor moved"),
        ({"stage": SimpleNamespace(full_done=True, delta_cursor=8, full_cursor=7)}, "cursor moved"),
        ({"stage": SimpleNamespace(full_done=True, delta_cursor=7, full_cursor=8)}, None),
        (
            {"stage": SimpleNamespace(full_done=False, delta_cursor=7, full_cursor=8)},
            "cursor moved",
        ),
        # Widened meanwhile, by what is not here yet; and by what is, and has to become pending.
        ({"sync_state": replace(STANDS, uncovered=["tasks"])}, "scope changed"),
        ({"sync_state": replace(STANDS, full=True)}, "scope changed"),
        ({"get": {META_ADOPT: b"tables"}.get}, "scope changed"),
    ],
)
def test_r22_an_answer_is_taken_only_where_the_device_still_is(
    changes: dict[str, Any], message: str | None
) -> None:
    still: dict[str, Any] = {"sync_state": STANDS, "inflight": None, "stage": None}
    writer: Any = SimpleNamespace(**{**still, "get": {}.get, **changes})
    request = PullRequest(
        db_id="shop", device_id=bytes(16), history=HISTORY, cursor=7, limit=10, bytes_max=1000
    )
    if message is None:
        assert check_belongs(writer, request) == writer.sync_state
    else:
        with pytest.raises(SyncStateError, match=message):
            check_belongs(writer, request)


@pytest.mark.parametrize(
    ("names", "found"),
    [([], False), (["here"], True), (["local", "gone"], False), (["local", "here", "gone"], True)],
)
def test_r29_one_of_another_history_in_the_scope_is_enough_for_nothing_to_be_pushed(
    names: list[str], found: bool
) -> None:
    there = {"here": SimpleNamespace(synced=True), "local": SimpleNamespace(synced=False)}
    writer: Any = SimpleNamespace(catalogue=SimpleNamespace(by_name=there))
    assert foreign_in_scope(writer, replace(STANDS, foreign_names=names)) is found


@pytest.mark.parametrize(
    ("cursor", "head", "term", "expected"),
    [
        (9, 9, Term(1, THIS), SeenCommit(9, THIS)),
        (9, 10, Term(10, OTHER), SeenCommit(10, OTHER)),
        (9, 10, None, SeenCommit(9, THIS)),
        (9, SEQUENCE_MAX, Term(1, THIS), SeenCommit(SEQUENCE_MAX, THIS)),
        (9, SEQUENCE_MAX + 1, Term(1, THIS), SeenCommit(9, THIS)),
        # Others went on from older files: just as far, and beyond.
        (9, 9, Term(9, OTHER), "another commit 9"),
        (9, 10, Term(9, OTHER), "another commit 9"),
        # It ends before what the device has seen, or where its cursor stands.
        (9, 8, Term(1, THIS), "has seen commit 9"),
        (7, 8, Term(1, THIS), "has seen commit 9"),
        (12, 8, Term(5, OTHER), "has seen commit 12"),
        (12, 11, Term(1, THIS), "has seen commit 12"),
        (12, 12, Term(1, THIS), SeenCommit(12, THIS)),
    ],
)
def test_r29_an_answer_from_another_past_is_noticed(
    cursor: int, head: int, term: Term | None, expected: SeenCommit | str
) -> None:
    state = ReplicaState(history=HISTORY, cursor=cursor, seen=SeenCommit(9, THIS))
    answer = PullResponse(
        collections=[],
        commits=[],
        cursor=head,
        has_more=False,
        head=head,
        floor=0,
        time=0,
        term=term,
    )
    if isinstance(expected, str):
        with pytest.raises(HistoryChangedError, match=expected):
            seen_in(state, answer)
    else:
        assert seen_in(state, answer) == expected


@pytest.mark.parametrize(
    ("seen", "term", "unasked"),
    [
        (None, Term(10, OTHER), False),
        (SeenCommit(9, THIS), None, False),
        (None, None, False),
        (SeenCommit(9, THIS), Term(1, THIS), False),
        (SeenCommit(9, THIS), Term(10, THIS), False),
        # Of this the answer itself says that it is of another past.
        (SeenCommit(9, THIS), Term(9, OTHER), False),
        (SeenCommit(9, THIS), Term(10, OTHER), True),
    ],
)
def test_r29_an_answer_of_a_later_term_leaves_open_whether_what_was_seen_is_there(
    seen: SeenCommit | None, term: Term | None, unasked: bool
) -> None:
    answer: Any = SimpleNamespace(term=term)
    assert is_unasked(seen, answer) is unasked


def test_r29_what_is_in_flight_is_in_doubt_once_and_what_was_in_doubt_before_stays() -> None:
    stored: list[ReplicaState] = []
    before = replace(STANDS, unsettled=[[1, 2, 5], [3, 4, 7]])
    flight = SimpleNamespace(ranges=[[3, 4]], after=[[8, 9]])
    writer: Any = SimpleNamespace(inflight=flight, sync_state=before, set_sync_state=stored.append)
    remember_doubt(writer)
    assert [each.unsettled for each in stored] == [[[1, 2, 5], [3, 4, 7], [8, 9, 7]]]
    # Again: nothing is new.
    [writer.sync_state] = stored
    remember_doubt(writer)
    assert len(stored) == 1
    writer.inflight = None
    remember_doubt(writer)
    assert len(stored) == 1

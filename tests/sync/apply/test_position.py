"""What a device remembers of where a server stands (R29)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from entidb.db.replica import ReplicaState
from entidb.sync.apply.position import see_image
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

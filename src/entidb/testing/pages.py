"""What a server answers to a pull, compared with the oracle: the page, and how old it is (ORDER,
FRESH).
"""

from __future__ import annotations

from typing import NamedTuple

from entidb.protocol import PullRequest, PullResponse, expanded
from entidb.testing.invariants import Checks
from entidb.testing.oracle import History, has_version


class Seen(NamedTuple):
    """What a server's database was at some time."""

    history: History
    head: int
    floor: int


def check_page(
    checks: Checks,
    history: History,
    request: PullRequest,
    response: PullResponse,
    granted: frozenset[str] | None,
) -> None:
    """A page is exactly what was next when the head was the one that it names."""
    checks.that(response.head <= history.head, "ORDER", "a page names another head")
    names = response.collections
    sent = {
        (commit.version, (names[op.collection], op.entity_id)): op.payload
        for commit in expanded(response).commits
        for op in commit.operations
    }
    last = min(response.cursor, response.head)
    due = {
        (version, ref): payload
        for version, ref, payload in history.changes_then(request.cursor, last, response.head)
        if (request.collections is None or ref[0] in request.collections)
        and (granted is None or ref[0] in granted)
        and not has_version(request.have, version)
    }
    for key in due.keys() ^ sent.keys() if due.keys() != sent.keys() else ():
        # A tombstone at or below the floor may be gone, and need not be.
        purged = key in due and due[key] is None and key[0] <= history.floor
        if not purged:
            what = "left out" if key in due else "added"
            checks.fail("ORDER", f"a page after {request.cursor} {what} {key}")
    wrong = [key for key, payload in sent.items() if due[key] != payload]
    checks.that(not wrong, "ORDER", f"a page holds other values than the server: {wrong}")
    ends = (
        response.cursor == response.head
        if not response.has_more
        else (request.cursor < response.cursor)
    )
    checks.that(ends, "ORDER", f"a page after {request.cursor} ends at {response.cursor}")


def check_fresh(checks: Checks, before: Seen, head: int, floor: int) -> None:
    """An answer of ``head`` and ``floor`` is no older than what there was ``before``."""
    checks.that(
        before.head <= head and before.floor <= floor,
        "FRESH",
        f"an answer is of head {head} and floor {floor}; {before.head} and {before.floor} were "
        "there when it was asked for",
    )


__all__ = ["Seen", "check_fresh", "check_page"]

"""Writes the protocol's conversations, ``tests/vectors/conversations.json``.

Each is a script of one device and its server: what a program does on the device, what the device
must send, what it is answered, and what it must hold afterwards. ``docs/protocol.md``, last
section, says how to read them; ``tests/protocol`` plays them with this project's own device.
Running it twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import cbor2

TARGET: Final = Path(__file__).parent.parent / "tests" / "vectors" / "conversations.json"

Json = dict[str, Any]

DB: Final = "household"
HISTORY: Final = {"hex": bytes(range(0xA0, 0xB0)).hex()}
NEW_HISTORY: Final = {"hex": bytes(range(0xB0, 0xC0)).hex()}
OTHER: Final = {"hex": "018f2f3e4a5b7c6d8e9fa0b1c2d3e4f5"}
TIME: Final = 1_764_000_000_000
STAMP: Final = TIME << 16
E1, E2, E3 = ({"hex": f"0193000000007000800000000000000{n}"} for n in "123")
LIMITS: Final = {
    "transaction_bytes_max": 16777216,
    "message_bytes_max": 67108864,
    "push_operations_max": 100000,
    "pull_operations_max": 100000,
    "collections_max": 4096,
}
#: The end of the range of all ids.
LAST: Final = {"hex": "ff" * 16}
DEVICE: Final = {"is": "device"}


def value(text: str) -> Json:
    """The payload of an entity ``{"text": text}``."""
    return {"hex": cbor2.dumps({"text": text}).hex()}


# --- what a program does on the device ----------------------------------------------------------


def commit(*writes: tuple[Any, ...]) -> Json:
    """One local transaction of (entity, payload or None[, collection])."""
    return {"do": "commit", "operations": [[*_named(write)] for write in writes]}


def _named(write: tuple[Any, ...]) -> tuple[str, Json, Json | None]:
    entity, payload, *name = write
    return (name[0] if name else "notes", entity, payload)


def sync(*exchanges: Json, ends: str = "synced") -> Json:
    return {"do": "sync", "exchanges": [*exchanges], "ends": ends}


RESTART: Final = {"do": "restart"}


def choose(keep: str) -> Json:
    return {"do": "choose", "keep": keep}


def widen(*names: str) -> Json:
    return {"do": "widen", "collections": [*names]}


def compare(*exchanges: Json, differs: list[list[Any]], repair: bool = False) -> Json:
    """A cycle, and after it a comparison by digests; ``differs`` are [collection, entity, how]."""
    return {"do": "compare", "repair": repair, "exchanges": [*exchanges], "differs": differs}


def holds(
    view: dict[str, dict[str, Json]] | list[tuple[Json, Json]],
    *,
    pending: list[list[tuple[Any, ...]]] | None = None,
    discarded: list[tuple[str, list[tuple[Any, ...]]]] | None = None,
) -> Json:
    """What the device must have now: every entity it shows, the outbox, the discarded list."""
    notes = {entity["hex"]: payload for entity, payload in view} if isinstance(view, list) else {}
    return {
        "do": "holds",
        "entities": view if isinstance(view, dict) else ({"notes": notes} if notes else {}),
        "pending": [[[*_named(write)] for write in one] for one in pending or []],
        "discarded": [
            {"code": code, "operations": [[*_named(write)] for write in writes]}
            for code, writes in discarded or []
        ],
    }


# --- what goes over the wire --------------------------------------------------------------------


def exchange(request: str, must: Json, answer: Json | None = None, **how: Any) -> Json:
    row: Json = {"request": request, "must": must}
    if answer is not None:
        row["answer"] = answer
    return row | how


def handshake(
    head: int, *, known: Json | None = HISTORY, now: Json = HISTORY, floor: int = 0
) -> Json:
    return exchange(
        "handshake",
        {"major": 1, "db_id": DB, "device_id": DEVICE, "history": known},
        {
            "major": 1,
            "minor": 0,
            "history": now,
            "head": head,
            "floor": floor,
            "limits": LIMITS,
            "features": [],
            "time": TIME,
        },
    )


def meeting(head: int, floor: int = 0) -> Json:
    return handshake(head, known=None, floor=floor)


def pull(
    cursor: int | Json,
    *commits: list[Any],
    head: int,
    reaches: int | None = None,
    floor: int = 0,
    history: Json = HISTORY,
    names: tuple[str, ...] = ("notes",),
    **must: Any,
) -> Json:
    """A pull after ``cursor``; the page ends at ``reaches``, or at the head."""
    end = head if reaches is None else reaches
    return exchange(
        "pull",
        {"db_id": DB, "device_id": DEVICE, "history": history, "cursor": cursor, **must},
        {
            "collections": [*names] if commits else [],
            "commits": [*commits],
            "cursor": end,
            "has_more": end != head,
            "head": head,
            "floor": floor,
            "time": TIME,
        },
    )


def changed(version: int, *writes: tuple[Json, Json | None], collection: int = 0) -> list[Any]:
    """A commit of another device."""
    return [version, OTHER, STAMP + version, [[collection, entity, p] for entity, p in writes]]


def sent(transaction: str, *operations: tuple[Json, int | Json, Json | None]) -> list[Any]:
    """A transaction as it must be sent. Its id and its time are the device's own, and have to be
    the same each time it is sent."""
    return [
        {"is": transaction},
        {"is": f"time of {transaction}"},
        [[0, entity, base, payload] for entity, base, payload in operations],
    ]


def again(transaction: list[Any]) -> list[Any]:
    """``transaction`` as it may be sent once more after nothing of it was decided: its time may be
    another one, which is that of the server if the device's clock is ahead (R27)."""
    identity, _, operations = transaction
    return [identity, {"is": f"later time of {identity['is']}"}, operations]


def push(
    cursor: int | Json, transactions: list[list[Any]], *results: list[Any], head: int = 0
) -> Json:
    row = _push(cursor, transactions)
    row["answer"] = {
        "results": [*results],
        "collections": ["notes"],
        "head": head or max((result[1] for result in results), default=0),
        "time": TIME,
    }
    return row


def _push(cursor: int | Json, transactions: list[list[Any]], history: Json = HISTORY) -> Json:
    return exchange(
        "push",
        {
            "db_id": DB,
            "device_id": DEVICE,
            "history": history,
            "cursor": cursor,
            "collections": ["notes"] if transactions else [],
            "transactions": transactions,
        },
    )


def digest(cursor: int, answer: Json, *, head: int, **must: Any) -> Json:
    known = {"db_id": DB, "device_id": DEVICE, "history": HISTORY, "cursor": cursor}
    return exchange("digest", known | must, answer | {"head": head})


def block(last: Json, *entities: tuple[Json, int, Json]) -> list[Any]:
    """The digest of these entities, in a range that ends at ``last``."""
    told = hashlib.sha256()
    for entity, version, payload in entities:
        value = bytes.fromhex(payload["hex"])
        told.update(bytes.fromhex(entity["hex"]) + version.to_bytes(8, "big"))
        told.update(len(value).to_bytes(4, "big") + value)
    return [last, len(entities), {"hex": told.hexdigest()[:32]}]


def taking_rounds(row: Json) -> Json:
    """A handshake with a server that takes a pull and a push in one request."""
    return row | {"answer": row["answer"] | {"features": ["sync"]}}


def beside(pulled: Json, pushed: Json) -> Json:
    """A round: both in one request, and the answers to both; a push without an answer was not
    decided."""
    return exchange(
        "sync",
        {"pull": pulled["must"], "push": pushed["must"]},
        {"pull": pulled["answer"], "push": pushed.get("answer")},
    )


def undecided(row: Json) -> Json:
    return {key: item for key, item in row.items() if key != "answer"}


def absent(cursor: int) -> Json:
    """The base version of an entity that the device never saw: 0, or any cursor up to its own at
    which it was not there."""
    return {"one of": [*range(cursor + 1)]}


def optional(row: Json) -> Json:
    """A device may send it, and need not."""
    return row | {"optional": True}


def lost(row: Json) -> Json:
    """The server may have acted on it; its answer never comes."""
    return {key: item for key, item in row.items() if key != "answer"} | {"lost": True}


def granted(row: Json, names: list[str] | None) -> Json:
    """``row`` with an answer that names what the token grants."""
    return row | {"answer": row["answer"] | {"granted": names}}


def naming(row: Json, subject: str) -> Json:
    """A handshake with the token of ``subject``."""
    return row | {"answer": row["answer"] | {"subject": subject}}


def under(row: Json, subject: str) -> Json:
    """A push that has to name the ``subject`` it goes under."""
    return row | {"must": row["must"] | {"subject": subject}}


def refused(row: Json, status: int, code: str | None = None, **more: Any) -> Json:
    """``code`` None: by something on the way that does not speak this protocol."""
    bare = {key: item for key, item in row.items() if key != "answer"} | {"status": status}
    if code is None:
        return bare
    body = {"code": code, "message": code, "retryable": False, "retry_after": None, "details": {}}
    return bare | {"answer": body | more}


def offering(row: Json, feature: str = "segments") -> Json:
    """A handshake with a server that may have images, or has another feature."""
    return row | {"answer": row["answer"] | {"features": [feature]}}


def of_term(row: Json, first: int, name: Json) -> Json:
    """An answer of a server whose newest commit is of this term."""
    return row | {"answer": row["answer"] | {"term": [first, name]}}


def saying(row: Json, version: int, term: Json) -> Json:
    """A request that says what the device has seen."""
    return row | {"must": row["must"] | {"seen": [version, term]}}


class Image:
    """The entities of a server as of ``head``, each alone in a segment of one of ``names``: (index,
    entity, version, payload)."""

    def __init__(self, head: int, names: list[str], *rows: tuple[int, Json, int, Json]) -> None:
        self.head, self.names = head, names
        self._entries: list[list[Any]] = []
        self._files: dict[str, Json] = {}
        for index, entity, version, payload in rows:
            data = _segment(names[index], entity, version, payload)
            name = hashlib.sha256(data).hexdigest()
            self._files[name] = {"hex": data.hex()}
            entry = [{"hex": name}, index, len(data), 1, entity, entity, "none"]
            self._entries.append(entry)

    def manifest(self, *, floor: int = 0, **must: Any) -> Json:
        """The device asks for the image, and is told of it."""
        answer = {
            "head": self.head,
            "floor": floor,
            "collections": self.names,
            "segments": self._entries,
            "entities": len(self._entries),
            "ends": TIME + 3_600_000,
        }
        return _snapshot(answer, **must)

    def segments(self, *others: Json | None) -> Json:
        """The device may ask for all of the segments, and gets them; ``others`` (None: the
        segment) is what it gets in their places."""
        answers = [*others, *[None] * (len(self._files) - len(others))]
        files = {
            name: file if answer is None else answer
            for (name, file), answer in zip(self._files.items(), answers, strict=True)
        }
        return {"request": "segments", "files": files}


def no_image(head: int) -> Json:
    none: Json = {"collections": [], "segments": [], "entities": 0, "ends": TIME}
    return _snapshot({"head": head, "floor": 0} | none)


def _snapshot(answer: Json, **must: Any) -> Json:
    named = {"db_id": DB, "device_id": DEVICE, "history": HISTORY}
    return exchange("snapshot", named | must, {"history": HISTORY, "time": TIME} | answer)


def no_file(status: int, code: str) -> Json:
    """What the device gets in the place of a segment."""
    return refused({}, status, code)


def _segment(name: str, entity: Json, version: int, payload: Json) -> bytes:
    row, held = bytes.fromhex(entity["hex"]), bytes.fromhex(payload["hex"])
    head = version.to_bytes(8, "big") + bytes.fromhex(OTHER["hex"]) + STAMP.to_bytes(8, "big")
    body = row + head + len(held).to_bytes(4, "big") + held
    says = {
        "collection": name,
        "rows": 1,
        "first": row,
        "last": row,
        "packing": "none",
        "size": len(body),
    }
    header = cbor2.dumps(says, canonical=True)
    return b"EntiDB-segment" + b"\0\1" + len(header).to_bytes(4, "big") + header + body


def accepted(version: int, stamp: int = 0) -> list[Any]:
    return [0, version, stamp, [], "", ""]


def stored_newer(version: int, *writes: tuple[Json, Json]) -> list[Any]:
    """Accepted, and stored in a newer shape."""
    states = [[0, entity, version, payload] for entity, payload in writes]
    return [0, version, 0, states, "", ""]


def superseded(version: int) -> list[Any]:
    return [1, version, 0, [], "", ""]


def conflict(*states: tuple[Json, int, Json | None]) -> list[Any]:
    return [2, 0, 0, [[0, entity, version, payload] for entity, version, payload in states], "", ""]


def rejected(code: str) -> list[Any]:
    return [3, 0, 0, [], code, f"refused with {code}"]


# --- the conversations --------------------------------------------------------------------------

A, B, C, D = (value(text) for text in ("a", "b", "c", "d"))
#: The device meets an empty server.
EMPTY: Final = (meeting(0), pull(0, head=0, full=True))
#: The device meets a server that has E1 with the value A, as version 1.
ONE: Final = (meeting(1), pull(0, changed(1, (E1, A)), head=1, full=True))

#: As ``EMPTY`` and ``ONE``, of a server that takes rounds.
EMPTY_ROUNDS: Final = (taking_rounds(EMPTY[0]), EMPTY[1])
ONE_ROUNDS: Final = (taking_rounds(ONE[0]), ONE[1])

_MADE: Final[list[Json]] = []


def _conversation(
    section: int, shows: str, policy: str = "server_wins", **device: Any
) -> Callable[[Callable[[], list[Json]]], Callable[[], list[Json]]]:
    """Keep what the function tells as a conversation; its name is that of the function."""

    def keep(tell: Callable[[], list[Json]]) -> Callable[[], list[Json]]:
        name = tell.__name__.replace("_", " ")
        setup = {"db_id": DB, "policy": policy, "collections": None, "tokens": []} | device
        row = {"name": name, "section": section, "shows": shows, "device": setup, "steps": tell()}
        _MADE.append(row)
        return tell

    return keep


@_conversation(5, "a first sync takes the server's history and its state")
def a_first_sync() -> list[Json]:
    return [
        sync(
            meeting(2),
            pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True),
        ),
        holds([(E1, A), (E2, B)]),
        sync(pull(2, head=2)),
    ]


@_conversation(5, "R10: a cycle with nothing to do is one pull, without a handshake")
def nothing_to_do() -> list[Json]:
    return [sync(*ONE), sync(pull(1, head=1)), sync(pull(1, head=1)), holds([(E1, A)])]


@_conversation(5, "R5: a batch whose answer was lost is sent again as it was, before anything else")
def a_lost_answer() -> list[Json]:
    batch = [sent("t1", (E1, 0, A))]
    return [
        commit((E1, A)),
        sync(*EMPTY, lost(push(0, batch, accepted(1))), ends="no_answer"),
        holds([(E1, A)], pending=[[(E1, A)]]),
        RESTART,
        sync(handshake(1), push(0, batch, accepted(1)), pull(0, head=1)),
        holds([(E1, A)]),
    ]


@_conversation(5, "R5, R8: what was committed after a lost answer waits, and is built on the first")
def a_change_after_a_lost_answer() -> list[Json]:
    batch = [sent("t1", (E1, 0, A))]
    return [
        commit((E1, A)),
        sync(*EMPTY, lost(push(0, batch, accepted(1))), ends="no_answer"),
        commit((E1, B)),
        holds([(E1, B)], pending=[[(E1, A)], [(E1, B)]]),
        sync(
            handshake(1),
            push(0, batch, accepted(1)),
            pull(0, head=1),
            push(1, [sent("t2", (E1, 1, B))], accepted(2)),
        ),
        holds([(E1, B)]),
    ]


@_conversation(
    6, "R21: what the device wrote itself need not come back, and does no harm if it does"
)
def the_own_version_comes_back() -> list[Json]:
    own = [1, DEVICE, {"is": "time of t1"}, [[0, E1, A]]]
    return [
        commit((E1, A)),
        sync(*EMPTY, push(0, [sent("t1", (E1, 0, A))], accepted(1))),
        sync(pull(0, own, changed(2, (E2, B)), head=2)),
        holds([(E1, A), (E2, B)]),
        sync(pull(2, head=2)),
    ]


@_conversation(6, "R21: named in `have`, the own version is left out by the server")
def the_own_version_is_left_out() -> list[Json]:
    return [
        commit((E1, A)),
        sync(*EMPTY, push(0, [sent("t1", (E1, 0, A))], accepted(1))),
        sync(pull(0, changed(2, (E2, B)), head=2, have={"at most": [[1, 1]]})),
        holds([(E1, A), (E2, B)]),
        commit((E1, C)),
        sync(pull(2, head=2), push(2, [sent("t2", (E1, 1, C))], accepted(3))),
    ]


@_conversation(6, "R20: several pages become visible together, or not at all")
def two_pages_and_the_second_is_lost() -> list[Json]:
    return [
        sync(*ONE),
        sync(
            pull(1, changed(2, (E1, B)), head=3, reaches=2),
            lost(pull(2, changed(3, (E2, C)), head=3)),
            ends="no_answer",
        ),
        holds([(E1, A)]),
    ]


@_conversation(6, "R20: pages are staged and applied in one step when the last is in")
def two_pages() -> list[Json]:
    return [
        sync(*ONE),
        sync(
            pull(1, changed(2, (E1, B)), head=4, reaches=2),
            pull(2, changed(3, (E2, C)), changed(4, (E1, None)), head=4),
        ),
        holds([(E2, C)]),
        sync(pull(4, head=4)),
    ]


@_conversation(6, "a tombstone keeps its version: what is written there again is built on it")
def written_again_after_a_deletion() -> list[Json]:
    return [
        sync(*ONE),
        sync(pull(1, changed(2, (E1, None)), head=2)),
        holds([]),
        commit((E1, C)),
        sync(pull(2, head=2), push(2, [sent("t1", (E1, 2, C))], accepted(3))),
        holds([(E1, C)]),
    ]


@_conversation(6, "R24: the same bytes on both sides are no conflict, and nothing is left to push")
def both_wrote_the_same() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B)),
        sync(pull(1, changed(2, (E1, B)), head=2)),
        holds([(E1, B)]),
    ]


@_conversation(6, "R24: deleted on both sides is no conflict")
def both_deleted() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, None)),
        sync(pull(1, changed(2, (E1, None)), head=2)),
        holds([]),
    ]


@_conversation(6, "R25: `server_wins` withdraws the whole transaction, with what was built on it")
def the_server_wins() -> list[Json]:
    first = [(E1, B), (E2, B)]
    return [
        sync(*ONE),
        commit(*first),
        commit((E2, C)),
        commit((E3, C)),
        sync(
            pull(1, changed(2, (E1, D)), head=2),
            push(2, [sent("t3", (E3, absent(2), C))], accepted(3)),
        ),
        holds([(E1, D), (E3, C)], discarded=[("conflict", first), ("depends", [(E2, C)])]),
    ]


@_conversation(6, "R25: `client_wins` pushes on the new base, with the same id", "client_wins")
def the_client_wins() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B)),
        sync(
            pull(1, changed(2, (E1, D)), head=2),
            push(2, [sent("t1", (E1, 2, B))], accepted(3)),
        ),
        holds([(E1, B)]),
    ]


@_conversation(7, "R7: after `conflict` the device pulls, rebases and pushes again", "client_wins")
def a_conflict_verdict() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B)),
        sync(
            pull(1, head=1),
            push(1, [sent("t1", (E1, 1, B))], conflict((E1, 2, D)), head=2),
            pull(1, changed(2, (E1, D)), head=2),
            push(2, [sent("t1", (E1, 2, B))], accepted(3)),
        ),
        holds([(E1, B)]),
    ]


@_conversation(5, "R6: a device that is up to date pulls and pushes in one exchange")
def a_round_with_nothing_new() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(beside(pull(1, head=2), push(1, [sent("t1", (E1, 1, B))], accepted(2)))),
        holds([(E1, B)]),
        sync(pull({"one of": [1, 2]}, head=2, have={"at most": [[2, 2]]})),
    ]


@_conversation(5, "a round brings what others have committed after its push, too")
def a_round_with_something_new_behind_it() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(
            beside(
                pull(1, changed(3, (E2, C)), head=3),
                push(1, [sent("t1", (E1, 1, B))], accepted(2), head=3),
            )
        ),
        holds([(E1, B), (E2, C)]),
        sync(pull(3, head=3)),
    ]


@_conversation(
    5, "R6: a device that is behind gets a page in the place of verdicts, and pushes again on it"
)
def a_round_behind_the_head() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(
            beside(
                pull(1, changed(2, (E2, C)), head=2),
                undecided(push(1, [sent("t1", (E1, 1, B))])),
            ),
            push(2, [again(sent("t1", (E1, 1, B)))], accepted(3)),
        ),
        holds([(E1, B), (E2, C)]),
    ]


@_conversation(
    5, "R6: what was not decided is rebased as after any pull, and pushed on the new version",
    "client_wins",
)  # fmt: skip
def a_round_behind_a_change_of_the_same() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(
            beside(
                pull(1, changed(2, (E1, D)), head=2),
                undecided(push(1, [sent("t1", (E1, 1, B))])),
            ),
            push(2, [again(sent("t1", (E1, 2, B)))], accepted(3)),
        ),
        holds([(E1, B)]),
    ]


@_conversation(5, "a round behind the head by more than a page goes on with pulls")
def a_round_answered_with_the_first_of_two_pages() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(
            beside(
                pull(1, changed(2, (E2, C)), head=3, reaches=2),
                undecided(push(1, [sent("t1", (E1, 1, B))])),
            ),
            pull(2, changed(3, (E3, D)), head=3),
            push(3, [again(sent("t1", (E1, 1, B)))], accepted(4)),
        ),
        holds([(E1, B), (E2, C), (E3, D)]),
    ]


@_conversation(5, "R21: what the device wrote itself is no news, also where its cursor is below it")
def a_round_above_what_it_wrote_itself() -> list[Json]:
    return [
        commit((E1, A)),
        sync(*EMPTY_ROUNDS, push(0, [sent("t1", (E1, 0, A))], accepted(1))),
        commit((E1, B)),
        sync(
            beside(
                pull({"one of": [0, 1]}, head=2, have={"at most": [[1, 1]]}),
                push({"one of": [0, 1]}, [sent("t2", (E1, 1, B))], accepted(2)),
            )
        ),
        holds([(E1, B)]),
        sync(pull({"one of": [0, 1, 2]}, head=2, have={"at most": [[1, 2]]})),
    ]


@_conversation(
    7, "R7: a round may end in a conflict; its page brings the other side", "client_wins"
)
def a_conflict_in_a_round() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(
            beside(
                pull(1, changed(2, (E1, D)), head=2),
                push(1, [sent("t1", (E1, 1, B))], conflict((E1, 2, D)), head=2),
            ),
            push(2, [again(sent("t1", (E1, 2, B)))], accepted(3)),
        ),
        holds([(E1, B)]),
    ]


@_conversation(7, "R15: what a round rejects is withdrawn, and the rest of its batch is accepted")
def a_rejection_in_a_round() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        commit((E2, C)),
        sync(
            beside(
                pull(1, head=2),
                push(
                    1,
                    [sent("t1", (E1, 1, B)), sent("t2", (E2, absent(1), C))],
                    rejected("closed"),
                    accepted(2),
                ),
            )
        ),
        holds([(E1, A), (E2, C)], discarded=[("closed", [(E1, B)])]),
    ]


@_conversation(
    5, "R5: a round whose answer was lost is pushed again by itself, before anything else"
)
def a_lost_answer_of_a_round() -> list[Json]:
    batch = [sent("t1", (E1, 1, B))]
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(lost(beside(pull(1, head=2), push(1, batch, accepted(2)))), ends="no_answer"),
        holds([(E1, B)], pending=[[(E1, B)]]),
        RESTART,
        sync(taking_rounds(handshake(2)), push(1, batch, accepted(2)), pull(1, head=2)),
        holds([(E1, B)]),
    ]


@_conversation(
    5, "R5: where something on the way refuses a round, a pull and a push go each by itself"
)
def a_refused_round() -> list[Json]:
    batch = [sent("t1", (E1, 1, B))]
    return [
        sync(*ONE_ROUNDS),
        commit((E1, B)),
        sync(
            refused(beside(pull(1, head=1), push(1, batch, accepted(2))), 413),
            pull(1, head=1),
            push(1, [*map(again, batch)], accepted(2)),
        ),
        holds([(E1, B)]),
    ]


@_conversation(8, "R14: a round behind the floor is refused, and the reset is a pull")
def a_round_behind_the_floor() -> list[Json]:
    return [
        sync(*ONE_ROUNDS),
        commit((E2, B)),
        sync(
            refused(
                beside(pull(1, head=3), push(1, [sent("t1", (E2, absent(1), B))], accepted(4))),
                409,
                "reset_required",
                details={"floor": 2},
            ),
            refused(pull(1, head=3), 409, "reset_required", details={"floor": 2}),
            pull(0, changed(3, (E3, C)), head=3, floor=2, full=True),
            push(3, [again(sent("t1", (E2, absent(3), B)))], accepted(4)),
        ),
        holds([(E2, B), (E3, C)]),
    ]


@_conversation(8, "R29: a round may be the first to hear of another history; nothing was decided")
def another_history_in_a_round() -> list[Json]:
    batch = [sent("t1", (E2, absent(1), B))]
    return [
        sync(*ONE_ROUNDS),
        commit((E2, B)),
        sync(
            refused(
                beside(pull(1, head=1), push(1, batch, accepted(2))),
                409,
                "history_changed",
                details={"history": NEW_HISTORY},
            ),
            ends="history_changed",
        ),
        holds([(E1, A), (E2, B)], pending=[[(E2, B)]]),
        choose("server"),
        sync(
            taking_rounds(handshake(1, known=None, now=NEW_HISTORY)),
            pull(0, changed(1, (E1, D)), head=1, full=True, history=NEW_HISTORY),
            _push(1, [*map(again, batch)], NEW_HISTORY)
            | {"answer": push(1, [], accepted(2))["answer"]},
        ),
        holds([(E1, D), (E2, B)]),
    ]


@_conversation(7, "R15: one bad transaction does not stop the others")
def one_of_three_is_rejected() -> list[Json]:
    return [
        sync(*EMPTY),
        commit((E1, A)),
        commit((E2, B)),
        commit((E3, C)),
        sync(
            pull(0, head=0),
            push(
                0,
                [sent("t1", (E1, 0, A)), sent("t2", (E2, 0, B)), sent("t3", (E3, 0, C))],
                accepted(1),
                rejected("too_sweet"),
                accepted(2),
            ),
        ),
        holds([(E1, A), (E3, C)], discarded=[("too_sweet", [(E2, B)])]),
    ]


@_conversation(7, "R18: what was built on a rejected transaction is withdrawn with it")
def a_rejected_transaction_and_its_dependent() -> list[Json]:
    return [
        sync(*EMPTY),
        commit((E1, A)),
        commit((E1, B), (E2, B)),
        sync(
            pull(0, head=0),
            push(
                0,
                [sent("t1", (E1, 0, A)), sent("t2", (E1, 0, B), (E2, 0, B))],
                rejected("too_sweet"),
                conflict((E1, 0, None)),
            ),
            optional(pull(0, head=0)),
        ),
        holds([], discarded=[("too_sweet", [(E1, A)]), ("depends", [(E1, B), (E2, B)])]),
    ]


@_conversation(7, "R18: `superseded` ends the transaction; what counts is what the pull brings")
def a_superseded_transaction() -> list[Json]:
    return [
        sync(*EMPTY),
        commit((E1, A)),
        sync(
            pull(0, head=0),
            push(0, [sent("t1", (E1, 0, A))], superseded(1)),
            pull(0, changed(1, (E1, D)), head=1),
        ),
        holds([(E1, D)]),
    ]


@_conversation(7, "R18: `accepted` at or below the cursor changes no base")
def accepted_below_the_cursor() -> list[Json]:
    return [
        sync(
            meeting(4),
            pull(0, changed(4, (E1, D)), head=4, full=True),
        ),
        commit((E1, B)),
        sync(pull(4, head=4), push(4, [sent("t1", (E1, 4, B))], accepted(3), head=4)),
        holds([(E1, D)]),
    ]


@_conversation(7, "R13: an entity that two transactions of a batch write is built on once")
def two_changes_of_one_entity() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B)),
        commit((E1, C)),
        sync(
            pull(1, head=1),
            push(1, [sent("t1", (E1, 1, B)), sent("t2", (E1, 1, C))], accepted(2), accepted(3)),
        ),
        holds([(E1, C)]),
        commit((E1, D)),
        sync(pull(1, head=3), push(3, [sent("t3", (E1, 3, D))], accepted(4))),
    ]


@_conversation(
    4,
    "401: a fresh token is asked for once, and the same request sent again",
    tokens=["stale", "fresh"],
)
def a_fresh_token() -> list[Json]:
    shaken = meeting(0)
    return [
        sync(
            refused(shaken, 401, "unauthorized") | {"token": "stale"},
            shaken | {"token": "fresh"},
            pull(0, head=0, full=True) | {"token": "fresh"},
        ),
    ]


@_conversation(4, "a server that is busy has decided nothing that the device could know: R5 holds")
def a_busy_server() -> list[Json]:
    batch = [sent("t1", (E1, 0, A))]
    return [
        commit((E1, A)),
        sync(
            *EMPTY,
            refused(push(0, batch), 503, "busy", retryable=True, retry_after=2.0),
            ends="busy",
        ),
        holds([(E1, A)], pending=[[(E1, A)]]),
        sync(push(0, batch, accepted(1)), pull(0, head=1)),
        holds([(E1, A)]),
    ]


@_conversation(
    5, "R5: a proxy with a limit for bodies: half as many at a time, until they get through"
)
def a_proxy_takes_less() -> list[Json]:
    one, other = sent("t1", (E1, 0, A)), sent("t2", (E2, 0, B))
    return [
        commit((E1, A)),
        commit((E2, B)),
        sync(
            *EMPTY,
            refused(_push(0, [one, other]), 413),
            push(0, [one], accepted(1)),
            push(0, [other], accepted(2)),
        ),
        holds([(E1, A), (E2, B)]),
    ]


@_conversation(5, "R5: one transaction that an older server takes for broken is withdrawn alone")
def an_older_server_refuses_a_payload() -> list[Json]:
    good, bad = sent("t1", (E1, 0, A)), sent("t2", (E2, 0, B))
    return [
        commit((E1, A)),
        commit((E2, B)),
        sync(
            *EMPTY,
            refused(_push(0, [good, bad]), 400, "codec_error"),
            push(0, [], head=0),
            push(0, [good], accepted(1)),
            refused(_push(0, [bad]), 400, "codec_error"),
        ),
        holds([(E1, A)], discarded=[("codec_error", [(E2, B)])]),
        sync(pull(0, head=1)),
    ]


@_conversation(5, "R5: what something on the way dislikes is kept, and stops nothing else")
def a_firewall_dislikes_one() -> list[Json]:
    good, bad = sent("t1", (E1, 0, A)), sent("t2", (E2, 0, B))
    return [
        commit((E1, A)),
        commit((E2, B)),
        sync(
            *EMPTY,
            refused(_push(0, [good, bad]), 403),
            push(0, [], head=0),
            push(0, [good], accepted(1)),
            refused(_push(0, [bad]), 403),
        ),
        holds([(E1, A), (E2, B)], pending=[[(E2, B)]]),
        sync(pull(0, changed(2, (E3, C)), head=2)),
        holds([(E1, A), (E2, B), (E3, C)], pending=[[(E2, B)]]),
    ]


@_conversation(5, "R5: an older server and a token that may only read")
def an_older_server_and_a_token_that_may_not_write() -> list[Json]:
    batch = [sent("t1", (E1, 0, A))]
    return [
        commit((E1, A)),
        sync(
            *EMPTY,
            refused(_push(0, batch), 403, "forbidden"),
            pull(0, head=0),
            refused(_push(0, batch), 403, "forbidden"),
            refused(_push(0, []), 403, "forbidden"),
        ),
        holds([], discarded=[("forbidden", [(E1, A)])]),
        sync(pull(0, changed(1, (E2, B)), head=1)),
        holds([(E2, B)], discarded=[("forbidden", [(E1, A)])]),
    ]


@_conversation(8, "R31: what is granted no more goes; what is pending there is withdrawn")
def a_narrower_grant() -> list[Json]:
    lists = {"lists": {E2["hex"]: B}}
    start = granted(
        pull(0, changed(1, (E1, A)), [2, OTHER, STAMP, [[1, E2, B]]], head=2, full=True), None
    )
    start["answer"]["collections"] = ["notes", "lists"]
    return [
        sync(granted(meeting(2), None), start),
        commit((E1, C)),
        holds({"notes": {E1["hex"]: C}, **lists}, pending=[[(E1, C)]]),
        sync(
            granted(pull(2, changed(3, (E3, D)), head=3, names=("lists",)), ["lists"]),
            granted(pull(2, changed(3, (E3, D)), head=3, names=("lists",)), ["lists"]),
        ),
        holds({"lists": {E2["hex"]: B, E3["hex"]: D}}, discarded=[("forbidden", [(E1, C)])]),
    ]


@_conversation(8, "R31: what is granted anew is pulled from nothing, because the cursor is past it")
def a_wider_grant() -> list[Json]:
    first = pull(0, [2, OTHER, STAMP, [[0, E2, B]]], head=2, full=True, names=("lists",))
    return [
        sync(granted(meeting(2), ["lists"]), granted(first, ["lists"])),
        holds({"lists": {E2["hex"]: B}}),
        sync(
            granted(pull(2, head=2), ["lists", "notes"]),
            granted(
                pull(0, changed(1, (E1, A)), head=2, full=True, collections=["notes"]),
                ["lists", "notes"],
            ),
            granted(pull(2, head=2), ["lists", "notes"]),
        ),
        holds({"notes": {E1["hex"]: A}, "lists": {E2["hex"]: B}}),
    ]


#: The device meets a server that has an image of E1 and E2.
IMAGE: Final = Image(2, ["notes"], (0, E1, 1, A), (0, E2, 2, B))
OFFERED: Final = (offering(meeting(4)), IMAGE.manifest())


@_conversation(8, "R35: a first sync takes an image, and pulls what changed since")
def an_image() -> list[Json]:
    since = (changed(3, (E3, C)), changed(4, (E2, None)))
    return [
        commit((E1, D)),
        sync(
            *OFFERED,
            IMAGE.segments(),
            pull(2, *since, head=4, full=True),
        ),
        holds([(E1, A), (E3, C)], discarded=[("conflict", [(E1, D)])]),
        sync(pull(4, head=4)),
    ]


@_conversation(8, "R35: where there is no image the device pulls")
def no_image_yet() -> list[Json]:
    return [
        sync(
            offering(meeting(1)),
            no_image(1),
            pull(0, changed(1, (E1, A)), head=1, full=True),
        ),
        holds([(E1, A)]),
    ]


@_conversation(8, "R35: of an image that is gone nothing counts, and everything is pulled")
def an_image_that_is_gone() -> list[Json]:
    everything = (changed(3, (E3, C)), changed(4, (E1, D)))
    return [
        sync(
            *OFFERED,
            IMAGE.segments(None, no_file(404, "not_found")),
            pull(0, *everything, head=4, full=True),
        ),
        holds([(E1, D), (E3, C)]),
    ]


@_conversation(8, "R35: a file with another hash than its name is not used")
def an_image_that_is_damaged() -> list[Json]:
    damaged = _segment("notes", E1, 1, D)
    return [
        sync(
            *OFFERED,
            IMAGE.segments({"hex": damaged.hex()}),
            pull(0, changed(2, (E2, B)), changed(4, (E1, A)), head=4, full=True),
        ),
        holds([(E1, A), (E2, B)]),
    ]


@_conversation(8, "R31, R35: what is granted no more comes in no segment, and does not stay")
def an_image_that_is_not_granted_any_more() -> list[Json]:
    image = Image(2, ["lists", "notes"], (0, E2, 2, B), (1, E1, 1, A))
    everything = pull(0, changed(2, (E2, B)), head=2, full=True, names=("lists",))
    return [
        sync(
            granted(offering(meeting(2)), None),
            granted(image.manifest(), None),
            image.segments(None, no_file(403, "forbidden")),
            granted(everything, ["lists"]),
            granted(everything, ["lists"]),
        ),
        holds({"lists": {E2["hex"]: B}}),
        sync(granted(pull(2, head=2), ["lists"])),
    ]


@_conversation(8, "R35: a device that was killed goes on with the image where it was")
def an_image_and_a_restart() -> list[Json]:
    return [
        sync(*OFFERED, IMAGE.segments(None, {"lost": True}), ends="no_answer"),
        holds([]),
        RESTART,
        sync(
            offering(handshake(4, known={"one of": [None, HISTORY]})),
            IMAGE.segments(),
            pull(2, changed(4, (E3, C)), head=4, full=True),
        ),
        holds([(E1, A), (E2, B), (E3, C)]),
    ]


@_conversation(8, "R28, R35: a reset by an image keeps what is pending; what is absent was deleted")
def an_image_behind_the_floor() -> list[Json]:
    image = Image(8, ["notes"], (0, E2, 7, D))
    return [
        sync(
            offering(meeting(2)),
            no_image(2),
            pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True),
        ),
        commit((E3, C)),
        sync(
            refused(pull(2, head=9), 409, "reset_required", details={"floor": 5}),
            image.manifest(floor=5),
            image.segments(),
            pull(8, head=9, floor=5, full=True),
            push(9, [sent("t1", (E3, absent(9), C))], accepted(10)),
        ),
        holds([(E2, D), (E3, C)]),
    ]


@_conversation(4, "the login page of a network is no answer of the server")
def a_captive_portal() -> list[Json]:
    return [
        sync(*ONE),
        sync(
            refused(pull(1, head=1), 200) | {"type": "text/html"},
            ends="no_answer",
        ),
        sync(handshake(2), pull(1, changed(2, (E1, B)), head=2)),
        holds([(E1, B)]),
    ]


@_conversation(8, "R28: below the floor everything is pulled again; what is absent was deleted")
def behind_the_floor() -> list[Json]:
    return [
        sync(
            meeting(2),
            pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True),
        ),
        commit((E3, C)),
        sync(
            refused(pull(2, head=9), 409, "reset_required", details={"floor": 5}),
            pull(0, changed(9, (E2, D)), head=9, floor=5, full=True),
            push(9, [sent("t1", (E3, absent(9), C))], accepted(10)),
        ),
        holds([(E2, D), (E3, C)]),
    ]


@_conversation(
    8,
    "R28: pending changes of an entity that is gone are a conflict with a deletion",
    "client_wins",
)
def pending_behind_the_floor() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B)),
        sync(
            refused(pull(1, head=9), 409, "reset_required", details={"floor": 5}),
            pull(0, changed(9, (E2, D)), head=9, floor=5, full=True),
            push(9, [sent("t1", (E1, 9, B))], accepted(10)),
        ),
        holds([(E1, B), (E2, D)]),
    ]


@_conversation(8, "R28: a floor that moves while everything is pulled starts the full pull over")
def the_floor_moves() -> list[Json]:
    return [
        sync(
            meeting(4, floor=1),
            pull(0, changed(2, (E1, A)), head=4, reaches=2, floor=1, full=True),
            pull(2, changed(4, (E2, B)), head=4, floor=3, full=True),
            pull(0, changed(4, (E2, B)), head=4, floor=3, full=True),
        ),
        holds([(E2, B)]),
    ]


@_conversation(8, "R29: another history changes nothing until somebody has chosen; the server's")
def another_history_keep_server() -> list[Json]:
    return [
        sync(
            meeting(2),
            pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True),
        ),
        commit((E3, C)),
        sync(
            refused(pull(2, head=2), 409, "history_changed", details={"history": NEW_HISTORY}),
            ends="history_changed",
        ),
        holds([(E1, A), (E2, B), (E3, C)], pending=[[(E3, C)]]),
        choose("server"),
        sync(
            handshake(1, known=None, now=NEW_HISTORY),
            pull(0, changed(1, (E1, D)), head=1, full=True, history=NEW_HISTORY),
            _push(1, [sent("t1", (E3, absent(1), C))], NEW_HISTORY)
            | {"answer": push(1, [], accepted(2))["answer"]},
        ),
        holds([(E1, D), (E3, C)]),
    ]


@_conversation(
    8, "R31: a wider scope is pulled from nothing before the device goes on", collections=["notes"]
)
def a_wider_scope() -> list[Json]:
    both = {"set": ["lists", "notes"]}
    return [
        sync(
            meeting(2),
            pull(0, changed(1, (E1, A)), head=2, full=True, collections=["notes"]),
        ),
        widen("lists", "notes"),
        sync(
            handshake(2),
            pull(
                0, changed(2, (E2, B)), head=2, names=("lists",), full=True, collections=["lists"]
            ),
            pull(2, head=2, collections=both),
        ),
        holds({"notes": {E1["hex"]: A}, "lists": {E2["hex"]: B}}),
    ]


@_conversation(9, "R27: the server's clamped time is taken over for what was written")
def a_clock_ahead() -> list[Json]:
    return [
        sync(*EMPTY),
        commit((E1, A)),
        sync(pull(0, head=0), push(0, [sent("t1", (E1, 0, A))], accepted(1, STAMP))),
        holds([(E1, A)]),
        sync(pull(0, head=1)),
    ]


@_conversation(10, "R33: a program that is too old to pull pushes what is pending")
def too_old_to_pull() -> list[Json]:
    return [
        sync(*ONE),
        commit((E2, B)),
        commit((E1, C)),
        sync(
            refused(pull(1, head=9), 409, "upgrade_required"),
            push(
                1,
                [sent("t1", (E2, absent(1), B)), sent("t2", (E1, 1, C))],
                accepted(10),
                conflict((E1, 9, D)),
                head=10,
            ),
            ends="upgrade_required",
        ),
        holds([(E1, C), (E2, B)], pending=[[(E1, C)]]),
        RESTART,
        sync(
            handshake(10),
            pull(1, changed(9, (E1, D)), head=10, have={"at most": [[10, 10]]}),
        ),
        holds([(E1, D), (E2, B)], discarded=[("conflict", [(E1, C)])]),
    ]


@_conversation(10, "R33: what the server stores in a newer shape is what the device has written")
def stored_in_a_newer_shape() -> list[Json]:
    batch = [sent("t1", (E1, 1, B))]
    return [
        sync(*ONE),
        commit((E1, B)),
        sync(pull(1, head=1), lost(push(1, batch)), ends="no_answer"),
        RESTART,
        sync(
            handshake(2),
            push(1, batch, stored_newer(2, (E1, C))),
            pull(1, head=2, have={"at most": [[2, 2]]}),
        ),
        holds([(E1, C)]),
        commit((E1, D)),
        sync(
            pull({"one of": [1, 2]}, head=2, have={"at most": [[2, 2]]}),
            push({"one of": [1, 2]}, [sent("t2", (E1, 2, D))], accepted(3)),
        ),
        holds([(E1, D)]),
    ]


@_conversation(5, "R36: what one subject committed is not sent under another, and waits")
def two_people_at_one_device() -> list[Json]:
    return [
        sync(naming(meeting(0), "ann"), pull(0, head=0)),
        commit((E1, A)),
        RESTART,
        sync(naming(handshake(0), "ben"), pull(0, head=0)),
        holds([(E1, A)], pending=[[(E1, A)]]),
        commit((E2, B)),
        commit((E1, C)),
        sync(pull(0, head=0), under(push(0, [sent("t2", (E2, 0, B))], accepted(1)), "ben")),
        holds([(E1, C), (E2, B)], pending=[[(E1, A)], [(E1, C)]]),
        RESTART,
        sync(
            naming(handshake(1), "ann"),
            pull({"one of": [0, 1]}, head=1, have={"at most": [[1, 1]]}),
            under(push({"one of": [0, 1]}, [sent("t1", (E1, absent(1), A))], accepted(2)), "ann"),
        ),
        holds([(E1, C), (E2, B)], pending=[[(E1, C)]]),
    ]


@_conversation(5, "R36: what got no answer is not sent again under another subject")
def another_person_after_a_lost_answer() -> list[Json]:
    batch = [sent("t1", (E1, 0, A))]
    own = [1, DEVICE, {"is": "time of t1"}, [[0, E1, A]]]
    return [
        sync(naming(meeting(0), "ann"), pull(0, head=0)),
        commit((E1, A)),
        sync(pull(0, head=0), lost(under(push(0, batch), "ann")), ends="no_answer"),
        RESTART,
        sync(naming(handshake(1), "ben"), pull(0, own, head=1)),
        holds([(E1, A)]),
    ]


@_conversation(8, "R34: what differs is found by digests and put right, entity by entity")
def what_differs_is_put_right() -> list[Json]:
    there = ((E1, 1, A), (E2, 2, C), (E3, 1, D))
    # The device was given the value B for E2, and nothing of E3.
    seen = pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True)
    states = [[E2, 2, OTHER, STAMP + 2, C], [E3, 1, OTHER, STAMP + 1, D]]
    return [
        sync(offering(meeting(2), "digest"), seen),
        compare(
            pull(2, head=2),
            digest(2, {"collections": ["notes"]}, head=2),
            digest(2, {"blocks": [block(LAST, *there)]}, head=2, collection="notes"),
            digest(
                2,
                {"blocks": [*(block(one[0], one) for one in there), block(LAST)]},
                head=2,
                collection="notes",
                block=1,
            ),
            digest(2, {"states": states}, head=2, collection="notes", ids=[E2, E3]),
            differs=[["notes", E2, "other"], ["notes", E3, "missing"]],
            repair=True,
        ),
        holds([(E1, A), (E2, C), (E3, D)]),
        sync(pull(2, head=2)),
    ]


@_conversation(8, "R34: what was written since the cursor counts in no digest, on neither side")
def written_since_and_not_compared() -> list[Json]:
    return [
        sync(offering(meeting(1), "digest"), pull(0, changed(1, (E1, A), (E2, B)), head=1)),
        compare(
            pull(1, head=1),
            digest(1, {"collections": ["notes"]}, head=2),
            digest(
                1, {"blocks": [block(LAST, (E1, 1, A))], "newer": [E2]}, head=2, collection="notes"
            ),
            differs=[],
        ),
        holds([(E1, A), (E2, B)]),
        sync(pull(1, changed(2, (E2, C)), head=2)),
        holds([(E1, A), (E2, C)]),
    ]


@_conversation(6, "R24: what ends alike is done only where nothing else was written on the way")
def the_same_at_the_end_of_two() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B), (E2, B)),
        commit((E1, None), (E3, C)),
        sync(pull(1, changed(2, (E1, None)), head=2)),
        holds(
            [],
            discarded=[
                ("conflict", [(E1, B), (E2, B)]),
                ("conflict", [(E1, None), (E3, C)]),
            ],
        ),
    ]


@_conversation(6, "R24: of one entity alone, what ends alike is done")
def the_same_at_the_end_of_two_that_wrote_nothing_else() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B)),
        commit((E1, D)),
        sync(pull(1, changed(2, (E1, D)), head=2)),
        holds([(E1, D)]),
    ]


@_conversation(6, "R24: where the first is done, the others are built on it, without a conflict")
def the_first_of_two_is_done() -> list[Json]:
    return [
        sync(*ONE),
        commit((E1, B)),
        commit((E1, C)),
        sync(
            pull(1, changed(2, (E1, B)), head=2),
            push(2, [sent("t2", (E1, 2, C))], accepted(3)),
        ),
        holds([(E1, C)]),
    ]


@_conversation(6, "R20: an entity on two pages counts as it is on the later one")
def one_entity_on_two_pages() -> list[Json]:
    return [
        sync(
            meeting(3),
            pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=4, reaches=2, full=True),
            pull(2, changed(3, (E2, None)), changed(4, (E1, D)), head=4, full=True),
        ),
        holds([(E1, D)]),
        commit((E2, C)),
        sync(pull(4, head=4), push(4, [sent("t1", (E2, {"one of": [3, 4]}, C))], accepted(5))),
        holds([(E1, D), (E2, C)]),
    ]


@_conversation(2, "of an answer with a payload that is not canonical nothing is applied")
def a_payload_that_is_not_canonical() -> list[Json]:
    longer = {"hex": "1801"}
    return [
        sync(*ONE),
        sync(
            pull(1, changed(2, (E2, B)), changed(3, (E3, longer)), head=3),
            ends="codec_error",
        ),
        holds([(E1, A)]),
        sync(optional(handshake(3)), pull(1, changed(2, (E2, B)), head=3)),
        holds([(E1, A), (E2, B)]),
    ]


@_conversation(7, "an answer that cannot be true settles nothing: the batch is sent again")
def an_answer_that_cannot_be_true() -> list[Json]:
    batch = [sent("t1", (E2, absent(1), B)), sent("t2", (E3, absent(1), C))]
    return [
        sync(*ONE),
        commit((E2, B)),
        commit((E3, C)),
        sync(
            pull(1, head=1),
            push(1, batch, accepted(2), accepted(2), head=2),
            ends="invalid_message",
        ),
        holds([(E1, A), (E2, B), (E3, C)], pending=[[(E2, B)], [(E3, C)]]),
        sync(
            optional(handshake(3)),
            push(1, batch, accepted(2), accepted(3)),
            pull(1, head=3),
        ),
        holds([(E1, A), (E2, B), (E3, C)]),
    ]


@_conversation(7, "R18: what depends on a rejected transaction by another one is withdrawn too")
def a_rejected_transaction_and_a_chain() -> list[Json]:
    return [
        sync(*EMPTY),
        commit((E1, A)),
        commit((E1, B), (E2, B)),
        commit((E2, C), (E3, C)),
        commit((E3, D)),
        sync(
            pull(0, head=0),
            push(
                0,
                [
                    sent("t1", (E1, 0, A)),
                    sent("t2", (E1, 0, B), (E2, 0, B)),
                    sent("t3", (E2, 0, C), (E3, 0, C)),
                    sent("t4", (E3, 0, D)),
                ],
                rejected("too_sweet"),
                conflict(),
                conflict(),
                conflict(),
            ),
            optional(pull(0, head=0)),
        ),
        holds(
            [],
            discarded=[
                ("too_sweet", [(E1, A)]),
                ("depends", [(E1, B), (E2, B)]),
                ("depends", [(E2, C), (E3, C)]),
                ("depends", [(E3, D)]),
            ],
        ),
    ]


@_conversation(
    7, "R18: what is superseded waits for an older one on its entity", policy="client_wins"
)
def superseded_behind_an_older_one() -> list[Json]:
    second = sent("t2", (E1, 1, C))
    return [
        sync(*ONE),
        commit((E1, B)),
        commit((E1, C)),
        sync(
            pull(1, head=1),
            push(1, [sent("t1", (E1, 1, B)), second], conflict((E1, 2, D)), superseded(2)),
            pull(1, changed(2, (E1, D)), head=2),
            push(
                2,
                [again(sent("t1", (E1, 2, B))), again(sent("t2", (E1, 2, C)))],
                accepted(3),
                superseded(2),
                head=3,
            ),
            pull(2, head=3),
        ),
        holds([(E1, B)]),
    ]


def _in_doubt(batch: list[list[Any]]) -> list[Json]:
    """A device whose new entity was sent, and whose answer never came."""
    return [
        sync(*ONE),
        commit((E2, B)),
        sync(pull(1, head=1), lost(push(1, batch, accepted(2))), ends="no_answer"),
        commit((E3, C)),
    ]


@_conversation(8, "R28: what was sent, deleted and forgotten since is not brought back")
def in_doubt_behind_the_floor() -> list[Json]:
    batch = [sent("t1", (E2, absent(1), B))]
    reset = refused(pull(1, head=9), 409, "reset_required", details={"floor": 5})
    return [
        *_in_doubt(batch),
        sync(
            handshake(9, floor=5),
            push(1, batch, conflict(), head=9),
            reset,
            pull(0, changed(1, (E1, A)), head=9, floor=5, full=True),
            push(9, [sent("t2", (E3, absent(9), C))], accepted(10)),
        ),
        holds([(E1, A), (E3, C)], discarded=[("conflict", [(E2, B)])]),
    ]


@_conversation(8, "R28: what was sent and is still remembered is accepted as it was")
def known_behind_the_floor() -> list[Json]:
    batch = [sent("t1", (E2, absent(1), B))]
    reset = refused(pull(1, head=9), 409, "reset_required", details={"floor": 5})
    return [
        *_in_doubt(batch),
        sync(
            handshake(9, floor=5),
            push(1, batch, accepted(2), head=9),
            reset,
            pull(0, changed(1, (E1, A)), head=9, floor=5, full=True),
            push(9, [sent("t2", (E3, absent(9), C))], accepted(10)),
        ),
        holds([(E1, A), (E3, C)]),
    ]


def _bases(*entities: Json) -> list[list[Any]]:
    return [[0, entity, absent(2), B] for entity in entities]


@_conversation(8, "R29: with its own side kept, a device commits again what is lost there")
def another_history_keep_device() -> list[Json]:
    """E1 is the same on both sides, E2 is gone there with what was committed with it, E3 is
    older there."""
    other = {"hex": E1["hex"][:-1] + "4"}
    new = {"history": NEW_HISTORY}
    return [
        sync(
            meeting(4),
            pull(
                0,
                changed(1, (E1, A)),
                changed(3, (E2, B), (other, B)),
                changed(4, (E3, C)),
                head=4,
                full=True,
            ),
        ),
        commit((E1, D)),
        sync(
            refused(pull(4, head=2), 409, "history_changed", details=new),
            ends="history_changed",
        ),
        choose("device"),
        sync(
            handshake(2, known=None, now=NEW_HISTORY),
            pull(
                0,
                changed(1, (E1, A)),
                changed(2, (E3, A)),
                head=2,
                full=True,
                history=NEW_HISTORY,
            ),
            _push(
                2,
                [
                    sent("t1", (E1, 1, D)),
                    [{"is": "t2"}, {"is": "time of t2"}, {"set": [*_bases(E2, other)]}],
                    sent("t3", (E3, 2, C)),
                ],
                NEW_HISTORY,
            )
            | {"answer": push(2, [], accepted(3), accepted(4), accepted(5))["answer"]},
        ),
        holds([(E1, D), (E2, B), (E3, C), (other, B)]),
    ]


TERM: Final[Json] = {"hex": "7e00000000000001"}
LATER_TERM: Final[Json] = {"hex": "7e00000000000002"}


@_conversation(
    8, "R29: the newest head that was named with a term is sent along, and may be disproved"
)
def seen_in_another_past() -> list[Json]:
    new = {"history": NEW_HISTORY}
    return [
        sync(
            meeting(2),
            of_term(pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True), 1, TERM),
        ),
        commit((E3, C)),
        sync(
            of_term(pull(2, head=2, seen=[2, TERM]), 1, TERM),
            saying(
                of_term(push(2, [sent("t1", (E3, absent(2), C))], accepted(3)), 1, TERM), 2, TERM
            ),
        ),
        # Others have gone on from older files: the head is beyond what was seen.
        sync(
            refused(pull(2, head=9, seen=[3, TERM]), 409, "history_changed", details=new),
            ends="history_changed",
        ),
        holds([(E1, A), (E2, B), (E3, C)]),
        choose("server"),
        sync(
            handshake(9, known=None, now=NEW_HISTORY),
            of_term(
                pull(0, changed(9, (E1, D)), head=9, full=True, history=NEW_HISTORY), 3, LATER_TERM
            ),
        ),
        holds([(E1, D)]),
    ]


@_conversation(8, "R29: an answer of a server that does not have what was seen is not taken")
def an_answer_of_another_past() -> list[Json]:
    return [
        sync(
            meeting(2),
            of_term(pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True), 1, TERM),
        ),
        # The server was opened again, and has gone on from what was seen.
        sync(of_term(pull(2, changed(3, (E1, B)), head=3, seen=[2, TERM]), 3, LATER_TERM)),
        sync(
            of_term(pull(3, changed(4, (E2, D)), head=4, seen=[3, LATER_TERM]), 2, TERM),
            ends="history_changed",
        ),
        holds([(E1, B), (E2, B)]),
    ]


@_conversation(8, "R29, R35: who asks for an image says what it has seen, which may be disproved")
def seen_before_an_image() -> list[Json]:
    new = {"history": NEW_HISTORY}
    image = Image(8, ["notes"], (0, E2, 7, D))
    return [
        sync(
            offering(meeting(2)),
            no_image(2),
            of_term(pull(0, changed(1, (E1, A)), changed(2, (E2, B)), head=2, full=True), 1, TERM),
        ),
        sync(
            refused(pull(2, head=9, seen=[2, TERM]), 409, "reset_required", details={"floor": 5}),
            refused(saying(image.manifest(floor=5), 2, TERM), 409, "history_changed", details=new),
            ends="history_changed",
        ),
        holds([(E1, A), (E2, B)]),
    ]


@_conversation(8, "R31: what is in flight is settled before a narrower grant withdraws anything")
def a_narrower_grant_after_a_lost_answer() -> list[Json]:
    batch = [sent("t1", (E1, 0, A))]
    return [
        sync(*EMPTY),
        commit((E1, A)),
        sync(pull(0, head=0), lost(push(0, batch, accepted(1))), ends="no_answer"),
        commit((E1, B)),
        sync(
            granted(handshake(1), ["lists"]),
            push(0, batch, accepted(1)),
            granted(pull(0, head=1), ["lists"]),
            optional(granted(pull(0, head=1), ["lists"])),
        ),
        holds([], discarded=[("forbidden", [(E1, B)])]),
    ]


def paged(begins: int, answered: Json, *, history: Json = HISTORY, **must: Any) -> Json:
    """A page comes with the news of it, on a stream that was opened just before; ``answered`` is
    a pull with the answer that the page is."""
    return {
        "do": "page",
        "must": {"db_id": DB, "device_id": DEVICE, "history": HISTORY, **must},
        "history": history,
        "begins": begins,
        "head": answered["answer"]["head"],
        "page": answered["answer"],
    }


def with_pages(row: Json) -> Json:
    return row | {"answer": row["answer"] | {"features": ["live", "pages", "sync"]}}


@_conversation(5, "Pages with news: a page from where the device stands is the pull")
def a_page_with_news() -> list[Json]:
    return [
        sync(with_pages(meeting(1)), pull(0, changed(1, (E1, A)), head=1)),
        paged(1, pull(1, changed(2, (E1, B)), head=2)),
        sync(),
        holds([(E1, B)]),
        sync(pull(2, head=2)),
    ]


@_conversation(5, "Pages with news: what waits is pushed after the page, which was the pull")
def a_push_after_a_page() -> list[Json]:
    return [
        sync(with_pages(meeting(1)), pull(0, changed(1, (E1, A)), head=1)),
        commit((E2, C)),
        paged(1, pull(1, changed(2, (E1, B)), head=2)),
        sync(beside(pull(2, head=3), push(2, [sent("t1", (E2, 1, C))], accepted(3)))),
        holds([(E1, B), (E2, C)]),
    ]


@_conversation(5, "Pages with news: a page from elsewhere is a hint, and a pull follows")
def a_page_from_elsewhere() -> list[Json]:
    return [
        sync(with_pages(meeting(1)), pull(0, changed(1, (E1, A)), head=1)),
        paged(2, pull(2, changed(3, (E1, C)), head=3)),
        sync(pull(1, changed(2, (E2, B)), changed(3, (E1, C)), head=3)),
        holds([(E1, C), (E2, B)]),
    ]


@_conversation(5, "Pages with news: a page of another history is a hint")
def a_page_of_another_history() -> list[Json]:
    return [
        sync(with_pages(meeting(1)), pull(0, changed(1, (E1, A)), head=1)),
        paged(1, pull(1, changed(2, (E1, C)), head=2), history=NEW_HISTORY),
        sync(pull(1, changed(2, (E1, B)), head=2)),
        holds([(E1, B)]),
    ]


@_conversation(5, "Pages with news: the first page of several is followed by a pull of the others")
def the_first_page_of_several() -> list[Json]:
    return [
        sync(with_pages(meeting(1)), pull(0, changed(1, (E1, A)), head=1)),
        paged(1, pull(1, changed(2, (E1, B)), head=3, reaches=2)),
        sync(pull(2, changed(3, (E2, C)), head=3)),
        holds([(E1, B), (E2, C)]),
    ]


@_conversation(5, "Pages with news: a page under another grant than the known one is a hint")
def a_page_under_another_grant() -> list[Json]:
    names = ["lists", "notes"]
    wider = granted(pull(1, changed(2, (E1, C)), head=2), [*names, "more"])
    return [
        sync(
            granted(with_pages(meeting(1)), names),
            granted(pull(0, changed(1, (E1, A)), head=1), names),
        ),
        paged(1, wider),
        sync(granted(pull(1, changed(2, (E1, B)), head=2), names)),
        holds([(E1, B)]),
    ]


def build() -> str:
    body = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in _MADE)
    return f'{{\n  "format": 1,\n  "conversations": [\n{body}\n  ]\n}}\n'


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(build(), encoding="utf-8")
    print(f"wrote {TARGET.name}: {len(_MADE)} conversations")

"""What the server decides: R11 to R17, message by message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import cbor
from entidb.db import purge_tombstones
from entidb.errors import (
    HistoryChangedError,
    PermissionDeniedError,
    ProtocolError,
    ResetRequiredError,
    StorageError,
    SyncError,
    VersionMismatchError,
)
from entidb.protocol import (
    LIMITS,
    PROTOCOL_MAJOR,
    HandshakeRequest,
    PullRequest,
    PushOperation,
    PushRequest,
    PushResponse,
    PushResult,
    PushTransaction,
    Verdict,
)
from entidb.server import service
from entidb.server.hooks import Grant, Refusal, Schema, ValidateContext, ValidateTransaction
from entidb.server.service import LET_GO_S, DatabaseService
from entidb.types import timestamp_from_ms
from tests.support import GRANT, START_MS, World, assert_sound, uid

ACCEPTED, SUPERSEDED = Verdict.ACCEPTED, Verdict.SUPERSEDED
CONFLICT, REJECTED = Verdict.CONFLICT, Verdict.REJECTED
DEVICE = b"d" * 16
NOW = timestamp_from_ms(START_MS)


def op(number: int, value: Any, base: int = 0, collection: int = 0) -> PushOperation:
    payload = None if value is None else cbor.encode(value)
    return PushOperation(collection, uid(number).bytes, base, payload)


def tx(name: int, *operations: PushOperation, timestamp: int = NOW) -> PushTransaction:
    return PushTransaction(uid(1000 + name).bytes, timestamp, list(operations))


def request(
    world: World, *transactions: PushTransaction, cursor: int = 0, **changes: Any
) -> PushRequest:
    assert world.server.history is not None
    made = PushRequest(
        db_id="shop",
        device_id=DEVICE,
        history=world.server.history,
        cursor=cursor,
        collections=["notes", "other"],
        transactions=list(transactions),
    )
    return replace(made, **changes)


def push(
    world: World, *transactions: PushTransaction, grant: Grant = GRANT, **changes: Any
) -> list[PushResult]:
    [answer] = world.service.push_many([(request(world, *transactions, **changes), grant)])
    assert isinstance(answer, PushResponse), answer
    assert answer.head == world.server.sequence
    assert_sound(world.server)
    return answer.results


def verdicts(results: Sequence[PushResult]) -> list[int]:
    return [result.verdict for result in results]


def pull(world: World, cursor: int = 0, *, grant: Grant = GRANT, **changes: Any) -> Any:
    assert world.server.history is not None
    made = PullRequest(
        db_id="shop",
        device_id=DEVICE,
        history=world.server.history,
        cursor=cursor,
        limit=1000,
        bytes_max=1 << 20,
    )
    return world.service.pull(replace(made, **changes), grant)


def pulled(response: Any) -> list[tuple[int, int]]:
    return [
        (commit.version, operation.entity_id[-1])
        for commit in response.commits
        for operation in commit.operations
    ]


# ---------------------------------------------------------------- handshake


def test_the_handshake_says_where_the_server_stands() -> None:
    world = World()
    world.put(("notes", 1, "x"))
    world.put(("notes", 1, None))
    purge_tombstones(world.server, 1)
    answer = world.service.handshake(
        HandshakeRequest(
            major=PROTOCOL_MAJOR, minor=9, db_id="shop", device_id=DEVICE, history=None, cursor=0
        )
    )
    assert (answer.head, answer.floor, answer.history) == (2, 1, world.server.history)
    assert (answer.limits, answer.time) == (LIMITS, START_MS)


def test_another_major_version_is_refused() -> None:
    with pytest.raises(VersionMismatchError):
        World().service.handshake(
            HandshakeRequest(
                major=2, minor=0, db_id="shop", device_id=DEVICE, history=None, cursor=0
            )
        )


# ---------------------------------------------------------------- R11, R12


def test_r11_programs_on_the_server_take_the_next_version_like_any_other() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    assert world.put(("notes", 2, "b")) == 2
    assert push(world, tx(2, op(3, "c")))[0].version == 3
    assert pulled(pull(world)) == [(1, 1), (2, 2), (3, 3)]


def test_r11_the_log_holds_each_entitys_latest_change_tombstones_included() -> None:
    world = World()
    push(world, tx(1, op(1, "a"), op(2, "a")), tx(2, op(1, "b")), tx(3, op(2, None)))
    assert pulled(pull(world)) == [(2, 1), (3, 2)]
    assert pull(world).commits[1].operations[0].payload is None


def test_r12_a_push_is_one_storage_commit_with_one_version_for_each_transaction() -> None:
    world = World()
    commits = world.server_storage.commits
    results = push(world, *[tx(n, op(n, "x"), op(50 + n, "x")) for n in range(1, 6)])
    assert [result.version for result in results] == [1, 2, 3, 4, 5]
    assert world.server_storage.commits == commits + 1


def test_r12_a_push_that_is_refused_altogether_makes_no_commit() -> None:
    world = World()
    world.put(("notes", 1, "x"))
    commits = world.server_storage.commits
    assert verdicts(push(world, tx(1, op(1, "y")), collections=["notes", "new"])) == [CONFLICT]
    assert world.server_storage.commits == commits
    assert world.server.collections() == ["notes"]


# ---------------------------------------------------------------- R13


@pytest.mark.parametrize(
    ("base", "verdict"), [(0, CONFLICT), (1, CONFLICT), (2, ACCEPTED), (3, ACCEPTED)]
)
def test_r13_a_version_above_the_base_is_a_conflict(base: int, verdict: Verdict) -> None:
    world = World()
    world.put(("notes", 1, "a"))
    world.put(("notes", 1, "b"))
    world.put(("notes", 2, "later"))
    assert verdicts(push(world, tx(1, op(1, "mine", base)))) == [verdict]
    assert world.values()[1] == ("mine" if verdict is ACCEPTED else "b")


def test_r13_a_base_beyond_the_head_is_another_history() -> None:
    world = World()
    world.put(("notes", 1, "a"))
    [answer] = world.service.push_many([(request(world, tx(1, op(1, "mine", 9))), GRANT)])
    assert isinstance(answer, HistoryChangedError)
    assert world.values() == {1: "a"}


def test_r13_a_tombstone_above_the_base_is_a_conflict_too() -> None:
    world = World()
    world.put(("notes", 1, "a"))
    world.put(("notes", 1, None))
    [result] = push(world, tx(1, op(1, "mine", 1)))
    assert result.verdict == CONFLICT
    [state] = result.states
    assert (state.version, state.payload) == (2, None)


def test_r13_who_wrote_it_and_when_does_not_matter() -> None:
    world = World()
    push(world, tx(1, op(1, "mine")))
    future = NOW + (10**9 << 16)
    assert verdicts(push(world, tx(2, op(1, "also mine"), timestamp=future))) == [CONFLICT]


def test_r13_a_version_of_an_earlier_transaction_of_the_batch_is_no_conflict() -> None:
    world = World()
    results = push(world, tx(1, op(1, "a")), tx(2, op(1, "b")), tx(3, op(1, None)))
    assert verdicts(results) == [ACCEPTED] * 3
    assert world.values() == {}


def test_r13_one_conflicting_operation_refuses_its_whole_transaction() -> None:
    world = World()
    world.put(("notes", 1, "theirs"))
    assert verdicts(push(world, tx(1, op(2, "x"), op(1, "x"), op(3, "x")))) == [CONFLICT]
    assert world.values() == {1: "theirs"}


def test_r13_what_was_built_on_a_refused_transaction_is_refused_with_it() -> None:
    world = World()
    world.put(("notes", 1, "theirs"))
    results = push(
        world,
        tx(1, op(1, "x"), op(2, "x")),
        tx(2, op(2, "y"), op(3, "y")),
        tx(3, op(3, "z")),
        tx(4, op(4, "free")),
    )
    assert verdicts(results) == [CONFLICT, CONFLICT, CONFLICT, ACCEPTED]
    assert world.values() == {1: "theirs", 4: "free"}


def test_r13_the_same_id_in_two_collections_is_two_entities() -> None:
    world = World()
    world.put(("notes", 1, "theirs"))
    assert verdicts(push(world, tx(1, op(1, "x", collection=1)))) == [ACCEPTED]
    assert (world.values(), world.values("other")) == ({1: "theirs"}, {1: "x"})


# ---------------------------------------------------------------- R14


def test_r14_a_batch_can_be_sent_any_number_of_times() -> None:
    world = World()
    batch = [tx(1, op(1, "a")), tx(2, op(1, "b"), op(2, "b")), tx(3, op(3, "c"))]
    first = push(world, *batch)
    commits = world.server_storage.commits
    for _ in range(3):
        assert push(world, *batch) == first
    assert world.server_storage.commits == commits
    assert world.server.sequence == 3


def test_r14_the_same_answer_comes_after_the_entity_has_moved_on() -> None:
    world = World()
    first = push(world, tx(1, op(1, "a")))
    world.put(("notes", 1, "later"))
    assert push(world, tx(1, op(1, "a"))) == first
    assert world.values() == {1: "later"}


def test_r14_the_same_id_with_other_content_is_superseded() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    for other in (op(1, "b"), op(2, "a"), op(1, None), op(1, "a", collection=1)):
        [result] = push(world, tx(1, other))
        assert (result.verdict, result.version) == (SUPERSEDED, 1)
    assert (world.values(), world.values("other")) == ({1: "a"}, {})


def test_r14_another_base_or_time_is_the_same_content() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    [result] = push(world, tx(1, op(1, "a", base=1), timestamp=NOW - 1))
    assert (result.verdict, result.version) == (ACCEPTED, 1)


def test_r14_ids_are_remembered_over_a_restart() -> None:
    world = World()
    first = push(world, tx(1, op(1, "a")))
    world.restart_server()
    assert push(world, tx(1, op(1, "a"))) == first


def test_r14_what_follows_a_known_transaction_in_the_batch_may_build_on_it() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    assert verdicts(push(world, tx(1, op(1, "a")), tx(2, op(1, "b")))) == [ACCEPTED, ACCEPTED]


def test_r14_what_follows_a_known_one_still_conflicts_with_what_came_between() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    world.put(("notes", 1, "between"))
    assert verdicts(push(world, tx(1, op(1, "a")), tx(2, op(1, "b")))) == [ACCEPTED, CONFLICT]
    assert world.values() == {1: "between"}


# ---------------------------------------------------------------- R15


def refuse_bad(context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
    if any(operation.value == "bad" for operation in transaction.operations):
        return Refusal("not_good", "try something good")
    if any(operation.value == "broken" for operation in transaction.operations):
        raise ZeroDivisionError
    return None


def test_r15_one_bad_transaction_stops_neither_those_before_nor_after() -> None:
    world = World(validate=refuse_bad)
    world.put(("notes", 9, "theirs"))
    results = push(
        world,
        tx(1, op(1, "good")),
        tx(2, op(2, "bad")),
        tx(3, op(9, "conflict")),
        tx(4, op(3, "broken")),
        tx(5, op(2, "built on the bad one")),
        tx(6, op(4, "good")),
    )
    assert verdicts(results) == [ACCEPTED, REJECTED, CONFLICT, REJECTED, CONFLICT, ACCEPTED]
    assert (results[1].code, results[1].message) == ("not_good", "try something good")
    assert results[3].code == "validate_failed"
    assert world.values() == {1: "good", 4: "good", 9: "theirs"}


def test_r15_a_rejected_id_is_not_remembered() -> None:
    world = World(validate=refuse_bad)
    push(world, tx(1, op(1, "bad")))
    assert verdicts(push(world, tx(1, op(1, "good")))) == [ACCEPTED]


def test_r15_the_hook_sees_who_sends_what_and_the_state_it_would_come_on() -> None:
    seen: list[Any] = []

    def hook(context: ValidateContext, transaction: ValidateTransaction) -> None:
        seen.append(
            (
                context.db_id,
                context.subject,
                context.get("notes", uid(1)),
                context.get("nothing", uid(1)),
                [(o.collection, o.entity_id, o.value) for o in transaction.operations],
                transaction.device_id,
            )
        )

    world = World(validate=hook)
    push(world, tx(1, op(1, "a")), tx(2, op(1, "b"), op(2, None, collection=1)))
    assert seen == [
        ("shop", "tester", None, None, [("notes", uid(1), "a")], DEVICE),
        ("shop", "tester", "a", None, [("notes", uid(1), "b"), ("other", uid(2), None)], DEVICE),
    ]


def test_r15_a_transaction_over_the_limit_is_rejected_alone() -> None:
    world = World(limits=replace(LIMITS, transaction_bytes_max=500))
    results = push(world, tx(1, op(1, "x" * 600)), tx(2, op(2, "fits")))
    assert verdicts(results) == [REJECTED, ACCEPTED]
    assert results[0].code == "too_large"


def test_r15_permissions_reject_what_they_do_not_cover() -> None:
    world = World()
    grant = Grant("someone", True, True, frozenset({"notes"}))
    results = push(
        world,
        tx(1, op(1, "a"), op(1, "a", collection=1)),
        tx(2, op(2, "a")),
        tx(3, op(1, "built on it")),
        grant=grant,
    )
    assert verdicts(results) == [REJECTED, ACCEPTED, CONFLICT]
    assert world.server.collections() == ["notes"]
    read_only = Grant("reader", True, False)
    [result] = push(world, tx(9, op(9, "x")), grant=read_only)
    assert (result.verdict, result.code) == (REJECTED, "forbidden")


@pytest.mark.parametrize("payload", [b"\xff", b"\x18\x01", b"\x01\x01", b"\xf6", b""])
def test_r15_a_payload_that_is_not_canonical_is_rejected_and_the_others_go_on(
    payload: bytes,
) -> None:
    world = World()
    bad = PushTransaction(uid(1).bytes, NOW, [PushOperation(0, uid(1).bytes, 0, payload)])
    good, refused = push(world, tx(2, op(2, "x")), bad)
    assert (good.verdict, refused.verdict, refused.code) == (ACCEPTED, REJECTED, "codec_error")
    assert world.values() == {2: "x"}


# ---------------------------------------------------------------- R16, R17


def test_r16_a_group_is_one_commit_and_each_member_sees_those_before_it() -> None:
    world = World()
    world.put(("notes", 1, "zeroth"))
    commits = world.server_storage.commits
    members = [
        (request(world, tx(1, op(1, "first", base=1))), GRANT),
        (request(world, tx(2, op(1, "second", base=1))), GRANT),
        (request(world, tx(3, op(2, "third"))), GRANT),
        (request(world, tx(1, op(1, "first", base=1))), GRANT),
    ]
    answers = world.service.push_many(members)
    results = [a.results[0] for a in answers if isinstance(a, PushResponse)]
    assert verdicts(results) == [ACCEPTED, CONFLICT, ACCEPTED, ACCEPTED]
    assert [result.version for result in results] == [2, 0, 3, 2]
    assert {a.head for a in answers if isinstance(a, PushResponse)} == {3}
    assert world.server_storage.commits == commits + 1
    assert_sound(world.server)


def test_r16_one_members_failure_touches_no_other() -> None:
    world = World()
    stranger = Grant("stranger", True, False)
    limited = Grant("limited", True, True, frozenset(["notes"]))
    bad = PushTransaction(uid(5).bytes, NOW, [PushOperation(0, uid(5).bytes, 0, b"\xff")])
    answers: list[PushResponse | SyncError] = world.service.push_many(
        [
            (request(world, tx(1, op(1, "a"))), GRANT),
            (request(world, tx(2, op(2, "b"))), stranger),
            (request(world, tx(3, op(3, "c")), history=bytes(16)), GRANT),
            (request(world, bad), GRANT),
            (request(world, tx(4, op(4, "d")), cursor=99), limited),
            (request(world, tx(5, op(5, "e"))), GRANT),
        ]
    )
    said = [
        [result.code for result in answer.results]
        if isinstance(answer, PushResponse)
        else answer.code
        for answer in answers
    ]
    assert said == [
        [""],
        ["forbidden"],
        "history_changed",
        ["codec_error"],
        "history_changed",
        [""],
    ]
    assert world.values() == {1: "a", 5: "e"}


def test_r16_a_push_that_is_too_much_work_touches_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_much(request: PushRequest) -> dict[bytes, tuple[str, str]]:
        if len(request.transactions) > 1:
            raise ProtocolError("too much together", code="too_large")
        return {}

    monkeypatch.setattr(service, "too_much", too_much)
    world = World()
    members = [
        (request(world, tx(1, op(1, "a")), tx(2, op(2, "b"))), GRANT),
        (request(world, tx(3, op(3, "c"))), GRANT),
    ]
    answers = world.service.push_many(members)
    assert [type(answer) for answer in answers] == [ProtocolError, PushResponse]
    assert world.values() == {3: "c"}


@pytest.mark.parametrize("schema", [0, 1])
def test_r15_what_is_too_much_work_is_refused_before_anybody_looks_at_it(
    monkeypatch: pytest.MonkeyPatch, schema: int
) -> None:
    looked: list[bytes] = []
    told: list[Any] = []

    def value_of(payload: bytes) -> tuple[Any, str | None]:
        looked.append(payload)
        return cbor.decode(payload), None

    def upcast(collection: str, value: Any, said: int) -> Any:
        told.append(value)
        return [value]

    fault = "codec_error", "too many lists"
    monkeypatch.setattr(service, "too_much", lambda request: {tx(1).transaction_id: fault})
    monkeypatch.setattr(service, "value_of", value_of)
    world = World()
    world.service = DatabaseService(
        world.server, db_id="shop", limits=LIMITS, schema=Schema(2, 1, upcast)
    )
    results = push(world, tx(1, op(1, "a")), tx(2, op(2, "b")), schema=schema)
    assert [result.code for result in results] == ["codec_error", ""]
    assert (looked, told) == ([cbor.encode("b")], ["b"] * schema)


def test_r17_a_storage_error_accepts_nothing_and_forgets_what_it_knew() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    world.server_storage.fail_next(error=StorageError("disk"))
    with pytest.raises(StorageError):
        world.service.push_many([(request(world, tx(2, op(1, "b", 1))), GRANT)])
    assert pull(world).head == 1
    [result] = push(world, tx(2, op(1, "b", 1)))
    assert (result.verdict, result.version) == (ACCEPTED, 2)


# ---------------------------------------------------------------- R19, R21, R31: pulling


def test_r19_a_page_ends_at_the_commit_before_the_limit_and_says_where() -> None:
    world = World()
    push(world, *[tx(n, *[op(n * 10 + m, "x") for m in range(3)]) for n in range(1, 5)])
    page = pull(world, limit=7)
    assert ([c.version for c in page.commits], page.cursor, page.has_more) == ([1, 2], 2, True)
    page = pull(world, 2, limit=7)
    assert ([c.version for c in page.commits], page.cursor, page.has_more) == ([3, 4], 4, False)


def test_r19_a_page_is_bounded_by_bytes_whatever_is_asked_for() -> None:
    world = World()
    for n in range(6):
        world.put(("notes", n, "x" * 1000))
    page = pull(world, bytes_max=2500)
    assert (len(page.commits), page.has_more, page.cursor) == (3, True, 3)
    assert len(pull(world, bytes_max=1).commits) == 1


def test_r21_versions_the_device_has_are_left_out_but_the_cursor_moves() -> None:
    world = World()
    for n in range(1, 7):
        world.put(("notes", n, "x"))
    page = pull(world, have=[(1, 2), (4, 4), (6, 6)])
    assert (pulled(page), page.cursor) == ([(3, 3), (5, 5)], 6)
    page = pull(world, have=[(1, 6)])
    assert (page.commits, page.cursor, page.has_more) == ([], 6, False)


def test_r31_a_scope_filters_what_is_sent_and_nothing_else() -> None:
    world = World()
    world.put(("notes", 1, "x"), ("other", 1, "x"))
    world.put(("other", 2, "x"))
    page = pull(world, collections=["notes", "unheard of"])
    assert (page.collections, pulled(page), page.cursor) == (["notes"], [(1, 1)], 2)
    page = pull(world, grant=Grant("someone", True, True, frozenset({"other"})))
    assert (page.collections, pulled(page)) == (["other"], [(1, 1), (2, 2)])


def test_a_page_of_filtered_rows_is_empty_and_goes_on() -> None:
    world = World()
    for n in range(6):
        world.put(("other", n, "x"))
    world.put(("notes", 1, "x"))
    page = pull(world, collections=["notes"], limit=4)
    assert (page.commits, page.cursor, page.has_more) == ([], 4, True)
    page = pull(world, 4, collections=["notes"], limit=4)
    assert (pulled(page), page.has_more) == ([(7, 1)], False)


def test_reading_needs_the_permission_to_read() -> None:
    with pytest.raises(PermissionDeniedError):
        pull(World(), grant=Grant("writer", False, True))


# ---------------------------------------------------------------- R27, R28, R29


def test_r27_a_timestamp_from_the_future_is_clamped_and_said_so() -> None:
    world = World()
    [result] = push(world, tx(1, op(1, "x"), timestamp=NOW + (10**6 << 16)))
    assert result.timestamp == NOW | 0xFFFF
    assert pull(world).commits[0].timestamp == result.timestamp
    [result] = push(world, tx(2, op(2, "x"), timestamp=NOW - 5))
    assert result.timestamp == 0
    assert pull(world).commits[1].timestamp == NOW - 5


def floored() -> World:
    world = World()
    push(world, tx(1, op(1, "a")), tx(2, op(1, None)), tx(3, op(3, "c")))
    purge_tombstones(world.server, 2)
    return world


def test_r28_a_pull_from_below_the_floor_has_to_reset() -> None:
    world = floored()
    for cursor in (0, 1):
        with pytest.raises(ResetRequiredError):
            pull(world, cursor)
    assert pulled(pull(world, 2)) == [(3, 3)]
    assert pulled(pull(world, 0, full=True)) == [(3, 3)]
    assert pull(world, 2).floor == 2


def test_r28_a_push_from_below_the_floor_conflicts_unless_known() -> None:
    world = floored()
    results = push(world, tx(3, op(3, "c")), tx(4, op(50, "new")), tx(1, op(1, "a")), cursor=1)
    assert verdicts(results) == [ACCEPTED, CONFLICT, CONFLICT]
    assert verdicts(push(world, tx(4, op(50, "new")), cursor=2)) == [ACCEPTED]
    assert world.values() == {3: "c", 50: "new"}


def test_r29_another_history_or_a_cursor_beyond_the_head_is_history_changed() -> None:
    world = World()
    world.put(("notes", 1, "x"))
    for changes in ({"history": bytes(16)}, {"cursor": 2}):
        with pytest.raises(HistoryChangedError):
            pull(world, **changes)
        [answer] = world.service.push_many(
            [(replace(request(world, tx(1, op(1, "x"))), **changes), GRANT)]
        )
        assert isinstance(answer, HistoryChangedError)
    assert world.server.sequence == 1


# ---------------------------------------------------------------- the idle pull


def idle_request(world: World) -> PullRequest:
    assert world.server.history is not None
    return PullRequest(
        db_id="shop",
        device_id=DEVICE,
        history=world.server.history,
        cursor=1,
        limit=10,
        bytes_max=1000,
    )


def test_the_idle_pull_answers_only_what_a_real_one_would() -> None:
    world = World()
    push(world, tx(1, op(1, "x")))
    idle = idle_request(world)
    known = world.service.idle_pull(idle, GRANT)
    assert known is not None, "the push has just learned where the head is"
    assert known == world.service.pull(idle, GRANT) == world.service.idle_pull(idle, GRANT)
    assert world.service.idle_pull(replace(idle, cursor=0), GRANT) is None
    assert world.service.idle_pull(replace(idle, full=True), GRANT) is None
    with pytest.raises(PermissionDeniedError):
        world.service.idle_pull(idle, Grant("nobody", False, False))
    with pytest.raises(HistoryChangedError):
        world.service.idle_pull(replace(idle, history=bytes(16)), GRANT)
    purge_tombstones(world.server, 1)
    assert world.service.idle_pull(idle, GRANT) is None
    assert world.service.pull(idle, GRANT).floor == 1
    world.put(("notes", 2, "by a program"))
    assert world.service.idle_pull(idle, GRANT) is None
    assert world.service.pull(idle, GRANT).head == 2
    idle = replace(idle, cursor=2)
    answer = world.service.idle_pull(idle, GRANT)
    assert answer is not None, "the pull has just learned where the head is"
    assert answer == world.service.pull(idle, GRANT)


def test_a_push_that_changed_nothing_does_not_answer_for_the_commit_after_it() -> None:
    world = World()
    push(world, tx(1, op(1, "x")))
    idle = idle_request(world)
    push(world, tx(1, op(1, "x")))  # known: nothing is stored
    assert world.service.idle_pull(idle, GRANT) is not None
    world.put(("notes", 2, "by a program"))
    assert world.service.idle_pull(idle, GRANT) is None


@pytest.mark.parametrize("lets_go", [False, True])
def test_the_interpreter_is_let_go_between_the_pushes_of_a_group_where_others_come(
    lets_go: bool, monkeypatch: pytest.MonkeyPatch
):
    world = World()
    rests: list[float] = []
    monkeypatch.setattr("entidb.server.service.time.sleep", rests.append)
    world.service.lets_go = lambda: lets_go
    members = [(request(world, tx(name, op(name, "x"))), GRANT) for name in range(4)]
    answers = world.service.push_many(members)
    assert [answer.results[0].verdict for answer in answers] == [ACCEPTED] * 4  # type: ignore[union-attr]
    assert rests == ([LET_GO_S] * 3 if lets_go else [])
    # Between two of them once.
    world.service.push_many([(request(world, tx(n, op(n, "x"))), GRANT) for n in (10, 11)])
    assert len(rests) == (4 if lets_go else 0)
    # One alone is not held up.
    assert push(world, tx(9, op(9, "x")))[0].verdict == ACCEPTED
    assert len(rests) == (4 if lets_go else 0)

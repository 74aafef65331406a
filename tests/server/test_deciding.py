"""Corners of what the server decides: limits, clocks, tokens, details (R13 to R15, R27)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import cbor
from entidb.db import Database, Role, maintenance, purge_tombstones
from entidb.db.maintenance import CLOCK_MARK_MS, sequence_at
from entidb.errors import HistoryChangedError, ResetRequiredError
from entidb.protocol import (
    LIMITS,
    PushOperation,
    PushResponse,
    PushTransaction,
    Verdict,
    transaction_bytes,
)
from entidb.server import ServerConfig
from entidb.server.decide import CONFLICT_STATES_MAX
from entidb.server.fullness import fullness_of
from entidb.server.hooks import Grant, Refusal, Schema, ValidateContext, ValidateTransaction
from entidb.server.service import DatabaseService
from entidb.storage import LmdbStorage
from entidb.types import TRANSACTION_COLLECTIONS_MAX, timestamp_from_ms
from tests.server.test_service import (
    ACCEPTED,
    CONFLICT,
    DEVICE,
    NOW,
    REJECTED,
    SUPERSEDED,
    op,
    pull,
    push,
    request,
    tx,
    verdicts,
)
from tests.support import GRANT, START_MS, World, assert_in_step, uid

NOTES_ONLY = Grant("someone", True, True, frozenset({"notes"}))
WRITE_ONLY = Grant("writer", False, True)


# ---------------------------------------------------------------- R13


def test_r13_what_builds_on_superseded_content_is_refused_with_it() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    results = push(
        world, tx(1, op(1, "other")), tx(2, op(1, "on top", base=1)), tx(3, op(2, "beside"))
    )
    assert verdicts(results) == [SUPERSEDED, CONFLICT, ACCEPTED]
    assert world.values() == {1: "a", 2: "beside"}


def test_r13_a_conflict_brings_the_servers_states_of_its_entities() -> None:
    world = World()
    version = world.put(("notes", 1, "theirs"))
    world.put(("notes", 3, "theirs"))
    gone = world.put(("notes", 3, None))
    [result] = push(world, tx(1, op(1, "a"), op(3, "a"), op(9, "a")))
    assert result.verdict == CONFLICT
    states = [(s.entity_id[-1], s.version, s.payload) for s in result.states]
    assert states == [(1, version, op(0, "theirs").payload), (3, gone, None), (9, 0, None)]


def test_r13_a_conflict_brings_a_bounded_number_of_states() -> None:
    world = World()
    numbers = range(1, CONFLICT_STATES_MAX + 5)
    world.put(*[("notes", number, "theirs") for number in numbers])
    [result] = push(world, tx(1, *[op(number, "mine") for number in numbers]))
    assert [state.entity_id[-1] for state in result.states] == list(numbers)[:CONFLICT_STATES_MAX]


def test_r13_a_token_that_only_writes_learns_nothing_of_what_others_wrote() -> None:
    world = World()
    world.put(("notes", 1, "secret"))
    [result] = push(world, tx(1, op(1, "mine")), grant=WRITE_ONLY)
    assert (result.verdict, result.states) == (CONFLICT, [])


# ---------------------------------------------------------------- R14


def test_r14_a_known_transaction_has_its_answer_although_the_token_covers_less_now() -> None:
    world = World()
    late = NOW + timestamp_from_ms(10_000)
    known = tx(1, op(1, "a", collection=1), op(1, "a"), timestamp=late)
    [first] = push(world, known)
    assert first.timestamp == NOW | 0xFFFF
    assert push(world, known, grant=NOTES_ONLY) == [first]


def test_r14_what_was_clamped_is_said_again_of_what_the_token_does_not_cover_any_more() -> None:
    world = World()
    known = tx(1, op(1, "a", collection=1), timestamp=NOW + timestamp_from_ms(10_000))
    [first] = push(world, known)
    assert first.timestamp == NOW | 0xFFFF
    assert push(world, known, grant=NOTES_ONLY) == [first]


def test_r14_a_known_id_with_a_write_to_a_collection_that_is_not_there_is_superseded() -> None:
    world = World()
    [first] = push(world, tx(1, op(1, "a")))
    [again] = push(world, tx(1, op(1, "a", collection=1)), grant=NOTES_ONLY)
    assert (again.verdict, again.version) == (SUPERSEDED, first.version)


@pytest.mark.parametrize(("schema", "verdict"), [(0, ACCEPTED), (1, SUPERSEDED)])
def test_r14_a_known_deletion_is_answered_although_its_tombstone_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, schema: int, verdict: Verdict
) -> None:
    # Ids are forgotten a few commits after tombstones; a push may come in between.
    monkeypatch.setattr(maintenance, "_forget_accepted", lambda database: None)
    world = World()
    newer = Schema(2, 1, lambda collection, value, said: [value])
    world.service = DatabaseService(world.server, db_id="shop", limits=LIMITS, schema=newer)
    push(world, tx(1, op(1, "a")), schema=schema)
    sent = tx(2, op(1, None, base=1), op(2, "b"))
    [first] = push(world, sent, schema=schema)
    assert push(world, sent, schema=schema) == [first]
    purge_tombstones(world.server, first.version)
    [again] = push(world, sent, schema=schema)
    # Of what was stored instead of the device's bytes (R33) nobody knows all any more.
    assert (again.verdict, again.version) == (verdict, first.version)


def test_r33_what_was_stored_instead_is_answered_until_something_replaces_a_part_of_it() -> None:
    world = World()
    newer = Schema(2, 1, lambda collection, value, said: [value])
    world.service = DatabaseService(world.server, db_id="shop", limits=LIMITS, schema=newer)
    sent = tx(1, op(1, "a"), op(2, "b"))
    [first] = push(world, sent, schema=1)
    assert [state.payload for state in first.states] == [op(0, [v]).payload for v in ("a", "b")]
    world.put(("notes", 3, "beside"))
    assert push(world, sent, schema=1) == [first]
    world.put(("notes", 2, "later"))
    [again] = push(world, sent, schema=1)
    assert (again.verdict, again.version, again.states) == (SUPERSEDED, first.version, [])


# ---------------------------------------------------------------- R15


def test_r15_a_transaction_of_exactly_the_limit_is_accepted() -> None:
    wide = op(1, "x" * 600)
    size = transaction_bytes([wide])
    for limit, verdict in ((size, ACCEPTED), (size - 1, REJECTED)):
        world = World(limits=replace(LIMITS, transaction_bytes_max=limit))
        assert verdicts(push(world, tx(1, wide))) == [verdict]
        # Beside others it is measured by itself.
        beside = tx(2, replace(wide, entity_id=uid(2).bytes)), tx(3, op(3, None))
        assert verdicts(push(world, *beside)) == [verdict, ACCEPTED]


def test_r15_many_small_operations_make_a_transaction_too_large_as_well() -> None:
    many = [op(n, None) for n in range(10)]
    for limit, verdict in (
        (transaction_bytes(many), ACCEPTED),
        (transaction_bytes(many) - 1, REJECTED),
    ):
        world = World(limits=replace(LIMITS, transaction_bytes_max=limit))
        assert verdicts(push(world, tx(1, *many))) == [verdict]


def test_r15_a_payload_that_is_not_canonical_is_named_as_such() -> None:
    world = World()
    bad = PushTransaction(uid(1).bytes, NOW, [PushOperation(0, uid(1).bytes, 0, b"\x18\x01")])
    [result] = push(world, bad)
    assert (result.verdict, result.code) == (REJECTED, "codec_error")
    assert "not canonical" in result.message and uid(1).bytes.hex() in result.message


@pytest.mark.parametrize("validate", [None, lambda context, transaction: None])
def test_r15_what_is_wrong_with_one_payload_is_the_verdict_on_its_transaction_alone(
    validate: Any,
) -> None:
    world = World(validate=validate)
    bad = PushTransaction(
        uid(9).bytes,
        NOW,
        [
            PushOperation(0, uid(8).bytes, 0, cbor.encode("sound")),
            PushOperation(0, uid(9).bytes, 0, b"\xf6"),
        ],
    )
    results = push(
        world,
        tx(1, op(1, "a")),
        bad,
        tx(2, op(2, "b")),
        tx(3, op(8, "built on the bad one")),
        tx(4, op(3, "c")),
    )
    assert verdicts(results) == [ACCEPTED, REJECTED, ACCEPTED, CONFLICT, ACCEPTED]
    assert (results[1].code, "null" in results[1].message) == ("codec_error", True)
    assert world.values() == {1: "a", 2: "b", 3: "c"}


def test_r15_a_token_that_may_not_write_gets_a_verdict_on_each_transaction() -> None:
    world = World()
    read_only = Grant("reader", True, False)
    commits = world.server_storage.commits
    results = push(world, tx(1, op(1, "a")), tx(2, op(2, "b")), grant=read_only)
    assert [(r.verdict, r.code) for r in results] == [(REJECTED, "forbidden")] * 2
    assert "may not write" in results[0].message
    assert world.server_storage.commits == commits


def test_r14_what_was_accepted_stays_accepted_when_the_token_may_not_write_any_more() -> None:
    world = World()
    [first] = push(world, tx(1, op(1, "a")))
    again, new = push(
        world, tx(1, op(1, "a")), tx(2, op(2, "b")), grant=Grant("reader", True, False)
    )
    assert (again.verdict, again.version) == (ACCEPTED, first.version)
    assert (new.verdict, new.code) == (REJECTED, "forbidden")


def test_r15_an_impossible_name_is_the_verdict_on_what_writes_there_alone() -> None:
    world = World()
    names = ["notes", "", "x" * 256, "a\nb"]
    results = push(
        world,
        *(tx(n + 1, op(n, "v", collection=n)) for n in range(4)),
        collections=names,
    )
    assert [r.code for r in results] == ["", "invalid_name", "invalid_name", "invalid_name"]
    assert world.server.collections() == ["notes"]


def test_r15_a_collection_the_token_does_not_cover_does_not_come_to_be() -> None:
    world = World()
    changes: dict[str, Any] = {"collections": ["other", "notes"]}
    results = push(
        world, tx(1, op(1, "a")), tx(2, op(1, "a", collection=1)), grant=NOTES_ONLY, **changes
    )
    assert verdicts(results) == [REJECTED, ACCEPTED]
    assert (results[0].code, "'other'" in results[0].message) == ("forbidden", True)
    assert world.server.collections() == ["notes"]


def test_r15_what_the_token_does_not_cover_is_refused_on_disk_as_in_memory(
    tmp_path: Path,
) -> None:
    world = World()
    with Database(
        LmdbStorage.open(tmp_path / "db"),
        role=Role.SERVER,
        clock=world.clock,
        entropy=random.Random(1).randbytes,
    ) as database:
        world.server = database
        world.service = DatabaseService(database, db_id="shop", limits=LIMITS)
        results = push(world, tx(1, op(1, "a", collection=1)), tx(2, op(1, "a")), grant=NOTES_ONLY)
    assert verdicts(results) == [REJECTED, ACCEPTED]


def test_r31_a_collection_that_is_local_on_the_server_is_refused() -> None:
    world = World()
    world.server.declare_local("other")
    results = push(world, tx(1, op(1, "a", collection=1)), tx(2, op(1, "a")))
    assert verdicts(results) == [REJECTED, ACCEPTED]
    assert (results[0].code, "'other'" in results[0].message) == ("forbidden", True)
    assert world.values("other") == {}


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, GeneratorExit])
def test_r15_a_hook_that_raises_is_logged_for_the_operator(
    caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    def validate(context: Any, transaction: Any) -> Any:
        raise kind("the hook's own trouble")

    world = World(validate=validate)
    [result] = push(world, tx(1, op(1, "a")))
    assert (result.verdict, result.code) == (REJECTED, "validate_failed")
    assert "trouble" not in result.message
    assert "the hook's own trouble" in caplog.text


def test_r3_a_transaction_writes_to_as_many_collections_as_it_may_and_no_more() -> None:
    names = [f"c{number}" for number in range(TRANSACTION_COLLECTIONS_MAX + 1)]
    every = [op(1, "a", collection=place) for place in range(len(names))]
    # A second write to a collection counts nothing.
    fits, too_many = tx(1, *every[:-1], op(2, "b")), tx(2, *every[1:], op(2, "c"), op(3, "c"))
    world = World()
    results = push(world, fits, too_many, tx(3, op(3, "built on it")), collections=names)
    assert verdicts(results) == [ACCEPTED, REJECTED, CONFLICT]
    assert results[1].code == "too_large"
    assert f"{len(names)} collections" in results[1].message
    assert f"may to {TRANSACTION_COLLECTIONS_MAX}" in results[1].message
    assert world.values("c0") == {1: "a", 2: "b"}


def test_r15_each_of_many_that_are_too_large_is_refused() -> None:
    small = op(1, "a")
    world = World(limits=replace(LIMITS, transaction_bytes_max=transaction_bytes([small]) - 1))
    results = push(world, *[tx(number, op(number, "a")) for number in range(1, 9)])
    assert [(r.verdict, r.code) for r in results] == [(REJECTED, "too_large")] * 8


def test_r33_what_is_stored_instead_is_what_is_counted_as_full() -> None:
    other = {"short": "x" * 900, "x" * 900: "short"}
    world = World()
    most = world.server.storage.info().used_bytes + 500
    config = ServerConfig(data_dir=None, insecure_no_auth=True, database_bytes_max=most)
    world.service = DatabaseService(
        world.server,
        db_id="shop",
        limits=LIMITS,
        schema=Schema(2, 1, lambda collection, value, said: other[value]),
        fullness=fullness_of(config, world.server, world.clock),
    )
    results = push(world, tx(1, op(1, "short")), tx(2, op(2, "x" * 900)), schema=1)
    assert [r.code for r in results] == ["over_quota", ""]
    assert world.values() == {2: "short"}


def test_what_a_push_adds_counts_for_the_next_before_it_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    measured = world.server.storage.info()
    monkeypatch.setattr(type(world.server.storage), "info", lambda self: measured)
    most = measured.used_bytes + 1000
    config = ServerConfig(data_dir=None, insecure_no_auth=True, database_bytes_max=most)
    fullness = fullness_of(config, world.server, world.clock)
    world.service = DatabaseService(world.server, db_id="shop", limits=LIMITS, fullness=fullness)
    codes = [push(world, tx(n, op(n, "x" * size)))[0].code for n, size in enumerate((600, 600, 90))]
    assert codes == ["", "over_quota", ""]


# ---------------------------------------------------------------- errors with details


def test_a_push_of_nothing_to_an_empty_database_is_answered() -> None:
    world = World()
    [answer] = world.service.push_many([(request(world), GRANT)])
    assert isinstance(answer, PushResponse)
    assert (answer.results, answer.head) == ([], 0)


def test_errors_name_the_floor_the_history_and_the_head() -> None:
    world = World()
    world.put(("notes", 1, "a"))
    world.put(("notes", 1, None))
    purge_tombstones(world.server, 2)
    with pytest.raises(ResetRequiredError) as below:
        pull(world, 1)
    assert below.value.details == {"floor": 2}
    with pytest.raises(HistoryChangedError) as beyond:
        pull(world, 3)
    assert beyond.value.details == {"head": 2, "history": world.server.history}
    with pytest.raises(HistoryChangedError) as other:
        pull(world, 2, history=DEVICE)
    assert other.value.details == {"history": world.server.history}


# ---------------------------------------------------------------- clocks and observers


def test_r27_the_servers_own_writes_are_later_than_what_was_pushed_before() -> None:
    world = World()
    push(world, tx(1, op(1, "a"), timestamp=NOW + 500))
    push(world, tx(2, op(2, "a"), timestamp=NOW - 500))
    world.put(("notes", 3, "a"))
    stamps = [event.timestamp for event in world.server.changes()]
    assert stamps == [NOW + 500, NOW - 500, NOW + 501]


def test_r28_a_push_tells_the_retention_clock_where_the_log_stands() -> None:
    world = World()
    push(world, tx(1, op(1, "a")))
    push(world, tx(2, op(2, "a")))
    assert sequence_at(world.server, START_MS) == 1


def test_r28_pushes_tell_it_once_in_a_while_and_again_where_the_clock_was_wrong() -> None:
    world = World()
    made: list[int] = []
    # The time of each push, and whether it leaves a mark.
    for number, (time, marks) in enumerate(
        [
            (0, True),
            (0, False),
            (CLOCK_MARK_MS - 1, False),
            (CLOCK_MARK_MS, True),
            (CLOCK_MARK_MS, False),
            (2 * CLOCK_MARK_MS - 1, False),
            (2 * CLOCK_MARK_MS, True),
            (2 * CLOCK_MARK_MS + 1, False),
            # Put right: the marks that are of a time to come go, or none would be made until then.
            (CLOCK_MARK_MS - 1, True),
            (CLOCK_MARK_MS, False),
        ]
    ):
        world.clock.ms = START_MS + time
        push(world, tx(number, op(number, "a")))
        made.append(sequence_at(world.server, world.clock.ms))
        expected = number + 1 if marks else made[-2]
        assert made[-1] == expected, (number, made)


def test_observers_on_the_server_are_told_of_a_push() -> None:
    world = World()
    told: list[Any] = []
    world.server.observe(lambda commit: told.extend(commit.events))
    push(world, tx(1, op(1, "a"), op(2, "a")), tx(2, op(1, None)))
    assert [(e.kind, e.entity_id) for e in told] == [("put", uid(2)), ("delete", uid(1))]


def test_r15_what_a_hook_says_is_cut_and_made_printable() -> None:
    hook = lambda context, transaction: Refusal("no\x1b[31m\n" + "x" * 500, "\x07" + "y" * 9000)  # noqa: E731
    world = World(validate=hook)
    (result,) = push(world, tx(1, op(1, "a")))
    assert result.code == "no[31m" + "x" * 56
    assert result.message == "y" * 999


def test_r15_a_refusal_without_a_code_reaches_the_device() -> None:
    def validate(context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
        bad = any(op.value == "bad" for op in transaction.operations)
        return Refusal("", "no") if bad else None

    world = World(validate=validate)
    a = world.device()
    a.put(("notes", 1, "bad"))
    a.put(("notes", 2, "good"))
    a.settle()
    assert a.values() == world.values() == {2: "good"}
    (gone,) = a.engine.discarded()
    assert (gone.code, gone.message) == ("rejected", "no")
    assert_in_step(world, a)

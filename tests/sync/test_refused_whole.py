"""A push that is refused as a whole: what ends the flight, what is sent again, what is withdrawn
and what is kept back (R5, R15)."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from entidb.errors import (
    AuthenticationError,
    PermissionDeniedError,
    ProtocolError,
    ServerBusyError,
    ServerError,
    SyncCodecError,
    SyncError,
    SyncTimeoutError,
    TransportError,
    error_from_code,
)
from entidb.protocol import PullRequest, PushRequest, SyncRequest, encode
from entidb.sync.refusal import TRY_AGAIN_CYCLES, KeptBack, Path, closed
from entidb.types import SEQUENCE_MAX
from tests.support import Crash, Device, World, assert_in_step, assert_sound, uid

Rule = Callable[[PushRequest], SyncError | None]


def gate(device: Device, rule: Rule) -> list[PushRequest]:
    """Let pushes through only if ``rule`` has no objection; returns those that were refused."""
    refused: list[PushRequest] = []

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            error = rule(request)
            if error is not None:
                refused.append(request)
                raise error

    device.wire.before = hook
    return refused


def open_gate(device: Device) -> None:
    device.wire.before = lambda request: None


def lose_connection(device: Device) -> None:
    """The next request does not arrive, so that a handshake comes before those after it."""

    def hook(request: SyncRequest) -> None:
        open_gate(device)
        raise TransportError("cut off")

    device.wire.before = hook
    with pytest.raises(TransportError):
        device.sync()


def on_the_way(kind: type[SyncError], code: str) -> SyncError:
    """What stands before the server has refused a request."""
    error = kind(f"a proxy answered {code}", code=code)
    error.refused_by = "path"
    return error


def body_limit(limit: int, measure: Callable[[bytes], int] = len) -> Rule:
    def rule(request: PushRequest) -> SyncError | None:
        too_large = measure(encode(request)) > limit
        return on_the_way(ProtocolError, "too_large") if too_large else None

    return rule


def cut_while_sent() -> SyncError:
    error = TransportError("cut while it was sent")
    error.refused_by = "path"
    return error


def packed_size(body: bytes) -> int:
    return len(zlib.compress(body, 1))


def holding(text: str, make: Callable[[], SyncError]) -> Rule:
    """Refuse what has ``text`` in one of its payloads."""

    def rule(request: PushRequest) -> SyncError | None:
        found = any(
            text.encode() in (op.payload or b"")
            for transaction in request.transactions
            for op in transaction.operations
        )
        return make() if found else None

    return rule


def everything(make: Callable[[], SyncError]) -> Rule:
    return lambda request: make()


def with_work(world: World, count: int = 30, size: int = 1000) -> Device:
    """A device with ``count`` pending transactions, and somebody else's change to pull."""
    a = world.device()
    world.put(("notes", 999, "before"))
    a.sync()
    for number in range(1, count + 1):
        a.put(("notes", number, f"{number:>{size}}"))
    world.put(("notes", 1000, "theirs"))
    return a


# ---------------------------------------------------------------- bodies that are too large


@pytest.mark.parametrize("limit", [1_300, 2_000, 3_000, 5_000, 9_000, 17_000, 30_000])
def test_r5_a_body_limit_on_the_way_is_found_by_halving_and_everything_arrives(limit: int) -> None:
    world = World()
    a = with_work(world)
    gate(a, body_limit(limit))
    result = a.sync()
    assert (result.pushed, result.kept_back, a.pending) == (30, [], 0)
    assert_in_step(world, a)


def test_r5_a_limit_that_counts_packed_bytes_is_found_as_well() -> None:
    world = World()
    a = with_work(world, size=10)
    for number in range(100, 130):
        noise = "".join(chr(33 + (number * 7919 + at * 104729) % 90) for at in range(900))
        a.put(("notes", number, noise))
    gate(a, body_limit(2_500, packed_size))
    a.sync()
    assert a.pending == 0
    assert_in_step(world, a)


def test_r5_what_was_found_of_the_way_counts_for_the_batches_after_it() -> None:
    world = World()
    a = with_work(world)
    refused = gate(a, body_limit(5_000))
    a.sync()
    assert 0 < len(refused) <= 5
    refused.clear()
    for number in range(100, 130):
        a.put(("notes", number, "x" * 1000))
    a.sync()
    assert (refused, a.pending) == ([], 0)


def test_r5_what_was_in_flight_before_the_limit_was_met_arrives_once() -> None:
    world = World()
    a = with_work(world)
    gate(a, everything(lambda: TransportError("cut off")))
    with pytest.raises(TransportError):
        a.sync()
    a.restart()
    assert len(a.engine.applier.inflight()) == 1
    gate(a, body_limit(5_000))
    a.sync()
    assert a.pending == 0
    assert_in_step(world, a)


@pytest.mark.parametrize(
    ("count", "code", "halves"),
    [(2, "too_large", True), (1, "too_large", False), (2, "rejected", False)],
)
def test_r5_only_a_batch_of_several_that_was_too_large_when_it_came_again_says_what_gets_through(
    count: int, code: str, halves: bool
) -> None:
    world = World()
    a = with_work(world, count=count)
    gate(a, everything(lambda: TransportError("cut off")))
    with pytest.raises(TransportError):
        a.sync()
    [flight] = a.engine.applier.inflight()
    known: list[int] = []

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            raise on_the_way(ProtocolError, code)
        if isinstance(request, PullRequest):
            known.append(a.engine._attempts.connection.path.bytes_max)
            open_gate(a)

    a.wire.before = hook
    a.sync()
    assert known == [flight.bytes // 2 if halves else SEQUENCE_MAX]
    assert a.pending == 0


def test_r5_what_had_arrived_before_it_was_refused_arrives_once() -> None:
    world = World()
    a = with_work(world)
    a.wire.after = lambda request: _lose_pushes(request)
    with pytest.raises(TransportError):
        a.sync()
    head = world.server.sequence
    a.restart()
    gate(a, body_limit(5_000))
    result = a.sync()
    assert (a.pending, result.withdrawn, world.server.sequence) == (0, [], head)
    assert_in_step(world, a)


def _lose_pushes(request: SyncRequest) -> None:
    if isinstance(request, PushRequest):
        raise TransportError("the answer was lost")


def test_r5_two_batches_in_flight_are_both_not_sent_when_the_first_is_refused() -> None:
    world = World()
    a = with_work(world)
    a.restart(push_operations_max=12)
    sizes: list[int] = []

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            sizes.append(len(a.engine.applier.inflight()))
            if len(encode(request)) > 5_000:
                raise on_the_way(ProtocolError, "too_large")

    a.wire.before = hook
    a.sync()
    assert (max(sizes), a.pending) == (2, 0)
    assert a.engine.applier.inflight() == []
    assert_in_step(world, a)


def test_r5_a_transaction_that_is_too_large_for_the_way_is_kept_back_with_what_is_built_on_it() -> (
    None
):
    world = World()
    a = with_work(world, count=5, size=10)
    large = a.put(("notes", 50, "x" * 9_000))
    a.put(("notes", 50, "built on it"), ("notes", 51, "with it"))
    a.put(("notes", 51, "and on that"))
    a.put(("notes", 60, "apart from it"))
    gate(a, body_limit(5_000))
    result = a.sync()
    assert [(kept.transaction_id, kept.code) for kept in result.kept_back] == [
        (large.bytes, "too_large")
    ]
    assert (result.withdrawn, a.pending) == ([], 3)
    assert a.values()[50] == "built on it" and a.values()[1000] == "theirs"
    assert set(world.values()) == {1, 2, 3, 4, 5, 60, 999, 1000}
    status = a.engine.status()
    assert (status.last_error_code, status.pending) == ("too_large", 3)
    assert "client_max_body_size" in (status.last_error or "")
    assert large.hex in (status.last_error or "")


def test_r5_waiting_for_what_is_kept_back_ends_and_says_why() -> None:
    a = with_work(World(), 3)
    a.put(("notes", 2, "x" * 20_000))
    large = a.db.sequence
    a.put(("notes", 2, "on top of it"))
    a.put(("notes", 4, "small"))
    gate(a, body_limit(8_000))
    a.engine.start()
    try:
        for sequence in (large, large + 1):
            fate = a.engine.accepted(sequence)
            assert (fate.state, fate.code) == ("pending", "too_large")
            assert fate.message == "a proxy answered too_large"
        assert a.engine.accepted(large + 2).accepted
        assert a.engine.synced() is False
    finally:
        a.engine.stop()


def test_r5_what_is_kept_back_stops_nothing_and_costs_one_attempt_a_connection() -> None:
    world = World()
    a = with_work(world, count=0)
    a.put(("notes", 50, "x" * 9_000))
    refused = gate(a, body_limit(5_000))
    a.sync()
    attempts = len(refused)
    for number in range(5):
        world.put(("notes", 1000, number))
        a.put(("notes", number, number))
        a.sync()
        assert a.values()[1000] == number
    assert (len(refused), a.pending) == (attempts, 1)


def test_r5_what_was_kept_back_goes_out_when_the_limit_was_raised() -> None:
    world = World()
    a = with_work(world, count=0)
    a.put(("notes", 50, "x" * 9_000))
    gate(a, body_limit(5_000))
    a.sync()
    open_gate(a)
    for _ in range(TRY_AGAIN_CYCLES):
        a.sync()
    assert (a.pending, a.engine.status().last_error) == (0, None)
    assert_in_step(world, a)


def test_r5_what_was_kept_back_goes_out_with_the_next_connection() -> None:
    world = World()
    a = with_work(world, count=0)
    a.put(("notes", 50, "x" * 9_000))
    gate(a, body_limit(5_000))
    a.sync()
    open_gate(a)
    lose_connection(a)
    result = a.sync()
    assert (result.pushed, a.pending, result.kept_back) == (1, 0, [])


def test_r5_what_the_server_itself_finds_too_large_is_withdrawn_alone() -> None:
    world = World()
    a = with_work(world)
    large = a.put(("notes", 50, "x" * 9_000))

    def rule(request: PushRequest) -> SyncError | None:
        large = len(encode(request)) > 5_000
        return error_from_code("too_large", "over 5000 bytes") if large else None

    gate(a, rule)
    result = a.sync()
    [gone] = a.engine.discarded()
    assert (gone.id, gone.code) == (large, "too_large")
    assert gone.values() == [("notes", uid(50), "x" * 9_000)]
    assert (result.pushed, a.pending) == (30, 0)
    assert_in_step(world, a)


# ---------------------------------------------------------------- rights


def older_server_forbids() -> SyncError:
    return error_from_code("forbidden", "the token does not allow writing to this database")


def test_r15_a_token_that_may_only_read_withdraws_and_goes_on_pulling() -> None:
    world = World()
    a = with_work(world, count=3, size=1)
    a.wire.grant = replace(a.wire.grant, write=False)
    result = a.sync()
    assert [gone.code for gone in a.engine.discarded()] == ["forbidden"] * 3
    assert (len(result.withdrawn), a.pending, a.values()) == (3, 0, world.values())
    a.wire.grant = replace(a.wire.grant, write=True)
    for gone in a.engine.discarded():
        a.engine.recommit(gone)
    a.sync()
    assert a.engine.discarded() == []
    assert_in_step(world, a)


def test_r5_an_older_server_that_forbids_the_whole_push_is_understood() -> None:
    world = World()
    a = with_work(world, count=3, size=1)
    refused = gate(a, everything(older_server_forbids))
    result = a.sync()
    assert [gone.code for gone in a.engine.discarded()] == ["forbidden"] * 3
    assert "does not allow writing" in a.engine.discarded()[0].message
    assert (len(result.withdrawn), a.pending, a.values()[1000]) == (3, 0, "theirs")
    # The batch, again after a pull, and one with nothing in it: it is about no transaction.
    assert [len(request.transactions) for request in refused] == [3, 3, 0]


def test_r5_a_token_for_another_database_withdraws_nothing() -> None:
    """It is forbidden to pull as well, and comes to light before anything is withdrawn."""
    world = World()
    a = with_work(world, count=3, size=1)
    pulls = iter([None])

    def hook(request: SyncRequest) -> None:
        if not isinstance(request, PullRequest) or next(pulls, "no more"):
            raise error_from_code("forbidden", "the token does not grant this database")

    a.wire.before = hook
    for _ in range(3):
        with pytest.raises(PermissionDeniedError):
            a.sync()
        assert (a.pending, a.engine.discarded()) == (3, [])
    open_gate(a)
    a.sync()
    assert_in_step(world, a)


def test_r5_one_round_a_cycle_is_enough_to_learn_that_nothing_may_be_written() -> None:
    world = World()
    a = world.device(rounds_max=1)
    a.put(("notes", 1, "mine"))
    gate(a, everything(older_server_forbids))
    assert a.sync().incomplete
    assert [gone.code for gone in a.sync().withdrawn] == ["forbidden"]
    assert a.pending == 0


def test_r5_a_right_that_came_back_before_it_was_needed_withdraws_nothing() -> None:
    world = World()
    a = with_work(world, count=3, size=1)
    gate(a, everything(lambda: TransportError("cut off")))
    with pytest.raises(TransportError):
        a.sync()
    a.restart()
    answers = iter([older_server_forbids()])
    gate(a, lambda request: next(answers, None))
    assert a.sync().withdrawn == []
    assert_in_step(world, a)


def test_r5_what_had_arrived_before_the_right_was_lost_is_not_withdrawn() -> None:
    world = World()
    a = with_work(world, count=3, size=1)
    a.wire.after = _lose_pushes
    with pytest.raises(TransportError):
        a.sync()
    a.restart()
    gate(a, everything(older_server_forbids))
    result = a.sync()
    assert (result.withdrawn, a.pending) == ([], 0)
    assert_in_step(world, a)


def test_r5_an_expired_token_touches_nothing() -> None:
    world = World()
    a = with_work(world, count=3, size=1)
    gate(a, everything(lambda: AuthenticationError("expired")))
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            a.sync()
        assert (len(a.engine.applier.inflight()), a.pending) == (1, 3)
    open_gate(a)
    a.sync()
    assert (a.pending, a.engine.discarded()) == (0, [])


# ---------------------------------------------------------------- one that can never be accepted


@pytest.mark.parametrize("code", ["codec_error", "invalid_message"])
@pytest.mark.parametrize("place", [1, 2, 17, 40])
def test_r5_what_an_older_server_finds_invalid_is_withdrawn_alone(code: str, place: int) -> None:
    world = World()
    a = with_work(world, count=0)
    for number in range(1, 41):
        a.put(("notes", number, "poison" if number == place else "fine"))
    a.put(("notes", place, "built on it"), ("notes", 50, "with it"))
    refused = gate(a, holding("poison", lambda: error_from_code(code, "entity 7 is wrong")))
    result = a.sync()
    assert [gone.code for gone in a.engine.discarded()] == [code, "depends"]
    assert a.engine.discarded()[0].message == "entity 7 is wrong"
    assert (result.pushed, a.pending) == (39, 0)
    assert len(refused) <= 8
    assert_in_step(world, a)


def test_r5_many_that_are_invalid_are_found_in_few_requests() -> None:
    world = World()
    a = with_work(world, count=0)
    for number in range(1, 65):
        a.put(("notes", number, "poison" if 20 <= number < 40 else "fine"))
    gate(a, holding("poison", lambda: error_from_code("codec_error", "no")))
    before = len(a.wire.requests)
    a.sync()
    assert (len(a.engine.discarded()), a.pending) == (20, 0)
    assert len(a.wire.requests) - before < 80
    assert_in_step(world, a)


def test_r5_a_payload_that_a_firewall_dislikes_is_kept_back_alone() -> None:
    world = World()
    a = with_work(world)
    bad = a.put(("notes", 50, "<script>"))
    gate(a, holding("<script>", lambda: on_the_way(PermissionDeniedError, "forbidden")))
    result = a.sync()
    assert [kept.transaction_id for kept in result.kept_back] == [bad.bytes]
    assert (result.withdrawn, a.pending, result.pushed) == ([], 1, 30)
    assert a.values()[1000] == "theirs"
    open_gate(a)
    lose_connection(a)
    a.sync()
    assert_in_step(world, a)


def test_r5_a_code_of_a_newer_server_keeps_back_and_withdraws_nothing() -> None:
    world = World()
    a = with_work(world, count=10, size=1)
    a.put(("notes", 50, "new"))

    def unknown() -> SyncError:
        error = ProtocolError("a limit of tomorrow", code="limit_exceeded")
        error.refused_by = "server"
        return error

    gate(a, holding("new", unknown))
    result = a.sync()
    assert ([kept.code for kept in result.kept_back], result.withdrawn) == (["limit_exceeded"], [])
    assert (result.pushed, a.pending) == (10, 1)


# ---------------------------------------------------------------- a way that is closed


@pytest.mark.parametrize(
    "make",
    [
        lambda: on_the_way(ProtocolError, "not_found"),
        lambda: on_the_way(ProtocolError, "invalid_message"),
        lambda: on_the_way(ProtocolError, "too_large"),
        lambda: on_the_way(PermissionDeniedError, "forbidden"),
        lambda: on_the_way(ProtocolError, "method_not_allowed"),
        lambda: error_from_code("unsupported_media_type", "no such thing"),
        lambda: error_from_code("invalid_message", "what is a push?"),
    ],
)
def test_r5_where_every_push_is_refused_nothing_is_withdrawn_and_pulls_go_on(
    make: Callable[[], SyncError],
) -> None:
    world = World()
    a = with_work(world, count=10, size=1)
    gate(a, everything(make))
    for number in range(3):
        world.put(("notes", 1000, number))
        with pytest.raises(SyncError) as caught:
            a.sync()
        assert caught.value.code == make().code
        assert "stays pending" in str(caught.value)
        assert (a.values()[1000], a.pending, a.engine.discarded()) == (number, 10, [])
    open_gate(a)
    a.sync()
    assert a.pending == 0
    assert_in_step(world, a)


# ---------------------------------------------------------------- what is not definite


@pytest.mark.parametrize(
    "make",
    [
        lambda: ServerError("500"),
        lambda: error_from_code("storage_error", "500"),
        lambda: error_from_code("storage_full", "507"),
        lambda: ServerBusyError("503"),
        lambda: error_from_code("rate_limited", "429"),
        lambda: SyncTimeoutError("408"),
        lambda: TransportError("cut off"),
        lambda: TransportError("a login page", code="unexpected_answer"),
        # What the device itself finds wrong with an answer: the server has decided.
        lambda: ProtocolError("this is no PushResponse"),
        lambda: SyncCodecError("the answer is not CBOR"),
        lambda: ProtocolError("the answer is too large", code="too_large"),
    ],
)
def test_r5_while_the_outcome_is_open_that_very_batch_is_sent_again(
    make: Callable[[], SyncError],
) -> None:
    world = World()
    a = with_work(world, count=10, size=1)
    refused = gate(a, everything(make))
    for _ in range(3):
        with pytest.raises(SyncError):
            a.sync()
    assert len({encode(request) for request in refused}) == 1
    pulls = [request for request in a.wire.requests if isinstance(request, PullRequest)]
    open_gate(a)
    a.sync()
    assert len(pulls) == 2 and a.pending == 0
    assert_in_step(world, a)
    assert_sound(a.db)


def answered(error: SyncError) -> SyncError:
    """With the name that the request has in the server's log."""
    error.request_id = "r-1"
    return error


@pytest.mark.parametrize(
    "make", [lambda: answered(ServerError("502")), lambda: answered(SyncTimeoutError("no answer"))]
)
def test_r5_a_push_that_is_never_answered_says_what_happens_and_what_to_do(
    make: Callable[[], SyncError],
) -> None:
    """As behind a firewall that lets pulls pass: nothing is lost, and the way out is named."""
    world = World()
    a = with_work(world, count=2, size=1)
    gate(a, everything(make))
    for _ in range(2):
        with pytest.raises(SyncError) as caught:
            a.sync()
    assert type(caught.value) is type(make()) and caught.value.retryable
    assert caught.value.request_id == "r-1"
    said = str(a.engine.status().last_error)
    assert said == str(caught.value) and said.startswith(make().message)
    assert "is sent again until it is answered, and nothing is pulled before" in said
    assert "what is written here is kept" in said and "/v1/push" in said
    a.put(("notes", 77, "meanwhile"))
    assert (a.pending, a.values()[77], a.engine.discarded()) == (3, "meanwhile", [])
    open_gate(a)
    a.sync()
    assert a.pending == 0 and a.engine.status().last_error is None
    assert_in_step(world, a)


def test_an_answer_in_other_words_keeps_who_gave_it_and_its_name_in_the_log() -> None:
    error = answered(error_from_code("forbidden", "no"))
    said = closed(error)
    assert (said.code, said.request_id, said.refused_by) == ("forbidden", "r-1", error.refused_by)


def test_r5_another_error_of_a_push_that_was_sent_before_is_no_cause_of_itself() -> None:
    world = World()
    a = with_work(world, count=2, size=1)
    gate(a, everything(lambda: error_from_code("busy", "later", retry_after=1.0)))
    for _ in range(2):
        with pytest.raises(SyncError) as caught:
            a.sync()
    assert caught.value.code == "busy" and caught.value.__cause__ is not caught.value
    open_gate(a)
    a.sync()
    assert_in_step(world, a)


# ---------------------------------------------------------------- crashes


@pytest.mark.parametrize("after", [False, True])
def test_r9_a_crash_at_any_commit_of_all_this_leaves_a_state_to_go_on_from(after: bool) -> None:
    for at in range(1, 40):
        world = World()
        a = with_work(world, count=6, size=400)
        a.put(("notes", 50, "poison"))
        poisoned = holding("poison", lambda: error_from_code("codec_error", "no"))
        limited = body_limit(1_500)
        gate(a, lambda request: limited(request) or poisoned(request))  # noqa: B023
        a.storage.fail(at, after=after)
        try:
            a.sync()
        except Crash:
            a.restart()
            gate(a, lambda request: limited(request) or poisoned(request))  # noqa: B023
            a.settle()
        else:
            assert at > 6
            return
        assert [gone.code for gone in a.engine.discarded()] == ["codec_error"], at
        assert_in_step(world, a)
    raise AssertionError("the cycle never ended")


def sync_on_through_cuts(device: Device) -> None:
    for _ in range(3):
        try:
            device.sync()
        except TransportError:
            continue
        return
    raise AssertionError("the device never gets on")


def test_a_proxy_that_cuts_what_is_too_large_for_it_stops_neither_pushes_nor_pulls() -> None:
    world = World()
    a, b = world.device(), world.device()
    for number in range(20):
        a.notes[uid(number)] = "x" * 10_000
    b.notes[uid(100)] = "theirs"
    b.sync()
    refused = gate(a, lambda push: cut_while_sent() if len(encode(push)) > 60_000 else None)
    sync_on_through_cuts(a)
    assert len(refused) > 1
    assert a.engine.status().pending == 0
    assert a.notes[uid(100)] == "theirs"
    a.sync()
    b.sync()
    assert len(b.notes) == len(a.notes) == 21


def test_one_transaction_that_is_cut_again_and_again_is_kept_back_alone() -> None:
    world = World()
    a, b = world.device(), world.device()
    a.notes[uid(1)] = "x" * 100_000
    for number in range(2, 8):
        a.notes[uid(number)] = "small"
    b.notes[uid(100)] = "theirs"
    b.sync()
    gate(a, lambda push: cut_while_sent() if len(encode(push)) > 60_000 else None)
    sync_on_through_cuts(a)
    assert a.engine.status().pending == 1
    error = a.engine.status().last_error
    assert error is not None
    assert "kept back" in error
    assert a.notes[uid(100)] == "theirs"
    open_gate(a)
    lose_connection(a)
    a.sync()
    assert a.engine.status().pending == 0


def test_a_connection_that_is_cut_once_changes_nothing() -> None:
    world = World()
    a = world.device()
    for number in range(20):
        a.notes[uid(number)] = "x" * 1000
    left = [cut_while_sent()]
    refused = gate(a, lambda push: left.pop() if left else None)
    with pytest.raises(TransportError):
        a.sync()
    pushes: list[PushRequest] = []

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            pushes.append(request)

    a.wire.before = hook
    a.sync()
    assert [each.transactions for each in pushes] == [refused[0].transactions]


def test_what_was_cut_is_tried_again_after_some_cycles_and_what_was_refused_is_not() -> None:
    """A server that has more devices than connections cuts some of them, and by chance twice."""
    path, tried = Path(), []
    path.kept[2] = KeptBack(2, bytes(16), "too_large", "too large")
    for cycle in range(1, 40):
        path.begin_cycle()
        if 1 not in path.kept:
            tried.append(cycle)
            path.kept[1] = KeptBack(1, bytes(16), "transport_error", "cut")
    assert tried == [1, 2, 5, 10, 19, 36]
    assert 2 in path.kept
    path.cut_bytes = 10
    path.passed(10)
    path.kept[1] = KeptBack(1, bytes(16), "transport_error", "cut")
    path.begin_cycle()
    path.begin_cycle()
    assert list(path.kept) == [2]

"""How much work one push may be: bounded in arrays, maps and items, by verdicts, and at home."""

from __future__ import annotations

import pytest

from entidb import cbor
from entidb.cbor import decoding, encoding, weight
from entidb.db import Database
from entidb.db import adopt as adopting
from entidb.db import local as transactions
from entidb.errors import CborEncodeError, ProtocolError, TransactionTooLargeError
from entidb.protocol import PushOperation, PushTransaction, Verdict
from entidb.server import work
from entidb.types import (
    CONTAINERS_MAX,
    VALUE_CONTAINERS_MAX,
    VALUE_ITEMS_MAX,
)
from tests.server.test_service import ACCEPTED, REJECTED, op, push, request, tx, verdicts
from tests.support import GRANT, World, assert_in_step, uid


def lists(count: int) -> bytes:
    """A value of ``count`` lists, small in bytes."""
    return cbor.array_head(count - 1) + b"\x80" * (count - 1)


def writes(number: int, *payloads: bytes) -> PushTransaction:
    operations = [
        PushOperation(0, uid(1000 * number + at).bytes, 0, payload)
        for at, payload in enumerate(payloads)
    ]
    return PushTransaction(number.to_bytes(16, "big"), 1, operations)


def write_together(database: Database, payloads: list[bytes]) -> None:
    with database.transaction() as transaction:
        for at, payload in enumerate(payloads):
            transaction.collection("notes")[uid(100 * len(payloads) + at)] = cbor.decode(payload)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is decoded."""
    sizes: list[int] = []
    real = decoding._decode

    def decode(data: bytes) -> object:
        sizes.append(len(data))
        return real(data)

    monkeypatch.setattr(decoding, "_decode", decode)
    return sizes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds a thousandth of the real ones."""
    for room in (encoding, weight):
        monkeypatch.setattr(room, "VALUE_CONTAINERS_MAX", 100)
    monkeypatch.setattr(weight, "VALUE_ITEMS_MAX", 1000)
    monkeypatch.setattr(work, "VALUE_CONTAINERS_MAX", 100)
    monkeypatch.setattr(work, "TRANSACTION_CONTAINERS_MAX", 500)
    monkeypatch.setattr(work, "PUSH_CONTAINERS_MAX", 1000)
    monkeypatch.setattr(transactions, "TRANSACTION_CONTAINERS_MAX", 500)
    monkeypatch.setattr(adopting, "TRANSACTION_CONTAINERS_MAX", 500)


def test_values_of_a_million_lists_are_refused_one_by_one_without_being_decoded(
    decoded: list[int],
) -> None:
    world = World()
    bombs = [writes(number, lists(1_000_000)) for number in range(2, 17)]
    results = push(world, tx(1, op(1, "before")), *bombs, tx(20, op(3, "after")))
    assert verdicts(results) == [ACCEPTED, *[REJECTED] * 15, ACCEPTED]
    assert {result.code for result in results[1:-1]} == {"codec_error"}
    assert f"more than {VALUE_CONTAINERS_MAX} maps and lists" in (results[1].message or "")
    assert max(decoded) < 1000
    assert world.values() == {1: "before", 3: "after"}


@pytest.mark.parametrize("payload", [lists(VALUE_CONTAINERS_MAX), cbor.encode([1] * 1_000_000)])
def test_the_largest_value_that_a_device_can_write_is_accepted(payload: bytes) -> None:
    value = cbor.decode(payload)
    with Database.in_memory() as database:
        database.collection("notes")[uid(1)] = value
    results = push(World(), writes(1, payload))
    assert verdicts(results) == [ACCEPTED]


@pytest.mark.parametrize(
    ("payload", "what"),
    [
        (lists(VALUE_CONTAINERS_MAX + 1), "maps and lists"),
        (cbor.array_head(VALUE_ITEMS_MAX) + b"\x01" * VALUE_ITEMS_MAX, "keys and values"),
    ],
    ids=["lists", "numbers"],
)
def test_what_a_server_refuses_as_too_much_is_refused_at_the_commit(
    payload: bytes, what: str
) -> None:
    value = cbor.decode(payload)
    with Database.in_memory() as database:
        with pytest.raises(CborEncodeError, match=f"{what} in one value; make several entities"):
            database.collection("notes")[uid(1)] = value
        assert len(database.collection("notes")) == 0
    (result,) = push(World(), writes(1, payload))
    assert (result.verdict, result.code) == (Verdict.REJECTED, "codec_error")
    assert what in (result.message or "")


def test_what_an_older_version_stored_is_read_all_the_same() -> None:
    payload = lists(CONTAINERS_MAX)
    assert len(cbor.check(payload)) == CONTAINERS_MAX - 1
    assert cbor.all_pass([payload])


def test_a_large_value_of_text_and_bytes_is_no_work(small: None) -> None:
    value = {"text": "语" * 3000, "bytes": b"\x80" * 3000}
    (result,) = push(World(), tx(1, op(1, value)))
    assert result.verdict == Verdict.ACCEPTED
    with Database.in_memory() as database:
        database.collection("notes")[uid(1)] = value


def test_a_transaction_that_is_too_much_together_is_refused_on_both_sides(small: None) -> None:
    fits, over = [lists(100)] * 5, [lists(100)] * 5 + [lists(2)]
    world = World()
    results = push(world, writes(1, *over), writes(2, *fits), tx(3, op(3, "beside")))
    assert verdicts(results) == [REJECTED, ACCEPTED, ACCEPTED]
    assert results[0].code == "too_large"
    with Database.in_memory() as database:
        notes = database.collection("notes")
        write_together(database, fits)
        with pytest.raises(TransactionTooLargeError, match="500 maps and lists together"):
            write_together(database, over)
        assert len(notes) == len(fits)


def test_transactions_that_are_too_much_together_are_to_be_sent_apart(
    small: None, decoded: list[int]
) -> None:
    world = World()
    each = [writes(number, *[lists(100)] * 4) for number in range(1, 4)]
    message = request(world, *each)
    decoded.clear()  # the request names the history, which was read for it
    (answer,) = world.service.push_many([(message, GRANT)])
    assert isinstance(answer, ProtocolError)
    assert answer.code == "too_large"
    assert not decoded
    assert verdicts(push(world, *each[:2])) == [ACCEPTED, ACCEPTED]
    assert verdicts(push(world, each[2])) == [ACCEPTED]


def test_many_values_that_are_small_each_are_too_much_together_as_well(small: None) -> None:
    world = World()
    over = writes(1, *[lists(50)] * 11)
    (result,) = push(world, over)
    assert (result.verdict, result.code) == (Verdict.REJECTED, "too_large")
    each = [writes(number, *[lists(50)] * 9) for number in range(2, 5)]
    (answer,) = world.service.push_many([(request(world, *each), GRANT)])
    assert isinstance(answer, ProtocolError) and answer.code == "too_large"
    assert verdicts(push(world, *each[:2])) == [ACCEPTED, ACCEPTED]


def test_a_value_that_is_too_much_is_found_beside_one_that_is_small(small: None) -> None:
    world = World()
    results = push(world, tx(1, op(1, "small")), writes(2, lists(101)))
    assert verdicts(results) == [ACCEPTED, REJECTED]
    assert results[1].code == "codec_error"


def test_one_push_that_is_too_much_leaves_the_others_of_its_group_alone(small: None) -> None:
    world = World()
    bad = request(world, *[writes(number, *[lists(100)] * 4) for number in range(1, 4)])
    good = request(world, tx(9, op(9, "good")))
    first, second = world.service.push_many([(bad, GRANT), (good, GRANT)])
    assert isinstance(first, ProtocolError)
    assert not isinstance(second, Exception)
    assert world.values() == {9: "good"}


def test_a_device_gets_on_after_a_push_that_was_too_much_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    device = world.device()
    notes = device.db.collection("notes")
    for number in range(1, 9):
        notes[uid(number)] = [[]] * 99
    monkeypatch.setattr(work, "TRANSACTION_CONTAINERS_MAX", 150)
    monkeypatch.setattr(work, "PUSH_CONTAINERS_MAX", 250)
    device.sync()
    assert len(world.values()) == 8
    assert_in_step(world, device)


def test_what_is_adopted_again_is_cut_where_it_is_too_much_for_one_transaction(
    small: None,
) -> None:
    room = adopting._Room(1 << 20)
    added = [room.add(lists(100)) for _ in range(6)]
    assert added == [True] * 5 + [False]
    # Text that only looks like lists counts nothing.
    assert room.add(cbor.encode("语" * 400))
    assert not adopting._Room(100).add(cbor.encode("x" * 100))

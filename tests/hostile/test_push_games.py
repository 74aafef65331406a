"""Pushes and pulls with the right shape and the wrong intent."""

from __future__ import annotations

from typing import Any

import pytest

from entidb import cbor
from entidb.db.catalogue import Catalogue
from entidb.errors import HistoryChangedError, PermissionDeniedError
from entidb.protocol import (
    PullRequest,
    PushOperation,
    PushRequest,
    PushResponse,
    PushResult,
    PushTransaction,
    Verdict,
    encode,
)
from entidb.server.hooks import Grant
from entidb.server.pages import PAGE_BYTES_MAX, READ_ROWS
from tests.hostile.support import store_hash
from tests.support import GRANT, World, uid

DEVICE = b"d" * 16
FORGED = b"f" * 16
STAMP_MAX = 2**64 - 1


def tid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def operation(number: int, value: object, base: int = 0, collection: int = 0) -> PushOperation:
    payload = None if value is None else cbor.encode(value)
    return PushOperation(collection, uid(number).bytes, base, payload)


def request(world: World, *transactions: PushTransaction, **fields: object) -> PushRequest:
    values: dict[str, object] = {
        "db_id": "shop",
        "device_id": DEVICE,
        "history": world.server.history,
        "cursor": 0,
        "collections": ["notes"],
        "transactions": list(transactions),
    }
    return PushRequest(**(values | fields))  # type: ignore[arg-type]


def push(world: World, *transactions: PushTransaction, **fields: object) -> list[PushResult]:
    (answer,) = world.service.push_many([(request(world, *transactions, **fields), GRANT)])
    if not isinstance(answer, PushResponse):
        raise answer
    return answer.results


def pull(world: World, **fields: object) -> PullRequest:
    values: dict[str, object] = {
        "db_id": "shop",
        "device_id": DEVICE,
        "history": world.server.history,
        "cursor": 0,
        "limit": 1000,
        "bytes_max": 1 << 20,
    }
    return PullRequest(**(values | fields))  # type: ignore[arg-type]


@pytest.fixture
def world() -> World:
    made = World()
    for number in range(5):
        made.put(("notes", number, {"n": number}))
    return made


@pytest.mark.parametrize("ahead", [1, 2, 1000, 2**63 - 1 - 5])
def test_r13_a_base_above_the_head_overwrites_nothing(world: World, ahead: int) -> None:
    before = store_hash(world.server)
    overwrite = PushTransaction(tid(1), 1, [operation(0, "mine", base=5 + ahead)])
    innocent = PushTransaction(tid(2), 1, [operation(99, "new")])
    with pytest.raises(HistoryChangedError):
        push(world, innocent, overwrite)
    assert store_hash(world.server) == before


def test_r13_a_base_that_is_about_to_be_true_overwrites_nothing_in_its_group(world: World) -> None:
    honest = request(world, PushTransaction(tid(1), 1, [operation(0, "theirs", base=1)]))
    guess = request(world, PushTransaction(tid(2), 1, [operation(0, "mine", base=6)]))
    first, second = world.service.push_many([(honest, GRANT), (guess, GRANT)])
    assert isinstance(first, PushResponse)
    assert isinstance(second, HistoryChangedError)
    assert world.values()[0] == "theirs"


def test_a_version_above_the_head_among_those_a_device_has_is_another_history(
    world: World,
) -> None:
    for have in ([(6, 6)], [(1, 2), (4, 2**62)]):
        with pytest.raises(HistoryChangedError):
            world.service.pull(pull(world, have=have), GRANT)
    assert world.service.pull(pull(world, have=[(1, 5)]), GRANT).commits == []


def test_a_cursor_above_the_head_is_another_history(world: World) -> None:
    with pytest.raises(HistoryChangedError):
        world.service.pull(pull(world, cursor=6), GRANT)
    with pytest.raises(HistoryChangedError):
        push(world, PushTransaction(tid(1), 1, [operation(9, 1)]), cursor=6)


def test_r14_an_id_of_somebody_else_with_other_content_changes_nothing(world: World) -> None:
    mine = PushTransaction(tid(1), 1, [operation(50, "first")])
    assert push(world, mine)[0].verdict == Verdict.ACCEPTED
    before = store_hash(world.server)
    other = PushTransaction(tid(1), 1, [operation(50, "other"), operation(0, "overwritten")])
    (result,) = push(world, other, device_id=FORGED)
    assert result == PushResult(Verdict.SUPERSEDED, 6)
    assert store_hash(world.server) == before


def test_r14_an_old_transaction_sent_again_opens_no_way_past_a_conflict(world: World) -> None:
    old = PushTransaction(tid(1), 1, [operation(50, "old")])
    push(world, old)
    world.put(("notes", 50, "newer"))
    results = push(world, old, PushTransaction(tid(2), 1, [operation(50, "behind", base=0)]))
    assert [result.verdict for result in results] == [Verdict.ACCEPTED, Verdict.CONFLICT]
    assert world.values()[50] == "newer"


def test_a_known_id_does_not_let_a_transaction_write_on_what_it_never_wrote(world: World) -> None:
    push(world, PushTransaction(tid(1), 1, [operation(50, "x")]))
    forged = PushTransaction(tid(1), 1, [operation(0, "x")])
    built_on_it = PushTransaction(tid(2), 1, [operation(0, "y")])
    results = push(world, forged, built_on_it)
    assert [result.verdict for result in results] == [Verdict.SUPERSEDED, Verdict.CONFLICT]
    assert world.values()[0] == {"n": 0}


def test_r27_the_latest_timestamp_there_is_becomes_the_servers_own(world: World) -> None:
    (result,) = push(world, PushTransaction(tid(1), STAMP_MAX, [operation(7, 1)]))
    assert result.timestamp >> 16 == world.clock.now_ms()
    world.put(("notes", 8, "a program on the server still has timestamps"))
    page = world.service.pull(pull(world, cursor=5), GRANT)
    # The counter beside the milliseconds was full, so the next tick is one beyond.
    assert all(commit.timestamp >> 16 <= world.clock.now_ms() + 1 for commit in page.commits)


@pytest.mark.parametrize("bytes_max", [1, 2**63 - 1])
@pytest.mark.parametrize("limit", [1, 2**63 - 1])
def test_a_page_is_as_large_as_the_server_wants_it(
    world: World, limit: int, bytes_max: int
) -> None:
    for number in range(30):
        world.put(("notes", 100 + number, "x" * 600_000))
    cursor, pages = 0, 0
    while True:
        page = world.service.pull(
            pull(world, cursor=cursor, limit=limit, bytes_max=bytes_max), GRANT
        )
        assert len(encode(page)) < PAGE_BYTES_MAX + 700_000
        pages += 1
        cursor = page.cursor
        if not page.has_more:
            break
    assert cursor == 35 and pages >= 3


def test_large_entities_are_not_all_read_for_one_small_page(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        world.put(("notes", 100 + number, "x" * 10_000))
    read: list[int] = []
    snapshot = type(world.server_storage.snapshot())
    original = snapshot.get_many

    def counting(self: Any, keys: Any) -> Any:
        read.append(len(keys))
        return original(self, keys)

    monkeypatch.setattr(snapshot, "get_many", counting)
    world.service.pull(pull(world, bytes_max=1), GRANT)
    assert read and max(read) <= READ_ROWS and sum(read) <= READ_ROWS


def test_ten_thousand_names_cost_no_more_than_reading_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    original = Catalogue.__init__

    def counting(self: Catalogue, *given: Any) -> None:
        built.append(1)
        original(self, *given)

    monkeypatch.setattr(Catalogue, "__init__", counting)
    names = [f"n{number}" for number in range(4096)]
    results = push(
        world,
        PushTransaction(tid(1), 1, [operation(1, 1, collection=4095)]),
        PushTransaction(tid(2), 1, [operation(1, 1, collection=0)]),
        collections=names,
    )
    assert [result.verdict for result in results] == [Verdict.ACCEPTED, Verdict.ACCEPTED]
    assert len(built) < 10
    assert world.server.collections() == ["n0", "n4095", "notes"]
    assert world.server.verify() == []
    world.service.pull(pull(world, collections=names), GRANT)


def test_a_token_for_some_collections_makes_no_others(world: World) -> None:
    grant = Grant("ann", True, True, frozenset(["mine"]))
    asked = request(
        world,
        PushTransaction(tid(1), 1, [operation(1, 1, collection=0)]),
        PushTransaction(tid(2), 1, [operation(1, 1, collection=1)]),
        collections=["mine", "theirs"],
    )
    (answer,) = world.service.push_many([(asked, grant)])
    assert isinstance(answer, PushResponse)
    assert [result.verdict for result in answer.results] == [Verdict.ACCEPTED, Verdict.REJECTED]
    assert "theirs" not in world.server.collections()


def test_what_may_not_be_read_may_not_be_read_by_asking_for_it(world: World) -> None:
    world.put(("secrets", 1, "hidden"))
    grant = Grant("ann", True, False, frozenset(["notes"]))
    page = world.service.pull(pull(world, collections=["secrets", "notes"]), grant)
    assert page.collections == ["notes"]
    with pytest.raises(PermissionDeniedError):
        world.service.pull(pull(world), Grant("bob", False, True))


def test_null_is_no_value(world: World) -> None:
    before = store_hash(world.server)
    [result] = push(world, PushTransaction(tid(1), 1, [PushOperation(0, tid(9), 0, b"\xf6")]))
    assert (result.verdict, result.code) == (Verdict.REJECTED, "codec_error")
    assert store_hash(world.server) == before

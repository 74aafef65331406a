"""What is unique on a server: who is refused, what is said of who has it, and what devices do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb import ConfigError, Index, cbor
from entidb.db.index_care import declare, rebuild
from entidb.errors import ServerBusyError
from entidb.protocol import PullRequest, PushResponse, PushResult, RoundRequest, ServerState
from entidb.server import Grant, ServerConfig
from entidb.server.directory import on_disk
from entidb.server.hooks import Schema
from entidb.server.service import BehindError, DatabaseService
from entidb.server.stores import Stores
from entidb.sync.apply.settle import HOLDERS_MAX
from tests.server.support import ManualClock
from tests.server.test_service import (
    ACCEPTED,
    CONFLICT,
    DEVICE,
    REJECTED,
    SUPERSEDED,
    op,
    push,
    request,
    tx,
    verdicts,
)
from tests.support import GRANT, World, uid

WRITE_ONLY = Grant("writer", False, True)


def mail(number: int, email: Any, base: int = 0, **fields: Any) -> Any:
    return op(number, {"email": email, **fields}, base)


@pytest.fixture
def world() -> World:
    made = World()
    declare(made.server, "notes", None, [Index("email", unique=True)])
    return made


def codes(results: list[PushResult]) -> list[str]:
    return [result.code for result in results]


def test_a_value_that_is_taken_is_rejected_and_the_others_go_on(world: World) -> None:
    version = world.put(("notes", 1, {"email": "a"}))
    results = push(world, tx(1, mail(2, "a")), tx(2, mail(3, "b")), tx(3, mail(1, "a", version)))
    assert verdicts(results) == [REJECTED, ACCEPTED, ACCEPTED]
    assert codes(results) == ["not_unique", "", ""]
    assert world.values() == {1: {"email": "a"}, 3: {"email": "b"}}


def test_a_rejected_transaction_is_rejected_whole_and_what_is_built_on_it_with_it(
    world: World,
) -> None:
    world.put(("notes", 1, {"email": "a"}))
    results = push(
        world, tx(1, mail(2, "a"), op(5, "free")), tx(2, op(5, "on top")), tx(3, mail(6, "c"))
    )
    assert verdicts(results) == [REJECTED, CONFLICT, ACCEPTED]
    assert sorted(world.values()) == [1, 6]


def test_within_a_batch_the_first_one_has_it(world: World) -> None:
    results = push(world, *[tx(n, mail(n, "same")) for n in range(1, 9)])
    assert verdicts(results) == [ACCEPTED] + [REJECTED] * 7
    again = push(world, tx(9, mail(9, "same")))
    assert codes(again) == ["not_unique"]


def test_within_a_group_the_first_member_has_it(world: World) -> None:
    members = [(request(world, tx(n, mail(n, "same"))), GRANT) for n in (1, 2, 3)]
    answers = world.service.push_many(members)
    found = [answer.results[0].verdict for answer in answers if isinstance(answer, PushResponse)]
    assert found == [ACCEPTED, REJECTED, REJECTED]


def test_a_deletion_frees_the_value_for_what_comes_after_it(world: World) -> None:
    version = world.put(("notes", 1, {"email": "a"}))
    results = push(
        world,
        tx(1, mail(2, "a")),
        tx(2, op(1, None, version)),
        tx(3, mail(3, "a")),
        tx(4, mail(4, "a")),
    )
    assert verdicts(results) == [REJECTED, ACCEPTED, ACCEPTED, REJECTED]
    [taken] = push(world, tx(5, op(3, None, results[2].version), mail(5, "a")))
    assert taken.verdict == ACCEPTED
    assert world.values() == {5: {"email": "a"}}


def test_a_change_frees_the_value_too_and_two_may_exchange_theirs(world: World) -> None:
    first = world.put(("notes", 1, {"email": "a"}))
    second = world.put(("notes", 2, {"email": "b"}))
    [swapped] = push(world, tx(1, mail(1, "b", first), mail(2, "a", second)))
    assert swapped.verdict == ACCEPTED
    results = push(world, tx(2, mail(1, "c", swapped.version)), tx(3, mail(3, "b")))
    assert verdicts(results) == [ACCEPTED, ACCEPTED]
    [twice] = push(world, tx(4, mail(7, "new"), mail(8, "new")))
    assert (twice.code, twice.states) == ("not_unique", [])


def test_what_is_refused_is_asked_again_when_it_comes_again(world: World) -> None:
    version = world.put(("notes", 1, {"email": "a"}))
    assert verdicts(push(world, tx(1, mail(2, "a")))) == [REJECTED]
    world.put(("notes", 1, None))
    assert verdicts(push(world, tx(1, mail(2, "a")))) == [ACCEPTED]
    assert verdicts(push(world, tx(1, mail(2, "a")))) == [ACCEPTED]  # R14
    assert verdicts(push(world, tx(1, mail(2, "b")))) == [SUPERSEDED]
    assert version


def test_what_the_server_stores_instead_is_what_is_compared() -> None:
    world = World()
    declare(world.server, "notes", None, [Index("mail", unique=True)])
    schema = Schema(2, 1, lambda name, value, said: {"mail": value["email"]})
    world.service = DatabaseService(world.server, db_id="shop", limits=world.limits, schema=schema)
    world.put(("notes", 1, {"mail": "a"}))
    results = push(world, tx(1, mail(2, "a")), tx(2, mail(3, "b")), schema=1)
    assert codes(results) == ["not_unique", ""]


# ---------------------------------------------------------------- who has it


def test_who_may_read_is_told_which_entity_has_it(world: World) -> None:
    version = world.put(("notes", 1, {"email": "a", "name": "Ada"}))
    [result] = push(world, tx(1, mail(2, "a")))
    assert str(uid(1)) in result.message
    [state] = result.states
    assert (state.entity_id, state.version) == (uid(1).bytes, version)
    assert cbor.decode(state.payload or b"") == {"email": "a", "name": "Ada"}


def test_a_token_that_may_not_read_learns_nothing_of_who_has_it(world: World) -> None:
    world.put(("notes", 1, {"email": "a", "name": "Ada"}))
    [result] = push(world, tx(1, mail(2, "a")), grant=WRITE_ONLY)
    assert (result.code, result.states) == ("not_unique", [])
    assert str(uid(1)) not in result.message
    assert uid(1).hex not in result.message
    assert str(uid(2)) in result.message


# ---------------------------------------------------------------- on a device


def test_a_device_withdraws_what_was_not_unique_and_lists_what_it_lost_to(world: World) -> None:
    world.put(("notes", 1, {"email": "a"}))
    device = world.device()
    device.db.collection("notes")[uid(2)] = {"email": "a"}
    device.db.collection("notes")[uid(2)] = {"email": "a", "more": 1}
    device.db.collection("notes")[uid(3)] = {"email": "b"}
    device.sync()
    gone, built_on_it = device.engine.discarded()
    assert (gone.code, built_on_it.code) == ("not_unique", "depends")
    assert "'email'" in gone.message
    assert [(entry[0], entry[1], cbor.decode(entry[5])) for entry in gone.lost_to] == [
        ("notes", uid(1).bytes, {"email": "a"})
    ]
    assert sorted(i.int for i in device.db.collection("notes")) == [1, 3]
    assert world.values() == {1: {"email": "a"}, 3: {"email": "b"}}


def test_what_was_withdrawn_can_be_committed_again_when_the_value_is_free(world: World) -> None:
    world.put(("notes", 1, {"email": "a"}))
    device = world.device()
    notes = device.db.collection("notes", indexes=[Index("email", unique=True)])
    notes[uid(2)] = {"email": "a"}
    device.sync()
    [gone] = device.engine.discarded()
    world.put(("notes", 1, None))
    device.engine.recommit(gone)
    device.sync()
    assert world.values() == {2: {"email": "a"}}
    assert list(device.engine.discarded()) == []


def test_of_what_a_server_names_a_device_keeps_little_and_only_what_can_be_read(
    world: World,
) -> None:
    device = world.device()
    device.db.collection("notes")[uid(2)] = {"email": "a"}

    def lie(answer: PushResponse) -> PushResponse:
        states = [ServerState(0, uid(9).bytes, 1, b"\xff"), ServerState(0, uid(8).bytes, 1, None)]
        refused = PushResult(REJECTED, 0, 0, states, "not_unique", "no")
        return replace(answer, results=[refused])

    push_many = world.service.push_many
    world.service.push_many = lambda members: [  # type: ignore[method-assign]
        lie(answer) if isinstance(answer, PushResponse) else answer for answer in push_many(members)
    ]
    device.sync()
    [gone] = device.engine.discarded()
    assert gone.lost_to == []
    assert HOLDERS_MAX == 1


# ---------------------------------------------------------------- the index behind it


def test_a_push_waits_for_an_index_that_is_being_built_and_others_do_not(world: World) -> None:
    world.put(("notes", 1, {"email": "a"}))
    rebuild(world.server)
    answers = world.service.push_many(
        [
            (request(world, tx(1, mail(2, "a"))), GRANT),
            (request(world, tx(2, op(3, "x", collection=1))), GRANT),
        ]
    )
    assert isinstance(answers[0], ServerBusyError)
    assert answers[0].retry_after
    assert isinstance(answers[1], PushResponse)
    world.server.wait_for_indexes()
    assert codes(push(world, tx(1, mail(2, "a")))) == ["not_unique"]


def test_a_round_for_which_an_index_is_being_built_is_behind(world: World) -> None:
    """What follows is a push of its own, and that waits."""
    version = world.put(("notes", 1, {"email": "a"}))
    rebuild(world.server)
    pulled = PullRequest(
        db_id="shop",
        device_id=DEVICE,
        history=world.server.history or b"",
        cursor=version,
        limit=10,
        bytes_max=1000,
    )
    pushed = request(world, tx(1, mail(2, "b")), cursor=version)
    [answer] = world.service.push_many([(RoundRequest(pull=pulled, push=pushed), GRANT)])
    assert isinstance(answer, BehindError)
    world.server.wait_for_indexes()
    [answer] = world.service.push_many([(RoundRequest(pull=pulled, push=pushed), GRANT)])
    assert isinstance(answer, PushResponse)


# ---------------------------------------------------------------- settings


def stores_of(path: Path, **settings: Any) -> Stores:
    config = ServerConfig(data_dir=path, insecure_no_auth=True, **settings)
    clock = ManualClock()
    return Stores(config, clock=clock, open_database=on_disk(config, clock=clock))


def listed(stores: Stores) -> list[str]:
    with stores.using("shop", create=True) as store:
        store.database.wait_for_indexes()
        return [f"{each.collection}: {each.index}" for each in store.database.indexes()]


def test_the_settings_declare_indexes_in_every_database_that_is_opened(tmp_path: Path) -> None:
    def now(**settings: Any) -> list[str]:
        stores = stores_of(tmp_path, **settings)
        try:
            return listed(stores)
        finally:
            stores.close()

    both = {"unique": {"users": ["email"]}, "indexes": {"users": ["name"], "stock": [("a", "b")]}}
    assert now(**both) == ["stock: a, b", "users: name", "users: email unique"]
    assert now() == ["stock: a, b", "users: name", "users: email unique"]
    assert now(unique={"users": ["email", Index("nick", key=str.casefold)]}) == [
        "stock: a, b",
        "users: name",
        "users: email unique",
        "users: nick by str.casefold unique",
    ]
    assert now(indexes={"users": []}) == [
        "stock: a, b",
        "users: email unique",
        "users: nick by str.casefold unique",
    ]
    assert now(unique={"users": []}, indexes={"users": ["email"]}) == [
        "stock: a, b",
        "users: email",
    ]


def test_an_index_that_fell_out_of_use_is_declared_again_while_a_server_runs(
    tmp_path: Path,
) -> None:
    stores = stores_of(tmp_path, unique={"users": [Index("name", key=shout)]})
    try:
        with stores.using("shop", create=True) as store:
            users = store.database.collection("users")
            users[uid(1)] = {"name": "ada"}
            store.database.index_functions.pop("tests.server.test_unique.shout")
            with store.database.write() as writer:
                row = writer.entity((writer.collection("users").number, uid(1).bytes))
                assert row is not None
                writer.remove_entity((writer.collection("users").number, uid(1).bytes), row)
            assert store.database.indexes()[0].paused
        stores.housekeep()
        with stores.using("shop", create=True) as store:
            store.database.wait_for_indexes()
            assert store.database.indexes()[0].ready
    finally:
        stores.close()


def shout(name: str) -> str:
    return name.upper()


def test_what_is_unique_is_said_of_collections_and_not_of_databases() -> None:
    wrong: Any = {"shop": {"receipts": [("till", "number")]}}
    with pytest.raises(ConfigError, match="in collection 'shop', of each database, is a list like"):
        ServerConfig(data_dir=None, insecure_no_auth=True, unique=wrong)


@pytest.mark.parametrize(
    "settings",
    [
        {"unique": ["users"]},
        {"unique": {"users": "email"}},
        {"unique": {"users": [7]}},
        {"unique": {"users": [""]}},
        {"unique": {"users": [Index("tags", each=True)]}},
        {"unique": {"users": ["email", "email"]}},
        {"unique": {"": ["email"]}},
        {"indexes": {"users": [("a", "a")]}},
        {"indexes": {7: ["a"]}},
    ],
)
def test_what_cannot_be_declared_is_a_wrong_setting(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(data_dir=None, insecure_no_auth=True, **settings)

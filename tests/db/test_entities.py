"""The one room that writes rows of entities: it hears of every change, whichever path it comes by,
and what it does in columns is what it does one by one."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb.db import Database, Role, purge_tombstones
from entidb.db.catalogue import CollectionInfo
from entidb.db.core import Core
from entidb.db.entities import Entities, Payloads
from entidb.db.maintenance import sweep_garbage
from entidb.db.records import (
    BASE,
    COUNT,
    ENTITY,
    FEED,
    BaseRow,
    EntityRow,
    decode_entity,
    end_of,
    payload_of,
)
from entidb.db.staged import rows_of_columns, rows_of_segment
from entidb.db.writer import Writer
from entidb.storage import MemoryStorage
from entidb.testing.simulator import Options, simulate
from tests.planted.garden import CALM
from tests.support import FakeClock, World, assert_sound, uid

#: What becomes of a row of an entity, and where it is said: the verbs of the room.
VERBS = (
    "put_entity",
    "show",
    "show_all",
    "remove_entity",
    "add_entity",
    "add_entities",
    "accept",
    "accept_all",
    "clean",
    "clean_all",
    "stage_entity",
    "stage_entities",
    "stage_change",
    "carry_over",
    "replace_tables",
    "sweep_table",
    "put_base",
    "drop_base",
    "set_base",
)
#: Of each table what everything that was heard says it holds.
Tables = dict[bytes, dict[bytes, bytes]]


class Heard:
    """What one commit tells."""

    def __init__(self) -> None:
        self.told: list[tuple[bytes, bytes, bytes | None, bytes | None]] = []

    def watches(self, info: CollectionInfo) -> bool:
        return True

    def changed(
        self, info: CollectionInfo, ids: Sequence[bytes], olds: Payloads, news: Payloads
    ) -> None:
        for entity_id, old, new in zip(ids, olds, news, strict=True):
            self.told.append((info.prefix, entity_id, old, new))

    def finish(self) -> None:
        """Nothing is left for the end."""


class Hook:
    """Hangs on the room in every database, and after each commit compares what it heard with what
    is there. ``verbs`` are those that were called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.verbs: set[str] = set()
        self.commits = 0
        self._stores: dict[int, tuple[Any, Tables]] = {}
        make, store = Core._writer, Core._store

        def writer(database: Core, *rest: Any) -> Writer:
            made = make(database, *rest)
            made.watcher = Heard()
            self._known(database)
            return made

        def stored(database: Core, writer: Writer, *rest: Any) -> None:
            heard = writer.watcher
            store(database, writer, *rest)
            assert isinstance(heard, Heard)
            self._compare(database, heard)

        patch.setattr(Core, "_writer", writer)
        patch.setattr(Core, "_store", stored)
        for verb in VERBS:
            patch.setattr(Entities, verb, self._noted(verb))
        for name in ("put", "delete"):
            patch.setattr(Writer, name, self._elsewhere(name))

    def _noted(self, verb: str) -> Callable[..., Any]:
        real = getattr(Entities, verb)

        def noted(*args: Any, **options: Any) -> Any:
            self.verbs.add(verb)
            return real(*args, **options)

        return noted

    def _elsewhere(self, name: str) -> Callable[..., Any]:
        real = getattr(Writer, name)

        def checked(writer: Writer, key: bytes, *rest: bytes) -> None:
            assert key[:1] not in (ENTITY, BASE, FEED, COUNT), "a row was written past the room"
            real(writer, key, *rest)

        return checked

    def _known(self, database: Core) -> Tables:
        """What is known of a store; one that was made elsewhere is read once."""
        store = getattr(database.storage, "inner", database.storage)
        if id(store) not in self._stores:
            self._stores[id(store)] = store, contents(database)
        return self._stores[id(store)][1]

    def _compare(self, database: Core, heard: Heard) -> None:
        tables = self._known(database)
        for prefix, entity_id, old, new in heard.told:
            table = tables.setdefault(prefix, {})
            assert table.get(entity_id) == old
            if new is None:
                table.pop(entity_id, None)
            else:
                table[entity_id] = new
        self.commits += 1
        there = contents(database)
        with database.view() as view:
            for info in view.catalogue.by_name.values():
                assert tables.get(info.prefix, {}) == there.get(info.prefix, {}), info.name


def contents(database: Core) -> Tables:
    """The values in every table of a database, also in those that nobody sees."""
    found: Tables = {}
    with database.storage.snapshot() as snapshot:
        for key, raw in snapshot.scan(ENTITY, end_of(ENTITY)):
            if (payload := payload_of(raw)) is not None:
                found.setdefault(key[:5], {})[key[5:]] = payload
    return found


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Hook:
    return Hook(monkeypatch)


# ---------------------------------------------------------------- every path


def commit_one(world: World) -> None:
    world.device().put(("notes", 1, "a"))


def commit_many(world: World) -> None:
    device = world.device()
    device.put(*[("notes", n, "a") for n in range(5)])
    device.put(("notes", 1, "b"), ("notes", 2, None), ("notes", 9, "c"))


def commit_on_the_server(world: World) -> None:
    world.put(*[("notes", n, "a") for n in range(5)])
    world.put(("notes", 1, "b"), ("notes", 2, None))


def commit_what_stays_here(world: World) -> None:
    device = world.device()
    device.db.declare_local("notes")
    device.put(*[("notes", n, "a") for n in range(5)])
    device.put(("notes", 1, "b"), ("notes", 2, None))


def accept_one(world: World) -> None:
    device = world.device()
    for value in ("a", "b", None):
        device.put(("notes", 1, value))
        device.settle()


def accept_many(world: World) -> None:
    device = world.device()
    for value in ("a", "b"):
        for number in range(6):
            device.put(("notes", number, value))
        device.settle()


def settle_several_writes(world: World) -> None:
    device = world.device()
    device.put(("notes", 1, "a"), ("notes", 2, "a"))
    device.settle()
    device.put(("notes", 1, "b"), ("notes", 2, None), ("notes", 3, "c"))
    device.settle()


def pull_a_page(world: World) -> None:
    device = world.device()
    device.sync()
    for value in ("a", "b", None):
        world.put(("notes", 1, value), ("notes", 2, "z"))
        device.sync()


def stage_and_publish(world: World) -> None:
    for number in range(9):
        world.put(("notes", number, "a"))
    device = world.device(pull_operations_max=2)
    device.put(("notes", 3, "mine"), ("notes", 20, "mine"))
    device.sync()
    for number in range(9):
        world.put(("notes", number, None if number == 4 else "b"))
    device.put(("notes", 5, "mine"))
    device.settle()


def meet_a_conflict(world: World) -> None:
    one, other = world.device(), world.device()
    one.put(("notes", 1, {"a": 1}))
    one.settle()
    other.sync()
    one.put(("notes", 1, {"a": 2}))
    other.put(("notes", 1, {"a": 3}), ("notes", 2, {"b": 1}))
    other.put(("notes", 1, {"a": 4}))
    one.settle()
    other.settle()


def reset(world: World) -> None:
    for keep in ("server", "device"):
        device = world.device(pull_operations_max=3)
        device.put(*[("notes", n, keep) for n in range(5)])
        device.settle()
        old = world.backup_server()
        device.put(("notes", 1, "newer"))
        device.settle()
        device.put(("notes", 2, "pending"))
        world.open_server(old)
        device.engine.reset(keep=keep)
        device.settle()


def adopt(world: World) -> None:
    device = world.device()
    device.db.set_scope(["other"])
    device.put(*[("notes", n, "a") for n in range(5)])
    device.db.set_scope(None)
    device.settle()
    assert world.values() == dict.fromkeys(range(5), "a")


def purge(world: World) -> None:
    world.put(("notes", 1, "a"), ("notes", 2, "a"))
    world.put(("notes", 1, None))
    assert purge_tombstones(world.server, world.server.sequence) == 1


def forget(world: World) -> None:
    device = world.device()
    device.db.declare_local("notes")
    device.put(*[("notes", n, "a") for n in range(5)])
    device.db.forget("notes")
    device.put(("notes", 1, "b"))
    while sweep_garbage(device.db):
        pass
    assert device.values() == {1: "b"}


#: Each path by which rows of entities change, with the verbs that it cannot do without.
PATHS: dict[Callable[[World], None], set[str]] = {
    commit_one: {"add_entity"},
    commit_many: {"add_entity", "add_entities", "show", "put_entity"},
    commit_on_the_server: {"show"},
    commit_what_stays_here: {"add_entities", "show"},
    accept_one: {"accept", "clean_all", "put_base"},
    accept_many: {"accept_all", "clean_all", "put_base"},
    settle_several_writes: {"clean", "put_base"},
    pull_a_page: {"show", "show_all"},
    stage_and_publish: {"stage_entities", "stage_change", "carry_over", "replace_tables"},
    meet_a_conflict: {"set_base", "drop_base", "show"},
    reset: {"carry_over", "replace_tables"},
    adopt: {"show"},
    purge: {"remove_entity"},
    forget: {"replace_tables", "sweep_table"},
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_the_room_hears_of_every_change_of_a_path(
    path: Callable[[World], None], hook: Hook
) -> None:
    world = World()
    path(world)
    assert hook.verbs >= PATHS[path]
    assert hook.commits
    assert_sound(world.server)


#: The place of indexes in a commit is taken here, and what is known of a store is by one opener.
ALONE = {"indexes": 0, "unique": 0, "nodes": 0}


@pytest.mark.skipif("ENTIDB_TEST_STORE" in os.environ, reason="the simulator has stores of its own")
def test_the_room_hears_of_every_change_in_a_simulated_life(hook: Hook) -> None:
    columns = CALM | {"singles": 1000, "keys": 40, "pause_ms": 3000}
    purges = CALM | {"operations": 8, "purge": 80, "deletes": 400}
    for seed, knobs in enumerate([{}, {}, {}, purges, purges, *[columns] * 6]):
        run = simulate(seed, Options(knobs | ALONE))
        assert run.invariant is None, run.message
    assert hook.commits > 1000
    assert hook.verbs == set(VERBS)


@pytest.mark.parametrize(
    "verb",
    [
        "put_entity",
        "show_all",
        "remove_entity",
        "add_entity",
        "accept",
        "accept_all",
        "stage_entities",
    ],
)
def test_a_verb_that_tells_nothing_is_noticed(
    verb: str, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail."""
    real = getattr(Entities, verb)

    def silent(writer: Writer, *args: Any, **options: Any) -> Any:
        heard, writer.watcher = writer.watcher, None
        try:
            return real(writer, *args, **options)
        finally:
            writer.watcher = heard

    monkeypatch.setattr(Entities, verb, silent)
    path = next(path for path in (*PATHS, remove_what_is_seen) if verb in needed(path))
    with pytest.raises(AssertionError):
        path(World())


def needed(path: Callable[[World], None]) -> set[str]:
    return {"remove_entity"} if path is remove_what_is_seen else PATHS[path] - {"remove_entity"}


def remove_what_is_seen(world: World) -> None:
    """Nothing in the project does that; the verb could."""
    world.put(("notes", 1, "a"))
    with world.server.write() as writer:
        ref = (writer.catalogue.by_name["notes"].number, uid(1).bytes)
        row = writer.entity(ref)
        assert row is not None
        writer.remove_entity(ref, row)


# ---------------------------------------------------------------- in columns as one by one


def filled(role: Role) -> Database:
    """Three entities of notes and a tombstone."""
    database = Database(
        MemoryStorage(), role=role, clock=FakeClock(), entropy=random.Random(1).randbytes
    )
    notes = database.collection("notes")
    for number in range(4):
        notes[uid(number)] = "old"
    del notes[uid(3)]
    return database


def done(database: Database, act: Callable[[Writer, CollectionInfo], object]) -> list[Any]:
    """What ``act`` answers, changes and tells."""
    with database.view() as view:
        view.watcher = heard = Heard()
        answer = act(view, view.collection("notes"))
        changes = sorted(view.finish().items())
        return [answer, changes, sorted(heard.told, key=repr)]


IDS = st.lists(st.integers(0, 8), min_size=1, max_size=6, unique=True)


@given(numbers=IDS, synced=st.booleans())
def test_adding_in_columns_is_adding_one_by_one(numbers: list[int], synced: bool) -> None:
    database = Database(MemoryStorage(), entropy=random.Random(1).randbytes, clock=FakeClock())
    if not synced:
        database.declare_local("notes")
    ids, payloads = [uid(n).bytes for n in numbers], [b"\x01"] * len(numbers)

    def columns(writer: Writer, info: CollectionInfo) -> None:
        writer.add_entities(info, ids, payloads, 7, 99, 5)

    def each(writer: Writer, info: CollectionInfo) -> None:
        for entity_id, payload in zip(ids, payloads, strict=True):
            writer.add_entity(info, entity_id, payload, 7, 99, 5)

    assert done(database, columns) == done(database, each)


@given(numbers=IDS, stale=st.integers(0, 5))
def test_accepting_in_columns_is_accepting_one_by_one(numbers: list[int], stale: int) -> None:
    database = filled(Role.SERVER)
    ids, device = [uid(n).bytes for n in numbers], bytes(15) + b"\x07"
    versions = range(100, 100 + len(ids))
    stamps = [1000 + n for n in numbers]
    payloads = [bytes([n]) for n in numbers]

    def olds(writer: Writer, info: CollectionInfo) -> list[bytes | None]:
        writer._stale_rows_max = stale
        return writer.get_many([info.prefix + entity_id for entity_id in ids])

    def columns(writer: Writer, info: CollectionInfo) -> None:
        infos, rows = [info] * len(ids), olds(writer, info)
        writer.accept_all(infos, ids, rows, payloads, versions, device, stamps)

    def each(writer: Writer, info: CollectionInfo) -> None:
        rows = olds(writer, info)
        for entity_id, old, payload, version, stamp in zip(
            ids, rows, payloads, versions, stamps, strict=True
        ):
            row = writer.accept(info, entity_id, old, payload, version, device, stamp)
            assert row == writer.get(info.prefix + entity_id)

    assert done(database, columns) == done(database, each)


@given(
    numbers=st.lists(st.integers(0, 8), min_size=1, max_size=8, unique=True),
    stale=st.integers(0, 5),
    twice=st.booleans(),
)
def test_showing_in_columns_is_showing_one_by_one(
    numbers: list[int], stale: int, twice: bool
) -> None:
    database = filled(Role.SERVER)  # where nothing is pending
    remotes = [BaseRow(100 + n, bytes(15) + bytes([n]), 1000 + n, bytes([n])) for n in numbers]

    def changes(
        writer: Writer, info: CollectionInfo
    ) -> list[tuple[tuple[int, bytes], BaseRow, EntityRow | None]]:
        writer._stale_rows_max = stale
        if twice:  # its place in the feed is of this very commit
            row = EntityRow(8, 0, 3, bytes(16), 5, 0, b"\x18\x63")
            first = (info.number, uid(numbers[0]).bytes)
            writer.show(first, row, writer.entity(first), 6)
        keys = [info.prefix + uid(n).bytes for n in numbers]
        refs = [(info.number, uid(n).bytes) for n in numbers]
        return list(zip(refs, remotes, writer.entities(keys), strict=True))

    def columns(writer: Writer, info: CollectionInfo) -> None:
        writer.show_all(changes(writer, info), 7)

    def each(writer: Writer, info: CollectionInfo) -> None:
        for ref, new, old in changes(writer, info):
            row = EntityRow(8, 0, new.version, new.device_id, new.timestamp, 0, new.payload)
            writer.show(ref, row, old, 7)

    assert done(database, columns) == done(database, each)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["new", "over", "gone"]), st.integers(0, 3)),
        min_size=1,
        max_size=5,
    ),
    odd=st.sampled_from(["", "sequence", "base"]),
)
def test_cleaning_in_columns_is_cleaning_one_by_one(rows: list[tuple[str, int]], odd: str) -> None:
    database = Database(MemoryStorage(), entropy=random.Random(1).randbytes, clock=FakeClock())
    notes = database.collection("notes")
    with database.write() as writer:
        info = writer.collection("notes")
        for number, (kind, _) in enumerate(rows):
            if kind != "new":
                row = EntityRow(8, 0, 3, bytes(16), 5, 0, b"\x01")
                sequence = writer.next_sequence()
                writer.show((info.number, uid(number).bytes), row, None, sequence)
    sequences = []
    for number, (kind, _) in enumerate(rows):
        if kind == "gone":
            del notes[uid(number)]
        else:
            notes[uid(number)] = "mine"
        sequences.append(database.sequence)
    if odd == "sequence":
        sequences[-1] += 1
    versions = [10 + number for number in range(len(rows))]
    if odd == "base":
        versions[-1] = 3
    stamps = [stamp for _, stamp in rows]

    def given_to(writer: Writer, info: CollectionInfo) -> tuple[list[bytes], list[bytes]]:
        keys = [info.prefix + uid(number).bytes for number in range(len(rows))]
        return keys, writer.pending_rows(keys)

    def columns(writer: Writer, info: CollectionInfo) -> bool:
        keys, raws = given_to(writer, info)
        numbers = [info.number] * len(keys)
        return writer.clean_all(numbers, keys, raws, sequences, versions, stamps)

    def each(writer: Writer, info: CollectionInfo) -> bool:
        cleaned = [
            writer.clean([info.number], [key], [raw], *rest)
            for key, raw, *rest in zip(
                *given_to(writer, info), sequences, versions, stamps, strict=True
            )
        ]
        if not all(cleaned):
            writer.changes.clear()
        return all(cleaned)

    expected = done(database, each)
    assert done(database, columns) == expected
    assert expected[0] is (not odd or (odd == "base" and rows[-1][0] == "new"))


@given(
    page=st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=8),
    known=st.booleans(),
)
def test_staging_in_columns_is_staging_one_by_one(
    page: list[tuple[int, bool]], known: bool
) -> None:
    database = filled(Role.DEVICE)
    ids = [uid(number).bytes for number, _ in page]
    payloads = [b"\x05" if there else None for _, there in page]
    device = bytes(15) + b"\x07"
    versions = range(len(page))
    devices, timestamps = [device] * len(page), [70 + n for n in versions]

    rows = rows_of_columns(versions, devices, timestamps, payloads, gone=None in payloads)

    def columns(writer: Writer, info: CollectionInfo) -> bool:
        target = info.standing_in(77) if known else None
        return writer.stage_entities([target], [0] * len(ids), ids, rows)

    def each(writer: Writer, info: CollectionInfo) -> bool:
        target, seen = info.standing_in(77), set[bytes]()
        for number, (entity_id, payload) in enumerate(zip(ids, payloads, strict=True)):
            if not known or payload is None:
                continue
            if entity_id in seen:
                return False
            seen.add(entity_id)
            written = number, device, 70 + number
            assert writer.stage_entity(target, entity_id, payload, *written, unseen=True) == 1
        return True

    expected, found = done(database, each), done(database, columns)
    assert found[0] is expected[0]
    if expected[0]:
        assert found == expected


def test_rows_of_a_segment_are_those_of_columns() -> None:
    versions, times = [1, 2**64 - 1], [2**63, 0]
    devices, payloads = [uid(1).bytes, uid(2).bytes], [b"\x05", b"\xa0" * 300]
    written = [struct.pack(">Q16sQ", *row) for row in zip(versions, devices, times, strict=True)]
    made = rows_of_columns(versions, devices, times, payloads, gone=False)
    assert rows_of_segment(written, payloads) == made
    assert rows_of_columns(versions, devices, times, payloads, gone=True) == made


def test_a_change_that_is_staged_late_takes_the_place_of_an_older_one() -> None:
    database = filled(Role.DEVICE)

    def act(writer: Writer, info: CollectionInfo) -> list[Any]:
        target, one, device = info.standing_in(77), uid(1).bytes, bytes(16)
        steps: list[tuple[bytes | None, int]] = [
            (b"\x01", 5),
            (b"\x02", 4),
            (b"\x03", 6),
            (None, 7),
        ]
        by = [
            writer.stage_entity(target, one, payload, version, device, 9, unseen=False)
            for payload, version in steps
        ]
        return [by, writer.get(target.prefix + one)]

    answer, _, told = done(database, act)
    assert answer == [[1, 0, 0, -1], None]
    assert [(old, new) for _, _, old, new in told] == [
        (None, b"\x01"),
        (b"\x01", b"\x03"),
        (b"\x03", None),
    ]


def test_a_row_that_is_stored_is_the_one_that_was_meant() -> None:
    """The forms in columns pack what ``EntityRow`` packs."""
    database = filled(Role.SERVER)
    with database.view() as view:
        info = view.collection("notes")
        raw = view.accept(info, uid(9).bytes, None, b"\x01", 50, bytes(16), 60)
        assert decode_entity(raw).encode() == raw
        gone = view.accept(info, uid(9).bytes, raw, None, 51, bytes(16), 61)
        assert decode_entity(gone) == EntityRow(9, 51, 51, bytes(16), 61, 0, None)

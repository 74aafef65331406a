"""Pages of a pull in both of their forms: what is on them, where they end (R19, R21, R31)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db.records import ENTITY, end_of, pack_entity, payload_of, unpack_entity
from entidb.errors import CorruptionError
from entidb.protocol import (
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushTransaction,
    expanded,
)
from entidb.server import pages
from entidb.server.hooks import Grant
from entidb.server.pages import (
    OPERATION_OVERHEAD_BYTES,
    PAGE_BYTES_MAX,
    READ_FAR_MAX,
    READ_ROWS,
    READ_ROWS_MAX,
)
from entidb.server.service import RECENT_COMMITS
from entidb.storage import MemoryStorage
from tests.support import GRANT, World, uid

Row = tuple[int, str, bytes, bytes | None]

forms = pytest.mark.parametrize("columns", [False, True], ids=["commits", "columns"])


def asked(world: World, **changes: Any) -> PullRequest:
    assert world.server.history is not None
    made = PullRequest(
        db_id="shop",
        device_id=b"d" * 16,
        history=world.server.history,
        cursor=0,
        limit=1000,
        bytes_max=1 << 20,
    )
    return replace(made, **changes)


def pull(world: World, grant: Grant = GRANT, **changes: Any) -> PullResponse:
    """One page with commits, after a look that it is the same in columns."""
    page = world.service.pull(asked(world, **changes), grant)
    columns = world.service.pull(asked(world, columns=True, **changes), grant)
    assert (page.columns, columns.commits) == (None, [])
    assert columns.columns is not None
    assert expanded(columns) == page
    return page


def rows_of(page: PullResponse) -> list[Row]:
    return [
        (commit.version, page.collections[op.collection], op.entity_id, op.payload)
        for commit in page.commits
        for op in commit.operations
    ]


def log(world: World) -> list[Row]:
    """What the server's own feed has."""
    return [
        (event.sequence, event.collection, event.entity_id.bytes, event.payload)
        for event in world.server.changes()
        if event.entity_id is not None
    ]


def busy() -> World:
    """Commits of one to seven operations in three collections, with deletions among them, and
    values from nothing to a few hundred bytes."""
    world = World()
    names = ("notes", "tasks", "other")
    for n in range(60):
        writes = [(names[(n + m) % 3], (n * 7 + m) % 90, "x" * (n * m % 300)) for m in range(7)]
        world.put(*writes[: n % 7 + 1])
    for n in range(0, 60, 4):
        for name in names:
            if uid(n) in world.server.collection(name):
                world.put((name, n, None))
    return world


def ends_before(rows: Sequence[Row], bytes_max: int) -> int:
    """How many of ``rows`` a page of so many bytes has: a commit begins while there is room, and
    is taken whole."""
    size = last = 0
    for at, (version, _, _, payload) in enumerate(rows):
        if version != last and size >= bytes_max:
            return at
        last = version
        size += OPERATION_OVERHEAD_BYTES + len(payload or b"")
    return len(rows)


# ---------------------------------------------------------------- what is on a page


def test_r19_a_page_of_everything_is_the_log() -> None:
    world = busy()
    page = pull(world)
    assert rows_of(page) == log(world)
    assert page.cursor == page.head == world.server.sequence
    assert not page.has_more
    stamps = {event.sequence: event.timestamp for event in world.server.changes()}
    for commit in page.commits:
        assert (commit.device_id, commit.timestamp) == (
            world.server.device_id,
            stamps[commit.version],
        )


@pytest.mark.parametrize("bytes_max", [1, 31, 32, 33, 64, 100, 333, 1000, 3000, 10_000, 1 << 20])
def test_r19_a_page_takes_commits_for_as_long_as_it_has_room(bytes_max: int) -> None:
    world, cursor, seen = busy(), 0, 0
    rows = log(world)
    while True:
        page = pull(world, cursor=cursor, bytes_max=bytes_max)
        count = ends_before(rows[seen:], bytes_max)
        assert rows_of(page) == rows[seen : seen + count]
        seen += count
        assert page.has_more == (seen < len(rows))
        assert page.cursor == (rows[seen - 1][0] if page.has_more else world.server.sequence)
        if not page.has_more:
            return
        cursor = page.cursor


@pytest.mark.parametrize("bytes_max", [200, 1 << 20])
@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_r31_pages_of_a_scope_have_together_what_is_in_it(limit: int, bytes_max: int) -> None:
    world, cursor = busy(), 0
    seen: list[Row] = []
    have = [(3, 5), (20, 20), (30, 41)]
    grant = Grant("reader", True, False, frozenset({"notes", "other"}))
    more = True
    while more:
        page = pull(
            world,
            grant,
            cursor=cursor,
            have=[pair for pair in have if pair[1] > cursor],
            collections=["other", "tasks", "notes"],
            limit=limit,
            bytes_max=bytes_max,
        )
        assert page.cursor > cursor
        seen += rows_of(page)
        cursor, more = page.cursor, page.has_more
    assert seen == [
        row
        for row in log(world)
        if row[1] != "tasks" and not any(first <= row[0] <= last for first, last in have)
    ]
    assert cursor == world.server.sequence


def test_r31_a_scope_chooses_among_what_the_token_grants() -> None:
    world = World()
    for name in ("a", "b", "c"):
        world.put((name, 1, "x"))
    for wanted, allowed, expected in (
        (["a", "b"], None, ["a", "b"]),
        (None, {"b", "c"}, ["b", "c"]),
        (["a", "b"], {"b", "c"}, ["b"]),
        ([], None, []),
        (None, set(), []),
    ):
        grant = Grant("reader", True, False, None if allowed is None else frozenset(allowed))
        assert pull(world, grant, collections=wanted).collections == expected


def test_r31_what_is_local_on_the_server_is_for_no_device() -> None:
    world = World()
    world.server.declare_local("here")
    world.put(("here", 1, "x"), ("notes", 1, "x"))
    world.put(("here", 2, "x"))
    world.put(("notes", 2, "x"))
    for wanted in (None, ["here", "notes"]):
        page = pull(world, collections=wanted, full=True)
        assert (page.collections, page.cursor) == (["notes"], world.server.sequence)
        # None of it is counted either.
        page = pull(world, collections=wanted, full=True, limit=1)
        assert (page.has_more, page.live) == (True, 2)


def test_r19_a_page_asked_for_without_anything_on_it_has_a_commit_all_the_same() -> None:
    world = World()
    world.put(("notes", 1, "x"), ("notes", 2, "x"))
    world.put(("notes", 3, "x"))
    page = pull(world, limit=0)
    assert (len(rows_of(page)), page.cursor, page.has_more) == (2, 1, True)
    world = World()
    for n in range(3):
        world.put(("notes", n, "x"))
    for limit in (0, 1):
        page = pull(world, limit=limit)
        assert (len(rows_of(page)), page.cursor, page.has_more) == (1, 1, True)


def test_a_page_of_everything_that_goes_on_says_how_many_entities_there_are() -> None:
    world = World()
    world.put(("notes", 1, "x"), ("notes", 2, "x"), ("tasks", 1, "x"), ("other", 1, "x"))
    world.put(("notes", 2, None))
    grant = Grant("reader", True, False, frozenset({"notes", "tasks"}))
    first = pull(world, grant, limit=1, full=True)
    assert (first.has_more, first.live) == (True, 2)
    last = pull(world, grant, cursor=first.cursor, full=True)
    assert (last.has_more, last.live) == (False, None)
    delta = pull(world, grant, limit=1)
    assert (delta.has_more, delta.live) == (True, None)


@forms
def test_a_page_of_a_state_is_of_that_state(columns: bool) -> None:
    world = World()
    world.put(("notes", 1, "x"))
    with world.server.view() as view:
        before = world.service.pull_bytes(asked(world, columns=columns), GRANT)
        world.put(("notes", 2, "later"))
        shown = world.service.pull_bytes(asked(world, columns=columns), GRANT, view)
    assert shown == before != world.service.pull_bytes(asked(world, columns=columns), GRANT)


def test_who_wants_to_know_of_pages_is_told_where_each_leads_to() -> None:
    world = World()
    for n in range(2):
        world.put(("notes", n, "x"))
    told: list[tuple[PullRequest, int]] = []
    world.service.on_page = lambda request, cursor: told.append((request, cursor))
    requests = [asked(world, limit=1), asked(world, cursor=1)]
    for request in requests:
        world.service.pull(request, GRANT)
    assert told == [(requests[0], 1), (requests[1], 2)]


def test_r19_a_page_that_names_enough_collections_where_a_read_ends_is_cut_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages, "PAGE_NAMES_MAX", 5)
    world = World()
    for n in range(READ_ROWS + 1):
        # The last four of the first read are the only ones in their collections.
        world.put((f"c{n}" if 0 < READ_ROWS - n < 5 else "c", n, "x"))
    page = pull(world)
    assert (len(page.collections), page.cursor, page.has_more) == (5, READ_ROWS, True)
    page = pull(world, collections=page.collections[:4])
    assert (len(page.collections), page.cursor, page.has_more) == (4, READ_ROWS + 1, False)


def test_r19_the_server_bounds_the_bytes_of_a_page_too() -> None:
    world = World()
    for n in range(3):
        world.put(("notes", n, "x" * (PAGE_BYTES_MAX // 2)))
    page = pull(world, bytes_max=1 << 40)
    assert (len(page.commits), page.has_more) == (2, True)


# ---------------------------------------------------------------- reading


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are read at a time, from now on."""
    sizes: list[int] = []
    kind = type(MemoryStorage().snapshot())
    get_many: Any = kind.get_many

    def watching(self: Any, keys: Sequence[bytes]) -> list[bytes | None]:
        sizes.append(len(keys))
        found: list[bytes | None] = get_many(self, keys)
        return found

    monkeypatch.setattr(kind, "get_many", watching)
    return sizes


def reads(monkeypatch: pytest.MonkeyPatch, world: World, **changes: Any) -> list[int]:
    """How many entities are read at a time while a page fills."""
    with monkeypatch.context() as patched:
        sizes = watch_reads(patched)
        world.service.pull_bytes(asked(world, **changes), GRANT)
    return sizes


@forms
def test_more_small_entities_are_read_at_a_time_and_few_large_ones(
    monkeypatch: pytest.MonkeyPatch, columns: bool
) -> None:
    world = World()
    world.put(*[("notes", n, "x") for n in range(100)])
    few, many = READ_ROWS, READ_ROWS_MAX
    assert reads(monkeypatch, world, columns=columns) == [few, many, 100 - few - many]
    world = World()
    for n in range(100):
        world.put(("notes", n, "x" * (1000 - OPERATION_OVERHEAD_BYTES - 3)))
    # Each counts a thousand bytes: 40 of them fill the page.
    assert reads(monkeypatch, world, columns=columns, bytes_max=40_000) == [few, 23, few]


@forms
def test_as_many_small_entities_are_read_as_the_page_has_room_for(
    monkeypatch: pytest.MonkeyPatch, columns: bool
) -> None:
    world = World()
    for n in range(100):
        world.put(("notes", n, "x" * (54 - OPERATION_OVERHEAD_BYTES - 1)))
    # Each counts 54 bytes, one less than the mean that is reckoned with: 4,000 hold 74 of them.
    rest = (4000 - READ_ROWS * 54) // 55
    assert reads(monkeypatch, world, columns=columns, bytes_max=4000)[:2] == [READ_ROWS, rest]


def test_r19_a_page_that_is_full_where_a_read_ends_is_cut_there() -> None:
    world = World()
    for n in range(READ_ROWS + 1):
        world.put(("notes", n, "x" * (100 - OPERATION_OVERHEAD_BYTES - 2)))
    page = pull(world, bytes_max=100 * READ_ROWS)
    assert (len(page.commits), page.cursor, page.has_more) == (READ_ROWS, READ_ROWS, True)


@pytest.mark.parametrize("place", [0, 1, 20])
@pytest.mark.parametrize("by", [None, 100, -1], ids=["gone", "newer", "older"])
@forms
def test_a_log_that_names_what_is_not_there_is_reported_with_its_place(
    place: int, by: int | None, columns: bool
) -> None:
    world = World()
    for n in range(30):
        world.put(("notes", n, "x"))
    with world.server_storage.snapshot() as snapshot:
        key, raw = snapshot.scan(ENTITY, end_of(ENTITY))[place]
    flags, sequence, version, device, stamp = unpack_entity(raw)
    payload = payload_of(raw)
    assert payload is not None
    other = None
    if by is not None:
        other = pack_entity(flags, sequence, version + by, device, stamp) + payload
    world.server_storage.inner.commit({key: other})
    with pytest.raises(CorruptionError) as caught:
        world.service.pull(asked(world, columns=columns), GRANT)
    assert f"commit {place + 1} for {uid(place).hex}" in str(caught.value)
    assert ("not there" in str(caught.value)) == (by is None)


# ---------------------------------------------------------------- the newest few


def test_a_pull_is_recent_up_to_so_many_commits_behind_the_head() -> None:
    world = World()
    for n in range(RECENT_COMMITS + 1):
        world.put(("notes", n, "x"))
    pull(world)
    service = world.service
    assert not service.is_recent(asked(world))
    assert service.is_recent(asked(world, cursor=1))
    assert service.is_recent(asked(world, have=[(1, 1)]))
    assert not service.is_recent(asked(world, cursor=1, full=True))


def test_a_push_moves_the_head_that_recent_pulls_are_measured_by() -> None:
    world = World()
    writes = [
        PushTransaction(uid(n).bytes, 1, [PushOperation(0, uid(n).bytes, 0, b"\x01")])
        for n in range(RECENT_COMMITS + 1)
    ]
    pull_request = asked(world)
    push = PushRequest(
        db_id="shop",
        device_id=pull_request.device_id,
        history=pull_request.history,
        cursor=0,
        collections=["notes"],
        transactions=writes,
    )
    assert world.service.is_recent(pull_request)
    world.service.push_many([(push, GRANT)])
    assert not world.service.is_recent(pull_request)


# ---------------------------------------------------------------- the wire is not the disk


@forms
def test_another_layout_of_rows_on_the_disk_changes_no_byte_of_a_page(
    columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = busy()
    request = asked(world, columns=columns, bytes_max=5000)
    before = world.service.pull_bytes(request, GRANT)

    def moved(row: bytes) -> bytes:
        """The fields in another order and width, behind the payload."""
        device: bytes
        _, _, version, device, stamp = unpack_entity(row)
        payload = payload_of(row)
        value = b"-" if payload is None else b"+" + payload
        return value + b"|%d|%d|" % (stamp, version) + device

    def fields(rows: Sequence[bytes]) -> list[object]:
        found: list[object] = []
        for row in rows:
            stamp, version = row[:-17].rsplit(b"|", 2)[1:]
            found += (int(version), row[-16:], int(stamp))
        return found

    def payloads(rows: Sequence[bytes]) -> list[bytes | None]:
        values = [row[:-17].rsplit(b"|", 2)[0] for row in rows]
        return [None if value == b"-" else value[1:] for value in values]

    monkeypatch.setattr(pages, "shown_fields", lambda rows: fields(list(map(moved, rows))))
    monkeypatch.setattr(pages, "payloads_of", lambda rows: payloads(list(map(moved, rows))))
    assert world.service.pull_bytes(request, GRANT) == before
    assert len(before) > 5000


def test_neither_server_nor_sync_nor_protocol_knows_how_wide_a_row_is() -> None:
    source = Path(pages.__file__).parent.parent
    widths = re.compile(r"\b(ENTITY_HEAD|PENDING_HEAD|OUTBOX_FIRST|(un)?pack_(entity|pending))\b")
    found = {
        path.relative_to(source).as_posix()
        for room in ("server", "sync", "protocol")
        for path in (source / room).rglob("*.py")
        if widths.search(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def weighed(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """The store says what the values of up to 600 keys weigh: of how many keys it was asked that,
    and how many entities were read at a time."""
    weighed: list[int] = []
    read: list[int] = []
    snapshot = type(world.server_storage.snapshot())
    original = snapshot.get_many

    def weigh(self: Any, keys: Sequence[bytes]) -> int | None:
        weighed.append(len(keys))
        if len(keys) > 600:
            return None
        return sum(len(value or b"") for value in original(self, keys))

    def get_many(self: Any, keys: Any) -> Any:
        if keys and keys[0].startswith(ENTITY):
            read.append(len(keys))
        return original(self, keys)

    monkeypatch.setattr(snapshot, "weigh", weigh, raising=False)
    monkeypatch.setattr(snapshot, "get_many", get_many)
    return weighed, read


def test_a_store_that_weighs_first_is_read_many_at_a_time(
    world: World, weighed: tuple[list[int], list[int]]
) -> None:
    world.put(*[("notes", number, "x") for number in range(1, 1200)])
    asked_of, read = weighed
    read.clear()
    page = world.service.pull(asked(world, limit=5000), GRANT)
    assert len(page.commits[0].operations) == 1199
    assert read == [READ_ROWS, READ_FAR_MAX, READ_FAR_MAX, 1199 - READ_ROWS - 2 * READ_FAR_MAX]
    assert asked_of == read[1:]


def test_what_weighs_too_much_is_read_few_at_a_time(
    world: World, weighed: tuple[list[int], list[int]]
) -> None:
    # Small ones come first, so that a guess from those that were read would take them all at once.
    for number in range(1, 40):
        world.put(("notes", number, "x"))
    for number in range(40, 140):
        world.put(("notes", number, "x" * 100_000))
    asked_of, read = weighed
    read.clear()
    page = world.service.pull(asked(world, limit=5000, bytes_max=PAGE_BYTES_MAX), GRANT)
    assert page.has_more and max(read) <= READ_ROWS_MAX
    assert asked_of == [139 - READ_ROWS]  # and no more for this page


def test_a_store_that_cannot_weigh_is_asked_once_in_a_page(
    world: World, weighed: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "READ_FAR_MAX", 700)
    world.put(*[("notes", number, "x") for number in range(1, 1200)])
    asked_of, read = weighed
    read.clear()
    world.service.pull(asked(world, limit=5000), GRANT)
    assert asked_of == [700] and max(read) == READ_ROWS_MAX

"""Images and their segments: made, kept, pinned, served, dropped (R35)."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db import Database, Role, purge_tombstones
from entidb.db.images import read_images
from entidb.db.maintenance import read_floor
from entidb.errors import AuthenticationError, ServerBusyError, StorageFullError
from entidb.packing import ENCODINGS
from entidb.protocol import (
    ErrorResponse,
    HandshakeResponse,
    Manifest,
    PullResponse,
    SegmentInfo,
    SnapshotRequest,
    decode,
    decode_segment,
    expanded,
    segment_rows,
)
from entidb.server import Grants, Rights, ServerConfig, SyncServer
from entidb.server.segments import building
from entidb.server.segments import files as segment_files
from entidb.server.segments.building import UNUSED_MS, Pauses, StoppedError
from entidb.server.segments.cutting import Sizes
from entidb.server.segments.files import KeptImage
from entidb.server.segments.keeping import LIFE_MS
from entidb.server.segments.places import FOLDER
from entidb.server.segments.rows import change_images
from entidb.server.wire import ServerResponse
from entidb.types import SeenCommit
from tests.server.support import DEVICE, ManualClock, handshake, number_id, pull

PIN_MS = 2 * LIFE_MS
TINY = Sizes(2_000, 2_000)
LEAST = 50
WAIT_S = 60.0


def granting(token: str | None) -> Grants:
    """``shop``: all of it; ``shop:notes,lists``: these; ``-``: writing only."""
    if token is None:
        raise AuthenticationError("a token is needed")
    name, _, collections = token.partition(":")
    named = frozenset(collections.split(",")) if collections else None
    rights = Rights(read=not name.startswith("-"), write=True, collections=named)
    return Grants("ada", {name.strip("-"): rights})


def fill(database: Database, numbers: range, collection: str = "notes", text: str = "v") -> None:
    with database.transaction() as tx:
        for number in numbers:
            value = {"text": f"{text} {number}" + "x" * (number % 50)}
            tx.collection(collection)[uuid.UUID(int=number)] = value


def make(clock: ManualClock, data_dir: Path | None = None, **settings: Any) -> SyncServer:
    options = {"segments_min_entities": LEAST, "authenticator": granting, **settings}
    if data_dir is None:
        server = SyncServer.in_memory(clock=clock, **options)
    else:
        server = SyncServer(ServerConfig(data_dir=data_dir, **options), clock=clock)
    server.images.sizes = TINY
    server.images.background = False
    return server


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory", "disk"])
def server(request: pytest.FixtureRequest, clock: ManualClock, tmp_path: Path):
    with make(clock, tmp_path / "data" if request.param == "disk" else None) as made:
        yield made


@pytest.fixture
def shop(server: SyncServer) -> Database:
    database = server.database("shop")
    fill(database, range(200))
    fill(database, range(20), "lists")
    return database


def asked(server: SyncServer, token: str = "shop", **fields: Any) -> Manifest:
    answer = asked_or_error(server, token, **fields)
    assert isinstance(answer, Manifest), answer
    return answer


def asked_or_error(server: SyncServer, token: str, **fields: Any) -> Any:
    request = SnapshotRequest(
        **{"db_id": "shop", "device_id": DEVICE, "packings": [*ENCODINGS], **fields}
    )
    return server.handle("/v1/snapshot", token, request)


def fetch(
    server: SyncServer, sha256: bytes, token: str = "shop", method: str = "GET", **headers: str
) -> ServerResponse:
    return server.handle_http(
        method,
        f"/v1/segments/{sha256.hex()}?db_id={token.strip('-').partition(':')[0]}",
        {"authorization": f"Bearer {token}"}
        | {name.replace("_", "-"): value for name, value in headers.items()},
        b"",
    )


def code_of(response: ServerResponse) -> str:
    return decode(ErrorResponse, response.body).code


def downloaded(
    server: SyncServer, manifest: Manifest, token: str = "shop"
) -> dict[tuple[str, bytes], tuple[int, bytes | None]]:
    """Everything that the segments hold, each proved as a device has to."""
    entities: dict[tuple[str, bytes], tuple[int, bytes | None]] = {}
    for info in manifest.segments:
        response = fetch(server, info.sha256, token)
        assert response.status == 200
        assert hashlib.sha256(response.body).digest() == info.sha256
        assert len(response.body) == info.bytes
        header, columns = decode_segment(response.body)
        name = manifest.collections[info.collection]
        assert (header.collection, header.rows) == (name, info.rows)
        assert (header.first, header.last) == (info.first, info.last)
        rows = segment_rows(columns)
        for entity_id, version, payload in zip(rows.ids, rows.versions, rows.payloads, strict=True):
            assert version <= manifest.head
            entities[name, entity_id] = version, payload
    assert len(entities) == manifest.entities
    return entities


def pulled(server: SyncServer, cursor: int = 0) -> dict[tuple[str, bytes], tuple[int, Any]]:
    history = server.database("shop").history
    assert history is not None
    answer = server.handle("/v1/pull", "shop", pull(history, cursor=cursor, full=not cursor))
    assert isinstance(answer, PullResponse), answer
    page = expanded(answer)
    assert not page.has_more
    return {
        (page.collections[op.collection], op.entity_id): (commit.version, op.payload)
        for commit in page.commits
        for op in commit.operations
    }


def names_of(server: SyncServer) -> list[str]:
    folder = Path(str(server.config.data_dir)) / FOLDER / "shop.entidb"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


# ---------------------------------------------------------------- made


def test_an_image_holds_what_a_full_pull_brings(server: SyncServer, shop: Database):
    with shop.transaction() as tx:
        del tx.collection("notes")[uuid.UUID(int=7)]
    assert server.images.make("shop")
    manifest = asked(server)
    assert manifest.history == shop.history
    assert manifest.head == shop.read_head().sequence
    assert manifest.collections == ["lists", "notes"]
    assert len(manifest.segments) > 3
    there = {place: row for place, row in pulled(server).items() if row[1] is not None}
    assert downloaded(server, manifest) == there


def test_what_follows_an_image_comes_with_a_pull_from_its_head(server: SyncServer, shop: Database):
    server.images.make("shop")
    manifest = asked(server)
    fill(shop, range(190, 210), text="newer")
    with shop.transaction() as tx:
        del tx.collection("notes")[uuid.UUID(int=3)]
    manifest = asked(server)
    assert manifest.head < shop.read_head().sequence
    entities = downloaded(server, manifest) | pulled(server, manifest.head)
    assert {place: row for place, row in entities.items() if row[1] is not None} == {
        place: row for place, row in pulled(server).items() if row[1] is not None
    }


def test_a_small_database_has_no_image(server: SyncServer):
    fill(server.database("shop"), range(LEAST - 1))
    assert not server.images.make("shop")
    manifest = asked(server)
    assert (manifest.segments, manifest.entities) == ([], 0)
    assert manifest.head == server.database("shop").read_head().sequence


def test_with_0_no_images_are_made_and_the_feature_is_not_announced(clock: ManualClock):
    for least, announced in ((0, False), (LEAST, True)):
        with make(clock, segments_min_entities=least) as server:
            fill(server.database("shop"), range(100))
            answer = server.handle("/v1/handshake", "shop", handshake())
            assert isinstance(answer, HandshakeResponse)
            assert ("segments" in answer.features) is announced
            assert server.images.make("shop") is announced
            assert bool(asked(server).segments) is announced


def test_images_are_named_to_devices_of_a_database_that_may_have_one(server: SyncServer):
    def named(db_id: str) -> bool:
        answer = server.handle("/v1/handshake", db_id, handshake())
        assert isinstance(answer, HandshakeResponse)
        return "segments" in answer.features

    shop = server.database("shop")
    fill(shop, range(LEAST - 1))
    assert not named("shop"), "it would be asked for, and there would be none"
    fill(shop, range(LEAST))
    assert named("shop")
    assert server.images.make("shop")
    with shop.transaction() as tx:
        for number in range(LEAST):
            del tx.collection("notes")[uuid.UUID(int=number)]
    assert named("shop"), "there is one of before"


def test_a_request_makes_no_database(server: SyncServer):
    answer = asked_or_error(server, "other", db_id="other")
    assert isinstance(answer, ErrorResponse)
    assert answer.code == "unknown_database"


def test_another_image_is_due_when_a_tenth_has_changed_and_somebody_has_asked(
    server: SyncServer, shop: Database
):
    images = server.images
    assert images.make("shop")
    fill(shop, range(60), text="new")
    assert not images.make("shop")  # nobody has asked for the first one
    first = asked(server)
    assert images.make("shop")
    second = asked(server)
    assert second.head > first.head
    fill(shop, range(10), text="newest")
    assert not images.make("shop")  # less than a tenth
    assert downloaded(server, first)  # a device may still be on its way with it


def test_unchanged_segments_are_kept_from_one_image_to_the_next(server: SyncServer, shop: Database):
    server.images.make("shop")
    first = asked(server)
    fill(shop, range(60, 85), text="changed")
    server.images.make("shop")
    second = asked(server)
    assert second.head > first.head
    common = {each.sha256 for each in first.segments} & {each.sha256 for each in second.segments}
    assert 2 * len(common) > len(first.segments)
    changed = {each.sha256 for each in second.segments} - common
    assert 0 < len(changed) < len(second.segments) / 2
    assert downloaded(server, second)


def test_two_images_are_kept_at_most_and_the_older_one_goes_when_its_time_is_over(
    server: SyncServer, shop: Database, clock: ManualClock
):
    images = server.images
    images.make("shop")
    first = asked(server)
    fill(shop, range(60), text="second")
    assert images.make("shop")
    second = asked(server)
    fill(shop, range(60), text="third")
    assert not images.make("shop")
    clock.advance(LIFE_MS / 1000 + 1)
    assert asked(server).head == second.head
    assert not images.make("shop")
    clock.advance(LIFE_MS / 1000)
    assert images.make("shop")
    assert asked(server).head > second.head
    gone = {each.sha256 for each in first.segments} - {each.sha256 for each in second.segments}
    assert gone
    for sha256 in gone:
        assert code_of(fetch(server, sha256)) == "not_found"
    assert downloaded(server, second)


def test_an_image_that_nobody_asks_for_goes_and_comes_again_when_somebody_does(
    server: SyncServer, shop: Database, clock: ManualClock
):
    images = server.images
    images.make("shop")
    (segment, *_) = asked(server).segments
    clock.advance((PIN_MS + UNUSED_MS) / 1000 + 1)
    assert not images.make("shop")
    assert not images.make("shop")
    assert code_of(fetch(server, segment.sha256)) == "not_found"
    assert asked(server).segments == []
    assert images.make("shop")
    assert asked(server).segments


def test_a_request_that_finds_no_image_has_one_made(server: SyncServer, shop: Database):
    server.images.background = True
    assert asked(server).segments == []
    wait_until(lambda: bool(asked(server).segments))


def wait_until(true: Callable[[], bool]) -> None:
    end = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if true():
            return
        end.wait(0.01)
    raise AssertionError("it did not come to be")


def test_housekeeping_has_images_made_on_a_thread(server: SyncServer, shop: Database):
    server.images.background = True
    server.housekeep()
    wait_until(lambda: bool(asked(server).segments))
    assert downloaded(server, asked(server))
    assert "entidb-segments" in {thread.name for thread in threading.enumerate()}
    server.close()
    assert "entidb-segments" not in {thread.name for thread in threading.enumerate()}


def test_a_device_that_cannot_unpack_it_gets_no_image(server: SyncServer, shop: Database):
    server.images.make("shop")
    assert asked(server).segments
    assert asked(server, packings=["brotli"]).segments == []
    assert asked(server, packings=[]).segments == []


def test_a_device_that_unpacks_only_gzip_has_an_image_made_beside_that_of_the_others(
    server: SyncServer, shop: Database, clock: ManualClock
):
    best = ENCODINGS[0]
    if best == "gzip":
        pytest.skip("this server packs with nothing better")
    images = server.images
    images.make("shop")
    assert asked(server, packings=["gzip"]).segments == []
    assert images.make("shop")
    plain = asked(server, packings=["gzip"])
    assert {each.packing for each in plain.segments} == {"gzip"}
    assert downloaded(server, plain) == downloaded(server, asked(server))
    assert {each.packing for each in asked(server).segments} == {best}
    assert not images.make("shop")
    # Each is made anew when it is due, for those who ask for it.
    fill(shop, range(60), text="new")
    assert images.make("shop")
    newer = asked(server, packings=["gzip"])
    assert newer.head == asked(server).head > plain.head
    assert downloaded(server, plain)
    # And the one that nobody asks for goes alone.
    for _ in range(8):
        clock.advance(24 * 3_600)
        asked(server)
        images.make("shop")
    assert asked(server, packings=["gzip"]).segments == []
    assert asked(server).segments


def test_a_request_that_finds_no_image_it_can_unpack_has_one_made(
    server: SyncServer, shop: Database
):
    server.images.make("shop")
    server.images.background = True
    wait_until(lambda: bool(asked(server, packings=["gzip"]).segments))


# ---------------------------------------------------------------- who may have it


def test_an_image_names_what_is_granted_and_asked_for(server: SyncServer, shop: Database):
    server.images.make("shop")
    some = asked(server, "shop:lists,other")
    assert (some.collections, some.granted) == (["lists"], ["lists", "other"])
    assert {name for name, _ in downloaded(server, some, "shop:lists,other")} == {"lists"}
    narrow = asked(server, collections=["lists", "none"])
    assert (narrow.collections, narrow.entities) == (["lists"], 20)
    assert asked(server, collections=["none"]).segments == []


def test_a_segment_is_for_those_who_may_read_its_collection(server: SyncServer, shop: Database):
    server.images.make("shop")
    manifest = asked(server)
    notes = next(
        each for each in manifest.segments if manifest.collections[each.collection] == "notes"
    )
    lists = next(
        each for each in manifest.segments if manifest.collections[each.collection] == "lists"
    )
    assert fetch(server, lists.sha256, "shop:lists").status == 200
    assert code_of(fetch(server, notes.sha256, "shop:lists")) == "forbidden"
    assert code_of(fetch(server, notes.sha256, "-shop")) == "forbidden"
    answer = asked_or_error(server, "-shop")
    assert isinstance(answer, ErrorResponse) and answer.code == "forbidden"
    path = f"/v1/segments/{notes.sha256.hex()}?db_id=shop"
    assert server.handle_http("GET", path, {}, b"").status == 401


def test_who_is_revoked_gets_neither_image_nor_segment(server: SyncServer, shop: Database):
    from entidb.server.control import Revoked

    server.images.make("shop")
    (segment, *_) = asked(server).segments
    server.front.control.revoke(Revoked("device", DEVICE.hex(), 0, "ops"))
    answer = asked_or_error(server, "shop")
    assert isinstance(answer, ErrorResponse) and answer.details == {"reason": "revoked"}
    path = f"/v1/segments/{segment.sha256.hex()}?db_id=shop&device_id={DEVICE.hex()}"
    refused = server.handle_http("GET", path, {"authorization": "Bearer shop"}, b"")
    assert code_of(refused) == "forbidden"


def test_a_segment_of_another_database_is_not_found(server: SyncServer, shop: Database):
    fill(server.database("bank"), range(100), text="bank")
    server.images.make("shop")
    server.images.make("bank")
    answer = asked_or_error(server, "bank", db_id="bank")
    assert isinstance(answer, Manifest)
    (segment, *_) = answer.segments
    assert fetch(server, segment.sha256, "bank").status == 200
    assert code_of(fetch(server, segment.sha256, "shop")) == "not_found"


def test_an_image_of_another_history_does_not_count(server: SyncServer, shop: Database):
    server.images.make("shop")
    manifest = asked(server)
    assert shop.begin_history(10, 1)
    assert asked(server).segments == []
    assert code_of(fetch(server, manifest.segments[0].sha256)) == "not_found"
    answer = asked_or_error(server, "shop", history=manifest.history)
    assert isinstance(answer, ErrorResponse) and answer.code == "history_changed"
    server.images.make("shop")
    assert asked(server).history == shop.history != manifest.history
    assert downloaded(server, asked(server))


def test_a_device_that_names_another_history_gets_no_segment(server: SyncServer, shop: Database):
    server.images.make("shop")
    (segment, *_) = asked(server).segments
    for history, status in ((shop.history, 200), (b"x" * 16, 404)):
        assert history is not None
        path = f"/v1/segments/{segment.sha256.hex()}?db_id=shop&history={history.hex()}"
        assert (
            server.handle_http("GET", path, {"authorization": "Bearer shop"}, b"").status == status
        )


# ---------------------------------------------------------------- HTTP


@pytest.fixture
def one(server: SyncServer, shop: Database) -> SegmentInfo:
    server.images.make("shop")
    return asked(server).segments[-1]


def test_a_segment_may_be_asked_for_in_parts(server: SyncServer, one: SegmentInfo):
    whole = fetch(server, one.sha256)
    assert whole.headers["etag"] == f'"{one.sha256.hex()}"'
    assert "immutable" in whole.headers["cache-control"]
    assert "private" in whole.headers["cache-control"]
    size = one.bytes
    for header, part in {
        "bytes=0-": range(size),
        "bytes=5-9": range(5, 10),
        "bytes=7-": range(7, size),
        "bytes=-10": range(size - 10, size),
        f"bytes=-{size + 5}": range(size),
        f"bytes=10-{10 * size}": range(10, size),
    }.items():
        answer = fetch(server, one.sha256, range=header)
        assert answer.status == 206
        assert answer.headers["content-range"] == f"bytes {part.start}-{part.stop - 1}/{size}"
        assert answer.body == whole.body[part.start : part.stop], header


@pytest.mark.parametrize(
    "header", ["bytes=", "bytes=5-2", "bytes=1-2,4-5", "rows=1-2", "x", "bytes=-"]
)
def test_a_range_that_cannot_be_read_means_all(server: SyncServer, one: SegmentInfo, header: str):
    answer = fetch(server, one.sha256, range=header)
    assert (answer.status, len(answer.body)) == (200, one.bytes)


def test_a_range_beyond_the_end_is_told_the_size(server: SyncServer, one: SegmentInfo):
    for header in (f"bytes={one.bytes}-", f"bytes={one.bytes + 9}-{one.bytes + 10}", "bytes=-0"):
        answer = fetch(server, one.sha256, range=header)
        assert (answer.status, answer.body) == (416, b"")
        assert answer.headers["content-range"] == f"bytes */{one.bytes}"


def test_tags_are_compared(server: SyncServer, one: SegmentInfo):
    tag = f'"{one.sha256.hex()}"'
    assert fetch(server, one.sha256, if_none_match=tag).status == 304
    assert fetch(server, one.sha256, range="bytes=1-2", if_range=tag).status == 206
    assert fetch(server, one.sha256, range="bytes=1-2", if_range='"other"').status == 200


def test_a_head_has_no_body(server: SyncServer, one: SegmentInfo):
    answer = fetch(server, one.sha256, method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert fetch(server, one.sha256, method="POST").status == 405


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/segments/", "not_found"),
        ("/v1/segments/" + "A" * 64 + "?db_id=shop", "not_found"),
        ("/v1/segments/" + "0" * 64 + "/x?db_id=shop", "not_found"),
        ("/v1/segments/../" + "0" * 64 + "?db_id=shop", "not_found"),
        ("/v1/segments/" + "0" * 64 + "?db_id=shop", "not_found"),
        ("/v1/segments/" + "0" * 64, "invalid_message"),
        ("/v1/segments/" + "0" * 64 + "?db_id=shop&history=1", "invalid_message"),
        ("/v1/segments/" + "0" * 64 + "?db_id=other", "forbidden"),
    ],
)
def test_an_address_that_names_no_segment_is_refused(
    server: SyncServer, shop: Database, path: str, code: str
):
    refused = server.handle_http("GET", path, {"authorization": "Bearer shop"}, b"")
    assert code_of(refused) == code


# ---------------------------------------------------------------- the floor


def test_the_floor_does_not_pass_an_image_that_a_device_may_be_on_its_way_with(
    server: SyncServer, shop: Database, clock: ManualClock
):
    server.images.make("shop")
    manifest = asked(server)
    assert manifest.ends == clock.now_ms() + LIFE_MS
    with shop.transaction() as tx:
        for number in range(5):
            del tx.collection("notes")[uuid.UUID(int=number)]
    assert purge_tombstones(shop, shop.read_head().sequence) == 0
    assert floor_of(shop) == manifest.head
    deleted = [place for place, row in pulled(server, manifest.head).items() if row[1] is None]
    assert len(deleted) == 5
    clock.advance(PIN_MS / 1000 + 1)
    assert purge_tombstones(shop, shop.read_head().sequence) == 5
    assert floor_of(shop) == shop.read_head().sequence
    # Nobody can go on from that image any more.
    assert asked(server).segments == []
    server.images.make("shop")
    assert asked(server).head == shop.read_head().sequence


def floor_of(database: Database) -> int:
    with database.view() as view:
        return read_floor(view)


def test_an_image_is_pinned_with_one_commit_an_hour(
    server: SyncServer, shop: Database, clock: ManualClock
):
    server.images.make("shop")
    asked(server)
    mark = shop.storage.mark()
    for _ in range(6):
        clock.advance(LIFE_MS / 7 / 1000)
        assert asked(server).segments
    assert shop.storage.mark() == mark
    clock.advance(LIFE_MS / 1000)
    assert asked(server).segments
    assert shop.storage.mark() > mark
    with shop.view() as view:
        (row,) = read_images(view).rows
    assert row.until_ms >= clock.now_ms() + LIFE_MS


def test_a_manifest_of_a_server_that_froze_after_the_pin_lasts_no_longer_than_that(
    server: SyncServer, shop: Database, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    pin = server.images.pin

    def pin_and_freeze(database: Database, image: KeptImage) -> bool:
        pinned = pin(database, image)
        clock.advance(PIN_MS / 1000)
        return pinned

    server.images.make("shop")
    monkeypatch.setattr(server.images, "pin", pin_and_freeze)
    manifest = asked(server)
    with shop.view() as view:
        (row,) = read_images(view).rows
    assert manifest.segments and manifest.ends <= row.until_ms <= clock.now_ms()


def test_a_pin_of_a_clock_that_was_wrong_is_made_anew(
    server: SyncServer, shop: Database, clock: ManualClock
):
    server.images.make("shop")
    clock.advance(10 * 365 * 24 * 3600)
    asked(server)
    clock.advance(-10 * 365 * 24 * 3600)
    assert asked(server).segments
    with shop.view() as view:
        (row,) = read_images(view).rows
    assert row.until_ms == clock.now_ms() + PIN_MS


def test_a_pin_of_a_clock_that_was_wrong_holds_no_floor(
    server: SyncServer, shop: Database, clock: ManualClock
):
    server.images.make("shop")
    clock.wrong_ms = 10 * 365 * 24 * 3600 * 1000
    asked(server)
    clock.wrong_ms = 0
    with shop.transaction() as tx:
        for number in range(5):
            del tx.collection("notes")[uuid.UUID(int=number)]
    assert purge_tombstones(shop, shop.read_head().sequence) == 5


def test_a_full_disk_keeps_no_device_from_its_first_sync(
    server: SyncServer, shop: Database, monkeypatch: pytest.MonkeyPatch
):
    """There is no room to pin the image; then the device pulls."""
    server.images.make("shop")

    def full(batch: Any, after: Any = None) -> int:
        raise StorageFullError("the disk is full")

    monkeypatch.setattr(shop.storage, "commit", full)
    assert asked(server).segments == []
    assert len(pulled(server)) == 220


# ---------------------------------------------------------------- what goes wrong


def test_a_build_that_ends_early_leaves_nothing_that_counts(server: SyncServer, shop: Database):
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        server.images.make("shop", stop)
    assert asked(server).segments == []
    if server.config.data_dir is not None:
        assert names_of(server) == []
    assert server.images.make("shop")
    assert downloaded(server, asked(server))


def test_what_is_dropped_while_an_image_is_made_does_not_come_back(
    server: SyncServer, shop: Database
):
    began, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        began.set()
        assert go_on.wait(WAIT_S)

    made: list[BaseException | bool] = []

    def build() -> None:
        try:
            made.append(server.images.make("shop", pause))
        except StoppedError as error:
            made.append(error)

    builder = threading.Thread(target=build)
    builder.start()
    assert began.wait(WAIT_S)
    with shop.transaction() as tx:
        del tx.collection("notes")[uuid.UUID(int=7)]
    dropper = threading.Thread(target=server.images.drop, args=("shop",))
    dropper.start()
    wait_until(lambda: _dropped(shop) == shop.read_head().sequence)
    go_on.set()
    builder.join(WAIT_S)
    dropper.join(WAIT_S)
    assert isinstance(made[0], StoppedError)
    assert asked(server).segments == []
    assert server.images.make("shop")
    assert ("notes", number_id(7)) not in downloaded(server, asked(server))


def _dropped(database: Database) -> int:
    with database.view() as view:
        return read_images(view).dropped


def test_a_bug_in_one_image_keeps_no_other_from_being_made(
    server: SyncServer, shop: Database, monkeypatch: pytest.MonkeyPatch
):
    fill(server.database("store"), range(200))
    server.images.background = True
    original = server.images.make

    def fails(db_id: str, pause: Callable[[], None]) -> bool:
        if db_id == "shop":
            raise RuntimeError("a bug")
        return original(db_id, pause)

    monkeypatch.setattr(server.images, "make", fails)
    server.housekeep()
    wait_until(lambda: bool(asked(server, "store", db_id="store").segments))


def test_what_cannot_be_dropped_in_time_is_said(
    server: SyncServer, shop: Database, monkeypatch: pytest.MonkeyPatch
):
    """Another process makes an image, and was stopped: its files would stay."""
    server.images.make("shop")

    class Elsewhere:
        def take(self, timeout_s: float) -> bool:
            return False

        def give_back(self) -> None: ...

    monkeypatch.setattr(shop, "right", lambda name: Elsewhere())
    with pytest.raises(ServerBusyError, match="image"):
        server.images.drop("shop")
    assert asked(server).segments == []


def test_an_image_that_the_database_does_not_know_does_not_count(
    server: SyncServer, shop: Database
):
    server.images.make("shop")
    (segment, *_) = asked(server).segments
    change_images(shop, lambda _, found: replace(found, rows=[]))
    assert asked(server).segments == []
    assert code_of(fetch(server, segment.sha256)) == "not_found"


# ---------------------------------------------------------------- files


@pytest.fixture
def on_disk(clock: ManualClock, tmp_path: Path) -> Iterator[SyncServer]:
    with make(clock, tmp_path / "data") as server:
        fill(server.database("shop"), range(200))
        yield server


def test_images_outlive_the_server(on_disk: SyncServer, clock: ManualClock):
    on_disk.images.make("shop")
    manifest = asked(on_disk)
    on_disk.close()
    with make(clock, Path(str(on_disk.config.data_dir))) as again:
        assert asked(again).segments == manifest.segments
        assert downloaded(again, manifest)


def test_what_a_killed_server_left_is_cleared_and_never_served(
    on_disk: SyncServer, clock: ManualClock
):
    on_disk.images.make("shop")
    manifest = asked(on_disk)
    folder = Path(str(on_disk.config.data_dir)) / FOLDER / "shop.entidb"
    whole = names_of(on_disk)
    stray = hashlib.sha256(b"stray").digest()
    (folder / f"{stray.hex()}.segment").write_bytes(b"stray")
    (folder / f"{'1' * 64}.segment.part").write_bytes(b"half")
    (folder / f"{'2' * 32}.image").write_bytes(b"\xa0")
    assert code_of(fetch(on_disk, stray)) == "not_found"
    assert not on_disk.images.make("shop")
    assert names_of(on_disk) == whole
    assert downloaded(on_disk, manifest)


def test_an_image_whose_list_is_damaged_is_made_anew(on_disk: SyncServer, clock: ManualClock):
    on_disk.images.make("shop")
    folder = Path(str(on_disk.config.data_dir)) / FOLDER / "shop.entidb"
    on_disk.close()
    (image,) = folder.glob("*.image")
    image.write_bytes(image.read_bytes()[:-9])
    with make(clock, Path(str(on_disk.config.data_dir))) as again:
        assert asked(again).segments == []
        assert again.images.make("shop")
        assert downloaded(again, asked(again))


def test_a_segment_that_is_cut_or_gone_is_not_found(on_disk: SyncServer):
    on_disk.images.make("shop")
    first, second, *_ = asked(on_disk).segments
    folder = Path(str(on_disk.config.data_dir)) / FOLDER / "shop.entidb"
    (folder / f"{first.sha256.hex()}.segment").unlink()
    os.truncate(folder / f"{second.sha256.hex()}.segment", 10)
    assert code_of(fetch(on_disk, first.sha256)) == "not_found"
    assert code_of(fetch(on_disk, second.sha256)) == "not_found"


@pytest.mark.parametrize("name", ["image", "open"])
def test_images_that_may_not_be_read_keep_no_device_from_its_first_sync(
    on_disk: SyncServer,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    on_disk.images.make("shop")
    first, *_ = asked(on_disk).segments

    def refused(self: object, identity: bytes) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), identity.hex())

    monkeypatch.setattr(segment_files.FolderFiles, name, refused)
    assert code_of(fetch(on_disk, first.sha256)) == "not_found"
    assert (asked(on_disk).segments == []) is (name == "image")
    assert len(pulled(on_disk)) == 200
    lines = [record for record in caplog.records if "no permission" in record.getMessage()]
    assert lines and not any(line.exc_info for line in caplog.records)


def test_files_of_a_database_that_is_gone_are_removed(on_disk: SyncServer, clock: ManualClock):
    on_disk.images.make("shop")
    root = Path(str(on_disk.config.data_dir))
    on_disk.close()
    os.rename(root / "shop.entidb", root / "store.entidb")
    with make(clock, root) as again:
        again.images.look()
        assert not (root / FOLDER / "shop.entidb").exists()
        assert again.database("store").collection("notes")


def test_files_put_back_by_hand_know_nothing_of_an_image_of_their_future(
    on_disk: SyncServer, clock: ManualClock, tmp_path: Path
):
    root = Path(str(on_disk.config.data_dir))
    shop = on_disk.database("shop")
    on_disk.close()
    before = (root / "shop.entidb" / "data.mdb").read_bytes()
    with make(clock, root) as later:
        fill(later.database("shop"), range(200), text="lost")
        later.images.make("shop")
        manifest = asked(later)
    (root / "shop.entidb" / "data.mdb").write_bytes(before)
    with make(clock, root) as again:
        shop = again.database("shop")
        while shop.read_head().sequence < manifest.head:
            fill(shop, range(200), text="other")
        fill(shop, range(1), text="other")
        assert asked(again).segments == []
        assert code_of(fetch(again, manifest.segments[0].sha256)) == "not_found"


def test_r29_who_asks_for_an_image_proves_what_it_has_seen(server: SyncServer, shop: Database):
    """A device that is to begin anew, in the middle of which the files were put back, has pending
    edits that were made on what is gone, with numbers that others have used since."""
    server.images.make("shop")
    history, head = shop.history, shop.read_head().sequence
    assert history is not None
    page = server.handle("/v1/pull", "shop", pull(history, cursor=head))
    assert isinstance(page, PullResponse) and page.term is not None
    term = page.term
    mine = SeenCommit(head, term.name)
    assert asked(server, history=history, seen=mine).segments
    assert shop.history == history
    refused = asked_or_error(server, "shop", history=history, seen=replace(mine, term=b"another."))
    assert refused.code == "history_changed"
    assert refused.details["history"] == shop.history != history


def test_r29_so_does_who_has_seen_more(server: SyncServer, shop: Database):
    history, head = shop.history, shop.read_head().sequence
    more = SeenCommit(head + 1, b"another.")
    refused = asked_or_error(server, "shop", history=history, seen=more)
    assert refused.code == "history_changed"
    assert refused.details["history"] == shop.history != history


def test_no_image_is_made_where_there_is_no_room(
    on_disk: SyncServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(segment_files.FolderFiles, "free_bytes", lambda self: 1000)
    with pytest.raises(StorageFullError):
        on_disk.images.make("shop")
    assert names_of(on_disk) == []


def test_a_full_disk_ends_a_build_and_leaves_nothing(
    on_disk: SyncServer, monkeypatch: pytest.MonkeyPatch
):
    put, count = segment_files.FolderFiles.put, 0

    def full(self: Any, sha256: bytes, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(28, "No space left on device")
        put(self, sha256, data)

    monkeypatch.setattr(segment_files.FolderFiles, "put", full)
    with pytest.raises(OSError, match="No space"):
        on_disk.images.make("shop")
    assert names_of(on_disk) == []
    assert asked(on_disk).segments == []
    fill(on_disk.database("shop"), range(3))


def test_an_image_made_by_one_process_is_served_by_another(clock: ManualClock, tmp_path: Path):
    """Two servers over one folder stand for two processes of one server."""
    with make(clock, tmp_path / "data") as maker:
        fill(maker.database("shop"), range(200))
        maker.images.make("shop")
        manifest = asked(maker)
        storage = maker.database("shop").storage
        with SyncServer.in_memory(
            clock=clock,
            authenticator=granting,
            segments_min_entities=LEAST,
            open_database=lambda db_id, create: maker.database(db_id),
        ) as other:
            other.images.places.root = maker.images.places.root
            assert asked(other).segments == manifest.segments
            assert downloaded(other, manifest)
            assert storage is other.database("shop").storage
            assert Role.SERVER is maker.database("shop").role


def test_whoever_has_just_asked_comes_before_the_image_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = threading.Event()
    monkeypatch.setattr(building, "_ASKED_S", 0.2)
    began = time.monotonic()
    Pauses(stop, 0.0)
    assert time.monotonic() - began >= 0.2
    monkeypatch.setattr(building, "_ASKED_S", WAIT_S)
    Pauses(stop)  # nobody has asked
    # Who asked for another one at the same time has had that second by now.
    Pauses(stop, WAIT_S)
    stop.set()
    with pytest.raises(StoppedError):
        Pauses(stop, 0.0)
    assert time.monotonic() - began < WAIT_S

"""A first sync, or a reset, that begins with segments (R35)."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as altered

from entidb import cbor
from entidb.db import Database
from entidb.db.maintenance import purge_tombstones
from entidb.db.records import META_STAGE
from entidb.db.verifying import verify
from entidb.errors import SyncCancelledError, SyncError, SyncTimeoutError, TransportError
from entidb.protocol import SegmentColumns, decode_segment, encode_segment
from entidb.server import SyncServer
from entidb.storage.directories import FETCHED
from entidb.sync import HttpTransport, RetryConfig, SyncConfig, SyncEngine, SyncProgress
from entidb.sync.apply.image import StagesImages
from entidb.sync.transport import HttpResponse, LoopbackClient
from entidb.testing.images import ImageFiles, ImageServer, image_of
from tests.support import uid

NAMES = ("notes", "carts")


class Place:
    """A server with an image, and devices of it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.real = stack.enter_context(SyncServer.in_memory())
        self.server = ImageServer(self.real)

    @property
    def database(self) -> Database:
        with self.real.stores.using("d", create=True) as store:
            return store.database

    def fill(self, count: int = 20, begin: int = 0) -> None:
        for number in range(begin, begin + count):
            with self.database.transaction() as tx:
                tx.collection(NAMES[number % 2])[uid(number)] = {"n": number}

    def image(self, **options: Any) -> ImageFiles:
        self.server.image = image_of(self.database, **options)
        return self.server.image

    def engine(self, database: Database, **settings: Any) -> SyncEngine:
        config = SyncConfig(db_id="d", retry=RetryConfig.none(), **settings)
        transport = HttpTransport(
            "http://localhost", client=LoopbackClient(self.server), config=config
        )
        return self._stack.enter_context(SyncEngine(config, transport, database))

    def device(self, path: Path | None = None) -> Database:
        made = Database.in_memory() if path is None else Database.open(path)
        return self._stack.enter_context(made)

    def asked(self, path: str) -> int:
        return sum(name == path for name, _ in self.server.asked)

    def bytes_of_segments(self) -> int:
        return sum(size for name, size in self.server.asked if name == "/v1/segments")

    def assert_same(self, device: Database) -> None:
        assert verify(device) == []
        for name in NAMES:
            with device.snapshot() as here, self.database.snapshot() as there:
                mine = list(here.collection(name).payloads())
                assert mine == list(there.collection(name).payloads())
            assert len(device.collection(name)) == len(mine)


@pytest.fixture
def place() -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack)


def test_a_first_sync_takes_the_image_and_then_what_changed_since(place: Place) -> None:
    place.fill()
    image = place.image()
    place.fill(4, begin=18)
    with place.database.transaction() as tx:
        del tx.collection(NAMES[0])[uid(0)]
    device = place.device()
    seen: list[SyncProgress] = []
    engine = place.engine(device)
    engine.on_progress(seen.append)
    result = engine.sync()
    place.assert_same(device)
    assert place.bytes_of_segments() == sum(map(len, image.files.values()))
    assert place.asked("/v1/pull") == 1
    assert result.pulled >= image.manifest.entities
    assert [p.operations for p in seen] == sorted(p.operations for p in seen)
    assert seen[0].operations_total == image.manifest.entities
    assert not result.reset
    assert engine.sync().requests == 1
    assert device.read_head().sequence > 0


@pytest.mark.parametrize("scope", [None, ["notes"]])
def test_what_follows_an_image_is_asked_for_before_its_end_is_staged(
    place: Place, monkeypatch: pytest.MonkeyPatch, scope: list[str] | None
) -> None:
    place.fill()
    place.image(names=scope)
    events: list[str] = []

    def note(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def noting(self: Any, given: Any) -> Any:
            events.append(type(given).__name__)
            return original(self, given)

        monkeypatch.setattr(kind, name, noting)

    note(StagesImages, "stage_segment")
    note(HttpTransport, "send_ahead")
    device = place.device()
    if scope is not None:
        device.set_scope(scope)
    place.engine(device).sync()
    assert events.count("PullRequest") == 1
    assert events[-2:] == ["PullRequest", "OpenSegment"]
    assert place.asked("/v1/pull") == 1, "and what came of it was taken"


def test_without_an_image_it_pulls(place: Place) -> None:
    place.fill()
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)
    assert (place.asked("/v1/snapshot"), place.asked("/v1/segments")) == (1, 0)
    place.engine(place.device(), segments=False).sync()
    assert place.asked("/v1/snapshot") == 1


def test_all_values_are_proved_when_that_is_asked_for_and_a_sample_otherwise(place: Place) -> None:
    """A value that is not canonical, in a segment whose hash is right: a server that lies."""
    place.fill(400)
    image = place.image(rows=400)
    sha, data = next(iter(image.files.items()))
    header, columns = decode_segment(data)
    bad = columns.values.replace(b"\xa1", b"\xb8", 1)  # a head of a map that says less than it has
    assert len(bad) == len(columns.values)
    changed = encode_segment(header.collection, altered(columns, values=bad), "none")
    place.server.image = swapped(image, sha, changed)
    strict = place.device()
    place.engine(strict, prove="all").sync()
    place.assert_same(strict)  # it pulled
    assert place.bytes_of_segments() > 0
    every = b"".join(b"\xb8" + columns.values[at + 1 : at + size] for at, size in _cuts(columns))
    changed = encode_segment(header.collection, altered(columns, values=every), "none")
    place.server.image = swapped(image, sha, changed)
    usual = place.device()
    place.engine(usual).sync()
    place.assert_same(usual)


def _cuts(columns: SegmentColumns) -> Iterator[tuple[int, int]]:
    """Where each value is, and how long."""
    at = 0
    for (size,) in struct.iter_unpack(">I", columns.sizes):
        yield at, size
        at += size


def swapped(image: ImageFiles, sha: bytes, data: bytes) -> ImageFiles:
    """The image with another file in the place of one, and a manifest that names it."""
    name = hashlib.sha256(data).digest()
    files = {
        name if key == sha else key: data if key == sha else f for key, f in image.files.items()
    }
    segments = [
        altered(each, sha256=name, bytes=len(data)) if each.sha256 == sha else each
        for each in image.manifest.segments
    ]
    return ImageFiles(altered(image.manifest, segments=segments), files)


Change = Callable[[bytes, HttpResponse], HttpResponse]


def _flipped(sha: bytes, answer: HttpResponse) -> HttpResponse:
    return replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))


def _missing(sha: bytes, answer: HttpResponse) -> HttpResponse:
    return HttpResponse(404, {"content-type": "text/plain"}, b"gone")


def _denied(sha: bytes, answer: HttpResponse) -> HttpResponse:
    return HttpResponse(403, {}, b"")


def _empty(sha: bytes, answer: HttpResponse) -> HttpResponse:
    return replace(answer, body=b"")


def _elsewhere(sha: bytes, answer: HttpResponse) -> HttpResponse:
    return replace(answer, headers={"content-range": "bytes 7-9/10"})


def _packed(sha: bytes, answer: HttpResponse) -> HttpResponse:
    return replace(answer, headers={**answer.headers, "content-encoding": "gzip"})


@pytest.mark.parametrize(
    "change", [_flipped, _missing, _denied, _empty, _elsewhere, _packed], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("which", [0, 3])
def test_a_segment_that_is_wrong_or_not_there_ends_in_a_pull(
    place: Place, change: Change, which: int
) -> None:
    place.fill()
    image = place.image()
    wrong = image.manifest.segments[which].sha256
    place.server.answer = lambda sha, answer: change(sha, answer) if sha == wrong else answer
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)
    assert place.asked("/v1/pull") == 1
    assert place.asked("/v1/snapshot") == 1


def test_a_segment_that_was_damaged_once_is_fetched_once_more(place: Place) -> None:
    place.fill()
    image = place.image()
    damaged = [image.manifest.segments[1].sha256]

    def once(sha: bytes, answer: HttpResponse) -> HttpResponse:
        if sha not in damaged:
            return answer
        damaged.remove(sha)
        return _flipped(sha, answer)

    place.server.answer = once
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)
    assert place.asked("/v1/segments") == len(image.files) + 1
    assert not damaged


def test_a_server_that_knows_no_ranges_is_as_good(place: Place) -> None:
    place.fill()
    image = place.image()
    place.server.answer = lambda sha, answer: HttpResponse(200, {}, image.files[sha])
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)
    assert place.asked("/v1/pull") == 1


def test_a_cut_line_costs_what_was_under_way_and_no_more(place: Place, tmp_path: Path) -> None:
    place.fill(40)
    image = place.image(rows=5)
    device = place.device(tmp_path / "db")
    engine = place.engine(device)
    failed: set[bytes] = set()

    def cut(sha: bytes, answer: HttpResponse) -> HttpResponse:
        if sha not in failed:
            failed.add(sha)
            raise TransportError("the line is cut")
        return answer

    place.server.answer = cut
    for _ in range(2 * len(image.files)):
        try:
            engine.sync()
            break
        except TransportError:
            continue
    place.assert_same(device)
    assert place.asked("/v1/snapshot") == 1, "it went on where it was"
    sizes = list(map(len, image.files.values()))
    # What comes beside a segment whose line is cut may be thrown away.
    assert sum(sizes) <= place.bytes_of_segments() <= sum(sizes) + len(sizes) * max(sizes)
    assert failed == set(image.files)


def test_part_of_a_segment_is_kept_by_the_next_process(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entidb.sync.http.segments.PIECE_BYTES", 50)
    place.fill(40)
    image = place.image(rows=20)
    total = sum(map(len, image.files.values()))

    def cut(sha: bytes, answer: HttpResponse) -> HttpResponse:
        if place.bytes_of_segments() > total // 2:
            raise TransportError("the process is killed")
        return answer

    place.server.answer = cut
    with Database.open(tmp_path / "db") as device, pytest.raises(TransportError):
        place.engine(device).sync()
    assert any((tmp_path / "db" / FETCHED).iterdir())
    place.server.answer = None
    device = place.device(tmp_path / "db")
    assert verify(device) == []
    place.engine(device).sync()
    place.assert_same(device)
    assert place.bytes_of_segments() <= total + 4 * 50
    assert not (tmp_path / "db" / FETCHED).exists()


def test_a_way_that_never_brings_a_segment_is_left_after_some_tries(place: Place) -> None:
    place.fill()
    place.image()

    def silent(sha: bytes, answer: HttpResponse) -> HttpResponse:
        raise SyncTimeoutError("nothing came")

    place.server.answer = silent
    device = place.device()
    engine = place.engine(device)
    for _ in range(2):
        with pytest.raises(SyncTimeoutError):
            engine.sync()
    engine.sync()
    place.assert_same(device)


def test_an_image_of_another_history_is_not_taken(place: Place) -> None:
    place.fill()
    image = place.image()
    other = altered(image.manifest, history=b"o" * 16)
    place.server.image = ImageFiles(other, image.files)
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)
    assert place.asked("/v1/segments") == 0


def test_a_floor_above_the_image_means_that_everything_is_pulled(place: Place) -> None:
    """The manifest has ended, and what was deleted since the image may be forgotten."""
    place.fill()
    place.image()
    with place.database.transaction() as tx:
        del tx.collection(NAMES[0])[uid(0)]
    place.fill(2, begin=30)
    purge_tombstones(place.database, place.database.read_head().sequence)
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)
    assert place.asked("/v1/snapshot") == 1


def test_a_floor_that_moves_up_to_the_image_is_no_hindrance(place: Place) -> None:
    place.fill()
    with place.database.transaction() as tx:
        del tx.collection(NAMES[0])[uid(0)]
    place.image()
    place.fill(2, begin=30)
    purge_tombstones(place.database, place.database.read_head().sequence - 2)
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)
    assert place.asked("/v1/pull") == 1


def test_what_is_pending_survives_a_reset_by_an_image(place: Place) -> None:
    place.fill()
    device = place.device()
    engine = place.engine(device)
    engine.sync()
    device.collection(NAMES[0])[uid(2)] = {"mine": 1}
    device.collection(NAMES[1])[uid(99)] = {"mine": 2}
    with place.database.transaction() as tx:
        del tx.collection(NAMES[0])[uid(0)]
        tx.collection(NAMES[0])[uid(4)] = {"theirs": 1}
    place.image()
    purge_tombstones(place.database, place.database.read_head().sequence)
    result = engine.sync()
    assert result.reset
    assert place.bytes_of_segments() > 0
    place.assert_same(device)
    assert uid(0) not in device.collection(NAMES[0])
    assert device.collection(NAMES[1])[uid(99)] == {"mine": 2}
    assert device.collection(NAMES[0])[uid(2)] == {"mine": 1}


def test_a_scope_asks_for_its_collections_and_a_wider_one_for_what_comes_in(place: Place) -> None:
    place.fill()
    place.image(names=["notes"])
    device = place.device()
    place.engine(device, collections=("notes",)).sync()
    assert len(device.collection("notes")) == 10
    assert place.asked("/v1/segments") > 0
    assert verify(device) == []


def test_an_image_of_more_than_was_asked_for_is_not_taken(place: Place) -> None:
    place.fill()
    place.image()
    device = place.device()
    place.engine(device, collections=("notes",)).sync()
    assert len(device.collection("notes")) == 10
    assert place.asked("/v1/segments") == 0


def test_a_segment_with_other_rows_than_its_manifest_says_is_not_taken(place: Place) -> None:
    place.fill()
    image = place.image()
    first, second = image.manifest.segments[:2]
    segments = [altered(first, sha256=second.sha256, bytes=second.bytes), second]
    segments += image.manifest.segments[2:]
    place.server.image = ImageFiles(altered(image.manifest, segments=segments), image.files)
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)


def test_a_version_above_the_image_is_not_taken(place: Place) -> None:
    place.fill()
    image = place.image()
    place.server.image = ImageFiles(
        altered(image.manifest, head=image.manifest.head - 1), image.files
    )
    device = place.device()
    place.engine(device).sync()
    place.assert_same(device)


def test_cancelling_ends_a_first_sync_that_waits_for_a_segment(place: Place) -> None:
    place.fill()
    image = place.image()
    waits, over = threading.Event(), threading.Event()

    def silent(sha: bytes, answer: HttpResponse) -> HttpResponse:
        waits.set()
        over.wait(60)
        return answer

    place.server.answer = silent
    device = place.device()
    engine = place.engine(device)
    try:
        with ThreadPoolExecutor(1) as pool:
            synced = pool.submit(engine.sync)
            assert waits.wait(60)
            engine.cancel()
            with pytest.raises(SyncCancelledError):
                synced.result(60)
            over.set()
    finally:
        over.set()
    place.server.answer = None
    engine.sync()
    place.assert_same(device)
    assert place.asked("/v1/snapshot") == 1
    assert place.bytes_of_segments() >= sum(map(len, image.files.values()))


def test_a_program_that_knows_of_no_images_forgets_what_is_staged_of_one(place: Place) -> None:
    """Such a program takes the fields of the record that it knows: they are of no history that it
    could have, so that it abandons the stage, with its tables."""
    place.fill()
    image = place.image()
    last = image.manifest.segments[-1].sha256
    place.server.answer = lambda sha, a: replace(a, status=503) if sha == last else a
    device = place.device()
    with pytest.raises(SyncError):
        place.engine(device).sync()
    with device.view() as view:
        record = cbor.decode(view.get(META_STAGE) or b"")
        state = view.sync_state
    assert record["tables"], "something is staged"
    assert record["history"] != state.history
    assert (record["full_cursor"], record["full_done"]) == (0, False)

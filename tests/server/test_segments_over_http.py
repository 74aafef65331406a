"""Segments over sockets: in pieces from the disk, in parts, to clients that stop reading."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from entidb.db.images import NO_IMAGES, ImageRows
from entidb.packing import ENCODINGS
from entidb.protocol import Manifest, SegmentInfo, SnapshotRequest, decode_segment
from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.segments import files
from entidb.server.segments.keeping import ImageKeeper
from entidb.server.segments.rows import change_images
from entidb.server.sending import PIECE_BYTES
from tests.server.support import DEVICE, Client

pytestmark = pytest.mark.process

WAIT_S = 60.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SyncServer, str]]:
    data_dir = tmp_path_factory.mktemp("served") / "data"
    config = ServerConfig(
        data_dir=data_dir,
        insecure_no_auth=True,
        segments_min_entities=50,
        write_timeout_s=3.0,  # far above what a client may pause that reads on a busy machine
        metrics=True,
    )
    with SyncServer(config) as server, serving(server) as url:
        server.images.background = False
        database = server.database("shop")
        with database.transaction() as tx:
            large = hashlib.shake_128(b"large").digest(15_000_000)
            tx.collection("large")[uuid.UUID(int=1)] = {"blob": large}
        with database.transaction() as tx:
            for number in range(60):
                blob = hashlib.shake_128(b"%d" % number).digest(100_000)
                tx.collection("blobs")[uuid.UUID(int=number)] = {"blob": blob}
        assert server.images.make("shop")
        yield server, url


@pytest.fixture
def client(served: tuple[SyncServer, str]) -> Iterator[Client]:
    with Client(served[1]) as client:
        yield client


@pytest.fixture
def segment(client: Client) -> SegmentInfo:
    request = SnapshotRequest(db_id="shop", device_id=DEVICE, packings=[*ENCODINGS])
    manifest = client.send(request).message(Manifest)
    largest = max(manifest.segments, key=lambda each: each.bytes)
    assert largest.bytes > 3 * PIECE_BYTES
    return largest


def path_of(segment: SegmentInfo) -> str:
    return f"/v1/segments/{segment.sha256.hex()}?db_id=shop"


def test_a_segment_comes_whole_in_pieces_and_on_one_connection(
    client: Client, segment: SegmentInfo, monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    original = files.DiskFile.read

    def noted(self: Any, at: int, count: int) -> bytes:
        read.append(count)
        return original(self, at, count)

    monkeypatch.setattr(files.DiskFile, "read", noted)
    monkeypatch.setattr(files, "_READS_NOW", False)
    for _ in range(2):
        answer = client.request("GET", path_of(segment))
        assert answer.status == 200
        assert answer.headers["content-length"] == str(segment.bytes)
        assert answer.headers["content-type"] == "application/vnd.entidb.segment"
        assert hashlib.sha256(answer.body).digest() == segment.sha256
    assert decode_segment(answer.body)[0].rows == segment.rows
    assert max(read) == PIECE_BYTES and sum(read) == 2 * segment.bytes


def test_a_part_that_the_system_has_in_memory_is_not_read_on_a_thread(
    client: Client, segment: SegmentInfo, monkeypatch: pytest.MonkeyPatch
):
    """And looked for once, as long as nothing is committed."""
    if not files._READS_NOW:
        pytest.skip("this system does not say what it has in memory")
    whole = client.request("GET", path_of(segment)).body  # it is in memory from here on

    def waits(self: Any, *_: object) -> Any:
        raise AssertionError("this waits")

    monkeypatch.setattr(files.DiskFile, "read", waits)
    monkeypatch.setattr(ImageKeeper, "open", waits)
    for begin, end in ((0, 99), (100, PIECE_BYTES), (PIECE_BYTES + 1, segment.bytes - 1)):
        part = client.request("GET", path_of(segment), range=f"bytes={begin}-{end}")
        assert (part.status, part.body) == (206, whole[begin : end + 1])


def test_after_a_commit_it_is_looked_for_whether_the_image_still_counts(
    served: tuple[SyncServer, str], client: Client, segment: SegmentInfo
):
    server, _ = served
    assert client.request("GET", path_of(segment), range="bytes=0-9").status == 206
    before: list[ImageRows] = []

    def forgotten(_: object, found: ImageRows) -> ImageRows:
        before.append(found)
        return NO_IMAGES

    database = server.database("shop")
    change_images(database, forgotten)
    gone = client.request("GET", path_of(segment), range="bytes=10-19")
    change_images(database, lambda *_: before[0])
    assert gone.status == 404
    assert client.request("GET", path_of(segment), range="bytes=10-19").status == 206


def test_a_file_that_has_become_shorter_is_not_sent_at_once(
    served: tuple[SyncServer, str], client: Client, segment: SegmentInfo
):
    server, _ = served
    file = server.images.files("shop").open(segment.sha256)
    assert file is not None
    with contextlib.closing(file):
        size = segment.bytes
        assert file.read_now(size - 10, 20) is None
        if (there := file.read_now(size - 10, 10)) is not None:
            assert bytes(there) == file.read(size - 10, 10)


def test_what_is_missing_after_a_cut_is_asked_for_alone(client: Client, segment: SegmentInfo):
    half = client.request("GET", path_of(segment), range=f"bytes=0-{segment.bytes // 2}").body
    tag = f'"{segment.sha256.hex()}"'
    rest = client.request("GET", path_of(segment), range=f"bytes={len(half)}-", if_range=tag)
    assert rest.status == 206
    assert rest.headers["content-range"] == (
        f"bytes {len(half)}-{segment.bytes - 1}/{segment.bytes}"
    )
    assert hashlib.sha256(half + rest.body).digest() == segment.sha256


def test_a_file_that_the_disk_does_not_give_ends_its_answer_and_stands_in_the_log(
    served: tuple[SyncServer, str],
    client: Client,
    segment: SegmentInfo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    original = files.DiskFile.read

    def fails(self: Any, at: int, count: int) -> bytes:
        if at:
            raise OSError(5, "Input/output error")
        return original(self, at, count)

    with monkeypatch.context() as broken:
        broken.setattr(files, "_READS_NOW", False)
        broken.setattr(files.DiskFile, "read", fails)
        with pytest.raises((OSError, http.client.HTTPException)):
            client.request("GET", path_of(segment))
    assert "Input/output error" in caplog.text
    assert "Exception in ASGI application" not in caplog.text
    with Client(served[1]) as again:
        assert again.request("GET", path_of(segment)).status == 200


def test_other_answers_than_a_file_end_and_leave_the_connection(
    client: Client, segment: SegmentInfo
):
    head = client.request("HEAD", path_of(segment))
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(segment.bytes)
    tag = f'"{segment.sha256.hex()}"'
    assert client.request("GET", path_of(segment), if_none_match=tag).status == 304
    assert client.request("GET", path_of(segment), range="bytes=99999999-").status == 416
    assert client.request("PUT", path_of(segment)).status == 405
    assert client.request("GET", "/v1/segments/" + "0" * 64 + "?db_id=shop").status == 404
    assert client.request("GET", "/v1/segments/" + "0" * 64 + "?db_id=nothing").status == 404
    assert client.request("GET", path_of(segment), range="bytes=0-0").body == b"E"


def test_a_client_that_stops_reading_is_dropped(
    served: tuple[SyncServer, str], client: Client, segment: SegmentInfo
):
    place = urlsplit(served[1])
    assert place.hostname is not None and place.port is not None
    line = f"GET {path_of(segment)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    stuck = [socket.create_connection((place.hostname, place.port), WAIT_S) for _ in range(4)]
    try:
        for connection in stuck:
            connection.sendall(line)
        assert len(client.request("GET", path_of(segment)).body) == segment.bytes
        deadline = time.monotonic() + WAIT_S
        while not all(_is_cut(connection) for connection in stuck):
            assert time.monotonic() < deadline, "they were never dropped"
            time.sleep(0.05)
    finally:
        for connection in stuck:
            connection.close()


def _is_cut(connection: socket.socket) -> bool:
    """Whether the server gave up on it: what is left to read ends before the answer does."""
    connection.setblocking(False)
    try:
        return connection.send(b"x") == 0
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_bytes_of_segments_are_counted(client: Client, segment: SegmentInfo):
    client.request("GET", path_of(segment))
    assert b'path="/v1/segments/"' in client.request("GET", "/metrics").body

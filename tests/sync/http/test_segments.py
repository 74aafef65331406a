"""First syncs by segments over sockets, with both engines, and clients that take no part."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.db.maintenance import dump
from entidb.db.replica import ImageSegment
from entidb.db.verifying import verify
from entidb.errors import TransportError
from entidb.server import ServerConfig, SyncServer, serving
from entidb.sync import (
    AsyncSyncEngine,
    HttpTransport,
    HttpxClient,
    RetryConfig,
    SyncConfig,
    SyncEngine,
)
from entidb.sync.apply.image import StagesImages
from entidb.sync.http.segments import NEAR_BYTES, Downloads
from entidb.sync.interrupt import Interrupts
from entidb.sync.segment_files import Fetch, SegmentFiles
from entidb.sync.transport import HttpResponse

pytestmark = pytest.mark.process

COUNT = 300


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SyncServer, str]]:
    data_dir = tmp_path_factory.mktemp("served") / "data"
    config = ServerConfig(data_dir=data_dir, insecure_no_auth=True, segments_min_entities=50)
    with SyncServer(config) as server, serving(server) as url:
        server.images.background = False
        database = server.database("shop")
        for begin in range(0, COUNT, 100):
            with database.transaction() as tx:
                for number in range(begin, begin + 100):
                    blob = hashlib.shake_128(b"%d" % number).digest(20_000)
                    tx.collection(f"part{number % 3}")[uuid.UUID(int=number)] = {"blob": blob}
        assert server.images.make("shop")
        with database.transaction() as tx:
            tx.collection("part0")[uuid.UUID(int=3)] = {"blob": b"later"}
            del tx.collection("part1")[uuid.UUID(int=1)]
        yield server, url


class Noting:
    """The client that ships, which notes what was asked for; ``gets`` as ``HttpClient`` has it."""

    tells_when_sent = True

    def __init__(self, *, gets: bool = True, fails: bool = False) -> None:
        self.client = HttpxClient()
        self.gets = gets
        self.fails = fails
        self.asked: list[str] = []
        #: What the first requests with ``GET`` are answered with.
        self.refusals: list[int] = []

    def request(
        self, method: str, url: str, headers: Mapping[str, str], *rest: Any, **more: Any
    ) -> HttpResponse:
        self.asked.append(f"{method} {url.partition('/v1/')[2].partition('/')[0]}")
        if method == "GET" and self.fails:
            raise NotImplementedError("only POST")
        if method == "GET" and self.refusals:
            return HttpResponse(self.refusals.pop())
        return self.client.request(method, url, headers, *rest, **more)

    def interrupt(self) -> None:
        self.client.interrupt()

    def resume(self) -> None:
        self.client.resume()

    def close(self) -> None:
        self.client.close()


def _same(server: SyncServer, device: Database) -> bool:
    return list(dump(server.database("shop"))) == list(dump(device)) and verify(device) == []


def test_a_device_on_a_disk_begins_with_segments(
    served: tuple[SyncServer, str], tmp_path: Path
) -> None:
    server, url = served
    client, config = Noting(), SyncConfig(db_id="shop")
    with Database.open(tmp_path / "db") as device:
        with SyncEngine(config, HttpTransport(url, client=client), device) as engine:
            result = engine.sync()
        assert _same(server, device)
        assert result.pulled == COUNT + 2  # what was written and deleted since, too
    assert client.asked.count("POST pull") == 1
    assert client.asked.count("GET segments") > 5
    assert sorted(path.name for path in (tmp_path / "db").iterdir() if path.is_dir()) == []


def test_segments_are_proved_while_others_are_stored(
    served: tuple[SyncServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, and one that is damaged on this disk by then is noticed as ever."""
    server, url = served
    opened: dict[bytes, list[str]] = {}
    original = StagesImages.open_segment

    def noting(self: Any, segment: ImageSegment, head: int, data: bytes) -> Any:
        names = opened.setdefault(segment.sha256, [])
        names.append(threading.current_thread().name)
        if len(opened) == 3 and len(names) == 1:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return original(self, segment, head, data)

    monkeypatch.setattr(StagesImages, "open_segment", noting)
    with Database.open(tmp_path / "db") as device:
        with SyncEngine(SyncConfig(db_id="shop"), url, device) as engine:
            result = engine.sync()
        assert _same(server, device)
    assert result.pulled == COUNT + 2
    here = threading.current_thread().name
    ways = list(opened.values())
    assert len(ways) > 3
    # The cycle itself takes what nobody has begun with when its turn comes, as the first.
    assert any(names[0] != here for names in ways)
    assert sorted(map(len, ways)) == [1] * (len(ways) - 1) + [2], "the damaged one twice"


def test_our_client_hands_on_what_comes_as_it_comes(
    served: tuple[SyncServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is cut in the middle of an answer, and what had come is not asked for again."""
    server, url = served
    kept: dict[bytes, int] = {}
    original = SegmentFiles.append
    cut: list[int] = []

    def append(self: Any, segment: Any, offset: int, data: bytes) -> None:
        sha = segment.sha256
        assert offset == kept.get(sha, 0), "nothing comes twice, and nothing is left out"
        original(self, segment, offset, data)
        kept[sha] = offset + len(data)
        if len(kept) == 3 and not cut:
            cut.append(offset)
            raise TransportError("the line is cut")

    monkeypatch.setattr(SegmentFiles, "append", append)
    with Database.open(tmp_path / "db") as device:
        config = SyncConfig(db_id="shop", retry=RetryConfig(delay_initial_s=0.0))
        with SyncEngine(config, url, device) as engine:
            engine.sync()
        assert _same(server, device)
    assert cut


def test_a_device_of_asyncio_does_too(served: tuple[SyncServer, str]) -> None:
    server, url = served
    client = Noting()

    async def main() -> None:
        device = Database.in_memory()
        transport = HttpTransport(url, client=client)
        async with AsyncSyncEngine(SyncConfig(db_id="shop"), transport, device) as engine:
            await engine.sync()
        assert _same(server, device)

    asyncio.run(main())
    assert client.asked.count("GET segments") > 5


@pytest.mark.parametrize("client", [Noting(gets=False), Noting(fails=True)], ids=["says", "fails"])
def test_with_a_client_that_cannot_it_comes_in_pages(
    served: tuple[SyncServer, str], client: Noting
) -> None:
    server, url = served
    device = Database.in_memory()
    transport = HttpTransport(url, client=client)
    with SyncEngine(SyncConfig(db_id="shop"), transport, device) as engine:
        engine.sync()
    assert _same(server, device)
    assert client.asked.count("POST snapshot") == int(client.gets)


def test_a_token_that_has_expired_is_renewed_while_segments_come(
    served: tuple[SyncServer, str],
) -> None:
    server, url = served
    client = Noting()
    client.refusals = [401]
    asked: list[bool] = []

    def token(refresh: bool) -> str:
        asked.append(refresh)
        return "a-token"

    device = Database.in_memory()
    transport = HttpTransport(url, token=token, client=client)
    with SyncEngine(SyncConfig(db_id="shop"), transport, device) as engine:
        engine.sync()
    assert _same(server, device)
    assert asked.count(True) == 1


class Reluctant:
    """A line that brings bytes when the test lets it: in the place of ``Downloads``' way to ask."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._sinks: dict[str, tuple[Any, int]] = {}
        self._left: dict[str, int] = {}

    def get(self, path: str, headers: dict[str, str], sink: Any) -> HttpResponse:
        first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        head = HttpResponse(206, {"content-range": f"bytes {first}-{last}/*"})
        name = path.rpartition("/")[2][:2]
        with self._news:
            self._sinks[name] = (sink, 0)
            self._news.notify_all()
            for _ in range(last - first + 1):
                assert self._news.wait_for(lambda: self._left.get(name, 0) > 0, 30)
                count = self._left.pop(name)
                self._news.release()
                try:
                    sink(head, bytes(count))
                finally:
                    self._news.acquire()
                    self._news.notify_all()
                first += count
                if first > last:
                    break
        return head

    def brings(self, name: str, count: int) -> None:
        with self._news:
            self._left[name] = count
            self._news.notify_all()
            assert self._news.wait_for(lambda: name not in self._left, 30)

    def asked(self, count: int) -> set[str]:
        """What was asked for, as soon as it is so much."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._sinks) >= count, 30), self._sinks
            return set(self._sinks)

    def segments(self, count: int) -> tuple[Downloads, list[ImageSegment]]:
        """So many, of twice what may be near its end."""

        def explain(path: str, answer: HttpResponse) -> Exception:
            raise AssertionError(answer)

        names = [bytes([number]) * 32 for number in range(count)]
        made = [ImageSegment(name, "notes", 2 * NEAR_BYTES, 1, b"", b"") for name in names]
        return Downloads(self.get, explain, Interrupts(), streams=True), made


def test_the_next_segment_is_asked_for_before_one_ends() -> None:
    """So the line always has something to carry, and never more than is to be carried at once."""
    line, files, size = Reluctant(), SegmentFiles(None), 2 * NEAR_BYTES
    downloads, segments = line.segments(5)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(downloads.fetch, Fetch("shop", segments, files))
        assert line.asked(2) == {"00", "01"}
        line.brings("01", NEAR_BYTES - 1)
        assert line.asked(2) == {"00", "01"}
        line.brings("01", 1)
        assert line.asked(3) == {"00", "01", "02"}
        line.brings("00", NEAR_BYTES)
        assert line.asked(3) == {"00", "01", "02"}, "more than a client takes at a time"
        assert not waiting.done()
        line.brings("00", NEAR_BYTES)
        waiting.result(30)
        assert line.asked(4) == {"00", "01", "02", "03"}
        assert files.size(segments[0]) == size
        downloads.forget()
        for name in ("01", "02", "03"):
            line.brings(name, 1)
        downloads.join()
    assert files.size(segments[1]) == NEAR_BYTES, "nobody waits for it any more"


def test_the_last_segment_does_not_end_together_with_the_one_before_it() -> None:
    """That one can be staged while the last comes."""
    line, files = Reluctant(), SegmentFiles(None)
    downloads, segments = line.segments(3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(downloads.fetch, Fetch("shop", segments, files))
        assert line.asked(2) == {"00", "01"}
        line.brings("00", 2 * NEAR_BYTES)
        waiting.result(30)
        waiting = pool.submit(downloads.fetch, Fetch("shop", segments[1:], files))
        line.brings("01", NEAR_BYTES - 1)
        assert line.asked(2) == {"00", "01"}
        line.brings("01", 1)
        assert line.asked(3) == {"00", "01", "02"}
        line.brings("01", NEAR_BYTES)
        waiting.result(30)
        line.brings("02", 2 * NEAR_BYTES)
        downloads.fetch(Fetch("shop", segments[2:], files))
        downloads.join()
    assert [files.size(each) for each in segments] == [2 * NEAR_BYTES] * 3

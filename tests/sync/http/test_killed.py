"""A device that is killed in a first sync, at whatever instant, fetches little of it again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.pacing import Line
from entidb.db import Database
from entidb.db.maintenance import dump
from entidb.db.replica import ImageSegment
from entidb.db.verifying import verify
from entidb.server import ServerConfig, SyncServer, serving
from entidb.sync.http.segments import STREAM_BYTES, Downloads
from entidb.sync.interrupt import Interrupts
from entidb.sync.segment_files import Fetch, SegmentFiles
from entidb.sync.transport import HttpResponse, Sink

pytestmark = pytest.mark.process

COUNT = 300
#: One sync. However slow this machine is, it is not taken for a slow line.
DEVICE = """
import sys
from entidb.db import Database
from entidb.sync import SyncConfig, SyncEngine
from entidb.sync.http import segments

segments.SLOW_BYTES_PER_S = 0.0
path, url = sys.argv[1:]
with Database.open(path) as device, SyncEngine(SyncConfig(db_id="shop"), url, device) as engine:
    engine.sync()
"""


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
                    tx.collection("parts")[uuid.UUID(int=number)] = {"blob": blob}
        assert server.images.make("shop")
        yield server, url


def _begin(path: Path, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", DEVICE, str(path), url])


def _all_bytes(url: str, path: Path) -> int:
    with Line(url) as line:
        assert _begin(path, line.url).wait() == 0
        return line.down


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_killed_at_any_instant_it_costs_a_tenth_at_most(
    served: tuple[SyncServer, str], tmp_path: Path, share: float
) -> None:
    server, url = served
    whole = _all_bytes(url, tmp_path / "other")
    assert whole > COUNT * 20_000
    path = tmp_path / "db"
    killed: list[subprocess.Popen[bytes]] = []
    with Line(url) as line:
        process = _begin(path, line.url)  # it takes longer to begin than the next line

        def at(came: int) -> None:
            if came >= share * whole and not killed:
                killed.append(process)
                process.kill()

        line.on_bytes = at
        assert process.wait() != 0
        assert killed == [process]
        assert _begin(path, line.url).wait() == 0
        assert line.down <= 1.1 * whole
    with Database.open(path) as device:
        assert list(dump(server.database("shop"))) == list(dump(device)) and verify(device) == []


@pytest.mark.parametrize(
    ("slow_bytes_per_s", "parts"),
    [(0.0, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]), (float("inf"), [1, 2, 4, 3])],
    ids=["fast", "slow"],
)
def test_only_over_a_slow_line_parts_get_larger(
    monkeypatch: pytest.MonkeyPatch, slow_bytes_per_s: float, parts: list[int]
) -> None:
    monkeypatch.setattr("entidb.sync.http.segments.SLOW_BYTES_PER_S", slow_bytes_per_s)
    part = STREAM_BYTES // 8
    segment = ImageSegment(b"s" * 32, "notes", 10 * part, 1, b"", b"")
    asked: list[int] = []

    def get(path: str, headers: dict[str, str], sink: Sink | None) -> HttpResponse:
        first, last = headers["Range"].removeprefix("bytes=").split("-")
        asked.append(int(last) + 1 - int(first))
        answer = HttpResponse(206, {"content-range": f"bytes {first}-{last}/{segment.size}"})
        assert sink is not None
        sink(answer, bytes(asked[-1]))
        return answer

    def explain(path: str, answer: HttpResponse) -> Exception:
        raise AssertionError(answer)

    files = SegmentFiles(None)
    downloads = Downloads(get, explain, Interrupts(), streams=True)
    downloads.fetch(Fetch("shop", [segment], files, part))
    downloads.join()
    assert files.size(segment) == segment.size
    assert asked == [each * part for each in parts]

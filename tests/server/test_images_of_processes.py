"""Images where several processes serve, and where one is killed while it makes one (R35)."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path

import pytest

from entidb.packing import ENCODINGS
from entidb.protocol import Manifest, SnapshotRequest, decode_segment
from entidb.server import ServerConfig, SyncServer
from entidb.server.segments.cutting import Sizes
from tests.server.support import DEVICE, Client, push
from tests.server.test_workers import environment, served, until

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers need Linux"),
]

WAIT_S = 60.0
MAKER = """
import sys
from entidb.server import ServerConfig, SyncServer
from entidb.server.segments.cutting import Sizes
calls = 0
def pause():
    global calls
    calls += 1
    print(calls, flush=True)
with SyncServer(ServerConfig(data_dir=sys.argv[1], insecure_no_auth=True,
                             segments_min_entities=50)) as server:
    server.images.background = False
    server.images.sizes = Sizes(3_000, 3_000)
    server.database("shop")
    server.images.make("shop", pause)
    print("made", flush=True)
"""


def _has_image(client: Client) -> bool:
    return bool(client.send(asked()).message(Manifest).segments)


def asked() -> SnapshotRequest:
    return SnapshotRequest(db_id="shop", device_id=DEVICE, packings=[*ENCODINGS])


def test_every_worker_serves_the_image_that_one_of_them_made(tmp_path: Path):
    with served(tmp_path, segments_min_entities=50) as server:
        clients = server.clients()
        history = clients[0].history()
        clients[0].send(push(history, *range(1, 101)))
        for client in clients:
            until(partial(_has_image, client), "an image is made")
        manifests = [client.send(asked()).message(Manifest) for client in clients]
        assert manifests[0].segments == manifests[1].segments
        assert manifests[0].entities == 100
        for client in (*clients, *clients):
            for segment in manifests[0].segments:
                path = f"/v1/segments/{segment.sha256.hex()}?db_id=shop"
                answer = client.request("GET", path)
                assert answer.status == 200
                assert hashlib.sha256(answer.body).digest() == segment.sha256
        (folder,) = (server.data / "entidb-segments").iterdir()
        assert len(list(folder.glob("*.image"))) == 1


def test_a_server_that_is_killed_while_it_makes_an_image_leaves_none_that_is_served(
    tmp_path: Path,
):
    data = tmp_path / "data"
    with SyncServer(ServerConfig(data_dir=data, insecure_no_auth=True)) as server:
        shop = server.database("shop")
        with shop.transaction() as tx:
            for number in range(500):
                tx.collection("notes")[uuid.UUID(int=number)] = {"text": "x" * 90}
    for kill_at in (b"2\n", b"4\n", b"7\n", b"made\n"):
        command = [sys.executable, "-c", MAKER, str(data)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line == kill_at:
                    break
            os.kill(process.pid, signal.SIGKILL)
        made = kill_at == b"made\n"
        _look(data, made)


def _look(data: Path, made: bool) -> None:
    config = ServerConfig(data_dir=data, insecure_no_auth=True, segments_min_entities=50)
    with SyncServer(config) as server:
        server.images.background = False
        server.images.sizes = Sizes(3_000, 3_000)
        manifest = server.handle("/v1/snapshot", None, asked())
        assert isinstance(manifest, Manifest)
        assert bool(manifest.segments) is made
        rows = 0
        for segment in manifest.segments:
            path = f"/v1/segments/{segment.sha256.hex()}?db_id=shop"
            body = server.handle_http("GET", path, {}, b"").body
            assert hashlib.sha256(body).digest() == segment.sha256
            rows += decode_segment(body)[0].rows
        assert rows == (500 if made else 0)
        assert server.database("shop").verify() == []

"""Images of databases, sent by nginx as ``docs/operations.md`` has it: the server decides only."""

from __future__ import annotations

import re
import stat
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.db.maintenance import dump
from entidb.db.verifying import verify
from entidb.errors import AuthenticationError
from entidb.packing import ENCODINGS
from entidb.protocol import Manifest, SnapshotRequest
from entidb.server import Grants, Rights, ServerConfig, SyncServer, serving
from entidb.server.segments.files import DiskFile
from entidb.sync import SyncConfig, SyncEngine
from entidb.sync.apply.image import StagesImages
from tests.scenarios.test_live_through_proxies import nginx

pytestmark = pytest.mark.process

DOCS = Path(__file__).parent.parent.parent / "docs"
#: A name whose directory has other characters.
DB = "Shop-1.a"
COUNT = 400


def granting(token: str | None) -> Grants:
    named = {"all": None, "lists": frozenset(["lists"])}
    if token not in named:
        raise AuthenticationError("a token is needed")
    return Grants(token, {DB: Rights(read=True, write=True, collections=named[token])})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    place.chmod(0o750)
    return place


@pytest.fixture
def server(tmp_path: Path, images: Path) -> Iterator[SyncServer]:
    config = ServerConfig(
        data_dir=tmp_path / "data",
        authenticator=granting,
        segments_min_entities=50,
        segments_dir=images,
        segments_redirect_to="/images/",
    )
    with SyncServer(config) as made:
        made.images.background = False
        for begin in range(0, COUNT, 50):
            with made.database(DB).transaction() as tx:
                for number in range(begin, begin + 50):
                    value = {"n": number, "blob": number.to_bytes(4, "big") * 5_000}
                    tx.collection(("notes", "lists")[number % 2])[uuid.UUID(int=number)] = value
        assert made.images.make(DB)
        yield made


@pytest.fixture
def proxy(server: SyncServer, images: Path, tmp_path: Path) -> Iterator[str]:
    """nginx in front of the server, with what the page adds to its own location."""
    text = (DOCS / "operations.md").read_text("utf-8")
    (added,) = re.findall(r"^```nginx\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert "alias /var/lib/entidb-images/;" in added
    added = added.replace("/var/lib/entidb-images/", f"{images}/").rstrip().removesuffix("}")
    with ExitStack() as stack:
        url = stack.enter_context(serving(server))
        (tmp_path / "nginx").mkdir()
        yield stack.enter_context(nginx(url, tmp_path / "nginx", "} " + added))


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The server reads no file that it sends; what it does read is noted."""
    read: list[int] = []
    monkeypatch.setattr(DiskFile, "read", lambda self, at, count: read.append(count))
    return read


def manifest_of(server: SyncServer, token: str) -> Manifest:
    request = SnapshotRequest(db_id=DB, device_id=bytes(16), packings=[*ENCODINGS])
    answer = server.handle("/v1/snapshot", token, request)
    assert isinstance(answer, Manifest)
    return answer


def got(url: str, token: str | None = "all", **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        named["Authorization"] = f"Bearer {token}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=named)) as answer:
            return answer.status, lower(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, lower(error.headers), error.read()


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def address(proxy: str, sha256: bytes) -> str:
    return f"{proxy}/v1/segments/{sha256.hex()}?db_id={DB}"


def test_a_device_begins_with_what_nginx_sends(
    server: SyncServer,
    proxy: str,
    tmp_path: Path,
    unread: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[bytes] = []
    original = StagesImages.open_segment

    def noting(self: StagesImages, segment: Any, head: int, data: bytes) -> Any:
        opened.append(segment.sha256)
        return original(self, segment, head, data)

    monkeypatch.setattr(StagesImages, "open_segment", noting)
    with Database.open(tmp_path / "device") as device:
        with SyncEngine(SyncConfig(db_id=DB), proxy, device, token="all") as engine:
            engine.sync()
        assert list(dump(device)) == list(dump(server.database(DB)))
        assert verify(device) == []
    # Each once; another thread may be at the next before this one is at its own.
    assert sorted(opened) == sorted(each.sha256 for each in manifest_of(server, "all").segments)
    assert unread == []
    log = (tmp_path / "nginx" / "error.log").read_text()
    assert "[error]" not in log


def test_a_part_of_a_file_has_the_tag_that_the_protocol_says(
    server: SyncServer, proxy: str, images: Path, unread: list[int]
) -> None:
    segment = manifest_of(server, "all").segments[0]
    (path,) = images.glob(f"*/{segment.sha256.hex()}.segment")
    whole, url = path.read_bytes(), address(proxy, segment.sha256)
    tag = f'"{segment.sha256.hex()}"'
    status, headers, body = got(url)
    assert (status, body, headers["etag"]) == (200, whole, tag)
    assert headers["content-type"] == "application/vnd.entidb.segment"
    assert "immutable" in headers["cache-control"]
    assert "x-accel-redirect" not in headers
    status, headers, body = got(url, Range="bytes=10-29")
    assert (status, body, headers["etag"]) == (206, whole[10:30], tag)
    assert headers["content-range"] == f"bytes 10-29/{len(whole)}"
    assert got(url, Range="bytes=10-29", If_Range=tag)[::2] == (206, whole[10:30])
    assert got(url, Range="bytes=10-29", If_Range='"other"')[::2] == (200, whole)
    assert got(url, If_None_Match=tag)[0] == 304
    assert got(url, Range=f"bytes={len(whole)}-")[0] == 416
    assert unread == []


def test_only_the_server_says_who_may_have_a_file(server: SyncServer, proxy: str) -> None:
    manifest = manifest_of(server, "all")
    lists = manifest.collections.index("lists")
    for segment in manifest.segments:
        url = address(proxy, segment.sha256)
        assert got(url, "lists")[0] == (200 if segment.collection == lists else 403)
        assert got(url, None)[0] == 401
        name = f"=shop-1.a.entidb/{segment.sha256.hex()}.segment"
        assert got(f"{proxy}/images/{name}")[0] == 404
    assert got(address(proxy, bytes(32)))[0] == 404


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o750, 0o700, 0o755])
def test_who_may_read_the_directory_may_read_the_files(
    server: SyncServer, images: Path, mode: int
) -> None:
    server.images.drop(DB)
    images.chmod(mode)
    assert server.images.make(DB)
    (folder,) = (path for path in images.iterdir() if path.is_dir())
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode & 0o666

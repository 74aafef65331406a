"""Images of databases in PostgreSQL: nodes with one directory for their files, and with several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.db.images import read_images
from entidb.db.maintenance import dump
from entidb.db.verifying import verify
from entidb.errors import ConfigError
from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.segments.building import ELSEWHERE_MS
from entidb.sync import HttpTransport, HttpxClient, RetryConfig, SyncConfig, SyncEngine
from entidb.sync.transport import HttpResponse
from tests.server.support import ManualClock
from tests.server.test_images import LEAST, TINY, asked, code_of, downloaded, fetch, fill, granting
from tests.storage.postgres_cluster import Cluster
from tests.storage.test_postgres_sharing import own_database

COUNT = 200
MakeNode = Callable[..., SyncServer]


@pytest.fixture
def address(postgres: Cluster) -> Iterator[str]:
    with own_database(postgres) as made:
        yield made


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def node(address: str, clock: ManualClock) -> Iterator[MakeNode]:
    """Makes a node with its images in the directory that is given."""
    with ExitStack() as stack:

        def make(place: Path | None, **settings: Any) -> SyncServer:
            options = {"authenticator": granting, "segments_min_entities": LEAST, **settings}
            config = ServerConfig(data_dir=address, segments_dir=place, **options)
            server = stack.enter_context(SyncServer(config, clock=clock))
            server.images.background = False
            server.images.sizes = TINY
            return server

        yield make


def files(place: Path, db_id: str = "shop") -> list[str]:
    folder = place / f"{db_id}.entidb"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_what_one_node_has_made_every_node_with_that_directory_serves(
    node: MakeNode, tmp_path: Path
) -> None:
    one, other = node(tmp_path / "images"), node(tmp_path / "images")
    fill(one.database("shop"), range(COUNT))
    assert one.images.make("shop")
    manifest = asked(other)
    assert manifest.entities == COUNT
    assert downloaded(other, manifest) == downloaded(one, asked(one))
    assert not other.images.make("shop"), "one is enough for all"
    fill(other.database("shop"), range(COUNT), text="again")
    assert other.images.make("shop")
    assert asked(one).head > manifest.head
    assert downloaded(one, manifest), "who is on his way goes on"


def test_without_a_directory_a_node_makes_none_and_says_so(node: MakeNode) -> None:
    server = node(None)
    fill(server.database("shop"), range(COUNT))
    assert not server.images.enabled
    assert not server.images.make("shop")
    assert asked(server).segments == []


class Turning(HttpxClient):
    """What a balancer does: each request for a segment goes to the next of the nodes."""

    def __init__(self, urls: list[str]) -> None:
        super().__init__()
        self._urls = urls
        self.asked = 0

    def request(self, method: str, url: str, *rest: Any, **more: Any) -> HttpResponse:
        if method == "GET":
            self.asked += 1
            url = self._urls[self.asked % len(self._urls)] + url.removeprefix(self._urls[0])
        return super().request(method, url, *rest, **more)


@pytest.mark.parametrize("same", [True, False], ids=["one directory", "two"])
def test_a_device_whose_requests_go_to_several_nodes_has_all_in_the_end(
    node: MakeNode, tmp_path: Path, same: bool
) -> None:
    given = {"authenticator": None, "insecure_no_auth": True}
    places = [tmp_path / "images", tmp_path / ("images" if same else "others")]
    servers = [node(place, **given) for place in places]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        shop = servers[0].database("shop")
        fill(shop, range(COUNT))
        assert servers[0].images.make("shop")
        fill(shop, range(5), text="later")
        client = Turning(urls)
        device = stack.enter_context(Database.open(tmp_path / "device"))
        config = SyncConfig(db_id="shop", retry=RetryConfig.none())
        transport = HttpTransport(urls[0], client=client)
        stack.enter_context(SyncEngine(config, transport, device)).sync()
        assert list(dump(device)) == list(dump(shop))
        assert verify(device) == []
        segments = len(asked(servers[0], "any").segments)
        assert client.asked == segments if same else 0 < client.asked < segments


def test_a_node_with_another_directory_leaves_images_alone_that_are_of_use(
    node: MakeNode, tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = node(tmp_path / "images"), node(tmp_path / "others")
    database = one.database("shop")
    fill(database, range(COUNT))
    assert one.images.make("shop")
    manifest, made = asked(one), files(tmp_path / "images")
    other.database("shop")
    with caplog.at_level(logging.WARNING, "entidb.server"):
        assert not other.images.make("shop")
        assert not other.images.make("shop")
    assert [record.message for record in caplog.records if "segments_dir" in record.message] == [
        "database shop: another node has its images in another directory, so they are of no use "
        "here: give all nodes the same segments_dir"
    ]
    assert asked(other).segments == []
    assert code_of(fetch(other, manifest.segments[0].sha256)) == "not_found"
    assert files(tmp_path / "images") == made
    assert downloaded(one, asked(one))
    # Nobody asks any more: that directory may be gone for good.
    clock.advance(2 * ELSEWHERE_MS / 1000)
    assert other.images.make("shop")
    assert downloaded(other, asked(other))
    with database.view() as view:
        assert len(read_images(view).rows) == 1
    assert not one.images.make("shop")
    assert files(tmp_path / "images") == []


def test_files_of_a_database_that_is_gone_are_removed_and_nothing_else(
    node: MakeNode, tmp_path: Path
) -> None:
    place = tmp_path / "images"
    server = node(place)
    for db_id in ("shop", "stall"):
        fill(server.database(db_id), range(COUNT))
        assert server.images.make(db_id)
    (place / "shop.entidb" / "data.mdb").write_bytes(b"somebody's")
    server.stores.close()
    for db_id in ("shop", "stall"):
        server.place.put_aside(db_id, 1)
    server.images.look()
    assert sorted(path.name for path in place.iterdir()) == ["entidb-segments.id", "shop.entidb"]
    assert files(place) == ["data.mdb"]


def test_a_directory_whose_name_cannot_be_read_is_not_used(node: MakeNode, tmp_path: Path) -> None:
    place = tmp_path / "images"
    place.mkdir()
    (place / "entidb-segments.id").write_text("")
    server = node(place)
    fill(server.database("shop"), range(COUNT))
    with pytest.raises(OSError, match=r"entidb-segments.id does not say which directory this is"):
        server.images.make("shop")
    (place / "entidb-segments.id").unlink()
    assert server.images.make("shop")


@pytest.mark.parametrize("place", ["data", "backups", ""])
def test_the_directory_is_one_of_its_own(tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match="segments_dir is"):
        ServerConfig(
            data_dir=tmp_path / "data",
            backup_dir=tmp_path / "backups",
            segments_dir=tmp_path / place if place else "",
            insecure_no_auth=True,
        )


@pytest.mark.parametrize("path", ["images", "/images", "/a b/", "/../", "/im%61ges/", "//", "/"])
def test_a_redirect_goes_to_a_path(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="segments_redirect_to is a path like"):
        ServerConfig(data_dir=tmp_path / "data", segments_redirect_to=path, insecure_no_auth=True)


def test_a_redirect_needs_a_directory_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="segments_redirect_to needs segments_dir"):
        ServerConfig(data_dir=tmp_path, segments_redirect_to="/images/", insecure_no_auth=True)


def test_a_server_in_memory_has_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="segments_dir needs data_dir"):
        ServerConfig(data_dir=None, segments_dir=tmp_path, insecure_no_auth=True)

"""A person is erased: from the entities, from the bytes of every file, from devices that ask."""

from __future__ import annotations

import errno
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database, Index, Role
from entidb.errors import ConfigError, PermissionDeniedError, ProtocolError, StorageFullError
from entidb.packing import ENCODINGS, decompress
from entidb.protocol import Manifest, SnapshotRequest
from entidb.server import ServerConfig, SyncServer, serving, wire
from entidb.server.admin import backups, care, databases, erase
from entidb.server.admin import checking as checking_room
from entidb.server.admin.callers import Caller
from entidb.server.admin.opening import office_of
from entidb.server.admin.tasks import Task
from entidb.server.auth import Grants
from entidb.server.config import directory_name
from entidb.server.segments.building import ELSEWHERE_MS, StoppedError
from entidb.server.segments.places import FOLDER
from tests.server.support import ManualClock, pull
from tests.server.test_backups import ROOT, Device, Place
from tests.storage.postgres_cluster import Cluster
from tests.storage.sqlite_store import SqliteStorage
from tests.storage.test_postgres_sharing import own_database

SECRET = "ada-lovelace-of-marylebone"
WANTED = {"people": {"name": SECRET}}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    database = made.server.database("shop")
    database.collection("people", indexes=[Index("name")])
    with database.transaction() as tx:
        for number in range(700):
            name = SECRET if number < 600 else f"other-{number}"
            tx.collection("people")[uuid.UUID(int=number + 1)] = {"name": name}
    yield made
    made.server.close()


def holding(root: Path, words: str) -> list[str]:
    return [
        str(path.relative_to(root))
        for path in sorted(root.rglob("*"))
        if path.is_file() and words.encode() in path.read_bytes()
    ]


def in_images(root: Path, words: str) -> list[str]:
    """Segments below ``root`` that have the words, packed as they are."""
    found = []
    for path in sorted(root.rglob("*.segment")):
        content = path.read_bytes()
        begins = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}[ENCODINGS[0]]
        packed = content[content.index(begins) :]
        data = decompress(ENCODINGS[0], packed, 2**26, path.name, wire.too_large)
        found += [path.name] if words.encode() in data else []
    return found


def erased(place: Place, **given: bool) -> Task:
    seen = erase.preview(place.office, ROOT, "shop", WANTED)
    return place.over(erase.erase(place.office, ROOT, "shop", WANTED, seen.confirm, **given))


def test_an_erasure_whose_images_stay_says_what_is_done_and_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    def full(db_id: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(place.server.images, "drop", full)
        task = erased(place)
    assert task.state == "failed"
    said = str(task.error)
    assert said.startswith("the entities are deleted, and bytes of them may still be in the files")
    assert "cleaning up: the disk is full" in said and "erase once more" in said
    assert erased(place).state == "done"
    assert not holding(place.root, SECRET)


def test_no_file_of_the_server_has_a_byte_of_what_was_erased(place: Place):
    assert holding(place.root, SECRET)
    seen = erase.preview(place.office, ROOT, "shop", WANTED)
    assert (seen.collections, seen.entities) == ({"people": 600}, 600)
    task = place.over(erase.erase(place.office, ROOT, "shop", WANTED, seen.confirm))
    assert task.state == "done", task.error
    assert task.result["erased"] == {"people": 600}
    assert holding(place.root, SECRET) == []
    assert holding(place.root, "other-650")
    assert len(place.server.database("shop").collection("people")) == 100
    (entry,) = [each for each in place.office.audit.newest(9) if each.action == "erase"]
    assert entry.result == "done" and SECRET not in str(entry)
    assert SECRET not in str(task)


def test_in_another_store_it_is_gone_too(tmp_path: Path):
    root = tmp_path / "data"

    def open_database(db_id: str, create: bool) -> Database:
        return Database(SqliteStorage(root / directory_name(db_id)), role=Role.SERVER)

    config = ServerConfig(data_dir=root, insecure_no_auth=True)
    with SyncServer(config, open_database=open_database) as server:
        office = office_of(server)
        people = server.database("shop").collection("people")
        for number in range(20):
            people[uuid.UUID(int=number + 1)] = {"name": SECRET if number else "other"}
        assert holding(root, SECRET)
        seen = erase.preview(office, ROOT, "shop", WANTED)
        task = erase.erase(office, ROOT, "shop", WANTED, seen.confirm)
        found = office.tasks.wait(task.id, 60)
        assert found is not None and found.state == "done", found
        assert (found.result["erased"], len(people)) == ({"people": 19}, 1)
        assert holding(root, SECRET) == found.result["storage_may_keep_it"] == []


def test_a_device_that_syncs_loses_it(place: Place):
    device = Device(place)
    device.engine.sync()
    people = device.database.collection("people")
    assert len(people) == 700
    erased(place)
    device.engine.sync()
    assert len(people) == 100
    assert erased(place).result["erased"] == {"people": 0}


def test_devices_that_have_not_fetched_the_deletion_are_named(place: Place):
    history = place.history()
    asked = pull(history, cursor=1)
    place.office.registry.heard(asked, Grants("ada", {}), code=None)
    place.office.registry.pulled(asked, 1)
    result = erased(place).result
    assert result["devices_that_may_hold_it"] == [asked.device_id.hex()]
    assert result["devices_that_pull_anew"] == 1
    assert result["floor"] == result["head"] > 1
    place.office.registry.pulled(asked, result["head"])
    again = erased(place).result
    assert again["devices_that_may_hold_it"] == []
    assert again["devices_that_pull_anew"] == 0


def test_backups_that_have_it_are_named_and_removed_only_when_asked(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backups, "check", lambda path, go_on: checking_room._look(path))
    identity = place.backup()
    task = erased(place)
    assert task.result["backups_with_it"] == [identity] == place.ids()
    people = place.server.database("shop").collection("people")
    people[uuid.UUID(int=1)] = {"name": SECRET}
    other = place.backup()
    assert sorted(place.ids()) == sorted([identity, other])
    task = erased(place, with_backups=True)
    assert sorted(task.result["backups_removed"]) == sorted([identity, other])
    assert (task.result["backups_with_it"], place.ids()) == ([], [])
    assert holding(place.backups, SECRET) == []


def test_what_is_erased_is_what_was_looked_at(place: Place):
    seen = erase.preview(place.office, ROOT, "shop", WANTED)
    people = place.server.database("shop").collection("people")
    people[uuid.UUID(int=1)] = {"name": SECRET, "more": 1}
    with pytest.raises(ConfigError) as refused:
        erase.erase(place.office, ROOT, "shop", WANTED, seen.confirm)
    assert refused.value.code == "not_confirmed"
    assert len(people) == 700
    (entry,) = [each for each in place.office.audit.newest(9) if each.action == "erase"]
    assert entry.result == "not_confirmed" and SECRET not in str(entry)


@pytest.mark.parametrize("wanted", [{}, {"people": {}}, {"nothing": {"name": "x"}}])
def test_a_question_that_means_everything_or_nothing_is_refused(place: Place, wanted: erase.Wanted):
    with pytest.raises(ProtocolError):
        erase.preview(place.office, ROOT, "shop", wanted)


def test_too_much_at_once_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(erase, "ERASED_MAX", 599)
    with pytest.raises(ConfigError, match="more than 599 entities"):
        erase.preview(place.office, ROOT, "shop", WANTED)


def test_who_does_not_administer_the_database_erases_nothing(place: Place):
    other = Caller("eve", "test", frozenset(["store"]))
    with pytest.raises(PermissionDeniedError):
        erase.preview(place.office, other, "shop", WANTED)
    with pytest.raises(PermissionDeniedError):
        erase.erase(place.office, other, "shop", WANTED, "")


def test_an_image_that_has_it_goes_and_holds_no_deletion_back(tmp_path: Path):
    place = Place(tmp_path, segments_min_entities=50)
    try:
        images = place.server.images
        images.background = False
        with place.server.database("shop").transaction() as tx:
            for number in range(200):
                name = SECRET if number < 100 else f"other-{number}"
                tx.collection("people")[uuid.UUID(int=number + 1)] = {"name": name}
        assert images.make("shop")
        history = place.history()
        request = SnapshotRequest(db_id="shop", device_id=b"d" * 16, packings=[*ENCODINGS])
        manifest = place.server.handle("/v1/snapshot", None, request)
        assert isinstance(manifest, Manifest) and manifest.segments
        result = erased(place).result
        assert result["floor"] == result["head"] > manifest.head
        assert not list((place.root / FOLDER).rglob("*.segment"))
        again = place.server.handle("/v1/snapshot", None, request)
        assert isinstance(again, Manifest) and not again.segments
        assert images.make("shop")
        newer = place.server.handle("/v1/snapshot", None, request)
        assert isinstance(newer, Manifest)
        assert (newer.entities, newer.history) == (100, history)
    finally:
        place.server.close()


def test_an_image_that_is_being_made_gives_way_to_a_compaction(tmp_path: Path):
    """It has a snapshot open for as long as it takes, and a compaction waits for seconds."""
    place = Place(tmp_path, segments_min_entities=50)
    images, began, over = place.server.images, threading.Event(), threading.Event()
    images.background = False
    fill(place.server, 20_000)

    def slowly() -> None:
        began.set()
        over.wait(0.3)

    ended: list[type[BaseException] | None] = []

    def build() -> None:
        try:
            images.make("shop", slowly)
            ended.append(None)
        except StoppedError as error:
            ended.append(type(error))

    builder = threading.Thread(target=build)
    builder.start()
    try:
        assert began.wait(60)
        task = place.over(care.compact(place.office, ROOT, "shop"))
        assert task.state == "done", task.error
        builder.join(60)
        assert ended == [StoppedError]
        over.set()
        assert images.make("shop", slowly)  # when it is over, images are made again
    finally:
        over.set()
        builder.join(60)
        place.server.close()


def test_an_erasure_that_cannot_compact_says_what_is_done_and_what_is_not(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    def full(database: Database) -> None:
        raise StorageFullError("no space left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "compact", full)
        task = erased(place)
    assert task.state == "failed"
    assert "are deleted" in str(task.error) and "no space left" in str(task.error)
    assert "erase once more" in str(task.error)
    assert holding(place.root, SECRET)
    again = erased(place)
    assert again.state == "done", again.error
    assert not holding(place.root, SECRET)


def fill(server: SyncServer, count: int = 200) -> None:
    with server.database("shop").transaction() as tx:
        for number in range(count):
            name = SECRET if number < 100 else f"other-{number}"
            tx.collection("people")[uuid.UUID(int=number + 1)] = {"name": name}


def image_of(server: SyncServer) -> SyncServer:
    server.images.background = False
    with server.stores.using("shop", create=False):
        assert server.images.make("shop")
    return server


def erase_on(server: SyncServer) -> Any:
    office = office_of(server)
    seen = erase.preview(office, ROOT, "shop", WANTED)
    task = erase.erase(office, ROOT, "shop", WANTED, seen.confirm)
    found = office.tasks.wait(task.id, 60)
    assert found is not None and found.state == "done", found
    return found.result


def test_images_in_a_directory_that_the_server_had_before_go_too(tmp_path: Path):
    places = [None, tmp_path / "one", tmp_path / "two"]
    for place in places:
        config = ServerConfig(
            data_dir=tmp_path / "data",
            insecure_no_auth=True,
            segments_min_entities=50,
            segments_dir=place,
        )
        with SyncServer(config) as server:
            if place is None:
                fill(server)
            image_of(server)
    assert len(in_images(tmp_path, SECRET)) == 3
    os.rename(tmp_path / "one", tmp_path / "unmounted")
    with SyncServer(config) as server:
        result = erase_on(server)
    assert result["images_may_hold_it"] == [f"{socket.gethostname()}:{tmp_path / 'one'}"]
    assert len(in_images(tmp_path, SECRET)) == len(in_images(tmp_path / "unmounted", SECRET)) == 1
    os.rename(tmp_path / "unmounted", tmp_path / "one")
    with SyncServer(config) as server:
        assert erase_on(server)["images_may_hold_it"] == []
    assert in_images(tmp_path, SECRET) == []


def test_images_in_directories_of_other_nodes_go_when_these_can(tmp_path: Path, postgres: Cluster):
    def node(address: str, place: str) -> SyncServer:
        config = ServerConfig(
            data_dir=address,
            insecure_no_auth=True,
            segments_min_entities=50,
            segments_dir=tmp_path / place,
        )
        return SyncServer(config, clock=clock)

    clock = ManualClock()
    with own_database(postgres) as address, ExitStack() as stack:
        with node(address, "away") as away:
            fill(away)
            image_of(away)
        # The images of that directory count until nobody asks for them any more.
        clock.advance(2 * ELSEWHERE_MS / 1000)
        serving_one = stack.enter_context(node(address, "serving"))
        image_of(serving_one)
        other = stack.enter_context(node(address, "other"))
        clock.advance(2 * ELSEWHERE_MS / 1000)
        image_of(other)
        assert len(in_images(tmp_path, SECRET)) == 3
        for server in (serving_one, other):
            stack.enter_context(serving(server))
        # What has another name now is still in files of its old one there.
        databases.rename(office_of(serving_one), ROOT, "shop", "store")
        databases.rename(office_of(serving_one), ROOT, "store", "shop")
        result = erase_on(serving_one)
        host = socket.gethostname()
        assert result["images_may_hold_it"] == [f"{host}:{tmp_path / 'away'}"]
        assert len(in_images(tmp_path, SECRET)) == len(in_images(tmp_path / "away", SECRET)) == 1
        # It comes back, without making images any more, and with its first housekeeping they go.
        with node(address, "away") as back:
            back.images.background = False
            back.housekeep()
            assert in_images(tmp_path, SECRET) == []
            assert back.images.left("shop") == []
        assert erase_on(serving_one)["images_may_hold_it"] == []


def test_a_record_of_directories_that_cannot_be_read_is_named(tmp_path: Path):
    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True, segments_min_entities=50)
    with SyncServer(config) as server:
        fill(server)
        image_of(server)
        (tmp_path / "entidb-images.json").write_text("{")
        office = office_of(server)
        seen = erase.preview(office, ROOT, "shop", WANTED)
        task = erase.erase(office, ROOT, "shop", WANTED, seen.confirm)
        found = office.tasks.wait(task.id, 60)
        assert found is not None and found.state == "failed"
        assert "entidb-images.json does not say in which directories" in str(found.error)
        (tmp_path / "entidb-images.json").unlink()
        assert erase_on(server)["images_may_hold_it"] == []
    assert in_images(tmp_path, SECRET) == []

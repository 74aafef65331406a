"""What databases use of what they may, and their images, as an administrator sees them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db.images import ImageRows
from entidb.errors import PermissionDeniedError
from entidb.server import Grants, ServerConfig, SyncServer, serving
from entidb.server.admin import access, holding
from entidb.server.admin.callers import Caller
from entidb.server.admin.opening import office_of
from entidb.server.segments.files import FolderFiles
from entidb.server.segments.rows import change_images
from tests.cli.support import done
from tests.server.support import ManualClock, handshake, push

ROOT = Caller("root", "test")
SHOPKEEPER = Caller("ada", "test", frozenset(["shop"]))
LEAST = 50


def make(root: Path, clock: ManualClock, **settings: Any) -> SyncServer:
    config = ServerConfig(data_dir=root / "data", insecure_no_auth=True, **settings)
    return SyncServer(config, clock=clock)


def fill(server: SyncServer, count: int, db_id: str = "shop") -> None:
    history = server.handle("/v1/handshake", None, handshake(db_id)).history  # type: ignore[union-attr]
    server.handle("/v1/push", None, push(history, *range(1, count + 1), db_id=db_id))


def meet(server: SyncServer, number: int, subject: str, db_id: str = "shop") -> str:
    device = replace(handshake(db_id), device_id=number.to_bytes(16, "big"))
    server.registry.heard(device, Grants(subject, {}), code=None)
    return device.device_id.hex()


def test_quotas_say_what_is_used_and_the_fullest_is_first(tmp_path: Path) -> None:
    clock = ManualClock()
    limits = {
        "database_entities_max": 10,
        "database_bytes_max": 10_000_000,
        "database_devices_max": 5,
        "subject_devices_max": 2,
        "subject_requests_per_s": 50.0,
    }
    with make(tmp_path, clock, **limits) as server:
        office = office_of(server)
        fill(server, 9)
        fill(server, 1, "catalog")
        lost = meet(server, 1, "ada")
        meet(server, 2, "ada")
        meet(server, 3, "ben")
        found = holding.quotas(office, ROOT, database="shop")
        assert found.settings == {**dict.fromkeys(found.settings, 0.0), **limits}
        used = {(row.quota, row.subject): (row.used, row.allowed) for row in found.rows}
        size = used.pop(("database_bytes_max", None))
        with server.stores.using("shop", create=False) as store:
            assert size == (store.database.storage.info().used_bytes, 10_000_000)
        assert used == {
            ("database_entities_max", None): (9, 10),
            ("database_devices_max", None): (4, 5),
            ("subject_devices_max", "ada"): (2, 2),
            ("subject_devices_max", "ben"): (1, 2),
            ("subject_devices_max", "anonymous"): (1, 2),
        }
        assert found.rows[0].subject == "ada", "the fullest is first"
        # Who is revoked takes no room.
        access.revoke(office, ROOT, "device", lost, "shop")
        (row,) = [
            row
            for row in holding.quotas(office, ROOT, database="shop").rows
            if row.subject == "ada"
        ]
        assert row.used == 1
        # Of all databases, part by part; and nobody sees what is not his.
        holding.quotas(office, ROOT, database="catalog")
        everything = holding.quotas(office, ROOT)
        assert everything.total == len(everything.rows) == 6 + 4
        assert [row.used for row in holding.quotas(office, ROOT, offset=9, limit=5).rows] == [
            everything.rows[-1].used
        ]
        assert {row.database for row in holding.quotas(office, SHOPKEEPER).rows} == {"shop"}
        with pytest.raises(PermissionDeniedError):
            holding.quotas(office, SHOPKEEPER, database="catalog")


def test_what_a_closed_database_uses_is_known_and_what_nobody_opened_is_not(
    tmp_path: Path,
) -> None:
    with make(tmp_path, ManualClock()) as server:
        fill(server, 3)
        fill(server, 3, "catalog")
    with make(tmp_path, ManualClock(), database_entities_max=100) as server:
        office = office_of(server)
        rows = holding.quotas(office, ROOT).rows
        assert {row.database: row.used for row in rows} == {"shop": None, "catalog": None}
        holding.quotas(office, ROOT, database="shop")
        server.registry.flush()
    with make(tmp_path, ManualClock(), database_entities_max=100) as server:
        office = office_of(server)
        rows = holding.quotas(office, ROOT).rows
        assert {row.database: row.used for row in rows} == {"shop": 3, "catalog": None}
        assert server.stores.open_count == 0


def test_images_say_how_old_and_how_large_they_are(tmp_path: Path) -> None:
    clock = ManualClock()
    with make(tmp_path, clock, segments_min_entities=LEAST) as server:
        office = office_of(server)
        server.images.background = False
        fill(server, 2 * LEAST)
        fill(server, 1, "catalog")
        assert holding.images(office, ROOT) == []
        assert server.images.make("shop")
        (image,) = holding.images(office, ROOT)
        assert (image.database, image.entities, image.counts) == ("shop", 2 * LEAST, True)
        assert (image.made_ms, image.behind) == (clock.now_ms(), 0)
        kept = server.images.files("shop")
        assert isinstance(kept, FolderFiles)
        files = [*kept._folder.glob("*.segment")]
        assert image.segments == len(files)
        assert image.bytes == sum(path.stat().st_size for path in files)
        fill(server, 2 * LEAST + 3)
        assert holding.images(office, ROOT, database="shop")[0].behind == 3
        assert holding.images(office, ROOT, database="catalog") == []
    # Of a closed database the files say what there is.
    with make(tmp_path, clock, segments_min_entities=LEAST) as server:
        office = office_of(server)
        (image,) = holding.images(office, ROOT)
        assert (image.entities, image.counts, image.until_ms) == (2 * LEAST, None, None)
        assert server.stores.open_count == 0
        # Once it does not count any more, that is said.
        with server.stores.using("shop", create=False) as store:
            change_images(store.database, lambda writer, rows: ImageRows())
            (image,) = holding.images(office, ROOT)
            assert image.counts is False


def shown(data_dir: Path, *command: str) -> str:
    return done("admin", "--dir", data_dir, *command)


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix", reason="POSIX")
def test_the_command_line_shows_quotas_and_images(tmp_path: Path) -> None:
    config = ServerConfig(
        data_dir=tmp_path / "data",
        insecure_no_auth=True,
        database_entities_max=200,
        database_bytes_max=2**20,
        segments_min_entities=LEAST,
    )
    with SyncServer(config) as server:
        server.images.background = False
        with serving(server):
            assert shown(tmp_path / "data", "images") == "none\n"
            fill(server, 2 * LEAST)
            assert server.images.make("shop")
            said = shown(tmp_path / "data", "quotas", "--database", "shop")
            assert re.search(r"shop +database_entities_max +100 +200 +50 %", said), said
            assert "database_bytes_max" in said and "1.0 MiB" in said
            said = shown(tmp_path / "data", "images")
            assert re.search(r"shop .* 100 .* offered", said), said


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix", reason="POSIX")
def test_the_command_line_says_how_quotas_are_set_where_there_are_none(tmp_path: Path) -> None:
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with SyncServer(config) as server, serving(server):
        assert "--database-bytes-max" in shown(tmp_path / "data", "quotas")

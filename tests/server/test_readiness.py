"""Whether a server should be given work, and what it counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.admin.opening import office_of
from entidb.server.admin.readiness import Readiness
from tests.server.support import Client, ManualClock


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def readiness(root: Path, clock: ManualClock, **settings: Any) -> tuple[SyncServer, Readiness]:
    config = ServerConfig(data_dir=root / "data", insecure_no_auth=True, **settings)
    server = SyncServer(config, clock=clock)
    return server, Readiness(office_of(server))


def test_a_full_disk_is_a_reason_and_one_look_counts_for_seconds(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    server, ready = readiness(tmp_path, clock, ready_disk_bytes_min=1000)
    looks = []

    def usage(path: Any) -> Usage:
        looks.append(path)
        return Usage(10_000, 9_001, 999)

    with server:
        assert ready.reasons() == ()
        monkeypatch.setattr(shutil, "disk_usage", usage)
        assert ready.reasons() == ()
        clock.advance(5)
        for _ in range(10):
            assert ready.reasons() == ("disk",)
        assert len(looks) == 1


def test_a_directory_that_cannot_be_written_is_a_reason(tmp_path: Path, clock: ManualClock):
    server, ready = readiness(tmp_path, clock)
    with server:
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        assert ready.reasons() == ("storage",)
        (tmp_path / "elsewhere").rename(tmp_path / "data")
        clock.advance(5)
        assert ready.reasons() == ()


def test_a_look_leaves_nothing_behind(tmp_path: Path, clock: ManualClock):
    server, ready = readiness(tmp_path, clock)
    with server:
        before = sorted(path.name for path in (tmp_path / "data").iterdir())
        assert ready.reasons() == ()
        assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before


@pytest.mark.process
def test_it_is_asked_without_a_token_and_says_nothing_of_databases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "secret").write_bytes(b"x" * 40)
    config = ServerConfig(
        data_dir=tmp_path / "data", jwt_secret_file=tmp_path / "secret", metrics=True
    )
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        found = client.request("GET", "/readyz")
        assert (found.status, json.loads(found.body)) == (200, {"status": "ready"})
        assert client.request("POST", "/readyz").status == 405
        office_of(server).late_backups = ["a name that is nobody's business"]
        monkeypatch.setattr("entidb.server.admin.readiness.LOOK_S", 0.0)
        found = client.request("GET", "/readyz")
        assert found.status == 503
        said = json.loads(found.body)
        assert (said["status"], said["reasons"]) == ("not ready", ["backups"])
        assert "entidb admin backup --all" in said["to_do"][0]
        assert "business" not in found.body.decode()
        assert client.request("GET", "/healthz").status == 200
        client.request("POST", "/v1/pull")
        counted = client.request("GET", "/metrics").body.decode()
    assert 'entidb_refused_total{code="unauthorized"} 1.0' in counted
    assert "entidb_backups_late 1.0" in counted
    assert "entidb_tasks 0.0" in counted
    assert "entidb_revoked 0.0" in counted
    assert "business" not in counted

"""The metrics of a server, and the files of the docs that go by them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.registry import About
from tests.server.support import Client, pull, push
from tests.server.test_app import running

pytestmark = pytest.mark.process

FILES = Path(__file__).parents[2] / "docs" / "operations"
NAMED = re.compile(r"\bentidb_[a-z_]+")


def told(url: str) -> str:
    with Client(url) as client:
        return client.request("GET", "/metrics").body.decode()


def exported(text: str) -> set[str]:
    """The names of all samples."""
    families = re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE)
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + part for name, kind in families for part in parts.get(kind, ("",))}


def test_dashboard_and_alerts_name_metrics_that_are_exported_and_the_dashboard_shows_all(
    tmp_path: Path,
) -> None:
    with running(metrics=True) as (_, url):
        assert "entidb_disk_free_bytes" not in told(url), "it knows of no disk"
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True, metrics=True)
    with SyncServer(config) as server, serving(server) as url:
        there = exported(told(url))
    dashboard = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set(NAMED.findall("\n".join(asked)))
    alerts = set(NAMED.findall((FILES / "alerts.yml").read_text(encoding="utf-8")))
    assert shown and shown <= there
    assert alerts and alerts <= there
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in there}
    ours = {name for name in families if name.startswith("entidb_") and "_created" not in name}
    # That backups are late is an alert.
    assert ours - {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == {
        "entidb_backups_late"
    }


def test_panels_have_ids_of_their_own_and_lie_beside_each_other() -> None:
    dashboard = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))
    places = [(each["gridPos"]["x"], each["gridPos"]["y"]) for each in dashboard["panels"]]
    assert len(set(places)) == len({each["id"] for each in dashboard["panels"]}) == len(places)


def test_groups_of_pushes_are_measured() -> None:
    with running(metrics=True) as (_, url), Client(url) as client:
        history = client.history()
        client.send(push(history, 1))
        client.send(push(history, 2))
        text = told(url)
    assert "entidb_group_pushes_sum 2.0" in text
    assert re.search(r"^entidb_group_seconds_count [12]\.0$", text, re.MULTILINE)


def test_times_are_told_apart_by_how_large_the_database_is(tmp_path: Path) -> None:
    def times(text: str) -> dict[str, float]:
        found = re.findall(
            r'^entidb_request_seconds_count\{entities="(\w+)",path="/v1/pull"\} (\S+)$',
            text,
            re.MULTILINE,
        )
        return {label: float(number) for label, number in found}

    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True, metrics=True)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        history = client.history()
        client.send(pull(history))
        assert times(told(url)) == {"unknown": 1.0}
        for entities, label in ((1000, "1000"), (1001, "100000"), (100_001, "more")):
            server.registry.note("shop", About(entities=entities))
            client.send(pull(history))
            assert times(told(url))[label] == 1.0
        client.request("GET", "/healthz")
        text = told(url)
    assert 'entidb_request_seconds_count{entities="none",path="/healthz"} 1.0' in text
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        server.registry.about("shop")
        client.send(pull(history))
        assert times(told(url)) == {"more": 1.0}, "it is known from the last time"


def test_without_metrics_nobody_measures() -> None:
    with SyncServer.in_memory() as server, serving(server):
        assert server.stores.meter.note is None


def test_devices_are_counted_by_how_far_behind_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entidb.server.admin.summary._BELIEVED_S", 0.0)
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True, metrics=True)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        notes = server.database("shop").collection("notes")
        history = client.history()
        client.send(pull(history))
        for behind, label in ((0, "0"), (3, "10"), (20, "1000"), (1200, "more")):
            while server.database("shop").sequence < behind:
                notes.add({"text": "news"})
            counted = {
                each: float(number)
                for each, number in re.findall(
                    r'^entidb_devices\{behind="(\w+)"\} (\S+)$', told(url), re.MULTILINE
                )
            }
            assert counted == {**dict.fromkeys(("0", "10", "1000", "more"), 0.0), label: 1.0}
        text = told(url)
    assert "entidb_databases 1.0" in text
    assert float(re.search(r"^entidb_store_bytes (\S+)", text, re.MULTILINE)[1]) > 0  # type: ignore[index]
    free = re.search(r"^entidb_disk_free_bytes (\S+)", text, re.MULTILINE)
    assert free is not None and float(free[1]) > 0


def test_an_address_in_disguise_is_none() -> None:
    """A proxy may keep the plain one from the public, and know nothing of the others."""
    with running(metrics=True) as (_, url), Client(url) as client:
        assert client.request("GET", "/metrics").status == 200
        for disguise in ("/%6detrics", "/%6Detrics", "/v1%2finfo", "/v1/admin%2Fdatabases"):
            answer = client.request("GET", disguise)
            assert (answer.status, answer.code) == (404, "not_found"), disguise

"""Each alert of the docs fires where a server is in the state that it is for, and nowhere else: its
expression is looked up in what real servers say before and after."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from entidb.errors import ERROR_TABLE, REASONS
from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.front import Front
from tests.server.support import SECRET, Client, ManualClock, handshake, pull
from tests.server.test_app import eventually
from tests.server.test_metrics import FILES, told

pytestmark = pytest.mark.process

ALERTS: Final = dict(
    re.findall(r"- alert: (\w+)\n\s+expr: (.+)", (FILES / "alerts.yml").read_text(encoding="utf-8"))
)
_SAMPLE: Final = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)(=~|=)"([^"]*)"')

Text = str
Usage = namedtuple("Usage", "total used free")


def value(text: Text, selector: str) -> float:
    """The sum of what a selector finds, such as ``name{label=~"a|b"}``."""
    name, _, labels = selector.partition("{")
    wanted = _LABEL.findall(labels)
    total = 0.0
    for found, given, number in _SAMPLE.findall(text):
        has = {key: said for key, _, said in _LABEL.findall(given)}
        if found == name and all(
            re.fullmatch(said if how == "=~" else re.escape(said), has.get(key, ""))
            for key, how, said in wanted
        ):
            total += float(number)
    return total


def grown(before: Text, after: Text, name: str) -> float:
    """By how much the first selector of an alert has grown."""
    selector = re.search(r"entidb_\w+(?:\{[^}]*\})?", ALERTS[name])
    assert selector is not None
    return value(after, selector[0]) - value(before, selector[0])


def counts(name: str) -> Callable[[Text, Text], bool]:
    return lambda before, after: grown(before, after, name) > 0


def slow(before: Text, after: Text) -> bool:
    """Whether a hundredth of all groups took more than a second."""
    name = "entidb_group_seconds"
    every = value(after, f"{name}_count") - value(before, f"{name}_count")
    quick = [value(text, f'{name}_bucket{{le="1.0"}}') for text in (before, after)]
    return every > 0 and quick[1] - quick[0] < 0.99 * every


def full(before: Text, after: Text) -> bool:
    free = value(after, "entidb_disk_free_bytes")
    there = re.search("^entidb_disk_free_bytes ", after, re.MULTILINE) is not None
    return there and free < 2 * value(after, "entidb_store_bytes") and free < 5e9


def behind(before: Text, after: Text) -> bool:
    return value(after, 'entidb_devices{behind="more"}') > 0.2 * value(after, "entidb_devices")


FIRES: Final[dict[str, Callable[[Text, Text], bool]]] = {
    "EntidbBackupsLate": lambda before, after: value(after, "entidb_backups_late") > 0,
    "EntidbDiskNearlyFull": full,
    "EntidbErrors": counts("EntidbErrors"),
    "EntidbBusy": counts("EntidbBusy"),
    "EntidbRefusedTokens": counts("EntidbRefusedTokens"),
    "EntidbSlowCommits": slow,
    "EntidbDevicesFarBehind": behind,
}


@contextlib.contextmanager
def made(root: Path, **settings: Any) -> Iterator[tuple[SyncServer, str]]:
    settings = {"insecure_no_auth": True, "clock": ManualClock(), **settings}
    clock = settings.pop("clock")
    config = ServerConfig(data_dir=root / "data", metrics=True, **settings)
    with SyncServer(config, clock=clock) as server, serving(server) as url:
        yield server, url


Story = Callable[[Path, pytest.MonkeyPatch], tuple[Text, Text]]


def backups_late(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    clock = ManualClock()
    with made(root, clock=clock, backup_dir=root / "backups", backup_every_s=60.0) as (server, url):
        server.database("shop")
        before = told(url)
        clock.advance(300)
        server.housekeep()
        return before, told(url)


def disk_full(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    with made(root) as (server, url):
        server.database("shop")
        before = told(url)
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 5000, 5000))
        return before, told(url)


def errors(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    with made(root) as (_, url), Client(url) as client:
        client.history()
        before = told(url)
        patch.setattr(Front, "permit", lambda *given: 1 / 0)
        assert client.send(handshake()).status == 500
        return before, told(url)


def busy(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    with made(root, subject_requests_per_s=1.0) as (_, url), Client(url) as client:
        before = told(url)
        eventually(lambda: client.send(handshake()).status == 429)
        return before, told(url)


def busy_connections(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    with contextlib.ExitStack() as stack:
        _, url = stack.enter_context(made(root, connections_max=2))
        before = told(url)
        waiting = [stack.enter_context(Client(url)) for _ in range(2)]
        for client in waiting:
            client.connection.putrequest("POST", "/v1/handshake")
            client.connection.putheader("Content-Type", "application/cbor")
            client.connection.putheader("Content-Length", "100")
            client.connection.endheaders()
        with Client(url) as one_more:
            eventually(lambda: one_more.send(handshake()).status == 503)
        for client in waiting:
            client.connection.close()
        return before, told(url)


def tokens(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    (root / "secret").write_bytes(SECRET)
    given = {"insecure_no_auth": False, "jwt_secret_file": root / "secret"}
    with made(root, **given) as (_, url), Client(url) as client:
        before = told(url)
        assert client.send(handshake()).status == 401
        return before, told(url)


def slow_commits(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    with made(root) as (server, url):
        before = told(url)
        note = server.stores.meter.note
        assert note is not None
        note(3, 5.0)
        return before, told(url)


def far_behind(root: Path, patch: pytest.MonkeyPatch) -> tuple[Text, Text]:
    patch.setattr("entidb.server.admin.summary._BELIEVED_S", 0.0)
    with made(root) as (server, url), Client(url) as client:
        client.send(pull(client.history()))
        before = told(url)
        notes = server.database("shop").collection("notes")
        while server.database("shop").sequence < 1200:
            notes.add({"text": "news"})
        return before, told(url)


STORIES: Final[list[tuple[str, Story]]] = [
    ("EntidbBackupsLate", backups_late),
    ("EntidbDiskNearlyFull", disk_full),
    ("EntidbErrors", errors),
    ("EntidbBusy", busy),
    ("EntidbBusy", busy_connections),
    ("EntidbRefusedTokens", tokens),
    ("EntidbSlowCommits", slow_commits),
    ("EntidbDevicesFarBehind", far_behind),
]


@pytest.mark.parametrize(("name", "story"), STORIES)
def test_an_alert_fires_where_its_state_is_and_not_before(
    name: str, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = story(tmp_path, monkeypatch)
    assert not FIRES[name](before, before)
    assert FIRES[name](before, after)
    others = {each for each, fires in FIRES.items() if each != name and fires(before, after)}
    assert not others


def test_every_alert_has_its_state_and_every_code_in_one_is_a_code() -> None:
    # Whether a server answers at all is known to whoever asks it.
    assert ALERTS.keys() == {name for name, _ in STORIES} | {"EntidbDown"}
    assert FIRES.keys() == {name for name, _ in STORIES}
    codes = {
        code for named in re.findall(r'code=~"([^"]*)"', str(ALERTS)) for code in named.split("|")
    }
    assert codes and codes <= {*ERROR_TABLE, *REASONS.values()}

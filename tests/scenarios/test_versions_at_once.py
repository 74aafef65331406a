"""Two versions of one program on the same data at once, in both directions, offline and online:
what `docs/evolution.md` promises."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from entidb.db import Collection, Database
from entidb.errors import ConfigError, UpgradeRequiredError, ValueTypeError
from entidb.server import Refusal, ServerConfig, SyncServer
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from entidb.sync.http import HttpTransport
from entidb.sync.transport import LoopbackClient
from tests.support import FakeClock, uid

# ---------------------------------------------------------------- version 1 and version 2


@dataclass
class TaskOfVersion1:
    title: str
    minutes: int = 0


@dataclass
class TaskOfVersion2:
    """``minutes`` have become ``seconds``, and there is a new field."""

    title: str
    seconds: int = 0
    owner: str | None = None


def upgrade(stored: Any) -> Any:
    if "minutes" in stored:
        stored["seconds"] = 60 * stored.pop("minutes")
    return stored


def upcast(collection: str, value: Any, schema: int) -> Any:
    assert collection == "tasks" and schema == 1
    return upgrade(value)


class Installed:
    """A device with one version of the program on it; ``update`` puts the other one there."""

    def __init__(self, server: SyncServer, version: int) -> None:
        self.db = Database.in_memory(clock=FakeClock())
        self._server = server
        self._start(version)

    def _start(self, version: int) -> None:
        self.tasks: Collection[Any]
        if version == 1:
            self.tasks = self.db.collection("tasks", TaskOfVersion1)
        else:
            self.tasks = self.db.collection("tasks", TaskOfVersion2, upgrade=upgrade)
        config = SyncConfig(
            db_id="work", schema=version, default_policy="merge", retry=RetryConfig.none()
        )
        transport = HttpTransport("http://localhost", client=LoopbackClient(self._server))
        self.engine = SyncEngine(config, transport, self.db)

    def update(self) -> None:
        self.engine.close()
        self._start(2)

    def sync(self) -> None:
        self.engine.sync()

    def stored(self) -> dict[uuid.UUID, Any]:
        return dict(self.db["tasks"].items())

    def close(self) -> None:
        self.engine.close()
        self.db.close()


class Shop:
    """A server, and devices with either version."""

    def __init__(self, **config: Any) -> None:
        self.server = SyncServer(ServerConfig(data_dir=None, insecure_no_auth=True, **config))
        self.devices: list[Installed] = []

    def device(self, version: int) -> Installed:
        self.devices.append(Installed(self.server, version))
        return self.devices[-1]

    def stored(self) -> dict[uuid.UUID, Any]:
        return dict(self.server.database("work")["tasks"].items())

    def close(self) -> None:
        for device in self.devices:
            assert not device.db.verify()
            device.close()
        self.server.close()


@pytest.fixture
def shops() -> Iterator[list[Shop]]:
    opened: list[Shop] = []
    yield opened
    for shop in opened:
        shop.close()


@pytest.fixture
def free(shops: list[Shop]) -> Shop:
    """A server that does not look at versions."""
    shops.append(Shop())
    return shops[-1]


@pytest.fixture
def strict(shops: list[Shop]) -> Shop:
    """A server that does not let version 1 pull, and stores what it pushes as version 2 does."""
    shops.append(Shop(schema=2, schema_min=2, upcast=upcast))
    return shops[-1]


@pytest.fixture
def lenient(shops: list[Shop]) -> Shop:
    """As ``strict``, and version 1 may pull."""
    shops.append(Shop(schema=2, upcast=upcast))
    return shops[-1]


# ---------------------------------------------------------------- nobody looks at versions


def test_the_new_program_reads_and_changes_what_the_old_one_wrote(free: Shop) -> None:
    old, new = free.device(1), free.device(2)
    old.tasks[uid(1)] = TaskOfVersion1("milk", minutes=5)
    old.sync()
    new.sync()
    assert new.tasks[uid(1)] == TaskOfVersion2("milk", seconds=300)
    new.tasks.patch(uid(1), owner="Ada")
    new.sync()
    assert free.stored()[uid(1)] == {"title": "milk", "seconds": 300, "owner": "Ada"}


def test_the_old_program_changes_what_the_new_one_wrote_and_erases_nothing(free: Shop) -> None:
    old, new = free.device(1), free.device(2)
    new.tasks[uid(1)] = TaskOfVersion2("milk", seconds=300, owner="Ada")
    new.sync()
    old.sync()
    assert old.tasks[uid(1)] == TaskOfVersion1("milk")
    old.tasks[uid(1)] = TaskOfVersion1("oat milk")
    old.sync()
    new.sync()
    # It has written the default of its own field too, as every write of a whole value does: the
    # reason for `schema_min` where a field has another name.
    assert free.stored()[uid(1)] == {
        "title": "oat milk", "seconds": 300, "owner": "Ada", "minutes": 0,
    }  # fmt: skip
    assert new.tasks[uid(1)].owner == "Ada"


def test_both_change_one_entity_offline_and_the_fields_are_merged(free: Shop) -> None:
    old, new = free.device(1), free.device(2)
    old.tasks[uid(1)] = TaskOfVersion1("milk")
    for device in (old, new, old):
        device.sync()
    old.tasks.patch(uid(1), title="oat milk")
    new.tasks.patch(uid(1), owner="Ada")
    for device in (new, old, new):
        device.sync()
    assert old.stored() == new.stored() == free.stored()
    assert new.tasks[uid(1)] == TaskOfVersion2("oat milk", 0, "Ada")


# ---------------------------------------------------------------- the server looks


def test_what_an_old_program_did_offline_is_taken_in_the_new_shape(strict: Shop) -> None:
    old, new = strict.device(1), strict.device(2)
    old.tasks[uid(1)] = TaskOfVersion1("milk", minutes=5)
    with pytest.raises(UpgradeRequiredError) as caught:
        old.sync()
    assert caught.value.details == {"schema": 2}
    assert not caught.value.retryable
    assert old.engine.status().pending == 0
    assert strict.stored()[uid(1)] == {"title": "milk", "seconds": 300}
    new.sync()
    assert new.tasks[uid(1)] == TaskOfVersion2("milk", seconds=300)


def test_an_old_program_goes_on_working_with_what_it_has_written(strict: Shop) -> None:
    old = strict.device(1)
    old.tasks[uid(1)] = TaskOfVersion1("milk", minutes=5)
    for title in ("oat milk", "soy milk"):
        with pytest.raises(UpgradeRequiredError):
            old.sync()
        assert old.stored() == strict.stored()
        old.tasks[uid(1)] = TaskOfVersion1(title, minutes=6)
    with pytest.raises(UpgradeRequiredError):
        old.sync()
    # Taken again and again, and nothing is in conflict with itself.
    assert strict.stored()[uid(1)] == {"title": "soy milk", "seconds": 360}
    assert old.engine.status().pending == old.engine.status().conflicts == 0


def test_it_is_not_given_what_others_wrote_until_it_is_updated(strict: Shop) -> None:
    old, new = strict.device(1), strict.device(2)
    new.tasks[uid(1)] = TaskOfVersion2("milk", owner="Ada")
    new.sync()
    old.tasks[uid(2)] = TaskOfVersion1("bread", minutes=1)
    with pytest.raises(UpgradeRequiredError):
        old.sync()
    assert uid(1) not in old.stored()
    old.update()
    old.sync()
    new.sync()
    assert old.stored() == new.stored() == strict.stored()
    assert old.tasks[uid(2)] == TaskOfVersion2("bread", seconds=60)


def test_what_conflicts_waits_for_the_update_and_is_not_lost(strict: Shop) -> None:
    old, new = strict.device(2), strict.device(2)
    old.tasks[uid(1)] = TaskOfVersion2("milk")
    for device in (old, new):
        device.sync()
    old.engine.close()
    old._start(1)
    new.tasks.patch(uid(1), owner="Ada")
    new.sync()
    old.tasks.patch(uid(1), title="oat milk")
    with pytest.raises(UpgradeRequiredError):
        old.sync()
    assert old.engine.status().pending == 1
    old.update()
    for device in (old, new):
        device.sync()
    assert old.stored() == new.stored() == strict.stored()
    assert new.tasks[uid(1)] == TaskOfVersion2("oat milk", 0, "Ada")


def test_online_both_versions_go_on_where_the_server_lets_them(lenient: Shop) -> None:
    old, new = lenient.device(1), lenient.device(2)
    old.tasks[uid(1)] = TaskOfVersion1("milk", minutes=5)
    old.sync()
    # The device shows what was stored, so that its next write is built on that.
    assert old.stored() == {uid(1): {"title": "milk", "seconds": 300}}
    new.sync()
    new.tasks.patch(uid(1), owner="Ada")
    new.sync()
    old.sync()
    old.tasks[uid(1)] = TaskOfVersion1("oat milk", minutes=6)
    old.sync()
    new.sync()
    assert new.tasks[uid(1)] == TaskOfVersion2("oat milk", 360, "Ada")
    assert old.stored() == new.stored() == lenient.stored()


def test_a_program_that_says_no_number_is_served_as_ever(strict: Shop) -> None:
    new, silent = strict.device(2), strict.device(1)
    silent.engine.close()
    silent._start(1)
    silent.engine.close()
    config = SyncConfig(db_id="work", retry=RetryConfig.none())
    transport = HttpTransport("http://localhost", client=LoopbackClient(strict.server))
    silent.engine = SyncEngine(config, transport, silent.db)
    new.tasks[uid(1)] = TaskOfVersion2("milk")
    new.sync()
    silent.tasks[uid(2)] = TaskOfVersion1("bread", minutes=1)
    silent.sync()
    assert strict.stored()[uid(2)] == {"title": "bread", "minutes": 1}
    assert silent.stored() == strict.stored()


# ---------------------------------------------------------------- the hook


def pushed_through(shops: list[Shop], hook: Any, **config: Any) -> Any:
    shops.append(Shop(schema=2, upcast=hook, **config))
    device = shops[-1].device(1)
    device.tasks[uid(1)] = TaskOfVersion1("milk", minutes=5)
    device.sync()
    assert device.stored() == shops[-1].stored()
    return shops[-1].stored().get(uid(1))


def failing(collection: str, value: Any, schema: int) -> Any:
    value["half"] = True
    raise RuntimeError("a bug of the hook")


@pytest.mark.parametrize(
    "hook",
    [
        failing,
        lambda collection, value, schema: None,
        lambda collection, value, schema: {"a": {1, 2}},
        lambda collection, value, schema: "x" * 20_000_000,
    ],
)
def test_a_hook_that_fails_stops_nobodys_work(
    shops: list[Shop], hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert pushed_through(shops, hook) == {"title": "milk", "minutes": 5}
    assert "upcast" in caplog.text and "as it came" in caplog.text


def test_validate_sees_what_is_going_to_be_stored(shops: list[Shop]) -> None:
    seen: list[Any] = []

    def validate(context: Any, transaction: Any) -> Refusal | None:
        seen.extend(each.value for each in transaction.operations)
        return None

    pushed_through(shops, upcast, validate=validate)
    assert seen == [{"title": "milk", "seconds": 300}]


def test_deletions_of_an_old_program_are_deletions(lenient: Shop) -> None:
    old = lenient.device(1)
    old.tasks[uid(1)] = TaskOfVersion1("milk", minutes=5)
    old.sync()
    with old.db.transaction() as tx:
        del tx[old.tasks][uid(1)]
        tx[old.tasks][uid(2)] = TaskOfVersion1("bread", minutes=1)
    old.sync()
    assert old.stored() == lenient.stored() == {uid(2): {"title": "bread", "seconds": 60}}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"schema": -1}, "schema"),
        ({"schema": True}, "schema"),
        ({"schema": 1, "schema_min": 2}, "schema_min"),
        ({"upcast": upcast}, "upcast"),
        ({"schema": 2, "upcast": "nothing"}, "upcast"),
        ({"schema": 2, "upcast": 3}, "upcast"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig(data_dir=None, insecure_no_auth=True, **settings)


@pytest.mark.parametrize("schema", [-1, 1.5, "2", True, 2**63])
def test_a_number_of_a_schema_is_a_number(schema: Any) -> None:
    with pytest.raises(ConfigError, match="schema"):
        SyncConfig(db_id="work", schema=schema)


# ---------------------------------------------------------------- migrating


def test_a_migration_on_the_server_reaches_both_versions(free: Shop) -> None:
    from entidb.db import migrate

    old, new = free.device(1), free.device(2)
    for number in range(1, 6):
        old.tasks[uid(number)] = TaskOfVersion1("milk", minutes=number)
    for device in (old, new):
        device.sync()
    assert migrate(free.server.database("work"), "tasks", upgrade, batch=2).rewritten == 5
    new.sync()
    old.sync()
    assert new.stored() == old.stored() == free.stored()
    assert all("minutes" not in stored for stored in free.stored().values())
    assert [task.seconds for task in new.tasks.values()] == [60, 120, 180, 240, 300]
    with pytest.raises(ValueTypeError):
        free.device(1).db.collection("tasks", TaskOfVersion1)[uid(1)] = TaskOfVersion2("x")  # type: ignore[assignment]

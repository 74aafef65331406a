"""What a PostgreSQL server lost while the nodes stay: devices notice it (R29)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from entidb.db import Database, Role
from entidb.db.records import TERM, end_of
from entidb.errors import CommitStaleError, EntiDBError, HistoryChangedError
from entidb.server import ServerConfig, serving
from entidb.storage.base import opening_of
from entidb.storage.postgres import PostgresStorage
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from tests.storage.postgres_cluster import MISSING, Cluster, Standby, address_of, cluster, pair
from tests.storage.test_failover import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]


@pytest.fixture
def servers() -> Iterator[tuple[Cluster, Standby]]:
    with pair() as made:
        yield made


def works(do: Callable[[], object]) -> bool:
    try:
        do()
    except HistoryChangedError:
        raise
    except EntiDBError:
        return False
    return True


def engine_on(stack: ExitStack, url: str) -> SyncEngine:
    database = stack.enter_context(Database.in_memory())
    config = SyncConfig(db_id="shop", retry=RetryConfig.none())
    return stack.enter_context(SyncEngine(config, url, database))


def write(engine: SyncEngine, *names: str) -> None:
    for name in names:
        engine.database["notes"].add({"name": name})
        until(lambda: works(engine.sync))


def test_commits_that_an_asynchronous_standby_lacked_are_noticed_by_devices_that_saw_them(
    servers: tuple[Cluster, Standby],
) -> None:
    """The node stays, and others have gone on as far as what was lost."""
    primary, standby = servers
    config = ServerConfig(data_dir=address_of(primary, standby), insecure_no_auth=True)
    with ExitStack() as stack:
        url = stack.enter_context(serving(config))
        saw, other = engine_on(stack, url), engine_on(stack, url)
        write(saw, "kept")
        other.sync()
        primary.set(synchronous_standby_names="")
        standby.stop()
        write(saw, "lost 1", "lost 2")
        primary.kill()
        standby.start()
        standby.promote()
        write(other, "new 1", "new 2", "new 3")
        saw.database["notes"].add({"name": "later"})
        with pytest.raises(HistoryChangedError):
            saw.sync()
        # The others learn of it too, and keep what they have.
        with pytest.raises(HistoryChangedError):
            other.sync()


def test_a_standby_that_lost_nothing_is_nothing_to_notice(
    servers: tuple[Cluster, Standby],
) -> None:
    primary, standby = servers
    config = ServerConfig(data_dir=address_of(primary, standby), insecure_no_auth=True)
    with ExitStack() as stack:
        url = stack.enter_context(serving(config))
        saw, other = engine_on(stack, url), engine_on(stack, url)
        write(saw, "kept")
        other.sync()
        primary.kill()
        standby.promote()
        standby.set(synchronous_standby_names="")
        write(other, "new 1", "new 2")
        write(saw, "later")
        other.sync()
        assert len(saw.database["notes"]) == len(other.database["notes"]) == 4


def test_files_of_postgresql_that_were_put_back_under_a_node_are_noticed(tmp_path: Path) -> None:
    """As a snapshot of a disk, or a recovery to a point in time."""
    with cluster() as server, ExitStack() as stack:
        config = ServerConfig(data_dir=server.address, insecure_no_auth=True)
        url = stack.enter_context(serving(config))
        saw, other = engine_on(stack, url), engine_on(stack, url)
        write(saw, "kept")
        other.sync()
        copy = server.folder.with_name(f"{server.folder.name}-copy")
        stack.callback(shutil.rmtree, copy, ignore_errors=True)
        server.stop()
        shutil.copytree(server.data, copy, copy_function=copy_with_owner)
        server.start()
        write(saw, "lost 1", "lost 2")
        server.stop()
        shutil.rmtree(server.data)
        shutil.copytree(copy, server.data, copy_function=copy_with_owner)
        own(server)
        server.start()
        write(other, "new 1", "new 2", "new 3")
        with pytest.raises(HistoryChangedError):
            saw.sync()


def copy_with_owner(source: str, target: str) -> str:
    return shutil.copy2(source, target)


def own(server: Cluster) -> None:
    if server._user:
        for path in (server.data, *server.data.rglob("*")):
            shutil.chown(path, server._user)
    server.data.chmod(0o700)


def test_a_server_that_was_started_again_opens_its_stores_anew_and_once() -> None:
    with cluster() as server, ExitStack() as stack:
        store = stack.enter_context(closing(PostgresStorage.open(server.address, "shop")))
        store.commit({b"a": b"1"})
        before = store.mark()
        server.stop()
        server.start()
        until(lambda: works(store.mark))
        assert opening_of(store.mark()) != opening_of(before)
        marks = [store.mark()]
        for count in (7, 8):  # other nodes
            again = PostgresStorage.open(server.address, "shop", connections_max=count)
            stack.enter_context(closing(again))
            marks.append(again.mark())
        assert set(marks) == {store.mark()}
        with pytest.raises(CommitStaleError):
            store.commit({b"a": b"2"}, after=before)
        assert store.commit({b"a": b"2"}, after=marks[0]) == marks[0] + 1


def test_a_term_begins_once_in_each_opening_whichever_node_commits_first() -> None:
    with cluster() as server, ExitStack() as stack:
        nodes = []
        for count in (7, 8):
            store = PostgresStorage.open(server.address, "shop", connections_max=count)
            nodes.append(stack.enter_context(Database(store, role=Role.SERVER)))
        for database in (nodes[0], nodes[1], nodes[0], nodes[1]):
            database["notes"].add(1)
        begun = terms_in(nodes[0])
        server.stop()
        server.start()
        for database in (nodes[1], nodes[0], nodes[1], nodes[0]):
            until(lambda database=database: works(lambda: database["notes"].add(2)))  # type: ignore[misc]
        assert terms_in(nodes[0]) == begun + 1


def terms_in(database: Database) -> int:
    with database.storage.snapshot() as snapshot:
        return len(snapshot.scan_keys(TERM, end_of(TERM)))

"""What stands in the wrong place of an engine or a server is refused where it is made."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from entidb import AsyncSyncEngine, ConfigError, Database, SyncConfig, SyncEngine
from entidb.server import SyncServer, create_app, serve, serving

CONFIG = SyncConfig(db_id="notes")
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def db() -> Iterator[Database]:
    with Database.in_memory() as opened:
        yield opened


@pytest.mark.parametrize("wrong", [None, 5, {}, b"http://127.0.0.1:1"], ids=repr)
@pytest.mark.parametrize("name", ["config", "transport", "applier"])
def test_an_engine_names_the_part_that_cannot_be_and_leaves_the_database_free(
    db: Database, name: str, wrong: Any
) -> None:
    parts: dict[str, Any] = {"config": CONFIG, "transport": NOWHERE, "applier": db, name: wrong}
    with pytest.raises(ConfigError, match=name):
        SyncEngine(**parts)

    async def make() -> None:
        AsyncSyncEngine(**parts)

    with pytest.raises(ConfigError, match=name):
        asyncio.run(make())
    SyncEngine(CONFIG, NOWHERE, db).close()


@pytest.mark.parametrize("wrong", [None, uuid.UUID(int=1), "o1", {}], ids=repr)
def test_only_entries_of_the_lists_can_be_dealt_with(db: Database, wrong: Any) -> None:
    with SyncEngine(CONFIG, NOWHERE, db) as engine:
        with pytest.raises(ConfigError, match="conflicts"):
            engine.resolve(wrong, "mine")
        with pytest.raises(ConfigError, match="discarded"):
            engine.recommit(wrong)
        with pytest.raises(ConfigError, match="discarded"):
            engine.prune(wrong)


@pytest.mark.parametrize("wrong", [None, {}, "data"], ids=repr)
def test_a_server_is_made_from_its_config(wrong: Any) -> None:
    for make in (SyncServer, create_app, serve):
        with pytest.raises(ConfigError, match="ServerConfig"):
            make(wrong)
    with pytest.raises(ConfigError, match="ServerConfig"), serving(wrong):
        pass

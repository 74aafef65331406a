"""The part of an engine that says where it learns of news, and what is done with a page that comes
with them."""

from __future__ import annotations

from entidb.db import Database
from entidb.protocol import PullRequest
from entidb.sync import carried
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.look import look_at
from entidb.sync.attempts import Attempts
from entidb.sync.carried import CarriedPage
from entidb.sync.config import SyncConfig
from entidb.sync.exchange import pull_request
from entidb.sync.live import NewsSource
from entidb.sync.transport import SyncTransport


class HearsNews:
    """See the module."""

    config: SyncConfig
    database: Database
    applier: DatabaseApplier
    transport: SyncTransport
    _attempts: Attempts

    @property
    def reached(self) -> int:
        """Up to which server commit this device has everything."""
        return self.applier.state().reached

    def news_source(self) -> NewsSource | None:
        """Where this device learns of news, if the server that it is connected to offers them."""
        if not self.config.live or "live" not in self._attempts.connection.features:
            return None
        make = getattr(self.transport, "news", None)
        source: NewsSource | None = (
            None if make is None else make(self.config.db_id, self.database.device_id)
        )
        return source

    def asks_pages(self) -> PullRequest | None:
        """What this device's pulls ask for now, to be said when a stream is opened; None where it
        wants no pages, or the server has none."""
        connection = self._attempts.connection
        if not self.config.live_pages or carried.FEATURE not in connection.features:
            return None
        look = look_at(self.database)
        if look.state.history is None or connection.limits is None:
            return None
        device_id = self.database.device_id
        cursor = look.state.reached
        return pull_request(self.config, connection, device_id, look.state, look.scope, cursor)

    def page_came(self, page: CarriedPage | None) -> None:
        """A page came with a hint, or (None) a hint without one. From any thread."""
        self._attempts.connection.carried.put(page)

    @property
    def has_page(self) -> bool:
        """Whether such a page waits to be looked at."""
        return bool(self._attempts.connection.carried.waiting)


__all__ = ["HearsNews"]

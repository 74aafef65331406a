"""An operator copies the files of a server's database by hand, and puts them back later (R29).

From then on the database goes on from an older state, under the history that it had. Devices that
have heard of no more than that state go on with it. The first that has heard of more proves that
the two have parted, whatever others have pushed meanwhile, and the server begins a new history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from entidb.protocol import (
    DigestRequest,
    HandshakeRequest,
    RoundRequest,
    SnapshotRequest,
    SyncRequest,
)
from entidb.server.hooks import Grant
from entidb.server.pages import seen_by
from entidb.server.proofs import HISTORIES_MAX
from entidb.storage import MemoryStorage
from entidb.testing.checkers import ServerWatch
from entidb.testing.oracle import Histories, History
from entidb.testing.watch import DeviceWatch
from entidb.testing.world import World

#: A database begins so many histories in an hour, one of them perhaps by a device with a copy.
PUT_BACKS_MAX = HISTORIES_MAX - 1


class Replaced(Protocol):
    """The database whose files they are."""

    db_id: str
    world: World
    histories: Histories
    watch: ServerWatch
    device_watches: list[DeviceWatch]


class OlderFiles:
    """Of one database of the server."""

    def __init__(self, tenant: Replaced) -> None:
        self._tenant = tenant
        #: Files that were copied, with what they are a copy of: history, head, floor.
        self._copy: tuple[MemoryStorage, History, int, int] | None = None
        #: How often they were put back. Where a node works meanwhile, what it answers is of
        #: the state before, as if that had been late on its way.
        self.times = 0
        #: The files were put back, and no device has proved that yet.
        self.unproven = False

    @property
    def copied(self) -> bool:
        return self._copy is not None

    def copy(self, present: MemoryStorage) -> None:
        """An operator has copied the files, instead of using ``entidb backup``."""
        history = self._tenant.watch.history
        self._tenant.world.trace("copied", self._tenant.db_id)
        self._copy = present, history, history.head, history.floor

    def may_be_put_back(self) -> bool:
        """Whether some device would notice. Where none has seen more than the files hold, they are
        the present state, as far as any device knows."""
        if self._copy is None or self.times >= PUT_BACKS_MAX:
            return False
        _, history, head, _ = self._copy
        return any(
            watch.history is history and watch.newest > head and not watch.resetting
            for watch in self._tenant.device_watches
        )

    def put_back(self, place: Callable[[MemoryStorage], None]) -> None:
        """The copy is back, under the history it had. Devices that have seen more keep to that
        history as it was; the server goes on from another, which ends earlier, and so do the
        devices that have not."""
        assert self._copy is not None
        copy, history, head, floor = self._copy
        tenant, self._copy = self._tenant, None
        self.times += 1
        tenant.watch.history = now = history.fork(history.identity, head, floor)
        tenant.histories.add(now)
        for watch in tenant.device_watches:
            if watch.history is not None and watch.history.identity == now.identity:
                if watch.newest <= watch.history.common_with(now):
                    watch.history = now
        place(copy)
        tenant.world.trace("put back", tenant.db_id, head)
        tenant.world.tell(f"the files of {tenant.db_id} are put back to {head}")
        self.unproven = True

    def answered(self, request: SyncRequest, grant: Grant) -> None:
        """A request was answered, or refused for what it says: if it shows that the files are older
        ones, and is to be believed, a new history has begun (ORDER)."""
        believed = grant.read and grant.write and grant.collections is None
        self._tenant.world.checks.that(
            not (self.unproven and believed and self._shows(request)),
            "ORDER",
            f"{self._tenant.db_id} was shown a commit that it does not have, and kept its history",
        )

    def _shows(self, request: SyncRequest) -> bool:
        now = self._tenant.watch.history
        if isinstance(request, HandshakeRequest):
            return request.history == now.identity and request.cursor > now.head
        if isinstance(request, DigestRequest) or request.history != now.identity:
            return False
        seen = request.pull.seen if isinstance(request, RoundRequest) else request.seen
        past = self._tenant.histories.past(now.identity, seen)
        if isinstance(request, SnapshotRequest):
            newest = 0 if seen is None else seen.version
        else:
            newest = seen_by(request)
        return newest > now.head or past is not now

"""LIVE, for all devices of a run that run in the background: who is told of everything is not
behind for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from entidb.errors import EntiDBError
from entidb.sync.live import LiveState
from entidb.testing.lines import NewsWay
from entidb.testing.listener import BOUND_MS, NODES_BOUND_MS, Listener
from entidb.testing.oracle import History
from entidb.testing.tenant import Tenant
from entidb.testing.watch import DeviceWatch
from entidb.testing.world import World

#: Milliseconds between two looks, on average.
LOOK_MS: Final = 400
#: Milliseconds in which a device finds a channel that works, once nothing goes wrong any more: a
#: wait of a minute, or of some for a server that had refused to say anything.
_SETTLED_MS: Final = 500_000
_STEP_MS: Final = 250
#: Between two looks of the people at the errors they are shown.
_HELP_MS: Final = 5_000
#: How many commits follow one another closely, for every database.
_BURSTS: Final = (1, 3, 2)
#: How many requests for news a program writes beside, and milliseconds in which they come.
_BEGINNINGS: Final = 4
_BEGINNING_MS: Final = 5_000
#: Milliseconds from a request for news to a commit that it has to be told of.
_MEANWHILE_MS: Final = (0, 1, 2, 5, 10, 30)


class WatchedDevice(Protocol):
    """A device of the run."""

    name: str
    watch: DeviceWatch
    listener: Listener | None
    tenant: Tenant
    needs_choice: bool
    last_error: EntiDBError | None

    @property
    def in_cycle(self) -> bool: ...

    def end_listening(self) -> None: ...


class WatchedServer(Protocol):
    """Its server."""

    tenants: list[Tenant]

    @property
    def channels(self) -> NewsWay: ...

    def hear(self) -> None: ...


class LiveWatch:
    """See the module."""

    def __init__(self, world: World, host: WatchedServer, devices: Sequence[WatchedDevice]) -> None:
        self._world = world
        self._host = host
        self._devices = devices
        self._bound = BOUND_MS if world.nodes == 1 else NODES_BOUND_MS
        self._rng = world.stream("who looks at those who listen")
        #: Heads of each database, newest last: when, of which history, and the number.
        self._heads: dict[str, list[tuple[int, History, int]]] = {}

    def look(self) -> None:
        """Look at everybody."""
        now = self._world.now
        for tenant in self._host.tenants:
            history = tenant.watch.history
            heads = self._heads.setdefault(tenant.db_id, [])
            heads.append((now, history, history.head))
            while len(heads) > 1 and heads[1][0] <= now - self._bound:
                del heads[0]
        for device in self._devices:
            self._look_at(device)

    def _look_at(self, device: WatchedDevice) -> None:
        world, tenant, listener = self._world, device.tenant, device.listener
        since = None if listener is None else listener.settled_since
        if since is None or tenant.older.unproven or self._is_parted(device):
            return
        past = world.now - self._bound
        seen, history, head = self._heads[tenant.db_id][0]
        if max(since, world.disturbed_at, seen) > past or history is not tenant.watch.history:
            return
        self._check(device, head)

    def _check(self, device: WatchedDevice, head: int) -> None:
        watch = device.watch
        self._world.checks.that(
            watch.history is device.tenant.watch.history and watch.covers(head),
            "LIVE",
            f"{device.name} listens, and is at {watch.cursor} of {head}, and does nothing",
        )

    def _is_parted(self, device: WatchedDevice) -> bool:
        blocked = self._world.network.blocked
        ways = (blocked.get((device.name, way), 0) for way in ("up", "down"))
        return max(ways) > self._world.now - self._bound

    # ------------------------------------------------------------ when nothing goes wrong any more

    def check_quiet(self) -> None:
        """Every device finds a channel that works, and is told of every commit; then nobody listens
        any more."""
        world = self._world
        end = world.now + _SETTLED_MS
        self._wake(all_of_them=True)
        while world.now < end and not all(map(self._is_ready, self._devices)):
            self._go_on(_STEP_MS)
            if world.now % _HELP_MS < _STEP_MS:
                self._wake(all_of_them=False)
        for device in self._devices:
            listener = device.listener
            if listener is not None and listener.may_hear:
                world.checks.that(
                    listener.state is not LiveState.OFFLINE,
                    "LIVE",
                    f"{device.name} has no channel after {_SETTLED_MS} ms in which all was well",
                )
        for tenant in self._host.tenants:
            if not tenant.older.unproven:
                self._tell_of_bursts(tenant)
                self._tell_who_begins(tenant)
        for device in self._devices:
            device.end_listening()
        self._host.channels.close()

    def _wake(self, *, all_of_them: bool) -> None:
        """People press the button: everybody, or those who are shown an error."""
        for device in self._devices:
            shown = device.needs_choice or device.last_error is not None
            if device.listener is not None and (all_of_them or shown):
                device.listener.wake()

    def _is_ready(self, device: WatchedDevice) -> bool:
        listener = device.listener
        if listener is None or not listener.may_hear:
            return True
        return not device.in_cycle and listener.state is not LiveState.OFFLINE

    def _go_on(self, milliseconds: int) -> None:
        self._world.run_until(self._world.now + milliseconds)
        if self._world.nodes > 1:
            self._host.hear()

    def _tell_of_bursts(self, tenant: Tenant) -> None:
        """A program writes, once or again and again, and every device hears of the last."""
        for count in _BURSTS:
            began = self._world.now
            for _ in range(count):
                self._go_on(self._rng.randrange(60))
                tenant.program_writes()
            self._expect(tenant, began)

    def _tell_who_begins(self, tenant: Tenant) -> None:
        """All lines are cut, and a program writes while the first ones begin anew."""
        world, channels, began = self._world, self._host.channels, self._world.now
        begun: list[str] = []

        def begins(db_id: str) -> None:
            if db_id == tenant.db_id and len(begun) < _BEGINNINGS:
                begun.append(db_id)
                world.after(self._rng.choice(_MEANWHILE_MS), tenant.program_writes)

        channels.on_begin = begins
        channels.cut_all()
        while len(begun) < _BEGINNINGS and world.now < began + _BEGINNING_MS:
            self._go_on(_STEP_MS)
        channels.on_begin = None
        while world.now < began + _SETTLED_MS and not all(map(self._is_ready, self._devices)):
            self._go_on(_STEP_MS)
        self._expect(tenant, world.now)

    def _expect(self, tenant: Tenant, began: int) -> None:
        """What is committed by now is on every device soon that was told of everything."""
        world, head = self._world, tenant.watch.history.head
        end = world.now + self._bound
        while world.now < end:
            self._go_on(_STEP_MS)
        for device in self._devices:
            listener = device.listener
            if listener is None or device.tenant is not tenant:
                continue
            since = listener.settled_since
            if since is not None and since < end - self._bound // 2:
                self._check(device, head)


__all__ = ["LOOK_MS", "LiveWatch"]

"""The simulator: one thread, one seed, a virtual clock, a heap of events, and the real code.

``simulate(seed)`` runs two phases. In the first, everything goes wrong that its knobs allow, and
every one of the ``invariants`` must hold all the same; in the second the faults stop, and all must
come to rest, in step, within bounds. One seed gives one trace, in any process.
"""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from entidb.db.maintenance import dump
from entidb.db.verifying import verify
from entidb.server.away import counted_alone
from entidb.testing.device import Device
from entidb.testing.digests import check_digests
from entidb.testing.host import Host
from entidb.testing.invariants import Violation
from entidb.testing.knobs import Knobs
from entidb.testing.live_watch import LOOK_MS, LiveWatch
from entidb.testing.tenant import Tenant
from entidb.testing.world import Options, World

Row = tuple[str, bytes, int, bytes]

_WORLD_FAULTS: Final = (
    "partition",
    "partition_one_way",
    "clock_jump",
    "scope",
    "grants",
    "people",
    "local_collection",
    "restore_device",
    "copy_device",
    "body_limit",
    "firewall",
    "read_only",
    "revoke",
    "freeze",
)
DEVICES_MAX = 10
HOUSEKEEPING_MS = 5_000
HEARING_MS = 300
LIFE_MS = 500
#: Rounds of the quiet phase: in each every device syncs once and every person decides once.
QUIET_ROUNDS_MAX = 60
#: Scheduled events of one quiet round at most: a device that never ends would show here.
QUIET_EVENTS_MAX = 400_000


@dataclass
class Run:
    """The result. ``invariant`` None: everything held. ``digest`` covers the whole trace; ``story``
    are its turning points."""

    seed: int
    knobs: Knobs
    events: int
    digest: str
    faults: Counter[str]
    checks: Counter[str]
    invariant: str | None
    message: str
    story: list[str]
    dumps: list[str] = field(default_factory=list)


def simulate(seed: int, options: Options | None = None) -> Run:
    """Run ``seed``. Never raises for what the code under test does: that is in the result."""
    options = options or Options()
    simulation = Simulation(seed, options)
    world = simulation.world
    invariant, message = None, ""
    # Hooks that raise are part of many runs; a log line for each would hide the story.
    log = logging.getLogger("entidb.server")
    disabled, log.disabled = log.disabled, True
    try:
        with counted_alone():
            simulation.run()
    except Violation as violation:
        invariant, message = violation.invariant, violation.message
    except Exception:
        # What no invariant foresaw is a bug all the same.
        invariant, message = "UNEXPECTED", traceback.format_exc()
    finally:
        log.disabled = disabled
        simulation.host.channels.end()
        world.close()
    return Run(
        seed,
        world.knobs,
        world.events,
        world.digest.hexdigest(),
        world.faults,
        world.checks.counts,
        invariant,
        message,
        world.story,
        simulation.dumps,
    )


class Simulation:
    """One run: a world, the devices and servers in it, and what happens to them."""

    def __init__(self, seed: int, options: Options) -> None:
        self.world = world = World(seed, options)
        self.rng, self.knobs, self.checks = world.rng, world.knobs, world.checks
        self.dumps: list[str] = []
        self.host = Host(world)
        self.devices: list[Device] = []
        for index in range(self.knobs.devices):
            tenant = self.host.tenants[index % len(self.host.tenants)]
            self.devices.append(Device(world, f"d{index}", self.host, tenant, None))
        self.live = LiveWatch(world, self.host, self.devices)

    # ------------------------------------------------------------ the two phases

    def run(self) -> None:
        """Both phases. Raises ``Violation``."""
        self._begin()
        left = self.knobs.events
        while left and self.world.step():
            left -= 1
        self._heal()
        if self.knobs.live:
            self.live.check_quiet()
        self._drain()
        self._come_to_rest()
        self._check_rest()

    def _begin(self) -> None:
        knobs = self.knobs
        for device in self.devices:
            # A scope is mostly given from the first day on, and widened later.
            if (knobs.scope or knobs.scope_in_cycle) and self.rng.random() < 0.5:
                device.change_scope()
            if knobs.grants and self.rng.random() < 0.5:
                device.change_grant()
            self._schedule_device(device)
        for tenant in self.host.tenants:
            self._often(1000, partial(self._server_life, tenant))
        self._often(HOUSEKEEPING_MS, self.host.housekeep)
        if self.world.nodes > 1:
            self._often(HEARING_MS, self.host.hear)
            self._often(LIFE_MS, self.host.nodes.life)
        if knobs.live:
            self._often(LOOK_MS, self.live.look)
        if any(getattr(knobs, name) for name in _WORLD_FAULTS):
            self._often(200, self._world_life)

    def _schedule_device(self, device: Device) -> None:
        knobs = self.knobs
        self._often(knobs.think_ms, device.transact)
        if not device.listens:
            self._often(knobs.pause_ms, device.begin_cycle)
        if knobs.person:
            self._often(10 * knobs.think_ms, device.person)
        if knobs.reader:
            self._often(5 * knobs.think_ms, device.read)

    def _often(self, mean_ms: int, action: Callable[[], None]) -> None:
        """Do ``action`` again and again, ``mean_ms`` apart on average, until it is quiet."""

        def again() -> None:
            if self.world.quiet:
                return
            action()
            self.world.after(1 + int(self.rng.expovariate(1 / mean_ms)), again)

        self.world.after(int(self.rng.random() * mean_ms), again)

    # ------------------------------------------------------------ what happens to the world

    def _server_life(self, tenant: Tenant) -> None:
        knobs, rng = self.knobs, self.rng
        if (
            knobs.put_back
            and not tenant.older.unproven
            and rng.random() * 100 < max(10, 2 * knobs.put_back)
        ):
            self._put_files_back(tenant)
        if self.host.age.look(knobs):
            self.host.start()
        if rng.random() * 200 < knobs.server_writes:
            self.world.fired("server_writes")
            tenant.program_writes()
        if rng.random() * 100 < knobs.purge and tenant.watch.history.head:
            self.world.fired("purge")
            history = tenant.watch.history
            tenant.purge(rng.randint(history.floor, history.head))
        if knobs.indexes:
            tenant.keep_indexes()
        if knobs.images:
            self.host.make_image(tenant)
        if knobs.restore_server and not tenant.older.unproven:
            if tenant.backup is None and rng.random() * 100 < max(10, 2 * knobs.restore_server):
                tenant.make_backup()
            elif tenant.backup is not None and rng.random() * 100 < knobs.restore_server:
                self.world.fired("restore_server")
                tenant.restore()
                if rng.random() * 1000 < knobs.restore_twice:
                    again = partial(self._restore_again, tenant)
                    self.world.after(500 + rng.randrange(5_000), again)
                else:
                    tenant.backup = None

    def _put_files_back(self, tenant: Tenant) -> None:
        """A person copies the server's files, and some time later puts them back."""
        if not tenant.older.copied:
            tenant.copy_files()
        elif tenant.older.may_be_put_back() and self.rng.random() * 100 < self.knobs.put_back:
            promoted = tenant.openings.between_nodes and self.rng.random() < 0.5
            self.world.fired("promoted" if promoted else "put_back")
            tenant.put_back(promoted)

    def _restore_again(self, tenant: Tenant) -> None:
        if not self.world.quiet and tenant.backup is not None:
            self.world.fired("restore_twice")
            tenant.restore()
            tenant.backup = None

    def _world_life(self) -> None:
        """One look at everything that happens to single devices."""
        knobs, rng = self.knobs, self.rng
        device = rng.choice(self.devices)
        self._change_way(device)
        if rng.random() * 1000 < knobs.partition:
            self._part(device, "partition", one_way=False)
        if rng.random() * 1000 < knobs.partition_one_way:
            self._part(device, "partition_one_way", one_way=True)
        if rng.random() * 1000 < knobs.clock_jump:
            self.world.fired("clock_jump")
            device.clock.offset_ms += rng.randint(-86_400_000, 86_400_000)
        if rng.random() * 1000 < knobs.scope:
            device.change_scope()
        if knobs.grants and rng.random() * 1000 < knobs.grants:
            device.change_grant()
        if knobs.people and rng.random() * 1000 < knobs.people:
            device.change_hands()
        if rng.random() * 1000 < knobs.local_collection:
            device.change_local()
        if knobs.revoke and rng.random() * 1000 < knobs.revoke:
            self.host.keeper.turn_key(device.database.device_id, device.tenant.db_id)
        if knobs.freeze and not self.host.nodes.waits and rng.random() * 1000 < knobs.freeze:
            self.host.keeper.freeze_or_thaw(device.tenant.db_id)
        if rng.random() * 1000 < 10 * knobs.restore_device:
            self._copy_or_restore(device)
        if rng.random() * 1000 < knobs.copy_device and len(self.devices) < DEVICES_MAX:
            self._copy(device)

    def _part(self, device: Device, fault: str, *, one_way: bool) -> None:
        world = self.world
        world.fired(fault)
        until = world.now + self.rng.randrange(30_000)
        world.network.partition(device.name, until, one_way=one_way)

    def _change_way(self, device: Device) -> None:
        """The way between a device and the server changes, and what its token grants."""
        knobs = self.knobs
        if (knobs.body_limit or knobs.firewall or knobs.read_only) and device.gateway.change():
            may = "only read" if device.gateway.read_only else "write"
            self.world.tell(f"{device.name} may {may}")
            device.renew_token()

    def _copy_or_restore(self, device: Device) -> None:
        if device.saved is None or self.rng.random() < 0.5:
            device.saved = device.save()
            return
        self.world.fired("restore_device")
        self.world.tell(f"{device.name} is restored from an older copy")
        device.replace_store(device.saved)

    def _copy(self, device: Device) -> None:
        self.world.fired("copy_device")
        name = f"{device.name}c{len(self.devices)}"
        self.world.tell(f"{name} is a copy of {device.name}")
        records, context, who = device.save()
        made = Device(self.world, name, self.host, device.tenant, records)
        made.watch.adopt(made.storage.records, context)
        made.held_by(who)
        self.devices.append(made)
        self._schedule_device(made)

    # ------------------------------------------------------------ coming to rest

    def _heal(self) -> None:
        self.world.trace("heal")
        self.world.tell("the faults stop")
        self.world.quiet = True
        self.world.network.armed = False
        self.host.let_everybody_in()
        self.host.nodes.heal()
        for tenant in self.host.tenants:
            tenant.openings.heal()
            if self.knobs.unique:
                tenant.build_indexes()
        self.host.keeper.open_all()
        for device in self.devices:
            device.storage.armed = False
            device.close_reader()
            if device.granted is not None and self.rng.random() < 0.5:
                device.granted = None
            device.gateway.open()
            device.engine.connection.path.try_again()
            # A cycle that is under way forgets with that what it has kept back.
            device.due = frozenset()
            device.renew_token()

    def _drain(self) -> None:
        for _ in range(QUIET_EVENTS_MAX):
            if not self.world.step():
                return
        self.checks.fail("LIVENESS", "one round of cycles does not come to an end")

    def _come_to_rest(self) -> None:
        # Where batches are of one transaction and all devices write the same entities, a push may
        # meet a conflict again and again, but only because another's was accepted: every round
        # settles at least one.
        rounds = QUIET_ROUNDS_MAX + sum(len(device.watch.outbox) for device in self.devices)
        for _ in range(rounds):
            busy = False
            for device in self.devices:
                while device.watch.open_conflicts and device.drive is None:
                    device.person()
                    busy = True
                if self.knobs.people:
                    device.let_in_who_waits()
                self.world.after(self.rng.randrange(50), device.begin_cycle)
            self._drain()
            for device in self.devices:
                busy |= not self._at_rest(device)
            if not busy:
                self.checks.passed("LIVENESS")
                return
        late = [f"{d.name} {self._state_of(d)}" for d in self.devices if not self._at_rest(d)]
        self.checks.fail("LIVENESS", f"after {rounds} quiet rounds: {late}")

    def _at_rest(self, device: Device) -> bool:
        return (
            device.last is not None
            and not device.watch.outbox
            and device.watch.history is device.tenant.watch.history
            and device.watch.covers(device.tenant.watch.history.head)
            and not device.watch.excluded
        )

    def _state_of(self, device: Device) -> str:
        error = device.last_error
        return (
            f"cursor {device.watch.cursor} of {device.tenant.watch.history.head}, "
            f"{len(device.watch.outbox)} pending, last error {error!r}"
        )

    def _check_rest(self) -> None:
        for device in self.devices:
            # The first may still walk over the device's own last pushes; then R10 holds.
            device.begin_cycle(keep_connection=True)
            self._drain()
            before, kept = device.storage.commits, len(device.watch.losers.kept)
            device.begin_cycle(keep_connection=True)
            allowed = 1 + (not device.was_connected)
            self._drain()
            quiet = device.last is not None and device.last.requests <= allowed
            self.checks.that(
                # What has become too old meanwhile may go.
                quiet
                and (device.storage.commits == before or len(device.watch.losers.kept) < kept),
                "LIVENESS",
                f"a cycle of {device.name} with nothing to do took {device.last}",
            )
            device.check_store()
        for tenant in self.host.tenants:
            self._check_server(tenant)
            self._check_same(tenant)
        if self.world.nodes > 1:
            self.host.hear()

    def _check_server(self, tenant: Tenant) -> None:
        faults = verify(tenant.database)
        self.checks.that(not faults, "CONVERGE", f"verify of {tenant.db_id}: {faults[:3]}")
        rows = {(name, key): (v, payload) for name, key, v, payload in dump(tenant.database)}
        self.checks.that(
            rows == tenant.watch.history.live(),
            "CONVERGE",
            f"{tenant.db_id} holds other entities than its commits wrote",
        )

    def _check_same(self, tenant: Tenant) -> None:
        rows = list(dump(tenant.database))
        for device in self.devices:
            if device.tenant is not tenant:
                continue
            with device.database.view() as view:
                synced = {i.name for i in view.catalogue.by_name.values() if i.synced}
                scope = view.catalogue.scope
                local = {i.name for i in view.catalogue.by_name.values() if i.local}
            due = [
                row
                for row in rows
                if (row[0] in synced or (scope is None and row[0] not in local))
                and (device.granted is None or row[0] in device.granted)
            ]
            there = list(dump(device.database))
            self.dumps.append(hashlib.sha256(repr(there).encode()).hexdigest())
            if there != due:
                self.checks.fail(
                    "CONVERGE",
                    f"{device.name} and {tenant.db_id} differ: {_difference(there, due)}",
                )
            self.checks.passed("CONVERGE")
            check_digests(device, self.world.stream(f"damage of {device.name}"))


def _difference(there: list[Row], due: list[Row]) -> str:
    missing = [row[:3] for row in due if row not in there]
    extra = [row[:3] for row in there if row not in due]
    return f"missing {missing[:3]}, extra {extra[:3]}"


__all__ = ["Options", "Run", "simulate"]

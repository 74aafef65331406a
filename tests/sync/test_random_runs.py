"""Random lives of several devices, each decided by one seed: whatever happens, files stay sound
after every step, and when it is quiet everybody has the same. A seed that fails is printed."""

from __future__ import annotations

import contextlib
import os
import random

import pytest

from entidb.db import purge_tombstones
from entidb.db.outbox import read_pending
from entidb.errors import HistoryChangedError, ScopeError, SyncStateError, TransportError
from entidb.protocol import PullRequest, SyncRequest
from entidb.server.hooks import Refusal
from entidb.sync import Conflict, ConflictResolution
from tests.support import Crash, Device, World, assert_in_step, assert_sound

SEEDS = int(os.environ.get("ENTIDB_RANDOM_SEEDS", "60"))
NAMES = ("notes", "tasks")


def chaotic(conflict: Conflict) -> ConflictResolution:
    """Every kind of answer, decided by the bytes alone, as a policy must."""
    choice = sum(conflict.local_payload or b"\1") + sum(conflict.remote_payload or b"\2")
    if choice % 11 == 0:
        raise ValueError("a policy with a bug")
    if choice % 7 == 0:
        return ConflictResolution.skip()
    if choice % 5 == 0:
        return ConflictResolution.merge({"merged": choice})
    if choice % 3 == 0:
        return ConflictResolution.accept_remote()
    return ConflictResolution.keep_local()


class Life:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.world = World(
            validate=lambda context, transaction: (
                Refusal("never", "poison")
                if any(op.value == {"poison": True} for op in transaction.operations)
                else None
            )
        )
        self.devices = [self.make_device() for _ in range(self.random.randint(2, 3))]
        self.backups = [self.world.backup_server()]
        self.restores = self.random.random() < 0.2
        self.keys = self.random.choice([3, 8, 30])

    def make_device(self) -> Device:
        pick = self.random.choice
        return self.world.device(
            default_policy=pick(
                ["client_wins", "server_wins", "last_write_wins", "manual", "merge", chaotic]
            ),
            pull_operations_max=pick([1, 2, 5, 5000]),
            push_operations_max=pick([1, 3, 5000]),
        )

    def step(self) -> None:
        roll = self.random.random()
        device = self.random.choice(self.devices)
        if roll < 0.45:
            self.write(device)
        elif roll < 0.75:
            self.sync(device)
        elif roll < 0.80:
            self.write_on_server()
        elif roll < 0.85:
            self.resolve(device)
        elif roll < 0.88:
            purge_tombstones(self.world.server, self.random.randint(0, self.world.server.sequence))
        elif roll < 0.91:
            self.copy_or_restore(device)
        elif roll < 0.94:
            self.change_scope(device)
        elif roll < 0.96 and self.restores:
            self.backup_or_restore_server()
        else:
            device.clock.ms += self.random.randint(0, 10**6)
            self.world.clock.ms += self.random.randint(0, 10**6)

    def operations(self) -> list[tuple[str, int, object]]:
        chosen = {
            (self.random.choice(NAMES), self.random.randrange(self.keys))
            for _ in range(self.random.randint(1, 4))
        }
        return [(name, number, self.value()) for name, number in sorted(chosen)]

    def value(self) -> object:
        roll = self.random.random()
        if roll < 0.2:
            return None
        if roll < 0.23:
            return {"poison": True}
        return {self.random.choice("abc"): self.random.randint(0, 3)}

    def write(self, device: Device) -> None:
        with device.db.transaction() as tx:
            for name, number, value in self.operations():
                self.put(tx, name, number, value)

    def put(self, tx: object, name: str, number: int, value: object) -> None:
        from tests.support import uid

        collection = tx.collection(name)  # type: ignore[attr-defined]
        if value is None:
            collection.discard(uid(number))
        else:
            collection[uid(number)] = value

    def write_on_server(self) -> None:
        with self.world.server.transaction() as tx:
            for name, number, value in self.operations():
                if value != {"poison": True}:
                    self.put(tx, name, number, value)

    def sync(self, device: Device) -> None:
        at, kind = self.random.randint(1, 6), self.random.random()
        device.wire.requests.clear()

        def lose(request: SyncRequest) -> None:
            if len(device.wire.requests) == at:
                raise TransportError("lost")

        def meanwhile(request: SyncRequest) -> None:
            if len(device.wire.requests) == at:
                self.write(device)
                if isinstance(request, PullRequest):
                    self.write_on_server()

        if kind < 0.15:
            device.wire.before = lose
        elif kind < 0.3:
            device.wire.after = lose
        elif kind < 0.45:
            device.wire.after = meanwhile
        elif kind < 0.6:
            device.storage.fail(self.random.randint(1, 6), after=self.random.random() < 0.5)
        try:
            device.sync()
        except Crash:
            device.restart()
        except HistoryChangedError:
            device.storage.fail_at = None
            device.engine.reset(self.random.choice(["server", "device"]))
        except (TransportError, SyncStateError):
            pass
        device.wire.before = device.wire.after = lambda request: None
        device.storage.fail_at = None

    def resolve(self, device: Device) -> None:
        conflicts = device.engine.conflicts()
        if conflicts:
            device.engine.resolve(
                self.random.choice(conflicts),
                self.random.choice(
                    [
                        ConflictResolution.keep_local(),
                        ConflictResolution.accept_remote(),
                        ConflictResolution.merge({"by hand": self.random.randint(0, 2)}),
                        ConflictResolution.merge(None),
                    ]
                ),
            )
        for gone in device.engine.discarded():
            if self.random.random() < 0.3 and gone.code != "never":
                device.engine.recommit(gone)
            elif self.random.random() < 0.3:
                device.engine.prune(gone)

    def copy_or_restore(self, device: Device) -> None:
        if len(self.devices) < 5:
            self.devices.append(device.copy())

    def change_scope(self, device: Device) -> None:
        wanted = self.random.choice([None, ["notes"], ["notes", "tasks"]])
        # What is pending may be in the way of narrowing.
        with contextlib.suppress(ScopeError):
            device.db.set_scope(wanted)

    def backup_or_restore_server(self) -> None:
        if self.random.random() < 0.5:
            self.backups.append(self.world.backup_server())
        else:
            self.world.open_server(self.random.choice(self.backups).copy())

    def quiet(self) -> None:
        for device in self.devices:
            if device.db.scope is not None:
                device.db.set_scope(None)
        for _ in range(12):
            for device in self.devices:
                self.calm(device)
            if all(device.sync().requests == 1 for device in self.devices):
                break
        else:
            raise AssertionError("it does not come to rest")
        for device in self.devices:
            with device.db.view() as view:
                assert list(read_pending(view.snapshot)) == []
        assert_in_step(self.world, *self.devices)

    def calm(self, device: Device) -> None:
        for _ in range(10):
            try:
                device.sync()
            except HistoryChangedError:
                device.engine.reset("device")
                continue
            for conflict in device.engine.conflicts():
                if conflict in device.engine.conflicts():
                    device.engine.resolve(conflict, "mine")
            head = device.db.read_head()
            if not (head.ready or head.held):
                return


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_life_ends_with_the_same_everywhere(seed: int) -> None:
    life = Life(seed)
    for _ in range(life.random.choice([20, 60, 150])):
        life.step()
        assert_sound(life.world.server, *[device.db for device in life.devices])
    life.quiet()

"""Everybody at once: readers beside a syncing device, and ten thousand entities."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.storage import LmdbStorage, MemoryStorage, Storage
from tests.support import Device, World, assert_in_step, uid

COLLECTIONS = ("left", "right", "sum")


def write_whole(database: Database, number: int, value: int) -> None:
    """Three entities that only together make sense."""
    with database.transaction() as tx:
        for name, content in zip(COLLECTIONS, (value, value * 2, value * 3), strict=True):
            tx.collection(name)[uid(number)] = content


def is_whole(read: Any, number: int) -> bool:
    left, right, total = (read(name, number) for name in COLLECTIONS)
    if left is None:
        return right is None and total is None
    return bool(right == left * 2 and total == left * 3)


@pytest.mark.parametrize("backend", ["memory", "lmdb"])
def test_r2_no_reader_sees_half_a_transaction_while_a_device_syncs(
    backend: str, tmp_path: Path
) -> None:
    world = World()
    storage: Storage = LmdbStorage.open(tmp_path) if backend == "lmdb" else MemoryStorage()
    a = world.device(storage, pull_operations_max=5, default_policy="client_wins")
    b = world.device(pull_operations_max=5, default_policy="server_wins")
    done = threading.Event()
    faults: list[str] = []
    reads = [0, 0]

    def read(which: int) -> None:
        while not done.is_set():
            with a.db.snapshot() as snapshot:
                for number in range(6):
                    if not is_whole(
                        lambda name, n, s=snapshot: s.collection(name).get(uid(n)), number
                    ):
                        faults.append(f"entity {number} at commit {snapshot.sequence}")
            reads[which] += 1

    threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(25):
            for number in range(6):
                if (turn + number) % 2:
                    write_whole(world.server, number, 1000 + turn)
                if (turn + number) % 3 == 0:
                    write_whole(a.db, number, 2000 + turn)
                if (turn + number) % 4 == 0:
                    write_whole(b.db, number, 3000 + turn)
            a.sync()
            b.sync()
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert faults == []
    assert all(reads)
    for device in (a, b, a, b):
        device.settle()
    for device in (a, b):
        for number in range(6):
            assert is_whole(lambda name, n, d=device: d.values(name).get(n), number)
    assert_in_step(world, a, b)
    a.db.close()


def test_ten_thousand_entities_come_to_be_the_same_everywhere() -> None:
    world = World()
    a, b = world.device(), world.device()
    for device, first in ((a, 0), (b, 5000)):
        for start in range(first, first + 5000, 50):
            device.put(
                *[
                    ("notes", n, {"number": n, "text": f"entity {n}"})
                    for n in range(start, start + 50)
                ]
            )
    for device in (a, b, a):
        device.sync()
    assert len(a.notes) == len(b.notes) == 10_000
    assert_in_step(world, a, b)
    a.put(*[("notes", n, None) for n in range(0, 10_000, 7)])
    b.put(*[("notes", n, {"changed": n}) for n in range(1, 10_000, 7)])
    for device in (a, b, a):
        device.sync()
    c = world.device()
    c.sync()
    assert len(c.notes) == 10_000 - 1429
    assert_in_step(world, a, b, c)


def test_four_devices_that_write_everything_agree_in_the_end() -> None:
    world = World()
    policies = ("client_wins", "server_wins", "last_write_wins", "merge")
    devices: list[Device] = [
        world.device(default_policy=p, pull_operations_max=3) for p in policies
    ]
    for turn in range(30):
        for at, device in enumerate(devices):
            device.clock.ms += 10 + at
            world.clock.ms += 20
            number = (turn * 7 + at * 3) % 11
            if turn % 5 == 4 and number in device.values():
                device.put(("notes", number, None))
            else:
                device.put(
                    ("notes", number, {"by": at, "turn": turn}),
                    ("notes", (number + 1) % 11, {f"field {at}": turn}),
                )
            if (turn + at) % 3 == 0:
                device.sync()
    for _ in range(2):
        for device in devices:
            device.settle()
    for device in devices:
        device.sync()
    assert_in_step(world, *devices)

"""``conflicts``: pending transactions rebased on pulled changes, half of them conflicts, merged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from benchmarks.figures import Figure, figure
from benchmarks.floors import RAW_BATCHES, batched_rate
from benchmarks.payloads import entities, value
from benchmarks.world import Device, World, load
from entidb import cbor
from entidb.sync import SyncState

SIZES = (10_000,)


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: pending transactions, and as many pulled changes."""
    for count in sizes:
        rebases: list[float] = []
        cycles: list[float] = []
        floors: list[float] = []
        merged = 0
        # A window of `count` entities each, half a window apart: half of each is shared.
        pairs = entities(count + count // 2)
        mine = [(i, _changed(n, "done")) for n, (i, _) in enumerate(pairs[:count])]
        theirs = [(i, _changed(n, "n")) for n, (i, _) in enumerate(pairs[count // 2 :], count // 2)]
        with world.server() as server:
            for number in range(rounds):
                floors.append(batched_rate(world.directory, mine))
                name = f"conflicts-{number}"
                with (
                    world.device(server, name, default_policy="merge") as one,
                    world.device(server, name) as other,
                ):
                    load(other.database, pairs)
                    other.sync()
                    one.sync()
                    load(other.database, theirs)
                    other.sync()
                    load(one.database, mine)
                    rebase, cycle, merged = _measure(one, count)
                    rebases.append(count / rebase)
                    cycles.append(count / cycle)
                shutil.rmtree(server.path_of(name), ignore_errors=True)
        note = f"{merged} conflicts merged field by field"
        yield figure(
            "conflicts",
            "pull and rebase",
            count,
            "transactions/s",
            rebases,
            floors=floors,
            floor_is=RAW_BATCHES,
            note=note,
        )
        yield figure(
            "conflicts",
            "whole cycle, with the push",
            count,
            "transactions/s",
            cycles,
            floors=floors,
            floor_is=RAW_BATCHES,
            note=note,
        )


def _changed(number: int, field: str) -> bytes:
    """Entity ``number`` with one field changed, so that two devices changed different ones."""
    before = value(number)
    after = {"done": not before["done"], "n": before["n"] + 1_000_000}
    return cbor.encode({**before, field: after[field]})


def _measure(device: Device, count: int) -> tuple[float, float, int]:
    """Seconds until the push begins, seconds of the whole cycle, conflicts resolved."""
    moments: dict[SyncState, float] = {}

    def note(old: SyncState, new: SyncState) -> None:
        moments.setdefault(new, time.perf_counter())

    stop = device.engine.on_state(note)
    began = time.perf_counter()
    result = device.engine.sync()
    ended = time.perf_counter()
    stop()
    assert result.pulled >= count and not result.unresolved and not result.withdrawn
    conflicts = len(result.conflicts)
    assert conflicts == count - count // 2, "half of the transactions met a change"
    return moments[SyncState.PUSHING] - began, ended - began, conflicts

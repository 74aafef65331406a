"""``conflicts``: pending transactions rebased on pulled changes, half of them conflicts, merged;
and what it costs to keep what a policy decides against, where each conflict decides against
something. That is compared in processor time: it is a matter of a few percent."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import count as counting
from typing import Any, NamedTuple

from benchmarks.figures import Figure, Target, figure
from benchmarks.floors import RAW_BATCHES, batched_rate
from benchmarks.payloads import entities, value
from benchmarks.world import Device, Server, World, load
from entidb import cbor
from entidb.sync import SyncEngine, SyncState

SIZES = (10_000,)
#: Policies that overrule one side of each conflict about one field; none in a version, of those
#: that this one is compared with, that does not keep what is overruled.
OVERRULING = ("merge", "client_wins") if hasattr(SyncEngine, "overruled") else ()

Rows = list[tuple[bytes, bytes]]


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: pending transactions, and as many pulled changes."""
    for size in sizes:
        with world.server() as server:
            yield from _run_size(world, server, size, rounds)


def _run_size(world: World, server: Server, count: int, rounds: int) -> Iterator[Figure]:
    rebases: list[float] = []
    cycles: list[float] = []
    floors: list[float] = []
    kept: dict[str, list[float]] = {policy: [] for policy in OVERRULING}
    forgotten: dict[str, list[float]] = {policy: [] for policy in OVERRULING}
    merged = 0
    # A window of `count` entities each, half a window apart: half of each is shared.
    pairs = entities(count + count // 2)
    mine = [(i, _changed(n, done=True)) for n, (i, _) in enumerate(pairs[:count])]
    second = list(enumerate(pairs))[count // 2 :]
    theirs = [(i, _changed(n, n=1_000_000)) for n, (i, _) in second]
    same_field = [(i, _changed(n, n=2_000_000)) for n, (i, _) in enumerate(pairs[:count])]
    names = map("conflicts-{}".format, counting())
    for number in range(rounds):
        floors.append(batched_rate(world.directory, mine))
        sides = pairs, mine, theirs
        measured = _round(world, server, next(names), sides, "merge")
        rebases.append(count / measured.rebase_s)
        cycles.append(count / measured.cycle_s)
        merged = measured.conflicts
        sides = pairs, same_field, theirs
        for policy in OVERRULING:
            # What comes second finds the machine warmer, so the two take turns.
            for keeps in (True, False) if number % 2 else (False, True):
                most = count if keeps else 0
                measured = _round(world, server, next(names), sides, policy, overruled_max=most)
                (kept if keeps else forgotten)[policy].append(count / measured.rebase_cpu_s)
    for name, values in (("pull and rebase", rebases), ("whole cycle, with the push", cycles)):
        yield figure(
            "conflicts",
            name,
            count,
            "transactions/s",
            values,
            floors=floors,
            floor_is=RAW_BATCHES,
            note=f"{merged} conflicts merged field by field",
        )
    for policy in OVERRULING:
        yield figure(
            "conflicts",
            f"pull and rebase, {policy}, keeping what is overruled",
            count,
            "transactions/CPU s",
            kept[policy],
            floors=forgotten[policy],
            floor_is="the same, keeping nothing",
            target=Target("ratio", least=0.95) if policy == "merge" else None,
        )


def _changed(number: int, **fields: Any) -> bytes:
    """Entity ``number`` with one field changed."""
    return cbor.encode({**value(number), **fields})


def _round(
    world: World,
    server: Server,
    name: str,
    sides: tuple[Rows, Rows, Rows],
    policy: str,
    **settings: Any,
) -> Measured:
    """One device meets what another pushed, in a database called ``name``. ``sides`` are what
    both begin with, what the one changes, and what the other does."""
    pairs, mine, theirs = sides
    with (
        world.device(server, name, default_policy=policy, **settings) as one,
        world.device(server, name) as other,
    ):
        load(other.database, pairs)
        other.sync()
        one.sync()
        load(other.database, theirs)
        other.sync()
        load(one.database, mine)
        measured = _measure(one, len(mine))
        overruled = one.engine.status().overruled if OVERRULING else 0
    expected = len(mine) - len(mine) // 2 if settings.get("overruled_max") else 0
    assert overruled == expected, "each conflict about one field overrules one side"
    shutil.rmtree(server.path_of(name), ignore_errors=True)
    return measured


class Measured(NamedTuple):
    """Of one cycle: seconds until its push begins, also of this process's processor time, seconds
    of all of it, and how many conflicts it had."""

    rebase_s: float
    rebase_cpu_s: float
    cycle_s: float
    conflicts: int


def _measure(device: Device, count: int) -> Measured:
    moments: dict[SyncState, tuple[float, float]] = {}

    def note(old: SyncState, new: SyncState) -> None:
        moments.setdefault(new, (time.perf_counter(), time.process_time()))

    stop = device.engine.on_state(note)
    began, began_cpu = time.perf_counter(), time.process_time()
    result = device.engine.sync()
    ended = time.perf_counter()
    stop()
    assert result.pulled >= count and not result.unresolved and not result.withdrawn
    conflicts = len(result.conflicts)
    assert conflicts == count - count // 2, "half of the transactions met a change"
    pushing, pushing_cpu = moments[SyncState.PUSHING]
    return Measured(pushing - began, pushing_cpu - began_cpu, ended - began, conflicts)

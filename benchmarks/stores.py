"""``--store postgres``: the same benchmark with its databases in files and in PostgreSQL, in turns,
and beside it what PostgreSQL does with the same writes without EntiDB.

PostgreSQL is a server of its own in the benchmark's directory, as it comes: on the same disk, with
every commit flushed. Devices keep their databases in files.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import psycopg
from msgspec import Struct

from benchmarks import single
from benchmarks.figures import Figure, Target, figure, timed
from benchmarks.floors import RawPostgres
from benchmarks.payloads import entities
from benchmarks.world import World
from entidb.server import copy_server
from tests.storage.postgres_cluster import MISSING, Cluster

EMBEDDED = "the same in files"
#: Of figures by the beginning of their names; against files.
TARGETS = {
    ("push", "v7 ids"): Target("ratio", least=0.5),
    ("push", "random ids"): Target("ratio", least=0.5),
    ("pull", "first sync"): Target("ratio", least=0.5),
    ("incremental", "push 100 changes"): Target("ratio", most=2.0),
    ("incremental", "pull 100 changes"): Target("ratio", most=2.0),
    ("latency", "p50"): Target("ratio", most=2.0),
}
#: Entities of one raw commit beside each benchmark: in batches, as many as change, one by one.
RAW = {"push": 1000, "pull": 1000, "incremental": 100, "latency": 1, "many": 1}
RAW_COMMITS = {1000: 5, 100: 50, 1: 300}

_numbers = itertools.count(1)


def begin(world: World) -> Callable[[], None]:
    """A PostgreSQL server of this run; what ends it."""
    if MISSING is not None:
        raise SystemExit(f"--store postgres: {MISSING}")
    folder = world.path("postgres").absolute()
    folder.mkdir(mode=0o755)
    world.directory.chmod(0o755)
    cluster = Cluster(folder)
    cluster.make()
    cluster.start(shared_buffers="256MB", max_wal_size="4GB")
    _clusters[id(world)] = cluster
    return cluster.stop


_clusters: dict[int, Cluster] = {}


class Placed(Struct):
    """Databases of a PostgreSQL, and a directory for what servers keep beside them."""

    address: str
    directory: Path


@contextmanager
def placed(world: World, databases: Mapping[str, Path]) -> Iterator[Placed]:
    """``databases``, which are moved, in a new place of the PostgreSQL server of this run."""
    directory, address = world.new_data_dir(databases), _new_address(world)
    copy_server(directory, address)
    yield Placed(address, directory)
    shutil.rmtree(directory)


def _new_address(world: World) -> str:
    cluster = _clusters[id(world)]
    name = f"bench{next(_numbers)}"
    with psycopg.connect(cluster.address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return cluster.address.replace("///postgres?", f"///{name}?")


def run(name: str, world: World, n: list[int] | None, rounds: int) -> Iterator[Figure]:
    """The figures of one benchmark in PostgreSQL, beside those in files."""
    files: dict[tuple[str, int], list[Figure]] = {}
    ours: dict[tuple[str, int], list[Figure]] = {}
    raws: list[float] = []
    for _ in range(rounds):
        for each in single.run(name, world, n, 1):
            files.setdefault((each.figure, each.n), []).append(each)
        world.new_address = lambda: _new_address(world)
        try:
            for each in single.run(name, world, n, 1):
                ours.setdefault((each.figure, each.n), []).append(each)
        finally:
            world.new_address = None
        raws.append(_raw_ms(world, RAW[name]))
    for (name_of, count), found in ours.items():
        # Against a server with nothing behind says nothing about a store; the rate itself does.
        what = name_of.replace(": against bare", ": requests")
        if what != name_of and (what, count) in ours:
            continue
        beside = [each.value for each in files[name_of, count]]
        if not all(beside):
            continue
        yield figure(
            name,
            f"{what}, in PostgreSQL",
            count,
            found[0].unit,
            [each.value for each in found],
            floors=beside,
            floor_is=EMBEDDED,
            target=TARGETS.get((name, what)),
        )
    many = "" if RAW[name] == 1 else f" of {RAW[name]:,} entities"
    yield figure(name, f"raw PostgreSQL, one commit{many}", RAW[name], "ms", raws)


def _raw_ms(world: World, size: int) -> float:
    """Milliseconds of a durable commit of ``size`` entities and an index of them by sequence."""
    commits = RAW_COMMITS[size]
    pairs = entities(size * commits)
    with closing(RawPostgres(_new_address(world))) as raw:
        raw.put(pairs[:size])
        return 1000 * statistics.median(
            timed(partial(raw.put, pairs[at : at + size])) for at in range(0, len(pairs), size)
        )

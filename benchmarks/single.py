"""One benchmark by its name: what the command line and the comparison of stores both start."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from benchmarks.figures import Figure
from benchmarks.world import World


def run(name: str, world: World, n: list[int] | None, rounds: int) -> Iterator[Figure]:
    """The figures of one benchmark, of its usual sizes unless ``n`` names others."""
    module = import_module(f"benchmarks.{name}")
    yield from module.run(world, tuple(n) if n else module.SIZES, rounds)

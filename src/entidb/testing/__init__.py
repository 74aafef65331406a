"""What proves an EntiDB: contract suites, fakes and the simulator, for our tests and for users'.

Nothing in the rest of the package imports this one, and importing it does not import pytest. The
simulator runs a server in the process and needs the packages of the ``server`` extra; its names
are loaded when they are first used. ``docs/testing.md`` shows how to use all of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from entidb.testing.batch import Summary, run_seeds, shrink
    from entidb.testing.converge import assert_converges
    from entidb.testing.faults import Crash, FaultyStorage, Network
    from entidb.testing.simulator import Options, Run, simulate

_HOMES: Final[dict[str, tuple[str, ...]]] = {
    "batch": ("Summary", "run_seeds", "shrink"),
    "converge": ("assert_converges",),
    "faults": ("Crash", "FaultyStorage", "Network"),
    "simulator": ("Options", "Run", "simulate"),
}
_MODULES: Final = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "Crash",
    "FaultyStorage",
    "Network",
    "Options",
    "Run",
    "Summary",
    "assert_converges",
    "run_seeds",
    "shrink",
    "simulate",
]

"""The tools that prove EntiDB: contract suites, fakes and the simulator, for our tests and for
users'.

Nothing in the rest of the package imports this one, and importing it does not import pytest. The
simulator runs a server in the process and needs the packages of the ``server`` extra; its names
are loaded when they are first used. ``docs/testing.md`` shows how to use all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from entidb.lazy import lazy_names

if TYPE_CHECKING:
    from entidb.testing.batch import Summary, run_seeds, shrink
    from entidb.testing.converge import assert_converges
    from entidb.testing.faults import Crash, FaultyStorage, Network
    from entidb.testing.simulator import Options, Run, simulate

_HOMES: Final = {
    "entidb.testing.batch": ("Summary", "run_seeds", "shrink"),
    "entidb.testing.converge": ("assert_converges",),
    "entidb.testing.faults": ("Crash", "FaultyStorage", "Network"),
    "entidb.testing.simulator": ("Options", "Run", "simulate"),
}
_HOME_OF, __getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())

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

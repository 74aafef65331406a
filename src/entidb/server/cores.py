"""On which core a worker runs.

Threads of one Python process take turns with its interpreter, some ten times for each request. Left
to the system, they run on whichever core is free, and each turn wakes up another core, which
another worker wants. On one core, who lets the interpreter go for a moment mostly has it again
before anybody else is awake. So each worker stays on one core, where there are as many of them as
cores, or a multiple; with fewer, the system is left to find a core that has nothing else to do.

Threads that read large pages, pack or copy do much of their work without the interpreter: those run
anywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

#: Those that this process may use, where it stays on one of them.
_cores: list[int] = []


def core_of(number: int, count: int, cores: Sequence[int]) -> int | None:
    """The core of worker ``number`` of ``count``, which are numbered from 0; of those that the
    process may use. None: any of them."""
    if len(cores) < 2 or count % len(cores):
        return None
    return cores[number % len(cores)]


if sys.platform == "linux":

    def stay_on_core(number: int, count: int) -> None:
        """Have this thread run where worker ``number`` of ``count`` is to run, and all threads that
        it starts from now on. For the first thread of a process."""
        cores = sorted(os.sched_getaffinity(0))
        core = core_of(number, count, cores)
        if core is not None:
            _cores[:] = cores
            os.sched_setaffinity(0, {core})

    def run_anywhere() -> None:
        """Let this thread run on all cores that its process may use."""
        if _cores:
            os.sched_setaffinity(0, _cores)

else:

    def stay_on_core(number: int, count: int) -> None:
        """There are no workers."""

    def run_anywhere() -> None:
        """Threads run anywhere."""


__all__ = ["core_of", "run_anywhere", "stay_on_core"]

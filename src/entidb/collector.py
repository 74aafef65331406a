"""Keeping the search for reference cycles away from work that makes none.

A message or a batch is tens of thousands of small lists and no cycle among them. Python looks for
cycles whenever so many more containers were made than freed, and through everything that is alive:
measured, a fifth of the time of a push or a pull, in a small process, and more in a large one.
Reference counting frees all of it anyway.
"""

from __future__ import annotations

import gc
import threading
from types import TracebackType

_lock = threading.Lock()
_depth = 0
_was_enabled = False


class paused:
    """No search for cycles inside this block, in no thread; nested and concurrent blocks count.

    For work that is bounded: what other threads leave behind in cycles stays until it is over. A
    program that has switched the collector off itself finds it off afterwards.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        global _depth, _was_enabled
        with _lock:
            if _depth == 0:
                _was_enabled = gc.isenabled()
                gc.disable()
            _depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _depth
        with _lock:
            _depth -= 1
            if _depth == 0 and _was_enabled:
                gc.enable()


__all__ = ["paused"]

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

#: Reentrant, because a forgotten pause ends wherever its object is freed.
_lock = threading.RLock()
_active: set[int] = set()
_was_enabled = False


class paused:
    """No search for cycles inside this block, in no thread; nested and concurrent blocks count.

    For work that is bounded: what other threads leave behind in cycles stays until it is over. A
    program that has switched the collector off itself finds it off afterwards. Use each object
    once.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        global _was_enabled
        with _lock:
            if not _active:
                _was_enabled = gc.isenabled()
            _active.add(id(self))
            gc.disable()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            if id(self) in _active:
                _active.discard(id(self))
                if not _active and _was_enabled:
                    gc.enable()

    def __del__(self) -> None:
        # Ctrl-C can fall between two steps of a ``with`` statement, so that it is never left.
        if id(self) in _active:
            self.__exit__(None, None, None)


__all__ = ["paused"]

"""Signals as a server needs them, whatever the program that started it has left: a process inherits
which signals are blocked or ignored, and some programs block or ignore them for their own ends.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import Final

_CHILD: Final = getattr(signal, "SIGCHLD", None)


@contextlib.contextmanager
def heard(numbers: Iterable[int]) -> Iterator[None]:
    """In the main thread: these signals arrive, and the ends of children can be waited for; as it
    was before, afterwards."""
    if _CHILD is None:  # Windows has neither
        yield
        return
    # Ignored, it lets children vanish without a word of how they ended.
    ignored = signal.getsignal(_CHILD) is signal.SIG_IGN
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if ignored:
        signal.signal(_CHILD, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(_CHILD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


__all__ = ["heard"]

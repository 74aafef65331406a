"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: Far longer than anything here takes on a machine that does other things, too.
_PATIENCE_S: Final = 120.0


def until(true: Callable[[], object]) -> None:
    """Return once it is true."""
    end = time.monotonic() + _PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)

"""What a server does now and then, one thing after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

logger = logging.getLogger("entidb.server")


def do_each(chores: Iterable[Callable[[], None]]) -> None:
    """Do all of them: one that fails, as for a database that is damaged, must not keep those behind
    it from being done for all others."""
    for chore in chores:
        try:
            chore()
        except Exception:
            logger.exception("a part of housekeeping failed; it is tried again with the next")


__all__ = ["do_each"]

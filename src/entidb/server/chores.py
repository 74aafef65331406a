"""What a server does now and then, one thing after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from entidb.errors import StorageError
from entidb.storage.disk_errors import said_of

logger = logging.getLogger("entidb.server")


def do_each(chores: Iterable[Callable[[], None]]) -> None:
    """Do all of them: one that fails, as for a database that is damaged, must not keep those behind
    it from being done for all others."""
    for chore in chores:
        try:
            chore()
        except Exception as error:
            log_failure(error, "a part of housekeeping failed; it is tried again with the next")


def log_failure(error: BaseException, what: str) -> None:
    """Write to the log that ``what`` ended by ``error``: of what the disk or the system did in one
    line that says where and what to do, of a mistake of ours where it came from."""
    from_system = isinstance(error, OSError) and error.errno is not None
    if from_system or isinstance(error, StorageError):
        logger.error("%s", said_of(error, what))
    else:
        logger.error("%s", what, exc_info=error)


__all__ = ["do_each", "log_failure"]

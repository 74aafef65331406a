"""A store that is away for a moment: which errors say so, and what devices are told.

What is stored may be on another machine, which is restarted, or has handed over to another one; or
a database may have got another name on another node. Nothing is wrong then that a device should
hear of: it comes again, and finds the database opened anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Final

from entidb.errors import DatabaseMovedError, ServerBusyError, StorageUnreachableError

#: Seconds after which devices come again: at least, and spread over so many more.
_RETRY_S: Final = 1.0
_SPREAD_S: Final = 2.0
#: So many times as long where a disk is full.
_FULL_RETRY_S: Final = 10.0
#: Multiples of it, without their whole part, are spread evenly, however many there are.
_GOLDEN: Final = 0.6180339887
_ALL: Final = count(1)
_told: Final[ContextVar[Iterator[int]]] = ContextVar("entidb_told")


def is_away(error: BaseException) -> bool:
    """Whether asking again may find what was not to be had now. Also of a commit whose answer
    got lost: what became of it is seen when the database is opened again (R17)."""
    if isinstance(error, DatabaseMovedError):
        return error.code == "store_gone"  # and not files, which somebody has moved by mistake
    unreachable = StorageUnreachableError
    return isinstance(error, unreachable) or isinstance(error.__cause__, unreachable)


def retry_after_s() -> float:
    """Not the same for all who are told in one moment: they should not come back together."""
    return _RETRY_S + _SPREAD_S * (next(_told.get(_ALL)) * _GOLDEN % 1)


def full_retry_after_s() -> float:
    """As ``retry_after_s``, where a disk is full: somebody has to make room."""
    return _FULL_RETRY_S * retry_after_s()


@contextmanager
def counted_alone() -> Iterator[None]:
    """What is told in this block depends on nothing that was told before it: for simulations, in
    which one seed gives one trace."""
    token = _told.set(count(1))
    try:
        yield
    finally:
        _told.reset(token)


def come_again() -> ServerBusyError:
    return ServerBusyError(
        "the database cannot be reached at the moment; nothing was changed that a new try would "
        "not find",
        retry_after=retry_after_s(),
    )


__all__ = ["come_again", "counted_alone", "full_retry_after_s", "is_away", "retry_after_s"]

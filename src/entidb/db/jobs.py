"""Commits that a thread makes for others: what is to be done, and what became of it.

Not here: the threads that do it (``committer`` for tasks, ``sharing`` for threads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from entidb.errors import CommitUnknownError

T = TypeVar("T")
#: Jobs of one storage commit at most.
GROUP_MAX: Final = 256


class Job(Generic[T]):
    """``work`` is done on the thread that commits, perhaps more than once. ``told`` is called there
    when it is over; then ``error`` or ``value`` is set. ``sequence`` is that of its commit: 0 if
    nothing was committed, None if that is unknown."""

    def __init__(
        self,
        work: Callable[[Any], T],
        told: Callable[[], None],
        transaction_id: bytes | None = None,
    ) -> None:
        self.work = work
        self.told = told
        self.transaction_id = transaction_id
        self.error: BaseException | None = None
        self.value: T | None = None
        self.sequence: int | None = 0

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]

    def fail(self, error: BaseException) -> None:
        self.error, self.value = error, None
        self.sequence = None if isinstance(error, CommitUnknownError) else 0


__all__ = ["GROUP_MAX", "Job"]

"""Ctrl-C at any line of what wakes a thread: no lock stays taken, and who comes next gets through.

Beside the lines of the project the moments count in which a function of ``threading`` is about to
return: there a lock is taken, and the block of the ``with`` has not begun.
"""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable
from itertools import count
from types import FrameType
from typing import Any

import pytest

from entidb.db import Database
from entidb.db.committer import Committer
from entidb.db.jobs import Job
from entidb.server.admin.tasks import Tasks
from entidb.server.group_commit import GroupCommitter
from entidb.storage.postgres.marks import Marks
from entidb.types import SystemClock
from tests.db.test_interrupts import SOURCE, _is_leaving, interrupt

OF_THREADS = str(threading.__file__)

#: What is done with an interrupt in it, and what somebody else does afterwards.
Pair = tuple[Callable[[], object], Callable[[], object]]


def marks() -> Pair:
    waited_for = Marks(lambda wanted: {})
    waited_for._waiting[1] = 1  # as if somebody waited
    return lambda: waited_for.tell(1, 2), lambda: waited_for.tell(1, 3)


def tasks() -> Pair:
    kept = Tasks(SystemClock())

    def add() -> None:
        kept.add("verify", "ada", None, lambda progress: {})
        kept.cancel(7)

    return add, kept.close


def committer() -> Pair:
    database = Database.in_memory()
    commits = Committer(database)
    job = Job(lambda staging: None, lambda: None)

    def submit() -> None:
        commits.submit(job)
        commits.withdraw(job)

    def close() -> None:
        commits.close()
        database.close()

    return submit, close


def group() -> Pair:
    commits = GroupCommitter(Any, schedule=lambda run: None)  # type: ignore[arg-type]

    def submit() -> None:
        commits.submit(Any, Any, lambda answer: None)  # type: ignore[arg-type]

    return submit, lambda: commits.submit(Any, Any, lambda answer: None)  # type: ignore[arg-type]


def _is_looked_for(frame: FrameType) -> bool:
    """Whether a signal could arrive at this line; Python looks for none at a bare ``try:``."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] != "NOP" and not _is_leaving(frame)


def interrupted(work: Callable[[], object], at: int) -> bool:
    """Whether ``work`` came as far as its moment number ``at``, and was interrupted there."""
    seen = 0

    def moment(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        of_threads = frame.f_code.co_filename == OF_THREADS
        if event == "return" if of_threads else event == "line" and _is_looked_for(frame):
            seen += 1
            if seen == at:
                sys.settrace(None)
                interrupt()
        return moment

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        waits = code.co_filename == OF_THREADS and "Condition" in code.co_qualname
        return moment if waits or code.co_filename.startswith(SOURCE) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("make", [marks, tasks, committer, group])
def test_who_wakes_a_thread_and_is_interrupted_leaves_no_lock_taken(
    make: Callable[[], Pair],
) -> None:
    for at in count(1):
        work, by_others = make()
        ended = not interrupted(work, at)
        thread = threading.Thread(target=by_others, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), f"moment {at} left a lock taken"
        if ended:
            break
    assert at > 3

"""What ``stores`` calls where nobody has said what else to call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


def nothing() -> None:
    return None


def ignore(db_id: str, head: int) -> None:
    return None


def never(db_id: str) -> bool:
    return False


def always(db_id: str, every_s: float) -> bool:
    return True


def alone(db_id: str, wait_s: float) -> AbstractContextManager[None]:
    return nullcontext()

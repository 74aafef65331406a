"""What has to be so before a database may go for good."""

from __future__ import annotations

from entidb.db.core import Core
from entidb.db.local import Role
from entidb.errors import DatabaseClosedError, ScopeError, TransactionError
from entidb.types import check_bool


def check_may_go(core: Core, has_engine: bool, discard_pending: bool) -> None:
    """Raises what ``Database.destroy`` does, before anything has happened."""
    check_bool("discard_pending", discard_pending)
    if core._closed:
        raise DatabaseClosedError(f"{core.where} is closed; open it to destroy it")
    if core._read_only:
        raise core._no_writing()
    if has_engine:
        raise TransactionError(f"{core.where} has a sync engine; close that one first")
    head = core.read_head()
    waiting = head.ready + head.held if core.role is Role.DEVICE else 0
    if waiting and not discard_pending:
        raise ScopeError(
            f"{waiting} transactions in {core.where} are not on a server: sync first, or give "
            "discard_pending=True to lose them",
            code="scope_pending",
        )


__all__ = ["check_may_go"]

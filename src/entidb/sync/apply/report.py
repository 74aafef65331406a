"""What became of pending transactions: the report of one step of a cycle (R4, R24, R25)."""

from __future__ import annotations

from msgspec import Struct, field

from entidb.sync.conflict import Conflict, ConflictResolution


class Withdrawn(Struct, frozen=True):
    """A transaction that went to the ``discarded`` list, and why (R4)."""

    sequence: int
    transaction_id: bytes
    code: str
    message: str


class Resolved(Struct, frozen=True):
    """A conflict and what the policy made of it."""

    conflict: Conflict
    resolution: ConflictResolution


class RebaseReport(Struct):
    """What one rebase did. ``done`` are ids of transactions the server had already (R24),
    ``overruled`` counts the values that were decided against and are kept (R4)."""

    pulled: int = 0
    resolved: list[Resolved] = field(default_factory=list)
    unresolved: list[Conflict] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)
    done: list[bytes] = field(default_factory=list)
    overruled: int = 0

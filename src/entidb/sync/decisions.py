"""What a person decides through an engine: open conflicts, withdrawn and overruled values.

``apply.review`` has the rules; here are the methods that programs call.
"""

from __future__ import annotations

from typing import Any

from entidb.db import DiscardedTransaction, OverruledValue
from entidb.db.notebook import Explored
from entidb.errors import ConfigError
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.report import RebaseReport
from entidb.sync.conflict import Conflict, ConflictResolution


class Decisions(Explored):
    """The part of an engine that needs no server. All methods may be called from any thread."""

    applier: DatabaseApplier

    def conflicts(self) -> list[Conflict]:
        """Conflicts that wait for a person (R25, R26)."""
        return self.applier.conflicts()

    def resolve(
        self, conflict: Conflict, choice: str | ConflictResolution | None = None, **value: Any
    ) -> RebaseReport:
        """Decide an open conflict: ``"mine"``, ``"theirs"``, ``value=…`` (None deletes), or a
        ``ConflictResolution``. The next cycle pushes what waited. Raises ``ConflictError``."""
        return self.applier.resolve(conflict, resolution_of(choice, **value))

    def discarded(self) -> list[DiscardedTransaction]:
        """Withdrawn transactions (R4), oldest first."""
        return self.applier.discarded()

    def overruled(self) -> list[OverruledValue]:
        """Values that a policy or a person decided against, field by field, from either side (R4),
        oldest first. Kept as ``overruled_max`` and ``overruled_days`` say."""
        return self.applier.overruled()

    def recommit(self, discarded: DiscardedTransaction | OverruledValue) -> int:
        """Commit a discarded transaction again, or write an overruled value back to its field;
        returns the commit's sequence. A transaction writes each entity whole, as it had it, over
        what is there now, and no policy is asked. Raises ``ConflictError``."""
        return self.applier.recommit(discarded)

    def prune(self, discarded: DiscardedTransaction | OverruledValue) -> bool:
        """Forget a discarded transaction, or an overruled value, for good."""
        return self.applier.prune(discarded)


def resolution_of(
    choice: str | ConflictResolution | None = None, **value: Any
) -> ConflictResolution:
    """What ``resolve`` accepts, as a ``ConflictResolution``. Raises ``ConfigError``."""
    if isinstance(choice, ConflictResolution):
        return choice
    if choice is None and set(value) == {"value"}:
        return ConflictResolution.merge(value["value"])
    if not value and choice in ("mine", "keep_local"):
        return ConflictResolution.keep_local()
    if not value and choice in ("theirs", "accept_remote"):
        return ConflictResolution.accept_remote()
    raise ConfigError('resolve with "mine", "theirs", or value=…; see docs/conflicts.md')

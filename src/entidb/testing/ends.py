"""What a sync of a simulated device says at its end is so: the program that called it relies on
that.
"""

from __future__ import annotations

from collections.abc import Iterator

from entidb.db.pending import PendingTransaction
from entidb.errors import EntiDBError, SyncCancelledError
from entidb.sync import SyncCycleResult, SyncState
from entidb.sync.apply.applier import DatabaseApplier
from entidb.testing.person import Person


def check_end(device: Person, result: SyncCycleResult | None, error: EntiDBError | None) -> None:
    """The result, the error and the state of the engine fit, and nothing that was due is left."""
    checks, ended = device.world.checks, device.engine.state
    cancelled = isinstance(error, SyncCancelledError)
    checks.that(
        device.cancelled is cancelled,
        "LIVENESS",
        f"{device.name} was cancelled, and ended: {error}",
    )
    due = SyncState.SYNCED if error is None else SyncState.ERROR
    checks.that(
        ended is (SyncState.IDLE if cancelled else due),
        "LIVENESS",
        f"a sync of {device.name} ended with {error!r}, and the engine is {ended.value}",
    )
    if result is None or result.incomplete or result.kept_back or not device.due:
        return
    if device.watch.full or device.watch.excluded:
        return  # a scope that changed meanwhile has to be pulled first (R31)
    left = [t for t in _ready(device) if t.transaction_id in device.due]
    checks.that(
        not left,
        "LIVENESS",
        f"a sync of {device.name} worked, and left {len(left)} transactions that were due",
    )


def _ready(device: Person) -> Iterator[PendingTransaction]:
    """What waits for nothing but a sync: no conflict, and nobody who is away (R36)."""
    # Not a step of a cycle: nobody comes in between.
    others = DatabaseApplier.look(device.engine.applier).state.others
    kept: set[tuple[int, bytes]] = set()
    for pending in device.engine.applier.pending():
        refs = {(op.collection, op.entity_id) for op in pending.operations}
        away = any(each.first <= pending.sequence <= each.last for each in others)
        if away or not kept.isdisjoint(refs):
            kept |= refs
        elif not pending.held:
            yield pending


__all__ = ["check_end"]

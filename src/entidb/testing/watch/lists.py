"""SURFACED-ONCE: what waits for a person is listed, held, and reported once."""

from __future__ import annotations

from entidb.db.pending import decode_pending
from entidb.db.records import DIRTY, HELD, conflict_key, sequence_key, unpack_pending
from entidb.sync import RebaseReport, SyncCycleResult
from entidb.testing.watch.commits import DeviceCommit
from entidb.testing.watch.model import (
    DeviceModel,
    discarded_id,
)


def check_lists(watch: DeviceModel, commit: DeviceCommit) -> None:
    for sequence, was, now in commit.discards:
        if now is not None:
            identity = discarded_id(now)
            watch.discarded[sequence] = identity
            watch.unreported[identity] = None
        elif was is not None:
            identity = watch.discarded.pop(sequence)
            watch.checks.that(
                identity in watch.by_person_ids,
                "SURFACED-ONCE",
                f"{identity.hex()} left the discarded list of {watch.name} by itself",
            )
    for number, entity_id, now in commit.conflicts:
        ref = (watch.catalogue.by_number[number].name, entity_id)
        if now is not None:
            watch.open_conflicts[ref] = None
            watch.unreported_conflicts[ref] = None
        else:
            watch.open_conflicts.pop(ref, None)
    for ref in watch.calls:
        watch.unreported_conflicts[ref] = None
    _check_held(watch, commit)


def _check_held(watch: DeviceModel, commit: DeviceCommit) -> None:
    """Nothing that touches an open conflict, or is built on what does, may be pushed (R25)."""
    records = commit.records
    for _, now in commit.outbox.values():
        if now is None or now.held:
            continue
        for op in now.operations:
            ref = (watch.catalogue.by_number[op.collection].name, op.entity_id)
            below = op.previous and sequence_key(HELD, op.previous) in records
            if ref in watch.open_conflicts or below:
                watch.checks.fail(
                    "SURFACED-ONCE",
                    f"{watch.name} would push a write of {ref[0]}/{ref[1].hex()}, which is not "
                    "decided",
                )
    for number, entity_id, conflict in commit.conflicts:
        raw = records.get(watch.catalogue.by_number[number].prefix + entity_id)
        if conflict is not None and raw is not None and raw[0] & DIRTY:
            watch.checks.that(
                sequence_key(HELD, unpack_pending(raw)[5]) in records,
                "SURFACED-ONCE",
                f"{watch.name} does not hold what is in conflict on {entity_id.hex()}",
            )
    _check_why_held(watch, commit)


def _check_why_held(watch: DeviceModel, commit: DeviceCommit) -> None:
    """Nothing is held except by an open conflict, or by a transaction below it that is held itself:
    otherwise no decision could ever release it."""
    freed = any(conflict is None for _, _, conflict in commit.conflicts)
    pairs = commit.outbox.values()
    if not freed and not any(one and one.held for pair in pairs for one in pair):
        return
    holding: set[tuple[int, int, bytes]] = set()
    for sequence in sorted(watch.outbox.values()):
        key = sequence_key(HELD, sequence)
        raw = commit.records.get(key)
        if raw is None:
            continue
        operations = decode_pending(key, raw).operations
        reasons = (
            (op.previous, op.collection, op.entity_id) in holding
            or conflict_key(op.collection, op.entity_id) in commit.records
            for op in operations
        )
        watch.checks.that(
            any(reasons),
            "LIVENESS",
            f"{watch.name} holds commit {sequence}, and nothing holds it",
        )
        holding.update((sequence, op.collection, op.entity_id) for op in operations)


def on_report(watch: DeviceModel, report: SyncCycleResult | RebaseReport) -> None:
    """What a cycle, or a person's decision, says it has done: no more and no less."""
    withdrawn = [entry.transaction_id for entry in report.withdrawn]
    watch.checks.that(
        dict.fromkeys(withdrawn) == watch.unreported and len(withdrawn) == len(watch.unreported),
        "SURFACED-ONCE",
        f"{watch.name} withdrew {len(watch.unreported)} transactions and reported {len(withdrawn)}",
    )
    twice = [identity.hex() for identity in withdrawn if identity in watch.reported]
    watch.checks.that(not twice, "SURFACED-ONCE", f"{watch.name} reported {twice} again")
    watch.reported.update(dict.fromkeys(withdrawn))
    watch.losers.check_report(report.overruled)
    resolved = report.conflicts if isinstance(report, SyncCycleResult) else report.resolved
    told = {(r.conflict.collection, r.conflict.id_bytes): None for r in resolved}
    told.update({(c.collection, c.id_bytes): None for c in report.unresolved})
    silent = [ref for ref in watch.unreported_conflicts if ref not in told]
    watch.checks.that(
        not silent, "SURFACED-ONCE", f"{watch.name} did not report conflicts on {silent}"
    )
    watch.unreported, watch.unreported_conflicts = {}, {}

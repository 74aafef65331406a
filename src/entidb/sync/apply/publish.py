"""A complete stage becomes what readers see, in one commit (R20, R28).

Collections that were pulled whole change their table, with what is pending carried over; of the
others the changes are taken one by one, as of a page.
"""

from __future__ import annotations

from collections.abc import Set

from entidb.db import machine
from entidb.db.adopt import schedule_adoption
from entidb.db.outbox import read_pending
from entidb.db.records import HAS_BASE, BaseRow, EntityRow
from entidb.db.replica import ReplicaState, Stage
from entidb.db.writer import Ref, Writer
from entidb.sync.apply.position import move_cursor
from entidb.sync.apply.rebase import Dirty, Rebase

#: Rows moved or scanned at a time while publishing: bounds memory, not correctness.
_PAGE_ROWS = 2000


def publish_stage(writer: Writer, rebase: Rebase, stage: Stage, state: ReplicaState) -> None:
    cursor = stage.full_cursor if stage.full is None else stage.delta_cursor
    rebase.report.pulled += stage.operations
    full = _full_collections(writer, stage)
    old_tables = {number: writer.catalogue.by_number[number].table for number in full}
    dirty = _dirty_of(writer, set(full))
    if full:
        _switch_tables(writer, rebase, stage, full)
        unsettled = _unsettled(writer, stage, state)
        _carry_over(writer, rebase, dirty, old_tables, cursor, state.keep_device, unsettled)
    _apply_deltas(writer, rebase, stage)
    if state.keep_device:
        schedule_adoption(writer, [[n, old_tables[n]] for n in sorted(full)], compare=True)
    writer.set_stage(machine.PUBLISH(stage, None))
    state = writer.sync_state
    move_cursor(writer, state, cursor, state.seen)


def _full_collections(writer: Writer, stage: Stage) -> list[int]:
    return sorted(
        info.number
        for info in writer.catalogue.by_name.values()
        if info.synced
        and (stage.full is None or info.name in stage.full)
        # That something is not there proves nothing about what the token does not grant (R31).
        and writer.sync_state.grants(info.name)
    )


def _dirty_of(writer: Writer, numbers: set[int]) -> list[tuple[Ref, EntityRow]]:
    """Entities of collections about to be switched that have pending changes, with their rows, in
    the order of their oldest pending transaction."""
    found: dict[Ref, EntityRow] = {}
    for transaction in read_pending(writer.snapshot):
        for op in transaction.operations:
            ref = (op.collection, op.entity_id)
            if op.collection in numbers and ref not in found:
                row = writer.entity(ref)
                assert row is not None
                found[ref] = row
    return list(found.items())


def _switch_tables(writer: Writer, rebase: Rebase, stage: Stage, full: list[int]) -> None:
    tables = {number: stage.tables.get(str(number)) for number in full}
    counts = {number: stage.counts.get(str(number), 0) for number in full}
    writer.replace_tables(tables, counts, rebase.sequence())


def _carry_over(
    writer: Writer,
    rebase: Rebase,
    dirty: list[tuple[Ref, EntityRow]],
    old_tables: dict[int, int],
    cursor: int,
    keep_device: bool,
    unsettled: Set[Ref],
) -> None:
    """Put entities with pending changes into the new tables with their old bases, then let the
    rebase see what the server has for them (R28)."""
    incoming, doubtful = [], []
    for ref, row in dirty:
        staged = writer.entity(ref)
        had_base = bool(row.flags & HAS_BASE)
        if staged is not None:
            remote = BaseRow(staged.version, staged.device_id, staged.timestamp, staged.payload)
        else:
            remote = BaseRow(cursor, bytes(16), 0, None)
        writer.carry_over(ref, row, old_tables[ref[0]], staged)
        if staged is None and not had_base and ref in unsettled:
            doubtful.append((ref, remote))
            continue
        if staged is None and not had_base:
            # Never on the server, and still not: no conflict, but now known up to the cursor.
            row.version = cursor
            writer.put_entity(ref, row, row)
            continue
        if keep_device and (staged is None or staged.version < row.version):
            # R29: the server lost what this was built on, and the person chose this device.
            rebase.replace_base(ref, remote)
            continue
        incoming.append((ref, remote))
    for ref, remote in incoming:
        rebase.take_dirty(ref, remote)
    for ref, remote in doubtful:
        rebase.take_unsettled(ref, remote)


def _unsettled(writer: Writer, stage: Stage, state: ReplicaState) -> set[Ref]:
    """Entities of transactions that the server may have accepted and forgotten: those that were in
    flight before its floor moved past where the device was. Where it has not, it would have known
    them when they came again (R14). Where a person keeps the device's side, that is decided."""
    ranges = [each for each in state.unsettled if each[2] < stage.floor]
    if not ranges or state.keep_device:
        return set()
    return {
        (op.collection, op.entity_id)
        for transaction in read_pending(writer.snapshot)
        if any(first <= transaction.sequence <= last for first, last, _ in ranges)
        for op in transaction.operations
    }


def _apply_deltas(writer: Writer, rebase: Rebase, stage: Stage) -> None:
    dirty: list[Dirty] = []
    for number, table in sorted(stage.deltas.items()):
        collection = int(number)
        prefix = writer.catalogue.by_number[collection].prefix
        for page in writer.table_pages(table, _PAGE_ROWS):
            olds = writer.entities([prefix + entity_id for entity_id, _ in page])
            changes = [
                (
                    (collection, entity_id),
                    BaseRow(row.version, row.device_id, row.timestamp, row.payload),
                )
                for entity_id, row in page
            ]
            dirty += rebase.take_all(changes, olds)
        writer.set_catalogue(writer.catalogue.discarding(table, collection))
    rebase.take_all_dirty(dirty)

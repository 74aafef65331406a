"""The pages of one pull, kept out of sight until the last of them is in (R20, R28).

They go into tables of their own. ``publish`` makes them what readers see.
"""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace

from entidb.db.catalogue import CollectionInfo
from entidb.db.replica import Stage
from entidb.db.staged import rows_of_columns
from entidb.db.writer import Writer
from entidb.errors import ProtocolError
from entidb.protocol import ColumnRows, PullRequest, PullResponse
from entidb.sync.apply.page import table_for, targets_of


def comes_once(stage: Stage, response: PullResponse, rows: ColumnRows) -> bool:
    """Whether everything on this page belongs to the full part of the stage, and is below the
    head at its first page: then no page before or after it has any of these entities."""
    newest = rows.versions[-1] if rows.versions else 0
    names = stage.full
    return (
        not stage.full_done
        and newest <= stage.first_head
        and (names is None or all(name in names for name in response.collections))
    )


def stage_rows(writer: Writer, stage: Stage, response: PullResponse, rows: ColumnRows) -> Stage:
    """As ``stage_operations``, for a page in columns whose entities come once: its tombstones
    remove nothing, and its rows are those of the server but for the number of its commit."""
    tables, counts = dict(stage.tables), dict(stage.counts)
    targets = targets_of(writer, response)
    staged = [
        None if info is None else info.standing_in(table_for(writer, tables, info.number))
        for info in targets
    ]
    some_gone = None in rows.payloads
    made = rows_of_columns(
        rows.versions, rows.devices, rows.timestamps, rows.payloads, gone=some_gone
    )
    once = writer.stage_entities(staged, rows.indexes, rows.ids, made, rows.payloads)
    sent, gone, operations = Counter(rows.indexes), Counter[int](), 0
    if some_gone:
        pairs = zip(rows.indexes, rows.payloads, strict=True)
        gone.update(index for index, payload in pairs if payload is None)
    if not once or (gone and len(set(zip(rows.indexes, rows.ids, strict=True))) != len(rows.ids)):
        raise ProtocolError("the server sent an entity twice in one page; nothing was kept")
    for index, info in enumerate(targets):
        if info is not None:
            number = str(info.number)
            counts[number] = counts.get(number, 0) + sent[index] - gone[index]
            operations += sent[index]
    return replace(
        stage,
        full_cursor=response.cursor,
        full_done=not response.has_more,
        tables=tables,
        counts=counts,
        operations=stage.operations + operations,
        time_ms=response.time,
    )


def stage_operations(
    writer: Writer, stage: Stage, request: PullRequest, response: PullResponse
) -> Stage:
    """Write a page into the stage's own tables. In collections that come from nothing a tombstone
    only removes; in the others it must stay, to be applied."""
    full_phase = not stage.full_done
    # After the full part of some collections the changes of the others follow; a change of a
    # full one then goes straight into its new table.
    tables, deltas, counts = dict(stage.tables), dict(stage.deltas), dict(stage.counts)
    places: list[tuple[CollectionInfo, bool] | None] = []
    for info in targets_of(writer, response):
        is_full = info is not None and (stage.full is None or info.name in stage.full)
        if info is None or (full_phase and not is_full):
            # A collection that was not asked for now: its changes come after the full part.
            places.append(None)
            continue
        table = table_for(writer, tables if is_full else deltas, info.number)
        places.append((info.standing_in(table), is_full))
    operations = 0
    seen: set[tuple[int, bytes]] = set()
    for commit in response.commits:
        written = commit.version, commit.device_id, commit.timestamp
        unseen = commit.version <= stage.first_head and full_phase
        for op in commit.operations:
            place = places[op.collection]
            if place is None:
                continue
            info, is_full = place
            operations += is_full
            if (ref := (info.number, op.entity_id)) in seen:
                raise ProtocolError("the server sent an entity twice in one page; nothing was kept")
            seen.add(ref)
            if not is_full:
                writer.stage_change(info, op.entity_id, op.payload, *written)
            elif by := writer.stage_entity(info, op.entity_id, op.payload, *written, unseen=unseen):
                number = str(info.number)
                counts[number] = counts.get(number, 0) + by
    full_cursor, full_done, delta_cursor = stage.full_cursor, stage.full_done, stage.delta_cursor
    if full_phase:
        full_cursor, full_done = response.cursor, not response.has_more
    else:
        delta_cursor = response.cursor
    return replace(
        stage,
        full_cursor=full_cursor,
        full_done=full_done,
        delta_cursor=delta_cursor,
        tables=tables,
        deltas=deltas,
        counts=counts,
        operations=stage.operations + operations,
        time_ms=response.time,
    )

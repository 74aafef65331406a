"""The device's hybrid clock follows the server's, as answers name it (R27)."""

from __future__ import annotations

from entidb.db.outbox import read_pending
from entidb.db.writer import Writer
from entidb.protocol import ColumnRows, PullResponse
from entidb.types import timestamp_from_ms

#: Beyond this (the year 6429) a hybrid logical clock comes near the end of its 64 bits.
TIME_MS_MAX = 2**47
#: As a timestamp: by so much (a second) a clock may be ahead of the server's before pending
#: transactions are looked through for it. Clocks that are kept in step differ by less, and the
#: server makes up for that (R27).
CLOCK_SLACK = timestamp_from_ms(1000)


def hear_clock(writer: Writer, response: PullResponse, rows: ColumnRows | None = None) -> None:
    """The clock is a hybrid one (R27): what is written after this is later than what was seen,
    however slow the device's own clock is, but never beyond what the server says the time is."""
    stamps = rows.timestamps if rows is not None else [c.timestamp for c in response.commits]
    hear_stamp(writer, max(stamps, default=0), response.time)


def hear_stamp(writer: Writer, newest: int, server_ms: int) -> None:
    """As ``hear_clock``, for the newest timestamp of what was seen at that time of the server."""
    latest = latest_timestamp(server_ms)
    writer.head.timestamp = max(writer.head.timestamp, min(newest, latest))
    lower_idle_clock(writer, latest)


def latest_timestamp(server_ms: int) -> int:
    """The latest timestamp that the server lets pass at this time of its clock."""
    return timestamp_from_ms(min(server_ms, TIME_MS_MAX)) | 0xFFFF


def lower_idle_clock(writer: Writer, latest: int) -> None:
    """A clock that was ahead comes back (R27): else all that is written until its time has really
    come would count as later than what others write. Where something is pending this waits for the
    next push (``lower_clock``), because the clock stays after what this device wrote."""
    head = writer.head
    if head.timestamp > latest and not head.ready and not head.held:
        head.timestamp = latest


def lower_clock(writer: Writer, latest: int) -> None:
    """As ``lower_idle_clock``, with what is pending: it gets the time that the server would make
    of it now. What is in flight has to stay as it was sent (R5)."""
    if writer.inflight is not None:
        return
    for transaction in read_pending(writer.snapshot):
        if transaction.timestamp <= latest:
            continue
        transaction.timestamp = latest
        writer.put_pending(transaction)
        for op in transaction.operations:
            ref = (op.collection, op.entity_id)
            row = writer.entity(ref)
            if row is not None and row.pending == transaction.sequence:
                row.timestamp = latest
                writer.put_entity(ref, row, row)
    writer.head.timestamp = min(writer.head.timestamp, latest)

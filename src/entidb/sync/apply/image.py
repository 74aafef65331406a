"""An image of the server's database, staged from segments (R35).

A segment is proved before anything of it is stored: that it is the file with that hash, what its
format promises, and that it holds what the manifest said. Its rows are sorted and come once, so
that they are appended to the stage's tables in large commits. Each of those says how far it came;
the next begins there, whoever makes it.
"""

from __future__ import annotations

import hashlib
from typing import Final

from msgspec.structs import replace

from entidb import cbor
from entidb.collector import paused
from entidb.db import Database, machine
from entidb.db.replica import ImageSegment, Stage, StagedImage
from entidb.db.staged import bytes_of_values, rows_of_segment
from entidb.db.writer import Writer
from entidb.errors import ProtocolError, SyncCodecError, SyncStateError
from entidb.protocol import Manifest, UnpackedSegment, unpack_segment
from entidb.sync.apply.clock import hear_stamp
from entidb.sync.apply.page import check_payload, table_for, targets_for
from entidb.sync.apply.position import check_adopted, is_missing_of, scope_changed, see_image
from entidb.sync.apply.seam import OpenSegment
from entidb.sync.room import PROVE_ALL, ROW_BYTES, check_room
from entidb.sync.segment_files import SegmentFiles

#: Rows of one commit: few enough for a small device's memory.
CHUNK_ROWS: Final = 16_384
#: Of a sample, every so many values are proved.
SAMPLE_STEP: Final = 64


class StagesImages:
    """The part of an applier that is about images. Of the values that come it proves a sample, or
    with ``prove="all"`` each."""

    def __init__(self, database: Database, *, staged_bytes_max: int, prove: str) -> None:
        self.database = database
        self._staged_bytes_max = staged_bytes_max
        self._prove_step = 1 if prove == PROVE_ALL else SAMPLE_STEP
        self._files: SegmentFiles | None = None
        self._chunk_rows = CHUNK_ROWS

    def segment_files(self) -> SegmentFiles:
        if self._files is None:
            self._files = SegmentFiles(self.database.storage.info().path)
        return self._files

    def begin_image(
        self, manifest: Manifest, full: list[str] | None, names: list[str] | None
    ) -> Stage:
        segments = [
            ImageSegment(
                segment.sha256,
                manifest.collections[segment.collection],
                segment.bytes,
                segment.rows,
                segment.first,
                segment.last,
            )
            for segment in manifest.segments
        ]
        with self.database.write() as writer:
            state = writer.sync_state
            if state.history != manifest.history or writer.stage is not None:
                raise _moved()
            _check_may_stage(writer)
            if not is_missing_of(writer, state, names):
                raise scope_changed()
            # Of a collection that is local here nothing is taken in, and nothing is counted.
            known = writer.catalogue.by_name
            local = {name for name in manifest.collections if name in known and known[name].local}
            entities = sum(each.rows for each in segments if each.collection not in local)
            stage = Stage(
                history=b"",
                cursor=state.cursor,
                floor=manifest.floor,
                first_head=manifest.head,
                full=full,
                delta_cursor=state.cursor,
                time_ms=manifest.time,
                image=StagedImage(manifest.history, manifest.head, entities, segments),
                image_head=manifest.head,
            )
            writer.set_stage(machine.KEEP(None, stage))
            see_image(writer, state, manifest)
            return stage

    def open_segment(self, segment: ImageSegment, head: int, data: bytes) -> OpenSegment:
        if not _is_that(segment, data):
            raise SyncCodecError(
                f"segment {segment.sha256.hex()} is not the file of that name; it is not used"
            )
        unpacked = unpack_segment(data)
        header = unpacked.header
        says = (header.collection, header.rows, header.first, header.last)
        if says != (segment.collection, segment.rows, segment.first, segment.last):
            raise ProtocolError(
                f"segment {segment.sha256.hex()} holds something else than its manifest says"
            )
        if unpacked.newest_version > head:
            raise ProtocolError(
                f"segment {segment.sha256.hex()} holds version {unpacked.newest_version}, and the "
                f"image ends at {head}"
            )
        with paused():
            step = self._prove_step
            _prove(unpacked, self.database.device_id[-1] % step % header.rows, step)
            rows = rows_of_segment(unpacked.heads(), unpacked.payloads())
            return OpenSegment(segment, unpacked.ids, rows, unpacked.newest_timestamp)

    def stage_segment(self, opened: OpenSegment) -> Stage:
        with paused(), self.database.write() as writer:
            before = writer.stage
            image = None if before is None else before.image
            if before is None or image is None or not before.fits(writer.sync_state):
                raise _moved()
            if image.left[0] != opened.segment:
                raise _moved()
            _check_may_stage(writer)
            begin, end = image.done, min(image.done + self._chunk_rows, len(opened.ids))
            hear_stamp(writer, opened.newest_timestamp, before.time_ms)
            stage = _stage_part(writer, before, opened, begin, end)
            check_room(self.database.storage, stage.size, self._staged_bytes_max)
            used_up = end == len(opened.ids)
            left = image.left[1:] if used_up else image.left
            rest = replace(image, left=left, done=0 if used_up else end, failures=0)
            if rest.left:
                stage = replace(stage, image=rest)
            else:
                # A pull like any other from here on, which has reached the image's commit.
                stage = replace(stage, image=None, history=image.history, full_cursor=image.head)
            writer.set_stage(machine.KEEP(before, stage))
        opened.used_up = used_up
        return stage

    def note_failure(self) -> int:
        with self.database.write() as writer:
            stage = writer.stage
            if stage is None or stage.image is None:
                raise _moved()
            image = replace(stage.image, failures=stage.image.failures + 1)
            writer.set_stage(machine.KEEP(stage, replace(stage, image=image)))
            return image.failures


def _is_that(segment: ImageSegment, data: bytes) -> bool:
    return len(data) == segment.size and hashlib.sha256(data).digest() == segment.sha256


def _prove(unpacked: UnpackedSegment, first: int, step: int) -> None:
    """Prove every so many values."""
    some = unpacked.sample(first, step)
    if not cbor.all_pass(some):
        for at, payload in zip(range(first, unpacked.header.rows, step), some, strict=True):
            check_payload(unpacked.version(at), unpacked.ids[at], payload)


def _stage_part(writer: Writer, stage: Stage, opened: OpenSegment, begin: int, end: int) -> Stage:
    (info,) = targets_for(writer, [opened.segment.collection])
    if info is None:
        return stage  # local here: it is left out, as of a page (R31)
    tables, counts, number = dict(stage.tables), dict(stage.counts), str(info.number)
    staged = info.standing_in(table_for(writer, tables, info.number))
    rows, count = opened.rows[begin:end], end - begin
    once = writer.stage_entities([staged], bytes(count), opened.ids[begin:end], rows)
    assert once, "the ids of a segment ascend"
    counts[number] = counts.get(number, 0) + count
    size = stage.size + bytes_of_values(rows) + ROW_BYTES * count
    operations = stage.operations + count
    return replace(stage, tables=tables, counts=counts, operations=operations, size=size)


def _check_may_stage(writer: Writer) -> None:
    if writer.inflight is not None:
        raise SyncStateError("a push is in flight; it must be settled before a pull (R5)")
    check_adopted(writer)


def _moved() -> SyncStateError:
    return SyncStateError("what is being fetched is for another state of this device; sync again")


__all__ = ["CHUNK_ROWS", "SAMPLE_STEP", "StagesImages"]

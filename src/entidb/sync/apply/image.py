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
from entidb.db.writer import Writer
from entidb.errors import ProtocolError, SyncCodecError, SyncStateError
from entidb.protocol import ColumnRows, Manifest, decode_segment, segment_rows
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

    def open_segment(self, image: StagedImage, data: bytes) -> OpenSegment:
        segment = image.left[0]
        if not _is_that(segment, data):
            raise SyncCodecError(
                f"segment {segment.sha256.hex()} is not the file of that name; it is not used"
            )
        header, columns = decode_segment(data)
        says = (header.collection, header.rows, header.first, header.last)
        if says != (segment.collection, segment.rows, segment.first, segment.last):
            raise ProtocolError(
                f"segment {segment.sha256.hex()} holds something else than its manifest says"
            )
        with paused():
            rows = segment_rows(columns)
            if max(rows.versions) > image.head:
                raise ProtocolError(
                    f"segment {segment.sha256.hex()} holds version {max(rows.versions)}, and the "
                    f"image ends at {image.head}"
                )
            step = self._prove_step
            begin = self.database.device_id[-1] % step
            self._prove(rows, range(begin % len(rows.ids), len(rows.ids), step))
        return OpenSegment(segment, rows)

    def _prove(self, rows: ColumnRows, places: range) -> None:
        some = rows.payloads[places.start :: places.step]
        if not cbor.all_pass([payload for payload in some if payload is not None]):
            for at in places:
                check_payload(rows.versions[at], rows.ids[at], rows.payloads[at])

    def stage_segment(self, opened: OpenSegment) -> Stage:
        with paused(), self.database.write() as writer:
            before = writer.stage
            image = None if before is None else before.image
            if before is None or image is None or not before.fits(writer.sync_state):
                raise _moved()
            if image.left[0] != opened.segment:
                raise _moved()
            _check_may_stage(writer)
            rows = opened.rows
            end = min(image.done + self._chunk_rows, len(rows.ids))
            part = _part(rows, image.done, end)
            hear_stamp(writer, max(part.timestamps), before.time_ms)
            stage = _stage_part(writer, before, opened.segment.collection, part)
            check_room(self.database.storage, stage.size, self._staged_bytes_max)
            used_up = end == len(rows.ids)
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


def _part(rows: ColumnRows, begin: int, end: int) -> ColumnRows:
    return ColumnRows(
        rows.ids[begin:end],
        rows.versions[begin:end],
        rows.devices[begin:end],
        rows.timestamps[begin:end],
        rows.payloads[begin:end],
        rows.indexes[begin:end],
    )


def _stage_part(writer: Writer, stage: Stage, collection: str, rows: ColumnRows) -> Stage:
    (info,) = targets_for(writer, [collection])
    if info is None:
        return stage  # local here: it is left out, as of a page (R31)
    tables, counts, number = dict(stage.tables), dict(stage.counts), str(info.number)
    staged = info.standing_in(table_for(writer, tables, info.number))
    once = writer.stage_entities(
        [staged],
        rows.indexes,
        rows.ids,
        rows.versions,
        rows.devices,
        rows.timestamps,
        rows.payloads,
    )
    assert once, "the ids of a segment ascend"
    counts[number] = counts.get(number, 0) + len(rows.ids)
    operations = stage.operations + len(rows.ids)
    size = stage.size + sum(map(len, filter(None, rows.payloads))) + ROW_BYTES * len(rows.ids)
    return replace(stage, tables=tables, counts=counts, operations=operations, size=size)


def _check_may_stage(writer: Writer) -> None:
    if writer.inflight is not None:
        raise SyncStateError("a push is in flight; it must be settled before a pull (R5)")
    check_adopted(writer)


def _moved() -> SyncStateError:
    return SyncStateError("what is being fetched is for another state of this device; sync again")


__all__ = ["CHUNK_ROWS", "SAMPLE_STEP", "StagesImages"]

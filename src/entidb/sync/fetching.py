"""The half of a first sync that comes in segments: an image of the server's database, in files that
are fetched several at a time and staged one after the other (R35).

What the image brings is a stage like any other when all of it is there, and ``pulling`` goes on
from the image's commit. Where anything does not fit, nothing of it counts, and ``pulling`` begins
with nothing as ever: that is what an answer of False means here, and it never leads back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from entidb import packing
from entidb.db.replica import ImageSegment, ReplicaState, Stage, StagedImage
from entidb.errors import (
    AuthenticationError,
    HistoryChangedError,
    PermissionDeniedError,
    ProtocolError,
    ServerBusyError,
    SyncCancelledError,
    SyncError,
    TransportError,
    UpgradeRequiredError,
)
from entidb.protocol import Manifest, PullRequest, SnapshotRequest, SyncResponse
from entidb.sync.apply.seam import OpenSegment
from entidb.sync.exchange import Exchange, SendAhead, Step, history_of
from entidb.sync.grants import check_granted
from entidb.sync.room import ROW_BYTES
from entidb.sync.segment_files import Fetch, SegmentFiles
from entidb.sync.state import SyncProgress, SyncState

FEATURE: Final = "segments"
#: Segments that are known ahead to what fetches them, the one that is waited for included.
AHEAD: Final = 6
#: A request asks for one part in so many of an image, of which three may be on their way at once: a
#: process that is killed loses what its system had received for it, a tenth of the bytes at most.
PARTS: Final = 32
#: But not for less: a request costs about as much as carrying these.
PART_BYTES_MIN: Final = 64 * 1024
#: After so many failures in a row, with nothing that came, the device pulls instead.
FAILURES_MAX: Final = 3
#: What is about who asks or about the way, and would meet a pull just as well.
_PASSING: Final = (
    SyncCancelledError,
    AuthenticationError,
    HistoryChangedError,
    UpgradeRequiredError,
    ServerBusyError,
)


def may_have_image(exchange: Exchange) -> bool:
    """Whether the server is asked for an image at all."""
    connection = exchange.connection
    return exchange.config.segments and connection.fetches and FEATURE in connection.features


@dataclass
class Fetching:
    """``run`` is what a pull from nothing calls first; ``pull_from`` makes the request that comes
    after an image of so many commits."""

    _exchange: Exchange
    _pull_from: Callable[[int], PullRequest]

    def run(
        self,
        state: ReplicaState,
        stage: Stage | None,
        full: list[str] | None,
        names: list[str] | None,
    ) -> Generator[Step, SyncResponse | None, bool]:
        """Stage an image of the collections ``names`` (None: all), whole; ``full`` is as a stage
        has it. False if there is none, or it does not fit: then nothing is staged."""
        exchange = self._exchange
        if not may_have_image(exchange) or (stage is None and exchange.image_asked):
            return self._give_up(stage)
        exchange.image_asked = True
        if stage is None:
            manifest = yield from self._ask(state, names)
            if manifest is None or not self._usable(manifest, names):
                return self._give_up(None)
            exchange.check()
            stage = exchange.applier.begin_image(manifest, full, names)
        try:
            yield from self._fetch_all(stage, exchange.applier.segment_files())
        except (_DoesNotFitError, OSError):
            # Of the files too: those of a pull are none.
            return self._give_up(stage)
        return True

    def _usable(self, manifest: Manifest, names: list[str] | None) -> bool:
        """Whether there is an image, of what was asked for, in segments that can be taken in."""
        size_max = self._exchange.config.response_bytes_max
        return (
            bool(manifest.segments)
            and (names is None or set(manifest.collections) <= set(names))
            and all(segment.bytes <= size_max for segment in manifest.segments)
        )

    def _give_up(self, stage: Stage | None) -> bool:
        if stage is not None:
            self._exchange.applier.restart_stage(full=False)
            with contextlib.suppress(OSError):  # what lies there is a nuisance, and no more
                self._exchange.applier.segment_files().keep_only([])
        return False

    def _ask(
        self, state: ReplicaState, names: list[str] | None
    ) -> Generator[Step, SyncResponse | None, Manifest | None]:
        exchange = self._exchange
        connection = exchange.connection
        if connection.image_failures >= FAILURES_MAX:
            return None
        request = SnapshotRequest(
            db_id=exchange.config.db_id,
            device_id=exchange.applier.device_id,
            history=history_of(state),
            collections=names,
            packings=list(packing.ENCODINGS),
            schema=connection.schema,
            seen=state.seen,
        )
        try:
            manifest = yield from exchange.ask(request, Manifest)
        except TransportError:
            # Something on the way may stop this request and no other.
            connection.image_failures += 1
            raise
        except SyncError as error:
            if isinstance(error, _PASSING) and not isinstance(error, PermissionDeniedError):
                if isinstance(error, AuthenticationError | ServerBusyError):
                    connection.image_failures += 1  # so may these be, where the handshake worked
                raise
            return None
        connection.image_failures = 0
        exchange.server_ms = manifest.time
        check_granted(manifest.granted, state)
        return manifest if manifest.history == state.history else None

    def _fetch_all(
        self, stage: Stage, files: SegmentFiles
    ) -> Generator[Step, SyncResponse | None, None]:
        exchange, applier = self._exchange, self._exchange.applier
        image = stage.image
        assert image is not None
        entities, bytes_max = image.entities, _part_bytes(image)
        files.keep_only(image.left)
        head = image.head
        ahead = ProvedAhead(
            lambda segment: applier.open_segment(segment, head, files.read(segment))
        )
        while image is not None:
            opened = yield from self._opened(image, files, bytes_max, ahead)
            before = stage
            while not opened.used_up:
                exchange.check()
                stage = applier.stage_segment(opened)
                size = stage.size - ROW_BYTES * stage.operations
                exchange.progress(SyncProgress(SyncState.PULLING, stage.operations, size, entities))
            came = stage.operations - before.operations
            exchange.result.bytes_pulled += stage.size - before.size - ROW_BYTES * came
            image = stage.image
            files.drop(opened.segment)
        files.keep_only([])

    def _opened(
        self, image: StagedImage, files: SegmentFiles, bytes_max: int, ahead: ProvedAhead
    ) -> Generator[Step, SyncResponse | None, OpenSegment]:
        """The first segment that is left, proved. One that is not what it should be is fetched once
        more: it may have been damaged on this disk, or on its way."""
        exchange, first = self._exchange, image.left[0]
        for again in (False, True):
            yield from self._fetch(image.left, files, bytes_max, ahead)
            exchange.check()
            if len(image.left) == 1 and not again:
                # All is here, and the line would have nothing to carry while it is staged.
                yield SendAhead(self._pull_from(image.head))
            try:
                opened = ahead.take(first)
                if opened is None:
                    opened = exchange.applier.open_segment(first, image.head, files.read(first))
                return opened
            except ProtocolError:
                files.drop(first)
        raise _DoesNotFitError

    def _fetch(
        self, left: list[ImageSegment], files: SegmentFiles, bytes_max: int, ahead: ProvedAhead
    ) -> Generator[Step, SyncResponse | None, None]:
        exchange = self._exchange
        exchange.check()
        before = files.received
        try:
            yield Fetch(exchange.config.db_id, left[:AHEAD], files, bytes_max, ahead.open)
        except SyncCancelledError:
            raise
        except SyncError as error:
            may_pass = error.retryable or isinstance(error, AuthenticationError)
            if not may_pass or isinstance(error, PermissionDeniedError):
                raise _DoesNotFitError from error
            if files.received == before and exchange.applier.note_failure() >= FAILURES_MAX:
                raise _DoesNotFitError from error
            raise


def _part_bytes(image: StagedImage) -> int:
    """Bytes of one request. What is staged is known by its entities alone."""
    left = sum(segment.size for segment in image.left)
    rows = sum(segment.rows for segment in image.left)
    return max(PART_BYTES_MIN, left * image.entities // max(1, rows) // PARTS)


class ProvedAhead:
    """The segment whose turn is next, proved by another thread while the one before it is stored;
    no more than one, for the memory that it takes."""

    def __init__(self, open_segment: Callable[[ImageSegment], OpenSegment]) -> None:
        self._open_segment = open_segment
        self._lock = threading.Lock()
        self._taken: set[bytes] = set()
        self._begun: dict[bytes, Future[OpenSegment | None]] = {}

    def open(self, segment: ImageSegment) -> None:
        """On any thread; ``segment`` is whole."""
        opening: Future[OpenSegment | None] = Future()
        with self._lock:
            # One entity alone may be as large as a message.
            if segment.sha256 in self._taken or segment.rows == 1:
                return
            if self._begun.setdefault(segment.sha256, opening) is not opening:
                return
        try:
            opening.set_result(self._open_segment(segment))
        except (ProtocolError, OSError, MemoryError):
            opening.set_result(None)  # who asks for it finds the same once more
        except BaseException as error:
            opening.set_exception(error)

    def take(self, segment: ImageSegment) -> OpenSegment | None:
        """It, if it was begun; None if who asks has to open it, or to find what is wrong."""
        with self._lock:
            self._taken.add(segment.sha256)
            opening = self._begun.pop(segment.sha256, None)
        opened = None if opening is None else opening.result()
        # A manifest may name a segment twice, with something else in it.
        return opened if opened is not None and opened.segment == segment else None


class _DoesNotFitError(Exception):
    """This image cannot be had, or not so; the pull of pages can."""


__all__ = ["AHEAD", "FAILURES_MAX", "FEATURE", "ProvedAhead", "Fetching", "may_have_image"]

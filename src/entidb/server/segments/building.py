"""One image, from one snapshot; and whether one is due."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from entidb.db import Database
from entidb.db.identity import history_in
from entidb.db.images import NO_IMAGES, PINNED_MS_MAX, ImageRow, ImageRows, is_pinned, read_images
from entidb.db.maintenance import read_floor
from entidb.db.records import count_key, unpack_u64
from entidb.db.writer import Writer, feed_bounds
from entidb.errors import ProtocolError
from entidb.protocol import SegmentInfo
from entidb.protocol.limits import LIMITS
from entidb.protocol.messages import SEGMENTS_MAX
from entidb.server.segments.cutting import SIZES, Sizes, cut
from entidb.server.segments.files import KeptFiles, KeptImage
from entidb.server.segments.rows import change_images

#: Kept at once, of each packing: devices may be on their way with the one before.
IMAGES_MAX: Final = 2
#: A new one is due when more than one part in so many has changed.
CHANGED_PART: Final = 10
#: One that nobody asks for goes after so many milliseconds.
UNUSED_MS: Final = 7 * 24 * 3_600_000
#: How long the images of another directory count after somebody asked for one, or after they were
#: made: as long as one that is asked for is pinned.
ELSEWHERE_MS: Final = PINNED_MS_MAX
#: Places of the feed that are read at a time.
_READ_KEYS: Final = 5_000
#: Seconds of work before a pause as long: half of a processor at most.
_WORK_S: Final = 0.005
_PAUSE_S_MAX: Final = 0.1
#: Whoever has asked for an image that is not there has everything in that time, if it is not much.
_ASKED_S: Final = 1.0


class StoppedError(Exception):
    """An image was not made to its end: its database is wanted closed, or none is to be made of
    it any more."""


def counts(view: Writer, row: ImageRow, image: KeptImage | None) -> bool:
    """Whether the image that ``row`` names is one of the database as ``view`` shows it, and a
    device can go on from it."""
    return (
        image is not None
        and image.history == history_in(view)
        and image.head == row.head <= view.head.sequence
        and read_floor(view) <= row.head
    )


def entities_in(view: Writer) -> int:
    """How many entities devices may have of the database."""
    count = 0
    for info in view.catalogue.by_name.values():
        raw = view.get(count_key(info.number)) if info.synced else None
        count += 0 if raw is None else unpack_u64(raw)
    return count


def may_have_one(view: Writer, least: int) -> bool:
    """Whether there may be images of the database, or something to do about those of before."""
    return entities_in(view) >= least or read_images(view) != NO_IMAGES


def is_elsewhere(images: ImageRows, here: bytes, now_ms: int) -> bool:
    """Whether the files of the images are in another directory than ``here``, and somebody makes
    use of them. Who has not these files leaves such images alone: two that take turns in removing
    and making them would never end."""
    if not images.rows or not here or images.place in (b"", here):
        return False
    lasts = [max(row.made_ms + ELSEWHERE_MS, row.until_ms) for row in images.rows]
    # What is later than it can be was said by a clock that was wrong.
    return any(now_ms < last <= now_ms + 2 * ELSEWHERE_MS for last in lasts)


def alive_images(view: Writer, files: KeptFiles) -> dict[str, list[ImageRow]]:
    """Those that count, oldest first, by what they are packed with."""
    alive: dict[str, list[ImageRow]] = {}
    for row in read_images(view).rows:
        image = files.image(row.id)
        if image is not None and counts(view, row, image):
            alive.setdefault(image.packing, []).append(row)
    return alive


def is_due(
    view: Writer, files: KeptFiles, least: int, packing: str, pause: Callable[[], None]
) -> bool:
    """Whether a new image of this packing is to be made, if there is to be one at all. ``pause`` is
    called now and then."""
    count = entities_in(view)
    if count < max(1, least) or read_images(view).unused:
        return False
    alive = alive_images(view, files).get(packing, [])
    if not alive:
        return True
    newest = alive[-1]
    if len(alive) >= IMAGES_MAX or not newest.until_ms:
        return False  # Nobody has asked for the newest yet.
    left = max(count, newest.entities) // CHANGED_PART + 1
    start, stop = feed_bounds(newest.head)
    while left > 0:
        keys = view.snapshot.scan_keys(start, stop, limit=min(left, _READ_KEYS))
        left -= len(keys)
        if len(keys) < _READ_KEYS:
            break
        start = keys[-1] + b"\0"
        pause()
    return left <= 0


def kept_rows(view: Writer, files: KeptFiles, now_ms: int, here: bytes = b"") -> ImageRows:
    """The images that are to be kept, of each packing: the newest that counts, if somebody has
    asked for one within a week; and those that devices may be on their way with. ``here`` is the
    directory."""
    found = read_images(view)
    if is_elsewhere(found, here, now_ms):
        return found
    kept: set[bytes] = set()
    used, alive = False, alive_images(view, files)
    for rows in alive.values():
        newest = rows[-1]
        kept |= {row.id for row in rows[:-1] if is_pinned(row, now_ms)}
        if now_ms - max(newest.made_ms, newest.until_ms) <= UNUSED_MS:
            kept.add(newest.id)
            used = True
    rest = [row for row in found.rows if row.id in kept]
    return replace(found, rows=rest, unused=not used if alive else found.unused)


def take(
    view: Writer,
    files: KeptFiles,
    identity: bytes,
    packing: str,
    check: Callable[[], None],
    pause: Callable[[], None],
    sizes: Sizes = SIZES,
) -> KeptImage:
    """An image of what ``view`` shows, with its segments in ``files``. ``check`` is called before
    each of them is put there, and ``pause`` every few hundred rows; what they raise ends it. Raises
    ``ProtocolError`` (too_large) for what no manifest or device would take."""
    infos = sorted(
        (info for info in view.catalogue.by_name.values() if info.synced),
        key=lambda info: info.name,
    )
    segments: list[SegmentInfo] = []
    for index, info in enumerate(infos):
        for made in cut(view, info, packing, pause, sizes):
            check()
            size = len(made.data)
            if len(segments) >= SEGMENTS_MAX or size > LIMITS.message_bytes_max:
                raise ProtocolError(
                    f"collection {info.name!r} has too much for an image: devices pull it",
                    code="too_large",
                )
            files.put(made.sha256, made.data)
            segments.append(
                SegmentInfo(made.sha256, index, size, made.rows, made.first, made.last, packing)
            )
    return KeptImage(
        id=identity,
        history=history_in(view),
        head=view.head.sequence,
        collections=[info.name for info in infos],
        segments=segments,
    )


def build(
    database: Database,
    files: KeptFiles,
    identity: bytes,
    packing: str,
    check: Callable[[], None],
    pause: Callable[[], None],
    sizes: Sizes = SIZES,
    here: bytes = b"",
) -> KeptImage:
    """Make an image, as ``take``, and have it count, as one whose files are in ``here``. What is
    left among them when this raises belongs to no image."""
    with database.view() as view:
        image = take(view, files, identity, packing, check, pause, sizes)
    files.publish(image)

    def add(writer: Writer, found: ImageRows) -> ImageRows:
        if image.head < found.dropped or history_in(writer) != image.history:
            raise StoppedError
        row = ImageRow(identity, image.head, image.entities, writer.now_ms)
        return replace(found, rows=[*found.rows, row], unused=False, place=here)

    change_images(database, add)
    return image


class Pauses:
    """``__call__`` now and then pauses for as long as was worked since, so that those who are
    served have the processor. Ends with ``StoppedError`` when ``stop`` is set. Somebody who has
    asked for an image ``asked_s`` seconds ago gets everything without: he comes first, for a
    second."""

    def __init__(self, stop: threading.Event, asked_s: float = math.inf) -> None:
        self._stop = stop
        if asked_s < _ASKED_S and stop.wait(_ASKED_S - asked_s):
            raise StoppedError
        self._since = time.perf_counter()

    def __call__(self) -> None:
        worked = time.perf_counter() - self._since
        if worked < _WORK_S:
            return
        if self._stop.wait(min(worked, _PAUSE_S_MAX)):
            raise StoppedError
        self._since = time.perf_counter()


__all__ = [
    "CHANGED_PART",
    "IMAGES_MAX",
    "UNUSED_MS",
    "Pauses",
    "StoppedError",
    "alive_images",
    "build",
    "counts",
    "entities_in",
    "is_due",
    "is_elsewhere",
    "kept_rows",
    "take",
]

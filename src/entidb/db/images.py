"""Which images of a server's database there are, and until when each may be on its way (R35).

The record is in the database and goes with it: files that were put back know nothing of images that
were made of another future. An image counts only while it is named here. The files are for
``server.segments``.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from entidb.db.records import META_IMAGES
from entidb.db.replica import decode_record, encode_record
from entidb.db.writer import Writer
from entidb.types import SEQUENCE_MAX


class ImageRow(Struct, frozen=True, array_like=True):
    """An image as of ``head``, of so many ``entities``, made at ``made_ms``. Until ``until_ms`` a
    device may be on its way with it; 0: none ever was."""

    id: bytes
    head: int
    entities: int
    made_ms: int
    until_ms: int = 0


class ImageRows(Struct, frozen=True):
    """The images, newest last. One as of a commit before ``dropped`` must not come any more.
    ``unused``: the last one went because nobody had asked for it; none is made until somebody
    does. ``place`` is the directory that their files are in, where nodes may have several; empty:
    there is one."""

    rows: list[ImageRow] = []
    dropped: int = 0
    unused: bool = False
    place: bytes = b""


NO_IMAGES: Final = ImageRows()
#: For how long a device may be on its way with an image, at most.
PINNED_MS_MAX: Final = 2 * 3_600_000


def read_images(view: Writer) -> ImageRows:
    raw = view.get(META_IMAGES)
    return NO_IMAGES if raw is None else decode_record(ImageRows, raw)


def write_images(writer: Writer, images: ImageRows) -> None:
    writer.put(META_IMAGES, encode_record(images))


def pinned_to(writer: Writer) -> int:
    """The commit that the floor must not pass now."""
    raw = writer.get(META_IMAGES)
    if raw is None:
        return SEQUENCE_MAX
    alive = [row.head for row in read_images(writer).rows if is_pinned(row, writer.now_ms)]
    return min(alive, default=SEQUENCE_MAX)


def is_pinned(row: ImageRow, now_ms: int) -> bool:
    """Whether a device may be on its way with it. A time that lies further ahead than it can was
    said by a clock that was wrong: it would hold the floor until then."""
    return now_ms < row.until_ms <= now_ms + PINNED_MS_MAX


__all__ = [
    "NO_IMAGES",
    "PINNED_MS_MAX",
    "ImageRow",
    "ImageRows",
    "is_pinned",
    "pinned_to",
    "read_images",
    "write_images",
]

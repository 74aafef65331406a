"""The record of a database's images, changed in one commit (``db.images``)."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from entidb.db import Database
from entidb.db.images import ImageRows, read_images, write_images
from entidb.db.writer import Writer


def change_images(
    database: Database, change: Callable[[Writer, ImageRows], ImageRows | None]
) -> ImageRows:
    """One commit that makes of the images what ``change`` returns; None: nothing is changed.
    Returns what there is then."""
    with database.write() as writer:
        found = read_images(writer)
        changed = change(writer, found)
        if changed is None or changed == found:
            return found
        write_images(writer, changed)
        return changed


def drop_images(database: Database) -> None:
    """None counts any more, and the floor is free: also an image that is being made now will not
    count."""

    def change(writer: Writer, found: ImageRows) -> ImageRows:
        return replace(found, rows=[], dropped=writer.head.sequence)

    change_images(database, change)


__all__ = ["change_images", "drop_images"]

"""What databases hold of what they may, and the images that are kept of them, for an administrator
who looks. No database is opened for it unless it is asked for by name.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from msgspec import Struct

from entidb.db.images import ImageRow, is_pinned, read_images
from entidb.server.admin import access
from entidb.server.admin.callers import Caller
from entidb.server.admin.databases import look
from entidb.server.admin.databases import rows as database_rows
from entidb.server.admin.office import Office
from entidb.server.config import check_db_id
from entidb.server.registry import DEVICES_MAX
from entidb.server.segments.files import KeptImage

#: QuotaPage of what a database holds, and of how often it is asked.
HELD: Final = (
    "database_bytes_max",
    "database_entities_max",
    "database_devices_max",
    "subject_devices_max",
)
ASKED: Final = ("database_requests_per_s", "subject_requests_per_s")
#: Subjects of a database that are listed: those with the most devices.
_SUBJECTS: Final = 5


class QuotaRow(Struct, omit_defaults=True):
    """How much of what ``quota`` allows ``database`` has used; for ``subject_devices_max``, the
    devices of ``subject``. None: not known since it was open last."""

    database: str
    quota: str
    allowed: int
    used: int | None = None
    subject: str | None = None


class QuotaPage(Struct):
    """The quotas of this server by the names of their settings, 0 where there is none; and of
    ``total`` databases and subjects that have one a part, the fullest first."""

    settings: dict[str, float]
    total: int
    rows: list[QuotaRow]


class ImageShown(Struct, omit_defaults=True):
    """An image that a server keeps of a database (R35): as of which commit, how large its files
    are, and ``behind``, how many commits were made since. Where the database is open it is known
    whether the image ``counts``, so that a device may begin with it, and until when one may be on
    its way with it."""

    database: str
    id: str
    made_ms: int
    head: int
    entities: int
    segments: int
    bytes: int
    packing: str
    behind: int | None = None
    counts: bool | None = None
    until_ms: int | None = None


# ---------------------------------------------------------------- quotas


def quotas(
    office: Office,
    caller: Caller,
    *,
    database: str | None = None,
    offset: int = 0,
    limit: int = 100,
) -> QuotaPage:
    """Those of all databases that ``caller`` may see, or of one, which is opened for it."""
    config = office.server.config
    settings = {name: float(getattr(config, name)) for name in (*HELD, *ASKED)}
    found = [
        row
        for name in _names(office, caller, database)
        for row in _quotas_of(office, caller, name, settings)
    ]
    found.sort(key=lambda row: -1 if row.used is None else row.used / row.allowed, reverse=True)
    return QuotaPage(settings, len(found), found[offset : offset + limit])


def _names(office: Office, caller: Caller, database: str | None) -> list[str]:
    if database is None:
        for name in office.stores.opened():
            # What is known is half a minute old; to look means to read all of it, in PostgreSQL.
            about = office.registry.about(name)
            if caller.sees(name) and (about is None or about.used_bytes is None):
                look(office, name)
        return [each.name for each in database_rows(office, caller)]
    caller.check(database)
    check_db_id(database)
    look(office, database)
    return [database]


def _quotas_of(
    office: Office, caller: Caller, name: str, settings: dict[str, float]
) -> list[QuotaRow]:
    about = office.registry.about(name)
    used: dict[str, int | None] = {
        "database_bytes_max": None if about is None else about.used_bytes,
        "database_entities_max": None if about is None else about.synced,
    }
    own: list[tuple[str, int]] = []
    if settings["database_devices_max"] or settings["subject_devices_max"]:
        # Whom an administrator has revoked takes no room (``newcomers``).
        rows = access.devices(office, caller, name, DEVICES_MAX)
        subjects = Counter(row.device.subject for row in rows if not row.revoked)
        used["database_devices_max"] = subjects.total()
        own = subjects.most_common(_SUBJECTS)
    made = [
        QuotaRow(name, quota, int(settings[quota]), used[quota])
        for quota in HELD
        if settings[quota] and quota in used
    ]
    most = int(settings["subject_devices_max"])
    return made + [QuotaRow(name, HELD[-1], most, count, who) for who, count in own if most]


# ---------------------------------------------------------------- images


def images(office: Office, caller: Caller, *, database: str | None = None) -> list[ImageShown]:
    """Those of all databases that ``caller`` may see, or of one; newest first."""
    found = [
        image for name in _names(office, caller, database) for image in _images_of(office, name)
    ]
    return sorted(found, key=lambda image: (image.made_ms, image.head), reverse=True)


def _images_of(office: Office, name: str) -> list[ImageShown]:
    kept = office.server.images.files(name).listed()
    if not kept:
        return []
    with office.stores.looking(name) as store:
        if store is not None:
            with store.database.view() as view:
                rows = {row.id: row for row in read_images(view).rows}
                return [
                    _shown(
                        name,
                        image,
                        made_ms,
                        view.head.sequence,
                        row=rows.get(image.id),
                        is_counted=image.id in rows
                        and office.server.images.is_true(view, rows[image.id], image),
                        now_ms=office.clock.now_ms(),
                    )
                    for image, made_ms in kept
                ]
    about = office.registry.about(name)
    return [
        _shown(name, image, made_ms, None if about is None else about.head)
        for image, made_ms in kept
    ]


def _shown(
    name: str,
    image: KeptImage,
    made_ms: int,
    head: int | None,
    *,
    row: ImageRow | None = None,
    is_counted: bool | None = None,
    now_ms: int = 0,
) -> ImageShown:
    return ImageShown(
        database=name,
        id=image.id.hex(),
        made_ms=made_ms if row is None else row.made_ms,
        head=image.head,
        entities=image.entities,
        segments=len(image.segments),
        bytes=sum(segment.bytes for segment in image.segments),
        packing=image.packing,
        behind=None if head is None else max(0, head - image.head),
        counts=is_counted,
        until_ms=row.until_ms if row is not None and is_pinned(row, now_ms) else None,
    )


__all__ = ["ImageShown", "QuotaRow", "QuotaPage", "images", "quotas"]

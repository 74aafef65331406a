"""What a manifest says: of an image, or that there is none for a device (R35)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from msgspec.structs import replace

from entidb.protocol import Manifest, PullRequest, SnapshotRequest
from entidb.server.hooks import Grant
from entidb.server.segments.files import KeptImage
from entidb.storage.disk_errors import said_of
from entidb.types import Term

logger = logging.getLogger("entidb.server")


def no_manifest(history: bytes, head: int, floor: int, now_ms: int, grant: Grant) -> Manifest:
    """There is no image: pull."""
    return Manifest(
        history=history,
        head=head,
        floor=floor,
        collections=[],
        segments=[],
        entities=0,
        ends=now_ms,
        time=now_ms,
        granted=grant.named,
    )


def manifest_of(
    image: KeptImage, wanted: Collection[str], none: Manifest, life_ms: int, term: Term | None
) -> Manifest:
    """What ``image``, whose head is of ``term``, has of the collections that are wanted; ``none``
    if that is nothing."""
    names = [name for name in image.collections if name in wanted]
    place = {image.collections.index(name): at for at, name in enumerate(names)}
    segments = [
        replace(each, collection=place[each.collection])
        for each in image.segments
        if each.collection in place
    ]
    if not segments:
        return none
    return replace(
        none,
        head=image.head,
        collections=names,
        segments=segments,
        entities=sum([each.rows for each in segments]),
        ends=none.time + life_ms,
        term=term,
    )


def pull_of(request: SnapshotRequest, history: bytes) -> PullRequest:
    """The pull whose conditions are those of ``request``."""
    return PullRequest(
        db_id=request.db_id,
        device_id=request.device_id,
        history=history if request.history is None else request.history,
        cursor=0,
        limit=1,
        bytes_max=1,
        full=True,
        schema=request.schema,
        seen=request.seen,
    )


def readable(find: Callable[[], KeptImage | None], db_id: str) -> KeptImage | None:
    """The image that ``find`` finds. Where their directory cannot be read there is none: pages
    bring the same."""
    try:
        return find()
    except OSError as error:
        where = f"the images of database {db_id}, whose devices pull instead"
        logger.warning("%s", said_of(error, where))
        return None


__all__ = ["manifest_of", "no_manifest", "pull_of", "readable"]

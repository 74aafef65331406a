"""``GET /v1/segments/<sha256>``: a segment, or a part of one (RFC 9110, 13 and 14)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from entidb.errors import PermissionDeniedError, ProtocolError
from entidb.protocol import SegmentInfo
from entidb.server.auth import Grants
from entidb.server.segments.files import SegmentFile, segment_name
from entidb.server.segments.keeping import ImageKeeper
from entidb.server.stores import Store
from entidb.server.wire import ServerResponse, query_of
from entidb.storage.disk_errors import said_of

logger = logging.getLogger("entidb.server")

SEGMENTS_PATH: Final = "/v1/segments/"
MEDIA_TYPE: Final = "application/vnd.entidb.segment"
#: Nobody but the client may keep it, and it never becomes another.
_CACHING: Final = "private, max-age=31536000, immutable"
_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")


@dataclass(frozen=True, kw_only=True)
class SegmentAnswer(ServerResponse):
    """``length`` bytes of an open file from ``begin`` on; ``body`` stays empty. Close the file."""

    file: SegmentFile
    begin: int
    length: int


#: Of which collection it is, what a manifest says of it, and its file, open.
OpenFile = tuple[str, SegmentInfo, SegmentFile]


class SegmentRequest:
    """What the address asks for. Raises ``ProtocolError``."""

    def __init__(self, method: str, path: str, query: str) -> None:
        if method not in ("GET", "HEAD"):
            raise ProtocolError("read this with GET", code="method_not_allowed")
        self.only_head = method == "HEAD"
        name = path.removeprefix(SEGMENTS_PATH)
        if re.fullmatch("[0-9a-f]{64}", name) is None:
            raise ProtocolError("a segment is named by its SHA-256", code="not_found")
        self.sha256 = bytes.fromhex(name)
        given = query_of(query.encode("utf-8", "surrogatepass"))
        self.db_id = given.get("db_id", "")
        if not self.db_id:
            raise ProtocolError("name the database: ?db_id=…")
        self.history = _id(given, "history")
        self.device_id = _id(given, "device_id")


def _id(given: Mapping[str, str], name: str) -> bytes | None:
    text = given.get(name)
    if text is None:
        return None
    if re.fullmatch("[0-9a-f]{32}", text) is None:
        raise ProtocolError(f"{name} is 32 hexadecimal digits, in lower case")
    return bytes.fromhex(text)


def segment_answer(
    images: ImageKeeper | None,
    store: Store,
    request: SegmentRequest,
    grants: Grants,
    headers: Mapping[str, str],
    redirect_to: str = "",
) -> ServerResponse:
    """The answer, with the file open if it is a ``SegmentAnswer``; with ``redirect_to`` one that
    has a proxy send what the request asks for. Raises ``PermissionDeniedError`` for a collection
    that is not granted, and ``ProtocolError`` (not_found) where no image that counts has the
    segment."""
    found = find_segment(images, store, request)
    return answer_with(found, store, request, grants, headers, redirect_to)


def find_segment(images: ImageKeeper | None, store: Store, request: SegmentRequest) -> OpenFile:
    """Raises ``ProtocolError`` (not_found)."""
    known = request.history in (None, store.database.history)
    try:
        found = images.open(store, request.sha256) if images is not None and known else None
    except OSError as error:
        where = f"a segment of database {store.db_id}, which is not sent"
        logger.warning("%s", said_of(error, where))
        found = None
    if found is None:
        raise ProtocolError("no image has this segment, or not any more", code="not_found")
    return found


def answer_with(
    found: OpenFile,
    store: Store,
    request: SegmentRequest,
    grants: Grants,
    headers: Mapping[str, str],
    redirect_to: str = "",
) -> ServerResponse:
    """``segment_answer``, with what was found."""
    collection, info, file = found
    grant = grants.on(request.db_id)
    if not grant.read or (grant.collections is not None and collection not in grant.collections):
        file.close()
        raise PermissionDeniedError(
            f"the token does not allow reading collection {collection!r} of {request.db_id!r}"
        )
    tag = f'"{request.sha256.hex()}"'
    common = {"etag": tag, "cache-control": _CACHING, "accept-ranges": "bytes"}
    if tag in headers.get("if-none-match", ""):
        file.close()
        return ServerResponse(304, common)
    wanted = None
    if headers.get("if-range", tag) == tag:
        wanted = _range(headers.get("range"), info.bytes)
    if wanted is not None and not wanted:
        file.close()
        return ServerResponse(416, common | {"content-range": f"bytes */{info.bytes}"})
    status, span = (200, range(info.bytes)) if wanted is None else (206, wanted)
    common["content-type"] = MEDIA_TYPE
    if redirect_to:
        file.close()
        common["x-accel-redirect"] = redirect_to + quote(segment_name(store.db_id, info.sha256))
        return ServerResponse(200, common)
    if wanted is not None:
        common["content-range"] = f"bytes {span.start}-{span.stop - 1}/{info.bytes}"
    return SegmentAnswer(status, common, file=file, begin=span.start, length=len(span))


def whole(answer: ServerResponse, *, only_head: bool) -> ServerResponse:
    """The answer with its bytes in ``body``, for servers that are called in process."""
    if not isinstance(answer, SegmentAnswer):
        return answer
    try:
        body = b"" if only_head else answer.file.read(answer.begin, answer.length)
    finally:
        answer.file.close()
    return ServerResponse(answer.status, answer.headers, body)


def _range(header: str | None, size: int) -> range | None:
    """The bytes that are asked for, empty if there are none of them; None: all, also where the
    header asks for several ranges or cannot be read."""
    found = None if header is None else _RANGE.fullmatch(header.strip())
    if found is None:
        return None
    first, last, most = found.groups()
    if most is not None:
        return range(max(0, size - int(most)), size)
    end = size if not last else min(size, int(last) + 1)
    if last and int(last) < int(first):
        return None
    return range(int(first), max(int(first), end))


__all__ = [
    "SEGMENTS_PATH",
    "OpenFile",
    "SegmentAnswer",
    "SegmentRequest",
    "answer_with",
    "find_segment",
    "segment_answer",
    "whole",
]

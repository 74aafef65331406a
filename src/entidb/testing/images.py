"""Images of a server's database, in segments as small as a test wants them (R35).

For tests of devices and for the simulator; a server makes its own in the background.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from entidb import protocol
from entidb.db import Database
from entidb.db.maintenance import read_floor
from entidb.db.records import EntityRow
from entidb.db.terms import newest_term
from entidb.protocol import (
    CONTENT_TYPE,
    HandshakeResponse,
    Manifest,
    SegmentColumns,
    SegmentInfo,
    SnapshotRequest,
    column_heads,
    encode_segment,
)
from entidb.sync.transport import HttpAnswer, HttpResponse, LoopbackServer

_PAGE: Final = 1000
_AT_ONCE: Final = 50
#: A manifest of ours lasts so long, unless a test says otherwise.
LIFE_MS: Final = 3_600_000


@dataclass(frozen=True)
class ImageFiles:
    """A manifest, and the files that it names; ``wanted`` is which collections it was made of."""

    manifest: Manifest
    files: dict[bytes, bytes]
    wanted: list[str] | None = None

    def collection_of(self, sha: bytes) -> str:
        """Whose entities are in that file."""
        manifest = self.manifest
        found = next(each for each in manifest.segments if each.sha256 == sha)
        return manifest.collections[found.collection]


def image_of(
    database: Database,
    *,
    names: list[str] | None = None,
    rows: int = 3,
    packing: str = "none",
    time_ms: int = 0,
    granted: list[str] | None = None,
) -> ImageFiles:
    """An image of the server's ``database`` as it is, of the collections ``names`` (None: all),
    in segments of ``rows`` entities at most."""
    segments: list[SegmentInfo] = []
    files: dict[bytes, bytes] = {}
    with database.view() as view:
        infos = sorted(view.catalogue.by_name.values(), key=lambda info: info.name)
        infos = [info for info in infos if names is None or info.name in names]
        for index, info in enumerate(infos):
            live = [
                (entity_id, row)
                for page in view.table_pages(info.table, _PAGE)
                for entity_id, row in page
                if row.payload is not None
            ]
            for part in _parts(live, rows):
                data = encode_segment(info.name, _columns(part), packing)
                sha = hashlib.sha256(data).digest()
                files[sha] = data
                segments.append(
                    SegmentInfo(sha, index, len(data), len(part), part[0][0], part[-1][0], packing)
                )
        head = view.head
        manifest = Manifest(
            history=database.history or b"",
            head=head.sequence,
            floor=read_floor(view),
            collections=[info.name for info in infos],
            segments=segments,
            entities=sum(segment.rows for segment in segments),
            ends=time_ms + LIFE_MS,
            time=time_ms,
            granted=granted,
            term=newest_term(view.snapshot),
        )
    return ImageFiles(manifest, files, names)


Rows = list[tuple[bytes, EntityRow]]


def _parts(live: Rows, rows: int) -> Iterator[Rows]:
    return (live[at : at + rows] for at in range(0, len(live), rows))


def _columns(part: Rows) -> SegmentColumns:
    heads = b"".join(
        column_heads(
            [
                item
                for _, row in part[at : at + _AT_ONCE]
                for item in (row.version, row.device_id, row.timestamp)
            ]
        )
        for at in range(0, len(part), _AT_ONCE)
    )
    values = [row.payload or b"" for _, row in part]
    return SegmentColumns(
        ids=b"".join(entity_id for entity_id, _ in part),
        heads=heads,
        sizes=b"".join(len(value).to_bytes(4, "big") for value in values),
        values=b"".join(values),
    )


@dataclass
class ImageServer:
    """A ``LoopbackServer`` with segments: ``server``, which need not know of any, answers what is
    about neither. ``image`` is what it has for ``/v1/snapshot``; ``answer`` may change what is
    answered to a request for a segment."""

    server: LoopbackServer
    image: ImageFiles | None = None
    answer: Callable[[bytes, HttpResponse], HttpResponse] | None = None
    #: What was asked for: the path, and the bytes of segments that were sent for it.
    asked: list[tuple[str, int]] = field(default_factory=list)

    def handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> HttpAnswer:
        bare = path.partition("?")[0]
        if bare == "/v1/snapshot":
            return self._snapshot(body)
        if bare.startswith("/v1/segments/"):
            return self._segment(bytes.fromhex(bare.rpartition("/")[2]), headers)
        self.asked.append((bare, 0))
        answer = self.server.handle_http(method, path, headers, body)
        if bare != "/v1/handshake" or answer.status != 200:
            return answer
        shaken = protocol.decode(HandshakeResponse, answer.body)
        features = sorted({*shaken.features, "segments"})
        return _said(protocol.encode(replace(shaken, features=features)))

    def _snapshot(self, body: bytes) -> HttpResponse:
        request = protocol.decode(SnapshotRequest, body)
        self.asked.append(("/v1/snapshot", 0))
        if self.image is not None:
            return _said(protocol.encode(self.image.manifest))
        return _said(
            protocol.encode(
                Manifest(
                    history=request.history or bytes(16),
                    head=0,
                    floor=0,
                    collections=[],
                    segments=[],
                    entities=0,
                    ends=0,
                    time=0,
                )
            )
        )

    def _segment(self, sha: bytes, headers: Mapping[str, str]) -> HttpResponse:
        data = None if self.image is None else self.image.files.get(sha)
        if data is None:
            answer = HttpResponse(404, {"content-type": "text/plain"}, b"not here")
        else:
            begin, _, end = headers["range"].removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end), len(data) - 1)
            part = data[first : last + 1]
            named = {"content-range": f"bytes {first}-{last}/{len(data)}"}
            answer = HttpResponse(206, named, part)
        if self.answer is not None:
            answer = self.answer(sha, answer)
        self.asked.append(("/v1/segments", len(answer.body)))
        return answer


def _said(body: bytes) -> HttpResponse:
    return HttpResponse(200, {"content-type": CONTENT_TYPE}, body)


__all__ = ["ImageServer", "ImageFiles", "image_of"]

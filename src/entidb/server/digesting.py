"""What a server says of its entities so that a device can compare its own with them (R34).

A digest is asked for at the cursor of the device. Entities that were written since are named, and
count in no digest: what the others were at that cursor is what they are now.
"""

from __future__ import annotations

from typing import Final

from entidb.collector import paused
from entidb.db.catalogue import CollectionInfo
from entidb.db.digests import Digest, settled
from entidb.db.maintenance import read_floor
from entidb.db.records import NO_DEVICE, decode_entity
from entidb.db.writer import Writer
from entidb.errors import PermissionDeniedError
from entidb.protocol import (
    DigestBlock,
    DigestRequest,
    DigestResponse,
    DigestState,
    PullRequest,
)
from entidb.server.hooks import Grant
from entidb.server.pages import PAGE_BYTES_MAX, wanted_collections
from entidb.server.service import DatabaseService

#: Rows, and bytes of values, that one request reads at most, so that it takes bounded time. The
#: rest is asked for again.
ROWS_MAX: Final = 20_000
BYTES_MAX: Final = 32 * 1024 * 1024


def digested(service: DatabaseService, request: DigestRequest, grant: Grant) -> DigestResponse:
    """The answer to ``request``. Raises as a pull from its cursor does, and
    ``PermissionDeniedError`` for a collection that is not granted."""
    name = request.collection
    with paused(), service.database.view() as view:
        head = view.head.sequence
        history, floor = service.database.history_at(view.snapshot), read_floor(view)
        service.check_pull(_pull_of(request), grant, request.cursor, head, floor, history)
        if name is None:
            infos = wanted_collections(view.catalogue, request.collections, grant.collections)
            names = sorted([info.name for info in infos.values()])
            return DigestResponse(collections=names, head=head, granted=grant.named)
        if grant.collections is not None and name not in grant.collections:
            raise PermissionDeniedError(
                f"the token does not allow reading collection {name!r} of {service.db_id!r}"
            )
        info = view.catalogue.by_name.get(name)
        found = _Found(view, info, request)
        if request.ids:
            found.read_states()
        else:
            found.read_blocks()
        return DigestResponse(
            blocks=found.blocks,
            states=found.states,
            newer=found.newer,
            more=found.more,
            head=head,
            granted=grant.named,
        )


def _pull_of(request: DigestRequest) -> PullRequest:
    """The pull whose conditions are those of ``request``."""
    return PullRequest(
        db_id=request.db_id,
        device_id=request.device_id,
        history=request.history,
        cursor=request.cursor,
        limit=1,
        bytes_max=1,
        schema=request.schema,
    )


class _Found:
    """What one request finds in its collection; there may be none of that name."""

    def __init__(self, view: Writer, info: CollectionInfo | None, request: DigestRequest) -> None:
        self.blocks: list[DigestBlock] = []
        self.states: list[DigestState] = []
        self.newer: list[bytes] = []
        self.more = False
        self._view = view
        self._info = info
        self._request = request

    def read_blocks(self) -> None:
        request, digest, rows, size = self._request, Digest(), 0, 0
        if self._info is not None:
            for entity_id, version, payload in settled(
                self._view, self._info, request.after, request.last
            ):
                rows += 1
                if version > request.cursor:
                    self.newer.append(entity_id)
                elif payload is not None:
                    digest.add(entity_id, version, payload)
                    size += len(payload)
                full = rows >= ROWS_MAX or size >= BYTES_MAX
                if digest.count == request.block or (full and entity_id != request.last):
                    self.blocks.append(DigestBlock(entity_id, digest.count, digest.value()))
                    digest = Digest()
                if full and entity_id != request.last:
                    self.more = True
                    return
        if not self.blocks or self.blocks[-1].last != request.last:
            self.blocks.append(DigestBlock(request.last, digest.count, digest.value()))

    def read_states(self) -> None:
        size = 0
        for entity_id in self._request.ids:
            if size >= PAGE_BYTES_MAX:
                self.more = True
                return
            raw = None
            if self._info is not None:
                raw = self._view.get(self._info.prefix + entity_id)
            if raw is None:
                self.states.append(DigestState(entity_id, 0, NO_DEVICE, 0, None))
                continue
            row = decode_entity(raw)
            if row.version > self._request.cursor:
                self.newer.append(entity_id)
                continue
            state = DigestState(entity_id, row.version, row.device_id, row.timestamp, row.payload)
            self.states.append(state)
            size += 0 if row.payload is None else len(row.payload)


__all__ = ["BYTES_MAX", "ROWS_MAX", "digested"]

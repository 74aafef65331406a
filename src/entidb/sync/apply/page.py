"""A pulled page: everything of it that can be wrong, and taking one that is the last (R22, R23).

Pages of a pull of several are ``stage``'s. ``position`` moves the device's position afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable

from entidb import cbor
from entidb.db.catalogue import CollectionInfo
from entidb.db.records import BaseRow
from entidb.db.writer import Ref, Writer
from entidb.errors import CborDecodeError, InvalidNameError, ProtocolError, SyncCodecError
from entidb.protocol import ColumnRows, PullRequest, PullResponse
from entidb.sync.apply.rebase import Rebase
from entidb.types import check_name


def check_page(
    request: PullRequest, response: PullResponse, rows: ColumnRows | None = None
) -> None:
    """Everything of a page that can be wrong, before anything is touched: canonical payloads,
    names, and versions in order within what was asked for. ``rows`` are those of its columns,
    if it has some. Raises ``ProtocolError``."""
    for name in response.collections:
        try:
            check_name(name)
        except InvalidNameError as error:
            raise ProtocolError(f"the server sent an impossible name: {error}") from error
    last = request.cursor
    if rows is not None:
        if max(rows.indexes, default=-1) >= len(response.collections):
            raise ProtocolError(
                "the server's page names a collection that it does not list; nothing was applied"
            )
        if rows.versions:
            if rows.versions[0] <= last:
                raise _version_back(rows.versions[0], last)
            last = rows.versions[-1]
        payloads = rows.payloads
    else:
        names = len(response.collections)
        payloads = []
        for commit in response.commits:
            if commit.version <= last:
                raise _version_back(commit.version, last)
            last = commit.version
            for op in commit.operations:
                if op.collection >= names:
                    raise ProtocolError(
                        f"version {last} names a collection that its page does not; "
                        "nothing was applied"
                    )
                payloads.append(op.payload)
    if not cbor.all_pass([payload for payload in payloads if payload is not None]):
        for place in _places(response, rows):
            check_payload(*place)
    if response.cursor < last or response.head < response.cursor:
        raise ProtocolError(
            f"the server's page ends at cursor {response.cursor} with head {response.head}, but "
            f"holds version {last}; nothing was applied"
        )
    if response.has_more and response.cursor <= request.cursor:
        raise ProtocolError(
            f"the server says there is more after cursor {request.cursor}, but its page does not "
            "move on; nothing was applied"
        )


def _places(
    response: PullResponse, rows: ColumnRows | None
) -> Iterable[tuple[int, bytes, bytes | None]]:
    """Version, id and payload of everything on a page."""
    if rows is not None:
        return zip(rows.versions, rows.ids, rows.payloads, strict=True)
    return [(c.version, op.entity_id, op.payload) for c in response.commits for op in c.operations]


def _version_back(version: int, last: int) -> ProtocolError:
    return ProtocolError(f"the server sent version {version} after {last}; nothing was applied")


def check_payload(version: int, entity_id: bytes, payload: bytes | None) -> None:
    if payload is None:
        return
    try:
        value = cbor.check(payload)
    except CborDecodeError as error:
        raise SyncCodecError(
            f"entity {entity_id.hex()} of version {version} is not canonical: {error}; nothing "
            "was applied"
        ) from error
    if value is None:
        raise SyncCodecError(
            f"entity {entity_id.hex()} of version {version} is null, and a deletion has no "
            "payload; nothing was applied"
        )


def targets_of(writer: Writer, response: PullResponse) -> list[CollectionInfo | None]:
    """The collection behind each index of the page; None for one that is local here (R31)."""
    return targets_for(writer, response.collections)


def targets_for(writer: Writer, names: list[str]) -> list[CollectionInfo | None]:
    """The same for collections by their names."""
    wanted: list[CollectionInfo | None] = []
    scope = writer.catalogue.scope
    known = writer.catalogue.adding_all(
        (name for name in names if scope is None or name in scope), pulled=True
    )
    if known is not writer.catalogue:
        writer.set_catalogue(known)
    for name in names:
        if scope is not None and name not in scope:
            wanted.append(None)
            continue
        info = writer.collection(name)
        wanted.append(info if info.synced else None)
    return wanted


def table_for(writer: Writer, tables: dict[str, int], collection: int) -> int:
    """The stage's table of a collection, allocated when it is needed first."""
    number = str(collection)
    if number not in tables:
        table, catalogue = writer.catalogue.allocating()
        writer.set_catalogue(catalogue)
        tables[number] = table
    return tables[number]


def take_page(writer: Writer, rebase: Rebase, response: PullResponse) -> None:
    targets = targets_of(writer, response)
    places: list[tuple[Ref, BaseRow]] = []
    keys = []
    for commit in response.commits:
        version, device, timestamp = commit.version, commit.device_id, commit.timestamp
        for op in commit.operations:
            info = targets[op.collection]
            if info is not None:
                keys.append(info.prefix + op.entity_id)
                remote = BaseRow(version, device, timestamp, op.payload)
                places.append(((info.number, op.entity_id), remote))
    if len(set(keys)) != len(keys):
        raise ProtocolError("the server sent an entity twice in one page; nothing was applied")
    rebase.take_all_dirty(rebase.take_all(places, writer.entities(keys)))

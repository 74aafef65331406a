"""Entities that differ from the server's, put right (R34).

What a device knows of the server is replaced; what is pending goes on top of that by the usual
rules, as after a pull.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from entidb.db.records import BaseRow, absent_base
from entidb.db.writer import Ref, Writer
from entidb.errors import ProtocolError, SyncStateError
from entidb.protocol import DigestRequest, DigestResponse, DigestState
from entidb.sync.apply.page import check_payload
from entidb.sync.apply.position import check_adopted
from entidb.sync.apply.rebase import Rebase


def check_states(request: DigestRequest, response: DigestResponse) -> None:
    """Everything of ``response`` that can be wrong, before anything is touched. Raises
    ``ProtocolError``."""
    asked = set(request.ids)
    for state in response.states:
        if state.entity_id not in asked or state.version > request.cursor:
            raise ProtocolError(
                f"the server sent entity {state.entity_id.hex()} at version {state.version}, which "
                "was not asked for; nothing was repaired"
            )
        check_payload(state.version, state.entity_id, state.payload)


def check_still_there(writer: Writer, request: DigestRequest) -> None:
    """The device is still where it was when it asked. Raises ``SyncStateError``."""
    state = writer.sync_state
    if state.history != request.history or state.reached != request.cursor:
        raise SyncStateError("this device was synchronised meanwhile; verify again")
    if writer.inflight is not None:
        raise SyncStateError("a push is in flight; it must be settled before a repair (R5)")
    check_adopted(writer)


def repair(
    writer: Writer, rebase: Rebase, request: DigestRequest, states: Sequence[DigestState]
) -> None:
    """Make ``states`` what the device knows of the server."""
    check_still_there(writer, request)
    assert request.collection is not None, "states are those of a collection"
    info = writer.collection(request.collection)
    dirty: list[tuple[int, Ref, BaseRow]] = []
    for state in states:
        ref = info.number, state.entity_id
        remote = BaseRow(state.version, state.device_id, state.timestamp, state.payload)
        if state.payload is None and not state.version:
            # Never there, or forgotten: it is absent at the cursor.
            remote = absent_base(request.cursor)
        row = writer.entity(ref)
        if row is not None and row.pending:
            dirty.append((row.pending, ref, remote))
            continue
        old = None if row is None else replace(row, version=0)
        rebase.take_clean(ref, remote, old)
    # Oldest pending work first, as with a page.
    dirty.sort(key=lambda item: item[:2])
    for _, ref, remote in dirty:
        _repair_dirty(writer, rebase, ref, remote)


def _repair_dirty(writer: Writer, rebase: Rebase, ref: Ref, remote: BaseRow) -> None:
    row = writer.entity(ref)
    if row is None or not row.pending:
        # Another conflict of this repair withdrew what was pending here.
        rebase.take_clean(ref, remote, None if row is None else replace(row, version=0))
        return
    base = writer.base(ref, row)
    if base.payload == remote.payload:
        # Only its version was wrong, so there is nothing to decide.
        writer.set_base(ref, row, remote)
        return
    writer.set_base(ref, row, replace(base, version=0))
    rebase.take_dirty(ref, remote)


__all__ = ["check_states", "repair"]

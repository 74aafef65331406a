"""How an entity stands with the server, as data and in words."""

from __future__ import annotations

import uuid
from enum import StrEnum

from msgspec import Struct

from entidb.db.entity_info import id_bytes
from entidb.db.outbox import read_pending
from entidb.db.rows import SnapshotRows
from entidb.db.subjects import is_others, subject_of
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.conflict import Conflict
from entidb.sync.state import SyncStatus
from entidb.types import check_name


class EntityState(StrEnum):
    """How an entity stands with the server."""

    #: As the server has it, as far as this device knows.
    SYNCED = "synced"
    #: Changed here, and the server has not decided yet.
    PENDING = "pending"
    #: Changed here, and held: a conflict waits for a person, on this entity or on one that was
    #: changed together with it.
    HELD = "held"
    #: In a collection that stays on this device (R31).
    LOCAL = "local"
    #: In a collection that this device does not synchronise, or that its token does not grant.
    OUTSIDE = "outside"
    #: Not here, and nothing of it waits.
    ABSENT = "absent"


class EntityStatus(Struct, frozen=True, kw_only=True):
    """What ``engine.entity_status`` answers.

    ``version`` is the server's commit that wrote what is here, 0 if the server never had it;
    ``changed_by`` the 16 bytes of the device that made the newest change, None where nothing is
    here. ``sequences`` are the local commits that wait, oldest first; ``ahead`` counts what is
    pushed before the first of them. ``conflict`` is the entity's own, if it has one. ``granted``
    is False where the token does not grant the collection; ``waits_for`` is another subject without
    whom nothing of it is pushed (R36). ``sync`` is the engine's status then.
    """

    collection: str
    id: uuid.UUID
    state: EntityState
    version: int
    changed_by: bytes | None
    sequences: list[int]
    ahead: int
    conflict: Conflict | None
    granted: bool
    sync: SyncStatus
    waits_for: str | None = None

    def explain(self) -> str:
        """Why it is not synced, or that it is, in words for a person."""
        return "; ".join(self._sentences()) + "."

    def _sentences(self) -> list[str]:
        which = f"{self.collection}/{self.id}"
        match self.state:
            case EntityState.SYNCED:
                return [f"{which} is as the server had it in commit {self.version}"]
            case EntityState.LOCAL:
                return [f"{which} is in a collection that stays on this device"]
            case EntityState.ABSENT:
                return [f"{which} is not here, and no change of it waits"]
            case EntityState.OUTSIDE:
                why = "is not in the scope" if self.granted else "is not granted by the token"
                return [f"{which} is in a collection that {why}"]
        count = len(self.sequences)
        waits = "1 commit waits" if count == 1 else f"{count} commits wait"
        said = [f"{which} was changed here, and {waits} for the server"]
        if self.conflict is not None:
            said.append("it is in conflict with a change of another device: resolve() decides")
        elif self.state is EntityState.HELD:
            said.append("it was changed together with something that is in conflict")
        elif self.waits_for is not None:
            said.append(
                f"it was committed by {self.waits_for!r}, or on top of that, and is pushed when "
                "they sync here"
            )
        elif self.ahead:
            others = "another is" if self.ahead == 1 else f"{self.ahead} others are"
            said.append(f"{others} pushed before it")
        if self.sync.last_error is not None:
            said.append(f"the last sync failed: {self.sync.last_error}".rstrip("."))
        if self.sync.next_retry_s is not None:
            said.append(f"the next attempt is in {self.sync.next_retry_s:.0f} s")
        return said


def entity_status(
    applier: DatabaseApplier, status: SyncStatus, collection: str, entity_id: uuid.UUID
) -> EntityStatus:
    """See ``SyncEngine.entity_status``."""
    raw = id_bytes(entity_id)
    check_name(collection)
    with applier.database.view() as view:
        row = SnapshotRows(view.snapshot, view.catalogue).row(collection, raw)
        info = view.catalogue.by_name.get(collection)
        scope, granted = view.catalogue.scope, view.sync_state.grants(collection)
        sync_state = view.sync_state
        waiting, ahead = [], 0
        for pending in read_pending(view.snapshot):
            if info is not None and any(
                (op.collection, op.entity_id) == (info.number, raw) for op in pending.operations
            ):
                waiting.append(pending)
            elif not waiting and not pending.held and not is_others(sync_state, pending.sequence):
                ahead += 1
    here = row is not None and row.payload is not None
    if info is not None and info.local:
        state = EntityState.LOCAL
    elif waiting:
        held = any(pending.held for pending in waiting)
        state = EntityState.HELD if held else EntityState.PENDING
    elif not granted or (scope is not None and collection not in scope):
        state = EntityState.OUTSIDE
    else:
        state = EntityState.SYNCED if here else EntityState.ABSENT
    own = [c for c in applier.conflicts() if (c.collection, c.id_bytes) == (collection, raw)]
    return EntityStatus(
        collection=collection,
        id=entity_id,
        state=state,
        version=0 if row is None else row.version,
        changed_by=None if row is None else row.device_id,
        sequences=[pending.sequence for pending in waiting],
        ahead=ahead if waiting else 0,
        waits_for=next(
            (
                subject_of(sync_state, each.sequence)
                for each in waiting
                if is_others(sync_state, each.sequence)
            ),
            None,
        ),
        conflict=own[0] if own else None,
        granted=granted,
        sync=status,
    )


__all__ = ["EntityState", "EntityStatus", "entity_status"]

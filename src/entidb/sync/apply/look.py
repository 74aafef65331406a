"""One look at the device's database: what a step of a cycle needs to know, in one snapshot."""

from __future__ import annotations

from typing import Final

from entidb.db import Database
from entidb.db.catalogue import Catalogue
from entidb.db.records import (
    META_ADOPT,
    META_CATALOGUE,
    META_HEAD,
    META_INFLIGHT,
    META_OVERRULED,
    META_STAGE,
    META_SYNC,
    Head,
    decode_head,
    decode_overruled_head,
)
from entidb.db.replica import Inflight, ReplicaState, Stage, decode_record, decode_state
from entidb.db.writer import Writer
from entidb.sync.apply.seam import Look

_RECORDS: Final = (META_HEAD, META_SYNC, META_STAGE, META_INFLIGHT, META_ADOPT, META_OVERRULED)


def look_at(database: Database) -> Look:
    snapshot = database.storage.snapshot()
    moment = database.moment_of(snapshot)
    try:
        raw_head, state, stage, inflight, adopt, lost = snapshot.get_many(_RECORDS)
        catalogue = database.read_catalogue(snapshot)
    finally:
        snapshot.close()
    sent = None if inflight is None else decode_record(Inflight, inflight)
    head = Head() if raw_head is None else decode_head(raw_head)
    return Look(
        moment=moment,
        state=ReplicaState() if state is None else decode_state(state),
        stage=None if stage is None else decode_record(Stage, stage),
        # What its own commit has marked, and nobody has sent, is as good as not in flight.
        inflight=None if sent is None or sent == database.unsent else sent,
        scope=_scope_of(catalogue),
        sequence=head.sequence,
        ready=head.ready,
        adopting=adopt is not None,
        garbage=bool(catalogue.garbage),
        overruled=decode_overruled_head(lost),
    )


def look_after(before: Look, writer: Writer) -> Look:
    """What ``before`` has become with ``writer``'s commit, which began at that moment and is
    stored. Only what it changed is read, and of what it holds in memory."""
    head = writer.head
    catalogue = writer.catalogue if META_CATALOGUE in writer.changes else None
    adopting, overruled = before.adopting, before.overruled
    if META_ADOPT in writer.changes:
        adopting = writer.changes[META_ADOPT] is not None
    if META_OVERRULED in writer.changes:
        overruled = decode_overruled_head(writer.changes[META_OVERRULED])
    return Look(
        moment=writer.moment,
        state=writer.sync_state if META_SYNC in writer.changes else before.state,
        stage=writer.stage if META_STAGE in writer.changes else before.stage,
        inflight=writer.inflight if META_INFLIGHT in writer.changes else before.inflight,
        scope=before.scope if catalogue is None else _scope_of(catalogue),
        sequence=head.sequence,
        ready=head.ready,
        adopting=adopting,
        garbage=before.garbage if catalogue is None else bool(catalogue.garbage),
        overruled=overruled,
    )


def _scope_of(catalogue: Catalogue) -> list[str] | None:
    return None if catalogue.scope is None else sorted(catalogue.scope)


__all__ = ["look_after", "look_at"]

"""One look at the device's database: what a step of a cycle needs to know, in one snapshot."""

from __future__ import annotations

from typing import Final

from entidb.db import Database
from entidb.db.records import (
    META_ADOPT,
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
    head = Head() if raw_head is None else decode_head(raw_head)
    return Look(
        moment=moment,
        state=ReplicaState() if state is None else decode_state(state),
        stage=None if stage is None else decode_record(Stage, stage),
        inflight=None if inflight is None else decode_record(Inflight, inflight),
        scope=None if catalogue.scope is None else sorted(catalogue.scope),
        sequence=head.sequence,
        ready=head.ready,
        adopting=adopt is not None,
        garbage=bool(catalogue.garbage),
        overruled=decode_overruled_head(lost),
    )


__all__ = ["look_at"]

"""A device that begins with a snapshot of its server's database, from a file (R35).

What the file holds is proved and staged as an image that comes over the network, and published at
its commit. Which server it is of is not in the file: the first sync says so, and has the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import IO, Final

from msgspec import Struct
from msgspec.structs import replace

from entidb.db import Database, Role, machine
from entidb.db.replica import ReplicaState
from entidb.errors import EntiDBError, SyncStateError
from entidb.protocol import Manifest
from entidb.protocol.archives import Archive
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.report import RebaseReport
from entidb.sync.conflict import ConflictPolicy
from entidb.sync.others import Others
from entidb.sync.room import PROVE_SAMPLE

_BEGUN: Final = (
    "this device has synchronised already, so it cannot begin with a snapshot: sync it, or begin "
    "in another directory"
)


class Begun(Struct, frozen=True):
    """What a snapshot says of itself, and what became of transactions that were pending before."""

    manifest: Manifest
    report: RebaseReport


def begin_from(
    database: Database,
    file: IO[bytes],
    *,
    default_policy: str | ConflictPolicy = "server_wins",
    policies: Mapping[str, str | ConflictPolicy] | None = None,
    prove: str = PROVE_SAMPLE,
    progress: Callable[[int, int], None] = lambda done, entities: None,
) -> Begun:
    """Make the snapshot in ``file`` the state of ``database``, that of a device which never
    synchronised; what was committed to it before goes on top, and where the snapshot has the same
    entity, its policy decides (R25). ``progress`` is called with the entities that are in, and
    those there are.

    Raises ``SyncStateError`` for a device that has synchronised, or is a server's database;
    ``SyncCodecError`` and ``ProtocolError`` for a file that is none or is damaged: nothing of it
    counts then; and ``DatabaseLockedError`` where another process syncs it, or begins with one, and
    does not end. A process that is killed meanwhile leaves a device that pulls from nothing."""
    manifest = (archive := Archive(file)).manifest
    applier = DatabaseApplier(
        database, default_policy=default_policy, policies=policies, prove=prove
    )
    # Two that begin at once would each take away what the other has staged.
    with Others(database, database.clock).kept_out():
        return Begun(manifest, _begin(database, applier, archive, progress))


def _begin(
    database: Database,
    applier: DatabaseApplier,
    archive: Archive,
    progress: Callable[[int, int], None],
) -> RebaseReport:
    manifest, report = archive.manifest, RebaseReport()
    _bind(database, manifest)
    try:
        if manifest.segments:
            stage = applier.begin_image(manifest, None, _scope(applier))
            image = stage.image
            assert image is not None, "it has segments"
            segments = iter(manifest.segments)
            while stage.image is not None:
                data = archive.segment(next(segments))
                opened = applier.open_segment(stage.image.left[0], stage.image.head, data)
                while not opened.used_up:
                    stage = applier.stage_segment(opened)
                    progress(stage.operations, image.entities)
            _complete(database)
            report = applier.publish()
    except BaseException:
        # What a store that is broken or full does not take back is as after a process was killed;
        # the reason is what is raised.
        with contextlib.suppress(EntiDBError):
            applier.restart_stage(full=False)
            _unbind(database)
        raise
    return report


def _scope(applier: DatabaseApplier) -> list[str] | None:
    if applier.scope() is not None:
        raise SyncStateError("a snapshot holds all collections: set a scope after it, not before")
    return None


def _bind(database: Database, manifest: Manifest) -> None:
    """The device is one of that history, and lacks all of it."""
    if database.role is Role.SERVER:
        raise SyncStateError("this is a server's database: only a device begins with a snapshot")
    with database.write() as writer:
        state = writer.sync_state
        if state.cursor or state.db_id is not None or not state.full or state.foreign:
            raise SyncStateError(_BEGUN)
        writer.abandon_stage()
        writer.set_sync_state(machine.STAND(state, replace(state, history=manifest.history)))


def _complete(database: Database) -> None:
    """Nothing follows the image: the stage is as one whose last page has come."""
    with database.write() as writer:
        stage = writer.stage
        assert stage is not None, "its last segment was staged just now"
        writer.set_stage(machine.KEEP(stage, replace(stage, full_done=True)))


def _unbind(database: Database) -> None:
    with database.write() as writer:
        state = writer.sync_state
        if state != ReplicaState():
            writer.set_sync_state(machine.STAND(state, replace(state, history=None)))


__all__ = ["Begun", "begin_from"]

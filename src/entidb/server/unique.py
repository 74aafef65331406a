"""What is unique on a server: transactions that would have what another entity has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from entidb.db.catalogue import CollectionInfo
from entidb.db.records import payload_of, version_of
from entidb.db.uniqueness import first_taken, has_unique, unready
from entidb.db.writer import Writer
from entidb.errors import ServerBusyError
from entidb.protocol import PushRequest, PushResult, PushTransaction, ServerState, Verdict
from entidb.types import uuid_from_bytes

#: Seconds after which a push is tried again that an index has to be built for.
BUILDING_RETRY_S: Final = 1.0
CODE: Final = "not_unique"


def is_asked(infos: Sequence[CollectionInfo | None]) -> bool:
    """Whether something is unique in one of the collections."""
    return any(has_unique(info) for info in infos if info is not None)


def refused(
    writer: Writer,
    infos: Sequence[CollectionInfo | None],
    may_read: bool,
    transaction: PushTransaction,
    newest: Sequence[bytes | None] | None,
) -> PushResult | None:
    """The verdict on a transaction that would have what is there already, with all that was
    accepted before it in this group; None if it may be accepted. ``newest`` is what would be
    stored instead. Who has it is said only to those who ``may_read`` it."""
    operations = transaction.operations
    payloads = newest or [op.payload for op in operations]
    writes = [
        (info, op.entity_id, payload)
        for op, payload in zip(operations, payloads, strict=True)
        if (info := infos[op.collection]) is not None
    ]
    taken = first_taken(writer, writes)
    if taken is None:
        return None
    name, entity_id = taken.collection.name, uuid_from_bytes(taken.entity_id)
    said = f"{taken.fields} of entity {entity_id} {taken.has} to be unique in {name!r}"
    if not may_read:
        return PushResult(Verdict.REJECTED, code=CODE, message=f"{said}, and is taken")
    message = f"{said}, and entity {uuid_from_bytes(taken.holder)} has the same"
    raw = writer.get(taken.collection.prefix + taken.holder)
    states = []
    # One of its own may have it, which is not there either.
    if raw is not None and (payload := payload_of(raw)) is not None:
        at = infos.index(taken.collection)
        states = [ServerState(at, taken.holder, version_of(raw), payload)]
    return PushResult(Verdict.REJECTED, states=states, code=CODE, message=message)


def waits_for(writer: Writer, request: PushRequest) -> ServerBusyError | None:
    """What a push is answered that writes where something is unique, and the index that says so is
    being built; None if it can be decided."""
    building = unready(writer)
    if not building:
        return None
    names = request.collections
    written = {names[op.collection] for t in request.transactions for op in t.operations}
    waited = written.intersection(building)
    if not waited:
        return None
    return ServerBusyError(
        f"the index that says what is unique in {min(waited)!r} is being built",
        retry_after=BUILDING_RETRY_S,
    )

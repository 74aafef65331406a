"""Local writes: what those of a transaction become when they are committed (R1).

On a device that is entities, their bases, one outbox row and the feed; on a server the same without
an outbox, the commit sequence being the version (R11).

Not here: what programs hold meanwhile (``transaction``), and whose turn it is (``core``).
"""

from __future__ import annotations

from enum import Enum

from entidb import cbor
from entidb.db.catalogue import CollectionInfo
from entidb.db.pending import PendingOp, PendingTransaction, encode_creation, encode_single
from entidb.db.records import (
    HAS_BASE,
    IS_HELD,
    READY,
    REMOTE,
    BaseRow,
    EntityRow,
    decode_entity,
    payload_of,
    sequence_key,
)
from entidb.db.writer import Writer
from entidb.errors import TransactionTooLargeError
from entidb.types import (
    OPERATION_OVERHEAD_BYTES,
    TRANSACTION_COLLECTIONS_MAX,
    TRANSACTION_CONTAINERS_MAX,
)

Writes = dict[str, dict[bytes, bytes | None]]


class Role(Enum):
    """What a database is, for life."""

    #: Keeps an outbox; its changes become versions when a server accepted them.
    DEVICE = "device"
    #: Authoritative: its commit sequence is the version (R11).
    SERVER = "server"


def check_size(writes: Writes, bytes_max: int) -> None:
    """Raises ``TransactionTooLargeError`` where the programmer sees it (rules, "Limits")."""
    if len(writes) > TRANSACTION_COLLECTIONS_MAX:
        raise TransactionTooLargeError(
            f"the transaction writes to {len(writes)} collections, and may to "
            f"{TRANSACTION_COLLECTIONS_MAX}; nothing was written. Split it"
        )
    size = 0
    for ids in writes.values():
        size += OPERATION_OVERHEAD_BYTES * len(ids) + sum(map(len, filter(None, ids.values())))
    if size > bytes_max:
        raise TransactionTooLargeError(
            f"this transaction is {size} bytes, the limit is {bytes_max} "
            "(transaction_bytes_max): commit it in smaller parts"
        )
    if size > TRANSACTION_CONTAINERS_MAX:
        payloads = (payload for ids in writes.values() for payload in ids.values() if payload)
        if cbor.containers_together(payloads, TRANSACTION_CONTAINERS_MAX) is None:
            # Small in bytes, and long work for every reader that decodes it.
            raise TransactionTooLargeError(
                f"the values of this transaction have more than {TRANSACTION_CONTAINERS_MAX} maps "
                "and lists together: commit it in smaller parts"
            )


def commit_local(
    writer: Writer,
    role: Role,
    writes: Writes,
    transaction_id: bytes,
    timestamp: int,
    is_new: bool = False,
) -> int:
    """Stage ``writes`` as one local transaction; returns its sequence, 0 if nothing changes.
    ``is_new`` says of one entity that its id was made just now, so that it is not looked for.

    Deleting what is not there changes nothing and leaves no trace."""
    if len(writes) == 1:
        ((name, payloads),) = writes.items()
        if len(payloads) == 1:
            ((entity_id, payload),) = payloads.items()
            return commit_single(
                writer, role, name, entity_id, payload, transaction_id, timestamp, is_new
            )
    groups = [(writer.collection(name), sorted(ids), ids) for name, ids in writes.items() if ids]
    if len(groups) > 1:
        groups.sort(key=lambda group: group[0].number)
    olds = writer.get_many(
        [info.prefix + entity_id for info, ids, _ in groups for entity_id in ids]
    )
    if role is Role.DEVICE and not any(olds) and (created := _in_columns(groups)):
        sequence = writer.next_sequence()
        _create_on_device(writer, created, sequence, transaction_id, timestamp)
        return sequence
    targets = [
        (info, entity_id, payloads[entity_id])
        for info, ids, payloads in groups
        for entity_id in ids
    ]
    work = [
        (info, entity_id, payload, None if old is None else decode_entity(old))
        for (info, entity_id, payload), old in zip(targets, olds, strict=True)
        if payload is not None or (old is not None and payload_of(old) is not None)
    ]
    if not work:
        return 0
    return _commit_work(writer, role, work, transaction_id, timestamp)


def commit_single(
    writer: Writer,
    role: Role,
    name: str,
    entity_id: bytes,
    payload: bytes | None,
    transaction_id: bytes,
    timestamp: int,
    is_new: bool,
) -> int:
    """As ``commit_local`` for a transaction that writes one entity."""
    info = writer.collection(name)
    raw = None if is_new else writer.get(info.prefix + entity_id)
    if raw is None and payload is not None and role is Role.DEVICE:
        sequence, version = writer.next_sequence(), 0
        if info.synced:
            version = writer.sync_state.base_version_of_absent(info.name)
            row = encode_single(transaction_id, timestamp, info.number, entity_id, payload, 0)
            _make_ready(writer, sequence, row)
        writer.add_entity(info, entity_id, payload, sequence, timestamp, version)
        return sequence
    old = None if raw is None else decode_entity(raw)
    if payload is None and (old is None or old.payload is None):
        return 0
    if role is Role.SERVER or old is None or not info.synced or _is_held(old):
        work = [(info, entity_id, payload, old)]
        return _commit_work(writer, role, work, transaction_id, timestamp)
    sequence = writer.next_sequence()
    previous = _write_over(writer, info, entity_id, payload, old, sequence, timestamp, 0)
    row = encode_single(transaction_id, timestamp, info.number, entity_id, payload, previous)
    _make_ready(writer, sequence, row)
    return sequence


#: Of each collection: ids in order, and what is written to each.
Groups = list[tuple[CollectionInfo, list[bytes], dict[bytes, bytes | None]]]
#: Of each collection its new entities: ids in order, and the payload of each.
Created = list[tuple[CollectionInfo, list[bytes], list[bytes]]]


def _in_columns(groups: Groups) -> Created:
    """The writes as columns; nothing if some of them delete."""
    created = []
    for info, ids, payloads in groups:
        found = [payload for payload in map(payloads.get, ids) if payload is not None]
        if len(found) < len(ids):
            return []
        created.append((info, ids, found))
    return created


def _create_on_device(
    writer: Writer, created: Created, sequence: int, transaction_id: bytes, timestamp: int
) -> None:
    """As ``_commit_on_device`` for a transaction that does nothing but create entities which
    never had a row, as most do: in columns, without objects for each."""
    state = writer.sync_state
    operations = []
    for info, ids, payloads in created:
        version = 0
        if info.synced:
            version = state.base_version_of_absent(info.name)
            operations.append((info.number, ids, payloads))
        writer.add_entities(info, ids, payloads, sequence, timestamp, version)
    if operations:
        _make_ready(writer, sequence, encode_creation(transaction_id, timestamp, operations))


def _make_ready(writer: Writer, sequence: int, row: bytes) -> None:
    """Put a pending transaction, as encoded, behind those that are to be pushed."""
    writer.put(sequence_key(READY, sequence), row)
    head = writer.head
    head.ready += 1
    if writer.marks and head.ready == 1:
        writer.mark(sequence)


#: What is written to which entity, over what.
Work = list[tuple[CollectionInfo, bytes, bytes | None, EntityRow | None]]


def _commit_work(
    writer: Writer, role: Role, work: Work, transaction_id: bytes, timestamp: int
) -> int:
    sequence = writer.next_sequence()
    if role is Role.SERVER:
        for info, entity_id, payload, old in work:
            row = EntityRow(REMOTE, 0, sequence, writer.device_id, timestamp, 0, payload)
            writer.show((info.number, entity_id), row, old, sequence)
    else:
        _commit_on_device(writer, work, sequence, transaction_id, timestamp)
    return sequence


def _is_held(old: EntityRow) -> bool:
    """Whether what is pending on the entity waits for a person, so that what comes after it does
    too."""
    return bool(old.pending and old.flags & IS_HELD)


def _write_over(
    writer: Writer,
    info: CollectionInfo,
    entity_id: bytes,
    payload: bytes | None,
    old: EntityRow,
    sequence: int,
    timestamp: int,
    flags: int,
) -> int:
    """Show ``payload`` as pending over ``old``; returns the pending transaction below it, or 0."""
    ref, version, previous = (info.number, entity_id), old.version, old.pending
    if previous:
        flags |= old.flags & HAS_BASE
    elif version and old.payload is not None:
        writer.put_base(ref, BaseRow(version, old.device_id, old.timestamp, old.payload))
        flags |= HAS_BASE
    row = EntityRow(flags, 0, version, writer.device_id, timestamp, sequence, payload)
    writer.show(ref, row, old, sequence)
    return previous


def _commit_on_device(
    writer: Writer, work: Work, sequence: int, transaction_id: bytes, timestamp: int
) -> None:
    operations = []
    held, absent, state = False, {}, None
    for info, _, _, old in work:
        if old is None:
            state = state or writer.sync_state
            absent[info.name] = state.base_version_of_absent(info.name)
        elif info.synced and _is_held(old):
            held = True
    for info, entity_id, payload, old in work:
        if info.synced and old is None and not held and payload is not None:
            # A new entity beside others: its row and its place in the feed, without objects.
            writer.add_entity(info, entity_id, payload, sequence, timestamp, absent[info.name])
            operations.append(PendingOp(info.number, entity_id, 0, payload))
            continue
        ref = (info.number, entity_id)
        if not info.synced:
            row = EntityRow(0, 0, 0, writer.device_id, timestamp, 0, payload)
            writer.show(ref, row, old, sequence)
            continue
        flags, previous = IS_HELD if held else 0, 0
        if old is None:
            version = absent[info.name]
            row = EntityRow(flags, 0, version, writer.device_id, timestamp, sequence, payload)
            writer.show(ref, row, None, sequence)
        else:
            place = info, entity_id, payload, old
            previous = _write_over(writer, *place, sequence, timestamp, flags)
        operations.append(PendingOp(info.number, entity_id, previous, payload))
    if operations:
        made = PendingTransaction(sequence, transaction_id, timestamp, operations, held)
        writer.put_pending(made)
        if held:
            writer.head.held += 1
            return
        writer.head.ready += 1
        if writer.marks and writer.head.ready == 1:
            writer.mark(sequence)

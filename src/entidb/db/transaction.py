"""Local transactions: what a program's writes become when they are committed (R1).

``Transaction`` is what programs hold; ``commit_local`` turns its writes into rows. On a device
that is entities, their bases, one outbox row and the feed; on a server the same without an outbox,
the commit sequence being the version (R11).
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from entidb import cbor
from entidb.db.catalogue import CollectionInfo
from entidb.db.codec import codec_for
from entidb.db.collection import Collection, TransactionCollection
from entidb.db.notebook import Explored
from entidb.db.pending import PendingOp, PendingTransaction, encode_creation
from entidb.db.plain import ValueCodec
from entidb.db.reading import OnInvalid, Upgrade
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
from entidb.db.rows import OverlayRows, Rows
from entidb.db.writer import Writer
from entidb.errors import TransactionError, TransactionTooLargeError
from entidb.storage.turns import EndOfBlock, Turn, enter_block
from entidb.types import (
    OPERATION_OVERHEAD_BYTES,
    TRANSACTION_COLLECTIONS_MAX,
    TRANSACTION_CONTAINERS_MAX,
    check_name,
)

V = TypeVar("V")

Writes = dict[str, dict[bytes, bytes | None]]


class Role(Enum):
    """What a database is, for life."""

    #: Keeps an outbox; its changes become versions when a server accepted them.
    DEVICE = "device"
    #: Authoritative: its commit sequence is the version (R11).
    SERVER = "server"


class _State(Enum):
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


#: Looking a member up in its enum at every write would cost as much as the write.
_OPEN: Final = _State.OPEN


class Transaction(Explored):
    """Writes that become durable, and visible, together or not at all.

    Made by ``Database.transaction()``; as a context manager it commits when the block ends and
    aborts when it raises. Reads inside it see its own writes on one snapshot. It holds the
    database's writer lock, so keep it short. ``id`` names it on its whole way (R3); ``sequence``
    is the commit sequence once committed, 0 when there was nothing to write.
    """

    plumbing = frozenset(("transaction_id", "with_codec", "writes"))

    def __init__(
        self,
        transaction_id: bytes,
        rows: Rows,
        turn: Turn,
        commit: Callable[[Transaction], int],
        release: Callable[[Transaction], None],
        new_id: Callable[[], bytes],
    ) -> None:
        self.transaction_id = transaction_id
        self.writes: Writes = {}
        self.sequence = 0
        self._rows = OverlayRows(rows, self.writes)
        self._turn = turn
        self._leaving: weakref.ref[Any] | None = None
        self._commit = commit
        self._release = release
        self._new_id = new_id
        self._state = _State.OPEN

    @property
    def id(self) -> uuid.UUID:
        """What names it on its whole way (R3)."""
        return uuid.UUID(bytes=self.transaction_id)

    @overload
    def collection(
        self, name: str, *, on_invalid: OnInvalid = "raise", upgrade: Upgrade | None = None
    ) -> TransactionCollection[Any]: ...

    @overload
    def collection(
        self,
        name: str,
        type: type[V],
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> TransactionCollection[V]: ...

    def collection(
        self,
        name: str,
        type: type[Any] | None = None,
        *,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
    ) -> TransactionCollection[Any]:
        """The collection ``name`` inside this transaction; all else as in ``Database.collection``.
        ``tx[notes]`` takes it over from ``notes``. Raises ``InvalidNameError``,
        ``ValueTypeError``, ``ConfigError``."""
        codec = codec_for(type, exact=exact, on_invalid=on_invalid, upgrade=upgrade)
        return self.with_codec(name, codec)

    def with_codec(self, name: str, codec: ValueCodec[V]) -> TransactionCollection[V]:
        """As ``collection``, for what has a codec already."""
        self._check_open()
        check_name(name)
        return TransactionCollection(
            name, codec, self._open_rows, self._stored, self._stage, self._new_id
        )

    @overload
    def __getitem__(self, name: str) -> TransactionCollection[Any]: ...

    @overload
    def __getitem__(self, name: Collection[V]) -> TransactionCollection[V]: ...

    def __getitem__(self, name: str | Collection[Any]) -> TransactionCollection[Any]:
        """``tx["notes"]``; or ``tx[notes]``, the collection of a database with its type."""
        if isinstance(name, Collection):
            return self.with_codec(name.name, name._codec)
        return self.collection(name)

    def commit(self) -> int:
        """Make everything durable and return the commit sequence.

        Raises ``TransactionTooLargeError`` and storage errors; nothing is changed then, and the
        transaction is over."""
        self._check_open()
        try:
            self._state = _State.ABORTED
            self.sequence = self._commit(self)
            self._state = _State.COMMITTED
            self._release(self)
        except BaseException:
            # Not ``finally``: an interrupt on the way into it would skip it.
            self._release(self)
            raise
        return self.sequence

    def abort(self) -> None:
        """Forget all writes. Does nothing on a transaction that is over."""
        if self._state is not _State.OPEN:
            return
        try:
            self._state = _State.ABORTED
            self._release(self)
        except BaseException:
            self._release(self)
            raise

    def __enter__(self) -> Transaction:
        enter_block(self._turn, self._leaving)
        return self

    if TYPE_CHECKING:

        def __exit__(self, kind: object, *rest: object) -> None: ...

    else:
        __exit__ = EndOfBlock()

    def _leave(self, kind: object, *rest: object) -> None:
        if self._state is not _State.OPEN:
            return
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _stage(self, name: str, entity_id: bytes, payload: bytes | None) -> None:
        if self._state is not _OPEN:
            self._check_open()
        mine = self.writes.get(name)
        if mine is None:
            mine = self.writes[name] = {}
        mine[entity_id] = payload

    def _stored(self, name: str, entity_id: bytes) -> bytes | None:
        if self._state is not _OPEN:
            self._check_open()
        return self._rows.get(name, entity_id)

    @contextmanager
    def _open_rows(self) -> Iterator[Rows]:
        self._check_open()
        yield self._rows

    def _check_open(self) -> None:
        if self._state is not _State.OPEN:
            raise TransactionError(
                f"this transaction is over ({self._state.value}); begin another with "
                "`with db.transaction() as tx:`"
            )


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
    writer: Writer, role: Role, writes: Writes, transaction_id: bytes, timestamp: int
) -> int:
    """Stage ``writes`` as one local transaction; returns its sequence, 0 if nothing changes.

    Deleting what is not there changes nothing and leaves no trace."""
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
    sequence = writer.next_sequence()
    if role is Role.SERVER:
        for info, entity_id, payload, old in work:
            row = EntityRow(REMOTE, 0, sequence, writer.device_id, timestamp, 0, payload)
            writer.show((info.number, entity_id), row, old, sequence)
        return sequence
    _commit_on_device(writer, work, sequence, transaction_id, timestamp)
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
        row = encode_creation(transaction_id, timestamp, operations)
        writer.put(sequence_key(READY, sequence), row)
        writer.head.ready += 1


Work = list[tuple[CollectionInfo, bytes, bytes | None, EntityRow | None]]


def _commit_on_device(
    writer: Writer, work: Work, sequence: int, transaction_id: bytes, timestamp: int
) -> None:
    held = any(
        info.synced and old is not None and old.pending and old.flags & IS_HELD
        for info, _, _, old in work
    )
    state = writer.sync_state
    operations = []
    absent = {
        info.name: state.base_version_of_absent(info.name)
        for info, _, _, old in work
        if old is None
    }
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
        flags, version, previous = IS_HELD if held else 0, 0, 0
        if old is None:
            version = absent[info.name]
        elif old.pending:
            flags |= old.flags & HAS_BASE
            version, previous = old.version, old.pending
        else:
            version = old.version
            if version and old.payload is not None:
                base = BaseRow(version, old.device_id, old.timestamp, old.payload)
                writer.put_base(ref, base)
                flags |= HAS_BASE
        operations.append(PendingOp(info.number, entity_id, previous, payload))
        row = EntityRow(flags, 0, version, writer.device_id, timestamp, sequence, payload)
        writer.show(ref, row, old, sequence)
    if operations:
        made = PendingTransaction(sequence, transaction_id, timestamp, operations, held)
        writer.put_pending(made)
        if held:
            writer.head.held += 1
        else:
            writer.head.ready += 1

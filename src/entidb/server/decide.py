"""One push decided: a verdict for each transaction, in order (R12 to R15).

The plain way decides one transaction after the other; where a push can be accepted as a whole it is
decided in columns, which gives the same verdicts and the same rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import lt
from typing import Any, Final, cast

from msgspec import Struct
from msgspec.structs import replace

from entidb import cbor
from entidb.db.catalogue import Catalogue, CollectionInfo
from entidb.db.records import (
    decode_accepted,
    payload_of,
    timestamp_of,
    version_of,
    versions_of,
)
from entidb.db.writer import Writer
from entidb.errors import CborDecodeError, InvalidNameError
from entidb.protocol import (
    PushOperation,
    PushRequest,
    PushResult,
    PushTransaction,
    ServerState,
    Verdict,
    digest_heads,
    digest_operations,
    digest_stored_newer,
    digests_of_single,
    payload_bytes,
    transaction_bytes,
)
from entidb.server.fullness import Fullness
from entidb.server.hooks import (
    Grant,
    Refusal,
    ValidateContext,
    ValidateHook,
    ValidateOperation,
    ValidateTransaction,
    sendable,
)
from entidb.server.unique import is_asked, refused
from entidb.server.work import Fault
from entidb.types import (
    COLLECTIONS_MAX,
    TRANSACTION_COLLECTIONS_MAX,
    check_name,
    timestamp_from_ms,
    uuid_from_bytes,
)
from entidb.types import OPERATION_OVERHEAD_BYTES as _COUNTED_OVERHEAD_BYTES

_log = logging.getLogger("entidb.server")

#: The plain number: looking a member up in its enum for every transaction costs more.
_ACCEPTED: Final = int(Verdict.ACCEPTED)
#: States sent along with a conflict are a courtesy; the pull that follows brings everything.
CONFLICT_STATES_MAX = 16
#: Transactions that are decided in columns if they can be; fewer are faster one by one.
_COLUMNS_FROM = 4


class Checked(Struct, frozen=True):
    """What was found in a push before it is decided: each payload's value, if somebody will look
    at them, and what is wrong with its transactions, by their ids."""

    values: list[list[Any]]
    faults: dict[bytes, Fault]
    #: What is stored in the place of what was pushed, by transaction, for each operation (R33).
    upcast: dict[bytes, list[bytes | None]]


NOTHING_CHECKED: Final = Checked([], {}, {})


def value_of(payload: bytes) -> tuple[Any, str | None]:
    """The value of a payload, or what is wrong with it."""
    try:
        value = cbor.check(payload)
    except CborDecodeError as error:
        return None, f"is not canonical: {error}"
    if value is None:
        return None, "is null; a deletion has no payload"
    return value, None


class Rules(Struct, frozen=True):
    """What is the same for all pushes to a database."""

    db_id: str
    transaction_bytes_max: int
    hook: ValidateHook | None
    fullness: Fullness | None = None


class Deciding:
    """The verdicts of one push, against a writer that has the earlier members of its group."""

    def __init__(
        self,
        rules: Rules,
        writer: Writer,
        request: PushRequest,
        grant: Grant,
        floor: int,
        checked: Checked,
    ) -> None:
        self._rules = rules
        self._writer = writer
        self._request = request
        self._grant = grant
        self._faults: Mapping[bytes, Fault] = checked.faults
        self._upcast = checked.upcast
        self._digest_heads = digest_heads(request.collections)
        self._below_floor = request.cursor < floor
        self._infos = self._collections()
        #: Versions written by earlier transactions of this batch (R13): those above what was the
        #: head when it began, and those of transactions that were accepted before.
        self._began_at = writer.head.sequence
        self._written: dict[bytes, int] = {}
        #: Entities that refused transactions of this batch touched (R13).
        self._refused: set[bytes] = set()
        self._timestamp_max = timestamp_from_ms(writer.now_ms) | 0xFFFF
        self._device_id = request.device_id
        #: What is stored of each entity that the push writes to, by its key.
        self._states: dict[bytes, bytes | None] = {}
        self._validates = rules.hook is not None
        self._bytes_max = rules.transaction_bytes_max
        #: Some collection of the request has something that is unique.
        self._asks = len(writer.catalogue.indexes.each) > 0 and is_asked(self._infos)
        self._room = None if rules.fullness is None else rules.fullness.room(writer)
        self._many_names = len(request.collections) > TRANSACTION_COLLECTIONS_MAX

    def _collections(self) -> list[CollectionInfo | None]:
        """The collection of each name; None where nothing can be written, and then
        ``_closed`` says why."""
        present, names = self._writer.catalogue, self._request.collections
        #: What is wrong with writing to a collection, by its place in the request.
        self._closed: dict[int, Fault] = {}
        for index, name in enumerate(names):
            fault = self._closed_to(name)
            if fault is not None:
                self._closed[index] = fault
        catalogue = present
        missing = [i for i, name in enumerate(names) if name not in present.by_name]
        if missing:
            # Only what is written to: a name alone makes no collection.
            used = {op.collection for t in self._request.transactions for op in t.operations}
            wanted = [i for i in missing if i in used and i not in self._closed]
            catalogue = present.adding_all(names[i] for i in wanted)
        found: list[CollectionInfo | None] = []
        for index, name in enumerate(names):
            info = None if index in self._closed else catalogue.by_name.get(name)
            if info is None and index not in self._closed:
                self._closed[index] = _no_room_for(name)
            found.append(info)
        # New collections come to be with the first transaction that is accepted, not before.
        self._planned: Catalogue | None = None if catalogue is present else catalogue
        return found

    def _closed_to(self, name: str) -> Fault | None:
        grant = self._grant
        if not grant.write:
            return "forbidden", f"this token may not write database {self._rules.db_id!r}"
        info = self._writer.catalogue.by_name.get(name)
        if info is None:
            try:
                check_name(name)
            except InvalidNameError as error:
                return "invalid_name", str(error)
        if grant.collections is not None and name not in grant.collections:
            return "forbidden", f"this token may not write collection {name!r}"
        if info is not None and not info.synced:
            # A collection that is local on the server is for no device (R31).
            return "forbidden", f"this token may not write collection {name!r}"
        return None

    def run(self, values: list[list[Any]]) -> list[PushResult]:
        """The verdicts in order; ``values`` is empty where no hook will see them."""
        writer, transactions = self._writer, self._request.transactions
        ids = [t.transaction_id for t in transactions]
        known = writer.accepted(ids)
        count = len(transactions)
        if count >= _COLUMNS_FROM and known.count(None) == count:
            results = self._accept_all(ids)
            if results is not None:
                return results
        prefixes = [None if info is None else info.prefix for info in self._infos]
        keys: list[list[bytes | None]] = [
            [
                None if (prefix := prefixes[op.collection]) is None else prefix + op.entity_id
                for op in t.operations
            ]
            for t in transactions
        ]
        if not self._states:
            real = [key for each in keys for key in each if key is not None]
            self._states = dict(zip(real, writer.get_many(real), strict=True))
        # Only a batch of that size can hold a transaction that is too large.
        size = payload_bytes(self._request) + _COUNTED_OVERHEAD_BYTES * sum(map(len, keys))
        self._may_be_large = size > self._bytes_max
        return list(map(self._one, transactions, keys, known, values or repeat(())))

    def _accept_all(self, transaction_ids: list[bytes]) -> list[PushResult] | None:
        """What ``_one`` says to each transaction of a batch as most are, in columns: unknown
        transactions of one write, no entity twice, each built on what is here. None if it is not
        like that; then nothing has changed."""
        if self._validates or self._below_floor or self._faults or self._upcast or self._asks:
            return None
        transactions = self._request.transactions
        each = [transaction.operations for transaction in transactions]
        count = len(each)
        if set(map(len, each)) != {1}:
            return None
        operations = [operations[0] for operations in each]
        payloads = [operation.payload for operation in operations]
        if None in payloads:
            return None
        stored = cast("list[bytes]", payloads)
        places = [operation.collection for operation in operations]
        if not self._closed.keys().isdisjoint(places):
            return None
        if sum(map(len, stored)) + _COUNTED_OVERHEAD_BYTES * count > self._bytes_max:
            return None
        ids = [operation.entity_id for operation in operations]
        infos = cast("list[CollectionInfo]", self._infos)
        keys = [
            infos[place].prefix + entity_id for place, entity_id in zip(places, ids, strict=True)
        ]
        if not count == len(set(keys)) == len(set(transaction_ids)):
            return None
        rows = self._writer.get_many(keys)
        # Whoever decides one by one needs them as well.
        self._states = dict(zip(keys, rows, strict=True))
        replaced = [(op, row) for op, row in zip(operations, rows, strict=True) if row is not None]
        if replaced:
            bases = [operation.base_version for operation, _ in replaced]
            if any(map(lt, bases, versions_of([row for _, row in replaced]))):
                return None
        if self._room is not None and not self._room.take_each(zip(payloads, rows, strict=True)):
            return None
        if self._planned is not None:
            self._make_collections(self._planned)
        writer, head, latest = self._writer, self._writer.head, self._timestamp_max
        versions = range(head.sequence + 1, head.sequence + 1 + count)
        head.sequence += count
        sent = [transaction.timestamp for transaction in transactions]
        stamps = [stamp if stamp <= latest else latest for stamp in sent]
        head.timestamp = max(head.timestamp, *stamps)
        into = [infos[place] for place in places]
        writer.accept_all(into, ids, rows, stored, versions, self._device_id, stamps)
        digests = digests_of_single(self._digest_heads, places, ids, stored)
        writer.put_all_accepted(transaction_ids, versions, digests)
        clamped = [0 if a == b else a for a, b in zip(stamps, sent, strict=True)]
        return list(map(PushResult, repeat(_ACCEPTED), versions, clamped))

    def _one(
        self,
        transaction: PushTransaction,
        keys: list[bytes | None],
        known: bytes | None,
        values: Sequence[Any],
    ) -> PushResult:
        digest = digest_operations(self._digest_heads, transaction.operations)
        if known is not None:
            return self._known(transaction, known, digest, keys)
        identity = transaction.transaction_id
        if None in keys or identity in self._faults:
            place = next(
                (op.collection for op in transaction.operations if op.collection in self._closed),
                None,
            )
            fault = self._faults[identity] if place is None else self._closed[place]
            return self._refuse([key for key in keys if key is not None], *fault)
        places = cast("list[bytes]", keys)
        if self._below_floor or self._conflicts(transaction, places):
            self._refused.update(places)
            return PushResult(Verdict.CONFLICT, states=self._server_states(transaction, places))
        if (
            self._may_be_large
            and (size := transaction_bytes(transaction.operations)) > self._bytes_max
        ):
            return self._refuse(
                places,
                "too_large",
                f"it is {size} bytes, this server accepts {self._bytes_max} "
                "(transaction_bytes_max)",
            )
        if self._many_names:
            names = len({op.collection for op in transaction.operations})
            if names > TRANSACTION_COLLECTIONS_MAX:
                most = TRANSACTION_COLLECTIONS_MAX
                said = f"it writes to {names} collections, a transaction may to {most}"
                return self._refuse(places, "too_large", said)
        if self._validates:
            refusal = self._ask(self._described(transaction, values))
            if refusal is not None:
                return self._refuse(places, refusal.code, refusal.message)
        newest = self._upcast.get(identity)
        if self._asks:
            taken = refused(self._writer, self._infos, self._grant.read, transaction, newest)
            if taken is not None:
                self._refused.update(places)
                return taken
        if self._room is not None:
            payloads = newest or [op.payload for op in transaction.operations]
            stored = [self._states[place] for place in places]
            quota = self._room.take(zip(payloads, stored, strict=True))
            if quota is not None and self._rules.fullness is not None:
                return self._refuse(places, *self._rules.fullness.fault(quota))
        if newest is None:
            return self._accept(transaction, places, digest)
        newer = digest_stored_newer(digest)
        accepted = self._accept(_with_payloads(transaction, newest), places, newer)
        return replace(accepted, states=_stored_instead(transaction, newest, accepted.version))

    def _ask(self, transaction: ValidateTransaction) -> Refusal | None:
        """What the hook says; a hook that raises refuses, because a push that can never be
        answered would stop everything behind it (NO-POISON)."""
        hook, writer = self._rules.hook, self._writer
        assert hook is not None, "asked only where there is a hook"

        def read(collection: str, entity_id: bytes) -> bytes | None:
            info = writer.catalogue.by_name.get(collection)
            raw = None if info is None else writer.get(info.prefix + entity_id)
            return None if raw is None else payload_of(raw)

        try:
            refusal = hook(ValidateContext(self._rules.db_id, self._grant, read), transaction)
            return None if refusal is None else sendable(refusal)
        except (Exception, SystemExit, GeneratorExit):  # which would end the thread that commits
            # The operator gets the traceback; what a hook says inside is not for devices.
            _log.exception("validate refused transaction %s by raising", transaction.transaction_id)
            return Refusal(
                "validate_failed", "the server's validate hook failed on this transaction"
            )

    def _known(
        self,
        transaction: PushTransaction,
        known: bytes,
        digest: bytes,
        keys: list[bytes | None],
    ) -> PushResult:
        """R14: decided once, for good."""
        version, accepted_digest = decode_accepted(known)
        raws = [
            # Accepted under another token; what was clamped is the device's own (R31).
            self._ungranted(op) if key is None else self._states[key]
            for op, key in zip(transaction.operations, keys, strict=True)
        ]
        same, states = digest == accepted_digest, list[ServerState]()
        if not same and digest_stored_newer(digest) == accepted_digest:
            # What was stored then can be answered for as long as nothing has replaced it (R33).
            same = all(raw is not None and version_of(raw) == version for raw in raws)
            stored = [None if raw is None else payload_of(raw) for raw in raws]
            states = _stored_instead(transaction, stored, version)
        if not same:
            # What this batch builds on it was built on content that is not on the server (R13).
            self._refused.update(key for key in keys if key is not None)
            return PushResult(Verdict.SUPERSEDED, version)
        clamped = 0
        for key, raw in zip(keys, raws, strict=True):
            if key is not None:
                self._written[key] = version
            if raw is not None and version_of(raw) == version:
                # The same answer as the first time, what was clamped then (R27) included.
                stamp = timestamp_of(raw)
                clamped = stamp if stamp != transaction.timestamp else 0
        return PushResult(Verdict.ACCEPTED, version, clamped, states)

    def _ungranted(self, op: PushOperation) -> bytes | None:
        info = self._writer.catalogue.by_name.get(self._request.collections[op.collection])
        return None if info is None else self._writer.get(info.prefix + op.entity_id)

    def _conflicts(self, transaction: PushTransaction, places: list[bytes]) -> bool:
        states, refused = self._states, self._refused
        for op, key in zip(transaction.operations, places, strict=True):
            if refused and key in refused:
                return True
            raw = states[key]
            if raw is not None:
                version = version_of(raw)
                if version > op.base_version and not self._wrote(key, version):
                    return True
        return False

    def _wrote(self, key: bytes, version: int) -> bool:
        return version > self._began_at or self._written.get(key) == version

    def _refuse(self, places: list[bytes], code: str, message: str) -> PushResult:
        self._refused.update(places)
        return PushResult(Verdict.REJECTED, code=code, message=message)

    def _server_states(
        self, transaction: PushTransaction, places: list[bytes]
    ) -> list[ServerState]:
        if not self._grant.read:
            # A token that only writes learns that it is late, and not what others wrote.
            return []
        found = []
        pairs = zip(transaction.operations, places, strict=True)
        for op, key in list(pairs)[:CONFLICT_STATES_MAX]:
            raw = self._states[key]
            version = 0 if raw is None else version_of(raw)
            payload = None if raw is None else payload_of(raw)
            found.append(ServerState(op.collection, op.entity_id, version, payload))
        return found

    def _described(
        self, transaction: PushTransaction, values: Sequence[Any]
    ) -> ValidateTransaction:
        names = self._request.collections
        return ValidateTransaction(
            uuid_from_bytes(transaction.transaction_id),
            self._request.device_id,
            transaction.timestamp,
            [
                ValidateOperation(names[op.collection], uuid_from_bytes(op.entity_id), value)
                for op, value in zip(transaction.operations, values, strict=True)
            ],
        )

    def _make_collections(self, planned: Catalogue) -> None:
        self._writer.set_catalogue(planned)
        self._planned = None

    def _accept(
        self, transaction: PushTransaction, places: list[bytes], digest: bytes
    ) -> PushResult:
        writer = self._writer
        if self._planned is not None:
            self._make_collections(self._planned)
        states = self._states
        version = writer.next_sequence()
        stamp = transaction.timestamp
        if stamp > self._timestamp_max:
            stamp = self._timestamp_max
        if stamp > writer.head.timestamp:
            writer.head.timestamp = stamp
        for op, key in zip(transaction.operations, places, strict=True):
            info = self._infos[op.collection]
            assert info is not None
            states[key] = writer.accept(
                info, op.entity_id, states[key], op.payload, version, self._device_id, stamp
            )
        writer.put_accepted(transaction.transaction_id, version, digest)
        return PushResult(_ACCEPTED, version, stamp if stamp != transaction.timestamp else 0)


def _with_payloads(
    transaction: PushTransaction, payloads: Sequence[bytes | None]
) -> PushTransaction:
    pairs = zip(transaction.operations, payloads, strict=True)
    return replace(transaction, operations=[replace(op, payload=made) for op, made in pairs])


def _stored_instead(
    transaction: PushTransaction, payloads: Sequence[bytes | None], version: int
) -> list[ServerState]:
    """What the answer has to say: the device would believe that its own bytes are here (R33)."""
    pairs = zip(transaction.operations, payloads, strict=True)
    return [
        ServerState(op.collection, op.entity_id, version, made)
        for op, made in pairs
        if made is not None and made != op.payload
    ]


def _no_room_for(name: str) -> Fault:
    return (
        "too_many_collections",
        f"collection {name!r} does not fit: this database holds {COLLECTIONS_MAX} collections. "
        "Use a field of the entity instead",
    )

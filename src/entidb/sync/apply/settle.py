"""The verdicts of one answer, checked, and applied in one commit (R18).

An answer as most are goes in columns (``Settling._settle_all``), a transaction as most are without
objects (``_settle_newest``); what either leaves alone goes through ``rebase``, whose outcome is
the law for both.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from msgspec.structs import replace

from entidb import cbor
from entidb.db import machine
from entidb.db.pending import PendingOp
from entidb.db.records import (
    sequence_of,
)
from entidb.db.replica import HAVE_RANGES_MAX, add_to_ranges
from entidb.db.writer import Ref, Writer
from entidb.errors import ProtocolError, SyncCodecError
from entidb.protocol import PushResponse, PushResult, ServerState, Verdict
from entidb.sync.apply.conflict_rows import lost_to_holder
from entidb.sync.apply.position import seen_in
from entidb.sync.apply.rebase import Rebase
from entidb.sync.apply.seam import PushBatch, Settled

#: What is kept of a server's words for a refusal.
CODE_CHARS_MAX = 100
MESSAGE_CHARS_MAX = 1000
#: Entities that are kept as what a refused transaction lost to.
HOLDERS_MAX = 1
# Plain numbers: looking a member up in its enum for every transaction costs more than the rest.
_ACCEPTED, _SUPERSEDED, _CONFLICT = (
    int(verdict) for verdict in (Verdict.ACCEPTED, Verdict.SUPERSEDED, Verdict.CONFLICT)
)


_states_of = attrgetter("states")


def check_verdicts(response: PushResponse) -> None:
    """What cannot be true of verdicts, before anything is touched: a transaction leaves the
    outbox for a version of its own that the server's head covers (R12), or not at all. Raises
    ``ProtocolError``."""
    results, head = response.results, response.head
    versions = [result.version for result in results if result.verdict <= _SUPERSEDED]
    if versions and not 0 < min(versions) <= max(versions) <= head:
        worst = min(versions) if min(versions) <= 0 else max(versions)
        raise ProtocolError(
            f"the server says a transaction was accepted as version {worst}, with its head at "
            f"{head}; nothing was settled"
        )
    if any(map(_states_of, results)):
        _check_stored_instead(results)
    if len(set(versions)) != len(versions):
        raise ProtocolError(
            "the server says of two transactions that they were accepted as the same version; "
            "nothing was settled"
        )


def _check_stored_instead(results: list[PushResult]) -> None:
    """What enters the database with these verdicts is canonical (R33)."""
    payloads = [
        state.payload
        for result in results
        if result.verdict == _ACCEPTED
        for state in result.states
        if state.payload is not None
    ]
    if not cbor.all_pass(payloads):
        raise SyncCodecError(
            "what the server says it has stored instead is not canonical; nothing was settled"
        )


class Settling:
    """The verdicts of one answer, applied within one commit (R18). ``rebase_in`` makes a rebase in
    that commit, by the server's clock."""

    def __init__(
        self, writer: Writer, rebase_in: Callable[[Writer, int], Rebase], response: PushResponse
    ) -> None:
        self._writer = writer
        self._response = response
        self._rebase_in = rebase_in
        self._state = writer.sync_state
        self._have = list(map(list, self._state.have))
        self._seen = seen_in(self._state, response)
        self._settled = Settled()

    def run(self, batch: PushBatch, fresh: bool) -> Settled:
        """``fresh`` says that the rows in the batch are still the entities' own."""
        settled = self._settled
        if not fresh:
            # No row at all is for ``_settle_newest`` to leave alone.
            found = self._writer.get_many(batch.entity_keys)
            batch.entity_rows = [row or b"" for row in found]
        elif self._settle_all(batch):
            self._store_have(batch)
            return settled
        self._rebase = self._rebase_in(self._writer, self._response.time)
        settled.report = self._rebase.report
        at = 0
        results = self._response.results
        for index, (count, result) in enumerate(zip(batch.counts, results, strict=True)):
            place = at
            at += count
            verdict = result.verdict
            if verdict == _ACCEPTED:
                self._accepted(batch, index, place, result)
                settled.accepted += 1
                settled.accepted_operations += count
                continue
            current = self._rebase.load(sequence_of(batch.keys[index]))
            if current is None:
                continue  # withdrawn a moment ago, with the transaction it was built on
            if verdict == _SUPERSEDED:
                if self._rebase.settle_superseded(current):
                    settled.superseded += 1
                else:
                    settled.conflicts += 1
                settled.pull = True
            elif verdict == _CONFLICT:
                settled.conflicts += 1
                settled.pull = True
            else:
                # Every transaction built on this one keeps a copy of these.
                code = result.code[:CODE_CHARS_MAX] or "rejected"
                message = result.message[:MESSAGE_CHARS_MAX] or "refused by the server"
                self._rebase.withdraw([current], code, message, self._holders(result.states))
                settled.rejected += 1
        self._rebase.release()
        self._store_have(batch)
        return settled

    def _settle_all(self, batch: PushBatch) -> bool:
        """What ``run`` does with an answer as most are, in columns: every transaction is accepted
        and has one operation, on an entity where it is the only pending one. False if it is not
        like that; then nothing has changed."""
        results, keys = self._response.results, batch.entity_keys
        if batch.chained or {result.verdict for result in results} != {_ACCEPTED}:
            return False
        if any(map(_states_of, results)):
            return False
        versions = [result.version for result in results]
        if min(versions) <= self._state.cursor:
            return False
        stamps = [result.timestamp for result in results]
        cleaned = self._writer.clean_all(
            batch.numbers, keys, batch.entity_rows, batch.sequences, versions, stamps
        )
        if not cleaned:
            return False
        self._writer.delete_many(batch.keys)
        for version in versions:
            add_to_ranges(self._have, version)
        self._writer.head.ready -= len(keys)
        self._settled.accepted += len(keys)
        self._settled.accepted_operations += len(keys)
        return True

    def _accepted(self, batch: PushBatch, index: int, place: int, result: PushResult) -> None:
        cursor, version, timestamp = self._state.cursor, result.version, result.timestamp
        if (
            version > cursor
            and not result.states
            and self._settle_newest(batch, index, place, version, timestamp)
        ):
            add_to_ranges(self._have, version)
            return
        transaction = batch.pending(index)
        current = self._rebase.load(transaction.sequence)
        if current is None or _writes(self._rebase.operations(current)) != _writes(
            transaction.operations
        ):
            # An earlier verdict of this answer withdrew or merged it here, while a copy of this
            # device had it accepted as it was (R30): only a pull can bring what was accepted.
            self._settled.pull = True
            if current is not None:
                self._rebase.settle_superseded(current)
            return
        if version > cursor:
            add_to_ranges(self._have, version)
        stamp = timestamp or transaction.timestamp
        instead = self._instead(result.states) if result.states else {}
        self._rebase.settle_accepted(current, version, stamp, cursor, instead)

    def _holders(self, states: list[ServerState]) -> list[list[Any]]:
        """What a refused transaction lost to, where the server says so (``not_unique``). It is for
        people to read, so what cannot be read is left out."""
        names = self._response.collections
        return [
            lost_to_holder(names[state.collection], state.entity_id, state.version, state.payload)
            for state in states[:HOLDERS_MAX]
            if state.payload is not None and cbor.all_pass([state.payload])
        ]

    def _instead(self, states: list[ServerState]) -> dict[Ref, bytes]:
        """What the server stored in the place of what this device wrote (R33)."""
        names, by_name = self._response.collections, self._writer.catalogue.by_name
        return {
            (by_name[names[state.collection]].number, state.entity_id): state.payload
            for state in states
            if state.payload is not None and names[state.collection] in by_name
        }

    def _settle_newest(
        self, batch: PushBatch, index: int, place: int, version: int, timestamp: int
    ) -> bool:
        """The common case, without objects: every entity has this transaction as its only pending
        one and a base that is older. Its rows then just become clean, in place."""
        outbox_key = batch.keys[index]
        sequence = sequence_of(outbox_key)
        if index in batch.chained and any(
            op.previous and self._rebase.load(op.previous) is not None
            for op in batch.pending(index).operations
        ):
            return False
        part = slice(place, place + batch.counts[index])
        numbers, keys, rows = batch.numbers[part], batch.entity_keys[part], batch.entity_rows[part]
        if not self._writer.clean(numbers, keys, rows, sequence, version, timestamp):
            return False
        self._writer.delete(outbox_key)
        self._writer.head.ready -= 1
        self._rebase.forget(sequence)
        return True

    def _store_have(self, batch: PushBatch) -> None:
        state, move = self._state, machine.STAND
        if self._have != state.have:
            # Too many ranges only mean that some own changes come back and are skipped (R21).
            state = replace(state, have=self._have[-HAVE_RANGES_MAX:], seen=self._seen)
        if state.granted is not None and self._settled.accepted:
            # Accepted under a token that was wider for a moment: nothing else will come of these,
            # so what is there goes with the next look at the grant (R31).
            strange = {name for name in batch.collections if not state.grants(name)}
            if strange:
                state = replace(state, uncovered=sorted(strange.union(state.uncovered)))
                move = machine.UNCOVER
        if state is not self._state:
            self._writer.set_sync_state(move(self._state, state))


def _writes(operations: list[PendingOp]) -> list[tuple[int, bytes, bytes | None]]:
    return [(op.collection, op.entity_id, op.payload) for op in operations]

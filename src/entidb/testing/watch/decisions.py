"""NO-SILENT-LOSS: what was decided against in a commit is kept in it (R4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from entidb import cbor
from entidb.db.records import (
    conflict_key,
    payload_of,
)
from entidb.protocol import Verdict
from entidb.storage.base import Batch
from entidb.sync import Action, Conflict, ConflictResolution
from entidb.sync.apply.conflict_rows import decode_conflict
from entidb.testing.oracle import Ref
from entidb.testing.watch.commits import DeviceCommit
from entidb.testing.watch.model import (
    DeviceModel,
    Question,
)


def check_losers(
    watch: DeviceModel, commit: DeviceCommit, batch: Batch, old: Mapping[bytes, bytes | None]
) -> None:
    """R4: what was decided against in this commit is kept in it."""
    added = watch.losers.on_commit(batch, old)
    by_person = _decided_by_person(watch, commit, old)
    watch.losers.check_undecided([*watch.questions, *by_person], added)
    for ref, asked in {**watch.questions, **by_person}.items():
        if ref in watch.open_conflicts:
            continue
        info = watch.catalogue.by_name[ref[0]]
        raw = commit.records.get(info.prefix + ref[1])
        discarded = _discarded_payloads(commit, ref)
        outcomes = [(asked[0][0], None if raw is None else payload_of(raw))]
        if len(asked) > 1 and asked[0][1].action is Action.MERGE:
            # The steps of a chain, each decided on what the one before it became (R25): the
            # first question was about the newest and decided nothing but that. Where some are
            # withdrawn after all, nobody knows which question was about what is left.
            steps = [] if discarded else _steps(asked[1:])
            outcomes = [(c, outcome_of(c, a)) for c, a in steps]
        for conflict, outcome in outcomes:
            watch.losers.check(
                conflict,
                outcome,
                added.get(ref, ()),
                discarded,
                combines=ref not in by_person,
                accepted=_accepted_in(watch, commit, (info.number, ref[1])),
            )


def _decided_by_person(
    watch: DeviceModel, commit: DeviceCommit, old: Mapping[bytes, bytes | None]
) -> dict[Ref, list[Question]]:
    found = {}
    for name, entity_id in watch.by_person:
        info = watch.catalogue.by_name[name]
        raw = old.get(conflict_key(info.number, entity_id))
        if raw is None:
            continue
        entity = info.prefix + entity_id
        # Where the view does not change, its row need not be in the commit either.
        was = old[entity] if entity in old else commit.records.get(entity)
        local = None if was is None else payload_of(was)
        place = (info.number, entity_id)
        conflict = decode_conflict(raw, name, place, local)
        found[name, entity_id] = [(conflict, ConflictResolution.skip())]
    return found


def _accepted_in(watch: DeviceModel, commit: DeviceCommit, place: tuple[int, bytes]) -> bool:
    """Whether a transaction on the entity left the outbox because the server has it."""
    for was, now in commit.outbox.values():
        answer = None if was is None else watch.answers.get(was.transaction_id)
        if answer is None or now is not None or was is None:
            continue
        on_it = any((op.collection, op.entity_id) == place for op in was.operations)
        if on_it and answer.verdict in (Verdict.ACCEPTED, Verdict.SUPERSEDED):
            return True
    return False


def outcome_of(conflict: Conflict, answer: ConflictResolution) -> bytes | None:
    if answer.action is Action.MERGE:
        return answer.payload
    keeps = answer.action is Action.KEEP_LOCAL
    return conflict.local_payload if keeps else conflict.remote_payload


def _steps(asked: list[Question]) -> Iterator[Question]:
    """Questions without those about the newest write of a chain that a further decision of the
    same commit began with: the first step of its chain has the same two sides under it."""
    for question, following in pairwise(asked):
        now, then = question[0], following[0]
        if (now.base_payload, now.remote_payload) != (then.base_payload, then.remote_payload):
            yield question
    yield from asked[-1:]


def _discarded_payloads(commit: DeviceCommit, ref: Ref) -> list[bytes | None]:
    """What the transactions that this commit withdraws wrote to an entity."""
    records = [cbor.decode_trusted(new) for _, _, new in commit.discards if new is not None]
    return [
        payload
        for record in records
        for name, entity_id, payload in record["operations"]
        if (name, entity_id) == ref
    ]

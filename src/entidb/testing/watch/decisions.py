"""NO-SILENT-LOSS: what was decided against in a commit is kept in it (R4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from entidb import cbor
from entidb.db.overruled import OverruledValue
from entidb.db.records import (
    ADOPT,
    HAS_BASE,
    META_ADOPT,
    NO_DEVICE,
    base_key,
    conflict_key,
    decode_base,
    decode_entity,
    payload_of,
    split_feed_key,
    table_prefix,
)
from entidb.db.replica import Adopt, decode_record
from entidb.protocol import Verdict
from entidb.storage.base import Batch
from entidb.sync import Action, Conflict, ConflictResolution
from entidb.sync.apply.conflict_rows import decode_conflict
from entidb.testing.losers import leaves
from entidb.testing.oracle import Ref
from entidb.testing.watch.commits import DeviceCommit
from entidb.testing.watch.model import (
    DeviceModel,
    Question,
)

#: One side of a question: version, device, timestamp, payload.
Side = tuple[int, bytes, int, bytes | None]


def check_losers(
    watch: DeviceModel, commit: DeviceCommit, batch: Batch, old: Mapping[bytes, bytes | None]
) -> None:
    """R4: what was decided against in this commit is kept in it."""
    added = watch.losers.on_commit(batch, old)
    by_person = _decided_by_person(watch, commit, old)
    back = watch.put_back
    put_back = [] if back is None else [(back.collection, back.id_bytes)]
    decided = [*watch.questions, *by_person, *watch.recommits, *put_back]
    watch.losers.check_undecided(decided, added)
    _check_replaced(watch, commit, old, added)
    if back is not None:
        _check_put_back(watch, commit, old, back, added)
    _check_passed_over(watch, commit, batch, old, added)
    for ref, asked in {**watch.questions, **by_person}.items():
        if ref in watch.open_conflicts:
            continue
        info = watch.catalogue.by_name[ref[0]]
        raw = commit.records.get(info.prefix + ref[1])
        discarded = _discarded_payloads(commit, ref)
        view = None if raw is None else payload_of(raw)
        outcomes = [(asked[-1][0], view)] if ref in by_person else []
        decisions = [] if ref in by_person else decisions_of(asked)
        for questions in decisions:
            if len(questions) == 1 and questions is decisions[-1]:
                outcomes.append((questions[0][0], view))
            elif not discarded:
                # Where some are withdrawn after all, it cannot be decided which question was about
                # what is left, nor whether the server's side stays.
                steps = questions[1:] or questions
                outcomes += [(each, outcome_of(each, answer)) for each, answer in steps]
        for conflict, outcome in outcomes:
            watch.losers.check(
                conflict,
                outcome,
                added.get(ref, ()),
                discarded,
                combines=ref not in by_person,
                accepted=_accepted_in(watch, commit, (info.number, ref[1])),
            )


def _check_replaced(
    watch: DeviceModel,
    commit: DeviceCommit,
    old: Mapping[bytes, bytes | None],
    added: Mapping[Ref, Sequence[OverruledValue]],
) -> None:
    """What a transaction that is committed again takes the place of, if another device wrote it:
    also below what this device has pending there."""
    for ref, (version, lost_to) in watch.recommits.items():
        key = watch.catalogue.by_name[ref[0]].prefix + ref[1]
        raw = old.get(key)
        was = None if raw is None else decode_entity(raw)
        if was is None or (was.pending and not was.flags & HAS_BASE):
            continue
        number = watch.catalogue.by_name[ref[0]].number
        base = decode_base(commit.records[base_key(number, ref[1])]) if was.pending else was
        # A base that is absent does not say whose deletion it was, nor that it was one.
        unknown = base.device_id == NO_DEVICE and not lost_to
        own = watch.device_id in (base.device_id, lost_to if version == base.version else b"")
        if unknown or own:
            continue
        view = payload_of(commit.records[key])
        watch.losers.check_replaced(ref, base.payload, was.payload, view, added.get(ref, ()))


def _check_put_back(
    watch: DeviceModel,
    commit: DeviceCommit,
    old: Mapping[bytes, bytes | None],
    back: OverruledValue,
    added: Mapping[Ref, Sequence[OverruledValue]],
) -> None:
    """What another device wrote where an overruled value is put back, if it is not what won."""
    key = watch.catalogue.by_name[back.collection].prefix + back.id_bytes
    raw = old.get(key)
    was = None if raw is None else decode_entity(raw)
    if was is None or was.pending or was.device_id == watch.device_id:
        return
    won = {(*back.path, *inner): leaf for inner, leaf in leaves(back.won_payload).items()}
    ref = back.collection, back.id_bytes
    view = payload_of(commit.records[key])
    watch.losers.check_put_back(ref, was.payload, won, view, added.get(ref, ()))


def _check_passed_over(
    watch: DeviceModel,
    commit: DeviceCommit,
    batch: Batch,
    old: Mapping[bytes, bytes | None],
    added: Mapping[Ref, Sequence[OverruledValue]],
) -> None:
    """What a reset that keeps the device's side has looked at in this commit (R29): what this
    device wrote before is pending again, on the server, or kept."""
    gone = [key for key, new in batch.items() if key[:1] == ADOPT and new is None]
    if not gone or not watch.losers.limits.count_max:
        return
    raw = old.get(META_ADOPT) or commit.records[META_ADOPT]
    adopt = decode_record(Adopt, raw)
    compared = [
        (number, table)
        for number, table, compare in ([*each, adopt.compare][:3] for each in adopt.sources)
        if compare
    ]
    for key in gone:
        _, number, entity_id = split_feed_key(key)
        name = watch.catalogue.by_number[number].name
        place = watch.catalogue.by_number[number].prefix + entity_id
        before = old[place] if place in old else commit.records.get(place)
        now = commit.records.get(place)
        for table in [table for each, table in compared if each == number]:
            stored = commit.records.get(table_prefix(table) + entity_id)
            row = None if stored is None else decode_entity(stored)
            if row is None or row.pending or row.device_id != watch.device_id or before is None:
                continue
            there = decode_entity(before)
            view = None if now is None else payload_of(now)
            kept = [each.payload for each in added.get((name, entity_id), ())]
            watch.checks.that(
                there.pending > 0 or row.payload in (there.payload, view, *kept),
                "NO-SILENT-LOSS",
                f"{watch.name} passes over what it wrote to {name}/{entity_id.hex()} before a "
                "reset that keeps its side, and keeps nothing of it",
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


def decisions_of(asked: Sequence[Question]) -> list[list[Question]]:
    """The questions about one entity that decided something, by decision: one commit may decide
    more than once, if several states of the server are taken in it.

    Of a chain that is merged in turn the first is about the newest, and decides nothing but that
    the others are asked: the steps, each on what the one before it became (R25). A question left
    open decides nothing, and nor do those that were asked with it."""
    groups: list[list[Question]] = []
    for question in asked:
        if groups and _goes_with(groups[-1][0][0], question[0]):
            groups[-1].append(question)
        else:
            groups.append([question])
    return [
        group for group in groups if all(answer.action is not Action.SKIP for _, answer in group)
    ]


def _goes_with(first: Conflict, conflict: Conflict) -> bool:
    """Whether a question belongs to the same decision as the ``first`` of it: it is about another
    write of the chain against the same two states, or about a step on one of this chain."""
    if conflict.transaction_id != first.transaction_id:
        return False
    base, remote = _sides(conflict)
    return base[:3] == remote[:3] or (base, remote) == _sides(first)


def _sides(conflict: Conflict) -> tuple[Side, Side]:
    return (
        (
            conflict.base_version,
            conflict.base_device,
            conflict.base_timestamp,
            conflict.base_payload,
        ),
        (
            conflict.remote_version,
            conflict.remote_device,
            conflict.remote_timestamp,
            conflict.remote_payload,
        ),
    )


def _discarded_payloads(commit: DeviceCommit, ref: Ref) -> list[bytes | None]:
    """What the transactions that this commit withdraws wrote to an entity."""
    records = [cbor.decode_trusted(new) for _, _, new in commit.discards if new is not None]
    return [
        payload
        for record in records
        for name, entity_id, payload in record["operations"]
        if (name, entity_id) == ref
    ]

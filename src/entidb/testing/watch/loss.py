"""NO-SILENT-LOSS, CLOCK: what leaves the outbox is on the server, listed, or decided."""

from __future__ import annotations

from collections.abc import Mapping

from entidb import cbor
from entidb.db.catalogue import CollectionInfo
from entidb.db.pending import PendingTransaction
from entidb.db.records import META_HEAD, base_key, decode_base, decode_head
from entidb.protocol import PushOperation, Verdict, digest_stored_newer, operations_digest
from entidb.sync import Action
from entidb.testing.oracle import Ref
from entidb.testing.watch.commits import DeviceCommit, Records
from entidb.testing.watch.model import (
    DeviceModel,
    base_payload,
)
from entidb.types import timestamp_from_ms

#: Reasons for which a server of 0.3 refuses a whole push, and which count for one transaction.
_REFUSED_WHOLE = frozenset(("codec_error", "forbidden", "invalid_message", "too_large"))


def check_outbox(watch: DeviceModel, commit: DeviceCommit, *, reset: bool) -> None:
    rule = "RESET-KEEPS-OUTBOX" if reset else "NO-SILENT-LOSS"
    if reset:
        watch.checks.passed("RESET-KEEPS-OUTBOX")
    discards = {sequence: new for sequence, _, new in commit.discards if new is not None}
    for sequence, (was, now) in commit.outbox.items():
        watch.checks.passed("NO-SILENT-LOSS")
        if was is None:
            if now is not None:
                watch.outbox[now.transaction_id] = sequence
                _check_later(watch, commit, now)
            continue
        if now is None:
            del watch.outbox[was.transaction_id]
            if not _explained(watch, commit, was, discards.get(sequence)):
                _check_dropped(watch, commit, was, {}, rule)
            continue
        if was.operations != now.operations:
            left = {(op.collection, op.entity_id): op.payload for op in now.operations}
            _check_dropped(watch, commit, was, left, rule)


def _check_later(watch: DeviceModel, commit: DeviceCommit, made: PendingTransaction) -> None:
    """CLOCK: what is written is later than what it replaces, however slow the device's own
    clock is."""
    for op in made.operations:
        raw = commit.records.get(base_key(op.collection, op.entity_id))
        if raw is not None and decode_base(raw).timestamp >= made.timestamp:
            watch.checks.fail(
                "CLOCK",
                f"{watch.name} wrote {op.entity_id.hex()} at {made.timestamp}, which is not "
                f"after what it replaced, {decode_base(raw).timestamp}",
            )
    watch.checks.passed("CLOCK")


def check_clock(watch: DeviceModel, commit: DeviceCommit, records: Records) -> None:
    """CLOCK: with an answer to all that was pending, the device's logical clock is not ahead of the
    server's any more, so that what it writes next does not win without end (R27)."""
    if watch.outbox or META_HEAD not in records:
        return
    listed = {sequence for sequence, _, _ in commit.discards}
    gone = [
        was.transaction_id
        for sequence, (was, now) in commit.outbox.items()
        if was is not None and now is None and sequence not in listed
    ]
    answers = [watch.answers[identity] for identity in gone if identity in watch.answers]
    if any(answer.verdict == Verdict.ACCEPTED for answer in answers):
        latest = timestamp_from_ms(watch.server_clock.now_ms()) | 0xFFFF
        ahead = decode_head(records[META_HEAD]).timestamp
        watch.checks.that(
            ahead <= latest,
            "CLOCK",
            f"the clock of {watch.name} stays ahead of the server's, {ahead} of {latest}",
        )


def _explained(
    watch: DeviceModel, commit: DeviceCommit, was: PendingTransaction, record: bytes | None
) -> bool:
    if record is not None:
        by_name = watch.catalogue.by_name
        listed = cbor.decode_trusted(record)
        kept = {(by_name[name].number, i): payload for name, i, payload in listed["operations"]}
        watch.checks.that(
            listed["transaction_id"] == was.transaction_id,
            "NO-SILENT-LOSS",
            f"{watch.name} discarded {was.transaction_id.hex()} under another id",
        )
        _check_dropped(watch, commit, was, kept, "NO-SILENT-LOSS")
        if all(watch.grants(name) for name, _, _ in listed["operations"]):
            _check_refused(watch, was.transaction_id, listed["code"])
        return True
    answer = watch.answers.get(was.transaction_id)
    if answer is None or answer.verdict not in (Verdict.ACCEPTED, Verdict.SUPERSEDED):
        return False
    history = watch.answered_by
    return history is not None and was.transaction_id in history.accepted


def _check_refused(watch: DeviceModel, identity: bytes, code: str) -> None:
    """What is withdrawn as refused was refused, and for that reason (R4, R5)."""
    if code not in _REFUSED_WHOLE:
        return
    answer = watch.answers.get(identity)
    verdict = answer is not None and answer.verdict == Verdict.REJECTED and answer.code == code
    watch.checks.that(
        verdict or code in watch.refused.get(identity, ()),
        "NO-SILENT-LOSS",
        f"{watch.name} withdrew {identity.hex()} as {code!r}, and no server refused it so",
    )


def _check_dropped(
    watch: DeviceModel,
    commit: DeviceCommit,
    was: PendingTransaction,
    left: Mapping[tuple[int, bytes], bytes | None],
    rule: str,
) -> None:
    """Operations may go, or change, only where the server has the bytes already (R24), or
    where a policy or a person said so, or where the server has had the transaction and
    forgotten its id since (R14)."""
    known = None if watch.history is None else watch.history.accepted.get(was.transaction_id)
    if known is not None and watch.history is not None and known[0] <= watch.history.floor:
        return
    for op in was.operations:
        key = (op.collection, op.entity_id)
        if key in left and left[key] == op.payload:
            continue
        info = watch.catalogue.by_number[op.collection]
        ref = (info.name, op.entity_id)
        # One commit may decide more than once: about what lay under a superseded transaction, then
        # about what else is pending.
        asked = watch.questions.get(ref, ())
        if ref in watch.by_person or any(answer.action is Action.MERGE for _, answer in asked):
            continue
        if key not in left and _contained(watch, commit, info, op.entity_id, was.sequence):
            continue
        watch.checks.fail(
            rule,
            f"{watch.name} lost the write of {ref[0]}/{ref[1].hex()} in transaction "
            f"{was.transaction_id.hex()}: it is not pending, not on the server, and not in "
            "the discarded list",
        )


def _contained(
    watch: DeviceModel, commit: DeviceCommit, info: CollectionInfo, entity_id: bytes, sequence: int
) -> bool:
    """Whether the server has this operation's bytes, or those of a later one on top of it that went
    with it. It has them no more if another device has written since; then it has had those of the
    later one, which another copy of this device pushed without this one (R30)."""
    base = base_payload(commit.records, info, entity_id)
    for number, (was, now) in commit.outbox.items():
        if number < sequence or was is None:
            continue
        for op in was.operations:
            if op.entity_id != entity_id or op.collection != info.number:
                continue
            stays = now is not None and any(
                o.entity_id == entity_id and o.collection == info.number for o in now.operations
            )
            on_top = number > sequence and _had(watch, was, (info.name, entity_id), op.payload)
            if not stays and (on_top or op.payload == base):
                return True
    return False


def _had(watch: DeviceModel, was: PendingTransaction, ref: Ref, payload: bytes | None) -> bool:
    """Whether the server accepted the transaction with just these bytes, or stored a newer shape
    of just these (R33). With other bytes that proves nothing of what is below: a merge may have
    taken the later write alone."""
    known = None if watch.history is None else watch.history.accepted.get(was.transaction_id)
    if known is None:
        return False
    newer = digest_stored_newer(_digest(watch, was))
    return newer == known[1] or watch.truth(ref, known[0]) == payload


def _digest(watch: DeviceModel, was: PendingTransaction) -> bytes:
    """As the server has it of a transaction that it accepted as it is here (R14)."""
    names = {op.collection: watch.catalogue.by_number[op.collection].name for op in was.operations}
    places = {number: place for place, number in enumerate(names)}
    return operations_digest(
        list(names.values()),
        [
            PushOperation(places[op.collection], op.entity_id, 0, op.payload)
            for op in was.operations
        ],
    )

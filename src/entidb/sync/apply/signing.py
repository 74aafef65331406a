"""Who a device syncs as: what changes when the server says another subject, and when a person signs
out (R36). Everything here happens inside one ``Writer``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from entidb.db import machine
from entidb.db.outbox import read_pending
from entidb.db.pending import PendingTransaction
from entidb.db.records import DISCARDED, sequence_key
from entidb.db.replica import OtherWork, ReplicaState
from entidb.db.subjects import (
    has_discarded,
    has_pending,
    is_others,
    only_discarded,
    own_gaps,
)
from entidb.db.writer import Writer
from entidb.errors import SyncStateError
from entidb.sync.apply.position import remember_doubt
from entidb.sync.apply.rebase import Rebase
from entidb.types import SEQUENCE_MAX

#: What a withdrawn transaction of someone who signed out is withdrawn for, while that is done.
_CODE = "signed_out"

#: Writes transactions somewhere, before they are taken out: they, the names of the collections by
#: their numbers, and the subject, None where it is not known.
Export = Callable[[list[PendingTransaction], dict[int, str], str | None], None]


def sign_in(writer: Writer, subject: str) -> None:
    """The server says that this device syncs as ``subject``. What was committed under another one
    is theirs from now on; what nobody had is ``subject``'s."""
    state = writer.sync_state
    if state.subject == subject:
        return
    others = state.others
    if state.subject is not None:
        others = _with_own(writer, state, state.subject)
    left = [each for each in others if each.subject != subject]
    _set(writer, replace(state, subject=subject, others=left))


def sign_out(writer: Writer, subject: str | None) -> None:
    """Nobody syncs here any more, and what is pending stays theirs who committed it: of
    ``subject``, where no server has said who that is. Raises ``SyncStateError`` where nobody has,
    and something is pending."""
    state = writer.sync_state
    own = state.subject or subject
    if own is None:
        if _has_own(writer, state):
            raise SyncStateError(
                "no server has said yet under whom this device commits, and something is pending: "
                "give subject=, who the next token of this person will be for, or sync first"
            )
        return
    others = _with_own(writer, state, own)
    _set(writer, replace(state, subject=None, others=others))


def withdraw_own(writer: Writer, rebase: Rebase, export: Export | None) -> int:
    """The present subject leaves, and takes what they have pending out of the view and the outbox;
    how many transactions that were. What others have built on it is withdrawn as ``depends``.
    Nothing is left of it but what ``export`` has written before; and what was in flight may have
    been accepted (R28): then the next pull brings it."""
    state = writer.sync_state
    pending = list(read_pending(writer.snapshot))
    own = [each for each in pending if not is_others(state, each.sequence)]
    if export is not None:
        names = {info.number: info.name for info in writer.catalogue.by_name.values()}
        export(own, names, state.subject)
    remember_doubt(writer)
    if writer.inflight is not None:
        writer.set_inflight(machine.UNSEND(writer.inflight, None))
    loaded = (rebase.load(transaction.sequence) for transaction in own)
    roots = [transaction for transaction in loaded if transaction is not None]
    if roots:
        rebase.withdraw(roots, _CODE, "the person who committed it has signed out", [])
        rebase.release()
    for transaction in roots:
        # The person has said that nothing of it is to stay here.
        writer.delete(sequence_key(DISCARDED, transaction.sequence))
    writer.head.discarded -= len(roots)
    _set(writer, replace(writer.sync_state, subject=None, others=_with_listed(writer)))
    return len(roots)


def hand_over(writer: Writer, subject: str) -> None:
    """What waits for ``subject`` is the present subject's from now on. What was withdrawn before
    stays theirs who wrote it."""
    state = writer.sync_state
    left: list[OtherWork] = []
    for each in state.others:
        left += only_discarded(writer.snapshot, each) if each.subject == subject else [each]
    _set(writer, replace(state, others=left))


def sent_by_others(state: ReplicaState, ranges: Sequence[Sequence[int]]) -> bool:
    """Whether a batch was sent under another subject than the present one."""
    return any(is_others(state, first) for first, _ in ranges)


def _has_own(writer: Writer, state: ReplicaState) -> bool:
    gaps = own_gaps(state.others, SEQUENCE_MAX)
    return any(has_pending(writer.snapshot, first, last) for first, last in gaps)


def _with_own(writer: Writer, state: ReplicaState, subject: str) -> list[OtherWork]:
    """The ranges of others, with those of ``subject``, who had all the rest until now. A range of
    which nothing waits, and nothing is listed as discarded, is left out."""
    own = _own_work(writer, state, subject)
    each = sorted([*state.others, *own], key=lambda one: one.first)
    return [
        one
        for one in each
        if has_pending(writer.snapshot, one.first, one.last)
        or has_discarded(writer.snapshot, one.first, one.last)
    ]


def _with_listed(writer: Writer) -> list[OtherWork]:
    """The ranges of others, with what was withdrawn of the present subject before this commit."""
    state = writer.sync_state
    others = list(state.others)
    if state.subject is not None:
        for each in _own_work(writer, state, state.subject):
            others += only_discarded(writer.snapshot, each)
    return sorted(others, key=lambda one: one.first)


def _own_work(writer: Writer, state: ReplicaState, subject: str) -> list[OtherWork]:
    gaps = own_gaps(state.others, writer.head.sequence)
    return [OtherWork(first, last, subject) for first, last in gaps]


def _set(writer: Writer, state: ReplicaState) -> None:
    before = writer.sync_state
    if state != before:
        writer.set_sync_state(machine.STAND(before, state))


__all__ = ["Export", "hand_over", "sent_by_others", "sign_in", "sign_out", "withdraw_own"]

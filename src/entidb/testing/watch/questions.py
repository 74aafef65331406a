"""NO-FALSE-CONFLICT: what a policy is asked about did happen."""

from __future__ import annotations

from entidb.protocol import Verdict
from entidb.sync import Action, Conflict, ConflictResolution
from entidb.testing.watch.model import (
    DeviceModel,
)
from entidb.testing.watch.prefix import check_mark
from entidb.types import timestamp_from_ms


def on_policy(
    watch: DeviceModel, conflict: Conflict, answer: ConflictResolution | None, *, several: bool
) -> None:
    """NO-FALSE-CONFLICT, on the device's side; ``answer`` None: the policy raised, ``several``:
    more than one pending transaction wrote the entity, so that equal bytes at the end are not
    all there is to it."""
    ref = (conflict.collection, conflict.id_bytes)
    first = ref not in watch.calls
    if first:
        # Later questions about the same entity are the steps of one merge (R25).
        watch.calls[ref] = ConflictResolution.skip() if answer is None else answer
    asked = watch.questions.setdefault(ref, [])
    asked.append((conflict, ConflictResolution.skip() if answer is None else answer))
    latest = timestamp_from_ms(watch.server_clock.now_ms()) | 0xFFFF
    watch.checks.that(
        conflict.local_timestamp <= latest,
        "CLOCK",
        f"{watch.name} asked its policy about {ref[0]}/{ref[1].hex()} with a time that has not "
        "come yet",
    )
    if not first or watch.foreign or ref[0] in watch.foreign_names or watch.history is None:
        return
    if conflict.remote_payload is not None:
        mark = conflict.remote_device, conflict.remote_timestamp
        if conflict.remote_version <= watch.history.head:
            check_mark(watch, ref, conflict.remote_version, mark)
    base, remote = conflict.base_version, conflict.remote_version
    if base == remote and any(
        answer.verdict == Verdict.SUPERSEDED for answer in watch.answers.values()
    ):
        # What it was built on is gone: another copy of this device pushed something else.
        return
    if conflict.remote_payload is None and conflict.base_payload is None:
        sequence = watch.outbox.get(conflict.transaction_id, 0)
        if any(first <= sequence <= last for first, last, _ in watch.unsettled):
            # It may have been accepted, and deleted since; the device cannot know any more (R28).
            return
    if ref in watch.open_conflicts:
        # An open conflict keeps its first base, which may be of a copy's transaction, or of
        # the history before a reset.
        base = -1
    real = (
        (conflict.local_payload != conflict.remote_payload or several or _merges(answer))
        and remote > base
        and (base < 0 or watch.truth(ref, base) == conflict.base_payload)
        and watch.truth(ref, remote) == conflict.remote_payload
        and bool(watch.history.written_between(ref, base, remote))
    )
    watch.checks.that(
        real,
        "NO-FALSE-CONFLICT",
        f"{watch.name} was asked about {ref[0]}/{ref[1].hex()} from {base} to {remote}, where "
        f"nothing came between: {conflict.base_payload!r} (truly {watch.truth(ref, base)!r}), "
        f"{conflict.local_payload!r}, {conflict.remote_payload!r} (truly "
        f"{watch.truth(ref, remote)!r})",
    )


def _merges(answer: ConflictResolution | None) -> bool:
    """Two equal counters are two changes all the same; a policy that adds up is asked."""
    return answer is not None and answer.action is Action.MERGE

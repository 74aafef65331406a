"""What a commit says of scope, grants and the cursor, taken over into the model (R20, R29, R31)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from entidb.db.catalogue import CollectionInfo
from entidb.db.pending import decode_pending
from entidb.db.records import HELD, META_CATALOGUE, READY, TOMBSTONE, sequence_key
from entidb.db.replica import ReplicaState
from entidb.testing.oracle import Ref
from entidb.testing.watch.commits import Records
from entidb.testing.watch.model import (
    DeviceModel,
    decode_catalogue_of,
)
from entidb.testing.watch.owed import owe_local


def take_catalogue(watch: DeviceModel, records: Records) -> list[CollectionInfo]:
    """Collections that now have another table (R20)."""
    raw = records.get(META_CATALOGUE)
    if raw is watch.catalogue_raw:
        return []
    was = watch.catalogue
    watch.catalogue_raw, watch.catalogue = raw, decode_catalogue_of(records)
    now = watch.catalogue.by_name
    watch.prefixes = {info.prefix: info for info in now.values()}
    known = was.by_name
    scope_changed = was.scope != watch.catalogue.scope or any(
        name in known and known[name].local != info.local for name, info in now.items()
    )
    if scope_changed:
        left = {i.number for n, i in known.items() if i.synced and not now[n].synced}
        _check_leaving(watch, records, left)
        watch.due = {ref: state for ref, state in watch.due.items() if now[ref[0]].synced}
        for name, info in now.items():
            if info.synced and not (name in known and known[name].synced):
                watch.excluded = watch.excluded | {name: None}
                owe_local(watch, records, info)
        every = watch.catalogue.scope is None
        watch.unheard = every and (watch.unheard or was.scope is not None)
    elif watch.unheard:
        # From a list of names to all: the cursor does not cover collections that the device did not
        # know.
        names = dict.fromkeys(n for n, i in now.items() if n not in known and i.synced)
        watch.excluded = watch.excluded | names
    return [i for i in now.values() if i.name in known and i.table != known[i.name].table]


def _check_leaving(watch: DeviceModel, records: Records, numbers: set[int]) -> None:
    """Nothing that is pending may leave the scope (R31)."""
    for sequence in watch.outbox.values() if numbers else ():
        for kind in (READY, HELD):
            raw = records.get(sequence_key(kind, sequence))
            row = None if raw is None else decode_pending(sequence_key(kind, sequence), raw)
            for op in () if row is None else row.operations:
                if op.collection in numbers:
                    watch.checks.fail(
                        "NO-SILENT-LOSS",
                        f"a collection left the scope of {watch.name} with the pending write "
                        f"of {op.entity_id.hex()}",
                    )


def take_grant(watch: DeviceModel, records: Records, state: ReplicaState) -> None:
    """R31: the cursor does not cover what is granted anew until it was pulled; of what is no longer
    granted nothing stays, and nothing is pending."""
    granted = None if state.granted is None else frozenset(state.granted)
    if granted == watch.granted:
        return
    was, watch.granted = watch.granted, granted
    synced = {info.name: info for info in watch.catalogue.by_name.values() if info.synced}
    if was is not None:
        anew = synced.keys() if granted is None else granted
        gained = dict.fromkeys(sorted(name for name in anew if name not in was))
        watch.excluded = watch.excluded | gained
        watch.unheard |= granted is None and watch.catalogue.scope is None
    lost = {info.prefix: name for name, info in synced.items() if not watch.grants(name)}
    _check_gone(watch, records, lost)


def _check_gone(watch: DeviceModel, records: Records, lost: Mapping[bytes, str]) -> None:
    for key, raw in records.items() if lost else ():
        if key[:5] in lost and not raw[0] & TOMBSTONE:
            watch.checks.fail(
                "PREFIX",
                f"{watch.name} keeps {lost[key[:5]]}/{key[5:].hex()}, which its token grants no "
                "more",
            )
    watch.checks.passed("PREFIX", len(lost))


def take_state(watch: DeviceModel, state: ReplicaState) -> Iterable[Ref]:
    """Follow the cursor; returns the entities that must look different now."""
    watch.unsettled = state.unsettled
    watch.foreign_names = frozenset(state.foreign_names)
    if state.foreign:
        # R29: until the reset is through, the bases are those of the old history.
        watch.foreign = watch.full = True
        watch.keep_device = state.keep_device
        return ()
    history, cursor, have = watch.history, watch.cursor, watch.have
    watch.move(state)
    if (watch.cursor, watch.have) != (cursor, have) and not watch.foreign:
        watch.checks.that(
            not watch.strange,
            "ORDER",
            f"{watch.name} has seen commit {watch.newest}, and takes an answer of files that were "
            "put back to before it",
        )
    watch.keep_device = False
    if watch.foreign or history is not watch.history:
        watch.foreign = False
    elif state.cursor < cursor:
        watch.checks.fail(
            "ORDER", f"the cursor of {watch.name} went from {cursor} back to {state.cursor}"
        )
    if not state.full and not state.uncovered:
        watch.excluded = {}
        watch.unheard = False
    if watch.history is None:
        return ()
    after = 0 if history is not watch.history else cursor
    moved = [
        ref for commit in watch.history.commits[after + 1 : watch.cursor + 1] for ref in commit
    ]
    for first, last in watch.have:
        if not any(a <= first and last <= b for a, b in have):
            for commit in watch.history.commits[first : last + 1]:
                moved += commit
    return moved

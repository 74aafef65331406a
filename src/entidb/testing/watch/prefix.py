"""PREFIX and NO-RESURRECTION: a device's bases are the server's state at its cursor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from entidb.db.catalogue import CollectionInfo
from entidb.db.pending import decode_pending
from entidb.db.records import (
    DIRTY,
    ENTITY_HEAD,
    HAS_BASE,
    READY,
    TOMBSTONE,
    base_key,
    decode_base,
    sequence_key,
    unpack_entity,
    unpack_pending,
)
from entidb.testing.oracle import Mark, Ref, State
from entidb.testing.watch.commits import DeviceCommit, Records
from entidb.testing.watch.model import (
    DeviceModel,
)


def check_prefix(
    watch: DeviceModel, commit: DeviceCommit, moved: Iterable[Ref], fresh: list[str]
) -> None:
    """``fresh`` are collections of which everything has to be compared."""
    by_name, by_number = watch.catalogue.by_name, watch.catalogue.by_number
    records, scope = commit.records, watch.catalogue.scope
    refs: dict[Ref, None] = {(info.name, entity_id): None for info, entity_id in commit.entities}
    for number, entity_id in commit.bases:
        refs[by_number[number].name, entity_id] = None
    refs.update(dict.fromkeys(moved))
    if fresh:
        prefixes = {by_name[name].prefix: name for name in fresh if name in by_name}
        for key in records:
            if key[:5] in prefixes:
                refs[prefixes[key[:5]], key[5:]] = None
        for ref in watch.history.refs() if watch.history is not None else ():
            if ref[0] in fresh:
                refs[ref] = None
    compared: dict[str, bool] = {}
    for ref in refs:
        name = ref[0]
        info = by_name.get(name)
        if name not in compared:
            in_scope = (scope is None or name in scope) if info is None else info.synced
            compared[name] = in_scope and name not in watch.excluded and watch.grants(name)
        if compared[name]:
            _compare_base(watch, records, info, ref)
    watch.checks.passed("PREFIX", len(refs))


def check_deletions_stay(
    watch: DeviceModel,
    commit: DeviceCommit,
    old: Mapping[bytes, bytes | None],
    known: Mapping[str, CollectionInfo],
    switched: list[CollectionInfo],
) -> None:
    """What was accepted without an answer, was deleted by another device since, and forgotten, does
    not come back with a reset unless a policy says so (R28)."""
    history = watch.history
    if history is None:
        return
    for sequence in watch.outbox.values():
        raw = commit.records.get(sequence_key(READY, sequence))
        pending = None if raw is None else decode_pending(sequence_key(READY, sequence), raw)
        if pending is None or pending.transaction_id not in watch.unanswered:
            continue
        accepted = history.accepted.get(pending.transaction_id)
        if accepted is None or not 0 < accepted[0] <= history.floor:
            continue
        for op in pending.operations:
            info = watch.catalogue.by_number[op.collection]
            ref = (info.name, op.entity_id)
            if info not in switched or op.payload is None or ref in watch.calls:
                continue
            was = old.get(known[info.name].prefix + op.entity_id)
            unaware = was is not None and unpack_pending(was)[2] < accepted[0]
            wrote = ref in history.commits[accepted[0]]
            if unaware and wrote and history.state_at(ref, watch.cursor)[1] is None:
                watch.checks.fail(
                    "NO-RESURRECTION",
                    f"{watch.name} would bring back {ref[0]}/{ref[1].hex()}, which it had "
                    f"accepted as {accepted[0]}, and which was deleted since",
                )
            watch.checks.passed("NO-RESURRECTION")


def check_everything(watch: DeviceModel, records: Records) -> None:
    """PREFIX without induction, for the end of a run and after restarts."""
    if watch.foreign:
        return
    for info in watch.catalogue.by_name.values():
        if not info.synced or info.name in watch.excluded or not watch.grants(info.name):
            continue
        ids = {key[5:]: None for key in records if key[:5] == info.prefix}
        for ref in watch.history.refs() if watch.history is not None else ():
            if ref[0] == info.name:
                ids[ref[1]] = None
        for entity_id in ids:
            _compare_base(watch, records, info, (info.name, entity_id))
        watch.checks.passed("PREFIX", len(ids))


def _compare_base(
    watch: DeviceModel, records: Records, info: CollectionInfo | None, ref: Ref
) -> None:
    version, payload = watch.expected(ref)
    if payload is None and version:
        watch.checks.passed("NO-RESURRECTION")
    if info is None:
        if payload is not None:
            _differs(watch, ref, "nothing", (version, payload))
        return
    raw = records.get(info.prefix + ref[1])
    if raw is None:
        if payload is not None:
            _differs(watch, ref, "nothing", (version, payload))
        return
    flags = raw[0]
    mark: Mark | None = None
    if not flags & DIRTY:
        _, _, stored, device, timestamp = unpack_entity(raw)
        base = None if flags & TOMBSTONE else raw[ENTITY_HEAD:]
        mark = device, timestamp
    elif not flags & HAS_BASE:
        stored, base = unpack_pending(raw)[2], None
    else:
        stored = unpack_pending(raw)[2]
        row = decode_base(records[base_key(info.number, ref[1])])
        if row.version != stored:
            watch.checks.fail("PREFIX", f"{watch.name}: two base versions of {ref[1].hex()}")
        base = row.payload
        mark = row.device_id, row.timestamp
    if payload is not None or base is not None:
        if base != payload or stored != version:
            _differs(watch, ref, (stored, base), (version, payload))
        if mark is not None:
            check_mark(watch, ref, version, mark)
        return
    # Both absent: the device must know of the tombstone, and of nothing in the future.
    limit = max(watch.cursor, max((last for _, last in watch.have), default=0))
    # While everything is being pulled anew, what is written counts as unknown to the server;
    # publishing puts that right (R28). A tombstone at or below the floor may be gone, and then no
    # device can know of it.
    purged = watch.history is not None and version <= watch.history.floor
    unknown = stored == 0 and (watch.full or purged)
    if flags & DIRTY and not (version <= stored <= limit or unknown):
        _differs(watch, ref, (stored, base), (version, payload))


def check_mark(watch: DeviceModel, ref: Ref, version: int, mark: Mark) -> None:
    """Who wrote it, and when, is what the server says, once clamped (R27). The verdict on a
    transaction that comes again, and was overwritten meanwhile, does not say so any more."""
    history = watch.history
    assert history is not None
    if mark != history.marks[version] and history.latest(ref)[0] == version:
        watch.checks.fail(
            "CLOCK",
            f"{watch.name} has {mark} as device and timestamp of {ref[0]}/{ref[1].hex()} "
            f"version {version}; the server's are {history.marks[version]}",
        )


def _differs(watch: DeviceModel, ref: Ref, has: object, should: State) -> None:
    gone = should[1] is None and should[0] > 0
    watch.checks.fail(
        "NO-RESURRECTION" if gone and has != "nothing" else "PREFIX",
        f"{watch.name} at cursor {watch.cursor} (have {watch.have}) has {has} as base of "
        f"{ref[0]}/{ref[1].hex()}; the server's state is {should}",
    )

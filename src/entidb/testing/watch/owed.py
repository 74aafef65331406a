"""NO-SILENT-LOSS: what a wider scope or a reset has to make pending (R29, R31)."""

from __future__ import annotations

from collections.abc import Mapping

from entidb.db.catalogue import CollectionInfo
from entidb.db.records import (
    DIRTY,
    ENTITY_HEAD,
    META_ADOPT,
    TOMBSTONE,
    payload_of,
    unpack_entity,
)
from entidb.testing.watch.commits import DeviceCommit, Records
from entidb.testing.watch.model import (
    DeviceModel,
    base_payload,
)


def owe_local(watch: DeviceModel, records: Records, info: CollectionInfo) -> None:
    """A wider scope makes what was written outside of it pending (R31)."""
    for key, raw in records.items():
        if key[:5] == info.prefix and not raw[0] & (DIRTY | TOMBSTONE):
            if not unpack_entity(raw)[2]:
                watch.due[info.name, key[5:]] = 0, raw[ENTITY_HEAD:]


def owe_newer(
    watch: DeviceModel,
    records: Records,
    known: Mapping[str, CollectionInfo],
    switched: list[CollectionInfo],
) -> None:
    """A reset that keeps the device's side commits what the new history has not, or has older,
    once more (R29)."""
    for info in switched:
        old = known[info.name].prefix
        for key, raw in records.items():
            if key[:5] != old or raw[0] & DIRTY:
                continue
            version, payload = unpack_entity(raw)[2], payload_of(raw)
            now = records.get(info.prefix + key[5:])
            if now is None:
                owed = payload is not None
            else:
                clean = not now[0] & DIRTY
                owed = clean and unpack_entity(now)[2] < version and payload_of(now) != payload
            if owed:
                watch.due[info.name, key[5:]] = version, payload


def check_due(watch: DeviceModel, commit: DeviceCommit) -> None:
    due = watch.due
    if not due:
        return
    by_name, by_number = watch.catalogue.by_name, watch.catalogue.by_number
    for _, now in commit.outbox.values():
        for op in () if now is None else now.operations:
            due.pop((by_number[op.collection].name, op.entity_id), None)
    if META_ADOPT in commit.records:
        return
    for ref, (version, payload) in due.items():
        info = by_name[ref[0]]
        raw = commit.records.get(info.prefix + ref[1])
        stored = 0 if raw is None else unpack_entity(raw)[2]
        overtaken = version and stored >= version
        there = stored and base_payload(commit.records, info, ref[1]) == payload
        if info.synced and not overtaken and not there:
            watch.checks.fail(
                "NO-SILENT-LOSS",
                f"{ref[0]}/{ref[1].hex()} was to become pending on {watch.name}, and did not",
            )
    watch.checks.passed("NO-SILENT-LOSS", len(due))
    watch.due = {}

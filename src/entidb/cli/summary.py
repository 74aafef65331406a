"""What one sync cycle did: as sentences for a person, as a document for a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from entidb.cli.output import code_text, facts, id_text, one_line, plural, safe, size_text
from entidb.sync import (
    Action,
    Conflict,
    KeptBack,
    RebaseReport,
    SyncCycleResult,
    SyncStatus,
    Withdrawn,
)
from entidb.types import uuid_from_bytes

#: What a policy did with a conflict, in a person's words.
_OUTCOMES: Final = {
    Action.MERGE: "merged",
    Action.KEEP_LOCAL: "kept as on this device",
    Action.ACCEPT_REMOTE: "taken as on the server",
}
_SHOWN_MAX: Final = 10


def lines(result: SyncCycleResult, status: SyncStatus, url: str) -> Iterator[str]:
    """The summary ``entidb sync`` prints."""
    yield (
        f"synchronised {status.db_id} with {safe(url)} in {result.duration_s:.1f} s, "
        f"{plural(result.requests, 'request')}"
        + (f", {plural(result.attempts, 'attempt')}" if result.attempts > 1 else "")
    )
    if result.reset:
        yield "everything was fetched anew"
    yield from facts(_facts(result, status))
    yield from _withdrawn(result.withdrawn)
    yield from _open_ends(result, status)


def _facts(result: SyncCycleResult, status: SyncStatus) -> Iterator[tuple[str, str]]:
    yield "  pulled", _changes(result.pulled, result.bytes_pulled)
    pushed = plural(result.pushed, "transaction") if result.pushed else "nothing"
    if result.pushed:
        size = size_text(result.bytes_pushed)
        pushed += f" of {plural(result.pushed_operations, 'change')} ({size})"
    yield "  pushed", pushed
    if result.superseded:
        yield (
            "  superseded",
            (
                f"{plural(result.superseded, 'transaction')}: another copy of this device pushed "
                "other content under the same id"
            ),
        )
    if result.done:
        yield "  already so", f"{plural(len(result.done), 'transaction')}: the server had the same"
    if result.conflicts:
        counts = Counter(_OUTCOMES[each.resolution.action] for each in result.conflicts)
        said = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))
        yield "  conflicts", f"{said} (by the policy)"
    if result.withdrawn:
        yield "  withdrawn", plural(len(result.withdrawn), "transaction")
    if result.overruled:
        yield "  overruled", f"{plural(result.overruled, 'value')}, kept: see `entidb discarded`"
    if status.conflicts:
        yield "  unresolved", plural(status.conflicts, "conflict")


def _changes(count: int, size: int) -> str:
    return f"{plural(count, 'change')} ({size_text(size)})" if count else "nothing"


def rebased(report: RebaseReport) -> Iterator[str]:
    """What became of transactions that were pending before a device began with a snapshot."""
    yield from _withdrawn(report.withdrawn)
    if report.overruled:
        yield f"  {plural(report.overruled, 'value')} overruled, kept: see `entidb discarded`"
    if report.unresolved:
        count = plural(len(report.unresolved), "conflict")
        yield f"  {count} held until you decide: see `entidb conflicts`, then `entidb resolve`"


def _withdrawn(withdrawn: list[Withdrawn]) -> Iterator[str]:
    if not withdrawn:
        return
    for each in withdrawn[:_SHOWN_MAX]:
        identity = uuid_from_bytes(each.transaction_id)
        yield f"  withdrawn {id_text(identity)} [{code_text(each.code)}]: {one_line(each.message)}"
    if len(withdrawn) > _SHOWN_MAX:
        yield f"  … and {len(withdrawn) - _SHOWN_MAX:,} more"
    yield "  nothing is lost: see `entidb discarded`, which can commit them again"


def _open_ends(result: SyncCycleResult, status: SyncStatus) -> Iterator[str]:
    for each in result.kept_back[:_SHOWN_MAX]:
        identity = uuid_from_bytes(each.transaction_id)
        yield f"  kept back {id_text(identity)} [{code_text(each.code)}]: {one_line(each.message)}"
    if result.kept_back:
        yield (
            "  something on the way to the server refuses what is kept back; it stays pending and "
            "is tried again"
        )
    if status.conflicts:
        yield (
            f"  {plural(status.held, 'transaction')} held until you decide: see "
            "`entidb conflicts`, then `entidb resolve`"
        )
    if result.incomplete:
        yield "  others kept changing the same entities; what is left is pending: sync again"
    if status.pending:
        yield f"  {plural(status.pending, 'transaction')} still pending"
        yield from (f"  {line}" for line in waiting(status.others))


def waiting(others: Mapping[str, int]) -> Iterator[str]:
    """For whom how much of what is pending waits (R36)."""
    for who, count in sorted(others.items()):
        yield f"{plural(count, 'transaction')} until {one_line(who)} syncs here"


def document(result: SyncCycleResult, status: SyncStatus) -> dict[str, Any]:
    """The same for programs. Counts as in ``SyncCycleResult``."""
    return {
        "db_id": status.db_id,
        "pulled": result.pulled,
        "pushed": result.pushed,
        "pushed_operations": result.pushed_operations,
        "superseded": result.superseded,
        "already_so": len(result.done),
        "conflicts": [
            {**place(each.conflict), "action": each.resolution.action.value}
            for each in result.conflicts
        ],
        "unresolved": [place(each) for each in result.unresolved],
        "withdrawn": [_refused(each) for each in result.withdrawn],
        "kept_back": [_refused(each) for each in result.kept_back],
        "pending": status.pending,
        "others": status.others,
        "held": status.held,
        "open_conflicts": status.conflicts,
        "discarded": status.discarded,
        "overruled": result.overruled,
        "cursor": status.cursor,
        "history": status.history,
        "reset": result.reset,
        "incomplete": result.incomplete,
        "requests": result.requests,
        "attempts": result.attempts,
        "bytes_pulled": result.bytes_pulled,
        "bytes_pushed": result.bytes_pushed,
        "duration_s": round(result.duration_s, 3),
    }


def rebased_document(report: RebaseReport) -> dict[str, Any]:
    """What ``rebased`` says, for programs."""
    return {
        "withdrawn": [_refused(each) for each in report.withdrawn],
        "unresolved": [place(each) for each in report.unresolved],
        "overruled": report.overruled,
    }


def _refused(each: Withdrawn | KeptBack) -> dict[str, Any]:
    return {
        "transaction": str(uuid_from_bytes(each.transaction_id)),
        "code": each.code,
        "message": each.message,
    }


def place(conflict: Conflict) -> dict[str, Any]:
    """Which entity a conflict is about, and how the two sides came apart."""
    return {
        "collection": conflict.collection,
        "id": str(conflict.entity_id),
        "kind": conflict.kind,
    }

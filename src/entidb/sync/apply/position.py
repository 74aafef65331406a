"""The device's position in the server's history, and whether an answer still fits there.

Whose replica it is, its cursor, what is of another history, what is in doubt: the fields of
``ReplicaState``, checked and moved. Entities are not touched here.
"""

from __future__ import annotations

from msgspec.structs import replace

from entidb.db import machine
from entidb.db.records import META_ADOPT
from entidb.db.replica import ReplicaState, ranges_above
from entidb.db.writer import Writer
from entidb.errors import ConfigError, HistoryChangedError, SyncStateError
from entidb.protocol import Manifest, PullRequest, PullResponse, PushResponse
from entidb.types import SEQUENCE_MAX, SeenCommit


def check_replica_of(state: ReplicaState, db_id: str) -> None:
    """Raises ``ConfigError`` if the device is a replica of another database: before the server is
    asked, which might make one of that name."""
    if state.db_id not in (None, db_id):
        raise ConfigError(
            f"this device holds a copy of database {state.db_id!r}, not of {db_id!r}; sync "
            f"with db_id={state.db_id!r}, or use another directory for {db_id!r}"
        )


def check_belongs(writer: Writer, request: PullRequest) -> ReplicaState:
    """R22: history and cursor are still those the answer belongs to."""
    state = writer.sync_state
    if state.history != request.history:
        raise SyncStateError("the history changed while the answer was on its way; sync again")
    if writer.inflight is not None:
        raise SyncStateError("a push is in flight; it must be settled before a pull (R5)")
    stage = writer.stage
    expected = state.cursor
    if stage is not None:
        expected = stage.delta_cursor if stage.full_done else stage.full_cursor
    elif request.full:
        expected = 0
    if expected != request.cursor:
        raise SyncStateError("the cursor moved while the answer was on its way; sync again")
    # A stage is abandoned when the scope changes, so it needs no such check.
    if stage is None and not is_missing(writer, state, request):
        raise scope_changed()
    check_adopted(writer)
    return state


def scope_changed() -> SyncStateError:
    return SyncStateError("the scope changed while the answer was on its way; sync again")


def check_adopted(writer: Writer) -> None:
    """What a wider scope or a reset has still to make pending must meet server state as pending
    work does: taken for clean, it would be lost, or pass over what it never saw (R4, R31)."""
    if writer.get(META_ADOPT) is not None:
        raise scope_changed()


def is_missing(writer: Writer, state: ReplicaState, request: PullRequest) -> bool:
    """Whether what was asked for is still what is missing: a scope that was widened meanwhile
    must not count as covered by an answer that does not speak of it (R31)."""
    if not request.full:
        return not (state.full or state.uncovered)
    return is_missing_of(writer, state, request.collections)


def is_missing_of(writer: Writer, state: ReplicaState, names: list[str] | None) -> bool:
    """The same of everything in the collections ``names``; None for all."""
    asked = None if names is None else frozenset(names)
    return asked == (writer.catalogue.scope if state.full else frozenset(state.uncovered))


def foreign_collections(writer: Writer, state: ReplicaState) -> frozenset[int]:
    """Numbers of the collections whose entities have versions of another history (R29)."""
    return frozenset(
        info.number
        for info in writer.catalogue.by_name.values()
        if state.foreign or info.name in state.foreign_names
    )


def foreign_in_scope(writer: Writer, state: ReplicaState) -> bool:
    found = map(writer.catalogue.by_name.get, state.foreign_names)
    return any(info is not None and info.synced for info in found)


def move_cursor(writer: Writer, state: ReplicaState, cursor: int, seen: SeenCommit | None) -> None:
    """Only a pull moves the cursor (R22). ``seen`` is what the server has said of its newest commit
    (R29)."""
    foreign = foreign_collections(writer, state)
    now = replace(
        state,
        cursor=cursor,
        seen=seen,
        have=ranges_above(state.have, cursor),
        full=False,
        uncovered=[],
        foreign=False,
        keep_device=False,
        unsettled=[],
        foreign_names=sorted(
            info.name
            for info in writer.catalogue.by_name.values()
            if not info.synced and info.number in foreign
        ),
    )
    if now != state:
        writer.set_sync_state(machine.REACH(state, now))


def see_page(writer: Writer, state: ReplicaState, response: PullResponse) -> None:
    """Remember the server's newest commit, of which the pages that follow have to be, too (R29)."""
    now = replace(state, seen=seen_in(state, response))
    if now != state:
        writer.set_sync_state(machine.STAND(state, now))


def see_image(writer: Writer, state: ReplicaState, manifest: Manifest) -> None:
    """As ``see_page``, of an image, which may be older than what the device has seen."""
    term, seen = manifest.term, state.seen
    known = 0 if seen is None else seen.version
    if term is None or not known < manifest.head <= SEQUENCE_MAX:
        return
    # Of another past it is not remembered, so that the pull that follows proves that one is gone.
    if seen is None or term.name == seen.term or term.first > seen.version:
        now = replace(state, seen=SeenCommit(manifest.head, term.name))
        writer.set_sync_state(machine.STAND(state, now))


def seen_in(state: ReplicaState, answer: PullResponse | PushResponse) -> SeenCommit | None:
    """What the device has seen of the server once it takes in ``answer``. A full pull says nothing
    of the cursor, and what was sent ahead nothing of the answer before it, so the device notices as
    well that the server has gone back: raises ``HistoryChangedError`` (R29)."""
    seen, term, head, reached = state.seen, answer.term, answer.head, state.cursor
    if seen is not None:
        version = seen.version
        if head >= version and term and term.name != seen.term and term.first <= version:
            raise gone_back(version, head)
        if version > reached:
            reached = version  # it may be less: a server before 0.7 says no term
    if head < reached:
        raise gone_back(reached, head)
    # Where the server says no term, what is known stays as true as it was; and a number that no
    # decoder lets through is none.
    return seen if term is None or head > SEQUENCE_MAX else SeenCommit(head, term.name)


def seen_after(seen: SeenCommit | None, answer: PushResponse) -> SeenCommit | None:
    """What was seen, once ``answer`` was taken in."""
    return seen if answer.term is None else SeenCommit(answer.head, answer.term.name)


def is_unasked(seen: SeenCommit | None, answer: PushResponse) -> bool:
    """Whether ``answer`` leaves open if the server has the commit that was seen: the request was
    made before that was seen, and the server's term began after it (R29)."""
    if seen is None or answer.term is None:
        return False
    return answer.term.name != seen.term and answer.term.first > seen.version


def gone_back(seen: int, head: int) -> HistoryChangedError:
    if head < seen:
        text = f"has seen commit {seen}, and the server's database ends at {head}: its"
    else:
        text = f"has seen another commit {seen} than the server's database has: its"
    return HistoryChangedError(
        f"this device {text} files were replaced by older ones. Choose "
        'reset(keep="server") to take its state, or reset(keep="device") to commit again what it '
        "no longer has"
    )


def remember_doubt(writer: Writer) -> None:
    inflight, state = writer.inflight, writer.sync_state
    if inflight is None:
        return
    sent = [[first, last, state.cursor] for first, last in (*inflight.ranges, *inflight.after)]
    unsettled = [each for each in state.unsettled if each not in sent] + sent
    if unsettled != state.unsettled:
        writer.set_sync_state(machine.STAND(state, replace(state, unsettled=unsettled)))

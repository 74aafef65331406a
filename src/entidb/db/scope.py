"""Which collections synchronise, and what happens when that changes (R31)."""

from __future__ import annotations

from msgspec.structs import replace

from entidb.db import machine
from entidb.db.adopt import schedule_adoption
from entidb.db.catalogue import Catalogue
from entidb.db.pending import decode_pending
from entidb.db.records import HELD, READY, end_of
from entidb.db.writer import Writer
from entidb.errors import ScopeError
from entidb.storage import Snapshot
from entidb.types import SCOPE_NAMES_MAX

_PAGE = 500


def change_scope(writer: Writer, wanted: frozenset[str] | None) -> None:
    """Make ``wanted`` the scope, with everything that follows from it."""
    catalogue = writer.catalogue
    if wanted is not None and len(wanted) > SCOPE_NAMES_MAX:
        raise ScopeError(
            f"a scope names at most {SCOPE_NAMES_MAX} collections, not {len(wanted)}: synchronise "
            "all with None, and declare local what should stay here",
            code="too_many_collections",
        )
    for name in sorted(wanted or ()):
        info = catalogue.by_name.get(name)
        if info is not None and info.local:
            raise ScopeError(
                f"collection {name!r} was declared local; call "
                f"`db.declare_local({name!r}, False)` before it can be in the scope"
            )
        if info is None:
            catalogue = catalogue.adding(name)
    _switch(writer, catalogue.with_scope(wanted), before=writer.catalogue)


def change_local(writer: Writer, name: str, local: bool) -> None:
    """Declare ``name`` local, or no longer local."""
    catalogue = writer.catalogue
    if name not in catalogue.by_name:
        writer.set_catalogue(catalogue.adding(name, local=local))
        return
    _switch(writer, catalogue.with_local(name, local), before=catalogue)


def forget_collection(writer: Writer, name: str) -> None:
    """Empty a collection that does not synchronise (R31), in one small commit: its table is
    replaced, and emptied later."""
    info = writer.catalogue.by_name.get(name)
    if info is None:
        return
    if info.synced:
        raise ScopeError(
            f"collection {name!r} synchronises; forgetting it here would not delete it on the "
            "server. Delete its entities, or take it out of the scope with `db.set_scope(...)` "
            "first",
        )
    writer.replace_tables({info.number: None}, {}, writer.next_sequence())


def _switch(writer: Writer, after: Catalogue, before: Catalogue) -> None:
    was = {info.name for info in before.by_name.values() if info.synced}
    now = {info.name for info in after.by_name.values() if info.synced}
    _refuse_pending(writer, before, was - now)
    writer.set_catalogue(after)
    state = writer.sync_state
    uncovered = (set(state.uncovered) | (now - was)) & now
    # From a list of names to "all": collections that this device does not know yet are to come too.
    full = state.full or (before.scope is not None and after.scope is None)
    now_lacking = replace(state, uncovered=sorted(uncovered), full=full)
    writer.set_sync_state(machine.RESCOPE(state, now_lacking))
    writer.abandon_stage()
    adopt = [[after.by_name[n].number, after.by_name[n].table] for n in sorted(now - was)]
    if adopt:
        schedule_adoption(writer, adopt, compare=False)


def _refuse_pending(writer: Writer, catalogue: Catalogue, leaving: set[str]) -> None:
    numbers = {catalogue.by_name[name].number: name for name in leaving}
    if not numbers:
        return
    for number in pending_collections(writer.snapshot):
        if number in numbers:
            raise ScopeError(
                f"collection {numbers[number]!r} has changes that are not on the server yet; "
                "sync them, or resolve its conflicts, before it leaves the scope",
                code="scope_pending",
            )


def pending_collections(snapshot: Snapshot) -> set[int]:
    """Numbers of the collections that the outbox touches."""
    found: set[int] = set()
    for kind in (READY, HELD):
        start, stop = kind, end_of(kind)
        while page := snapshot.scan(start, stop, limit=_PAGE):
            for key, raw in page:
                found.update(op.collection for op in decode_pending(key, raw).operations)
            start = page[-1][0] + b"\0"
    return found


__all__ = ["change_local", "change_scope", "forget_collection", "pending_collections"]

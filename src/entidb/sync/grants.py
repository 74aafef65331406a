"""What a device does when the server says that its token grants other collections (R31).

Grants are scope that the server decides: a wider grant is a widening, a narrower one a narrowing.
Everything here happens inside one ``Writer``; ``cycle`` decides when to look at a grant, and
``db.scope`` handles what leaves the scope by the program's own choice.
"""

from __future__ import annotations

from msgspec.structs import replace

from entidb.db import machine
from entidb.db.catalogue import Catalogue, CollectionInfo
from entidb.db.outbox import read_pending
from entidb.db.replica import ReplicaState
from entidb.db.writer import Writer
from entidb.errors import PermissionDeniedError
from entidb.sync.apply.rebase import Rebase
from entidb.sync.apply.seam import Look

_PAGE_ROWS = 1000


def take_grant(writer: Writer, rebase: Rebase, granted: list[str] | None) -> None:
    """Make ``granted`` (None: everything) what this device may see, with what follows.

    What is gained is pulled from nothing, because the cursor passed over it. Of what is not
    granted, pending transactions are withdrawn as ``forbidden``, and then the entities go, also
    those that another token has let in meanwhile. Raises ``PermissionDeniedError`` where that
    would throw away what a reset is to commit again (R29); then nothing changes.
    """
    state, catalogue = writer.sync_state, writer.catalogue
    now = replace(state, granted=granted)
    lost = [
        info for info in catalogue.by_name.values() if info.synced and not now.grants(info.name)
    ]
    if state.foreign and state.keep_device:
        _check_nothing_to_keep(writer, lost)
    writer.abandon_stage()
    _withdraw(writer, rebase, lost)
    _remove(writer, rebase, lost)
    gone = {info.name for info in lost}
    gained, full = _gained(state, catalogue, granted)
    now = replace(
        now,
        uncovered=sorted(name for name in {*state.uncovered, *gained} if now.grants(name)),
        full=state.full or full,
        foreign_names=[name for name in state.foreign_names if name not in gone],
    )
    writer.set_sync_state(machine.REGRANT(state, now))


class GrantChangedError(Exception):
    """An answer was made under another grant than the one this device knows."""

    def __init__(self, granted: list[str] | None) -> None:
        super().__init__(granted)
        self.granted = granted


def check_granted(granted: list[str] | None, state: ReplicaState) -> None:
    """Raises ``GrantChangedError`` unless an answer was made under the grant of ``state``."""
    if granted != state.granted and (granted is None or sorted(granted) != state.granted):
        raise GrantChangedError(granted)


def needs_grant(state: ReplicaState) -> bool:
    """Whether a wider scope took in collections that are not granted: they will not come."""
    return state.granted is not None and not all(map(state.grants, state.uncovered))


def is_plain(look: Look) -> bool:
    """Whether the pull of this cycle asks for what changed and nothing else."""
    state = look.state
    level = machine.lacks(state) is machine.Lacks.NOTHING
    waits = state.foreign_names or state.unsettled
    return (
        level and not waits and look.stage is None and not look.adopting and not needs_grant(state)
    )


def _gained(
    state: ReplicaState, catalogue: Catalogue, granted: list[str] | None
) -> tuple[set[str], bool]:
    """Names in scope that come from nothing now, and whether everything does: from a list of names
    to all, because there may be collections that this device does not know yet."""
    if state.granted is None:
        return set(), False
    names = catalogue.scope if granted is None else granted
    if names is None:
        return set(), True
    return {name for name in names if not state.grants(name) and catalogue.in_scope(name)}, False


def _withdraw(writer: Writer, rebase: Rebase, lost: list[CollectionInfo]) -> None:
    numbers = {info.number: info.name for info in lost}
    roots, touched = [], set()
    for transaction in read_pending(writer.snapshot) if numbers else ():
        names = {
            numbers[op.collection] for op in transaction.operations if op.collection in numbers
        }
        found = rebase.load(transaction.sequence) if names else None
        if found is not None:
            roots.append(found)
            touched |= names
    if roots:
        message = (
            f"the token does not grant {_listed(touched)}: what was written there cannot be "
            "pushed. Commit it again when it is granted"
        )
        rebase.withdraw(roots, "forbidden", message, [])


def _remove(writer: Writer, rebase: Rebase, lost: list[CollectionInfo]) -> None:
    """Empty collections, in one small commit: their tables are replaced, and emptied later."""
    filled = [info for info in lost if _has_rows(writer, info)]
    if not filled:
        return
    writer.replace_tables(dict.fromkeys(info.number for info in filled), {}, rebase.sequence())


def _has_rows(writer: Writer, info: CollectionInfo) -> bool:
    return bool(writer.table_rows(info.table, 1))


def _check_nothing_to_keep(writer: Writer, lost: list[CollectionInfo]) -> None:
    kept = {info.name for info in lost if _has_clean(writer, info)}
    if kept:
        raise PermissionDeniedError(
            f'the token does not grant {_listed(kept)}, where reset(keep="device") is to commit '
            "again what this device has. Sync with a token that grants it, or choose "
            'reset(keep="server")'
        )


def _has_clean(writer: Writer, info: CollectionInfo) -> bool:
    return any(
        row.payload is not None and not row.pending
        for page in writer.table_pages(info.table, _PAGE_ROWS)
        for _, row in page
    )


def _listed(names: set[str]) -> str:
    return ("collections " if len(names) > 1 else "collection ") + ", ".join(
        map(repr, sorted(names))
    )


__all__ = ["needs_grant", "take_grant"]

"""A page of changes taken in columns is what it is when they are taken one by one (R23)."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from entidb.db import Database
from entidb.db.records import REMOTE, BaseRow, EntityRow
from entidb.db.writer import Ref, Writer
from entidb.storage import MemoryStorage
from entidb.sync.apply.rebase import Rebase
from entidb.sync.policies import resolve_policy
from tests.support import FakeClock, uid

#: What the device has of an entity: nothing, a value, a tombstone; each at version 5.
HAS = st.sampled_from(["nothing", "value", "tombstone", "pending"])
#: What the server says: which version, and what.
SAYS = st.tuples(st.sampled_from([4, 5, 6]), st.sampled_from([b"\x01", b"\x02", None]))


def device(has: list[str]) -> Database:
    database = Database(MemoryStorage(), entropy=random.Random(1).randbytes, clock=FakeClock())
    with database.write() as writer:
        info = writer.collection("notes")
        for number, kind in enumerate(has):
            if kind in ("value", "tombstone"):
                payload = b"\x01" if kind == "value" else None
                row = EntityRow(REMOTE, 0, 5, bytes(16), 7, 0, payload)
                writer.show((info.number, uid(number).bytes), row, None, writer.next_sequence())
    for number, kind in enumerate(has):
        if kind == "pending":
            database.collection("notes")[uid(number)] = "mine"
    return database


@given(page=st.lists(st.tuples(HAS, SAYS), min_size=1, max_size=8), foreign=st.booleans())
def test_taking_in_columns_is_taking_one_by_one(
    page: list[tuple[str, tuple[int, bytes | None]]], foreign: bool
) -> None:
    database = device([has for has, _ in page])

    def after(act: Any) -> Any:
        with database.view() as view:
            view._stale_rows_max = 0  # the order in the list of stale rows says nothing
            info = view.collection("notes")
            rebase = Rebase(
                view,
                lambda name: resolve_policy("server_wins"),
                1000,
                foreign=frozenset([info.number] if foreign else []),
            )
            changes = [
                ((info.number, uid(number).bytes), BaseRow(version, bytes(16), 9 + number, payload))
                for number, (_, (version, payload)) in enumerate(page)
            ]
            keys = [info.prefix + entity_id for (_, entity_id), _ in changes]
            act(view, rebase, changes, view.entities(keys))
            rebase.release()
            return sorted(view.finish().items()), rebase.report

    def columns(
        writer: Writer,
        rebase: Rebase,
        changes: list[tuple[Ref, BaseRow]],
        olds: list[EntityRow | None],
    ) -> None:
        rebase.take_all_dirty(rebase.take_all(changes, olds))

    def each(
        writer: Writer,
        rebase: Rebase,
        changes: list[tuple[Ref, BaseRow]],
        olds: list[EntityRow | None],
    ) -> None:
        pairs = list(zip(changes, olds, strict=True))
        for (ref, remote), old in pairs:
            if old is None or not old.pending:
                rebase.take_clean(ref, remote, old)
        for (ref, remote), old in pairs:  # made one after the other, in this order
            if old is not None and old.pending:
                rebase.take_dirty(ref, remote)

    assert after(columns) == after(each)

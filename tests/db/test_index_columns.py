"""Places of many entities, made at once at the end of a commit, are those that each of them has."""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb import Index, cbor
from entidb.db import Database
from entidb.db import indexing as indexing_module
from entidb.db.index_columns import fields_of, having, names_of, places_of_all
from entidb.db.index_keys import INDEXED_BYTES_MAX
from entidb.db.indexing import NOWHERE, places_in
from entidb.db.records import INDEX, INDEX_COUNT, end_of
from entidb.storage import MemoryStorage

FIELD = st.one_of(st.none(), st.booleans(), st.integers(-5, 2**54), st.text(max_size=4))
MAPS = st.dictionaries(st.sampled_from(["a", "b", "c"]), FIELD)
VALUES = st.lists(st.one_of(MAPS, FIELD, st.lists(FIELD, max_size=2)), max_size=12)
NAMES = st.sampled_from([("a",), ("a", "b"), ("b", "a", "c")])


@given(values=VALUES, names=NAMES)
def test_fields_made_at_once_are_those_of_each(values: list[Any], names: tuple[str, ...]) -> None:
    law = places_in(tuple((name,) for name in names), False, None)
    there = having(values, names)
    assert there == [at for at, value in enumerate(values) if law(value) != NOWHERE]
    found = fields_of([values[at] for at in there], names)
    assert found == [law(values[at])[0] for at in there]
    assert fields_of(values, names) == (found if len(there) == len(values) else None)
    ids = [b"%05d" % at for at in range(len(values))]
    placed = [b"before" + law(values[at])[0] + ids[at] for at in there]
    assert (
        places_of_all(b"before", [values[at] for at in there], names, [ids[at] for at in there])
        == placed
    )
    assert places_of_all(b"before", values, names, ids) == (
        placed if len(there) == len(values) else None
    )


def test_what_has_no_room_in_a_key_is_cut() -> None:
    values = [{"a": "x" * 600}, {"a": "y"}, {"a": "z" * 500}, {"a": ""}]
    law = places_in((("a",),), False, None)
    found = fields_of(values, ["a"])
    assert found is not None and max(map(len, found)) == INDEXED_BYTES_MAX
    assert [(one,) for one in found] == list(map(law, values))
    ids = [b"%d" % at for at in range(len(values))]
    placed = [b"before" + one + each for one, each in zip(found, ids, strict=True)]
    assert places_of_all(b"before", values, ["a"], ids) == placed


@given(st.lists(st.text(max_size=3), min_size=4, max_size=8))
def test_places_of_text_made_at_once_are_those_of_each(texts: list[str]) -> None:
    law = places_in((("a",),), False, None)
    values, ids = [{"a": text} for text in texts], [b"%d" % at for at in range(len(texts))]
    assert places_of_all(b"x", values, ["a"], ids) == [
        b"x" + law(value)[0] + each for value, each in zip(values, ids, strict=True)
    ]


# ---------------------------------------------------------------- commits

INDEXES = {
    "one field": [Index("a")],
    "two fields, and another": [Index("a", "b"), Index("c")],
    "each": [Index("b", each=True), Index("a")],
    "unique beside one": [Index("u", unique=True), Index("a")],
}


def _entity(number: int, pick: random.Random) -> dict[str, Any]:
    entity: dict[str, Any] = {"u": number, "c": pick.choice(["x", "y\0", 3, None])}
    if pick.random() < 0.8:
        entity["a"] = pick.choice(["tea", "", 5, -1, 2**60, 1.5, True])
    if pick.random() < 0.5:
        entity["b"] = pick.choice([[], ["p", "q", "p"], "p", 7])
    return entity


def _work(db: Database, seed: int) -> None:
    """Commits in which entities come, change, change again and go, a few and many at a time."""
    pick = random.Random(seed)
    for count in (1, 3, 700, 40, 600, 700):
        with db.write("local") as writer:
            for part in range(pick.choice([1, 3])):
                # Many of those that the part before it has written, too.
                numbers = pick.sample(range(800), count)
                writes: dict[bytes, bytes | None] = {}
                for number in numbers:
                    key = uuid.UUID(int=number).bytes
                    gone = pick.random() < 0.2 and part > 0
                    writes[key] = None if gone else cbor.encode(_entity(number, pick))
                db.commit_writes(writer, {"notes": writes})


def _places(db: Database) -> list[tuple[bytes, bytes]]:
    with db.view() as view:
        kinds = (INDEX, INDEX_COUNT)
        return [row for kind in kinds for row in view.snapshot.scan(kind, end_of(kind))]


def _made(indexes: list[Index], seed: int) -> list[tuple[bytes, bytes]]:
    db = Database(MemoryStorage())
    db.collection("notes", indexes=indexes)
    db.wait_for_indexes()
    _work(db, seed)
    assert list(db.verify()) == []
    return _places(db)


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("seed", range(4))
def test_a_commit_leaves_what_the_law_leaves(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _made(INDEXES[name], seed)
    asked: list[Any] = []

    def nothing_at_once(index: Any) -> None:
        asked.append(names_of(index))

    monkeypatch.setattr(indexing_module, "names_of", nothing_at_once)
    assert found == _made(INDEXES[name], seed)
    assert found and any(asked)


def test_an_update_that_leaves_the_field_as_it_is_writes_nothing_into_the_index() -> None:
    """Also where an entity changes twice in a commit, and has its old value in the end."""
    db = Database(MemoryStorage())
    notes = db.collection("notes", indexes=[Index("a")])
    db.wait_for_indexes()
    ids = [uuid.UUID(int=number) for number in range(20)]
    with db.transaction() as tx:
        for at, one in enumerate(ids):
            tx[notes][one] = {"a": f"text {at}", "b": 0}

    def write(writer: Any, b: int, a: str = "text") -> None:
        writes: dict[bytes, bytes | None] = {
            one.bytes: cbor.encode({"a": f"{a} {at}", "b": b}) for at, one in enumerate(ids)
        }
        db.commit_writes(writer, {"notes": writes})

    for texts in (["text"], ["other", "text"]):
        with db.write("local") as writer:
            for step, text in enumerate(texts):
                write(writer, step + 1, text)
            changes = writer.finish()
            assert not [
                key for key in changes if key.startswith(INDEX) and changes[key] is not None
            ]
        assert list(db.verify()) == []
    with db.write("local") as writer:
        write(writer, 9, "other")
        changes = writer.finish()
        assert sum(key.startswith(INDEX) for key in changes) == 2 * len(ids)

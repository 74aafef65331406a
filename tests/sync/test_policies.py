"""Conflict policies (R23 to R27): what they answer, and that the docs say the same."""

from __future__ import annotations

import json
import re
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb import cbor
from entidb.errors import CborEncodeError, ConfigError
from entidb.sync import truth_table
from entidb.sync.conflict import CONFLICT_KINDS, Action, Conflict, ConflictResolution
from entidb.sync.merging import Merge, merge
from entidb.sync.policies import POLICIES, resolve_policy
from entidb.sync.truth_table import TRUTH_TABLE, TruthRow
from entidb.sync.whole_policies import client_wins, last_write_wins, manual, server_wins
from entidb.types import timestamp_from_ms

DOCS = Path(__file__).parents[2] / "docs" / "conflicts.md"
DEVICE_A, DEVICE_B = b"a" * 16, b"b" * 16
OLDER, NEWER = timestamp_from_ms(1_700_000_000_000), timestamp_from_ms(1_700_000_001_000)
ID = uuid.UUID("01900000-0000-7000-8000-000000000001")


def conflict_of(base: Any, local: Any, remote: Any, **fields: Any) -> Conflict:
    """A conflict between values; None is absent."""
    given_fields: dict[str, Any] = {
        "collection": "notes",
        "id_bytes": ID.bytes,
        "base_version": 3,
        "remote_version": 15,
        "local_device": DEVICE_A,
        "remote_device": DEVICE_B,
        "local_timestamp": OLDER,
        "remote_timestamp": NEWER,
    }
    return Conflict(
        base_payload=encoded(base),
        local_payload=encoded(local),
        remote_payload=encoded(remote),
        **(given_fields | fields),
    )


def encoded(value: Any) -> bytes | None:
    return None if value is None else cbor.encode(value)


def merged(policy: Merge, base: Any, local: Any, remote: Any) -> Any:
    resolution = policy(conflict_of(base, local, remote))
    assert resolution.action is Action.MERGE
    return resolution.value


def same_bytes(one: Any, other: Any) -> bool:
    return cbor.encode(one) == cbor.encode(other)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.0, 0.5, 1.0, 2.0])
    | texts
    | st.binary(max_size=2)
)
keys = st.sampled_from(["a", "b", "c", "d", "stock", "tags"])
fields = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)
maps = st.dictionaries(keys, fields, max_size=5)
values = maps | fields.filter(lambda value: value is not None)
merges = st.sampled_from(
    [
        merge,
        Merge("client_wins"),
        Merge("last_write_wins", counters=["stock", "a.b"]),
        Merge("manual", sets=["tags", "c.tags"]),
        Merge(lambda conflict: ConflictResolution.merge([conflict.local, conflict.remote])),
        Merge(counters=["stock", "d.stock"], sets=["tags"]),
    ]
)


# ---------------------------------------------------------------- conflicts and resolutions


def test_a_conflict_shows_the_three_values_and_the_entity():
    conflict = conflict_of({"a": 1}, {"a": 2}, None)
    assert conflict.entity_id == ID
    assert (conflict.base, conflict.local, conflict.remote) == ({"a": 1}, {"a": 2}, None)


def test_changing_a_value_of_a_conflict_does_not_change_the_conflict():
    conflict = conflict_of({"a": 1}, {"a": 2}, {"a": 3})
    conflict.local["a"] = 99
    assert conflict.local == {"a": 2}


def test_a_conflict_cannot_be_written_to():
    with pytest.raises(AttributeError):
        conflict_of(1, 2, 3).collection = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((None, 1, 2), "create/create"),
        ((0, 1, 2), "update/update"),
        ((0, 1, None), "update/delete"),
        ((0, None, 1), "delete/update"),
        ((None, None, 1), "delete/update"),
        ((None, 1, None), "update/delete"),
    ],
)
def test_the_kind_of_a_conflict_names_both_sides(values, kind):
    assert conflict_of(*values).kind == kind
    assert kind in CONFLICT_KINDS


def test_an_error_is_added_to_a_copy_of_the_conflict():
    conflict = conflict_of(0, 1, 2)
    assert conflict.with_error("ValueError: x").error == "ValueError: x"
    assert conflict.error is None


@given(values)
def test_a_merge_resolution_carries_the_canonical_bytes_of_its_value(value):
    resolution = ConflictResolution.merge(value)
    assert resolution.action is Action.MERGE
    assert resolution.payload == cbor.encode(value)
    assert same_bytes(resolution.value, value)


def test_merging_to_none_is_a_deletion():
    assert ConflictResolution.merge(None) == ConflictResolution(Action.MERGE, None)


def test_a_value_that_cannot_be_stored_is_refused_where_the_resolution_is_made():
    with pytest.raises(CborEncodeError):
        ConflictResolution.merge({"a": float("nan")})


@pytest.mark.parametrize(
    ("resolution", "action"),
    [
        (ConflictResolution.accept_remote(), Action.ACCEPT_REMOTE),
        (ConflictResolution.keep_local(), Action.KEEP_LOCAL),
        (ConflictResolution.skip(), Action.SKIP),
    ],
)
def test_the_other_resolutions_carry_no_value(resolution, action):
    assert (resolution.action, resolution.payload, resolution.value) == (action, None, None)


# ---------------------------------------------------------------- naming a policy


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_can_be_named(name):
    assert resolve_policy(name) is POLICIES[name]


def test_a_function_and_a_merge_are_policies_themselves():
    def mine(conflict: Conflict) -> ConflictResolution:
        return ConflictResolution.keep_local()

    options = Merge(counters=("stock",))
    assert resolve_policy(mine) is mine
    assert resolve_policy(options) is options


async def _async_policy(conflict: Conflict) -> ConflictResolution:
    return ConflictResolution.skip()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("newest", "server_wins, client_wins, last_write_wins, manual, merge"),
        (Merge, r"Merge\(\)"),
        (7, "not 7"),
        (_async_policy, "async"),
    ],
)
def test_what_cannot_be_a_policy_is_refused_with_the_way_out(spec, says):
    with pytest.raises(ConfigError, match=says):
        resolve_policy(spec)


# ---------------------------------------------------------------- the truth table


def _values_of(kind: str, when: str) -> tuple[Any, Any, Any]:
    base = {"title": "old", "body": "old"}
    local, remote = {"title": "mine", "body": "old"}, {"title": "theirs", "body": "old"}
    if when == truth_table.WHEN_OTHER_FIELDS:
        remote = {"title": "old", "body": "theirs"}
        if kind == "create/create":
            return None, {"title": "mine"}, {"body": "theirs"}
    return {
        "create/create": (None, local, remote),
        "update/update": (base, local, remote),
        "update/delete": (base, local, None),
        "delete/update": (base, None, remote),
    }[kind]


def _times_of(when: str) -> list[tuple[int, int]]:
    newer: tuple[int, int] = (NEWER, OLDER)
    older: tuple[int, int] = (OLDER, NEWER)
    equal: tuple[int, int] = (NEWER, NEWER)
    return {
        truth_table.WHEN_LOCAL_NEWER: [newer],
        truth_table.WHEN_REMOTE_NEWER: [older, equal],
    }.get(when, [newer, older, equal])


@pytest.mark.parametrize("kind", CONFLICT_KINDS)
@pytest.mark.parametrize("row", TRUTH_TABLE, ids=lambda row: f"{row.name}, {row.when}")
def test_every_policy_answers_what_the_truth_table_says(row: TruthRow, kind: str):
    for local_time, remote_time in _times_of(row.when):
        conflict = conflict_of(
            *_values_of(kind, row.when),
            local_timestamp=local_time,
            remote_timestamp=remote_time,
            # Equal times must not be decided by the device here: that case has its own test.
            local_device=DEVICE_A,
            remote_device=DEVICE_A,
        )
        assert conflict.kind == kind
        assert row.policy(conflict).action is row.actions[kind]


def test_the_truth_table_has_every_policy_that_can_be_named():
    assert set(POLICIES) <= {row.name for row in TRUTH_TABLE}
    for row in TRUTH_TABLE:
        assert set(row.actions) == set(CONFLICT_KINDS)
        if row.name in POLICIES:
            assert row.policy is POLICIES[row.name]


def test_the_policy_of_a_row_is_the_one_its_name_says():
    for row in TRUTH_TABLE:
        if row.name not in POLICIES:
            assert repr(eval(row.name, {"Merge": Merge})) == repr(row.policy)


def test_the_truth_table_in_the_docs_is_the_one_in_the_code():
    wanted = [["policy", "when", *CONFLICT_KINDS]]
    for row in TRUTH_TABLE:
        actions = [row.actions[kind].value for kind in CONFLICT_KINDS]
        wanted.append([row.name, row.when, *actions])
    assert _docs_table("policy | when") == wanted


def _docs_table(header: str) -> list[list[str]]:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {header}"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return [row for row in rows if not set("".join(row)) <= {"-", ":"}]


def test_the_docs_describe_every_policy_that_can_be_named():
    described = {row[0] for row in _docs_table("name | what it does")[1:]}
    assert described == {*POLICIES, "a function"}


def test_the_python_in_the_docs_compiles():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "conflicts.md", "exec")


def test_the_policies_in_the_docs_work():
    text = DOCS.read_text(encoding="utf-8")
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "def longer_text" in block
    )
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["longer_text"](conflict_of("a", "a long", "b")).action is Action.KEEP_LOCAL
    base = {"prio": 1, "by": "x"}
    result = merged(names["tasks"], base, base | {"prio": 2}, base | {"prio": 5})
    assert result == {"prio": 5, "by": "x"}


# ---------------------------------------------------------------- whole-entity policies


def test_last_write_wins_breaks_a_tie_by_the_device():
    tie = {"local_timestamp": NEWER, "remote_timestamp": NEWER}
    above = conflict_of(0, 1, 2, **tie, local_device=DEVICE_B, remote_device=DEVICE_A)
    below = conflict_of(0, 1, 2, **tie, local_device=DEVICE_A, remote_device=DEVICE_B)
    assert last_write_wins(above).action is Action.KEEP_LOCAL
    assert last_write_wins(below).action is Action.ACCEPT_REMOTE


@given(st.tuples(st.integers(0, 3), st.booleans()), st.tuples(st.integers(0, 3), st.booleans()))
def test_two_devices_never_both_win_by_the_last_write(one, other):
    def wins(mine: tuple[int, bool], theirs: tuple[int, bool]) -> bool:
        conflict = conflict_of(
            0,
            1,
            2,
            local_timestamp=mine[0],
            remote_timestamp=theirs[0],
            local_device=DEVICE_A if mine[1] else DEVICE_B,
            remote_device=DEVICE_A if theirs[1] else DEVICE_B,
        )
        return last_write_wins(conflict).action is Action.KEEP_LOCAL

    assert wins(one, other) + wins(other, one) == (0 if one == other else 1)


# ---------------------------------------------------------------- merge by field


def test_each_side_keeps_the_fields_only_it_changed():
    base = {"title": "a", "body": "b", "done": False}
    result = merged(merge, base, base | {"title": "mine"}, base | {"body": "theirs"})
    assert result == {"title": "mine", "body": "theirs", "done": False}


def test_removing_a_field_on_one_side_removes_it():
    assert merged(merge, {"a": 1, "b": 1}, {"b": 1}, {"a": 1, "b": 2}) == {"b": 2}
    assert merged(merge, {"a": 1, "b": 1}, {"a": 1, "b": 2}, {"b": 1}) == {"b": 2}
    assert merged(merge, {"a": 1, "b": 1}, {"b": 2}, {"b": 1}) == {"b": 2}


def test_a_null_field_is_a_value_and_not_a_missing_one():
    assert merged(merge, {"a": 1, "b": 1}, {"a": None, "b": 1}, {"a": 1}) == {"a": None}
    assert merged(merge, {"a": None}, {"b": 1}, {"a": None, "c": 1}) == {"b": 1, "c": 1}


def test_a_removed_field_against_a_changed_one_goes_to_the_fallback():
    base, without, changed = {"a": 1, "z": 0}, {"z": 1}, {"a": 2, "z": 0}
    assert merged(Merge("server_wins"), base, without, changed) == {"a": 2, "z": 1}
    assert merged(Merge("client_wins"), base, without, changed) == {"z": 1}


def test_maps_inside_are_merged_field_by_field():
    base = {"size": {"w": 1, "h": 1, "unit": {"name": "cm"}}}
    local = {"size": {"w": 2, "h": 1, "unit": {"name": "cm", "long": "x"}}}
    remote = {"size": {"w": 1, "h": 3, "unit": {"name": "mm"}}}
    wanted = {"size": {"w": 2, "h": 3, "unit": {"name": "mm", "long": "x"}}}
    assert merged(merge, base, local, remote) == wanted


def test_a_map_that_both_sides_added_is_merged_too():
    result = merged(merge, {"z": 0}, {"z": 0, "m": {"a": 1}}, {"z": 0, "m": {"b": 2}})
    assert result == {"z": 0, "m": {"a": 1, "b": 2}}


def test_a_list_is_one_value_unless_it_is_named_a_set():
    base, local, remote = {"tags": ["x"]}, {"tags": ["x", "a"]}, {"tags": ["x", "b"]}
    assert merged(merge, base, local, remote) == {"tags": ["x", "b"]}
    assert merged(Merge(sets=["tags"]), base, local, remote) == {"tags": ["x", "b", "a"]}


@pytest.mark.parametrize(
    ("one", "other"), [(True, 1), (1, 1.0), ([1], [True]), ({"x": 0}, {"x": 0.0})]
)
def test_equal_to_python_is_not_the_same_value(one, other):
    """Taking 1.0 for "unchanged" because it equals 1 would lose what was written."""
    local_changed = merged(merge, {"a": one, "b": 1}, {"a": other, "b": 1}, {"a": one, "b": 2})
    assert same_bytes(local_changed, {"a": other, "b": 2})
    both_changed = conflict_of({"a": "?"}, {"a": one}, {"a": other})
    assert Merge("manual")(both_changed).action is Action.SKIP


@pytest.mark.parametrize(
    ("fallback", "wins"),
    [("server_wins", "theirs"), ("client_wins", "mine"), ("last_write_wins", "mine")],
)
def test_the_fallback_decides_a_field_changed_on_both_sides(fallback, wins):
    conflict = conflict_of(
        {"t": "old", "n": 0},
        {"t": "mine", "n": 1},
        {"t": "theirs", "n": 0},
        local_timestamp=NEWER,
        remote_timestamp=OLDER,
    )
    assert Merge(fallback)(conflict).value == {"t": wins, "n": 1}


def test_one_field_left_to_a_person_holds_the_whole_conflict():
    conflict = conflict_of({"t": 0, "n": 0}, {"t": 1, "n": 1}, {"t": 2, "n": 0})
    assert Merge("manual")(conflict) == ConflictResolution.skip()


def test_a_function_as_fallback_is_asked_about_the_field():
    asked: list[Conflict] = []

    def longer(conflict: Conflict) -> ConflictResolution:
        asked.append(conflict)
        return ConflictResolution.merge(max(conflict.local, conflict.remote, key=len))

    base, local, remote = {"m": {"t": "a"}}, {"m": {"t": "abc"}}, {"m": {"t": "ab"}}
    assert merged(Merge(longer), base, local, remote) == {"m": {"t": "abc"}}
    (field,) = asked
    assert field.path == ("m", "t")
    assert (field.base, field.local, field.remote) == ("a", "abc", "ab")
    assert (field.entity_id, field.remote_version) == (ID, 15)


def test_a_fallback_can_tell_a_null_field_from_a_missing_one():
    seen: list[tuple[bytes | None, ...]] = []

    def look(conflict: Conflict) -> ConflictResolution:
        seen.append((conflict.base_payload, conflict.local_payload, conflict.remote_payload))
        return ConflictResolution.keep_local()

    assert merged(Merge(look), {"a": 1}, {"a": None}, {"z": 1}) == {"a": None, "z": 1}
    assert seen == [(b"\x01", b"\xf6", None)]


@pytest.mark.parametrize(
    ("resolution", "wanted"),
    [
        (ConflictResolution.merge(None), {"z": 1}),
        (ConflictResolution.accept_remote(), {"a": 3, "z": 1}),
        (ConflictResolution.keep_local(), {"a": 2, "z": 1}),
    ],
)
def test_every_answer_of_a_fallback_about_a_field_is_obeyed(resolution, wanted):
    policy = Merge(lambda conflict: resolution)
    assert merged(policy, {"a": 1}, {"a": 2, "z": 1}, {"a": 3}) == wanted


def test_a_fallback_that_raises_or_answers_nonsense_raises_out_of_the_merge():
    """R26: the engine holds the transaction then, and shows the error."""
    conflict = conflict_of({"a": 1}, {"a": 2}, {"a": 3})
    with pytest.raises(ZeroDivisionError):
        Merge(lambda conflict: 1 // 0)(conflict)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ConflictResolution"):
        Merge(lambda conflict: None)(conflict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "local", "remote"),
    [({"a": 1}, {"a": 2}, None), ({"a": 1}, None, {"a": 2}), (1, 2, 3), (1, {"a": 1}, {"b": 1})],
)
def test_what_cannot_be_merged_by_field_is_decided_whole_by_the_fallback(base, local, remote):
    conflict = conflict_of(base, local, remote)
    asked: list[Conflict] = []

    def fallback(conflict: Conflict) -> ConflictResolution:
        asked.append(conflict)
        return ConflictResolution.merge("mine")

    assert Merge(fallback)(conflict).value == "mine"
    assert asked == [conflict]


def test_entities_created_on_both_sides_are_merged_by_field():
    assert merged(merge, None, {"a": 1, "t": 1}, {"b": 2, "t": 2}) == {"a": 1, "b": 2, "t": 2}


# ---------------------------------------------------------------- counters


def test_a_counter_gets_what_both_sides_added():
    policy = Merge(counters=["stock", "size.pages"])
    base = {"stock": 10, "size": {"pages": 1}}
    local = {"stock": 8, "size": {"pages": 2}}
    remote = {"stock": 15, "size": {"pages": 4}}
    assert merged(policy, base, local, remote) == {"stock": 13, "size": {"pages": 5}}


def test_a_counter_that_both_sides_set_to_the_same_number_still_gets_both_changes():
    policy = Merge(counters=["stock", "size.pages"])
    assert merged(policy, {"stock": 5}, {"stock": 4, "a": 1}, {"stock": 4}) == {"stock": 3, "a": 1}
    inside = {"size": {"pages": 4}}
    result = merged(policy, {"size": {"pages": 5}}, inside | {"a": 1}, inside)
    assert result == {"size": {"pages": 3}, "a": 1}


def test_a_missing_counter_is_zero():
    policy = Merge(counters=["n"])
    assert merged(policy, None, {"n": 2}, {"n": 3}) == {"n": 5}
    assert merged(policy, {"n": 5, "z": 0}, {"z": 0}, {"n": 7, "z": 0}) == {"n": 2, "z": 0}
    assert merged(policy, {"n": 5, "z": 0}, {"z": 1}, {"z": 2}) == {"z": 2}


def test_a_counter_of_floats_stays_a_float_and_one_of_integers_an_integer():
    policy = Merge(counters=["n"])
    assert same_bytes(merged(policy, {"n": 1}, {"n": 2}, {"n": 3}), {"n": 4})
    assert same_bytes(merged(policy, {"n": 1.5}, {"n": 2.5}, {"n": 3.5}), {"n": 4.5})


@pytest.mark.parametrize("odd", [True, "3", None, [1]])
def test_a_counter_that_is_no_number_goes_to_the_fallback(odd):
    result = merged(Merge(counters=["n"]), {"n": 3}, {"n": odd}, {"n": 5})
    assert same_bytes(result, {"n": 5})


@pytest.mark.parametrize(
    ("base", "local", "remote"),
    [(0, 2**64 - 1, 1), (0, -(2**64), -1), (0.0, 1.5e308, 1.5e308), (0, 2**64 - 1, 2**64 - 1)],
)
def test_a_counter_beyond_what_can_be_stored_raises_and_names_the_field(base, local, remote):
    policy = Merge(counters=["m.n"])
    conflict = conflict_of({"m": {"n": base}}, {"m": {"n": local}}, {"m": {"n": remote}})
    with pytest.raises(ValueError, match=r"m\.n"):
        policy(conflict)


def test_a_counter_can_reach_the_last_integer():
    policy = Merge(counters=["n"])
    assert merged(policy, {"n": 0}, {"n": 2**64 - 2}, {"n": 1}) == {"n": 2**64 - 1}
    assert merged(policy, {"n": 0}, {"n": 1 - 2**64}, {"n": -1}) == {"n": -(2**64)}


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=6), st.randoms())
def test_counters_end_at_the_same_number_in_whatever_order_devices_sync(deltas, random):
    """Each device changed the same 100, and is merged onto what the earlier ones made of it."""
    policy = Merge(counters=["n"])

    def synced(order: list[int]) -> int:
        server = {"n": 100}
        for delta in order:
            server = merged(policy, {"n": 100}, {"n": 100 + delta}, server)
        return server["n"]

    shuffled = random.sample(deltas, len(deltas))
    assert synced(deltas) == synced(shuffled) == 100 + sum(deltas)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=5), st.integers(-5, 5))
def test_pending_changes_of_a_counter_rebased_in_turn_add_up_to_all_of_them(deltas, theirs):
    """R25: like a cherry-pick, each operation onto what the one before became."""
    policy = Merge(counters=["n"])
    local = [{"n": sum(deltas[:index])} for index in range(len(deltas) + 1)]
    onto = {"n": theirs}
    for below, mine in pairwise(local):
        onto = merged(policy, below, mine, onto)
    assert onto == {"n": sum(deltas) + theirs}


numbers = st.integers(-(2**53), 2**53) | st.floats(-1e300, 1e300).filter(lambda x: x != 0.0)


@given(numbers, numbers, numbers)
def test_the_sides_of_a_counter_can_be_swapped(base, local, remote):
    policy = Merge(counters=["n"])
    one = merged(policy, {"n": base}, {"n": local}, {"n": remote})
    assert same_bytes(one, merged(policy, {"n": base}, {"n": remote}, {"n": local}))


# ---------------------------------------------------------------- sets

items = st.lists(st.integers(0, 6) | st.sampled_from(["a", "b", True, 1.0]), max_size=6)


def _bytes_of(items: list[Any]) -> set[bytes]:
    return {cbor.encode(item) for item in items}


@given(items, items, items)
def test_a_set_loses_what_either_side_removed_and_has_what_either_added(base, local, remote):
    conflict = conflict_of({"tags": base}, {"tags": local}, {"tags": remote})
    result = Merge(sets=["tags"])(conflict).value["tags"]
    old, mine, theirs = map(_bytes_of, (base, local, remote))
    assert _bytes_of(result) == (mine & theirs) | (mine - old) | (theirs - old)


@given(items, items, items)
def test_a_set_changed_on_both_sides_has_no_duplicates_and_keeps_the_servers_order(
    base, local, remote
):
    if same_bytes(local, base) or same_bytes(remote, base) or same_bytes(local, remote):
        return
    result = merged(Merge(sets=["tags"]), {"tags": base}, {"tags": local}, {"tags": remote})
    order = [cbor.encode(item) for item in result["tags"]]
    theirs = list(dict.fromkeys(cbor.encode(item) for item in remote))
    assert len(set(order)) == len(order)
    assert order[: len([key for key in theirs if key in order])] == [
        key for key in theirs if key in order
    ]


def test_a_missing_set_is_empty_and_an_emptied_one_stays_removed():
    policy = Merge(sets=["tags"])
    assert merged(policy, None, {"tags": [1]}, {"tags": [2]}) == {"tags": [2, 1]}
    assert merged(policy, {"tags": [1]}, {"z": 1}, {"tags": [1, 2]}) == {"z": 1, "tags": [2]}
    assert merged(policy, {"tags": [1]}, {"z": 1}, {"tags": []}) == {"z": 1}


def test_maps_in_a_set_are_compared_by_their_bytes():
    local, remote = [{"id": 1}, {"id": 2}], [{"id": 1.0}]
    result = merged(Merge(sets=["s"]), {"s": []}, {"s": local}, {"s": remote})
    assert same_bytes(result, {"s": [{"id": 1.0}, {"id": 1}, {"id": 2}]})


def test_a_set_that_is_no_list_goes_to_the_fallback():
    assert merged(Merge(sets=["s"]), {"s": [1]}, {"s": "x"}, {"s": [2]}) == {"s": [2]}


# ---------------------------------------------------------------- options of Merge


@pytest.mark.parametrize(
    "options",
    [
        {"counters": "stock"},
        {"counters": [""]},
        {"counters": ["a..b"]},
        {"sets": [3]},
        {"sets": [()]},
        {"counters": ["a"], "sets": ["a"]},
        {"counters": ["a", "a.b"]},
        {"counters": ["a.b"], "sets": ["a"]},
        {"fallback": "merge"},
        {"fallback": Merge()},
        {"fallback": "newest"},
        {"fallback": Merge},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_when_the_policy_is_made(options):
    with pytest.raises(ConfigError):
        Merge(**options)


def test_a_key_with_a_dot_is_named_by_a_tuple():
    policy = Merge(counters=[("a.b",)])
    assert merged(policy, {"a.b": 1}, {"a.b": 2}, {"a.b": 3}) == {"a.b": 4}


def test_the_policy_shows_its_options():
    policy = Merge("manual", counters=["stock"], sets=["tags"])
    assert repr(policy) == "Merge(fallback='manual', counters=['stock'], sets=['tags'])"


# ---------------------------------------------------------------- properties of every merge


@given(merges, st.none() | values, st.none() | values, st.none() | values)
def test_a_merge_is_deterministic_and_does_not_depend_on_the_order_of_keys(
    policy, base, local, remote
):
    conflict = conflict_of(base, local, remote)
    turned = conflict_of(*map(_turned, (base, local, remote)))
    assert conflict == turned
    assert policy(conflict) == policy(turned)


def _turned(value: Any) -> Any:
    """The same value with the keys of its maps put in the other way round."""
    if isinstance(value, dict):
        return {key: _turned(value[key]) for key in reversed(value)}
    return [_turned(item) for item in value] if isinstance(value, list) else value


@given(merges, st.none() | values, st.none() | values)
def test_a_side_that_changed_nothing_takes_the_other(policy, base, changed):
    assert policy(conflict_of(base, base, changed)).payload == encoded(changed)
    assert policy(conflict_of(base, changed, base)).payload == encoded(changed)


@given(merges, maps, maps, maps)
def test_a_field_inside_that_one_side_left_alone_is_the_other_sides(policy, base, local, remote):
    """The property above, for every field, whatever happens beside it."""
    resolution = policy(conflict_of({"f": base, "z": 0}, {"f": local, "z": 0}, {"f": base, "z": 1}))
    assert same_bytes(resolution.value, {"f": local, "z": 1})
    resolution = policy(
        conflict_of({"f": base, "z": 0}, {"f": base, "z": 1}, {"f": remote, "z": 0})
    )
    assert same_bytes(resolution.value, {"f": remote, "z": 1})


@given(maps, maps)
def test_without_counters_two_sides_that_agree_are_left_as_they_are(base, agreed):
    policy = Merge("manual", sets=["tags"])
    assert same_bytes(merged(policy, base, agreed, agreed), agreed)


@given(maps, maps, maps)
def test_server_and_client_as_fallback_are_mirror_images(base, local, remote):
    one = merged(Merge("server_wins"), base, local, remote)
    assert same_bytes(one, merged(Merge("client_wins"), base, remote, local))


@given(maps, maps, maps)
def test_a_merge_left_to_nobody_has_nothing_that_either_side_did_not_write(base, local, remote):
    resolution = Merge("manual")(conflict_of(base, local, remote))
    if resolution.action is Action.MERGE:
        for key, value in resolution.value.items():
            sides = [side[key] for side in (local, remote) if key in side]
            assert isinstance(value, dict) or any(same_bytes(value, side) for side in sides)
    else:
        assert resolution.action is Action.SKIP


# ---------------------------------------------------------------- explain


def test_an_explanation_says_who_did_what_when_and_what_can_be_done():
    conflict = conflict_of(
        {"title": "old", "body": "b", "size": {"w": 1}},
        {"title": "mine", "body": "b", "size": {"w": 2}},
        {"title": "theirs", "body": "new", "size": {"w": 1}},
        transaction_id=ID.bytes,
    )
    text = conflict.explain()
    for part in (
        str(ID),
        "'notes'",
        "was changed here and on the server",
        "version 15, 2023-11-14 22:13:21 UTC by device 62626262",
        "not on the server yet, 2023-11-14 22:13:20 UTC by device 61616161",
        "Different on both sides: 'title'",
        "Changed only here: 'size.w'",
        "Changed only on the server: 'body'",
        '"mine"',
        '"theirs"',
    ):
        assert part in text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((None, 1, 2), "created here and on the server"),
        ((0, 1, None), "changed here and deleted on the server"),
        ((0, None, 1), "deleted here and changed on the server"),
    ],
)
def test_an_explanation_says_what_kind_of_conflict_it_is(values, says):
    assert says in conflict_of(*values).explain()


def test_an_explanation_names_the_error_of_the_policy_and_the_field():
    conflict = conflict_of(0, 1, 2, path=("size", "w"), error="ValueError: no")
    assert "ValueError: no" in conflict.explain()
    assert "'size.w'" in conflict.explain()


def test_an_explanation_does_not_make_up_a_time_it_does_not_know():
    assert "1970" not in conflict_of(0, 1, 2).explain()
    assert "unknown time" in conflict_of(0, 1, 2).explain()


def test_an_explanation_never_writes_control_characters_of_a_value():
    conflict = conflict_of({"\x1b[2J": 1}, {"\x1b[2J": "\x1b[31m"}, {"\x1b[2J": "\x07"})
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", conflict.explain())


def test_an_explanation_of_a_large_value_stays_short():
    many = {f"field {number}": 1 for number in range(1000)}
    local, remote = (json.loads(json.dumps(many).replace("1,", side)) for side in ("2,", "3,"))
    assert len(conflict_of(many, local, remote).explain()) < 3000


@given(st.none() | values, values, st.none() | values, st.integers(0, 2**64 - 1))
def test_every_conflict_can_be_explained(base, local, remote, timestamp):
    conflict = conflict_of(base, local, remote, base_timestamp=timestamp, local_timestamp=timestamp)
    assert len(conflict.explain().splitlines()) >= 6


def test_the_shipped_policies_are_exported_by_name():
    shipped = (server_wins, client_wins, last_write_wins, manual, merge)
    assert tuple(POLICIES.values()) == shipped

"""The three-way merge by field, with counters, sets and a fallback (R26).

Pure functions, as in ``conflict``. ``apply.rebase`` decides which operations of a chain are merged
in which order (R25).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Final, NoReturn

from msgspec.structs import replace

from entidb import cbor
from entidb.db.fields import ABSENT as _ABSENT
from entidb.db.fields import Overruled, Path, Side
from entidb.db.fields import same as _same
from entidb.errors import ConfigError
from entidb.sync.conflict import (
    NO_FIELDS,
    SKIP,
    Action,
    Conflict,
    ConflictPolicy,
    ConflictResolution,
    check_policy,
    decoded,
)
from entidb.sync.whole_policies import POLICY_NAMES, WHOLE, no_such_policy
from entidb.types import kind_name


class _Rule(Enum):
    COUNTER = "counter"
    SET = "set"


_INTEGER_MIN: Final = -(2**64)
_INTEGER_MAX: Final = 2**64 - 1
FieldPaths = Iterable[str | tuple[str, ...]]


class Merge:
    """Three-way merge by field, nested maps included (R26).

    * Changed on one side only: that side's. Removing a field is a change like any other.
    * Changed on both sides to the same: that.
    * Changed on both sides, and a map on both: field by field in turn.
    * Listed in ``counters``: base + what the device added + what the server added. Integers and
      floats, missing is 0.
    * Listed in ``sets``: a list without duplicates; what either side removed is gone, what either
      side added is there, the server's order first, then the device's additions in theirs.
    * Changed on both sides otherwise: ``fallback`` decides the *field*. A function is asked with
      a ``Conflict`` about the field, named in ``path``; its ``merge(None)`` removes the field, its
      ``skip`` holds the whole conflict.

    A deletion of the entity against a change, and values that are not maps, are decided whole by
    ``fallback``. ``1``, ``1.0`` and ``True`` are different values.

    Paths are ``"stock"``, ``"size.width"``, or a tuple where a key has a dot in it. Bad options
    raise ``ConfigError``. A counter that leaves the range of CBOR (integers −2^64 … 2^64−1, finite
    floats) raises ``ValueError``, which holds the transaction: a stock that wrapped around or stuck
    at a limit would be wrong, and nothing would show it.
    """

    __slots__ = ("_arguments", "_fallback", "_fallback_is_whole", "_rules")

    def __init__(
        self,
        fallback: str | ConflictPolicy = "server_wins",
        *,
        counters: FieldPaths = (),
        sets: FieldPaths = (),
    ) -> None:
        self._fallback = _resolve_fallback(fallback)
        self._fallback_is_whole = any(self._fallback is policy for policy in WHOLE.values())
        self._rules: dict[str, Any] = {}
        counter_paths = _add_rules(self._rules, "counters", counters, _Rule.COUNTER)
        set_paths = _add_rules(self._rules, "sets", sets, _Rule.SET)
        self._arguments = (fallback, counter_paths, set_paths)

    @property
    def merges_equal(self) -> bool:
        """Counters add up even where both sides arrived at the same bytes."""
        return bool(self._arguments[1])

    @property
    def fallback(self) -> ConflictPolicy:
        """What decides where nothing can be merged by field."""
        return self._fallback

    def __call__(self, conflict: Conflict, /) -> ConflictResolution:
        base, local, remote = conflict.base_payload, conflict.local_payload, conflict.remote_payload
        if local == base:
            return ConflictResolution(Action.MERGE, remote, ())
        if remote == base:
            return ConflictResolution(Action.MERGE, local, ())
        was, mine, theirs = decoded(base), decoded(local), decoded(remote)
        if was is None:
            was = NO_FIELDS
        elif type(was) is not dict:
            return _checked(self._fallback(conflict))
        if type(mine) is not dict or type(theirs) is not dict:
            return _checked(self._fallback(conflict))
        lost: list[Overruled] = []
        try:
            merged = self._merge_maps(conflict, was, mine, theirs, self._rules, (), lost)
        except _LeftOpen:
            return SKIP
        return ConflictResolution(Action.MERGE, cbor.encode(merged), tuple(lost))

    def __repr__(self) -> str:
        fallback, counters, sets = self._arguments
        name = fallback if isinstance(fallback, str) else getattr(fallback, "__name__", fallback)
        return f"Merge(fallback={name!r}, counters={counters!r}, sets={sets!r})"

    def _merge_maps(
        self,
        conflict: Conflict,
        base: Mapping[str, Any],
        local: dict[str, Any],
        remote: dict[str, Any],
        rules: Mapping[str, Any],
        path: Path,
        lost: list[Overruled],
    ) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        # Fields that only the base has were removed on both sides. No set of keys here: its order
        # differs between processes, and a fallback must be asked in the same order everywhere.
        keys = [*remote, *[key for key in local if key not in remote]]
        for key in keys:
            was = base.get(key, _ABSENT)
            mine = local.get(key, _ABSENT)
            theirs = remote.get(key, _ABSENT)
            if _same(was, mine):
                value = theirs
            elif _same(was, theirs):
                value = mine
            else:
                rule = rules.get(key)
                value = self._both_changed(conflict, was, mine, theirs, rule, (*path, key), lost)
            if value is not _ABSENT:
                merged[key] = value
        return merged

    def _both_changed(
        self,
        conflict: Conflict,
        was: Any,
        mine: Any,
        theirs: Any,
        rule: Any,
        path: Path,
        lost: list[Overruled],
    ) -> Any:
        if rule is _Rule.COUNTER and _are_numbers(was, mine, theirs):
            # Before the comparison: two devices that both took one out of 5 wrote the same 4.
            return _add_up(was, mine, theirs, path)
        if type(mine) is dict and type(theirs) is dict and (was is _ABSENT or type(was) is dict):
            inner = rule if type(rule) is dict else NO_FIELDS
            below = NO_FIELDS if was is _ABSENT else was
            return self._merge_maps(conflict, below, mine, theirs, inner, path, lost)
        if _same(mine, theirs):
            return mine
        if rule is _Rule.SET and _are_lists(was, mine, theirs):
            return _unite(was, mine, theirs)
        return self._ask(conflict, was, mine, theirs, path, lost)

    def _ask(
        self,
        conflict: Conflict,
        was: Any,
        mine: Any,
        theirs: Any,
        path: Path,
        lost: list[Overruled],
    ) -> Any:
        if not self._fallback_is_whole:
            conflict = replace(
                conflict,
                base_payload=_encode(was),
                local_payload=_encode(mine),
                remote_payload=_encode(theirs),
                path=path,
            )
        resolution = _checked(self._fallback(conflict))
        if resolution.action is Action.SKIP:
            raise _LeftOpen
        if resolution.action is Action.MERGE:
            value = _ABSENT if resolution.payload is None else decoded(resolution.payload)
            chosen = resolution.payload
            if not _same(mine, value):
                lost.append((Side.LOCAL, path, _encode(mine), chosen, None))
            if not _same(theirs, value):
                lost.append((Side.REMOTE, path, _encode(theirs), chosen, None))
            return value
        if resolution.action is Action.KEEP_LOCAL:
            lost.append((Side.REMOTE, path, _encode(theirs), _encode(mine), None))
            return mine
        lost.append((Side.LOCAL, path, _encode(mine), _encode(theirs), None))
        return theirs


class _LeftOpen(Exception):
    """The fallback skipped a field, so nothing is decided."""


def _checked(resolution: object) -> ConflictResolution:
    if isinstance(resolution, ConflictResolution):
        return resolution
    raise TypeError(
        f"the fallback answered {type(resolution).__name__}; return a ConflictResolution, such as "
        "ConflictResolution.keep_local()"
    )


# ---------------------------------------------------------------- options of Merge


def _resolve_fallback(spec: str | ConflictPolicy) -> ConflictPolicy:
    if isinstance(spec, str) and spec in WHOLE:
        return WHOLE[spec]
    if isinstance(spec, str) and spec not in POLICY_NAMES:
        raise no_such_policy(spec)
    if isinstance(spec, (str, Merge)):
        raise ConfigError(
            "the fallback of a Merge decides what cannot be merged, so it cannot be another "
            "merge; use server_wins, client_wins, last_write_wins, manual or a function"
        )
    return check_policy(spec)


def _add_rules(rules: dict[str, Any], option: str, paths: FieldPaths, rule: _Rule) -> list[str]:
    if isinstance(paths, str):
        raise ConfigError(f"{option} takes several paths; write {option}=({paths!r},)")
    if not isinstance(paths, Iterable):
        raise ConfigError(f"{option} takes several paths, not {kind_name(paths)}")
    shown = []
    for spec in paths:
        path: object = tuple(spec.split(".")) if isinstance(spec, str) else spec
        if not isinstance(path, tuple) or not path or not all(map(_is_key, path)):
            raise ConfigError(f'{option} takes paths such as "stock" or "size.width", not {spec!r}')
        _add_rule(rules, path, rule)
        shown.append(".".join(path))
    return shown


def _is_key(key: object) -> bool:
    return isinstance(key, str) and key != ""


def _add_rule(rules: dict[str, Any], path: Path, rule: _Rule) -> None:
    *parents, last = path
    for key in parents:
        rules = rules.setdefault(key, {})
        if not isinstance(rules, dict):
            _refuse_overlap(path)
    if rules.setdefault(last, rule) is not rule:
        _refuse_overlap(path)


def _refuse_overlap(path: Path) -> NoReturn:
    raise ConfigError(
        f"{'.'.join(path)!r} is named twice, or is inside another counter or set; "
        "one field is merged in one way"
    )


# ---------------------------------------------------------------- values


def _encode(field: Any) -> bytes | None:
    return None if field is _ABSENT else cbor.encode(field)


def _are_numbers(was: Any, mine: Any, theirs: Any) -> bool:
    return all(type(field) in _NUMBER_OR_ABSENT for field in (was, mine, theirs))


# type() and not isinstance(): True is an int to Python, and no count.
_NUMBER_OR_ABSENT: Final = frozenset({int, float, type(_ABSENT)})


def _add_up(was: Any, mine: Any, theirs: Any, path: Path) -> int | float:
    base, local, remote = (0 if field is _ABSENT else field for field in (was, mine, theirs))
    # Both additions together first, so that the sides can be swapped without another rounding.
    total = base + ((local - base) + (remote - base))
    fits = math.isfinite(total) if type(total) is float else _INTEGER_MIN <= total <= _INTEGER_MAX
    if fits:
        return total
    raise ValueError(
        f"the counter {'.'.join(path)!r} cannot be merged: {base} with {local - base:+} here and "
        f"{remote - base:+} on the server is beyond the numbers that can be stored"
    )


def _are_lists(was: Any, mine: Any, theirs: Any) -> bool:
    return all(type(field) is list or field is _ABSENT for field in (was, mine, theirs))


def _unite(was: Any, mine: Any, theirs: Any) -> Any:
    old, local, remote = _by_bytes(was), _by_bytes(mine), _by_bytes(theirs)
    united = [item for key, item in remote.items() if key in local or key not in old]
    united += [item for key, item in local.items() if key not in remote and key not in old]
    removed = mine is _ABSENT or theirs is _ABSENT
    return _ABSENT if removed and not united else united


def _by_bytes(field: Any) -> dict[bytes, Any]:
    """A list's items by their canonical bytes, first occurrence first; a missing list is empty."""
    items: dict[bytes, Any] = {}
    if field is not _ABSENT:
        for item in field:
            items.setdefault(cbor.encode(item), item)
    return items


merge: Final = Merge()

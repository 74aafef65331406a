"""Who wins when two devices changed the same entity: the three values, the answers, the policies.

Everything here is a pure function of its arguments: no clock, no randomness, no I/O, nothing
remembered between calls (R26). What the answers do to the outbox is ``rebase``'s; this module
neither reads nor writes a database. ``docs/conflicts.md`` is the same subject for users.

    Conflict(base, local, remote) ──▶ policy ──▶ ConflictResolution
                                                 ├── accept_remote
                                                 ├── keep_local
                                                 ├── merge(value)
                                                 └── skip
"""

from __future__ import annotations

import inspect
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, NoReturn, Protocol

from msgspec import Struct
from msgspec.structs import replace

from entidb import cbor
from entidb.db.fields import ABSENT as _ABSENT
from entidb.db.fields import Overruled, Path, Side, lost_fields, shown, when_by
from entidb.db.fields import same as _same
from entidb.errors import ConfigError
from entidb.types import ID_BYTES, uuid_from_bytes

CREATE_CREATE: Final = "create/create"
UPDATE_UPDATE: Final = "update/update"
UPDATE_DELETE: Final = "update/delete"
DELETE_UPDATE: Final = "delete/update"
#: What a conflict can be, this device first. Delete against delete is none (R24).
CONFLICT_KINDS: Final = (CREATE_CREATE, UPDATE_UPDATE, UPDATE_DELETE, DELETE_UPDATE)

_NO_DEVICE: Final = bytes(ID_BYTES)


# ---------------------------------------------------------------- the question


class Conflict(Struct, frozen=True, kw_only=True, gc=False):
    """One entity, or one field of it, that changed here and on the server (R23).

    ``base`` is the last server state the device knew, ``local`` what the device made of it, and
    ``remote`` what the server has now. Versions are the server's commit sequences, device ids 16
    bytes, timestamps hybrid logical clocks (``entidb.types.Timestamp``); the local one is already
    clamped to the server's time. ``transaction_id`` is the first pending transaction involved.

    ``path`` is empty for a whole entity. Where ``Merge`` asks its fallback about one field, it
    names the field, and the three values are that field's.

    ``error`` is what a policy raised that was asked about this conflict, None otherwise.
    """

    collection: str
    id_bytes: bytes
    base_payload: bytes | None
    local_payload: bytes | None
    remote_payload: bytes | None
    base_version: int = 0
    remote_version: int = 0
    base_device: bytes = _NO_DEVICE
    local_device: bytes = _NO_DEVICE
    remote_device: bytes = _NO_DEVICE
    base_timestamp: int = 0
    local_timestamp: int = 0
    remote_timestamp: int = 0
    transaction_id: bytes = _NO_DEVICE
    error: str | None = None
    path: Path = ()

    @property
    def entity_id(self) -> uuid.UUID:
        return uuid_from_bytes(self.id_bytes)

    # The values are decoded anew each time they are asked for. A policy may therefore build its
    # answer by changing what it got, and still finds the same three values when asked again.

    @property
    def base(self) -> Any:
        """A fresh copy of the old server value; None if there was none.

        A field can also hold null; there ``base_payload is None`` says that it is absent. The
        same is true for ``local`` and ``remote``.
        """
        return _decode(self.base_payload)

    @property
    def local(self) -> Any:
        """A fresh copy of this device's value; None if it deleted the entity."""
        return _decode(self.local_payload)

    @property
    def remote(self) -> Any:
        """A fresh copy of the server's value; None if it was deleted there."""
        return _decode(self.remote_payload)

    @property
    def kind(self) -> str:
        """One of ``CONFLICT_KINDS``: what this device did / what was done on the server."""
        if self.local_payload is None:
            return DELETE_UPDATE
        if self.remote_payload is None:
            return UPDATE_DELETE
        return CREATE_CREATE if self.base_payload is None else UPDATE_UPDATE

    def with_error(self, error: str) -> Conflict:
        """The same conflict with what a policy raised when it was asked."""
        return replace(self, error=error)

    def explain(self) -> str:
        """Several plain lines for a person: the three values, by whom and when, what differs,
        and the choices. Made for reading; programs use the fields."""
        return "\n".join(_explain(self))


# ---------------------------------------------------------------- the answer


class Action(Enum):
    """What a resolution does (R25)."""

    #: The server's value stays; the transaction goes to the ``discarded`` list.
    ACCEPT_REMOTE = "accept_remote"
    #: The device's value is pushed on top of the server's.
    KEEP_LOCAL = "keep_local"
    #: A third value is pushed on top of the server's.
    MERGE = "merge"
    #: Undecided: the transaction is held until somebody resolves the conflict.
    SKIP = "skip"


class ConflictResolution(Struct, frozen=True, eq=False, gc=False):
    """A policy's answer. Make one with the four constructors.

    ``payload`` is the merged value in canonical CBOR; None for a deletion and for all actions
    but ``Action.MERGE``.

    ``overruled`` is what a merge decided against, where it knows: a counter that adds up both
    sides has neither one's value, and overrules nobody. None: the values are compared, and what
    either side changed and the answer does not hold counts as overruled (R4). It is no part of
    the answer, so two that differ in nothing else are equal.
    """

    action: Action
    payload: bytes | None = None
    overruled: tuple[Overruled, ...] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConflictResolution):
            return NotImplemented
        return (self.action, self.payload) == (other.action, other.payload)

    def __hash__(self) -> int:
        return hash((self.action, self.payload))

    @property
    def value(self) -> Any:
        """A fresh copy of the merged value; None for a deletion and for the other actions."""
        return _decode(self.payload)

    @classmethod
    def accept_remote(cls) -> ConflictResolution:
        """Take the server's value and withdraw the transaction, whole, to ``discarded``."""
        return _ACCEPT_REMOTE

    @classmethod
    def keep_local(cls) -> ConflictResolution:
        """Keep the device's value and push it over the server's."""
        return _KEEP_LOCAL

    @classmethod
    def merge(cls, value: Any) -> ConflictResolution:
        """Push ``value`` over the server's; None deletes the entity (or field).

        Raises ``CborEncodeError`` here, where the value was made, if it cannot be stored.
        """
        return cls(Action.MERGE, None if value is None else cbor.encode(value))

    @classmethod
    def skip(cls) -> ConflictResolution:
        """Do not decide: hold the transaction, list the conflict as unresolved."""
        return _SKIP


def overruled_by(resolution: ConflictResolution, conflict: Conflict) -> Sequence[Overruled]:
    """What ``resolution`` decides against (R4): what one side changed of the base and the outcome
    does not hold. Nothing if it is still open.

    ``keep_local`` is a decision about the entity, so that is what is overruled; of large ones, and
    where there is a value of a third kind, it is the fields."""
    if resolution.overruled is not None:
        return resolution.overruled
    base, local, remote = conflict.base_payload, conflict.local_payload, conflict.remote_payload
    action = resolution.action
    if action is Action.SKIP:
        return ()
    if action is Action.KEEP_LOCAL:
        if remote in (base, local):
            return ()
        size = len(base or b"") + len(local or b"") + len(remote or b"")
        if size <= _WHOLE_BYTES_MAX:
            return ((Side.REMOTE, (), remote, local, base),)
    value = {Action.KEEP_LOCAL: local, Action.ACCEPT_REMOTE: remote}.get(action, resolution.payload)
    return [
        (side, path, lost, won, None if path else base)
        for side, payload in ((Side.LOCAL, local), (Side.REMOTE, remote))
        for path, lost, won in lost_fields(base, payload, value)
    ]


#: Entities that are kept whole, with their base, rather than looked through at once.
_WHOLE_BYTES_MAX: Final = 8192
_ACCEPT_REMOTE: Final = ConflictResolution(Action.ACCEPT_REMOTE)
_KEEP_LOCAL: Final = ConflictResolution(Action.KEEP_LOCAL)
_SKIP: Final = ConflictResolution(Action.SKIP)


class ConflictPolicy(Protocol):
    """Decides a conflict. Any function that takes a ``Conflict`` is one.

    The answer must depend on the conflict alone: a device that crashes between asking and storing
    asks again, and has to get the same answer. Raising holds the transaction and reports the
    error (R26); it never stops the rest of the outbox.

    A policy may have an attribute ``merges_equal``. Where it is true, two sides that changed an
    entity to the same bytes are a conflict for it, and not simply done (R24): for a counter, 5 to
    4 here and 5 to 4 there is two sales.
    """

    def __call__(self, conflict: Conflict, /) -> ConflictResolution: ...


# ---------------------------------------------------------------- policies for whole entities


def server_wins(conflict: Conflict, /) -> ConflictResolution:
    """The server's value, always. What the device wrote goes to ``discarded``."""
    return _ACCEPT_REMOTE


def client_wins(conflict: Conflict, /) -> ConflictResolution:
    """The device's value, always. With several such devices the last one to sync wins."""
    return _KEEP_LOCAL


def last_write_wins(conflict: Conflict, /) -> ConflictResolution:
    """The later of the two by (timestamp, device id); the server's when they are equal (R27)."""
    local = (conflict.local_timestamp, conflict.local_device)
    remote = (conflict.remote_timestamp, conflict.remote_device)
    return _KEEP_LOCAL if local > remote else _ACCEPT_REMOTE


def manual(conflict: Conflict, /) -> ConflictResolution:
    """A person decides: the transaction is held until ``resolve()`` is called."""
    return _SKIP


#: Policies that look at no value, so that Merge need not build a field's conflict for them.
_WHOLE: Final[Mapping[str, ConflictPolicy]] = MappingProxyType(
    {
        "server_wins": server_wins,
        "client_wins": client_wins,
        "last_write_wins": last_write_wins,
        "manual": manual,
    }
)


# ---------------------------------------------------------------- three-way merge by field


class _Rule(Enum):
    COUNTER = "counter"
    SET = "set"


_NO_FIELDS: Final[Mapping[str, Any]] = MappingProxyType({})
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
    raise ``ConfigError``. A counter that leaves what CBOR can say (integers −2^64 … 2^64−1, finite
    floats) raises ``ValueError``, which holds the transaction: a stock that wrapped around or
    stuck at a limit would be wrong without anybody noticing.
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
        self._fallback_is_whole = any(self._fallback is policy for policy in _WHOLE.values())
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
        was, mine, theirs = _decode(base), _decode(local), _decode(remote)
        if was is None:
            was = _NO_FIELDS
        elif type(was) is not dict:
            return _checked(self._fallback(conflict))
        if type(mine) is not dict or type(theirs) is not dict:
            return _checked(self._fallback(conflict))
        lost: list[Overruled] = []
        try:
            merged = self._merge_maps(conflict, was, mine, theirs, self._rules, (), lost)
        except _LeftOpen:
            return _SKIP
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
            inner = rule if type(rule) is dict else _NO_FIELDS
            below = _NO_FIELDS if was is _ABSENT else was
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
            value = _ABSENT if resolution.payload is None else _decode(resolution.payload)
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
    if isinstance(spec, str) and spec in _WHOLE:
        return _WHOLE[spec]
    policy = resolve_policy(spec)
    if isinstance(policy, Merge):
        raise ConfigError(
            "the fallback of a Merge decides what cannot be merged, so it cannot be another "
            "merge; use server_wins, client_wins, last_write_wins, manual or a function"
        )
    return policy


def _add_rules(rules: dict[str, Any], option: str, paths: FieldPaths, rule: _Rule) -> list[str]:
    if isinstance(paths, str):
        raise ConfigError(f"{option} takes several paths; write {option}=({paths!r},)")
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


def _decode(payload: bytes | None) -> Any:
    return None if payload is None else cbor.decode_trusted(payload)


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


# ---------------------------------------------------------------- policies by name

merge: Final = Merge()

#: The policies a configuration can name.
POLICIES: Final[Mapping[str, ConflictPolicy]] = MappingProxyType({**_WHOLE, "merge": merge})


def resolve_policy(spec: str | ConflictPolicy) -> ConflictPolicy:
    """The policy a setting means: a name of ``POLICIES``, or a policy itself.

    Raises ``ConfigError`` for an unknown name and for what cannot be a policy.
    """
    if isinstance(spec, str):
        if spec not in POLICIES:
            raise ConfigError(f"no policy is named {spec!r}; there are {', '.join(POLICIES)}")
        return POLICIES[spec]
    if isinstance(spec, type):
        raise ConfigError(f"{spec.__name__} is a class; a policy is an instance: {spec.__name__}()")
    if not callable(spec):
        raise ConfigError(f"a policy is a name or a function of a Conflict, not {spec!r}")
    if inspect.iscoroutinefunction(spec) or inspect.iscoroutinefunction(type(spec).__call__):
        raise ConfigError("a policy cannot be async: it decides from the conflict alone")
    return spec


# ---------------------------------------------------------------- what each policy answers


class TruthRow(Struct, frozen=True):
    """What ``policy``, written ``name`` in a configuration, does with each kind of conflict,
    ``when`` being one of the ``WHEN_…`` below. Create/create and update/update are of maps, and
    of maps that both sides changed in the same field unless ``when`` says otherwise."""

    name: str
    policy: ConflictPolicy
    when: str
    actions: Mapping[str, Action]


WHEN_ALWAYS: Final = "always"
WHEN_LOCAL_NEWER: Final = "the device's is newer"
WHEN_REMOTE_NEWER: Final = "the server's is newer, or equal"
WHEN_SAME_FIELD: Final = "the same field changed"
WHEN_OTHER_FIELDS: Final = "different fields changed"


def _row(name: str, policy: ConflictPolicy, when: str, fields: Action, delete: Action) -> TruthRow:
    """``fields`` where there are two values, ``delete`` where there is one and a deletion."""
    actions = dict(zip(CONFLICT_KINDS, (fields, fields, delete, delete), strict=True))
    return TruthRow(name, policy, when, MappingProxyType(actions))


_A, _K, _M, _S = Action.ACCEPT_REMOTE, Action.KEEP_LOCAL, Action.MERGE, Action.SKIP
_BY_TIME: Final = Merge("last_write_wins")
_BY_HAND: Final = Merge("manual")

#: R26: what every shipped policy answers. ``docs/conflicts.md`` shows it; a test walks both.
TRUTH_TABLE: Final[tuple[TruthRow, ...]] = (
    _row("server_wins", server_wins, WHEN_ALWAYS, _A, _A),
    _row("client_wins", client_wins, WHEN_ALWAYS, _K, _K),
    _row("last_write_wins", last_write_wins, WHEN_LOCAL_NEWER, _K, _K),
    _row("last_write_wins", last_write_wins, WHEN_REMOTE_NEWER, _A, _A),
    _row("merge", merge, WHEN_ALWAYS, _M, _A),
    _row('Merge("client_wins")', Merge("client_wins"), WHEN_ALWAYS, _M, _K),
    _row('Merge("last_write_wins")', _BY_TIME, WHEN_LOCAL_NEWER, _M, _K),
    _row('Merge("last_write_wins")', _BY_TIME, WHEN_REMOTE_NEWER, _M, _A),
    _row('Merge("manual")', _BY_HAND, WHEN_OTHER_FIELDS, _M, _S),
    _row('Merge("manual")', _BY_HAND, WHEN_SAME_FIELD, _S, _S),
    _row("manual", manual, WHEN_ALWAYS, _S, _S),
)


# ---------------------------------------------------------------- explain

_FIELDS_SHOWN_MAX: Final = 20
_STORY: Final = {
    CREATE_CREATE: "was created here and on the server, with different values",
    UPDATE_UPDATE: "was changed here and on the server",
    UPDATE_DELETE: "was changed here and deleted on the server",
    DELETE_UPDATE: "was deleted here and changed on the server",
}


def _explain(conflict: Conflict) -> list[str]:
    field = f", field {'.'.join(conflict.path)!r}" if conflict.path else ""
    lines = [
        f"Entity {conflict.entity_id} in {conflict.collection!r}{field} {_STORY[conflict.kind]}.",
        _side("base", _base_origin(conflict), conflict.base_payload, "not there"),
        _side("mine", _local_origin(conflict), conflict.local_payload, "deleted"),
        _side("theirs", _remote_origin(conflict), conflict.remote_payload, "deleted"),
        *_differences(conflict),
    ]
    if conflict.error is not None:
        lines.append(f"The policy could not decide: {conflict.error}")
    transaction = uuid_from_bytes(conflict.transaction_id)
    return [
        *lines,
        'Choices: "mine" writes what this device has over the server\'s;',
        f'  "theirs" takes the server\'s and moves transaction {transaction}, with all it wrote',
        "  and what was built on it, to the discarded list;",
        "  a value of your own replaces both.",
    ]


def _side(name: str, origin: str, payload: bytes | None, absent: str) -> str:
    return f"  {name:<6}  {shown(payload, absent)}   ({origin})"


def _base_origin(conflict: Conflict) -> str:
    if conflict.base_payload is None:
        return "before either change"
    origin = when_by(conflict.base_timestamp, conflict.base_device)
    return f"version {conflict.base_version}, {origin}"


def _local_origin(conflict: Conflict) -> str:
    return f"not on the server yet, {when_by(conflict.local_timestamp, conflict.local_device)}"


def _remote_origin(conflict: Conflict) -> str:
    origin = when_by(conflict.remote_timestamp, conflict.remote_device)
    return f"version {conflict.remote_version}, {origin}"


def _differences(conflict: Conflict) -> list[str]:
    base, local, remote = conflict.base, conflict.local, conflict.remote
    if type(local) is not dict or type(remote) is not dict:
        return []
    groups: dict[str, list[str]] = {"both": [], "mine": [], "theirs": []}
    _sort_fields(base if type(base) is dict else _NO_FIELDS, local, remote, (), groups)
    return [
        f"  {label}: {_listed(groups[name])}"
        for name, label in (
            ("both", "Different on both sides"),
            ("mine", "Changed only here"),
            ("theirs", "Changed only on the server"),
        )
        if groups[name]
    ]


def _sort_fields(
    base: Mapping[str, Any],
    local: Mapping[str, Any],
    remote: Mapping[str, Any],
    path: Path,
    groups: dict[str, list[str]],
) -> None:
    for key in dict.fromkeys([*base, *local, *remote]):
        was, mine, theirs = (side.get(key, _ABSENT) for side in (base, local, remote))
        if _same(mine, theirs):
            continue
        if type(mine) is dict and type(theirs) is dict:
            below = was if type(was) is dict else _NO_FIELDS
            _sort_fields(below, mine, theirs, (*path, key), groups)
            continue
        group = "theirs" if _same(was, mine) else "mine" if _same(was, theirs) else "both"
        groups[group].append(repr(".".join((*path, key))))


def _listed(names: list[str]) -> str:
    more = len(names) - _FIELDS_SHOWN_MAX
    shown = ", ".join(names[:_FIELDS_SHOWN_MAX])
    return f"{shown} and {more} more" if more > 0 else shown


__all__ = [
    "CONFLICT_KINDS",
    "POLICIES",
    "TRUTH_TABLE",
    "Action",
    "Conflict",
    "ConflictPolicy",
    "ConflictResolution",
    "Merge",
    "TruthRow",
    "client_wins",
    "last_write_wins",
    "manual",
    "merge",
    "resolve_policy",
    "server_wins",
]

"""A conflict: the three values that a policy decides about, the answers it may give, and both in
words.

Everything here is a pure function of its arguments: no clock, no randomness, no I/O, nothing
remembered between calls (R26). What the shipped policies answer is in ``whole_policies`` and
``merging``; what an answer does to the outbox is ``apply``'s. ``docs/conflicts.md`` is the same
subject for users.

    Conflict(base, local, remote) ──▶ policy ──▶ ConflictResolution
                                                 ├── accept_remote
                                                 ├── keep_local
                                                 ├── merge(value)
                                                 └── skip
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from entidb import cbor
from entidb.db.fields import ABSENT as _ABSENT
from entidb.db.fields import Overruled, Path, Side, lost_fields, shown, when_by
from entidb.db.fields import same as _same
from entidb.db.listeners import check_arguments
from entidb.db.notebook import payload_text, table
from entidb.errors import ConfigError
from entidb.types import ID_BYTES, uuid_from_bytes

CREATE_CREATE: Final = "create/create"
UPDATE_UPDATE: Final = "update/update"
UPDATE_DELETE: Final = "update/delete"
DELETE_UPDATE: Final = "delete/update"
#: What a conflict can be, this device first. Delete against delete is none (R24).
CONFLICT_KINDS: Final = (CREATE_CREATE, UPDATE_UPDATE, UPDATE_DELETE, DELETE_UPDATE)
_NO_DEVICE: Final = bytes(ID_BYTES)


NO_FIELDS: Final[Mapping[str, Any]] = MappingProxyType({})


# ---------------------------------------------------------------- the question


class Conflict(Struct, frozen=True, kw_only=True, gc=False):
    """One entity, or one field of it, that changed here and on the server (R23).

    ``base`` is the last server state that the device knew, ``local`` what the device made of it,
    and ``remote`` what the server has now. Versions are the server's commit sequences, device ids
    16 bytes, timestamps hybrid logical clocks (``entidb.types.Timestamp``); the local one is
    already clamped to the server's time. ``transaction_id`` is the first pending transaction
    involved.

    ``path`` is empty for a whole entity. Where ``Merge`` asks its fallback about one field, it
    names the field, and the three values are that field's.

    ``error`` is what the policy raised when it was asked about this conflict, None otherwise.
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
        """The entity that is in conflict."""
        return uuid_from_bytes(self.id_bytes)

    # The values are decoded anew each time they are asked for. A policy may therefore build its
    # answer by changing what it got, and still finds the same three values when asked again.

    @property
    def base(self) -> Any:
        """A fresh copy of the old server value; None if there was none.

        A field can also hold null; there ``base_payload is None`` says that it is absent. The
        same is true for ``local`` and ``remote``.
        """
        return decoded(self.base_payload)

    @property
    def local(self) -> Any:
        """A fresh copy of this device's value; None if it deleted the entity."""
        return decoded(self.local_payload)

    @property
    def remote(self) -> Any:
        """A fresh copy of the server's value; None if it was deleted there."""
        return decoded(self.remote_payload)

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

    def __repr__(self) -> str:
        field = f", field {'.'.join(map(str, self.path))!r}" if self.path else ""
        sides = ", ".join(f"{side} {text}" for side, text in self._sides())
        return f"<Conflict in {self.collection!r}, {self.entity_id}{field}: {sides}>"

    def _sides(self) -> list[tuple[str, str]]:
        payloads = {"base": self.base_payload, "local": self.local_payload}
        payloads["remote"] = self.remote_payload
        return [
            (side, payload_text(payload, "nothing" if side == "base" else "deleted"))
            for side, payload in payloads.items()
        ]

    def _repr_html_(self) -> str:
        devices = (self.base_device, self.local_device, self.remote_device)
        rows = [
            (side, text, device.hex()[:8])
            for (side, text), device in zip(self._sides(), devices, strict=True)
        ]
        title = f"Conflict in {self.collection!r}, {self.entity_id}"
        return table(title, ("side", "value", "device"), rows, self.error or "")

    def explain(self) -> str:
        """Several plain lines for a person: the three values, by whom and when, what differs,
        and the choices. Made for reading; programs use the fields."""
        return "\n".join(_explain(self))


def decoded(payload: bytes | None) -> Any:
    """A fresh copy of a value; None if there is none."""
    return None if payload is None else cbor.decode_trusted(payload)


# ---------------------------------------------------------------- the answer


class Action(Enum):
    """What a resolution does (R25)."""

    #: The server's value stays; the transaction goes to the ``discarded`` list.
    ACCEPT_REMOTE = "accept_remote"
    #: The device's value is pushed on top of the server's.
    KEEP_LOCAL = "keep_local"
    #: A third value is pushed on top of the server's.
    MERGE = "merge"
    #: Undecided: the transaction is held until the conflict is resolved.
    SKIP = "skip"


class ConflictResolution(Struct, frozen=True, eq=False, gc=False):
    """A policy's answer. Make one with the four constructors.

    ``payload`` is the merged value in canonical CBOR; None for a deletion and for all actions
    but ``Action.MERGE``.

    ``overruled`` is what a merge decided against, where it knows: a counter that adds up both sides
    has neither one's value, and overrules neither. None: the values are compared, and what either
    side changed and the answer does not hold counts as overruled (R4). It is no part of the answer,
    so two answers that differ in nothing else are equal.
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
        return decoded(self.payload)

    @classmethod
    def accept_remote(cls) -> ConflictResolution:
        """Take the server's value and withdraw the transaction, whole, to ``discarded``."""
        return ACCEPT_REMOTE

    @classmethod
    def keep_local(cls) -> ConflictResolution:
        """Keep the device's value and push it over the server's."""
        return KEEP_LOCAL

    @classmethod
    def merge(cls, value: Any) -> ConflictResolution:
        """Push ``value`` over the server's; None deletes the entity (or field).

        Raises ``CborEncodeError`` here, where the value was made, if it cannot be stored.
        """
        return cls(Action.MERGE, None if value is None else cbor.encode(value))

    @classmethod
    def skip(cls) -> ConflictResolution:
        """Do not decide: hold the transaction, list the conflict as unresolved."""
        return SKIP


def overruled_by(resolution: ConflictResolution, conflict: Conflict) -> Sequence[Overruled]:
    """What ``resolution`` decides against (R4): what one side changed of the base and the outcome
    does not hold. Nothing if the conflict stays open. ``keep_local`` decides about the entity, so
    it overrules the whole entity; of large ones, and where there is a value of a third kind, it
    overrules the fields."""
    if resolution.overruled is not None:
        return resolution.overruled
    base, local, remote = conflict.base_payload, conflict.local_payload, conflict.remote_payload
    action = resolution.action
    if action is Action.SKIP:
        return ()
    if action is Action.KEEP_LOCAL:
        if remote in (base, local):
            return ()
        if len(base or b"") + len(local or b"") + len(remote or b"") <= _WHOLE_BYTES_MAX:
            return ((Side.REMOTE, (), remote, local, base),)
    value = {Action.KEEP_LOCAL: local, Action.ACCEPT_REMOTE: remote}.get(action, resolution.payload)
    return [
        (side, path, lost, won, None if path else base)
        for side, payload in ((Side.LOCAL, local), (Side.REMOTE, remote))
        for path, lost, won in lost_fields(base, payload, value)
    ]


#: Bytes up to which an entity is kept whole, with its base, instead of being looked through at
#: once.
_WHOLE_BYTES_MAX: Final = 8192
ACCEPT_REMOTE: Final = ConflictResolution(Action.ACCEPT_REMOTE)
KEEP_LOCAL: Final = ConflictResolution(Action.KEEP_LOCAL)
SKIP: Final = ConflictResolution(Action.SKIP)


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


def check_policy(policy: ConflictPolicy) -> ConflictPolicy:
    """``policy`` itself. Raises ``ConfigError`` for an object that cannot be a policy."""
    if isinstance(policy, type):
        raise ConfigError(
            f"{policy.__name__} is a class; a policy is an instance: {policy.__name__}()"
        )
    if not callable(policy):
        raise ConfigError(f"a policy is a name or a function of a Conflict, not {policy!r}")
    if inspect.iscoroutinefunction(policy) or inspect.iscoroutinefunction(type(policy).__call__):
        raise ConfigError("a policy cannot be async: it decides from the conflict alone")
    check_arguments(policy, "a policy", ("the conflict",))
    return policy


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
    _sort_fields(base if type(base) is dict else NO_FIELDS, local, remote, (), groups)
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
            below = was if type(was) is dict else NO_FIELDS
            _sort_fields(below, mine, theirs, (*path, key), groups)
            continue
        group = "theirs" if _same(was, mine) else "mine" if _same(was, theirs) else "both"
        groups[group].append(repr(".".join((*path, key))))


def _listed(names: list[str]) -> str:
    more = len(names) - _FIELDS_SHOWN_MAX
    shown = ", ".join(names[:_FIELDS_SHOWN_MAX])
    return f"{shown} and {more} more" if more > 0 else shown

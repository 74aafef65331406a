"""Planted bugs: how full a database of a server gets, and how many devices it has."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from entidb.server import fullness
from entidb.server.fullness import Fullness, Room
from entidb.server.newcomers import Newcomers
from entidb.server.registry import Registry
from tests.planted.garden import CALM, Garden, bug

_FULL: Final = CALM | {"keys": 20, "tenants": 1, "quota_bytes": 0, "quota_devices": 0}
_ENTITIES: Final = _FULL | {"quota_entities": 15}
_BYTES: Final = _FULL | {"quota_entities": 0, "quota_bytes": 6_000}
_DEVICES: Final = CALM | {"tenants": 1, "quota_devices": 2, "quota_entities": 0, "quota_bytes": 0}


@bug("quota-of-before-the-group", "QUOTA", knobs=_ENTITIES | {"group_ms": 300, "pause_ms": 300})
def _quota_of_before_the_group(garden: Garden) -> None:
    """Every push of a group has the room that there was before the first."""
    before: list[tuple[int | None, int | None]] = []

    def make(original: Any) -> Any:
        def room(self: Any, writer: Any) -> Room:
            first = writer is not self._writer()
            found = original(self, writer)
            if first:
                before[:] = [(found.entities, found.size)]
            return Room(*before[0])

        return room

    garden.replace(Fullness, "room", make)


@bug("deletion-refused-where-it-is-full", "QUOTA", knobs=_ENTITIES | {"deletes": 400})
def _deletion_refused(garden: Garden) -> None:
    """A full database takes nothing any more, also what makes it smaller."""

    def make(original: Any) -> Any:
        def take(self: Any, writes: Any) -> Any:
            if self.entities is not None and self.entities <= 0:
                return "database_entities_max"
            return original(self, writes)

        return take

    garden.replace(Room, "take", make)


@bug("change-counted-as-one-more", "QUOTA", knobs=_ENTITIES)
def _change_counted(garden: Garden) -> None:
    """An entity that is there already counts once more with each change."""
    garden.replace(Room, "take", _blind_to_what_is_replaced)


@bug("replaced-bytes-counted-twice", "QUOTA", knobs=_BYTES)
def _replaced_bytes_counted(garden: Garden) -> None:
    """The bytes of a value count beside those of the one that it replaces."""
    garden.replace(Room, "take", _blind_to_what_is_replaced)


def _blind_to_what_is_replaced(original: Any) -> Any:
    def take(self: Any, writes: Any) -> Any:
        return original(self, [(new, None if new is not None else old) for new, old in writes])

    return take


@bug("size-measured-once-for-all", "QUOTA", knobs=_BYTES | {"think_ms": 1500, "pause_ms": 3000})
def _measured_once(garden: Garden) -> None:
    """The store is measured when it is opened, and never again."""
    garden.replace(fullness, "MEASURED_S", lambda seconds: seconds * 10**6)


@bug("bytes-of-a-push-not-counted", "QUOTA", knobs=_BYTES | {"quota_bytes": 1_500})
def _not_counted(garden: Garden) -> None:
    """What was added since the store was measured takes no room."""
    garden.replace(Fullness, "_size", _forgetful)


def _forgetful(original: Any) -> Any:
    found: dict[Any, Any] = {}

    def size(self: Any, writer: Any) -> Any:
        measured = self._measured_at
        now = original(self, writer)
        if self not in found or self._measured_at != measured:
            found[self] = now
        return found[self]

    return size


@bug("bytes-of-other-nodes-not-counted", "QUOTA", knobs=_BYTES | {"nodes": 3})
def _others_not_counted(garden: Garden) -> None:
    """A node adds up what it has written itself, and sees the rest when it measures again."""
    garden.replace(Fullness, "_size", _adding_up)


@bug(
    "failed-deletions-make-room",
    "QUOTA",
    knobs=_BYTES | {"quota_bytes": 3_000, "deletes": 600, "operations": 8, "server_disk_full": 400},
)
def _failed_deletions(garden: Garden) -> None:
    """What a commit would have freed that found the disk full counts as free."""
    garden.replace(Fullness, "_size", _adding_up)


def _adding_up(original: Any) -> Any:
    """What the last commit that was tried here has left, whatever became of it and came since."""

    def size(self: Any, writer: Any) -> Any:
        measured, before = self._measured_at, self._room.size
        now = original(self, writer)
        return now if before is None or self._measured_at != measured else before

    return size


@bug("known-device-counted-as-new", "QUOTA", knobs=_DEVICES | {"server_crash_after": 60})
def _known_counted_as_new(garden: Garden) -> None:
    """After a restart of the server whoever comes is one more."""

    def make(original: Any) -> Any:
        def meet(self: Any, request: Any, asking: Any, check: Any) -> Any:
            check(self.devices(request.db_id))
            return original(self, request, asking, check)

        return meet

    garden.replace(Registry, "meet", make)


@bug("refused-device-counts-as-met", "QUOTA", knobs=_DEVICES)
def _refused_counts_as_met(garden: Garden) -> None:
    """Who is one too many is let in when it asks again."""

    def make(original: Any) -> Any:
        def admit(self: Any, request: Any, asking: Any) -> None:
            try:
                original(self, request, asking)
            finally:
                known = self._known.get(request.db_id)
                if known is not None:
                    known.devices.add(request.device_id)

        return admit

    garden.replace(Newcomers, "admit", make)


@bug("locked-out-device-takes-room", "QUOTA", knobs=_DEVICES | {"revoke": 400})
def _locked_out_takes_room(garden: Garden) -> None:
    """A device that is revoked counts like any other."""
    garden.replace(Newcomers, "_is_revoked", lambda original: lambda self, row, db_id: False)


_PEOPLE: Final = _DEVICES | {"people": 300, "quota_devices": 3, "devices": 5}


@bug("devices-of-one-person-not-counted", "QUOTA", knobs=_PEOPLE)
def _own_not_counted(garden: Garden) -> None:
    """Whoever asks has no device yet, as far as the limit for one person goes."""
    garden.replace(Newcomers, "_check", _as_somebody_else)


def _as_somebody_else(original: Any) -> Any:
    def check(self: Any, request: Any, asking: Any, rows: Any) -> None:
        most, self._subject_max = self._subject_max, 0
        try:
            original(self, request, asking, rows)
        finally:
            self._subject_max = most

    return check


@bug("devices-of-others-counted-as-ones-own", "QUOTA", knobs=_PEOPLE)
def _others_counted(garden: Garden) -> None:
    """The limit for one person counts the devices of all."""

    def make(original: Any) -> Any:
        def check(self: Any, request: Any, asking: Any, rows: Any) -> None:
            own = [replace(row, subject=asking.subject) for row in rows]
            original(self, request, asking, own)

        return check

    garden.replace(Newcomers, "_check", make)

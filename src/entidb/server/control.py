"""What the administrator of a server has decided: who is revoked (R32), and which database is
frozen.

It is one small record (``records``), written durably before the answer, and read again within a
second by every process of the server. A server that cannot read it does not start: it would let in
who was locked out. Not here: who may decide (``admin``).
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol

from msgspec import Struct, ValidationError, json
from msgspec.structs import replace

from entidb.errors import (
    ConfigError,
    DatabaseLockedError,
    PermissionDeniedError,
    ServerBusyError,
    StorageError,
)
from entidb.protocol import PushRequest
from entidb.server.away import retry_after_s
from entidb.server.records import BYTES_MAX, CONTROL, CONTROL_FILE, Records, as_records
from entidb.server.watched import Followed, Mark, Watched
from entidb.storage.disk_errors import disk_error
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

#: Entries at once; more is a sign that tokens should live shorter.
REVOKED_MAX: Final = 100_000
_VERSION: Final = 1
#: Seconds after which a device asks again whether it may push.
_FROZEN_RETRY_S: Final = 5.0

Kind = Literal["device", "subject", "token"]


class Revoked(Struct, frozen=True, omit_defaults=True):
    """One entry: ``name`` is a device id in hex digits, a subject, or a token's ``jti``. In
    ``db_id`` only, None: in all databases. From ``until_ms`` on it says nothing any more, because
    the token has expired anyway."""

    kind: Kind
    name: str
    since_ms: int
    by: str
    db_id: str | None = None
    reason: str = ""
    until_ms: int | None = None

    @property
    def key(self) -> tuple[str, str, str | None]:
        return self.kind, self.name, self.db_id


class Frozen(Struct, frozen=True, omit_defaults=True):
    """A database that takes no pushes."""

    since_ms: int
    by: str
    reason: str = ""


class Decided(Struct, frozen=True, omit_defaults=True):
    """All of it, as the file has it."""

    version: int = _VERSION
    revoked: tuple[Revoked, ...] = ()
    frozen: dict[str, Frozen] = {}


class DatabaseRequest(Protocol):
    """What is asked: any request that names a database."""

    @property
    def db_id(self) -> str: ...
    @property
    def device_id(self) -> bytes | None: ...


class Asking(Protocol):
    """Who asks: ``Grants`` or a ``Grant``."""

    @property
    def subject(self) -> str: ...
    @property
    def claims(self) -> dict[str, Any]: ...


class _State:
    """What is decided, ready to be looked up."""

    def __init__(self, decided: Decided) -> None:
        self.decided = decided
        self.frozen = decided.frozen
        self.revoked = {each.key: each for each in decided.revoked}


class Control:
    """Looked at for every request; thread-safe. Without a place it lives as long as the server."""

    def __init__(self, place: str | os.PathLike[str] | Records | None, clock: Clock) -> None:
        """Raises ``ConfigError`` for a record that cannot be read; ``StorageError``."""
        self._clock = clock
        self._records = records = as_records(place)
        #: Whether it is asked over a network: then ``freshen`` comes before ``admit``.
        self.far: Final = records is not None and records.far
        self._alone = _State(Decided())
        #: Called after each change that was made here; for what tells other processes of it.
        self.on_change: Callable[[], None] = _nothing
        self._watched: Watched[_State] | Followed[_State] | None = None
        if records is not None:
            kind = Followed if self.far else Watched
            self._watched = kind(
                records.where(CONTROL),
                lambda: _State(_read(records)),
                lambda: records.mark(CONTROL),
                clock,
            )

    # ------------------------------------------------------------ asked for every request

    def admit(self, asking: Asking, request: DatabaseRequest | None = None) -> None:
        """Raises ``PermissionDeniedError`` (forbidden, with the reason ``revoked``) for who is
        revoked, and ``ServerBusyError`` (busy, ``frozen``) for a push to a frozen database. The
        push of a round is left undecided instead: its pull is answered."""
        state = self._alone if self._watched is None else self._watched.current()
        if state.revoked:
            place = (None, None) if request is None else (request.db_id, request.device_id)
            if self.is_revoked(asking, *place):
                raise PermissionDeniedError(
                    "this device, or its token, was revoked by the administrator of the server; "
                    "nothing on it was changed, and what is pending stays pending",
                    details={"reason": "revoked"},
                )
        if state.frozen and isinstance(request, PushRequest) and request.db_id in state.frozen:
            raise frozen_error(request.db_id)

    def is_revoked(self, asking: Asking, db_id: str | None, device_id: bytes | None) -> bool:
        """Whether these are refused in ``db_id``; None: where no database is named."""
        revoked = self._state().revoked
        names: list[tuple[str, str]] = [("subject", asking.subject)]
        token = asking.claims.get("jti")
        if isinstance(token, str):
            names.append(("token", token))
        if device_id is not None:
            names.append(("device", device_id.hex()))
        places = (None,) if db_id is None else (None, db_id)
        now = self._clock.now_ms()
        for kind, name in names:
            for place in places:
                found = revoked.get((kind, name, place))
                if found is not None and _is_in_force(found, now):
                    return True
        return False

    def revoked(self) -> list[Revoked]:
        """What is in force now, oldest first."""
        now = self._clock.now_ms()
        return [each for each in self.decided.revoked if _is_in_force(each, now)]

    def is_frozen(self, db_id: str) -> bool:
        state = self._alone if self._watched is None else self._watched.current()
        return db_id in state.frozen

    def is_stale(self) -> bool:
        """Whether ``look_again`` comes first, because another node may have decided something: so
        it is where that is asked over a network, and was not for a second."""
        return self._watched is not None and self._watched.is_stale()

    def look_again(self) -> None:
        """Read at once what another process has just decided. Raises ``ConfigError``,
        ``StorageError``."""
        if self._watched is not None:
            self._watched.reread()

    def freshen(self) -> None:
        """Look again if what is known is stale. Waits for the network; nobody is let in without
        it. Raises ``ServerBusyError``."""
        if self.is_stale():
            try:
                self.look_again()
            except StorageError as error:
                logger.warning("who is revoked cannot be read, and nobody is served: %s", error)
                raise unread_error() from error

    @property
    def decided(self) -> Decided:
        return self._state().decided

    def _state(self) -> _State:
        return self._alone if self._watched is None else self._watched.current()

    # ------------------------------------------------------------ decided by an administrator

    def revoke(self, entry: Revoked) -> None:
        """Durable when it returns. Who is revoked already stays so since then, and until the later
        of both ends. Raises ``ConfigError`` for too many entries, ``DatabaseLockedError`` if
        another process changes the file for long, ``StorageError``."""
        now = self._clock.now_ms()

        def change(decided: Decided) -> Decided:
            known = next((each for each in decided.revoked if each.key == entry.key), None)
            if known is not None and _is_in_force(known, now):
                if _end(entry) <= _end(known):
                    return decided
                longer = replace(known, until_ms=entry.until_ms)
                rows = (longer if each is known else each for each in decided.revoked)
                return replace(decided, revoked=tuple(rows))
            kept = [each for each in decided.revoked if each is not known]
            if len(kept) >= REVOKED_MAX:
                # Not before: a clock that was wrong for an hour would let in who is locked out.
                kept = [each for each in kept if _is_in_force(each, now)]
            if len(kept) >= REVOKED_MAX:
                raise ConfigError(
                    f"{REVOKED_MAX} entries are revoked, and more are not kept: allow what is "
                    "over, or change the key"
                )
            return replace(decided, revoked=(*kept, entry))

        self._change(change)

    def allow(self, kind: Kind, name: str, db_id: str | None = None) -> bool:
        """Take a revocation back; whether there was one. Raises as ``revoke``."""
        key = (kind, name, db_id)
        before = self._change(
            lambda decided: replace(
                decided, revoked=tuple(each for each in decided.revoked if each.key != key)
            )
        )
        return any(each.key == key for each in before.revoked)

    def freeze(self, db_id: str, frozen: Frozen | None) -> bool:
        """Freeze a database, or let it be written to again (None); whether that changed anything.
        Raises as ``revoke``."""

        def change(decided: Decided) -> Decided:
            kept = {name: each for name, each in decided.frozen.items() if name != db_id}
            if frozen is not None:
                kept[db_id] = decided.frozen.get(db_id, frozen)
            return replace(decided, frozen=kept)

        before = self._change(change)
        return (db_id in before.frozen) != (frozen is not None)

    def carry(self, db_id: str, to: str) -> None:
        """What is decided about a database holds for ``to`` as well, until ``rename`` takes the old
        name away. Done before a database moves, so that it holds whatever ends in between. Raises
        as ``revoke``."""

        def change(decided: Decided) -> Decided:
            frozen, keys = dict(decided.frozen), {each.key for each in decided.revoked}
            if db_id in frozen:
                frozen.setdefault(to, frozen[db_id])
            carried = [replace(e, db_id=to) for e in decided.revoked if e.db_id == db_id]
            new = [each for each in carried if each.key not in keys]
            return replace(decided, frozen=frozen, revoked=(*decided.revoked, *new))

        if self._decides_about(db_id):
            self._change(change)

    def rename(self, db_id: str, to: str | None) -> None:
        """What is decided about a database goes with it to its new name; None: it is gone."""

        def change(decided: Decided) -> Decided:
            frozen = dict(decided.frozen)
            found = frozen.pop(db_id, None)
            if found is not None and to is not None:
                frozen[to] = found
            revoked = [
                replace(each, db_id=to) if each.db_id == db_id else each
                for each in decided.revoked
                if each.db_id != db_id or to is not None
            ]
            return replace(decided, frozen=frozen, revoked=tuple(revoked))

        if self._decides_about(db_id):
            self._change(change)

    def _decides_about(self, db_id: str) -> bool:
        return db_id in self.decided.frozen or any(e.db_id == db_id for e in self.decided.revoked)

    def _change(self, change: Callable[[Decided], Decided]) -> Decided:
        """Returns what was decided before."""
        records, watched = self._records, self._watched
        if records is None or watched is None:
            before = self._alone.decided
            self._alone = _State(change(before))
            return before
        before = after = _read(records)

        def make(content: bytes | None) -> bytes | None:
            # The record is the truth, and not what this process has read of it a moment ago.
            nonlocal before, after
            before = _decoded(records, content)
            after = change(before)
            return None if after == before else json.format(json.encode(after), indent=1)

        def wrote(mark: Mark) -> None:
            watched.set(_State(after), mark)

        try:
            records.change(CONTROL, make, wrote)
        except DatabaseLockedError as error:
            raise DatabaseLockedError(
                f"{records.where(CONTROL)} is being changed by another process; try again"
            ) from error
        except OSError as error:
            doing = f"writing {records.where(CONTROL)}, so that nothing was decided"
            raise disk_error(error.errno or errno.EIO, doing) from error
        if after != before:
            self.on_change()
        return before


def _nothing() -> None:
    return None


def unread_error() -> ServerBusyError:
    """What everybody is told while it cannot be read who is revoked."""
    return ServerBusyError(
        "the server cannot read at the moment who is revoked, and serves nobody without it",
        retry_after=retry_after_s(),
    )


def _end(entry: Revoked) -> float:
    return math.inf if entry.until_ms is None else entry.until_ms


def _is_in_force(entry: Revoked, now_ms: int) -> bool:
    return now_ms < _end(entry)


def frozen_error(db_id: str) -> ServerBusyError:
    """What a push to a frozen database is told."""
    return ServerBusyError(
        f"database {db_id!r} is frozen by the administrator of the server: it can be read, and "
        "what is pending waits until it is written to again",
        retry_after=_FROZEN_RETRY_S,
        details={"reason": "frozen"},
    )


def _read(records: Records) -> Decided:
    try:
        content = records.read(CONTROL)
    except PermissionError as error:
        todo = "give the file to the user of the server (chown)"
        raise _unreadable(records, str(error.strerror), todo) from error
    except OSError as error:
        raise _unreadable(records, str(error.strerror)) from error
    return _decoded(records, content)


def _decoded(records: Records, content: bytes | None) -> Decided:
    if content is None:
        return Decided()
    if len(content) > BYTES_MAX:
        raise _unreadable(records, "it is too large")
    try:
        decided = json.decode(content, type=Decided)
    except (ValidationError, ValueError, RecursionError) as error:
        raise _unreadable(records, str(error)) from error
    if decided.version > _VERSION:
        raise _unreadable(records, "a newer EntiDB has written it")
    return decided


def _unreadable(records: Records, why: str, todo: str = "put it back from a copy") -> ConfigError:
    return ConfigError(
        f"{records.where(CONTROL)}, which says who is revoked, cannot be read: {why}. Nobody is "
        f"served without it; {todo}"
    )


__all__ = [
    "CONTROL_FILE",
    "REVOKED_MAX",
    "Control",
    "Decided",
    "Frozen",
    "Kind",
    "Revoked",
    "unread_error",
]

"""What the administrator of a server has decided: who is revoked (R32), and which database is
frozen.

It is one small file in the data directory, written durably before the answer, and read again within
a second by every process that serves the directory. A server that cannot read it does not start: it
would let in who was locked out. Not here: who may decide (``admin``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol

from msgspec import Struct, ValidationError, json
from msgspec.structs import replace

from entidb.errors import ConfigError, DatabaseLockedError, PermissionDeniedError, ServerBusyError
from entidb.protocol import PushRequest
from entidb.server.watched import Watched, mark_of
from entidb.storage.directories import NO_FOLLOW, sync_path
from entidb.storage.partial import Partial
from entidb.types import Clock

#: The file, in the data directory; no database is called so.
CONTROL_FILE: Final = "entidb-control.json"
#: Entries at once; more is a sign that tokens should live shorter.
REVOKED_MAX: Final = 100_000
_BYTES_MAX: Final = 64 * 2**20
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
    """Looked at for every request; thread-safe. Without a path it lives as long as the server."""

    def __init__(self, data_dir: str | os.PathLike[str] | None, clock: Clock) -> None:
        """Raises ``ConfigError`` for a file that cannot be read."""
        self._clock = clock
        self._path = None if data_dir is None else os.path.join(os.fspath(data_dir), CONTROL_FILE)
        self._alone = _State(Decided())
        #: Called after each change that was made here; for what tells other processes of it.
        self.on_change: Callable[[], None] = _nothing
        path = self._path
        self._watched = (
            None
            if path is None
            else Watched(path, lambda: _State(_read(path)), lambda: mark_of(path), clock)
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
                if found is not None and (found.until_ms is None or now < found.until_ms):
                    return True
        return False

    def is_frozen(self, db_id: str) -> bool:
        state = self._alone if self._watched is None else self._watched.current()
        return db_id in state.frozen

    def look_again(self) -> None:
        """Read at once what another process has just decided. Raises ``ConfigError``."""
        if self._watched is not None:
            self._watched.reread()

    @property
    def decided(self) -> Decided:
        return self._state().decided

    def _state(self) -> _State:
        return self._alone if self._watched is None else self._watched.current()

    # ------------------------------------------------------------ decided by an administrator

    def revoke(self, entry: Revoked) -> None:
        """Durable when it returns. A subject that is revoked already keeps the time of its
        revocation. Raises ``ConfigError`` for too many entries, ``DatabaseLockedError`` if another
        process changes the file for long, ``OSError``."""
        now = self._clock.now_ms()

        def change(decided: Decided) -> Decided:
            kept = [e for e in decided.revoked if e.until_ms is None or now < e.until_ms]
            if any(each.key == entry.key for each in kept):
                return decided
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

        if db_id in self.decided.frozen or any(e.db_id == db_id for e in self.decided.revoked):
            self._change(change)

    def _change(self, change: Callable[[Decided], Decided]) -> Decided:
        """Returns what was decided before."""
        if self._path is None or self._watched is None:
            before = self._alone.decided
            self._alone = _State(change(before))
            return before
        # The file is the truth, and not what this process has read of it a moment ago.
        with _alone(self._path) as partial:
            before = _read(self._path)
            after = change(before)
            if after != before:
                _write(partial.path, after)
                partial.finish()
                self._watched.set(_State(after))
        if after != before:
            self.on_change()
        return before


def _nothing() -> None:
    return None


def frozen_error(db_id: str) -> ServerBusyError:
    """What a push to a frozen database is told."""
    return ServerBusyError(
        f"database {db_id!r} is frozen by the administrator of the server: it can be read, and "
        "what is pending waits until it is written to again",
        retry_after=_FROZEN_RETRY_S,
        details={"reason": "frozen"},
    )


def _alone(path: str) -> Partial:
    try:
        return Partial(path, "change")
    except DatabaseLockedError as error:
        raise DatabaseLockedError(f"{path} is being changed by another process; try again") from (
            error
        )


def _write(path: str, decided: Decided) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(json.format(json.encode(decided), indent=1))
    sync_path(path)


def _read(path: str) -> Decided:
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW)
    except FileNotFoundError:
        return Decided()
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    with open(descriptor, "rb") as file:
        content = file.read(_BYTES_MAX + 1)
    if len(content) > _BYTES_MAX:
        raise _unreadable(path, "it is too large")
    try:
        decided = json.decode(content, type=Decided)
    except (ValidationError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    if decided.version > _VERSION:
        raise _unreadable(path, "a newer EntiDB has written it")
    return decided


def _unreadable(path: str, why: str) -> ConfigError:
    return ConfigError(
        f"{path}, which says who is revoked, cannot be read: {why}. Nobody is served without it; "
        "put it back from a copy"
    )


__all__ = ["CONTROL_FILE", "REVOKED_MAX", "Control", "Decided", "Frozen", "Kind", "Revoked"]

"""What a ``validate`` hook is given and answers, what a token grants on one database, and functions
that settings name.
"""

from __future__ import annotations

import importlib
import inspect
import re
import uuid
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct, field

from entidb import cbor
from entidb.db.listeners import check_arguments
from entidb.errors import ConfigError, InvalidNameError
from entidb.types import check_name

#: Of what a ``validate`` hook says, as much as a device keeps.
_CODE_CHARS_MAX: Final = 64
_MESSAGE_CHARS_MAX: Final = 1000


class Grant(Struct, frozen=True):
    """What the token of a request allows on its database, and for whom. ``collections`` None means
    all; ``claims`` go to the validate hook."""

    subject: str
    read: bool
    write: bool
    collections: frozenset[str] | None = None
    claims: dict[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> list[str] | None:
        """The collections as answers name them to the device (R31), which would refuse an answer
        with a name that no collection can have."""
        return None if self.collections is None else sorted(filter(_is_name, self.collections))


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except InvalidNameError:
        return False
    return True


class Refusal(Struct, frozen=True):
    """A ``validate`` hook's no: ``code`` for programs, ``message`` for the person (R15)."""

    code: str
    message: str


class ValidateOperation(Struct, frozen=True):
    """One write of a transaction: the whole entity as it is to be, and not only what has changed.
    ``value`` is a fresh copy in plain values, None where the entity is deleted."""

    collection: str
    entity_id: uuid.UUID
    value: Any


class ValidateTransaction(Struct, frozen=True):
    """A transaction before it is accepted: all that it writes, each entity once. ``device_id`` is
    16 bytes, ``timestamp`` the hybrid logical clock of the commit on the device."""

    transaction_id: uuid.UUID
    device_id: bytes
    timestamp: int
    operations: list[ValidateOperation]


class ValidateContext:
    """What a hook may know: who sends (``subject``, and ``claims`` of the token), which database
    (``db_id``), and, through ``get``, the state the transaction would be accepted on."""

    def __init__(
        self, db_id: str, grant: Grant, read: Callable[[str, bytes], bytes | None]
    ) -> None:
        self.db_id = db_id
        self.subject = grant.subject
        self.claims = grant.claims
        self._read = read

    def get(self, collection: str, entity_id: uuid.UUID) -> Any:
        """The entity's value now, None if there is none."""
        payload = self._read(collection, entity_id.bytes)
        return None if payload is None else cbor.decode_trusted(payload)


#: Makes the newest shape of what an older program pushes: (collection, value, the number of that
#: program's schema) -> value. A pure function.
UpcastHook = Callable[[str, Any, int], Any]


class Schema(Struct, frozen=True):
    """What a server makes of the number of a program's schema (R33): programs below ``least`` may
    not pull; what those below ``number`` push goes through ``upcast``, if there is one."""

    number: int = 0
    least: int = 0
    upcast: UpcastHook | None = None

    def upcasts(self, said: int) -> bool:
        """Whether what a program that says ``said`` writes is changed. One that says nothing
        could not be told what became of it."""
        return self.upcast is not None and 0 < said < self.number


NO_SCHEMA: Final = Schema()

#: Answers None to let a transaction pass, or why not.
ValidateHook = Callable[[ValidateContext, ValidateTransaction], Refusal | None]


def sendable(refusal: Refusal) -> Refusal:
    """A hook's words as they may cross the network and end on a terminal. A device believes no
    refusal without a code, and would ask again without end."""
    code = "".join(c for c in refusal.code[:_CODE_CHARS_MAX] if c.isprintable())
    message = "".join(
        c if c.isprintable() else " " for c in refusal.message[:_MESSAGE_CHARS_MAX]
    ).strip()
    return Refusal(code or "rejected", message)


# ---------------------------------------------------------------- functions that settings name


def check_hook(name: str, hook: object) -> None:
    """Raises ``ConfigError`` for what cannot be the hook of that setting."""
    if callable(hook):
        check_called(name, name, hook)
    if hook is None or callable(hook):
        return
    if not isinstance(hook, str) or not re.fullmatch(r"[\w.]+:[\w.]+", hook):
        raise ConfigError(f'{name} is a function or "module:function", not {hook!r}')


def load_hook(setting: str, hook: str | Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The function that ``hook`` names. Raises ``ConfigError`` if it cannot be imported."""
    if not isinstance(hook, str):
        return hook
    module, _, name = hook.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}={hook!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise ConfigError(f"{setting}={hook!r} is a {type(found).__name__} and not a function")
    check_called(setting, f"{setting}={hook!r}", found)
    return found  # type: ignore[no-any-return]


#: What the hooks are called with.
_GIVEN: Final = {
    "authenticator": ("the token",),
    "validate": ("the context", "the transaction"),
    "upcast": ("the collection", "the value", "the number of the schema"),
}


def check_called(setting: str, name: str, function: Callable[..., Any]) -> None:
    """It takes what it is called with. It is called from a thread that no event loop runs in;
    nothing would await what it returns."""
    called = getattr(function, "__call__", None)  # noqa: B004, an object may be a function too
    for each in (function, called, getattr(function, "func", None)):
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            raise ConfigError(
                f"{name} is an async function, and is called from threads: give a plain one, which "
                "answers from memory"
            )
    check_arguments(function, name, _GIVEN[setting])

"""Adding an observer: also one that is called for commits of other processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from entidb.db.core import Core
from entidb.db.listeners import add_listener
from entidb.db.observers import Observer


def add_observer(
    core: Core, where: str, observer: Observer, closed: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Have ``observer`` called after every commit from now on, and ``closed`` when the database is
    closed; what this returns ends both. Raises ``ConfigError``, which names ``where``, for what
    cannot be called."""
    observers = core._observers
    if not observers.listeners:
        observers.begin(core.read_head().sequence)
    end = add_listener(observers.listeners, observer, where, "the event")
    if core.storage.shared:
        core._hearing.start()
    if closed is None:
        return end
    core._observers.when_closed.append(closed)

    def end_both() -> None:
        end()
        with suppress(ValueError):  # called twice
            core._observers.when_closed.remove(closed)

    return end_both


__all__ = ["add_observer"]

"""Adding an observer: also one that is called for commits of other processes."""

from __future__ import annotations

from collections.abc import Callable

from entidb.db.core import Core
from entidb.db.listeners import add_listener
from entidb.db.observers import Observer


def add_observer(core: Core, observer: Observer, where: str) -> Callable[[], None]:
    """Have ``observer`` called after every commit from now on; what this returns ends it. Raises
    ``ConfigError``, which names ``where``, for what cannot be called."""
    observers = core._observers
    if not observers.listeners:
        observers.begin(core.read_head().sequence)
    end = add_listener(observers.listeners, observer, where, "the event")
    if core.storage.shared:
        core._hearing.start()
    return end


__all__ = ["add_observer"]

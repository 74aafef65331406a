"""Functions of programs that EntiDB calls: how they are added, and what happens to their bugs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from entidb.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def check_arguments(function: Callable[..., Any], where: str, given: tuple[str, ...]) -> None:
    """Raises ``ConfigError`` if ``function`` cannot be called with as many arguments as ``given``
    names: at the first call it would be too late to say so to who wrote it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # Some of those written in C do not say.
    try:
        signature.bind(*given)
    except TypeError as error:
        raise ConfigError(
            f"{where} is called with {' and '.join(given)}, and the function given for it cannot "
            f"be: {error}"
        ) from error


def check_plain(function: object, where: str, given: tuple[str, ...]) -> None:
    """Raises ``ConfigError`` unless ``function`` can be called with ``given`` and does its work in
    that call: a coroutine that is never awaited, or a generator, would do nothing in silence."""
    if not callable(function):
        raise ConfigError(f"{where} needs a function, not {type(function).__name__}")
    for each in (function, getattr(function, "func", None), getattr(function, "__call__", None)):  # noqa: B004
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            raise ConfigError(
                f"{where} needs a plain function, and an `async def` is not: in asyncio, give a "
                "function that calls loop.call_soon_threadsafe(...)"
            )
        if inspect.isgeneratorfunction(each):
            raise ConfigError(f"{where} needs a plain function, and one with `yield` is not")
    check_arguments(function, where, given)


def add_listener(listeners: list[F], listener: F, where: str, *given: str) -> Callable[[], None]:
    """Add ``listener``, which is called with ``given``; what it returns takes it away again, and
    may be called twice."""
    check_plain(listener, where, given)
    listeners.append(listener)

    def stop() -> None:
        if listener in listeners:
            listeners.remove(listener)

    return stop


class _Report:
    """The interpreter calls it and passes what it raises to ``sys.unraisablehook``, in the one type
    that the hook accepts and only the interpreter can make."""

    def __init__(self, error: Exception, listener: object) -> None:
        self._errors = [error]
        self._listener = listener

    def __call__(self, reference: object) -> None:
        raise self._errors.pop()  # popped, so that nothing keeps the frames of its traceback

    def __repr__(self) -> str:
        return f"observer {self._listener!r} of a database"


class _Gone:
    __slots__ = ("__weakref__",)


def report_bug(error: Exception, listener: object) -> None:
    """Report to ``sys.unraisablehook`` that ``listener`` raised ``error``. Raises nothing."""
    gone = _Gone()
    kept = weakref.ref(gone, _Report(error, listener))
    del gone
    assert kept() is None


__all__ = ["add_listener", "check_plain", "report_bug"]

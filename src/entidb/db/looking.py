"""Plain values as conditions, orders and indexes look at them: which fields they have, what a
function makes of one, and which of two comes first.

Values of different kinds come in this order: missing, None, false, true, numbers, text, bytes,
lists, maps; 1 < 1.5 < 2 whether integer or float, and exactly so beyond 2^53.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from entidb import cbor
from entidb.errors import ConfigError

#: The names of a field, one inside the other; ``By`` at the end is what a function makes of it.
Path = tuple[str, ...]
Function = Callable[[Any], Any]


class _Missing(Enum):
    MISSING = "missing"


MISSING: Final = _Missing.MISSING
NUMBERS: Final = (int, float)
#: Place of each kind of value in an order; numbers have one place.
RANKS: Final[dict[type, int]] = {
    _Missing: 0,
    type(None): 1,
    bool: 2,
    int: 3,
    float: 3,
    str: 4,
    bytes: 5,
    list: 6,
    dict: 7,
}


def order_key(value: Any) -> tuple[Any, ...]:
    """What sorts like ``value`` in an order, beside values of any other kind. Equal values have
    equal keys: 1 and 1.0 are."""
    rank = RANKS[type(value)]
    if rank == 6:
        return (6, [order_key(item) for item in value])
    if rank == 7:
        return (7, sorted((name, order_key(item)) for name, item in value.items()))
    return (rank,) if rank < 2 else (rank, value)


class By(str):
    """What ``function`` makes of a field, as the last name of a path: the function's own."""

    __slots__ = ("function",)

    function: Function

    def __new__(cls, function: Function) -> By:
        made = super().__new__(cls, function_name(function))
        made.function = function
        return made


#: Flags of the code of a function that gives no value when it is called: of a generator, of a
#: coroutine, and of what is both (CPython's ``inspect.CO_GENERATOR`` and others).
_LATER: Final = 0x20 | 0x80 | 0x200


def function_name(function: object) -> str:
    """What a function is known by in a definition that is stored. Raises ``ConfigError`` for one
    that has no name of its own."""
    name = getattr(function, "__qualname__", "")
    module = getattr(function, "__module__", None)
    if not callable(function) or not name or "<" in name:
        what = f"an object of {type(function).__name__}"
        if callable(function):
            what = repr(function)[:80]
        raise ConfigError(
            f"{what} is not known by a name: give a function of a module, such as str.casefold"
        )
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & _LATER:
        raise ConfigError(
            f"{name} gives a coroutine or a generator: give a function that returns the value, or "
            "with each=True a list of values"
        )
    return name if module in (None, "builtins") else f"{module}.{name}"


def applied(function: Function, value: Any) -> Any:
    """What ``function`` makes of the value of a field, as an entity could hold it; ``MISSING``
    where it raises, or makes something else."""
    try:
        made = function(value)
        if isinstance(made, tuple | set | frozenset):
            made = list(made)
        return cbor.decode_trusted(cbor.encode_message(made))
    except Exception:
        # Whatever it cannot do, it does the same each time: there is no such value.
        return MISSING


def field_of(value: Any, path: Path) -> Any:
    """The field at ``path`` of a plain value, or ``MISSING``."""
    for name in path:
        if isinstance(name, By):
            return MISSING if value is MISSING else applied(name.function, value)
        if type(value) is not dict:
            return MISSING
        value = value.get(name, MISSING)
    return value


def written(path: Path) -> str:
    """The field as one writes it: ``F.address.city`` or ``F['odd name']``."""
    return "F" + "".join(map(_step, path))


def _step(name: str) -> str:
    if isinstance(name, By):
        return f".by({name})"
    return f".{name}" if name.isidentifier() else f"[{name!r}]"

"""What an index is declared as, and what cannot be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from entidb.db.looking import Function, function_name
from entidb.errors import ConfigError
from entidb.types import repr_of

#: Fields, whether of each member, and the name of the function.
Meaning = tuple[tuple[tuple[str, ...], ...], bool, str | None]

FIELDS_MAX: Final = 8


@dataclass(frozen=True, init=False)
class Index:
    """An index to declare: ``db.collection("stock", indexes=[Index("kind", "price")])``.

    Entities are found by the first of its fields, by the first two, and so on, and come in the
    order of the next one. ``Index("tags", each=True)`` has each member of a list, for
    ``F.tags.contains("new")``. ``Index("name", key=str.casefold)`` goes by what a function makes
    of the field, for ``F.name.by(str.casefold) == "ada"``: a pure function with a name, which is
    part of the definition. The function returns what an entity can hold, with ``each``
    a list; where it raises, the entity is not in the index. A field inside a field is
    ``"address.city"``.

    ``Index("email", unique=True)`` refuses a second entity with the same fields, with
    ``NotUniqueError``, when it is written here. On a device that is a courtesy: nobody there
    knows what others write meanwhile, and the server decides (``ServerConfig.unique``). Entities
    where one of the fields is missing or None are not compared.

    ``ConfigError`` is raised when it is declared, for what cannot be one.
    """

    fields: tuple[str, ...]
    each: bool = False
    key: Function | None = None
    unique: bool = False

    def __init__(
        self,
        *fields: str,
        each: bool = False,
        key: Function | None = None,
        unique: bool = False,
    ) -> None:
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "each", each)
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "unique", unique)


def checked(name: str, given: object) -> list[Index]:
    """The indexes declared for collection ``name``. Raises ``ConfigError``."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, Index) for one in given):
        raise ConfigError(
            f'indexes of {name!r} are a list like [Index("kind", "price")], not '
            f"{repr_of(given, 80)}"
        )
    for index in given:
        _check(name, index)
    if len(set(map(meaning_of, given))) < len(given):
        raise ConfigError(f"{name!r} declares the same index twice: {repr_of(given, 200)}")
    return list(given)


def _check(name: str, index: Index) -> None:
    for setting in ("each", "unique"):
        # What is written down is read again by every program that opens the database.
        given: object = getattr(index, setting)
        if not isinstance(given, bool):
            raise ConfigError(
                f"{setting} of an index of {name!r} is True or False, not {repr_of(given, 80)}"
            )
    if not 1 <= len(index.fields) <= FIELDS_MAX:
        raise ConfigError(
            f"an index of {name!r} takes 1 to {FIELDS_MAX} fields, not {repr_of(index, 80)}"
        )
    for field in index.fields:
        named: object = field
        if not isinstance(named, str) or not _is_name(named):
            raise ConfigError(
                f"a field of an index of {name!r} is its name, not {repr_of(named, 80)}"
            )
    if len(set(index.fields)) < len(index.fields):
        raise ConfigError(f"an index of {name!r} names a field twice: {repr_of(index, 80)}")
    if (index.each or index.key is not None) and len(index.fields) > 1:
        raise ConfigError(f"each and key are for an index of one field, not {repr_of(index, 80)}")
    if index.each and index.unique:
        raise ConfigError(f"an index of each member cannot be unique, as {repr_of(index, 80)}")
    if index.key is not None:
        function_name(index.key)


def _is_name(name: str) -> bool:
    """Whether an entity can have such a field: half of a surrogate pair is in no name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return all(name.split("."))


def paths_of(index: Index) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(field.split(".")) for field in index.fields)


def meaning_of(index: Index) -> Meaning:
    """What makes it another index, with other places."""
    key = None if index.key is None else function_name(index.key)
    return paths_of(index), index.each, key


__all__ = ["FIELDS_MAX", "Index", "Meaning", "checked", "meaning_of", "paths_of"]

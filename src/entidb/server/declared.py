"""Indexes that the settings declare for the databases of a server, and what is unique in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entidb.db.index_definition import Index, checked
from entidb.errors import ConfigError, InvalidNameError
from entidb.types import check_name, repr_of

#: Of each collection: its indexes (None: those that it has), and what is unique (None: what is).
Declared = dict[str, tuple[list[Index] | None, list[Index] | None]]


def declared(indexes: object, unique: object) -> Declared:
    """What ``ServerConfig`` says in ``indexes`` and ``unique``, checked. Raises ``ConfigError``."""
    lists = {name: _indexes(name, given) for name, given in _named("indexes", indexes).items()}
    ones = {name: _unique(name, given) for name, given in _named("unique", unique).items()}
    return {name: (lists.get(name), ones.get(name)) for name in {**lists, **ones}}


def _named(setting: str, given: object) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f'{setting} is a map from collections to lists, like {{"users": ["email"]}}, not '
            f"{repr_of(given, 80)}"
        )
    for name in given:
        try:
            check_name(name)
        except InvalidNameError as error:
            raise ConfigError(f"{setting}: {error}") from error
    return given


def _indexes(name: str, given: object) -> list[Index]:
    if not isinstance(given, list | tuple):
        raise ConfigError(f"indexes of {name!r} are a list, not {repr_of(given, 80)}")
    return checked(name, [_index(each) for each in given])


def _unique(name: str, given: object) -> list[Index]:
    if not isinstance(given, list | tuple):
        raise ConfigError(
            f"unique: what is unique in collection {name!r}, of each database, is a list like "
            f'["email"] or [("till", "number")], not {repr_of(given, 80)}'
        )
    made = [_index(each) for each in given]
    for one in made:
        if isinstance(one, Index) and one.each:
            raise ConfigError(f"an index of each member cannot be unique: {repr_of(one, 80)}")
    return checked(name, made)


def _index(given: object) -> Any:
    """A field, several that are one key together, or an ``Index``."""
    if isinstance(given, str):
        return Index(given)
    return Index(*given) if isinstance(given, tuple) else given


__all__ = ["Declared", "declared"]

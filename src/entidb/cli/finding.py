"""Conditions and orders as they are written on a command line, for ``list``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from entidb.cli.exits import InputError, UsageError
from entidb.cli.values import parse
from entidb.cli.words import find_id
from entidb.db import Query
from entidb.db.collection import ReadCollection
from entidb.errors import QueryError

#: Sign on the command line -> word of a condition that comes as data.
SIGNS: Final[dict[str, str]] = {
    "==": "==",
    "!=": "!=",
    "<=": "<=",
    ">=": ">=",
    "^=": "startswith",
    "*=": "contains",
    "=": "==",
    "<": "<",
    ">": ">",
}
_SIGN: Final = re.compile("|".join(map(re.escape, SIGNS)))
#: Behind a sign: what makes it another that other languages have.
_SLIPS: Final = ("=", "<", ">", "~")
#: What can only have been meant as JSON.
_JSON_BEGINS: Final = ('"', "{", "[")


def query_of(
    collection: ReadCollection[Any],
    conditions: Sequence[str],
    orders: Sequence[str],
    after: str | None,
) -> Query[Any]:
    """The query that the options describe. Raises ``UsageError``, ``InputError``,
    ``NotFoundError``."""
    query = collection.where()
    for given in conditions:
        try:
            query = query.where.from_dict(condition_of(given))
        except QueryError as error:
            raise UsageError(f"--where {given!r}: {error}") from error
    fields = [name.strip() for given in orders for name in given.split(",")]
    if fields:
        if not all(name.removeprefix("-") for name in fields):
            raise UsageError("--order takes fields, with commas between: --order=-price,name")
        query = query.order_by(*fields)
    if after is not None:
        last = find_id(after, collection)
        query = query.after((last, collection[last]))
    return query


def condition_of(given: str) -> dict[str, Any]:
    """``kind=tea`` as ``{"kind": {"==": "tea"}}``; what begins with a brace is such a map.
    Raises ``UsageError``, ``InputError``."""
    text = given.strip()
    if text.startswith("{"):
        made = _parsed(given, text)
        if not isinstance(made, dict):
            raise InputError(f"--where {given!r} is no map of conditions")
        return made
    found = _SIGN.search(text)
    if found is not None and text[found.end() : found.end() + 1] in _SLIPS:
        raise UsageError(
            f"--where {given!r}: {text[found.start() : found.end() + 1]} is no sign, but one of "
            f"{' '.join(SIGNS)} is; a value that begins so has quotes of its own, as in "
            "--where 'name=\"<b\"'"
        )
    name = text[: found.start()].strip() if found else ""
    if found is None or not name:
        raise UsageError(
            f"--where {given!r} is no condition: write FIELD, one of {' '.join(SIGNS)}, and a "
            "value, in quotes of the shell, as in --where 'price>3'"
        )
    return {name: {SIGNS[found[0]]: _value(given, SIGNS[found[0]], text[found.end() :].strip())}}


def _parsed(given: str, text: str) -> Any:
    try:
        return parse(text)
    except InputError as error:
        raise InputError(f"--where {given!r:.100}: {error}", code=error.code) from error


def _value(given: str, word: str, text: str) -> Any:
    """JSON if it can be read so, else the text itself: a person who looks for tea writes no
    quotes, nor one who looks for names that begin with 80."""
    try:
        value = _parsed(given, text)
    except InputError:
        if text.startswith(_JSON_BEGINS):
            raise
        return text
    return text if word == "startswith" and not isinstance(value, str) else value


__all__ = ["SIGNS", "condition_of", "query_of"]

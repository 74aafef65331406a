"""Positional arguments: which word is the database directory, and what an id may look like.

``entidb get DIR COLLECTION ID``: with ``--dir``, or with ``ENTIDB_DIR`` set, DIR is left out. A
command therefore takes all its words as one list, and asks ``bind`` which is which.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from entidb.cli.exits import InputError, NotFoundError, UsageError
from entidb.cli.output import note, safe
from entidb.db import Database
from entidb.db.collection import ReadCollection
from entidb.db.identity import stored_role
from entidb.errors import ConfigError, StorageError
from entidb.storage.addresses import is_address, shown, split_name
from entidb.storage.named import open_named
from entidb.storage.opening import holds_store

F = TypeVar("F", bound=Callable[..., Any])

_HEX: Final = re.compile(r"[0-9a-f]{1,32}")
_KEY: Final = "key:"
#: What needs no quotes in a list.
_PLAIN_NAME: Final = re.compile(r"[\w.-]+")
#: What comes before the end of an id where its beginning is left out.
_CUT: Final = ("…", "...")
#: Ids of imported rows with a key of their own; docs/cli.md has the rule for other programs.
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_DNS, "import.entidb")

#: What to do with the address of a PostgreSQL database, where a command takes none.
_INSTEAD: Final = (
    "this command is for a database in files. `get`, `list`, `export`, `verify`, `inspect`, "
    "`index`, `backup` and `snapshot` read one there as ADDRESS#NAME; `entidb admin --dir ADDRESS` "
    "asks the server there, and `entidb copy` copies one into files"
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, in the shape docs/cli.md describes."
)


# ---------------------------------------------------------------- which word is which


def words(shape: str) -> Callable[[F], F]:
    """Declare the positional arguments ``words`` and the option ``--dir`` of a command."""

    def declare(command: F) -> F:
        positional = click.argument("words", nargs=-1, metavar=f"[DIR] {shape}".strip())
        directory = click.option("--dir", "directory", metavar="DIR", help="The database.")
        return positional(directory(command))

    return declare


@dataclass(frozen=True)
class Bound:
    """A database directory, or the address of one in PostgreSQL; and the other words by name, of
    which one that was left out is None."""

    path: str
    named: dict[str, str | None]

    def __getitem__(self, name: str) -> str:
        found = self.named[name]
        assert found is not None, "an optional word is asked for with get()"
        return found

    def get(self, name: str) -> str | None:
        return self.named[name]

    @property
    def shown(self) -> str:
        """``path`` for messages: an address may have a password."""
        return shown(self.path)


def bind(
    given: tuple[str, ...],
    directory: str | None,
    *names: str,
    or_address: bool = False,
    or_store: bool = False,
    instead: str = _INSTEAD,
) -> Bound:
    """Give the words their ``names``; one in brackets may be missing. With ``or_address`` the
    directory may be the address of a PostgreSQL database, and with ``or_store`` that of one
    database in it; where it may not, ``instead`` says what to do. Raises ``UsageError``.

    Where one word less is a possible reading too, and ``ENTIDB_DIR`` is set, the first word is
    the directory if there is a database in it.
    """

    def place(path: str) -> str:
        if is_address(path) and or_store:
            return _a_store(path)
        return path if is_address(path) and or_address else a_directory(path, instead)

    default = os.environ.get("ENTIDB_DIR") or None
    least = sum(1 for name in names if not name.startswith("["))
    if directory is not None:
        return Bound(place(directory), _named(given, names))
    fits_without = default is not None and least <= len(given) <= len(names)
    fits_with = least + 1 <= len(given) <= len(names) + 1
    if fits_with and (not fits_without or is_database(given[0])):
        return Bound(place(given[0]), _named(given[1:], names))
    if fits_without:
        assert default is not None
        return Bound(place(default), _named(given, names))
    raise _misfit(given, least, names, default)


def a_directory(path: str, instead: str = _INSTEAD) -> str:
    """Raises ``UsageError`` for what is none, and does not show an address: it may have a
    password."""
    if is_address(path):
        raise UsageError(
            f"DIR is a directory here, and not the address of a PostgreSQL database; {instead}"
        )
    return not_empty("DIR", path)


def _a_store(address: str) -> str:
    """The address of one database in PostgreSQL. Raises ``UsageError`` for that of all of them."""
    if not split_name(address)[1]:
        where = shown(address).rstrip("#")
        raise UsageError(
            f"which database of PostgreSQL? write {where}#NAME; "
            f"`entidb admin --dir {where} databases` lists them"
        )
    return address


def not_empty(name: str, path: str) -> str:
    # The system takes an empty path for none, or for the current directory.
    if not path:
        raise UsageError(f"{name} is empty: name the path")
    return path


@contextmanager
def as_options(flags: Mapping[str, str]) -> Iterator[None]:
    """What is said of a setting is said of the option that sets it, which is what a command line
    has; ``flags`` has the one for the other."""
    try:
        yield
    except ConfigError as error:
        error.args = (_SETTING.sub(lambda found: flags.get(found[0], found[0]), str(error)),)
        raise


#: Names with an underscore, and nothing that is quoted.
_SETTING: Final = re.compile(r"(?<![\w'\"/.-])[a-z]+(?:_[a-z0-9]+)+(?![\w'\"/.-])")


def check_text(name: str, text: str) -> str:
    """``text`` itself. Raises ``UsageError`` where the bytes of the command line were no UTF-8, so
    that nothing can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} {text!r:.80} is not UTF-8: give one that is") from None
    return text


def elsewhere(name: str, path: str) -> str:
    """``path`` itself, which is not empty. Raises ``UsageError`` for one inside a database: what a
    database has in its directory is its own."""
    for above in Path(os.path.abspath(not_empty(name, path))).parents:
        if is_database(str(above)):
            raise UsageError(f"{path} would be inside the database {above}: name another place")
    return path


def once(option: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What a repeated ``option`` says of each name. Raises ``UsageError`` where it says two things
    of one: which of them is meant, nobody can tell."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise UsageError(f"{option} says two things of {name!r}: give one of them")
    return found


def _misfit(
    given: tuple[str, ...], least: int, names: tuple[str, ...], default: str | None
) -> UsageError:
    if default is None and len(given) <= least:
        what = "which database?" if not given or len(given) == least else "something is missing:"
        return UsageError(
            f"{what} give {' '.join(('DIR', *names))} (DIR is the database directory; "
            "ENTIDB_DIR can name it too)"
        )
    return UsageError(f"{len(given)} words are given; expected {' '.join(('[DIR]', *names))}")


def _named(given: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str | None]:
    least = sum(1 for name in names if not name.startswith("["))
    spare = len(given) - least
    if not 0 <= spare <= len(names) - least:
        raise UsageError(f"{len(given)} words are given; expected {' '.join(names)}")
    found: dict[str, str | None] = {}
    rest = iter(given)
    for name in names:
        optional = name.startswith("[")
        taken = not optional or spare > 0
        found[name.strip("[]")] = next(rest) if taken else None
        spare -= optional and taken
    return found


def is_database(path: str) -> bool:
    return holds_store(path)


# ---------------------------------------------------------------- opening


@contextmanager
def opened(path: str, *, read_only: bool = False) -> Iterator[Database]:
    """The database at ``path``, which has to be there. ``read_only`` is for commands that only
    look: they make no file, and a backup stays one."""
    if is_address(path):
        with _opened_store(path, read_only=read_only) as database:
            yield database
        return
    if not _is_there(path):
        raise NotFoundError(
            f"there is no database at {path}; make one with `entidb init {path}`",
            code="no_database",
        )
    with Database.open(path, create=False, read_only=read_only) as database:
        yield database


@contextmanager
def _opened_store(place: str, *, read_only: bool) -> Iterator[Database]:
    try:
        store = open_named(place, read_only=read_only)
    except StorageError as error:
        if error.code != "no_store":
            raise
        raise NotFoundError(
            f"there is no database {shown(place)}: {error}", code="no_database"
        ) from error
    with contextlib.closing(store):
        if store.mark() == 0:
            raise NotFoundError(f"there is no database {shown(place)}", code="no_database")
        role, where = stored_role(store), shown(place)
        with Database(store, role=role, create=False, where=where, read_only=read_only) as database:
            yield database


def _is_there(path: str) -> bool:
    """A path that may not be looked at counts as there: opening it says what is wrong."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def opened_or_made(path: str) -> Iterator[Database]:
    """The database at ``path``; made, and said so, if there is nothing there."""
    made = not is_database(path)
    with Database.open(path) as database:
        if made:
            note(f"made a database in {safe(path)}")
        yield database


def existing_collection(database: Database, name: str) -> ReadCollection[Any]:
    """The collection ``name``. Raises ``NotFoundError`` if nothing was ever written to it."""
    names = database.collections()
    if name not in names:
        shown = (each if _PLAIN_NAME.fullmatch(each) else repr(each) for each in names[:10])
        there = f"there are {', '.join(shown)}" if names else "there are none yet"
        raise NotFoundError(f"there is no collection {name!r}; {there}", code="no_collection")
    return database.collection(name)


# ---------------------------------------------------------------- ids


def key_id(collection: str, key: str) -> uuid.UUID:
    """The id of the entity of ``collection`` whose own key is ``key``: UUIDv5 (RFC 9562, 5.5)."""
    return uuid.uuid5(_NAMESPACE, f"{collection}/{key}")


def full_id(text: str, collection: str) -> uuid.UUID | None:
    """The id that ``text`` spells out, as a UUID or as ``key:…``; None if it is a shorter one."""
    if text.startswith(_KEY):
        check_text("the key", text)
        return key_id(collection, text.removeprefix(_KEY))
    digits = _digits(text)
    return uuid.UUID(hex=digits) if len(digits) == 32 else None


def find_id(text: str, collection: ReadCollection[Any]) -> uuid.UUID:
    """The entity of ``collection`` that ``text`` names: an id, its beginning or its end, or
    ``key:…``.

    Raises ``NotFoundError``; ``UsageError`` if several begin or end so, or if it is no id at all.
    """
    whole = full_id(text, collection.name)
    if whole is not None:
        if whole not in collection:
            raise _no_entity(text, collection.name)
        return whole
    digits = _digits(text)
    found: list[uuid.UUID] = [] if is_end(text) else _beginning_with(digits, collection)
    ends = (uuid.UUID(bytes=raw) for raw, _ in collection.payloads() if _ends_with(raw, digits))
    found = list(dict.fromkeys([*found, *islice(ends, 2)]))
    return _only(text, found, f"entity of {collection.name}")


def _beginning_with(digits: str, collection: ReadCollection[Any]) -> list[uuid.UUID]:
    start = uuid.UUID(hex=digits.ljust(32, "0"))
    after = int(digits, 16) + 1 << 4 * (32 - len(digits))
    stop = uuid.UUID(int=after) if after < 1 << 128 else None
    return [entity_id for entity_id, _ in collection.range(start, stop, limit=2)]


def _ends_with(raw: bytes, digits: str) -> bool:
    return raw[-(len(digits) + 1) // 2 :].hex().endswith(digits)


def pick_id(text: str, ids: Iterable[uuid.UUID], noun: str) -> uuid.UUID:
    """The one of ``ids`` that begins or ends with ``text``. Raises as ``find_id``."""
    digits = _digits(text)
    found = [
        each
        for each in dict.fromkeys(ids)
        if each.hex.endswith(digits) or (not is_end(text) and each.hex.startswith(digits))
    ]
    return _only(text, found, noun)


def is_end(text: str) -> bool:
    """Whether ``text`` says itself that it is the end of an id, as shortened ids are shown."""
    return text.startswith(_CUT)


def _only(text: str, found: list[uuid.UUID], noun: str) -> uuid.UUID:
    if not found:
        raise NotFoundError(f"there is no {noun} with an id that begins or ends with {text!r}")
    if len(found) > 1:
        first, second = found[:2]
        raise UsageError(
            f"more than one {noun} begins or ends with {text!r}, such as {first} and {second}; "
            f"give the end of the id, as in {_end_of(first, second)}",
            code="ambiguous_id",
        )
    return found[0]


def _end_of(entity_id: uuid.UUID, other: uuid.UUID) -> str:
    """The shortest end of ``entity_id`` worth typing that ``other`` does not have."""
    length = 6
    while length < 32 and other.hex.endswith(entity_id.hex[-length:]):
        length += 2
    return entity_id.hex[-length:]


def _no_entity(text: str, collection: str) -> NotFoundError:
    return NotFoundError(f"there is no entity {text} in {collection}")


def _digits(text: str) -> str:
    digits = text.removeprefix("…").removeprefix("...").lower().replace("-", "")
    if _HEX.fullmatch(digits) is None:
        raise UsageError(
            f"{text[:80]!r} is no id: give a UUID, its first or last digits, or key:TEXT for an "
            "entity imported with --key",
            code="invalid_id",
        )
    return digits


def parse_uuid(text: object) -> uuid.UUID:
    """A whole UUID out of a file. Raises ``InputError``."""
    try:
        return uuid.UUID(text)  # type: ignore[arg-type]
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{text!r:.80} is no UUID") from error

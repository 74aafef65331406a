"""How PostgreSQL's errors leave this package.

Not here: the outcome of a commit that nobody acknowledged (``writing``).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import errors

from entidb.errors import ConfigError, StorageError, StorageFullError, StorageUnreachableError
from entidb.storage.postgres.reaching import NoAnswerError

#: By SQLSTATE or its class, the first match counts.
_WORDS: Final = (
    ("53100", "the disk of the PostgreSQL server is full"),
    ("53300", "the PostgreSQL server has no connection left: raise its max_connections"),
    ("25006", "the PostgreSQL server takes no writes: it is a standby now"),
    ("28", "the PostgreSQL server refuses the user or the password"),
    ("3D000", "there is no such PostgreSQL database; create it with createdb, or mend the address"),
    ("42501", "the PostgreSQL user may not do this; give it the rights to create and use tables"),
    ("57P", "the PostgreSQL server is shutting down or starting"),
    ("08", "the connection to the PostgreSQL server is lost"),
    ("40", "the PostgreSQL server undid it because of another transaction; try again"),
    ("58", "the PostgreSQL server reports an error of its system"),
    ("XX", "the PostgreSQL server reports damage; look at its log"),
)

#: A server that refuses a connection gives libpq a SQLSTATE, which libpq keeps to itself: it is
#: found again in what libpq says, where the server speaks English.
_REFUSALS: Final = (
    (re.compile(r"FATAL: .*(password authentication failed|authentication failed)"), "28P01"),
    (re.compile(r"no password supplied|requested SCRAM authentication"), "28P01"),
    (re.compile(r"FATAL: .*(role .* does not exist|no pg_hba\.conf entry|not permitted to log)"),
     "28000"),
    (re.compile(r"FATAL: .*database .* does not exist"), "3D000"),
    (re.compile(r"FATAL: .*(too many (clients|connections)|connection slots are reserved)"),
     "53300"),
    (re.compile(r"FATAL: .*the database system is"), "57P03"),
    (re.compile(r"FATAL: .*permission denied for database"), "42501"),
    (re.compile(r"session is read-only|server is in hot standby mode"), "25006"),
)  # fmt: skip

#: What libpq, or psycopg, says of an address before anybody is asked: its words name the setting.
_WRONG_ADDRESS: Final = re.compile(
    r"(?:invalid (?:port number|(?:\S+ )?value|integer value)|bad value for \w+|"
    r"could not parse network address)[^\n]*"
)

#: Those that pass by themselves, or when somebody looks after the server: it is worth asking again.
_PASSING: Final = ("53300", "25006", "57P", "08")


def storage_error(error: Exception, doing: str) -> StorageError:
    """Ours for what psycopg raised. Nothing was changed by what failed. Raises ``ConfigError``
    where no server was asked, because the address names something that cannot be."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, NoAnswerError):
        return StorageUnreachableError(
            f"{doing}: the PostgreSQL server does not answer within the time that is waited; is it "
            "there, and does its synchronous standby answer?"
        )
    state = getattr(error, "sqlstate", None) or ""
    kind = StorageFullError if isinstance(error, errors.DiskFull) else StorageError
    if not state:
        # No connection came about. Whatever was asked can be asked again, when it does.
        wrong = None if "FATAL:" in str(error) else _WRONG_ADDRESS.search(str(error))
        if wrong is not None:
            raise ConfigError(f"{doing}: the address is wrong: {wrong[0]}; mend it") from error
        kind, state = StorageUnreachableError, _refusal(str(error))
    elif state.startswith(_PASSING):
        kind = StorageUnreachableError
    for prefix, words in _WORDS:
        if state.startswith(prefix):
            return kind(f"{doing}: {words} (SQLSTATE {state})")
    if state:
        return kind(f"{doing}: the PostgreSQL server refused this (SQLSTATE {state})")
    return kind(f"{doing}: the PostgreSQL server cannot be reached, or went away{_told(error)}")


def _refusal(said: str) -> str:
    return next((state for words, state in _REFUSALS if words.search(said)), "")


def _told(error: Exception) -> str:
    """What the server said that refused a connection, in whatever language."""
    _, found, said = str(error).rpartition("FATAL:")
    lines = said.strip().splitlines()
    return f" ({lines[0]})" if found and lines else ""


@contextlib.contextmanager
def as_ours(doing: str) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise storage_error(error, doing) from error


def is_demoted(error: BaseException) -> bool:
    """Whether the server has become a standby: its connections are of no more use."""
    return isinstance(error, errors.ReadOnlySqlTransaction)


__all__ = ["as_ours", "is_demoted", "storage_error"]

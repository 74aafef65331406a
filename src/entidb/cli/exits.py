"""Exit codes: one table, and which error ends with which. ``docs/cli.md`` shows the same table, a
test compares. Nothing is printed here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from entidb.errors import (
    AuthenticationError,
    CodecError,
    ConfigError,
    ConflictError,
    DatabaseLockedError,
    EntiDBError,
    HistoryChangedError,
    InvalidNameError,
    LocalError,
    NotUniqueError,
    ProtocolError,
    QueryError,
    ServerError,
    StorageError,
    SyncError,
    TransactionTooLargeError,
    TransportError,
    UpgradeRequiredError,
    ValueTypeError,
)


class Exit(IntEnum):
    """What the exit code says. Numbers never change; new ones are added at the end."""

    #: Everything was done.
    OK = 0
    #: A failure that has no code of its own, also a bug in EntiDB.
    FAILURE = 1
    #: The command line was wrong: unknown option, missing argument, a setting out of range.
    USAGE = 2
    #: There is no such database, entity, conflict or discarded transaction.
    NOT_FOUND = 3
    #: The sync ended, and conflicts wait for a person, or some changes for another sync.
    UNRESOLVED = 4
    #: No network, no server, a server that is busy or broken; or an address that cannot be bound.
    NETWORK = 5
    #: The server refused the token, or the token does not allow this.
    AUTHENTICATION = 6
    #: The disk, or what is on it: full, damaged, cut short, not a database, written by a newer one.
    STORAGE = 7
    #: Another process has the database open.
    LOCKED = 8
    #: `verify` found faults, or `doctor` problems.
    FAULTS = 9
    #: The server has another history: choose with `reset --keep`.
    HISTORY = 10
    #: A value or a row of a file cannot be stored as it is.
    VALUE = 11
    #: Client and server do not understand each other.
    PROTOCOL = 12
    #: SIGHUP: the terminal is gone. What was committed stays.
    HUNG_UP = 129
    #: Ctrl-C. What was committed stays.
    INTERRUPTED = 130
    #: The program that reads the output stopped reading, as `head` does.
    BROKEN_PIPE = 141
    #: SIGTERM.
    TERMINATED = 143


class NotFoundError(LocalError):
    """What was named on the command line is not there."""

    code = "not_found"


class UsageError(LocalError):
    """The command line has a mistake."""

    code = "usage"


class InputError(LocalError):
    """A row of an imported file, or a value, that cannot be stored."""

    code = "invalid_input"


#: The first match decides.
_BY_CLASS: Final[tuple[tuple[type[EntiDBError], Exit], ...]] = (
    (NotFoundError, Exit.NOT_FOUND),
    (UsageError, Exit.USAGE),
    (InputError, Exit.VALUE),
    (DatabaseLockedError, Exit.LOCKED),
    (ValueTypeError, Exit.VALUE),
    (NotUniqueError, Exit.VALUE),
    (TransactionTooLargeError, Exit.VALUE),
    (InvalidNameError, Exit.USAGE),
    (ConfigError, Exit.USAGE),
    (QueryError, Exit.USAGE),
    (CodecError, Exit.VALUE),
    (StorageError, Exit.STORAGE),
    (HistoryChangedError, Exit.HISTORY),
    (UpgradeRequiredError, Exit.PROTOCOL),
    (ConflictError, Exit.UNRESOLVED),
    (AuthenticationError, Exit.AUTHENTICATION),
    (TransportError, Exit.NETWORK),
    (ServerError, Exit.NETWORK),
    (ProtocolError, Exit.PROTOCOL),
    (SyncError, Exit.FAILURE),
)
#: Where the code says more than the class.
_BY_CODE: Final[dict[str, Exit]] = {
    "cannot_bind": Exit.NETWORK,
    "conflict_gone": Exit.NOT_FOUND,
    "discarded_gone": Exit.NOT_FOUND,
    "exists": Exit.USAGE,
    "no_database": Exit.NOT_FOUND,
    "reset_required": Exit.UNRESOLVED,
}

#: What to do next, where the error itself comes from a layer that knows no command line.
HINTS: Final[dict[str, str]] = {
    "insecure_token": "on the command line that is --insecure-token",
    "unauthorized": "give a valid token with --token-file, --token or ENTIDB_TOKEN",
    "transport_error": "nothing pending is lost; try again when the server can be reached",
    "timeout": "nothing pending is lost; try again",
    "corrupt_record": "`entidb verify` lists all faults",
    "transaction_too_large": "write less in one transaction (import: a smaller --batch)",
}
#: Where an error speaks of Python calls, the same for a command line.
CALLS: Final[dict[str, str]] = {
    'reset(keep="server")': "`entidb reset --keep server`",
    'reset(keep="device")': "`entidb reset --keep device`",
    "give the credential as token=": "give the credential with --token-file",
    "give subject=, who": "give --subject NAME, who",
}


def exit_of(error: EntiDBError) -> Exit:
    """The exit code of ``error``."""
    by_code = _BY_CODE.get(error.code)
    if by_code is not None:
        return by_code
    for kind, code in _BY_CLASS:
        if isinstance(error, kind):
            return code
    return Exit.FAILURE

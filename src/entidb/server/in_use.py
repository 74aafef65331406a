"""Why a database cannot be used at the moment, for those who ask: they come again."""

from __future__ import annotations

from typing import Final

from entidb.errors import ServerBusyError

_RETRY_S: Final = 1.0


def opened_again(db_id: str) -> ServerBusyError:
    return ServerBusyError(
        f"database {db_id!r} had to be opened again after an error meanwhile, which ended this: "
        "do it once more",
        retry_after=_RETRY_S,
    )


def looked_after() -> ServerBusyError:
    return ServerBusyError("the database is being looked after", retry_after=_RETRY_S)


def stopping() -> ServerBusyError:
    return ServerBusyError(
        "the server is shutting down", code="shutting_down", retry_after=_RETRY_S
    )


def waited_for() -> ServerBusyError:
    return ServerBusyError(
        "the database is being opened again after an error", retry_after=_RETRY_S
    )


def by_others(db_id: str) -> ServerBusyError:
    return ServerBusyError(f"database {db_id!r} is in use", retry_after=_RETRY_S)


def by_the_server(db_id: str) -> ServerBusyError:
    return ServerBusyError(f"database {db_id!r} is in use by the server itself")


def too_many() -> ServerBusyError:
    return ServerBusyError("too many databases are in use", retry_after=_RETRY_S)

"""Every error EntiDB raises: one tree, and one table of the codes that travel.

    EntiDBError
    ├── LocalError                     the program, or this device, has to change something
    │   ├── DatabaseClosedError        database_closed
    │   ├── DatabaseLockedError        database_locked          another process or engine has it
    │   ├── DatabaseForkedError        database_forked          inherited through fork()
    │   ├── TransactionError           transaction_state        nested, or used after its end
    │   │   └── TransactionConflictError  transaction_conflict  another changed what it has read
    │   ├── TransactionTooLargeError   transaction_too_large
    │   ├── ValueTypeError             value_type               refused by the collection's type
    │   ├── QueryError                 invalid_query            an impossible condition or order
    │   ├── NotUniqueError             not_unique               another entity has the same fields
    │   ├── InvalidNameError           invalid_name
    │   ├── ScopeError                 scope_conflict
    │   └── ConfigError                invalid_config
    ├── CodecError
    │   ├── CborEncodeError            value_not_encodable      names the path inside the value
    │   └── CborDecodeError            invalid_cbor
    ├── StorageError                   storage_error
    │   ├── StorageFullError           storage_full             disk or map; nothing was changed
    │   ├── CorruptionError            corrupt_record
    │   ├── FormatError                not_a_database | newer_format | truncated
    │   ├── DatabaseMovedError         database_moved           the path leads to something else
    │   ├── StorageUnreachableError    storage_unreachable      its server is away; try again
    │   ├── CommitStaleError           commit_stale             another was faster; begin again
    │   └── CommitUnknownError         commit_unknown           reopen and read to find out
    └── SyncError                      (codes: see ``ERROR_TABLE``)
        ├── TransportError             transport_error          retryable
        │   ├── SyncTimeoutError       timeout                  retryable
        │   └── TlsError               tls_error                not retryable
        ├── ProtocolError              invalid_message
        │   ├── SyncCodecError         codec_error
        │   └── VersionMismatchError   version_mismatch
        ├── AuthenticationError        unauthorized
        │   └── PermissionDeniedError  forbidden | revoked
        ├── ServerError                server_error             retryable
        │   └── ServerBusyError        busy | rate_limited      retryable, after a time
        │                              frozen                   not retryable
        ├── ConflictError              rounds_exhausted
        ├── SyncCancelledError         cancelled
        ├── SyncStateError             invalid_state
        ├── HistoryChangedError        history_changed
        ├── ResetRequiredError         reset_required
        └── UpgradeRequiredError       upgrade_required

The class says who has to act; programs compare ``code``, which is stable; the engine obeys
``retryable`` (rules, "Limits"). No code parses a message. Nothing else lives here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uuid import UUID


class EntiDBError(Exception):
    """Root of every error that EntiDB raises on purpose.

    ``code`` is a stable identifier, ``retryable`` says whether trying the same again can help,
    and the message names the thing and what to do next.
    """

    code: str = "error"
    retryable: bool = False

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    @property
    def message(self) -> str:
        return str(self.args[0])


class LocalError(EntiDBError):
    """The calling program, or the person at this device, has to change something."""

    code = "local_error"


class DatabaseClosedError(LocalError):
    code = "database_closed"


class DatabaseLockedError(LocalError):
    code = "database_locked"


class DatabaseForkedError(LocalError):
    code = "database_forked"


class TransactionError(LocalError):
    code = "transaction_state"


class TransactionConflictError(TransactionError):
    """Another transaction has changed what this one has read; nothing was written."""

    code = "transaction_conflict"


class TransactionTooLargeError(LocalError):
    code = "transaction_too_large"


class ValueTypeError(LocalError, TypeError):
    """A value, a stored entity or a class that does not fit.

    As far as they are known: ``collection`` and ``entity_id`` (a ``uuid.UUID``) name the entity,
    ``field`` the place in it (``lines[3].price``), ``reason`` says what is wrong there.
    """

    code = "value_type"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        collection: str | None = None,
        entity_id: UUID | None = None,
        field: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.collection = collection
        self.entity_id = entity_id
        self.field = field
        self.reason = reason


class QueryError(LocalError, ValueError):
    code = "invalid_query"


class NotUniqueError(LocalError):
    """A transaction would give an entity what another one has, in fields that an index declares
    unique. Nothing was written.

    ``collection`` and ``entity_id`` name the entity, ``fields`` what is the same, ``holder`` the
    entity that has it already.
    """

    code = "not_unique"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        collection: str = "",
        entity_id: UUID | None = None,
        fields: tuple[str, ...] = (),
        holder: UUID | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.collection = collection
        self.entity_id = entity_id
        self.fields = fields
        self.holder = holder


class ScanWarning(UserWarning):
    """A query looked at very many entities, because no index helped."""


class InvalidNameError(LocalError, ValueError):
    code = "invalid_name"


class ScopeError(LocalError):
    code = "scope_conflict"


class ConfigError(LocalError, ValueError):
    code = "invalid_config"


class CodecError(EntiDBError, ValueError):
    """Bytes or values outside the canonical CBOR profile."""

    code = "codec_error"


class CborEncodeError(CodecError):
    """A value that canonical CBOR cannot express.

    ``path`` names the place, ``$`` being the value itself: ``$.lines[3].price``.
    """

    code = "value_not_encodable"

    def __init__(self, message: str, *, path: str = "$") -> None:
        super().__init__(message)
        self.path = path


class CborDecodeError(CodecError):
    """Bytes that are not one canonical CBOR item of the profile."""

    code = "invalid_cbor"


class StorageError(EntiDBError):
    """The disk, or what is on it. Unless a subclass says otherwise nothing was changed."""

    code = "storage_error"


class StorageFullError(StorageError):
    """No room on the disk or in the map. Nothing was changed; free space and try again."""

    code = "storage_full"


class CorruptionError(StorageError):
    """A record whose checksum does not match, or that is missing although another one refers to it.
    It was not returned, and nothing made of it was sent."""

    code = "corrupt_record"


class FormatError(StorageError):
    """The path does not hold a database that this version can open. It was not touched."""

    code = "not_a_database"


class DatabaseMovedError(StorageError):
    """The path no longer leads to the database that is open: it was moved, deleted or replaced.
    Nothing was written, neither to it nor to what is there now."""

    code = "database_moved"


class StorageUnreachableError(StorageError):
    """The PostgreSQL server that has the database cannot be reached, takes no writes at the moment,
    or went away meanwhile. Nothing was changed; the same can be tried again."""

    code = "storage_unreachable"


class CommitStaleError(StorageError):
    """Another process has committed since this commit was decided: the turn to commit was lost
    without noticing. Nothing was changed; the same transaction may be begun again."""

    code = "commit_stale"

    @classmethod
    def of(cls, where: str, decided: int, newest: int) -> CommitStaleError:
        return cls(
            f"{where}: this commit was decided on state {decided}, and by now there is {newest}: "
            "another process has committed. Nothing was changed; begin the transaction again"
        )


class CommitUnknownError(StorageError):
    """A commit failed in a way that leaves open whether it is durable. Reopen and read."""

    code = "commit_unknown"
    #: What stopped it, for a store that is given up in any case; None where that is not known.
    failed: StorageError | None = None


class SyncError(EntiDBError):
    """Anything that ended a sync cycle early. The outbox is untouched by all of them.

    ``details`` holds what the server sent beside code and message; ``retry_after`` is in seconds,
    None where the server named no time.
    """

    code = "sync_error"
    #: Who refused the request, where that proves that nothing of it was decided (R5): ``server``
    #: for the server itself, ``path`` for something on the way to it. None: the request may have
    #: been decided.
    refused_by: str | None = None
    #: Under which id the server's access log has the request that failed; where no answer came,
    #: the id that it was sent with. None: no request was sent, or not over HTTP.
    request_id: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after
        self.details = details or {}


class TransportError(SyncError):
    code = "transport_error"
    retryable = True


class SyncTimeoutError(TransportError):
    code = "timeout"


class TlsError(TransportError):
    """The device did not accept the server's certificate. Nothing was sent; trying again cannot
    help."""

    code = "tls_error"
    retryable = False


class ProtocolError(SyncError):
    code = "invalid_message"


class SyncCodecError(ProtocolError):
    code = "codec_error"


class VersionMismatchError(ProtocolError):
    code = "version_mismatch"


class AuthenticationError(SyncError):
    code = "unauthorized"


class PermissionDeniedError(AuthenticationError):
    code = "forbidden"


class ServerError(SyncError):
    code = "server_error"
    retryable = True


class ServerBusyError(ServerError):
    code = "busy"


class ConflictError(SyncError):
    code = "rounds_exhausted"


class SyncCancelledError(SyncError):
    code = "cancelled"


class SyncStateError(SyncError):
    code = "invalid_state"


class HistoryChangedError(SyncError):
    code = "history_changed"


class ResetRequiredError(SyncError):
    code = "reset_required"


class UpgradeRequiredError(SyncError):
    """This program is too old to be given what others wrote (R33). What was pending here was
    pushed, as far as nothing newer stands against it."""

    code = "upgrade_required"


@dataclass(frozen=True)
class ErrorRow:
    """One row of the protocol's error table: ``code`` on the wire, HTTP ``status``, ``error`` is
    the class that the engine raises, ``action`` what the engine does about it."""

    code: str
    status: int
    error: type[SyncError]
    action: str

    @property
    def retryable(self) -> bool:
        return self.error.retryable


#: The codes an ``ErrorResponse`` can carry (docs/protocol.md has the same table; a test compares).
ERROR_TABLE: dict[str, ErrorRow] = {
    row.code: row
    for row in (
        ErrorRow("invalid_message", 400, ProtocolError, "stop; a bug in client or server"),
        ErrorRow("codec_error", 400, SyncCodecError, "stop; a bug in client or server"),
        ErrorRow("version_mismatch", 400, VersionMismatchError, "stop; update the older side"),
        ErrorRow("unauthorized", 401, AuthenticationError, "ask for a fresh token once"),
        ErrorRow("forbidden", 403, PermissionDeniedError, "stop; the token does not grant this"),
        ErrorRow("unknown_database", 404, PermissionDeniedError, "stop; no such database"),
        ErrorRow("not_found", 404, ProtocolError, "stop; no such address"),
        ErrorRow("method_not_allowed", 405, ProtocolError, "stop; a bug in the client"),
        ErrorRow("timeout", 408, SyncTimeoutError, "retry with backoff"),
        ErrorRow("history_changed", 409, HistoryChangedError, "stop; the application chooses"),
        ErrorRow("reset_required", 409, ResetRequiredError, "pull everything again (R28)"),
        ErrorRow("upgrade_required", 409, UpgradeRequiredError, "push, then stop (R33)"),
        ErrorRow("too_large", 413, ProtocolError, "stop; over a limit of the server"),
        ErrorRow("unsupported_media_type", 415, ProtocolError, "stop; a bug in the client"),
        ErrorRow("rate_limited", 429, ServerBusyError, "retry, not before retry_after"),
        ErrorRow("server_error", 500, ServerError, "retry with backoff"),
        ErrorRow("storage_error", 500, ServerError, "retry with backoff"),
        ErrorRow("busy", 503, ServerBusyError, "retry, not before retry_after"),
        ErrorRow("shutting_down", 503, ServerBusyError, "retry, not before retry_after"),
        ErrorRow("storage_full", 507, ServerError, "retry with backoff"),
    )
}


#: Codes with which a server says that it has not looked at what it was sent, or at what is in it:
#: nothing was decided, so a push counts as not sent (R5).
REFUSALS: frozenset[str] = frozenset(
    (
        "invalid_message",
        "codec_error",
        "version_mismatch",
        "forbidden",
        "unknown_database",
        "not_found",
        "method_not_allowed",
        "too_large",
        "unsupported_media_type",
    )
)


#: What an administrator decides, and who a token is for, travels as a code that every device knows,
#: with a ``reason`` among the details; a device that knows the reason has it as its code.
REASONS: dict[tuple[str, str], str] = {
    ("forbidden", "revoked"): "revoked",
    ("forbidden", "subject_changed"): "subject_changed",
    ("forbidden", "too_many_devices"): "too_many_devices",
    ("busy", "too_many_devices"): "too_many_devices",
    ("busy", "frozen"): "frozen",
}
#: Reasons that are about who asks and stay until somebody at the server changes something.
LOCKED_OUT: frozenset[str] = frozenset(("revoked", "too_many_devices"))


def error_from_code(
    code: str,
    message: str,
    *,
    retry_after: float | None = None,
    details: dict[str, Any] | None = None,
) -> SyncError:
    """The exception for a code of the error table; an unknown code is a plain ``ServerError``,
    because a newer server may have learned new ones."""
    row = ERROR_TABLE.get(code)
    kind = row.error if row is not None else ServerError
    given = (details or {}).get("reason")
    reason = REASONS.get((code, given)) if isinstance(given, str) else None
    error = kind(message, code=reason or code, retry_after=retry_after, details=details)
    if code in REFUSALS:
        error.refused_by = "server"
    if reason is not None:
        # An administrator has decided this, and asking again at once changes nothing; but for a
        # token that was exchanged under way, of which the next handshake says whose it is (R36).
        error.retryable = reason == "subject_changed"
    return error

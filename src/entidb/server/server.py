"""The server as an object: a request in, an answer out, on the calling thread.

    handle_http ── route, token, body ──▶ handle ── grant, store ──▶ DatabaseService

This is the server of tests, of the simulator and of programs that have their own way of moving
bytes; it starts no threads. ``app`` serves the same over ASGI with group commit and a reader
thread, on the parts that are here.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from msgspec.structs import replace

from entidb import packing
from entidb.db import Database
from entidb.errors import (
    ConfigError,
    HistoryChangedError,
    PermissionDeniedError,
    ProtocolError,
    SyncError,
)
from entidb.protocol import (
    PATHS,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PullResponse,
    SyncRequest,
    SyncResponse,
    decode_request,
    encode,
)
from entidb.server import wire
from entidb.server.auth import Authenticator, Grants, authenticator_for
from entidb.server.config import ServerConfig, is_db_id
from entidb.server.hooks import Grant
from entidb.server.origins import Origins
from entidb.server.service import DatabaseService
from entidb.server.stores import DataDirectory, OpenDatabase, Store, Stores, in_memory, on_disk
from entidb.server.wire import HttpResponse
from entidb.types import Clock, Entropy, SystemClock, kind_name, system_entropy

logger = logging.getLogger("entidb.server")


class SyncServer:
    """Serves the databases of ``config.data_dir``. Close it, or use it as a context manager.

    ``open_database`` replaces where databases come from. Raises ``ConfigError`` for settings that
    cannot work: a key that cannot be read, a hook that cannot be imported, no directory, or none
    that can be written; ``DatabaseLockedError`` if another server has the directory.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Clock | None = None,
        entropy: Entropy = system_entropy,
        open_database: OpenDatabase | None = None,
    ) -> None:
        if not isinstance(config, ServerConfig):
            raise ConfigError(f"config must be a ServerConfig, not {kind_name(config)}")
        self.config = config
        self.clock: Clock = clock or SystemClock()
        self.limits = config.limits()
        #: Content encodings taken and made; part of the handshake's ``features``.
        self.encodings: Final = packing.ENCODINGS if config.compression else ()
        #: From where requests may come, for whoever serves them over HTTP.
        self.origins: Final = Origins(
            open_to_all=config.insecure_no_auth,
            hosts=config.allowed_hosts,
            cors=config.cors_origins,
        )
        self._authenticate: Authenticator = authenticator_for(config, self.clock)
        options: dict[str, Any] = {
            "clock": self.clock,
            "entropy": entropy,
            "transaction_bytes_max": config.transaction_bytes_max,
        }
        if open_database is None and config.data_dir is None:
            open_database = in_memory(**options)
        self._directory: DataDirectory | None = None
        if open_database is None:
            self._directory = DataDirectory.take(config)
            open_database = on_disk(config, **options)
        try:
            self.stores = Stores(config, clock=self.clock, open_database=open_database)
        except BaseException:
            self._release_directory()
            raise
        self._request_ids = itertools.count(1)
        self._request_id_prefix = entropy(6).hex()

    @classmethod
    def in_memory(
        cls,
        *,
        clock: Clock | None = None,
        entropy: Entropy = system_entropy,
        open_database: OpenDatabase | None = None,
        **settings: Any,
    ) -> Self:
        """A server whose databases are gone when it is closed. Without an ``authenticator`` or a
        key it lets everybody do everything; ``settings`` are those of ``ServerConfig``."""
        keys = ("jwt_secret_file", "jwt_secret_env", "jwt_public_key_file", "authenticator")
        if not any(settings.get(key) is not None for key in keys):
            settings.setdefault("insecure_no_auth", True)
        # What is closed is lost here, so nothing is closed for being idle.
        settings = {"idle_close_s": 0.0, "databases_open_max": 100_000, **settings}
        config = ServerConfig(data_dir=None, **settings)
        return cls(config, clock=clock, entropy=entropy, open_database=open_database)

    # ------------------------------------------------------------ answering

    def handle(self, path: str, token: str | None, request: SyncRequest) -> SyncResponse:
        """The answer to one message; every refusal is an ``ErrorResponse``. What was accepted is
        durable when this returns. Thread-safe."""
        try:
            if PATHS.get(path) is not type(request):
                raise ProtocolError(f"{path!r} takes no {type(request).__name__}")
            return self._answer(request, self.authenticate(token))
        except Exception as error:
            return self.explain(error, self.new_request_id())

    def handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> HttpResponse:
        """HTTP without the wire: what ``entidb.sync.LoopbackServer`` asks for. Header names are
        lower case. Only the protocol's own addresses are served."""
        rid = wire.request_id(headers) or self.new_request_id()
        try:
            response = self._handle_http(method, path, headers, body)
        except Exception as error:
            response = wire.error_response(self.explain(error, rid))
        response.headers["x-request-id"] = rid
        return response

    def _handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> HttpResponse:
        wire.check_route(method, path)
        grants = self.authenticate(wire.bearer_token(headers))
        wire.check_content_type(headers)
        wire.content_length(headers, self.config.body_bytes_max)
        if len(body) > self.config.body_bytes_max:
            raise wire.too_large(self.config.body_bytes_max)
        encoding = self.request_encoding(headers)
        if encoding is not None:
            body = wire.decompress(encoding, body, self.config.body_bytes_max)
        answer = encode(self._answer(self.decode(path, body), grants))
        return wire.message_response(answer, self.response_encoding(headers, len(answer)))

    def _answer(self, request: SyncRequest, grants: Grants) -> SyncResponse:
        grant = self.permit(request, grants)
        try:
            using = self.stores.using(request.db_id, create=self.makes(request, grant))
            with using as store:
                return self._decide(store, request, grant)
        except PermissionDeniedError as error:
            raise self.missing(request, grant, error) from error

    def _decide(self, store: Store, request: SyncRequest, grant: Grant) -> SyncResponse:
        if isinstance(request, HandshakeRequest):
            return self.handshake(store.service, request, grant)
        if isinstance(request, PullRequest):
            return self.pull(store.service, request, grant)
        with store.push_lock:
            (answer,) = store.service.push_many([(request, grant)])
        if isinstance(answer, SyncError):
            raise answer
        return answer

    # ------------------------------------------------------------ the parts, for the app too

    def authenticate(self, token: str | None) -> Grants:
        """Raises ``AuthenticationError``."""
        grants: object = self._authenticate(token)
        if not isinstance(grants, Grants):
            # A program's own authenticator; it is the operator who has to hear of this.
            raise TypeError(f"the authenticator answered {grants!r:.100} and not Grants")
        return grants

    def decode(self, path: str, body: bytes) -> SyncRequest:
        """Raises ``ProtocolError`` and ``SyncCodecError``."""
        return decode_request(path, body, self.limits)

    def permit(self, request: SyncRequest, grants: Grants) -> Grant:
        """What the token allows on the database the message names; that it may send this message
        at all. Raises ``PermissionDeniedError``, before anybody looks whether it exists. A push
        without the right to write is read all the same: it gets its verdicts (R15)."""
        grant = grants.on(request.db_id)
        if isinstance(request, PullRequest) and not grant.read:
            raise PermissionDeniedError("the token does not allow reading this database")
        return grant

    def makes(self, request: SyncRequest, grant: Grant) -> bool:
        """Whether a database that is not there is made for this message: for a device that has
        never met one. Who knows its history means one that should be there."""
        return grant.write and request.history is None

    def missing(
        self, request: SyncRequest, grant: Grant, error: PermissionDeniedError
    ) -> SyncError:
        """What a device is told whose database is not there. To one that could have it made anew
        it is as if that had another history: the application chooses (R29)."""
        anew = grant.write and self.config.create_databases and request.history is not None
        if error.code != "unknown_database" or not anew or not is_db_id(request.db_id):
            return error
        return HistoryChangedError(
            f"this server has no database {request.db_id!r}, of which this device has a copy: "
            "check db_id and the address of the server. If it was lost, "
            'reset(keep="device") makes it anew '
            'from what this device has, and reset(keep="server") makes it anew and empty'
        )

    def handshake(
        self, service: DatabaseService, request: HandshakeRequest, grant: Grant | None = None
    ) -> HandshakeResponse:
        answer = service.handshake(request, grant)
        return replace(answer, features=[*answer.features, *self.encodings])

    def pull(self, service: DatabaseService, request: PullRequest, grant: Grant) -> PullResponse:
        request = self.bounded(request)
        return service.idle_pull(request, grant) or service.pull(request, grant)

    def bounded(self, request: PullRequest) -> PullRequest:
        """The request, asking for no more bytes than this server sends in one page."""
        most = self.config.pull_bytes_max
        return request if request.bytes_max <= most else replace(request, bytes_max=most)

    def request_encoding(self, headers: Mapping[str, str]) -> str | None:
        encoding = wire.content_encoding(headers)
        if encoding is not None and encoding not in self.encodings:
            raise ProtocolError("this server takes no packed bodies", code="unsupported_media_type")
        return encoding

    def response_encoding(self, headers: Mapping[str, str], size: int) -> str | None:
        if not self.encodings or size < self.config.compression_min_bytes:
            return None
        return wire.accepted_encoding(headers)

    def explain(self, error: Exception, rid: str) -> ErrorResponse:
        """What the client is told; what it is not told goes to the log, under the same id."""
        if wire.is_internal(error):
            logger.error("request %s failed", rid, exc_info=error)
        answer = wire.failure(error, rid)
        try:
            encode(answer)
        except Exception as bad:
            # Details that cannot be sent are a hook's or an authenticator's doing.
            logger.error("request %s: its error cannot be sent", rid, exc_info=bad)
            answer = replace(answer, details={}, retry_after=None)
        return answer

    def new_request_id(self) -> str:
        return f"{self._request_id_prefix}-{next(self._request_ids)}"

    # ------------------------------------------------------------ for programs on the server

    def database(self, db_id: str) -> Database:
        """The database itself, made if missing: programs on the server read and write it through
        the same core as any other, and devices pull what they wrote (R11).

        It stays open until the server is closed. Raises ``PermissionDeniedError``
        (unknown_database) if it is not there and ``create_databases`` is off.
        """
        return self.stores.pin(db_id, create=True)

    def housekeep(self) -> None:
        """Close idle databases and purge tombstones where that is due. The app calls it by
        itself; a program that uses this object alone calls it now and then."""
        self.stores.housekeep()

    def close(self) -> None:
        """Finish what is queued and close all databases. Idempotent."""
        try:
            self.stores.close()
        finally:
            self._release_directory()

    def _release_directory(self) -> None:
        if self._directory is not None:
            self._directory.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

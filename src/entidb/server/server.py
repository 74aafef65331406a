"""The server as an object: a request in, an answer out, on the calling thread.

    handle_http ── route, token, body ──▶ Front ── grant, store ──▶ DatabaseService

This is the server of tests and of programs that have their own way of moving bytes; it starts no
threads. ``app`` serves the same over ASGI, with group commit and a reader thread.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from entidb import packing
from entidb.db import Database
from entidb.errors import (
    ConfigError,
    ProtocolError,
)
from entidb.protocol import (
    PATHS,
    PushRequest,
    RoundRequest,
    SyncRequest,
    SyncResponse,
    decode_response,
    encode,
)
from entidb.server import wire
from entidb.server.auth import Grants, JwtAuthenticator, authenticator_for
from entidb.server.chores import do_each
from entidb.server.config import WAYS_TO_KNOW, ServerConfig
from entidb.server.control import Control
from entidb.server.directory import DirectoryPlace, OpenDatabase
from entidb.server.front import FEATURES, Front
from entidb.server.newcomers import newcomers_of
from entidb.server.nodes.records import NodeRecords
from entidb.server.origins import Origins
from entidb.server.place import MemoryPlace, ServerPlace
from entidb.server.quotas import quotas_of
from entidb.server.records import Records, as_records
from entidb.server.registry import Registry
from entidb.server.segments.keeping import ImageKeeper
from entidb.server.segments.serving import SEGMENTS_PATH, SegmentRequest, segment_answer, whole
from entidb.server.stores import Stores
from entidb.server.wire import ServerResponse
from entidb.server.workers.family import Family, family_of
from entidb.types import Clock, Entropy, Uncopied, check_clock, kind_name, system_entropy

logger = logging.getLogger("entidb.server")


class SyncServer(Uncopied):
    """Serves the databases of ``config.data_dir``. Close it, or use it as a context manager.

    ``open_database`` replaces where databases come from. Raises ``ConfigError`` for settings that
    cannot work: a key that cannot be read, a hook that cannot be imported, no directory, or none
    that can be written; ``DatabaseLockedError`` if another server has the directory.
    """

    #: Where it is administered, once it is (``admin``).
    office: object = None
    #: Where it serves, for people; empty where that is not known.
    address: str = ""

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Clock | None = None,
        entropy: Entropy = system_entropy,
        open_database: OpenDatabase | None = None,
        family: Family | None = None,
    ) -> None:
        """``family``: the processes with which it is one server, where ``config`` and the program
        that has started this process do not say so."""
        if not isinstance(config, ServerConfig):
            raise ConfigError(f"config must be a ServerConfig, not {kind_name(config)}")
        self.config = config
        self.clock: Clock = check_clock(clock)
        self.limits = config.limits()
        #: Content encodings taken and made; part of the handshake's ``features``.
        self.encodings: Final = packing.ENCODINGS if config.compression else ()
        #: From where requests may come, for code that serves them over HTTP.
        self.origins: Final = Origins(
            open_to_all=config.insecure_no_auth,
            hosts=config.allowed_hosts,
            cors=config.cors_origins,
        )
        self.authenticator: Final = authenticator_for(config, self.clock)
        options: dict[str, Any] = {
            "clock": self.clock,
            "entropy": entropy,
            "transaction_bytes_max": config.transaction_bytes_max,
        }
        self.family: Final = family or family_of(config)
        self._process = os.getpid()
        self._entropy = entropy
        #: Where its databases are.
        self.place: Final = _place_of(config, self.family, open_database is None, options)
        #: What it keeps beside its databases; None where it is gone with the server.
        self.records: Final = _records_of(config, self.place)
        try:
            self.stores = Stores(
                config, clock=self.clock, open_database=open_database or self.place.open
            )
            #: Files for the first sync of devices (R35).
            beside: dict[str, Any] = {"holds": self.place.holds, "records": self.records}
            self.images: Final = ImageKeeper(config, self.stores, self.clock, entropy, **beside)
            #: Devices that came over a network; the code that serves it notes them.
            kept_days = config.tombstone_retention_days
            self.registry: Final = Registry(self.records, self.clock, retention_days=kept_days)
            control = Control(self.records, self.clock)
            newcomers = newcomers_of(config, self.registry, control, self.clock)
            self.front: Final = Front(
                config,
                authenticator=self.authenticator,
                stores=self.stores,
                control=control,
                quotas=quotas_of(config, self.clock),
                newcomers=newcomers,
                images=self.images,
                features=(*FEATURES, *self.encodings, "segments"),
            )
        except BaseException:
            self._leave()
            raise
        #: Called with each housekeeping; and before the databases are closed.
        self.chores: Final[list[Callable[[], None]]] = [self.registry.flush, self.images.look]
        self.at_end: Final[list[Callable[[], None]]] = [self.images.close]
        self._rest()
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
        key it lets every caller do everything; ``settings`` are those of ``ServerConfig``."""
        if not any(settings.get(way) is not None for way in WAYS_TO_KNOW):
            settings.setdefault("insecure_no_auth", True)
        # What is closed is lost here, so nothing is closed for being idle.
        settings = {"idle_close_s": 0.0, "databases_open_max": 100_000, **settings}
        config = ServerConfig(data_dir=None, **settings)
        return cls(config, clock=clock, entropy=entropy, open_database=open_database)

    def begin(self) -> None:
        """Called by code that is going to serve this: a process that was forked since it was made
        takes its own share of the place, and its own ids. Raises ``DatabaseLockedError``,
        ``StorageError``."""
        self.place.begin()
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._request_id_prefix = self._entropy(6).hex()
        if self.config.jwt_jwks_url is None:  # those are fetched when they are first needed
            try:
                # They may have been read again by the others since.
                self.reload()
            except ConfigError as error:
                logger.error("the keys are those of the start of this server: %s", error)

    # ------------------------------------------------------------ answering

    def handle(self, path: str, token: str | None, request: SyncRequest) -> SyncResponse:
        """The answer to one message; every refusal is an ``ErrorResponse``. What was accepted is
        durable when this returns. Thread-safe."""
        try:
            if PATHS.get(path) is not type(request):
                raise ProtocolError(f"{path!r} takes no {type(request).__name__}")
            answer = self._answer(request, self.front.authenticate(token))
            return decode_response(request, answer)
        except Exception as error:
            return self.front.explain(error, self.new_request_id())

    def handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> ServerResponse:
        """HTTP without the wire: what ``entidb.sync.LoopbackServer`` asks for. Header names are
        lower case, and ``path`` may have a query. Only the protocol's own addresses are served."""
        rid = wire.request_id(headers) or self.new_request_id()
        try:
            if path.startswith(SEGMENTS_PATH):
                response = self._segment(method, path, headers)
            else:
                response = self._handle_http(method, path.partition("?")[0], headers, body)
        except Exception as error:
            response = wire.error_response(self.front.explain(error, rid))
        response.headers["x-request-id"] = rid
        return response

    def _handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> ServerResponse:
        wire.check_route(method, path)
        grants = self.front.authenticate(wire.bearer_token(headers))
        wire.check_content_type(headers)
        wire.content_length(headers, self.config.body_bytes_max)
        if len(body) > self.config.body_bytes_max:
            raise wire.too_large(self.config.body_bytes_max)
        encoding = self.request_encoding(headers)
        if encoding is not None:
            body = wire.decompress(encoding, body, self.config.body_bytes_max)
        answer = self._answer(self.front.decode(path, body), grants)
        return wire.message_response(answer, self.response_encoding(headers, len(answer)))

    def _segment(self, method: str, path: str, headers: Mapping[str, str]) -> ServerResponse:
        name, _, query = path.partition("?")
        request = SegmentRequest(method, name, query)
        grants = self.front.authenticate(wire.bearer_token(headers))
        self.front.permit_segment(request, grants)
        with self.stores.using(request.db_id, create=False) as store:
            answer = segment_answer(self.images, store, request, grants, headers)
        return whole(answer, only_head=request.only_head)

    def _answer(self, request: SyncRequest, grants: Grants) -> bytes:
        front = self.front
        if front.control.far:
            front.control.freshen()
        grant = front.permit(request, grants)
        with front.using(request, grant) as store:
            if isinstance(request, PushRequest):
                return encode(front.push_now(store, request, grant))
            if isinstance(request, RoundRequest):
                return front.round_now(store, request, grant)
            return front.read(store, request, grant)

    def reload(self) -> str:
        """Read the keys of tokens again, and say in a few words which there are; empty where
        they come from no file and no address. Raises ``ConfigError``; those in force stay then."""
        known = self.authenticator
        return known.reload().words() if isinstance(known, JwtAuthenticator) else ""

    # ------------------------------------------------------------ HTTP, for the app too

    def request_encoding(self, headers: Mapping[str, str]) -> str | None:
        encoding = wire.content_encoding(headers)
        if encoding is not None and encoding not in self.encodings:
            raise ProtocolError("this server takes no packed bodies", code="unsupported_media_type")
        return encoding

    def response_encoding(self, headers: Mapping[str, str], size: int) -> str | None:
        if not self.encodings or size < self.config.compression_min_bytes:
            return None
        return wire.accepted_encoding(headers)

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
        do_each([self.stores.housekeep, *self.chores])

    def close(self) -> None:
        """Finish what is queued and close all databases. Idempotent."""
        try:
            for end in self.at_end:
                end()
            self.stores.close()
            self.registry.flush()
        finally:
            self._leave()

    def _rest(self) -> None:
        """Keep nothing that a process which is forked now could not use."""
        if isinstance(self.records, NodeRecords):
            self.records.rest()

    def _leave(self) -> None:
        if isinstance(self.records, NodeRecords):
            self.records.close()
        self.place.close()

    @property
    def journal(self) -> Path | NodeRecords | None:
        """Where the audit log is."""
        return self.records if isinstance(self.records, NodeRecords) else self.place.root

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _records_of(config: ServerConfig, place: ServerPlace) -> Records | None:
    return NodeRecords(config.address) if config.address is not None else as_records(place.root)


def _place_of(
    config: ServerConfig, family: Family | None, opens: bool, options: dict[str, Any]
) -> ServerPlace:
    """``opens``: databases are opened there, and not where the program says."""
    if config.address is not None:
        from entidb.server.postgres import PostgresPlace  # most servers have a disk

        return PostgresPlace(config, **options)
    if config.data_dir is not None:
        return DirectoryPlace(config, family, locked=opens, **options)
    return MemoryPlace(**options)

"""The front of a server: from a token and a message to the database that answers, and the answer.

    authenticate ─▶ decode ─▶ permit ─▶ use ─▶ read or push ─▶ explain, where one of them refused

Every server goes this way: the ASGI app, which takes the steps on threads of its own, the server as
an object, and the server of the simulator. A rule about who may ask for what belongs here, so that
it holds for all three. Nothing here knows of HTTP, and nothing starts a thread.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from msgspec.structs import replace

from entidb.errors import (
    HistoryChangedError,
    PermissionDeniedError,
    ProtocolError,
    StorageError,
    StorageFullError,
    SyncError,
)
from entidb.protocol import (
    SUBJECT_CHARS_MAX,
    DigestRequest,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    Manifest,
    PullRequest,
    PushRequest,
    PushResponse,
    RoundRequest,
    SnapshotRequest,
    SyncRequest,
    decode_request,
    encode,
    encode_round,
)
from entidb.server import wire
from entidb.server.auth import Authenticator, Grants
from entidb.server.away import is_away
from entidb.server.config import ServerConfig, is_db_id
from entidb.server.control import Control, DatabaseRequest
from entidb.server.digesting import digested
from entidb.server.group_commit import Done
from entidb.server.hooks import Grant
from entidb.server.newcomers import Newcomers
from entidb.server.pages import View, unseen
from entidb.server.quotas import Quotas
from entidb.server.service import BehindError
from entidb.server.stores import Holding, Store, Stores
from entidb.types import SystemClock

logger = logging.getLogger("entidb.server")
#: What only those send who may read.
_READING: Final = (PullRequest, RoundRequest, DigestRequest, SnapshotRequest)
#: What stores nothing, but for a history that begins (R29).
Reading = HandshakeRequest | PullRequest | DigestRequest | SnapshotRequest
#: What the front can do beside what each database can.
FEATURES: Final = ("sync",)
#: Offered with databases that there may be images of (R35).
_IMAGES: Final = "segments"


#: Characters of a subject that stay in front of the digest that stands for it.
_STAY: Final = 100


def named(subject: str) -> str | None:
    """How messages name ``subject``: as it is, or, if it is too long or holds what cannot be
    printed, by its beginning and a digest. Named not at all, it would pass for whoever the device
    had before (R36). None where a server has no name for anybody."""
    if not subject or (len(subject) <= SUBJECT_CHARS_MAX and subject.isprintable()):
        return subject or None
    digest = hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{''.join(filter(str.isprintable, subject[:_STAY]))}~{digest}"


class Imaging(Protocol):
    """Whatever has images of databases (R35)."""

    def manifest(self, store: Store, request: SnapshotRequest, grant: Grant) -> Manifest: ...

    def offers(self, store: Store) -> bool: ...


class Front:
    """The way of one request through a server, step by step. ``features`` are announced by a
    handshake beside those of the database. All methods may be called from any thread."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        authenticator: Authenticator,
        stores: Stores,
        control: Control | None = None,
        quotas: Quotas | None = None,
        newcomers: Newcomers | None = None,
        images: Imaging | None = None,
        features: Sequence[str] = FEATURES,
    ) -> None:
        self.stores: Final = stores
        self.limits: Final = config.limits()
        #: What an administrator has decided; without one, nothing.
        self.control: Final = control or Control(None, SystemClock())
        # Looked at once more where pushes are decided: one may have waited for its turn.
        stores.is_frozen = self.control.is_frozen
        self._quotas = quotas
        self._newcomers = newcomers
        self._images = images
        self._authenticator = authenticator
        self._features = list(features)
        self._page_bytes_max = config.pull_bytes_max
        self._creates = config.create_databases
        #: Whether tokens say who somebody is (R36).
        self._knows_people = not config.insecure_no_auth

    def announce(self, feature: str) -> None:
        """Name ``feature`` in handshakes from now on: for code that serves this over a network."""
        if feature not in self._features:
            self._features.append(feature)

    # ------------------------------------------------------------ who asks for what

    def authenticate(self, token: str | None) -> Grants:
        """Raises ``AuthenticationError``."""
        try:
            grants: object = self._authenticator(token)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit would end the server
            raise RuntimeError(f"the authenticator raised {error!r:.100}") from error
        if not isinstance(grants, Grants):
            # A program's own authenticator; its operator has to learn of this.
            raise TypeError(f"the authenticator answered {grants!r:.100} and not Grants")
        return grants

    def decode(self, path: str, body: bytes) -> SyncRequest:
        """Raises ``ProtocolError`` and ``SyncCodecError``."""
        return decode_request(path, body, self.limits)

    def permit(self, request: SyncRequest, grants: Grants) -> Grant:
        """What the token allows on the database the message names; that it may send this message
        at all. Raises ``PermissionDeniedError``, before anybody looks whether it exists. A push
        without the right to write is read all the same: it gets its verdicts (R15). Also who is
        revoked is refused (R32), and, with ``ServerBusyError``, a push to a frozen database and
        a request beyond a quota."""
        grant = grants.on(request.db_id)
        self.control.admit(grants, request)
        if isinstance(request, PushRequest | RoundRequest):
            self._check_subject(grant, request)
        if self._quotas is not None:
            self._quotas.take(grants.subject, request.db_id)
        if isinstance(request, _READING) and not grant.read:
            raise PermissionDeniedError("the token does not allow reading this database")
        return grant

    def permit_segment(self, request: DatabaseRequest, grants: Grants) -> None:
        """As ``permit``, for a segment of an image; its collection is looked at later."""
        grant = grants.on(request.db_id)
        self.control.admit(grants, request)
        if self._quotas is not None:
            self._quotas.take(grants.subject, request.db_id)
        if not grant.read:
            raise PermissionDeniedError("the token does not allow reading this database")

    def _check_subject(self, grant: Grant, request: PushRequest | RoundRequest) -> None:
        subject = (request.push if isinstance(request, RoundRequest) else request).subject
        if self._knows_people and subject is not None and subject != self.subject(grant):
            raise PermissionDeniedError(
                "this was committed by somebody else than this token is for, and nothing of it was "
                "decided: the device shakes hands again, and sends what is this subject's",
                details={"reason": "subject_changed"},
            )

    def subject(self, grant: Grant) -> str | None:
        """Who the token is for, as a handshake says it."""
        return named(grant.subject) if self._knows_people else None

    # ------------------------------------------------------------ the database

    def try_use(self, request: SyncRequest) -> Store | None:
        """As ``use``, if the database is open and well and knows the device, without waiting for
        anything."""
        if self._newcomers is not None and not self._newcomers.knows(request):
            return None
        return self.stores.try_use(request.db_id)

    def use(self, request: SyncRequest, grant: Grant) -> Store:
        """The database of ``request``, opened if need be, and made where ``grant`` allows that.
        Give it back to ``stores.release``, or to ``push``. Raises as ``Stores.use`` does,
        ``HistoryChangedError`` where a database that the device has met is gone, and as
        ``Newcomers.admit`` for a device that it has not met."""
        # A database that is not there is made for a device that has never met one. Who knows its
        # history means one that should be there.
        meets = request.history is None and not isinstance(request, SnapshotRequest)
        makes = grant.write and meets
        try:
            store = self.stores.use(request.db_id, create=makes)
        except PermissionDeniedError as error:
            raise self._missing(request, grant, error) from error
        try:
            if self._newcomers is not None:
                self._newcomers.admit(request, grant)
        except BaseException:
            self.stores.release(store)
            raise
        return store

    def using(self, request: SyncRequest, grant: Grant) -> AbstractContextManager[Store]:
        """``use`` around a block; a storage error in it is reported."""
        return Holding(self.stores, self.use(request, grant))

    def _missing(
        self, request: SyncRequest, grant: Grant, error: PermissionDeniedError
    ) -> SyncError:
        """The answer for a device whose database is not there. To one that could have it made anew
        it is as if that had another history: the application chooses (R29)."""
        anew = grant.write and self._creates and request.history is not None
        if error.code != "unknown_database" or not anew or not is_db_id(request.db_id):
            return error
        return HistoryChangedError(
            f"this server has no database {request.db_id!r}, of which this device has a copy: "
            "check db_id and the address of the server. If it was lost, "
            'reset(keep="device") makes it anew '
            'from what this device has, and reset(keep="server") makes it anew and empty'
        )

    # ------------------------------------------------------------ the answer

    def read(self, store: Store, request: Reading, grant: Grant) -> bytes:
        """The encoded answer to what stores nothing, but for a history that begins (R29)."""
        if isinstance(request, DigestRequest):
            # It may have waited for its turn since it was permitted.
            self.control.admit(grant, request)
            return encode(digested(store.service, request, grant))
        if isinstance(request, SnapshotRequest):
            self.control.admit(grant, request)
            if self._images is None:
                raise ProtocolError("this server makes no images", code="not_found")
            return encode(self._images.manifest(store, request, grant))
        if isinstance(request, HandshakeRequest):
            return encode(self.handshake(store, request, grant))
        idle = store.service.idle_pull(request, grant)
        return self.page(store, request, grant) if idle is None else encode(idle)

    def handshake(self, store: Store, request: HandshakeRequest, grant: Grant) -> HandshakeResponse:
        answer = store.service.handshake(request, grant)
        features = [*answer.features, *self._features]
        if _IMAGES in features and (self._images is None or not self._images.offers(store)):
            features.remove(_IMAGES)
        return replace(
            answer,
            features=features,
            subject=self.subject(grant),
        )

    def idle(self, store: Store, request: PullRequest, grant: Grant) -> bytes | None:
        """The answer to a pull with nothing new, without touching the disk; else None."""
        answer = store.service.idle_pull(request, grant)
        return None if answer is None else encode(answer)

    def page(
        self, store: Store, request: PullRequest, grant: Grant, view: View | None = None
    ) -> bytes:
        """An encoded page, of the state that ``view`` shows, or of the newest one."""
        # It may have waited for its turn since it was permitted.
        self.control.admit(grant, request)
        return store.service.pull_bytes(self.bounded(request), grant, view)

    def bounded(self, request: PullRequest) -> PullRequest:
        """The request, asking for no more bytes than this server sends in one page."""
        most = self._page_bytes_max
        return request if request.bytes_max <= most else replace(request, bytes_max=most)

    def push(
        self, store: Store, request: PushRequest | RoundRequest, grant: Grant, done: Done
    ) -> None:
        """Have a push decided together with others (R16). Takes the caller's use of ``store``
        over: it is given back before ``done`` gets the answer, and also where this raises,
        which is ``ServerBusyError``. A round is answered with ``BehindError`` where a pull comes
        first."""

        def decided(answer: PushResponse | SyncError) -> None:
            self.stores.release(store)
            done(answer)

        try:
            store.committer.submit(request, grant, decided)
        except BaseException:
            self.stores.release(store)
            raise

    def push_now(
        self, store: Store, request: PushRequest | RoundRequest, grant: Grant
    ) -> PushResponse:
        """Decide a push on this thread, by itself. Raises ``BehindError`` as ``push`` answers."""
        with store.push_lock:
            (answer,) = store.service.push_many([(request, grant)])
        if isinstance(answer, SyncError):
            raise answer
        return answer

    def round_now(self, store: Store, request: RoundRequest, grant: Grant) -> bytes:
        """The encoded answer to a round, decided on this thread."""
        answer: PushResponse | None
        try:
            answer = self.push_now(store, request, grant)
        except BehindError:
            answer = None
        return encode_round(self.read(store, unseen(request, answer), grant), answer)

    def explain(self, error: Exception, rid: str) -> ErrorResponse:
        """The answer to the client; what it leaves out goes to the log, under the same id."""
        if is_away(error) or isinstance(error, StorageFullError):
            # Where the error came from says nothing more, and in an outage there are many; the
            # same with a disk that is full.
            logger.warning("request %s: %s", rid, error)
        elif isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
            # As where a file system became read-only, or its rights are wrong: the message says
            # all of it, and it is so for each request.
            logger.error("request %s: %s", rid, error)
        elif wire.is_internal(error):
            logger.error("request %s failed", rid, exc_info=error)
        answer = wire.failure(error, rid)
        try:
            encode(answer)
        except Exception as bad:
            # Details that cannot be sent are a hook's or an authenticator's doing.
            logger.error("request %s: its error cannot be sent", rid, exc_info=bad)
            answer = replace(answer, details={}, retry_after=None)
        return answer


__all__ = ["Front"]

"""The way of a simulated device to the server: a ``Courier`` whose answers come later.

It does what ``HttpTransport`` does with a network that takes its time: one request at a time, the
next ones ahead of time, a fresh token where one has expired, and a timeout where nothing comes.
Every other decision is the real engine's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from entidb import protocol
from entidb.errors import (
    AuthenticationError,
    PermissionDeniedError,
    ProtocolError,
    SyncError,
    SyncTimeoutError,
    TransportError,
    error_from_code,
)
from entidb.protocol import ErrorResponse, PushRequest, SyncRequest, SyncResponse, push_in
from entidb.sync.drive import Pause
from entidb.sync.segment_files import Fetch
from entidb.testing.gateway import Gateway
from entidb.testing.hands import Hands
from entidb.testing.lines import NewsWay
from entidb.testing.world import World

TIMEOUT_MS: Final = 1500
#: Of a segment, in one answer.
PIECE_BYTES: Final = 150


class Traveller(Protocol):
    """The device whose way it is."""

    name: str
    token: str
    rng: random.Random
    gateway: Gateway
    hands: Hands

    @property
    def device_id(self) -> bytes: ...

    def renew_token(self) -> None: ...

    def leaves(self, request: PushRequest) -> None:
        """A push is on its way."""
        ...

    def unanswered(self, request: PushRequest) -> None:
        """Whether the server has got a push is unknown."""
        ...

    def takes(self, request: SyncRequest, outcome: SyncResponse | SyncError) -> None:
        """What came of a request is handed to the cycle."""
        ...

    def waits(self) -> None:
        """An attempt has failed, and another one will come."""
        ...

    def go_on(self, outcome: SyncResponse | SyncError | None) -> None: ...


class Server(Protocol):
    """Where the way leads to."""

    @property
    def channels(self) -> NewsWay: ...

    def receive(
        self, path: str, token: str, body: bytes, reply: Callable[[bool, bytes], None]
    ) -> None: ...

    def receive_fetch(
        self,
        sha: bytes,
        begin: int,
        end: int,
        device_id: bytes,
        token: str,
        reply: Callable[[bool, bytes], None],
    ) -> None: ...

    def any_token(self, rng: random.Random, subject: str) -> str:
        """Somebody's, for one of its databases."""
        ...


class SentRequest:
    """One request on its way. ``outcome`` is the answer or the error, once there is one."""

    def __init__(self, request: SyncRequest) -> None:
        self.request = request
        self.outcome: SyncResponse | SyncError | None = None
        self.renewed = False
        self.is_out = False


class Piece:
    """A part of a segment on its way."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.files = fetch.files
        self.segment = fetch.segments[0]
        self.sha = self.segment.sha256
        self.at = self.files.size(self.segment)
        self.renewed = False

    @property
    def end(self) -> int:
        return min(self.at + PIECE_BYTES, self.segment.size)

    def begins(self) -> bool:
        """Whether there is anything to ask for; what is too long is begun again."""
        if self.at > self.segment.size:
            self.files.drop(self.segment)
            self.at = 0
        return self.at < self.segment.size


class Way:
    """See the module. One for each process of the device."""

    def __init__(self, world: World, host: Server, device: Traveller) -> None:
        self.connected = False
        self._world = world
        self._host = host
        self._device = device
        self._waiting: SentRequest | None = None
        #: Requests known ahead of time, in order; one is sent when the one before it is answered.
        self._ahead: list[SentRequest] = []
        self._hints_ignored = False
        self._pause: Pause | None = None
        self._piece: Piece | None = None

    def end(self) -> None:
        """The process is gone: what comes now reaches no process."""
        for sent in (self._waiting, *self._ahead):
            if sent is not None:
                self._lost(sent)
        self.close()

    # ------------------------------------------------------------ what a courier does

    def begin(self) -> bool:
        self.close()
        return self.connected

    def close(self) -> None:
        self._waiting = self._pause = self._piece = None
        self._ahead = []

    def interrupt(self) -> None:
        return None  # who cancels is asked between two steps, where nothing is under way

    def forget_ahead(self) -> None:
        self._ahead = []

    def pause(self, pause: Pause) -> bool:
        self._device.waits()
        self._pause = pause
        delay_ms = 1 + int(pause.seconds * 1000)
        self._world.trace("waits", self._device.name, delay_ms)

        def over() -> None:
            if self._pause is pause:
                self._pause = None
                self._device.go_on(None)

        self._world.after(delay_ms, over)
        return False

    def send(self, request: SyncRequest) -> SyncResponse | None:
        """Its answer if that is known already, because it was sent ahead."""
        self._hints_ignored = False
        if self._ahead and self._ahead[0].is_out and self._ahead[0].request == request:
            ahead = self._ahead.pop(0)
            if ahead.outcome is not None:
                outcome = self._taken(ahead)
                if isinstance(outcome, SyncError):
                    raise outcome
                return outcome
            self._waiting = ahead
            return None
        self._ahead = []
        self._waiting = SentRequest(request)
        self._send(self._waiting)
        return None

    def send_ahead(self, request: SyncRequest) -> None:
        world = self._world
        willing = self._device.rng.random() * 1000 < world.knobs.ahead and not world.quiet
        if willing and not self._hints_ignored:
            world.fired("ahead")
            self._ahead.append(SentRequest(request))
            if len(self._ahead) == 1 or self._ahead[-2].outcome is not None:
                self._send(self._ahead[-1])
        else:
            # What comes after a request that was not sent ahead must not be either.
            self._hints_ignored = True

    # ------------------------------------------------------------ segments

    @property
    def fetches(self) -> bool:
        return True

    def fetch(self, fetch: Fetch) -> bool:
        """In pieces, one after the other, as over HTTP."""
        self._piece = piece = Piece(fetch)
        if piece.begins():
            self._ask_piece(piece)
            return False
        self._piece = None
        return True

    def _ask_piece(self, piece: Piece) -> None:
        world, device = self._world, self._device
        token, name = device.token, piece.sha
        for delay, data in world.network.deliveries(device.name, "up", name, world.now):
            whole = len(data) == len(name)
            world.after(delay, partial(self._piece_arrives, piece, token, whole))
        world.after(TIMEOUT_MS, lambda: self._piece_over(piece, SyncTimeoutError("no answer")))

    def _piece_arrives(self, piece: Piece, token: str, whole: bool) -> None:
        if not whole:
            self._piece_over(piece, TransportError("the connection was cut off"))
            return
        sha, begin, end, device_id = piece.sha, piece.at, piece.end, self._device.device_id
        self._host.receive_fetch(
            sha, begin, end, device_id, token, lambda ok, body: self._piece_reply(piece, ok, body)
        )

    def _piece_reply(self, piece: Piece, ok: bool, body: bytes) -> None:
        world = self._world
        for delay, data in world.network.deliveries(self._device.name, "down", body, world.now):
            whole = len(data) == len(body)
            world.after(delay, partial(self._piece_comes, piece, ok, data, whole))

    def _piece_comes(self, piece: Piece, ok: bool, data: bytes, whole: bool) -> None:
        if self._piece is not piece:
            return
        if not whole:
            self._piece_over(piece, TransportError("the answer was cut off"))
        elif ok and data:
            piece.files.append(piece.segment, piece.at, data)
            self._piece = None
            if self.fetch(piece.fetch):
                self._device.go_on(None)
        elif ok:
            self._piece_over(piece, ProtocolError("the file is shorter than it should be"))
        else:
            said = protocol.decode(ErrorResponse, data)
            error = error_from_code(said.code, said.message, retry_after=said.retry_after)
            expired = isinstance(error, AuthenticationError)
            if expired and not isinstance(error, PermissionDeniedError) and not piece.renewed:
                piece.renewed = True
                self._world.fired("expired_token")
                self._device.renew_token()
                self._ask_piece(piece)
                return
            self._piece_over(piece, error)

    def _piece_over(self, piece: Piece, error: SyncError) -> None:
        if self._piece is piece:
            self._piece = None
            self.connected = self.connected and not isinstance(error, TransportError)
            self._world.trace("no segment", self._device.name, error.code)
            self._device.go_on(error)

    # ------------------------------------------------------------ there

    def _send(self, sent: SentRequest) -> None:
        sent.is_out = True
        world, device, request = self._world, self._device, sent.request
        pushed = push_in(request)
        if pushed is not None:
            device.leaves(pushed)
        path, body = protocol.path_of(request), protocol.encode(request)
        token = device.token
        if not world.quiet and device.rng.random() * 1000 < world.knobs.wrong_token:
            world.fired("wrong_token")
            token = self._host.any_token(device.rng, device.hands.who)
            if device.rng.random() < 0.3:
                token = token[:-3]
        for delay, data in world.network.deliveries(device.name, "up", body, world.now):
            whole = len(data) == len(body)
            world.after(delay, partial(self._arrive, sent, path, token, data, whole))
        world.after(TIMEOUT_MS, lambda: self._timeout(sent))

    def _arrive(self, sent: SentRequest, path: str, token: str, data: bytes, whole: bool) -> None:
        refusal = self._device.gateway.refusal(path, data)
        if refusal is not None:
            self._world.after(1, lambda: self._heard(sent, refusal))
            return
        if not whole:
            # Whatever the server makes of half a body, its connection is closed by then.
            self._host.receive(path, token, data, lambda ok, body: None)
            cut_off = TransportError("the connection was cut off")
            self._world.after(1, lambda: self._heard(sent, cut_off))
            return
        self._host.receive(path, token, data, lambda ok, body: self._reply(sent, ok, body))

    # ------------------------------------------------------------ and back

    def _reply(self, sent: SentRequest, ok: bool, body: bytes) -> None:
        world = self._world
        for delay, data in world.network.deliveries(self._device.name, "down", body, world.now):
            world.after(delay, partial(self._received, sent, ok, data))

    def _received(self, sent: SentRequest, ok: bool, data: bytes) -> None:
        if not self._awaits(sent):
            return
        outcome: SyncResponse | SyncError
        try:
            if ok:
                outcome = protocol.decode_response(sent.request, data)
            else:
                said = protocol.decode(ErrorResponse, data)
                outcome = error_from_code(
                    said.code, said.message, retry_after=said.retry_after, details=said.details
                )
        except SyncError as error:
            outcome = error
        if (
            isinstance(outcome, AuthenticationError)
            and not isinstance(outcome, PermissionDeniedError)
            and not sent.renewed
        ):
            # 401: one fresh token, and the same request again.
            sent.renewed = True
            self._world.fired("expired_token")
            self._device.renew_token()
            self._send(sent)
            return
        self._settle(sent, outcome)

    def _awaits(self, sent: SentRequest) -> bool:
        return sent.outcome is None and (sent is self._waiting or sent in self._ahead)

    def _heard(self, sent: SentRequest, refusal: SyncError) -> None:
        """Something else than the server has answered."""
        if self._awaits(sent):
            self._settle(sent, refusal)

    def _timeout(self, sent: SentRequest) -> None:
        if sent.outcome is None:
            if sent is self._waiting:
                self._lost(sent)
            self._settle(sent, SyncTimeoutError("no answer in time"))

    def _lost(self, sent: SentRequest) -> None:
        pushed = push_in(sent.request)
        if sent.is_out and sent.outcome is None and pushed is not None:
            self._device.unanswered(pushed)

    def _settle(self, sent: SentRequest, outcome: SyncResponse | SyncError) -> None:
        sent.outcome = outcome
        if not isinstance(outcome, SyncError):
            self._send_next()
        if sent is self._waiting:
            self._waiting = None
            self._device.go_on(self._taken(sent))

    def _send_next(self) -> None:
        """What was waiting for this answer leaves by itself."""
        for sent in self._ahead:
            if not sent.is_out:
                self._send(sent)
                return
            if sent.outcome is None:
                return

    def _taken(self, sent: SentRequest) -> SyncResponse | SyncError:
        """The outcome, as it is handed to the cycle."""
        outcome = sent.outcome
        assert outcome is not None
        self.connected = not isinstance(outcome, TransportError) and (
            self.connected or not isinstance(outcome, SyncError)
        )
        self._world.trace("answer", self._device.name, type(outcome).__name__)
        self._device.takes(sent.request, outcome)
        return outcome


__all__ = ["Way"]

"""What the server's tests share: messages, a clock to turn, and a client that only knows HTTP."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from entidb import cbor
from entidb.protocol import (
    CONTENT_TYPE,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PushOperation,
    PushRequest,
    PushTransaction,
    SyncRequest,
    SyncResponse,
    decode,
    encode,
    path_of,
)

DEVICE = b"d" * 16
SECRET = b"correct horse battery staple, twice over"
#: A moment in 2026; its milliseconds.
NOW_MS = 1_780_000_000_000

R = TypeVar("R", bound=SyncResponse)


class ManualClock:
    """Stands still until it is told otherwise."""

    def __init__(self, now_ms: int = NOW_MS) -> None:
        self.ms = now_ms
        #: How far what it says of the time of day is from what it is.
        self.wrong_ms = 0

    def now_ms(self) -> int:
        return self.ms + self.wrong_ms

    def monotonic(self) -> float:
        return self.ms / 1000

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(0.01)

    def advance(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


def handshake(db_id: str = "shop") -> HandshakeRequest:
    return HandshakeRequest(major=1, minor=0, db_id=db_id, device_id=DEVICE, history=None, cursor=0)


def pull(history: bytes, *, db_id: str = "shop", cursor: int = 0, **fields: Any) -> PullRequest:
    defaults = {"limit": 10_000, "bytes_max": 1 << 30}
    return PullRequest(
        db_id=db_id, device_id=DEVICE, history=history, cursor=cursor, **{**defaults, **fields}
    )


def number_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def push(
    history: bytes,
    *numbers: int,
    db_id: str = "shop",
    value: object = "a value",
    base: int = 0,
    collection: str = "notes",
) -> PushRequest:
    """One transaction for each number, which is its id and that of the entity it writes."""
    payload = None if value is None else cbor.encode(value)
    transactions = [
        PushTransaction(
            number_id(number),
            1,
            [PushOperation(0, number_id(number), base, payload)],
        )
        for number in numbers
    ]
    return PushRequest(
        db_id=db_id,
        device_id=DEVICE,
        history=history,
        cursor=0,
        collections=[collection],
        transactions=transactions,
    )


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def message(self, kind: type[R]) -> R:
        assert self.status == 200, self.body
        return decode(kind, self.body)

    @property
    def error(self) -> ErrorResponse:
        assert self.status != 200
        return decode(ErrorResponse, self.body)

    @property
    def code(self) -> str:
        return self.error.code


class Client:
    """One kept connection to ``url``."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        self._root = parts.path
        self._token = token

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self._token is not None:
            named.setdefault("authorization", f"Bearer {self._token}")
        self.connection.request(method, self._root + path, body, named)
        response = self.connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())

    def post(self, path: str, body: bytes, **headers: str) -> Answer:
        return self.request("POST", path, body, **{"content_type": CONTENT_TYPE, **headers})

    def send(self, request: SyncRequest, **headers: str) -> Answer:
        return self.post(path_of(request), encode(request), **headers)

    def history(self, db_id: str = "shop") -> bytes:
        return self.send(handshake(db_id)).message(HandshakeResponse).history

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

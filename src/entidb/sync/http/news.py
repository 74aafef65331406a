"""News over HTTP: a stream of events (WHATWG HTML, section 9.2), and a request that waits.

Both go over a client of their own, so that what ends one of them touches no request of a cycle.
``sync.live`` decides when to use which, and what to do when they end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import quote, urlencode

from entidb import cbor
from entidb.errors import CborDecodeError, ProtocolError, SyncCodecError
from entidb.protocol import CONTENT_TYPE, DATABASE_HEADER, ErrorResponse, PullRequest, decode
from entidb.sync.carried import question
from entidb.sync.http.answers import is_cbor, spoken_error, status_error
from entidb.sync.http.streaming import NotBegunError, Streaming, StreamingClient
from entidb.sync.live import Event, HeldUpError
from entidb.sync.transport import HttpResponse
from entidb.types import SEQUENCE_MAX, Clock

LIVE_PATH: Final = "/v1/live"
_EVENTS_TYPE: Final = "text/event-stream"
#: Seconds for a request that the server answers within 25.
_POLL_TIMEOUT_S: Final = 40.0
#: Bytes of one line of a stream, and of an answer that reports an error.
_LINE_BYTES_MAX: Final = 64 * 1024
_RETRY: Final = re.compile("[0-9]{1,9}")


class HttpNews:
    """The ``NewsSource`` of an ``HttpTransport``. ``token`` gives one for a request, and is
    called with True where a fresh one is needed; None where no token is sent."""

    def __init__(
        self,
        client: StreamingClient,
        base: str,
        *,
        db_id: str,
        device_id: bytes,
        user_agent: str,
        request_id_prefix: str,
        token: Callable[[bool], str] | None,
        clock: Clock,
    ) -> None:
        self._client = client
        self._url = base + LIVE_PATH
        self._query = {"db_id": db_id, "device_id": device_id.hex()}
        self._database = quote(db_id, safe="")
        self._user_agent = user_agent
        self._request_id_prefix = request_id_prefix
        self._request_ids = itertools.count(1)
        self._token = token
        self._clock = clock

    def open(
        self,
        *,
        first_event_s: float,
        silence_s: float,
        refresh: bool,
        asks: PullRequest | None = None,
    ) -> HttpEvents:
        """See ``NewsSource``."""
        pages = None if asks is None else question(asks)
        url = self._address() if pages is None else self._address(pages=pages)
        headers = self._headers(_EVENTS_TYPE, refresh=refresh)
        try:
            streaming = self._client.stream(
                url, headers, first_s=first_event_s, silence_s=silence_s
            )
        except NotBegunError as error:
            raise HeldUpError from error
        try:
            kind = streaming.response.headers.get("content-type", "").partition(";")[0].strip()
            if streaming.response.status != 200 or kind != _EVENTS_TYPE:
                raise self._error(url, streaming.whole(_LINE_BYTES_MAX))
        except BaseException:
            streaming.close()
            raise
        return HttpEvents(streaming)

    def poll(self, known: int | None, *, refresh: bool) -> int:
        """See ``NewsSource``."""
        url = self._address() if known is None else self._address(cursor=str(known))
        headers = self._headers(CONTENT_TYPE, refresh=refresh)
        response = self._client.request("GET", url, headers, b"", _POLL_TIMEOUT_S)
        if response.status != 200 or not is_cbor(response):
            raise self._error(url, response)
        try:
            answer = cbor.decode(response.body)
        except CborDecodeError as error:
            raise SyncCodecError(f"{url}: the answer is not CBOR: {error}") from error
        head = answer.get("head") if isinstance(answer, dict) else None
        if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head <= SEQUENCE_MAX:
            raise ProtocolError(f"{url}: the answer names no commit")
        return head

    def interrupt(self) -> None:
        """See ``NewsSource``."""
        self._client.interrupt()

    def close(self) -> None:
        self._client.close()

    def _address(self, **more: str) -> str:
        # Each one is another: caches let equal requests wait for the answer to the first, which
        # for a stream never comes.
        request = f"{self._request_id_prefix}-{next(self._request_ids)}"
        return f"{self._url}?{urlencode({**self._query, **more, 'request': request})}"

    def _headers(self, accept: str, *, refresh: bool) -> dict[str, str]:
        headers = {
            "Accept": accept,
            "Accept-Encoding": "identity",
            "Cache-Control": "no-store",
            "User-Agent": self._user_agent,
            DATABASE_HEADER: self._database,
        }
        if self._token is not None:
            headers["Authorization"] = "Bearer " + self._token(refresh)
        return headers

    def _error(self, url: str, response: HttpResponse) -> Exception:
        if is_cbor(response) and response.status != 200:
            try:
                return spoken_error(response, decode(ErrorResponse, response.body), self._clock)
            except ProtocolError:
                return status_error(url, response, b"", self._clock)
        return status_error(url, response, response.body, self._clock)


class HttpEvents:
    """The ``Events`` of one stream."""

    def __init__(self, streaming: Streaming) -> None:
        self._streaming = streaming
        self._lines = self._read()
        self._heard = False

    def next(self) -> Event | None:
        """See ``Events``. A comment is a sign of life."""
        name, retry_ms = "message", None
        data: list[str] = []
        try:
            for line in self._lines:
                if not line:
                    if data:
                        return self._event(name, "\n".join(data), retry_ms)
                    name = "message"
                    continue
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if not field:
                    return None
                if field == "event":
                    name = value
                elif field == "data":
                    data.append(value)
                elif field == "retry" and _RETRY.fullmatch(value):
                    retry_ms = int(value)
        except NotBegunError as error:
            raise HeldUpError from error
        raise EOFError("the stream ended")

    def _event(self, name: str, data: str, retry_ms: int | None) -> Event:
        if not self._heard:
            self._heard = True
            self._streaming.arrived()
        return Event(name, data, retry_ms)

    def _read(self) -> Iterator[str]:
        """Lines without their ends. Only LF and CRLF end one: no server of ours sends CR alone."""
        rest = b""
        for piece in self._streaming:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.removesuffix(b"\r").decode("utf-8", "replace")
            if len(rest) > _LINE_BYTES_MAX:
                raise ProtocolError("a line of the stream of news has no end")

    def close(self) -> None:
        self._streaming.close()

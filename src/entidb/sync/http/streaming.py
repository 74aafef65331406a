"""A client for one answer that has no end, read as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import httpx2

from entidb.errors import SyncError, SyncTimeoutError
from entidb.sync.http.client import HttpxClient
from entidb.sync.http.failures import FOREIGN, client_closed, too_large, translated
from entidb.sync.http.steps import Steps
from entidb.sync.http.surroundings import proxy_before
from entidb.sync.interrupt import Watch
from entidb.sync.transport import HttpResponse


class StreamingClient(HttpxClient):
    """An ``HttpxClient`` that can also begin to read what does not end. One stream at a time:
    cutting it cuts all connections of this client."""

    def stream(
        self, url: str, headers: Mapping[str, str], *, first_s: float, silence_s: float
    ) -> Streaming:
        """Ask for ``url`` and return when the head of the answer is there. Connects on the calling
        thread. Nothing bounds how much is read in all, nor does ``total_timeout_s``.

        Raises as ``request`` does, and ``NotBegunError`` where nothing comes within ``first_s`` of
        the request being sent. Reading raises that too, unless ``arrived`` is called within the
        same time, and ``SyncTimeoutError`` after a silence of ``silence_s``."""
        if self._closed:
            raise client_closed()
        streaming = Streaming(self, self._interrupts.begin(), url)
        try:
            streaming.begin(headers, first_s, silence_s)
        except BaseException:
            streaming.close()
            raise
        return streaming


class NotBegunError(SyncTimeoutError):
    """The request was sent, and what it asks for did not come in time."""


class Streaming:
    """One answer that is being read. Iterating gives its bytes as they come. Close it."""

    def __init__(self, client: StreamingClient, watch: Watch, url: str) -> None:
        self.response = HttpResponse(0)
        self._client = client
        self._watch = watch
        self._url = url
        self._ticket: int | None = None
        self._answer: httpx2.Response | None = None
        self._closed = False

    def begin(self, headers: Mapping[str, str], first_s: float, silence_s: float) -> None:
        client, watch = self._client, self._watch
        watch.check()
        route = client._routes.get(self._url) or client._open_route(self._url)

        def sent() -> None:
            self._ticket = client._watchdog.watch(first_s)

        timeouts = client._timeouts(first_s)
        request = httpx2.Request(
            "GET",
            route.url,
            headers=[("Host", route.host), *headers.items()],
            extensions={
                "timeout": timeouts,
                "trace": Steps(client.remember, watch, sent, connects=True),
            },
        )
        try:
            self._answer = route.transport.handle_request(request)
        except FOREIGN as error:
            raise self._failed(error) from error
        watch.check()
        # The library looks at it again when the body begins to be read.
        timeouts["read"] = silence_s
        names = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in self._answer.headers.raw
        }
        self.response = HttpResponse(self._answer.status_code, names)

    def arrived(self) -> None:
        """What was waited for is here; from now on only silence ends this."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._client._watchdog.done(ticket)

    def whole(self, limit: int) -> HttpResponse:
        """The answer with its body, for one that is no stream. Raises ``ProtocolError`` for more
        than ``limit`` bytes of it."""
        body = b""
        for piece in self:
            body += piece
            if len(body) > limit:
                raise too_large(limit)
        return HttpResponse(self.response.status, self.response.headers, body)

    def __iter__(self) -> Iterator[bytes]:
        assert self._answer is not None
        assert isinstance(self._answer.stream, httpx2.SyncByteStream)
        try:
            for piece in self._answer.stream:
                self._watch.check()
                yield piece
        except FOREIGN as error:
            raise self._failed(error) from error
        # What was cut can look complete.
        self._watch.check()
        self._check_in_time()

    def _failed(self, error: Exception) -> SyncError:
        self._watch.check()
        self._check_in_time(error)
        failure = translated(error, self._url, proxy_before(self._url))
        waiting = self._ticket is not None and isinstance(failure, SyncTimeoutError)
        return NotBegunError(failure.message) if waiting else failure

    def _check_in_time(self, cause: Exception | None = None) -> None:
        if self._ticket is not None and self._client._watchdog.struck(self._ticket):
            raise NotBegunError(f"{self._url}: the answer did not begin in time") from cause

    def close(self) -> None:
        """Idempotent. Also ends the connection, unless everything was read."""
        if self._closed:
            return
        self._closed = True
        self.arrived()
        self._client._interrupts.end(self._watch)
        if self._answer is not None:
            self._answer.close()

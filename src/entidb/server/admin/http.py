"""Administration over the network: below ``/v1/admin/``, as JSON, with a token that says so.

A body says that it is JSON, which no page of another origin can say without asking first. Answers
are not to be kept by anything on the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from urllib.parse import quote

from msgspec import json

from entidb.errors import ProtocolError, SyncTimeoutError
from entidb.server import wire
from entidb.server.admin.asking import BODY_BYTES_MAX, PREFIX, refusal
from entidb.server.admin.callers import caller_of
from entidb.server.admin.office import Office
from entidb.server.admin.openapi import DOCUMENT, document
from entidb.server.admin.routes import answer
from entidb.server.exchange import GoneError, HttpExchange
from entidb.server.room import Held
from entidb.server.wire import ServerResponse

#: Requests at once; the rest wait. Each takes a thread.
_AT_ONCE: Final = 4


class AdminHttp:
    """Answers for one app. Used from its event loop."""

    def __init__(self, office: Office, fresh: Callable[[], Awaitable[None]]) -> None:
        """``fresh`` comes back when it is known who is revoked."""
        self._office = office
        self._fresh = fresh
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def answer(self, exchange: HttpExchange, held: Held) -> ServerResponse:
        """The answer to a request below ``PREFIX``; refusals too are JSON."""
        office = self._office
        try:
            front = office.server.front
            grants = front.authenticate(wire.bearer_token(exchange.headers))
            exchange.subject = grants.subject
            await self._fresh()
            front.control.admit(grants)
            caller = caller_of(
                grants,
                exchange.client or "unknown",
                open_to_all=office.server.config.insecure_no_auth,
            )
            body = await self._read(exchange, held)
            if exchange.path == PREFIX + DOCUMENT:
                return _response(200, json.encode(document()))
            async with self._turns:
                status, data = await asyncio.to_thread(
                    answer,
                    office,
                    caller,
                    exchange.method,
                    # It is decoded already, and what is decoded twice has another meaning to a
                    # proxy in front.
                    quote(exchange.path),
                    _query(exchange.query),
                    body,
                )
            if status == 403:
                exchange.code = "forbidden"
        except GoneError:
            raise
        except Exception as error:
            exchange.code = wire.said_code(office.server.front.explain(error, exchange.id))
            status, data = refusal(error)
            await exchange.drain(BODY_BYTES_MAX)
        return _response(status, data)

    async def _read(self, exchange: HttpExchange, held: Held) -> bytes:
        wire.content_length(exchange.headers, BODY_BYTES_MAX)
        seconds = self._office.server.config.body_timeout_s
        try:
            async with asyncio.timeout(seconds):
                body = b"" if exchange.body_read else await exchange.read(BODY_BYTES_MAX, held)
        except TimeoutError as error:
            raise SyncTimeoutError(f"the body did not arrive within {seconds:g} s") from error
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != wire.JSON_TYPE and (body or exchange.method != "GET"):
            raise ProtocolError(
                f"the body has to be {wire.JSON_TYPE}, and say so in Content-Type",
                code="unsupported_media_type",
            )
        return body


def _query(query: bytes) -> Mapping[str, str]:
    # A field of a form that nobody filled in says nothing.
    return {name: text for name, text in wire.query_of(query).items() if text}


def _response(status: int, data: bytes) -> ServerResponse:
    headers = {
        "content-type": wire.JSON_TYPE,
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
    }
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="entidb"'
    return ServerResponse(status, headers, data)

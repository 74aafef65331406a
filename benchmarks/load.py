"""A load generator as a process: many connections, raw HTTP/1.1, requests prepared beforehand.

Reads a plan as JSON from standard input and prints what came of it. Nothing is encoded, decoded
or checked while the clock runs; the answers are looked at afterwards.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sys
import time
from collections import deque
from typing import Any

import uvloop
from msgspec import Struct
from msgspec import json as msgspec_json

from benchmarks.figures import percentile
from benchmarks.payloads import COLLECTION, ids, payload
from entidb import protocol
from entidb.protocol import CONTENT_TYPE, PullRequest, PushOperation, PushRequest, PushTransaction
from entidb.types import SystemClock, timestamp_from_ms

PULL_OPERATIONS = 10


class Plan(Struct):
    """``databases`` maps names to their history and head; ``mix`` is the share of pushes.
    ``bare`` sends the same requests to a server that answers anything with 200."""

    host: str
    port: int
    token: str
    databases: dict[str, tuple[str, int]]
    connections: int
    requests: int
    mix: float
    bare: bool = False


class Outcome(Struct):
    """``p50`` and ``p99`` in seconds, over all requests; ``cpu`` is what this process took."""

    seconds: float
    p50: float
    p99: float
    pushed: int
    pulled: int
    cpu: float


Prepared = tuple[bytes, Any]


def prepare(plan: Plan) -> list[Prepared]:
    pick = random.Random(plan.requests)
    names = list(plan.databases)
    device = secrets.token_bytes(16)
    stamp = timestamp_from_ms(SystemClock().now_ms())
    prepared: list[Prepared] = []
    for number, entity_id in enumerate(ids(plan.requests)):
        db_id = names[number % len(names)]
        history, head = plan.databases[db_id]
        request: PushRequest | PullRequest
        if pick.random() < plan.mix:
            operation = PushOperation(0, entity_id, 0, payload(number))
            request = PushRequest(
                db_id=db_id,
                device_id=device,
                history=bytes.fromhex(history),
                cursor=0,
                collections=[COLLECTION],
                transactions=[PushTransaction(secrets.token_bytes(16), stamp, [operation])],
            )
        else:
            request = PullRequest(
                db_id=db_id,
                device_id=device,
                history=bytes.fromhex(history),
                cursor=pick.randrange(max(1, head - PULL_OPERATIONS)),
                limit=PULL_OPERATIONS,
                bytes_max=1 << 20,
            )
        prepared.append((_http(plan, request), request))
    return prepared


def _http(plan: Plan, request: PushRequest | PullRequest) -> bytes:
    body = protocol.encode(request)
    head = (
        f"POST {protocol.path_of(request)} HTTP/1.1\r\nHost: {plan.host}:{plan.port}\r\n"
        f"Authorization: Bearer {plan.token}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Accept: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One connection: sends the next request as soon as the last one is answered."""

    def __init__(self, todo: deque[Prepared], done: asyncio.Future[None]) -> None:
        self._todo = todo
        self._done = done
        self._buffer = b""
        self._sent_at = 0.0
        self._request: Any = None
        self.answers: list[tuple[float, Any, bytes]] = []
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def renew(self, done: asyncio.Future[None]) -> None:
        """Take ``done`` for the end of what there is to do from now on."""
        self._done = done

    def send_next(self) -> None:
        if not self._todo:
            self._done.set_result(None)
            return
        data, self._request = self._todo.popleft()
        self._sent_at = time.perf_counter()
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0 or len(buffer) < end + 4 + _content_length(buffer, end):
            self._buffer = buffer
            return
        self._buffer = b""
        self.answers.append((time.perf_counter() - self._sent_at, self._request, buffer))
        self.send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error or ConnectionError("the server hung up"))


def _content_length(buffer: bytes, end: int) -> int:
    at = buffer.lower().find(b"content-length:", 0, end)
    assert at >= 0, "every answer has a length"
    stop = buffer.find(b"\r\n", at)
    return int(buffer[at + 15 : stop])


async def run(plan: Plan) -> Outcome:
    loop = asyncio.get_running_loop()
    todo = deque(prepare(plan))
    connections: list[Connection] = []
    waiting = []
    for _ in range(min(plan.connections, plan.requests)):
        done: asyncio.Future[None] = loop.create_future()
        connection = Connection(todo, done)
        await loop.create_connection(lambda c=connection: c, plan.host, plan.port)  # type: ignore[misc]
        connections.append(connection)
        waiting.append(done)
    began, began_cpu = time.perf_counter(), time.process_time()
    for connection in connections:
        connection.send_next()
    await asyncio.gather(*waiting)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    answers = [answer for connection in connections for answer in connection.answers]
    assert len(answers) == plan.requests
    for connection in connections:
        connection.transport.abort()
    pushed = 0
    for _, request, raw in answers:
        pushed += check(request, raw, plan.bare)
    times = [answer[0] for answer in answers]
    half, tail = percentile(times, 0.5), percentile(times, 0.99)
    return Outcome(seconds, half, tail, pushed, plan.requests - pushed, cpu)


def check(request: PushRequest | PullRequest, raw: bytes, bare: bool) -> bool:
    """Whether it was a push; raises unless the answer is the one that was wanted."""
    head, _, body = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise RuntimeError(f"a request was refused: {head.decode()} {body[:300]!r}")
    if bare:
        return isinstance(request, PushRequest)
    answer = protocol.decode_response(request, body)
    if isinstance(request, PushRequest):
        assert [result.verdict for result in answer.results] == [0]  # type: ignore[union-attr]
        return True
    return False


def main() -> None:
    plan = msgspec_json.decode(sys.stdin.buffer.read(), type=Plan)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(run(plan))
    print(json.dumps({name: getattr(outcome, name) for name in Outcome.__struct_fields__}))


if __name__ == "__main__":
    main()

"""Live devices by the hundred, as a process: what an engine in the background does over the wire,
without a database behind it.

Each has a token of its own, a stream of ``/v1/live``, and a second connection for what it pulls.
When to listen, to pull, to wait and to come again is decided by the engine's own parts
(``ChannelCourse``, ``Occasions``, ``RetryConfig``); only what they ask for is done here.

Reads a ``Plan`` as a line of JSON from standard input, and prints ``ready`` when all devices are
live. Then, after each line that it reads:

    push    pushes as the plan says, and prints an ``Arrivals``
    return  prints ``watching``, and then, when all devices have lost the server and are back, a
            ``Return``

and it ends when its input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import resource
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import uvloop
from msgspec import Struct
from msgspec import json as msgspec_json

from benchmarks.payloads import COLLECTION, ids, payload
from entidb import cbor, protocol
from entidb.errors import SyncError, SyncTimeoutError, TransportError
from entidb.protocol import (
    CONTENT_TYPE,
    ErrorResponse,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushResponse,
    PushTransaction,
    SyncRequest,
    decode,
)
from entidb.server import mint_token
from entidb.sync.carried import CarriedPage, question
from entidb.sync.config import HttpConfig, RetryConfig, SyncConfig
from entidb.sync.http.answers import is_cbor, spoken_error, status_error
from entidb.sync.live import (
    FIRST_EVENT_S,
    SILENCE_S,
    Ask,
    ChannelCourse,
    Event,
    HeldUpError,
    LiveState,
    Next,
    OpenStream,
    Wait,
)
from entidb.sync.occasions import Occasions
from entidb.sync.transport import HttpResponse
from entidb.types import SystemClock, timestamp_from_ms

#: Devices that connect at once when the process begins; who comes back later is not held up.
_TOGETHER: Final = 100
_POLL_TIMEOUT_S: Final = 40.0
#: Seconds that the last pages, or the last device, get to come.
_PATIENCE_S: Final = 60.0
_HTTP: Final = HttpConfig()
#: As a device has it that is told nothing else.
_DEVICE: Final = SyncConfig(db_id="fleet")
_CLOCK: Final = SystemClock()

Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Plan(Struct):
    """``databases`` maps names to their history and head; devices go to them by fours. With
    ``changes_per_s`` every fourth device writes instead of pulling, and all of those together write
    so often. Without ``pulls`` devices only wait."""

    host: str
    port: int
    secret: str
    databases: dict[str, tuple[str, int]]
    devices: int
    changes_per_s: float = 0.0
    seconds: float = 0.0
    pulls: bool = True


class Arrivals(Struct):
    """``times``: seconds from sending a push until a page with it was with another device, of each
    change and device. ``pulls``: how many requests that took, and ``carried`` how many pages came
    by themselves. ``cpu``: of this process, in seconds."""

    times: list[float]
    changes: int
    pulls: int
    seconds: float
    cpu: float
    carried: int = 0


class Return(Struct):
    """``seconds``: until all devices were back: live, and a pull answered since then. ``times``: of
    each. ``statuses``: answers until then. ``unreached``: tries that got none. ``polling``: devices
    that are back and were held up."""

    seconds: float
    times: list[float]
    statuses: dict[int, int]
    unreached: int
    polling: int


class Fleet:
    """All devices of one process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        #: When the push of an entity was sent.
        self.sent: dict[bytes, float] = {}
        self.times: list[float] = []
        self.pulls = self.carried = 0
        self.statuses: Counter[int] = Counter()
        self.unreached = 0
        self.moved = asyncio.Event()
        names = list(plan.databases)
        self.devices = [
            Device(self, number, names[number // 4 % len(names)]) for number in range(plan.devices)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Return when all devices are live."""
        for begun, device in enumerate(self.devices, 1):
            self._tasks.append(asyncio.create_task(device.run()))
            if begun % _TOGETHER == 0 or begun == len(self.devices):
                await self.until(lambda: device.is_live)  # noqa: B023
        await self.until(lambda: all(device.is_live for device in self.devices))

    async def until(self, done: Callable[[], bool]) -> None:
        """Raises what a device raises, and ``RuntimeError`` where it takes too long."""
        deadline = time.perf_counter() + _PATIENCE_S
        while not done():
            for task in self._tasks:
                if task.done():
                    task.result()
            if time.perf_counter() > deadline:
                live = sum(device.is_live for device in self.devices)
                raise RuntimeError(f"{live} of {len(self.devices)} are live; {self.statuses}")
            self.moved.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.moved.wait()

    async def push(self) -> Arrivals:
        plan = self.plan
        writers = [device for device in self.devices if device.writes]
        heard = Counter(device.db_id for device in self.devices if not device.writes)
        self.times, self.pulls, self.carried = [], 0, 0
        began, cpu = time.perf_counter(), time.process_time()
        pause_s = len(writers) / plan.changes_per_s
        pushed = await asyncio.gather(
            *(device.write(began + plan.seconds, pause_s) for device in writers)
        )
        pairs = zip(writers, pushed, strict=True)
        wanted = sum(heard[device.db_id] * count for device, count in pairs)
        await self.until(lambda: len(self.times) >= wanted)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return Arrivals(self.times, sum(pushed), self.pulls, seconds, cpu, self.carried)

    def watch(self) -> None:
        """From now on devices are to lose the server and to come back."""
        self.statuses.clear()
        self.unreached = 0
        for device in self.devices:
            device.lost, device.back_at = False, 0.0

    async def came_back(self, began: float) -> Return:
        await self.until(lambda: all(device.back_at for device in self.devices))
        times = [device.back_at - began for device in self.devices]
        polling = sum(device.course.state is LiveState.POLLING for device in self.devices)
        return Return(max(times), times, dict(self.statuses), self.unreached, polling)


class Device:
    """One device."""

    def __init__(self, fleet: Fleet, number: int, db_id: str) -> None:
        plan = fleet.plan
        self.db_id = db_id
        self.writes = plan.changes_per_s > 0 and number % 4 == 0
        self.lost = False
        self.back_at = 0.0
        loop = asyncio.get_running_loop()
        self.course = ChannelCourse(
            loop.time,
            random.random,
            news=self._heard,
            changed=self._changed,
            asks=lambda: self._request() if fleet.plan.pulls and not self.writes else None,
            page=self._page_came,
        )
        self._now = loop.time
        self._fleet = fleet
        self._id = secrets.token_bytes(16)
        history, self._cursor = plan.databases[db_id]
        self._history = bytes.fromhex(history)
        self._occasions = Occasions(_DEVICE.retry, random.random)
        self._event = asyncio.Event()
        token = mint_token(plan.secret, subject=f"person-{number}", databases={db_id: "rw"})
        self._head = f"Host: {plan.host}:{plan.port}\r\nAuthorization: Bearer {token}\r\n"
        self._pulling: Wire | None = None
        self._stream: Wire | None = None
        #: When the first event of the stream has to be here; None: it is.
        self._due: float | None = None

    @property
    def is_live(self) -> bool:
        return self.course.state is not LiveState.OFFLINE

    async def run(self) -> None:
        if not self._fleet.plan.pulls:
            await self._listen()
        async with asyncio.TaskGroup() as tasks:
            self._occasions.begin()
            await self._sync()
            # As an engine does, it begins to listen after its first cycle.
            tasks.create_task(self._listen())
            await self._go_on()

    # ------------------------------------------------------------ cycles

    async def _go_on(self) -> None:
        """As ``Background`` does."""
        occasions = self._occasions
        while True:
            occasions.wait(self._now(), _DEVICE.interval_s)
            while (left := occasions.left_s(self._now(), lambda: self._cursor)[0]) > 0:
                self._event.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._event.wait()
            occasions.begin()
            await self._sync()

    async def _sync(self) -> None:
        try:
            await self._attempts(_DEVICE.retry)
        except SyncError as error:
            self._occasions.failed(self._now(), passes=error.retryable)
            return
        self._occasions.worked(more=False)
        if self.lost and self.is_live and not self.back_at:
            self.back_at = time.perf_counter()
            self._fleet.moved.set()

    async def _attempts(self, retry: RetryConfig) -> None:
        attempt = 1
        while True:
            try:
                await self._pull()
                return
            except SyncError as error:
                if not error.retryable or attempt >= retry.attempts_max:
                    raise
                after = error.retry_after
            await asyncio.sleep(retry.delay_s(attempt, random.random(), retry_after=after))
            attempt += 1

    async def _pull(self) -> None:
        more = True
        while more:
            request = self._request()
            body = await self._exchange(request, protocol.encode(request))
            here = time.perf_counter()
            page = decode(PullResponse, body)
            self._cursor, more = page.cursor, page.has_more
            self._fleet.pulls += 1
            self._note(page, here)

    def _request(self) -> PullRequest:
        return PullRequest(
            db_id=self.db_id,
            device_id=self._id,
            history=self._history,
            cursor=self._cursor,
            limit=_DEVICE.pull_operations_max,
            bytes_max=_DEVICE.pull_bytes_max,
        )

    def _page_came(self, came: CarriedPage | None) -> None:
        """As a cycle does; the hint that follows starts none where the page has led there."""
        if came is None or not came.answers(self._request()):
            return
        here = time.perf_counter()
        page = came.opened()
        if page is not None and not page.has_more:
            self._cursor = page.cursor
            self._fleet.carried += 1
            self._note(page, here)

    def _note(self, page: PullResponse, here: float) -> None:
        fleet = self._fleet
        if self.writes or not fleet.sent:
            return
        for commit in page.commits:
            for operation in commit.operations:
                fleet.times.append(here - fleet.sent[operation.entity_id])
        fleet.moved.set()

    async def write(self, until: float, pause_s: float) -> int:
        """Push a change every ``pause_s``, half as long at least, until then; how many."""
        count = 0
        await asyncio.sleep(random.uniform(0, pause_s))
        while time.perf_counter() < until:
            entity_id = ids(1)[0]
            operation = PushOperation(0, entity_id, 0, payload(count))
            stamp = timestamp_from_ms(_CLOCK.now_ms())
            request = PushRequest(
                db_id=self.db_id,
                device_id=self._id,
                history=self._history,
                cursor=self._cursor,
                collections=[COLLECTION],
                transactions=[PushTransaction(secrets.token_bytes(16), stamp, [operation])],
            )
            encoded = protocol.encode(request)
            self._fleet.sent[entity_id] = time.perf_counter()
            answer = decode(PushResponse, await self._exchange(request, encoded))
            assert [result.verdict for result in answer.results] == [0]
            count += 1
            await asyncio.sleep(random.uniform(pause_s / 2, pause_s * 3 / 2))
        return count

    async def _exchange(self, request: SyncRequest, body: bytes) -> bytes:
        """The body of the answer. Raises ``SyncError``."""
        wire, self._pulling = self._pulling, None
        if wire is None or wire[0].at_eof() or wire[1].is_closing():
            if wire is not None:
                wire[1].close()
            wire = await self._connect()
        try:
            address = protocol.path_of(request)
            head = (
                f"POST {address} HTTP/1.1\r\n{self._head}Content-Type: {CONTENT_TYPE}\r\n"
                f"Accept: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            wire[1].write(head.encode() + body)
            async with asyncio.timeout(_HTTP.read_timeout_s):
                answer = await self._answer(wire[0])
        except (OSError, EOFError) as error:  # also that it took too long
            wire[1].close()
            raise self._unreachable(error) from error
        if answer.headers.get("connection") == "close":
            wire[1].close()
        else:
            self._pulling = wire
        if answer.status != 200:
            raise _refused(answer)
        return answer.body

    # ------------------------------------------------------------ news

    def _heard(self, head: int, first: bool) -> None:
        if not self.writes:
            self._occasions.hear(head, first)
            self._event.set()

    def _changed(self, state: LiveState) -> None:
        if state is LiveState.OFFLINE:
            self.lost = True
        self._fleet.moved.set()

    async def _listen(self) -> None:
        course = self.course.run()
        step = next(course)
        while True:
            try:
                outcome = await self._do(step)
            except (SyncError, EOFError, HeldUpError) as error:
                step = course.throw(error)
            else:
                step = course.send(outcome)

    async def _do(self, step: OpenStream | Next | Ask | Wait) -> Event | int | None:
        if isinstance(step, Next):
            return await self._next_event()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream[1].close()
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
        elif isinstance(step, Ask):
            return await self._poll(step.known)
        else:
            await self._open(step.asks)
        return None

    async def _open(self, asks: PullRequest | None) -> None:
        more = "" if asks is None else f"&pages={question(asks)}"
        wire = self._stream = await self._ask("text/event-stream", more)
        self._due = self._now() + FIRST_EVENT_S
        try:
            async with asyncio.timeout_at(self._due):
                answer = await self._answer(wire[0])
        except TimeoutError as error:
            raise HeldUpError from error
        except (OSError, EOFError) as error:
            raise self._unreachable(error) from error
        if answer.status != 200:
            raise _refused(answer)

    async def _poll(self, known: int | None) -> int:
        wire = await self._ask(CONTENT_TYPE, "" if known is None else f"&cursor={known}")
        try:
            async with asyncio.timeout(_POLL_TIMEOUT_S):
                answer = await self._answer(wire[0])
        except (OSError, EOFError) as error:
            raise self._unreachable(error) from error
        finally:
            wire[1].close()
        if answer.status != 200:
            raise _refused(answer)
        head: int = cbor.decode(answer.body)["head"]
        return head

    async def _ask(self, accept: str, more: str = "") -> Wire:
        wire = await self._connect()
        address = f"/v1/live?db_id={self.db_id}&device_id={self._id.hex()}{more}"
        head = f"GET {address} HTTP/1.1\r\n{self._head}Accept: {accept}\r\n\r\n"
        wire[1].write(head.encode())
        return wire

    async def _next_event(self) -> Event | None:
        """The next event, or None for a sign of life. Each event is a chunk of its own, and what
        frames a chunk is a line that says nothing to who reads events."""
        assert self._stream is not None
        name, data, retry_ms = "", "", None
        while True:
            line = await self._line(self._stream[0])
            field, _, value = line.decode().rstrip("\r\n").partition(": ")
            if line == b":\n":
                return None
            if field == "event":
                name = value
            elif field == "data":
                data = value
            elif field == "retry":
                retry_ms = int(value)
            elif not field and name:
                self._due = None
                return Event(name, data, retry_ms)

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        until = self._now() + SILENCE_S if self._due is None else self._due
        try:
            async with asyncio.timeout_at(until):
                line = await reader.readline()
        except TimeoutError as error:
            if self._due is not None:
                raise HeldUpError from error
            raise SyncTimeoutError("the stream is silent") from error
        except OSError as error:
            raise self._unreachable(error) from error
        if not line or line == b"0\r\n":
            raise EOFError("the stream ended")
        return line

    # ------------------------------------------------------------ HTTP

    async def _connect(self) -> Wire:
        plan = self._fleet.plan
        try:
            async with asyncio.timeout(_HTTP.connect_timeout_s):
                return await asyncio.open_connection(plan.host, plan.port)
        except OSError as error:  # also that it took too long
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> SyncError:
        """What a device makes of ``error``."""
        self._fleet.unreached += 1
        return TransportError(f"no answer: {error}")

    async def _answer(self, reader: asyncio.StreamReader) -> HttpResponse:
        """An answer; without its body where that has no end. Raises ``OSError`` and ``EOFError``
        where none comes."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split(" ")[1])
        headers = {}
        for line in head[1:-2]:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        self._fleet.statuses[status] += 1
        length = int(headers.get("content-length", "0"))
        body = await reader.readexactly(length) if length else b""
        return HttpResponse(status, headers, body)


def _refused(answer: HttpResponse) -> SyncError:
    """The error that an answer other than 200 is, in a device's eyes."""
    if is_cbor(answer):
        return spoken_error(answer, decode(ErrorResponse, answer.body), _CLOCK)
    return status_error("the server", answer, answer.body, _CLOCK)


def _say(what: str | bytes) -> None:
    print(what if isinstance(what, str) else what.decode(), flush=True)


async def run() -> None:
    loop = asyncio.get_running_loop()
    fleet = Fleet(msgspec_json.decode(sys.stdin.readline(), type=Plan))
    await fleet.begin()
    # What was made until now is not looked at again and again while others are timed.
    gc.collect()
    gc.freeze()
    _say("ready")
    while word := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        if word == "push":
            _say(msgspec_json.encode(await fleet.push()))
        else:
            assert word == "return"
            fleet.watch()
            began = time.perf_counter()
            _say("watching")
            _say(msgspec_json.encode(await fleet.came_back(began)))


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()

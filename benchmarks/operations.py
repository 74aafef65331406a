"""``operations``: what it costs devices, and how long it takes, when somebody looks after a
server: a backup while devices push, a device that is locked out, one difference that is looked
for, and the registry of devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import uvloop
from msgspec import json
from msgspec.structs import replace

from benchmarks.figures import Figure, Target, figure, percentile
from benchmarks.live import Process, process
from benchmarks.load import Connection, Plan, Prepared, check, prepare
from benchmarks.many import Histories, generate, make_databases, plan_of
from benchmarks.payloads import COLLECTION, entities
from benchmarks.world import Server, World, processor_s
from entidb.db import Database
from entidb.protocol import CONTENT_TYPE, PullRequest, PushResponse, PushResult, encode
from entidb.server import mint_token
from entidb.server.auth import Grants
from entidb.server.registry import Registry
from entidb.types import SystemClock

#: N: entities of the database that is backed up; a tenth of them are compared, a fiftieth pushed.
SIZES = (1_000_000,)
DB = "db-0"
DEVICES = 50
#: Seconds between two pushes of a device.
PAUSE_S = 0.25
#: Pushes that are prepared: as many as the devices send in six minutes.
PREPARED = int(DEVICES * 360 / PAUSE_S)
#: Seconds without a backup, before it and after it: a hundredth of the pushes must be many, and the
#: machine's own moods must fall on both.
ALONE_S = 30.0
WORKERS = 2
#: Of the device that is locked out; the system shares them out among the workers.
STREAMS = 8
DIFFERENCE_BYTES = 200_000
BACKUP_TARGET = Target("ratio", most=2.0)
REVOKED_TARGET = Target("value", most=1.0)
FOUND_TARGET = Target("value", most=1.0)
REGISTRY_TARGET = Target("ratio", most=0.03)
#: Seconds between two looks whether the backup is done: a look is a request, too.
POLL_S = 0.5
_PATIENCE_S = 300.0


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        yield from backing_up(world, count, rounds)
        yield from locking_out(world, count, rounds)
        yield from comparing(world, count, rounds)
        yield from registering(world, count, rounds)


# ---------------------------------------------------------------- a backup while devices push


def backing_up(world: World, count: int, rounds: int) -> Iterator[Figure]:
    """Pushes of ``DEVICES`` devices to the database that is backed up and verified meanwhile."""
    paths, histories = _database(world, count)
    alone, beside, took, after = [], [], [], []
    alone_s = max(0.5, ALONE_S * min(1.0, count / SIZES[0]))
    with world.server(paths, backup_dir=str(world.path("backups")), backup_keep=1) as server:
        for _ in range(rounds):
            with _pushing(server, histories) as devices:
                time.sleep(1.0)
                _times(devices)  # the first ones open the database
                time.sleep(alone_s)
                quiet = _times(devices)
                seconds, made = _backup(world, server)
                busy = _times(devices)
                time.sleep(alone_s)
                quiet += _times(devices)
            alone.append(percentile(quiet, 0.99) * 1000)
            beside.append(percentile(busy, 0.99) * 1000)
            took.append(seconds)
            # Every push adds one entity: what was backed up is the state of one commit.
            _, head = histories[DB]
            assert made["entities"] - count == made["head"] - head, "a part of a commit"
            after.append(len(busy) / seconds)
    yield figure(
        "operations",
        f"pushes of {DEVICES} devices during a backup: p99",
        count,
        "ms",
        beside,
        floors=alone,
        floor_is="without the backup",
        target=BACKUP_TARGET,
        note=f"{DEVICES / PAUSE_S:g} pushes a second are asked for",
    )
    yield figure("operations", "pushes during a backup", count, "/s", after)
    yield figure("operations", "a backup, verified, while they push", count, "s", took)


def _database(world: World, count: int) -> tuple[dict[str, Path], Histories]:
    paths, histories = make_databases(world, 1, entities(count))
    return paths, {DB: histories[DB]}


def _backup(world: World, server: Server) -> tuple[float, dict[str, Any]]:
    began = time.perf_counter()
    task = _admin(world, server, "POST", f"databases/{DB}/backup")
    while task.get("state", "waiting") in ("waiting", "running"):
        if time.perf_counter() - began > _PATIENCE_S:
            raise RuntimeError(f"the backup does not end: {task}")
        time.sleep(POLL_S)
        task = _admin(world, server, "GET", f"tasks/{task['id']}")
    assert task.get("state", "waiting") == "done", task
    return time.perf_counter() - began, task["result"]


def _admin(world: World, server: Server, method: str, path: str, body: Any = None) -> Any:
    """What administration answers, over HTTP as from afar."""
    secret = world.secret_file.read_bytes()
    token = mint_token(secret, subject="bench", databases={}, claims={"admin": True})
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.encode(body)
    with _connected(server) as connection:
        connection.request(method, f"/v1/admin/{path}", data, headers)
        answer = connection.getresponse()
        text = answer.read()
        if answer.status not in (200, 202):
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
        return json.decode(text)


@contextlib.contextmanager
def _connected(server: Server) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(server.url).netloc)) as connection:
        yield connection


@contextlib.contextmanager
def _pushing(server: Server, histories: Histories) -> Iterator[Process]:
    plan = plan_of(server.url, server, histories, PREPARED, 1.0)
    plan.connections = DEVICES
    with process(["benchmarks.operations"]) as devices:
        assert devices.ask(json.encode(plan).decode()) == b"pushing\n"
        yield devices


def _times(devices: Process) -> list[float]:
    """Seconds that each push has taken since they were asked last."""
    return json.decode(devices.ask("times"), type=list[float])


async def _push(plan: Plan, mine: list[Prepared], times: list[float]) -> None:
    """What one device does."""
    loop = asyncio.get_running_loop()
    todo: deque[Prepared] = deque()
    connection = Connection(todo, loop.create_future())
    await loop.create_connection(lambda: connection, plan.host, plan.port)
    for each in mine:
        todo.append(each)
        connection.renew(done := loop.create_future())
        connection.send_next()
        await done
        seconds, request, raw = connection.answers.pop()
        check(request, raw, bare=False)
        times.append(seconds)
        await asyncio.sleep(PAUSE_S)
    raise RuntimeError("all pushes that were prepared are sent")


async def _push_all(plan: Plan) -> None:
    loop = asyncio.get_running_loop()
    prepared = prepare(plan)
    times: list[float] = []
    ended = loop.create_future()
    pushing = []
    for number in range(plan.connections):
        mine = prepared[number :: plan.connections]
        pushing.append(asyncio.create_task(_push(plan, mine, times)))
        # Devices do not push in step.
        await asyncio.sleep(PAUSE_S / plan.connections)
    print("pushing", flush=True)

    def tell() -> None:
        if not sys.stdin.buffer.readline():
            ended.set_result(None)
            return
        print(json.encode(times).decode(), flush=True)
        times.clear()

    loop.add_reader(sys.stdin.fileno(), tell)
    await asyncio.wait([*pushing, ended], return_when=asyncio.FIRST_COMPLETED)
    for each in pushing:
        if each.done():
            each.result()  # why it ended


# ---------------------------------------------------------------- a device is locked out


def locking_out(world: World, count: int, rounds: int) -> Iterator[Figure]:
    """From asking that a device is locked out until all of its streams are cut and a request on
    each of its connections is refused, at a server of two workers."""
    paths, histories = _database(world, min(count, 1000))
    seconds = []
    with world.server(paths, workers=WORKERS) as server:
        for number in range(rounds):
            device = (number + 1).to_bytes(16, "big")
            with contextlib.ExitStack() as stack:
                streams = [stack.enter_context(_stream(server, device)) for _ in range(STREAMS)]
                lines = [stack.enter_context(_connected(server)) for _ in range(STREAMS)]
                for line in lines:
                    assert _ask(line, server, histories, device) == 200
                began = time.perf_counter()
                asked = {"kind": "device", "name": device.hex(), "reason": "lost"}
                _admin(world, server, "POST", "revoked", asked)
                for stream in streams:
                    while stream.readline():
                        pass
                for line in lines:
                    assert _ask(line, server, histories, device) in (401, 403)
                seconds.append(time.perf_counter() - began)
    yield figure(
        "operations",
        f"a device is locked out of {WORKERS} workers",
        count,
        "s",
        seconds,
        target=REVOKED_TARGET,
        note=f"{STREAMS} streams and as many connections of its own",
    )


@contextlib.contextmanager
def _stream(server: Server, device: bytes) -> Iterator[http.client.HTTPResponse]:
    """The event stream of a device, after its first line."""
    with _connected(server) as connection:
        asked = urlencode({"db_id": DB, "device_id": device.hex(), "request": 1})
        headers = {"Authorization": f"Bearer {server.token}", "Accept": "text/event-stream"}
        connection.request("GET", f"/v1/live?{asked}", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.readline(), answer.status
        yield answer


def _ask(
    line: http.client.HTTPConnection, server: Server, histories: Histories, device: bytes
) -> int:
    history, head = histories[DB]
    request = PullRequest(
        db_id=DB,
        device_id=device,
        history=bytes.fromhex(history),
        cursor=head,
        limit=10,
        bytes_max=1 << 20,
    )
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": CONTENT_TYPE}
    line.request("POST", "/v1/pull", encode(request), headers)
    answer = line.getresponse()
    answer.read()
    return answer.status


# ---------------------------------------------------------------- a difference is looked for


def comparing(world: World, count: int, rounds: int) -> Iterator[Figure]:
    """A device has another value of one entity than the server, among a tenth of N."""
    there = max(1, count // 10)
    paths, _ = _database(world, there)
    seconds, sizes = [], []
    with world.server(paths) as server, world.device(server, DB) as device:
        device.sync()
        _spoil(device.database)
        device.client.recording = True
        for _ in range(rounds):
            device.client.exchanges.clear()
            began = time.perf_counter()
            found = device.engine.verify_with_server()
            seconds.append(time.perf_counter() - began)
            (difference,) = found.differences
            assert difference.kind == "other" and found.entities == there
            bodies = [(each.body, each.response.body) for each in device.client.exchanges]
            sizes.append(float(sum(len(sent) + len(answer) for sent, answer in bodies)))
    what = f"one difference among {there:,}"
    bound = Target("value", most=DIFFERENCE_BYTES)
    yield figure("operations", f"{what}: found in", count, "s", seconds, target=FOUND_TARGET)
    yield figure("operations", f"{what}: bodies, unpacked", count, "bytes", sizes, target=bound)


def _spoil(database: Database) -> None:
    with database.write() as writer:
        entity_id = next(iter(database.collection(COLLECTION)))
        ref = writer.collection(COLLECTION).number, entity_id.bytes
        row = writer.entity(ref)
        assert row is not None
        writer.show(ref, replace(row, payload=b"\x01"), row, writer.next_sequence())


# ---------------------------------------------------------------- the registry of devices


def registering(world: World, count: int, rounds: int) -> Iterator[Figure]:
    """Processor time of noting the device of a push, against the server's of the push."""
    pushes = max(1, count // 50)
    paths, histories = _database(world, min(count, 1000))
    noted, whole = [], []
    with world.server(paths) as server:
        plan = plan_of(server.url, server, histories, pushes, 1.0)
        for _ in range(rounds):
            took = processor_s(server.pid)
            generate(plan)
            whole.append((processor_s(server.pid) - took) / pushes * 1e6)
            noted.append(_note(world, plan, pushes) / pushes * 1e6)
    yield figure(
        "operations",
        "noting a push's device",
        count,
        "us",
        noted,
        floors=whole,
        floor_is="the server's processor time for the push",
        target=REGISTRY_TARGET,
    )


def _note(world: World, plan: Plan, pushes: int) -> float:
    """Seconds of a processor for noting so many pushes of as many devices as connections."""
    place = world.path("registry")
    (place / "shop.entidb").mkdir(parents=True)
    registry = Registry(place, SystemClock(), retention_days=90)
    answer = PushResponse(results=[PushResult(0, 1)], collections=[], head=1, time=0)
    requests = [
        replace(request, db_id="shop", device_id=number.to_bytes(16, "big"))
        for number in range(plan.connections)
        for _, request in prepare(replace(plan, requests=1))
    ]
    asking = Grants("somebody@example.org", {}, {"jti": "token"})
    began = time.process_time()
    for number in range(pushes):
        request = requests[number % len(requests)]
        registry.heard(request, asking, code=None, answer=answer, client="entidb/0.9.0")
    registry.flush()
    return time.process_time() - began


def main() -> None:
    """Devices that push, until their input ends."""
    plan = json.decode(sys.stdin.buffer.readline(), type=Plan)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_push_all(plan))


if __name__ == "__main__":
    main()

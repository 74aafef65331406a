"""Ctrl-C between any two instructions of a cycle: the next sync goes on, also where a traceback of
the interrupted one is kept, as notebooks do."""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType
from typing import Any

import httpx2
import pytest

from entidb.db import Database
from entidb.server import ServerConfig, serving
from entidb.storage import MemoryStorage
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from tests.support import World, assert_in_step, uid

#: Where the locks and flags of a cycle are taken and given back.
WATCHED = tuple(f"/entidb/sync/{name}.py" for name in ("engine", "drive", "others", "interrupt"))


@functools.cache
def _instants(code: CodeType) -> frozenset[int]:
    """Where CPython looks for signals: at the beginning, after calls, and where a loop goes back.
    It does not between entering a lock and its block, nor on the way out of one."""
    found = set()
    before = ""
    for each in dis.get_instructions(code):
        name = each.opname
        if before.startswith("CALL") or name == "RESUME" or name.startswith("JUMP_BACKWARD"):
            found.add(each.offset)
        before = name
    return frozenset(found)


class _Interrupter:
    """Raises at the instant with the number ``at`` of the watched modules."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in _instants(frame.f_code):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def _sync_until(engine: SyncEngine, at: int) -> BaseException | None:
    before = sys.gettrace()
    sys.settrace(_Interrupter(at))
    try:
        engine.sync()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        sys.settrace(before)
    return None


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="a lock is entered by a call there")
def test_wherever_a_sync_is_interrupted_the_next_one_runs() -> None:
    world = World()
    kept = []
    at = 0
    while True:
        at += 1
        device = world.device()
        device.db.collection("notes")[uid(at)] = at
        interrupt = _sync_until(device.engine, at)
        if interrupt is None:
            break
        kept.append(interrupt)
        device.engine.sync()
        assert device.engine.status().pending == 0
        assert_in_step(world, device)
        device.engine.close()
    assert at > 50, "nothing was watched"


def test_after_ctrl_c_in_a_request_the_connections_of_before_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = tmp_path_factory.mktemp("server")
    handle = httpx2.HTTPTransport.handle_request
    used = []

    def interrupted(self: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        used.append(self)
        if len(used) == 3:
            # As where Ctrl-C falls between the lock and the block that gives it back.
            self._pool._optional_thread_lock.__enter__()
            raise KeyboardInterrupt
        return handle(self, request)

    config = SyncConfig(db_id="shop", retry=RetryConfig.none())
    with (
        serving(ServerConfig(data_dir=data, insecure_no_auth=True)) as url,
        Database(MemoryStorage()) as db,
        SyncEngine(config, url, db) as engine,
    ):
        engine.sync()
        monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", interrupted)
        used.clear()
        db["notes"].add(1)
        for _ in range(3):
            try:
                engine.sync()
            except KeyboardInterrupt:
                break
            db["notes"].add(2)
        else:
            raise AssertionError("it was not interrupted")
        stuck = used[2]
        engine.sync()
        assert engine.status().pending == 0
        assert used[3] is not stuck

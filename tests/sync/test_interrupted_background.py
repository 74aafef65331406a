"""Ctrl-C between any two steps of starting, waking and stopping an engine in the background, the
events and threads of Python's own among them: the next call goes on."""

from __future__ import annotations

import dis
import functools
import signal
import sys
import threading
from types import CodeType, FrameType
from typing import Any

import pytest

from entidb.db import Database
from entidb.events import SafeEvent, Thread
from entidb.server import SyncServer
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncEngine

WATCHED = ("/entidb/sync/engine.py", "/entidb/sync/background.py", "/entidb/events.py")
PYTHON_S = ("/threading.py",)
#: Far beyond the whole test; a thread that hangs is told by it.
STUCK_S = 30.0


@functools.cache
def _instants(code: CodeType) -> frozenset[int]:
    """Where CPython looks for signals."""
    found, before = set(), ""
    for each in dis.get_instructions(code):
        if before.startswith("CALL") or each.opname == "RESUME" or "JUMP_BACK" in each.opname:
            found.add(each.offset)
        before = each.opname
    return frozenset(found)


class _Interrupter:
    def __init__(self, at: int, files: tuple[str, ...]) -> None:
        self.left, self.files = at, files

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in _instants(frame.f_code):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def run_interrupted(work: Any, at: int, files: tuple[str, ...]) -> bool:
    """Whether it was interrupted."""
    before = sys.gettrace()
    sys.settrace(_Interrupter(at, files))
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def in_time(work: Any, what: str) -> Any:
    """What ``work`` returns, on a thread that may hang."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STUCK_S)
    assert found, f"{what} hangs"
    if isinstance(found[0], BaseException):
        raise AssertionError(what) from found[0]
    return found[0]


def start_and_stop(engine: SyncEngine) -> None:
    engine.start()
    engine.wake()
    engine.stop()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="a lock is entered by a call there")
@pytest.mark.parametrize("files", [WATCHED, PYTHON_S])
def test_wherever_start_and_stop_are_interrupted_they_can_be_called_again(
    files: tuple[str, ...],
) -> None:
    at, interrupted = 0, True
    with SyncServer.in_memory() as server:
        while interrupted:
            at += 1
            with Database.in_memory() as database:
                transport = HttpTransport("http://localhost", client=LoopbackClient(server))
                engine = SyncEngine(SyncConfig(db_id="shop"), transport, database)
                database["notes"].add({"n": at})
                trial = functools.partial(_trial, engine, at, files)
                interrupted = in_time(trial, f"interrupted at step {at}")[0]
                engine.close()
    assert at > 10, "nothing was watched"


def _trial(engine: SyncEngine, at: int, files: tuple[str, ...]) -> tuple[bool]:
    interrupted = run_interrupted(lambda: start_and_stop(engine), at, files)
    engine.stop()
    engine.start()
    assert engine.synced(STUCK_S / 2)
    engine.stop()
    return (interrupted,)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="a lock is entered by a call there")
def test_wherever_an_event_is_interrupted_it_can_be_set_cleared_and_awaited() -> None:
    def once(event: SafeEvent) -> bool:
        event.wait(0.001)
        event.set()
        event.wait()
        event.clear()
        return True

    at, interrupted = 0, True
    while interrupted:
        at += 1
        event = SafeEvent()
        interrupted = run_interrupted(
            functools.partial(once, event), at, ("/entidb/events.py", "/threading.py")
        )
        in_time(functools.partial(once, event), f"interrupted at step {at}")
    assert at > 7


def test_an_event_is_set_in_a_signal_handler_while_it_is_being_set() -> None:
    """With a lock, its thread would wait for itself."""
    event, files = SafeEvent(), ("/entidb/events.py", "/threading.py")
    called = []

    def handle(number: int, frame: object) -> None:
        event.set()
        called.append(event.is_set())

    class Signals(_Interrupter):
        def __call__(self, frame: FrameType, kind: str, argument: object) -> Any:
            if frame.f_code.co_filename.endswith(files) and kind == "line" and not called:
                sys.settrace(None)
                signal.raise_signal(signal.SIGUSR1)
            return self

    before, trace = signal.signal(signal.SIGUSR1, handle), sys.gettrace()
    try:
        sys.settrace(Signals(1, files))
        event.set()
    finally:
        sys.settrace(trace)
        signal.signal(signal.SIGUSR1, before)
    assert called == [True] and event.wait(0)


def test_events_wake_all_who_wait() -> None:
    event = SafeEvent()
    assert not event.wait(0) and not event.wait(0.001) and not event.wait(-1.0)
    woken: list[bool] = []
    threads = [Thread(target=lambda: woken.append(event.wait())) for _ in range(5)]
    for thread in threads:
        thread.start()
    event.set()
    for thread in threads:
        thread.join(STUCK_S)
    assert woken == [True] * 5 and event.wait(0) and event.wait()
    event.clear()
    assert not event.is_set() and not event.wait(0.001)


def test_a_run_that_is_ending_takes_nothing_from_the_one_that_begins() -> None:
    with SyncServer.in_memory() as server, Database.in_memory() as database:
        transport = HttpTransport("http://localhost", client=LoopbackClient(server))
        engine = SyncEngine(SyncConfig(db_id="shop"), transport, database)
        background, before, now = engine._background, SafeEvent(), SafeEvent()
        background.starting = now
        thread = threading.Thread(target=background.run, args=[before], daemon=True)
        thread.start()
        assert engine.synced(STUCK_S)
        before.set()
        background.wake()
        thread.join(STUCK_S)
        assert not thread.is_alive()
        assert background.is_running, "the next run has not begun yet, and is about to"
        background.starting = None
        engine.close()

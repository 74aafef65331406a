"""The collector is off inside a pause, and as it was afterwards, however the pause ends."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from entidb.collector import paused


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_it_is_off_inside_and_on_afterwards():
    with paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_ends_a_pause():
    with pytest.raises(ZeroDivisionError), paused():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_the_last_of_several_pauses_ends_them():
    with paused():
        with paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_pauses_of_two_threads_overlap():
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with paused():
            inside.set()
            assert leave.wait(10)

    thread = threading.Thread(target=other)
    with paused():
        thread.start()
        assert inside.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off():
    gc.disable()
    with paused():
        pass
    assert not gc.isenabled()


def test_a_pause_that_is_never_left_ends_when_it_is_forgotten():
    pause = paused()
    pause.__enter__()
    assert not gc.isenabled()
    del pause
    assert gc.isenabled()

"""Among processes the turn has no order, but nobody waits for it long: who has waited too long goes
first. A turn in one process stands for one in each here; the locks are those of open files."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from entidb.storage.lmdb import turn
from entidb.storage.lmdb.turn import FileTurn

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="one process at a time there"
)

LONG_S = 0.05
ROUNDS = 8


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with much to do may let nobody run for a moment."""
    monkeypatch.setattr(turn, "_LONG_SECONDS", LONG_S, raising=False)
    monkeypatch.setattr(turn, "_FRESH_SECONDS", 30.0, raising=False)


def turns(path: Path, count: int) -> list[FileTurn]:
    like = path.stat()
    return [FileTurn(str(path / turn.TURN), like, first=number == 0) for number in range(count)]


def waits_long(there: FileTurn) -> bool:
    """Whether one has told all others that it waits too long."""
    since, _ = turn._LONGEST_NOTE.unpack_from(there.memory, turn._LONGEST)
    return bool(since)


def test_who_has_waited_too_long_goes_before_all_who_came_later(tmp_path: Path) -> None:
    owner, first, *later = turns(tmp_path, 6)
    for _ in range(ROUNDS):
        order: list[FileTurn] = []

        def wait(mine: FileTurn, order: list[FileTurn] = order) -> None:
            assert mine.take(60.0)
            order.append(mine)
            mine.give_back()

        assert owner.take()
        threads = [threading.Thread(target=wait, args=(first,))]
        threads[0].start()
        while not waits_long(owner):
            time.sleep(0.001)
        threads += [threading.Thread(target=wait, args=(each,)) for each in later]
        for thread in threads[1:]:
            thread.start()
        time.sleep(LONG_S / 2)
        owner.give_back()
        for thread in threads:
            thread.join()
        assert order[0] is first
    for each in (owner, first, *later):
        each.close()


def test_one_that_died_while_it_waited_is_waited_for_no_longer_than_it_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, dead, other = turns(tmp_path, 3)
    assert owner.take()
    assert not dead.take(3 * LONG_S)  # and is never seen again
    owner.give_back()
    began = time.monotonic()
    assert other.take(LONG_S)  # at the end of its time it does not ask who goes first
    assert time.monotonic() - began >= LONG_S
    other.give_back()
    assert owner.take()
    assert not dead.take(3 * LONG_S)
    owner.give_back()
    monkeypatch.setattr(turn, "_FRESH_SECONDS", 0.01)
    assert other.take(60.0)
    assert time.monotonic() - began < 30.0
    for each in (owner, dead, other):
        each.close()


def test_a_time_of_another_clock_holds_nobody_up(tmp_path: Path) -> None:
    owner, other = turns(tmp_path, 2)
    for since, said in ((1.0, time.monotonic() + 1e6), (2.0, 1.0), (float("nan"), float("nan"))):
        turn._LONGEST_NOTE.pack_into(other.memory, turn._LONGEST, since, said)
        assert owner.take()
        assert not other.take(0.01)
        owner.give_back()
        assert other.take(60.0)
        other.give_back()
    owner.close()
    other.close()

"""Threads of several databases decide one by one, and none that is stuck keeps the others out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from entidb.errors import ServerError, SyncError
from entidb.protocol import PushRequest, PushResponse, PushTransaction, RoundRequest
from entidb.server.gate import WriterGate, lets_go
from entidb.server.group_commit import GroupCommitter
from entidb.server.hooks import Grant

WAIT_S = 30.0
#: For ever, as far as a test goes.
PATIENT_S = 3600.0
GRANT = Grant(subject="somebody", read=True, write=True)


class Visitor:
    """A thread that goes through a gate and stays inside until it is told to leave."""

    def __init__(self, gate: WriterGate, came: Callable[[], None] = lambda: None) -> None:
        self._gate = gate
        self._came = came
        self.inside = threading.Event()
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        turn = self._gate.enter()
        self._came()
        self.inside.set()
        self.done.wait(WAIT_S)
        self._gate.leave(turn)

    def leave(self) -> None:
        self.done.set()
        self._thread.join(WAIT_S)


def stand_in_line(gate: WriterGate, count: int) -> None:
    """Until so many do."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if len(gate._line) == count:
            return
        pause.wait(0.005)
    raise AssertionError(f"{len(gate._line)} stand in line, and not {count}")


def test_one_goes_in_after_the_other_in_the_order_in_which_they_came() -> None:
    gate, order = WriterGate(PATIENT_S), list[int]()
    first = Visitor(gate)
    assert first.inside.wait(WAIT_S)
    others = []
    for number in range(5):
        others.append(Visitor(gate, lambda number=number: order.append(number)))  # type: ignore[misc]
        stand_in_line(gate, number + 1)
    assert order == []
    first.leave()
    for number, other in enumerate(others):
        assert other.inside.wait(WAIT_S)
        assert order == list(range(number + 1))
        other.leave()


def test_who_stays_inside_for_long_keeps_nobody_out() -> None:
    gate = WriterGate(0.001)
    stuck = Visitor(gate)
    assert stuck.inside.wait(WAIT_S)
    others = [Visitor(gate) for _ in range(5)]
    # All of them stay, and each lets the next one in after a while.
    assert all(other.inside.wait(WAIT_S) for other in others)
    for each in (*others, stuck):
        each.leave()


def test_it_is_the_newest_inside_whose_end_lets_the_next_one_in() -> None:
    gate = WriterGate(0.0)
    old = Visitor(gate)
    assert old.inside.wait(WAIT_S)
    newer = Visitor(gate)
    assert newer.inside.wait(WAIT_S)
    gate._patience_s = PATIENT_S
    next_one = Visitor(gate)
    stand_in_line(gate, 1)
    old.leave()
    assert not next_one.inside.is_set()
    newer.leave()
    assert next_one.inside.wait(WAIT_S)
    next_one.leave()


class Slow:
    """Decides when it is let to; notes how many pushes each group had."""

    def __init__(self, db_id: str) -> None:
        self.db_id = db_id
        self.began = threading.Event()
        self.goes_on = threading.Event()
        self.groups: list[int] = []

    def push_many(
        self, members: Sequence[tuple[PushRequest | RoundRequest, Grant]]
    ) -> list[PushResponse | SyncError]:
        self.groups.append(len(members))
        self.began.set()
        assert self.goes_on.wait(WAIT_S)
        return [PushResponse(results=[], collections=[], head=0, time=0) for _ in members]


def a_push(db_id: str) -> PushRequest:
    return PushRequest(
        db_id=db_id,
        device_id=bytes(16),
        history=bytes(16),
        cursor=0,
        collections=[],
        transactions=[PushTransaction(bytes(16), 0, [])],
    )


def test_what_comes_while_another_database_commits_is_one_group() -> None:
    gate = WriterGate(PATIENT_S)
    first, second = Slow("a"), Slow("b")
    second.goes_on.set()
    committers = [GroupCommitter(each, gate=gate) for each in (first, second)]
    answered: list[object] = []
    committers[0].submit(a_push("a"), GRANT, answered.append)
    assert first.began.wait(WAIT_S)
    committers[1].submit(a_push("b"), GRANT, answered.append)
    stand_in_line(gate, 1)
    for _ in range(4):
        committers[1].submit(a_push("b"), GRANT, answered.append)
    assert second.groups == []
    first.goes_on.set()
    for committer in committers:
        committer.stop()
    assert (first.groups, second.groups) == ([1], [5])
    assert len(answered) == 6


class Ending(Slow):
    """Asks once for the end of its thread."""

    def push_many(
        self, members: Sequence[tuple[PushRequest | RoundRequest, Grant]]
    ) -> list[PushResponse | SyncError]:
        if not self.groups:
            self.groups.append(len(members))
            raise SystemExit(3)
        return super().push_many(members)


def test_what_asks_for_the_end_of_the_thread_gets_an_answer_and_the_next_push_too() -> None:
    ending = Ending("a")
    ending.goes_on.set()
    failures: list[object] = []
    committer = GroupCommitter(ending, on_failure=failures.append)
    for expected in (ServerError, PushResponse):
        answered: queue.Queue[object] = queue.Queue()
        committer.submit(a_push("a"), GRANT, answered.put)
        assert isinstance(answered.get(timeout=WAIT_S), expected)
    assert len(failures) == 1
    committer.stop()


def test_a_database_that_is_stuck_keeps_no_other_from_committing() -> None:
    gate = WriterGate(0.001)
    stuck, other = Slow("a"), Slow("b")
    other.goes_on.set()
    committers = [GroupCommitter(each, gate=gate) for each in (stuck, other)]
    committers[0].submit(a_push("a"), GRANT, lambda answer: None)
    assert stuck.began.wait(WAIT_S)
    for _ in range(3):
        answered = threading.Event()
        committers[1].submit(a_push("b"), GRANT, lambda answer, told=answered: told.set())  # type: ignore[misc]
        assert answered.wait(WAIT_S)
    assert stuck.groups == [1]
    stuck.goes_on.set()
    for committer in committers:
        committer.stop()


class Polite:
    """Others come first for so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def gives_way(self, db_id: str) -> bool:
        self.looks -= 1
        return db_id == "flooded" and self.looks >= 0

    def lets_go(self, db_id: str) -> bool:
        return db_id == "flooded"


def test_who_works_for_a_crowd_lets_others_pass_but_not_for_ever() -> None:
    gate = WriterGate()
    assert not lets_go(gate, "flooded"), "nobody says who comes first"
    polite = gate.manners = Polite(3)
    gate.leave(gate.enter("quiet"))
    assert polite.looks == 2
    gate.leave(gate.enter("flooded"))
    assert polite.looks < 0
    polite.looks = 10**9
    gate.leave(gate.enter("flooded"))
    assert polite.looks > 0, "it went in although others still came first"
    assert lets_go(gate, "flooded") and not lets_go(gate, "quiet") and not lets_go(None, "flooded")

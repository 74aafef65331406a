"""Turns between databases in one event loop: who floods waits for himself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest

from entidb.server.passes import (
    AT_ONCE,
    CROWD,
    FEW,
    LATELY_S,
    PATIENCE_S,
    SOLE_AT_ONCE,
    SOLE_S,
    YOUNG_S,
    Passes,
    UnderWay,
)


def test_a_few_go_on_at_once() -> None:
    async def story() -> list[object]:
        passes = Passes(asyncio.get_running_loop())
        done: list[object] = []
        for number in range(AT_ONCE + 3):
            passes.put("a", partial(done.append, number))
        return [*done]

    assert asyncio.run(story()) == list(range(AT_ONCE))


def test_those_of_one_database_go_on_in_their_order_so_many_in_each_pass() -> None:
    async def story() -> None:
        passes = Passes(asyncio.get_running_loop())
        done: list[object] = []
        for number in range(5 * AT_ONCE):
            passes.put("a", partial(done.append, number))
        for wave in range(1, 6):
            assert done == list(range(wave * AT_ONCE))
            await asyncio.sleep(0)
        passes.put("a", partial(done.append, 5 * AT_ONCE))
        assert done == list(range(5 * AT_ONCE + 1))

    asyncio.run(story())


def test_who_asks_a_quiet_database_does_not_wait_for_those_of_a_flooded_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # This loop goes by the clock of the machine, which may do something else for a while.
    monkeypatch.setattr("entidb.server.passes.LATELY_S", 600.0)

    async def story() -> None:
        passes = Passes(asyncio.get_running_loop())
        done: list[object] = []
        for _ in range(1000):
            passes.put("flooded", partial(done.append, "flooded"))
        await passes.turn("quiet")
        assert done == ["flooded"] * AT_ONCE
        # More of it in this pass come right after one of the others.
        passes.put("quiet", partial(done.append, "quiet"))
        passes.put("quiet", partial(done.append, "quiet"))
        assert done == ["flooded"] * AT_ONCE
        await asyncio.sleep(0)
        assert done[AT_ONCE:].count("quiet") == 2
        # And of the flooded one fewer than before: others come now.
        assert done[AT_ONCE:].count("flooded") == FEW

    asyncio.run(story())


def test_each_database_has_one_in_each_pass_however_many_there_are() -> None:
    async def story() -> None:
        passes = Passes(asyncio.get_running_loop())
        done: list[object] = []
        names = [f"db-{number}" for number in range(3 * AT_ONCE)]
        for name in names:
            passes.put(name, partial(done.append, name))
        assert done == names

    asyncio.run(story())


def test_who_gives_up_waiting_keeps_nobody() -> None:
    async def story() -> None:
        passes = Passes(asyncio.get_running_loop())
        done: list[object] = []
        for number in range(AT_ONCE):
            passes.put("a", partial(done.append, number))
        waiting = asyncio.ensure_future(passes.turn("a"))
        last = asyncio.ensure_future(passes.turn("a"))
        # One pass: they have begun to wait behind what was first.
        for number in range(2 * AT_ONCE):
            passes.put("a", partial(done.append, number))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait_for(last, 5)
        assert waiting.cancelled()

    asyncio.run(story())


class Loop:
    """What a ``Passes`` needs of an event loop, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self._soon: list[Callable[[], object]] = []
        self._later: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[[], object]) -> None:
        self._soon.append(call)

    def call_later(self, seconds: float, call: Callable[[], object]) -> None:
        self._later.append((self.now + seconds, call))

    def create_future(self) -> asyncio.Future[None]:
        return asyncio.Future(loop=cast("asyncio.AbstractEventLoop", self))

    def get_debug(self) -> bool:
        return False

    def rest(self) -> None:
        """Until nothing is left to do at this moment."""
        while self._soon:
            soon, self._soon = self._soon, []
            for call in soon:
                call()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = [call for at, call in self._later if at <= self.now]
        self._later = [(at, call) for at, call in self._later if at > self.now]
        self._soon += due
        self.rest()


class Scene:
    """Requests that ask, and what has gone on."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.passes = Passes(cast("asyncio.AbstractEventLoop", self.loop))
        self.done: list[str] = []

    def ask(self, name: str) -> UnderWay:
        """A request that has its turn at once."""
        try:
            self.passes.turn(name).send(None)
        except StopIteration as end:
            there: UnderWay = end.value
            return there
        raise AssertionError(f"{name} had to wait")

    def answers(self, name: str, count: int) -> None:
        for _ in range(count):
            self.passes.put(name, partial(self.done.append, name))


def test_a_crowd_waits_while_somebody_else_is_under_way() -> None:
    scene = Scene()
    quiet = scene.ask("quiet")
    scene.answers("flooded", 5 * AT_ONCE)
    scene.loop.rest()
    # What was no crowd yet went on, and a crowd waits.
    begun = len(scene.done)
    assert begun <= 2 * AT_ONCE
    scene.loop.wait(PATIENCE_S / 2)
    assert len(scene.done) == begun
    with quiet:
        pass
    scene.loop.rest()
    assert len(scene.done) == 5 * AT_ONCE


def test_a_crowd_waits_for_so_long_and_no_longer() -> None:
    scene = Scene()
    waits_for_long = scene.ask("quiet")
    scene.answers("flooded", 6 * AT_ONCE)
    scene.loop.rest()
    before = len(scene.done)
    scene.loop.wait(PATIENCE_S * 1.5)
    some = len(scene.done) - before
    assert 0 < some <= AT_ONCE
    # Whoever is under way for longer waits for something else, and nobody waits for him.
    scene.loop.wait(YOUNG_S)
    assert len(scene.done) == 6 * AT_ONCE
    with waits_for_long:
        pass


def test_crowds_do_not_wait_for_each_other() -> None:
    scene = Scene()
    for name in ("a", "b"):
        for _ in range(AT_ONCE):
            scene.ask(name)
            scene.loop.rest()
        scene.ask(name)
        scene.loop.rest()
    scene.answers("a", 4 * AT_ONCE)
    scene.answers("b", 4 * AT_ONCE)
    scene.loop.rest()
    assert len(scene.done) == 8 * AT_ONCE


def test_many_databases_with_few_requests_each_wait_for_nobody() -> None:
    scene = Scene()
    names = [f"db-{number}" for number in range(50)]
    under_way = [scene.ask(name) for name in names]
    for name in names:
        scene.answers(name, CROWD // 2)
    scene.loop.rest()
    assert len(scene.done) == 50 * (CROWD // 2)
    for each in under_way:
        with each:
            pass


def test_who_was_under_way_and_failed_holds_nobody() -> None:
    scene = Scene()
    with pytest.raises(RuntimeError, match="refused"), scene.ask("quiet"):
        raise RuntimeError("refused")
    scene.answers("flooded", 5 * AT_ONCE)
    scene.loop.rest()
    assert len(scene.done) == 5 * AT_ONCE


def asked_alone() -> Scene:
    """Where for a while nobody has asked anything but ``only``."""
    scene = Scene()
    with scene.ask("only"):
        scene.loop.wait(SOLE_S + 1)
    with scene.ask("only"):
        scene.loop.rest()
    return scene


def test_where_all_ask_one_database_many_go_on_at_once() -> None:
    scene = asked_alone()
    scene.answers("only", 3 * SOLE_AT_ONCE)
    assert len(scene.done) == SOLE_AT_ONCE
    scene.loop.rest()
    assert len(scene.done) == 3 * SOLE_AT_ONCE


def test_who_asks_another_one_ends_that_at_once_and_has_a_turn_in_the_next_pass() -> None:
    scene = asked_alone()
    scene.answers("only", 3 * SOLE_AT_ONCE)
    begun = len(scene.done)
    quiet = scene.ask("quiet")
    scene.answers("quiet", 1)
    scene.loop.rest()
    assert "quiet" in scene.done[begun:]
    assert scene.done[begun:].count("only") <= FEW, "they are a crowd, which waits"
    with quiet:
        pass
    for seconds, at_once in ((SOLE_S / 2, AT_ONCE), (SOLE_S + 0.1, SOLE_AT_ONCE)):
        scene.loop.wait(seconds)
        with scene.ask("only"):
            scene.loop.rest()
        scene.done.clear()
        scene.answers("only", 2 * SOLE_AT_ONCE)
        assert len(scene.done) == at_once
        scene.loop.rest()


def crowded(passes: Passes, db_id: str, count: int = CROWD + 1) -> UnderWay:
    """So many requests for it are under way."""
    there = passes._under_way[db_id] = UnderWay(passes, db_id)
    there.count = count
    return there


def test_of_a_crowd_few_go_on_in_a_pass_as_long_as_others_come_now_and_then() -> None:
    async def story() -> None:
        passes = Passes(loop := asyncio.get_running_loop())
        crowded(passes, "flooded")
        done: list[object] = []

        def flood() -> None:
            for _ in range(AT_ONCE):
                passes.put("flooded", partial(done.append, "flooded"))

        flood()
        assert len(done) == AT_ONCE, "nobody else is there"
        await asyncio.sleep(0)
        with await passes.turn("quiet"):
            pass
        done.clear()
        flood()
        assert len(done) == FEW
        for wave in range(2, AT_ONCE // FEW + 1):
            await asyncio.sleep(0)
            assert len(done) == wave * FEW
        passes._calm = [(name, at - LATELY_S) for name, at in passes._calm]
        await asyncio.sleep(0)
        done.clear()
        flood()
        assert len(done) == AT_ONCE, "nobody came lately"
        assert loop.time() > 0

    asyncio.run(story())


def test_who_decides_for_a_crowd_lets_others_pass_and_go_who_is_no_crowd_does_not() -> None:
    async def story() -> None:
        passes = Passes(asyncio.get_running_loop())
        there = crowded(passes, "flooded")
        assert not passes.gives_way("flooded") and not passes.lets_go("flooded")
        with await passes.turn("quiet"):
            assert passes.gives_way("flooded") and passes.lets_go("flooded")
            assert not passes.gives_way("quiet") and not passes.lets_go("quiet")
            there.count = CROWD
            assert not passes.gives_way("flooded")
            there.count = CROWD + 1
        # It is answered: nothing waits for it any more, and the next one may come.
        assert not passes.gives_way("flooded") and passes.lets_go("flooded")

    asyncio.run(story())

"""Turns between databases in one event loop: who floods waits for himself."""

from __future__ import annotations

import asyncio
from functools import partial

from entidb.server.passes import AT_ONCE, Passes


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


def test_who_asks_a_quiet_database_does_not_wait_for_those_of_a_flooded_one() -> None:
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
        assert len(done) == 2 * AT_ONCE

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

"""What connections wait on."""

from __future__ import annotations

import asyncio

from entidb.server.cycle import Flag


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def waiting_for(flag: Flag) -> int:
    return len(flag._those)


def test_a_flag_that_is_up_is_waited_for_by_nobody():
    async def run() -> None:
        flag = Flag(up=True)
        assert flag.is_set() and await flag.wait()
        flag.clear()
        assert not flag.is_set()

    asyncio.run(run())


def test_all_who_wait_for_a_flag_go_on_when_it_is_raised_also_if_it_is_down_again_by_then():
    async def run() -> None:
        flag = Flag()
        waiting = [asyncio.create_task(flag.wait()) for _ in range(3)]
        await turns()
        assert not any(each.done() for each in waiting)
        flag.set()
        flag.set()
        flag.clear()
        assert await asyncio.gather(*waiting) == [True, True, True]
        assert not flag.is_set()

    asyncio.run(run())


def test_who_has_stopped_waiting_for_a_flag_is_forgotten():
    async def run() -> None:
        flag = Flag()
        one, other = (asyncio.create_task(flag.wait()) for _ in range(2))
        await turns()
        one.cancel()
        await turns()
        assert one.cancelled()
        assert waiting_for(flag) == 1
        flag.set()
        assert await other
        assert waiting_for(flag) == 0

    asyncio.run(run())

"""The event loop of a simulated process."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

from entidb.testing.loop import WorldLoop
from entidb.testing.simulator import Options
from entidb.testing.world import World


def test_what_had_not_begun_when_its_process_ended_is_ended_too() -> None:
    dropped: list[Callable[[], None]] = []
    began: list[int] = []

    async def work(loop: WorldLoop, number: int) -> None:
        began.append(number)
        await loop.create_future()

    loop = WorldLoop(World(1, Options()), lambda delay_ms, call: dropped.append(call))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.create_task(work(loop, 1))
        (first,) = dropped
        first()
        loop.create_task(work(loop, 2))
        loop.end()
        dropped.clear()
        del loop, first
        gc.collect()
    assert began == [1]
    assert [str(each.message) for each in caught if "never awaited" in str(each.message)] == []

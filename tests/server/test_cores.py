"""Workers stay on cores of their own where there are as many; what reads much runs anywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from entidb.protocol import PullResponse, PushResponse
from entidb.server.cores import core_of
from tests.server.support import pull, push
from tests.server.test_workers import Served, served


@pytest.mark.parametrize(
    ("count", "cores", "expected"),
    [
        (2, [0, 1], [0, 1]),
        (2, [4, 7], [4, 7]),
        (4, [0, 1], [0, 1, 0, 1]),
        (3, [0, 1], [None, None, None]),
        (2, [0, 1, 2, 3], [None, None]),
        (2, [0], [None, None]),
    ],
)
def test_a_worker_has_a_core_where_each_core_gets_as_many(
    count: int, cores: list[int], expected: list[int | None]
) -> None:
    assert [core_of(number, count, cores) for number in range(count)] == expected


if sys.platform == "linux":
    usable = sorted(os.sched_getaffinity(0))

    @contextmanager
    def on_cores(cores: list[int]) -> Iterator[None]:
        """What this thread starts may use these only."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def cores_of(server: Served) -> dict[int, set[int]]:
        """Of the first thread of each worker, which serves."""
        return {pid: os.sched_getaffinity(pid) for pid in server.workers()}

    def cores_of_threads(pid: int) -> list[set[int]]:
        threads = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]
        return [os.sched_getaffinity(thread) for thread in threads]

    @pytest.mark.process
    @pytest.mark.skipif(len(usable) < 2, reason="with one core there is nothing to choose")
    def test_two_workers_share_two_cores_also_when_one_has_taken_anothers_place(
        tmp_path: Path,
    ) -> None:
        two = usable[:2]
        with on_cores(two), served(tmp_path) as server:
            for _ in range(2):
                assert sorted(map(list, cores_of(server).values())) == [[two[0]], [two[1]]]
                server.kill_one()
            for client in server.clients():
                history = client.history()
                client.send(push(history, 1)).message(PushResponse)
                client.send(pull(history, cursor=0, full=True)).message(PullResponse)
            for pid in server.workers():
                # Its writers are where it is, and its reader is anywhere.
                threads = cores_of_threads(pid)
                assert threads.count(os.sched_getaffinity(pid)) > 1
                assert set(two) in threads

    @pytest.mark.process
    @pytest.mark.skipif(len(usable) < 2, reason="with one core there is nothing to choose")
    def test_three_workers_of_two_cores_run_on_any(tmp_path: Path) -> None:
        two = usable[:2]
        with on_cores(two), served(tmp_path, workers=3) as server:
            assert list(cores_of(server).values()) == [set(two)] * 3

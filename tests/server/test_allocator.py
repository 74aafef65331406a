"""Large pieces of memory are mappings while a database is being opened, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from entidb.server import allocator

CALLS = list[tuple[int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> CALLS:
    made: CALLS = []

    def mallopt(parameter: int, value: int) -> int:
        made.append((parameter, value))
        return 1

    monkeypatch.setattr(allocator, "_mallopt", mallopt)
    return made


def thresholds(calls: CALLS) -> list[int]:
    return [value for parameter, value in calls if parameter == allocator._MMAP_THRESHOLD]


def test_the_threshold_is_low_until_the_last_opening_is_over(calls: CALLS) -> None:
    low, usual = allocator._OPENING_BYTES, allocator._USUAL_BYTES
    with allocator.large_pieces_apart():
        with allocator.large_pieces_apart():
            assert thresholds(calls) == [low, low]
        assert thresholds(calls)[-1] == low
    assert thresholds(calls)[-1] == usual


def test_the_threshold_is_put_back_when_opening_fails(calls: CALLS) -> None:
    with pytest.raises(OSError, match="no such place"), allocator.large_pieces_apart():
        raise OSError("no such place")
    assert thresholds(calls)[-1] == allocator._USUAL_BYTES


def test_where_there_is_no_such_allocator_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_mallopt", None)
    with allocator.large_pieces_apart():
        assert allocator._opening == 0


@pytest.mark.process
@pytest.mark.parametrize("name", allocator._SET_BY_HAND)
def test_an_allocator_that_an_operator_has_set_up_is_left_alone(name: str) -> None:
    script = "from entidb.server import allocator; print(allocator._mallopt)"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, name: "131072"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == "None"


_MANY = """
import sys
from pathlib import Path
from entidb.server import ServerConfig, SyncServer

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

with SyncServer(ServerConfig(data_dir=sys.argv[1], insecure_no_auth=True)) as server:
    for piece in [bytearray(16 << 20) for _ in range(2)]:
        del piece  # what a large message leaves behind: glibc takes the like from its heap now
    server.database("first")
    before = anonymous()
    for number in range(24):
        server.database(f"d{number}")
    print((anonymous() - before) / 24)
"""


@pytest.mark.process
@pytest.mark.skipif(allocator._mallopt is None, reason="not glibc, or set up by hand")
def test_an_open_database_takes_less_than_a_mebibyte_of_memory(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _MANY, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(ended.stdout) < 1024

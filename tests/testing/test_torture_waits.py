"""What a long commit was made of is told from the times of all processes."""

from __future__ import annotations

import re

from entidb.testing.torture_waits import (
    Commit,
    Span,
    Stopwatch,
    Struck,
    after_a_death,
    explain,
    read_commit,
)

#: Asked at 10 s, and had its turn a second later.
LONG = Commit(1, 10.0, 11.0, 11.01, 11.05, 0.2)
OTHERS = [
    Commit(2, 9.0, 9.9, 9.91, 10.1, 0.0),
    Commit(3, 9.5, 10.15, 10.2, 10.4, 0.0),
    Commit(2, 10.1, 10.75, 10.8, 10.9, 0.0),
]


def numbers(line: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", line)]


def test_a_wait_is_taken_apart() -> None:
    struck = Struck(stops=[(3, Span(10.3, 10.35)), (1, Span(10.0, 10.02))], kills=[(4, 10.6)])
    lines = explain(LONG, [*OTHERS, LONG], struck)
    assert [numbers(line) for line in lines] == [
        [1, 1000, 10, 40],  # for its turn, deciding, committing
        [3, 2, 450, 2],  # 100 + 250 - 50 + 150 of two others
        [50, 20],
        [350, 350],  # from 10.4, where nobody was left that tells, to 10.75
        [150, 2],  # from 10.1 to 10.15, and from 10.9 to 11
        [200],
    ]


def test_the_turn_of_a_dead_process_counts_from_its_death_or_from_when_the_next_one_asked() -> None:
    asked_later = Commit(5, 21.0, 21.3, 21.3, 21.4, 0.0)
    assert round(after_a_death([*OTHERS, LONG], Struck(kills=[(4, 10.6)])), 3) == 0.15
    assert round(after_a_death([asked_later], Struck(kills=[(4, 20.0)])), 3) == 0.3
    stopped = Struck(stops=[(5, Span(21.05, 21.25))], kills=[(4, 20.0)])
    assert round(after_a_death([asked_later], stopped), 3) == 0.1
    # Another one had it when this one died.
    assert after_a_death(OTHERS, Struck(kills=[(4, 10.2)])) == 0.0


def test_a_ledger_says_the_times_and_may_say_none() -> None:
    watch = Stopwatch()
    watch.start()
    for _ in range(3):
        watch.lap()
    line = watch.line("mark")
    commit = read_commit(7, line)
    assert commit is not None and commit.process == 7
    assert abs(commit.took_s - float(line.split()[1])) < 1e-5
    assert commit.asked <= commit.had_turn <= commit.decided <= commit.returned
    assert read_commit(7, "mark 0.1") is None
